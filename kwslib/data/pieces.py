"""Pieces of stream to learn from: words one after another or far apart, halves of the keyword, noise over all of it.

They are mixed as sound and then turned into log-mels, once per corpus, so that nothing changes where one word
ends and the next begins. Every experiment, seed and worker process reads the same ones.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from joblib import Parallel, cpu_count, delayed
from torch import Generator, Tensor
from tqdm.auto import tqdm

from kwslib.config import CLIP_SAMPLES, FeatureConfig, identity
from kwslib.data import augment
from kwslib.data.augment import FRAME, Augmentation, loud_frames, speech_power, vary
from kwslib.data.corpora import Corpus
from kwslib.data.features import VERSION as LOGMELS_VERSION
from kwslib.data.features import LogMel, from_int16, n_frames, new_array, one_thread, prepared
from kwslib.data.synthesis import coloured_noise
from kwslib.processes import made_once

COLOURS = {"white": 0.0, "pink": 0.5, "brown": 1.0}  # amplitude falls with this power of the frequency
FRAMES = n_frames(FeatureConfig()) - 1  # of each second; the first frame of all has heard nothing yet
VERSION = 2  # raise it when the same recipe would give other pieces
PAUSES = ((1.0, 0.6), (0.5, 0.2), (0.2, 0.2))  # (share of the seconds with a word, share of the pieces)
BLOCK = 256  # pieces that share a random seed


@dataclass(frozen=True)
class PieceConfig:
    """What a piece of stream is made of.

    Attributes:
        clips: seconds, each with a clip or a pause.
        keyword_share: of the words; where words are rare, keywords are as many.
        part_share: of the words, first or second halves of the keyword: they are not the keyword.
        snr_db: the piece's mean speech power over its noise, drawn from this range.
        level_db: of the speech, drawn for each piece; every word is up to 6 dB louder or softer.

    Raises:
        ValueError: no two seconds, no keywords, or nothing else.
    """

    recorded_as = "Sequences"

    clips: int = 10
    keyword_share: float = 0.12
    part_share: float = 0.06
    snr_db: tuple[float, float] = (6.0, 40.0)
    level_db: tuple[float, float] = (-40.0, -8.0)

    def __post_init__(self):
        if self.clips < 2 or not 0 < self.keyword_share < 1 or not 0 <= self.part_share < 1:
            raise ValueError(f"a piece of stream has two clips or more, some of them keywords, not {self}")


def noise(kind: str, recordings: dict[str, np.ndarray], n_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of mean power 1, float32 (n_samples,).

    Args:
        kind: ``white``, ``pink``, ``brown``, or ``corpus``, an excerpt of one of the recordings.
    """
    if kind == "corpus":
        recording = recordings[sorted(recordings)[rng.integers(len(recordings))]].astype(np.float32)
        sound = np.resize(np.roll(recording, int(rng.integers(len(recording)))), n_samples)
    else:
        sound = coloured_noise(rng, n_samples, COLOURS[kind], lowest_hz=50.0)
    return (sound / (np.sqrt(np.square(sound).mean()) or 1.0)).astype(np.float32)


def half_of(word: Tensor, share: float, first: bool) -> Tensor:
    """A word without its rest: silence from, or up to, this share of its loud part. (N,) -> (N,)"""
    loud = loud_frames(word[None])[0].nonzero()[:, 0]
    begin, end = int(loud[0]) * FRAME, int(loud[-1] + 1) * FRAME
    cut = int(begin + (end - begin) * share)
    silenced = word.clone()
    silenced[slice(cut, None) if first else slice(cut)] = 0
    return silenced


def bank(
    corpus: Corpus, rows: np.ndarray, is_keyword: np.ndarray, n: int, recipe: PieceConfig, augmentation: Augmentation
) -> tuple[np.ndarray, np.ndarray]:
    """``n`` pieces of stream made of these clips, and which of their seconds say the keyword.

    Args:
        rows, is_keyword: clips of the corpus, and which of them (R,) are the keyword.
        augmentation: of each word; its levels and noise are left to ``recipe``.

    Returns:
        Log-mels, float16 (n, F, clips * 100 + 1), memory-mapped, and labels 0 or 1, (n, clips).
    """
    features = FeatureConfig()
    words = replace(augmentation, context_share=0.0, gain_db=(0.0, 0.0), noise_share=0.0, frequency_mask=0, time_mask=0)
    versions, heard = (VERSION, augment.VERSION, LOGMELS_VERSION), (rows.tolist(), is_keyword.tolist())
    key = identity(*versions, corpus.fingerprint, *heard, n, recipe, words, features)
    path, labels = corpus.folder / f"pieces-{key}.npy", corpus.folder / f"pieces-{key}-labels.npy"
    with made_once(path) as missing:
        if missing:
            shape = (n, features.n_mels, recipe.clips * FRAMES + 1)
            # The labels get their name first: where there are pieces, there are labels.
            with new_array(path, np.float16, shape) as out, new_array(labels, np.int8, (n, recipe.clips)) as said:
                blocks = [slice(start, start + BLOCK) for start in range(0, n, BLOCK)]
                work = Parallel(n_jobs=min(cpu_count(), len(blocks)), return_as="generator_unordered")(
                    delayed(_block)(corpus, rows, is_keyword, block.start, recipe, words, out[block], said[block])
                    for block in blocks
                )
                for _ in tqdm(work, desc="pieces of stream", total=len(blocks), unit="block"):
                    pass
    return np.load(path, mmap_mode="r"), np.load(labels)


@torch.no_grad()
def _block(corpus, rows, is_keyword, seed: int, recipe: PieceConfig, words: Augmentation, out, said) -> None:
    """Fill some pieces and their labels; the seed is that of the block: more pieces change no earlier one."""
    rng, g, front_end = np.random.default_rng(seed), Generator().manual_seed(seed), LogMel()
    with one_thread():
        for i in range(len(out)):
            samples, said[i] = _piece(corpus, rows[is_keyword], rows[~is_keyword], recipe, words, rng, g)
            out[i] = prepared(samples[None], front_end)[0].numpy()


def _piece(corpus, keywords, others, recipe: PieceConfig, words: Augmentation, rng, g) -> tuple[Tensor, np.ndarray]:
    """Samples (clips * 16000,) and labels (clips,) of one piece."""
    n = recipe.clips
    densities, shares = zip(*PAUSES, strict=True)
    density = rng.choice(densities, p=shares)
    spoken = rng.random(n) < density
    keyword = spoken & (rng.random(n) < min(0.5, recipe.keyword_share / density))
    part = spoken & ~keyword & (rng.random(n) < recipe.part_share)
    chosen = np.where(keyword | part, rng.choice(keywords, n), rng.choice(others, n))
    clips = from_int16(corpus.waveforms[chosen])
    for second in np.flatnonzero(part):
        clips[second] = half_of(clips[second], rng.uniform(0.35, 0.65), bool(rng.random() < 0.5))
    clips = vary(clips, clips, corpus.noise, words, g)
    speech_db = rng.uniform(*recipe.level_db)
    power = torch.from_numpy(10 ** ((speech_db + rng.uniform(-6, 6, n)) / 10) * spoken).float()
    samples = (clips * (power / speech_power(clips).clamp_min(1e-8)).sqrt()[:, None]).reshape(-1)
    kind = rng.choice([*COLOURS, "corpus", "corpus"])
    noise_db = speech_db - rng.uniform(*recipe.snr_db)
    samples += torch.from_numpy(noise(kind, corpus.noise, n * CLIP_SAMPLES, rng) * np.float32(10 ** (noise_db / 20)))
    return samples.clamp(-1, 1), keyword
