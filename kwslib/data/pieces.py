"""Pieces of stream to learn from: words one after another or far apart, halves of the keyword, somebody talking, noise.

They are mixed as sound and then turned into log-mels, once per corpus, so that nothing changes where one word
ends and the next begins. Every experiment, seed and worker process reads the same ones.

Talk is what a detector hears all day and what no corpus of words has in it: sentences without the keyword, read by the
synthesizer. Its voices that judge are not those that teach.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from kwslib import paths
from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE, FeatureConfig, identity
from kwslib.data import augment, synthesis
from kwslib.data.augment import FRAME, Augmentation, loud_frames, speech_power, vary
from kwslib.data.corpora import Corpus
from kwslib.data.features import VERSION as LOGMELS_VERSION
from kwslib.data.features import LogMel, from_int16, n_frames, new_array, one_thread, prepared
from kwslib.data.synthesis import COLOURS, coloured_noise
from kwslib.processes import in_fresh_process, in_fresh_processes, in_helpers, made_once

FRAMES = n_frames(FeatureConfig()) - 1  # of each second; the first frame of all has heard nothing yet
VERSION = 4  # raise it when the same recipe would give other pieces
PAUSES = ((1.0, 0.6), (0.5, 0.2), (0.2, 0.2))  # (share of the seconds with a word, share of the pieces)
BLOCK = 256  # pieces that share a random seed

TALK_VERSION = 1  # raise it, and those of pieces and tracks, when the same talk would sound different
MOST_TALK_S = 3600  # to learn from
TURN_S = 30  # one voice talks for so long
MOST_SENTENCES = 40  # of a turn; the shortest take a second
MOST_TRIES = 2_000  # until a sentence is without the keyword
SENTENCES, SLOTS = tuple(synthesis.ENGLISH["sentences"]), synthesis.ENGLISH["slots"]


def sentence(keyword: str, rng: np.random.Generator, alike: Collection[str] = ()) -> str:
    """Something to say without the keyword, nor a word that holds it, nor one of those that sound ``alike``.

    >>> "cat" in sentence("cat", np.random.default_rng(0))
    False

    Raises:
        ValueError: there hardly is one.
    """
    for _ in range(MOST_TRIES):
        text = str(rng.choice(SENTENCES))
        for slot, said in SLOTS.items():
            options = said.split("|") if "|" in said else said.split()
            options = [*options, *synthesis.NEIGHBOURS] if slot == "N" else options
            while f"{{{slot}}}" in text:
                text = text.replace(f"{{{slot}}}", str(rng.choice(options)), 1)
        plain = text.lower()
        if not any(word in plain for word in keyword.lower().split()) and not set(alike).intersection(plain.split()):
            return text
    raise ValueError(f"hardly a sentence goes without {keyword!r}: give a keyword of fewer everyday words")


def sounding_like(keyword: str) -> list[str]:
    """The words of those sentences that sound like the keyword: who says one of them says the keyword, too."""
    texts = (*SENTENCES, *SLOTS.values(), *synthesis.NEIGHBOURS)
    words = sorted({word for text in texts for word in re.findall(r"[a-z'’]+", text.lower())})
    sounds = in_fresh_process(synthesis.sounds_of, keyword, *words)
    return [word for word in words if sounds[word] == sounds[keyword]]


def talk(corpus: Corpus, keyword: str, subset: str, seconds: float) -> np.ndarray:
    """Sentences without the keyword by the synthesizer's voices of ``train``, ``val`` or ``test`` of a corpus.

    int16 (samples,), so many seconds or a little more, made once for all corpora. Longer talk begins as shorter does.
    """
    n_turns, every = math.ceil(seconds / TURN_S), synthesis.speakers(600)
    voices = {name: every[name] for name in sorted(every) if corpus.subset_of_voice(name) == subset}
    key = identity(TALK_VERSION, synthesis.VERSION, keyword, subset, n_turns, voices, SENTENCES, SLOTS)
    path = paths.data() / f"talk-{key}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with made_once(path) as missing:
        if missing:
            n_parts, alike = min(synthesis.N_PARTS, n_turns), sounding_like(keyword)
            turns = [_turn(keyword, alike, subset, voices, number) for number in range(n_turns)]
            parts = [range(start, n_turns, n_parts) for start in range(n_parts)]
            spoken = in_fresh_processes(synthesis.talked, [([turns[i] for i in part], TURN_S) for part in parts])
            with new_array(path, np.int16, (n_turns, TURN_S * SAMPLE_RATE)) as out:
                for part, said in zip(parts, spoken, strict=True):
                    out[part] = said
    return np.load(path, mmap_mode="r").reshape(-1)


def _turn(keyword: str, alike: list[str], subset: str, voices: dict[str, str], number: int) -> tuple:
    """A voice, how it speaks, and more sentences than a turn has room for, each with the pause after it in seconds."""
    rng, names = np.random.default_rng([len(subset), number]), list(voices)
    voice = voices[names[rng.integers(len(names))]]
    sound = rng.uniform(120, 220), rng.uniform(15, 85), rng.uniform(10, 90), rng.uniform(0.9, 1.12)
    return voice, sound, [(sentence(keyword, rng, alike), rng.uniform(0.1, 0.8)) for _ in range(MOST_SENTENCES)]


@dataclass(frozen=True)
class PieceConfig:
    """What a piece of stream is made of.

    Attributes:
        clips: seconds, each with a clip or a pause.
        keyword_share: of the words; where words are rare, keywords are as many.
        part_share: of the words, first or second halves of the keyword: they are not the keyword.
        snr_db: the piece's mean speech power over its noise, drawn from this range.
        level_db: of the speech, drawn for each piece; every word is up to 6 dB louder or softer.
        talk_share: of the pieces, talk without the keyword instead of words.
        gate_share: of the pieces, exact zeros where nobody speaks, as behind a noise gate or between glued files.
        narrow_share: of the pieces, nothing above 3.4 to 4 kHz, as on a telephone.

    Raises:
        ValueError: no two seconds, no keywords, or nothing else.
    """

    recorded_as = "Sequences"

    clips: int = 10
    keyword_share: float = 0.12
    part_share: float = 0.06
    snr_db: tuple[float, float] = (6.0, 40.0)
    level_db: tuple[float, float] = (-40.0, -8.0)
    talk_share: float = 0.33
    gate_share: float = 0.05
    narrow_share: float = 0.05

    def __post_init__(self):
        shares = self.part_share, self.talk_share, self.gate_share, self.narrow_share
        if self.clips < 2 or not 0 < self.keyword_share < 1 or not all(0 <= share < 1 for share in shares):
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
    corpus: Corpus,
    rows: np.ndarray,
    is_keyword: np.ndarray,
    n: int,
    recipe: PieceConfig,
    augmentation: Augmentation,
    keyword: str,
) -> tuple[np.ndarray, np.ndarray]:
    """``n`` pieces of stream made of these clips, and which of their seconds say the keyword.

    Args:
        rows, is_keyword: clips of the corpus, and which of them (R,) are the keyword.
        augmentation: of each word; its levels and noise are left to ``recipe``.
        keyword: what nobody says in the talk.

    Returns:
        Log-mels, float16 (n, F, clips * 100 + 1), memory-mapped, and labels 0 or 1, (n, clips).
    """
    features = FeatureConfig()
    words = replace(augmentation, context_share=0.0, gain_db=(0.0, 0.0), noise_share=0.0, frequency_mask=0, time_mask=0)
    versions, heard = (VERSION, augment.VERSION, LOGMELS_VERSION), (rows.tolist(), is_keyword.tolist())
    talked = (TALK_VERSION, synthesis.VERSION, keyword) if recipe.talk_share else ()
    key = identity(*versions, *talked, corpus.fingerprint, *heard, n, recipe, words, features)
    path, labels = corpus.folder / f"pieces-{key}.npy", corpus.folder / f"pieces-{key}-labels.npy"
    with made_once(path) as missing:
        if missing:
            shape = (n, features.n_mels, recipe.clips * FRAMES + 1)
            talk_s = min(MOST_TALK_S, n * recipe.clips * recipe.talk_share)
            said_all_day = talk(corpus, keyword, "train", talk_s) if recipe.talk_share else None
            # The labels get their name first: where there are pieces, there are labels.
            with new_array(path, np.float16, shape) as out, new_array(labels, np.int8, (n, recipe.clips)) as said:
                blocks = [slice(start, start + BLOCK) for start in range(0, n, BLOCK)]
                calls = (
                    (corpus, rows, is_keyword, said_all_day, block.start, recipe, words, out[block], said[block])
                    for block in blocks
                )
                for _ in tqdm(in_helpers(_block, calls), desc="pieces of stream", total=len(blocks), unit="block"):
                    pass
    return np.load(path, mmap_mode="r"), np.load(labels)


@torch.no_grad()
def _block(corpus, rows, is_keyword, talk, seed: int, recipe: PieceConfig, words: Augmentation, out, said) -> None:
    """Fill some pieces and their labels; the seed is that of the block: more pieces change no earlier one."""
    rng, g, front_end = np.random.default_rng(seed), Generator().manual_seed(seed), LogMel()
    with one_thread():
        for i in range(len(out)):
            level_db = rng.uniform(*recipe.level_db)
            if rng.random() < recipe.talk_share:
                samples, said[i] = _talk_piece(corpus, talk, recipe.clips, level_db, words, rng, g), 0
            else:
                samples, said[i] = _piece(corpus, rows[is_keyword], rows[~is_keyword], recipe, level_db, words, rng, g)
            kind = rng.choice([*COLOURS, "corpus", "corpus"])
            over = 10 ** ((level_db - rng.uniform(*recipe.snr_db)) / 20)
            samples += torch.from_numpy(noise(kind, corpus.noise, len(samples), rng) * np.float32(over))
            if rng.random() < recipe.gate_share:
                samples = gated(samples, rng.uniform(20, 30), rng.uniform(0.02, 0.2))
            if rng.random() < recipe.narrow_share:
                samples = narrowed(samples, rng.uniform(3400, 4000))
            out[i] = prepared(samples.clamp(-1, 1)[None], front_end)[0].numpy()


def gated(samples: Tensor, depth_db: float, hold_s: float) -> Tensor:
    """Exact zeros where nothing is within ``depth_db`` of the loudest 20 ms, nor was ``hold_s`` before. (N,) -> (N,)"""
    power = samples.unfold(0, FRAME, FRAME).square().mean(1)
    loud = (power >= power.max() / 10 ** (depth_db / 10)).float()
    held = math.ceil(hold_s * SAMPLE_RATE / FRAME)
    opened = nn.functional.max_pool1d(nn.functional.pad(loud, (held, 0))[None], held + 1, 1)[0]
    opened = opened.repeat_interleave(FRAME)
    return samples * nn.functional.pad(opened, (0, len(samples) - len(opened)))


def narrowed(samples: Tensor, highest_hz: float) -> Tensor:
    """Nothing above ``highest_hz``. (N,) -> (N,)"""
    spectrum = np.fft.rfft(samples.numpy())
    spectrum[round(highest_hz * len(samples) / SAMPLE_RATE) :] = 0
    return torch.from_numpy(np.fft.irfft(spectrum, len(samples)).astype(np.float32))


def _talk_piece(corpus, talk, seconds: int, level_db: float, words: Augmentation, rng, g) -> Tensor:
    """Samples (seconds * 16000,) of somebody talking in a room."""
    begin = int(rng.integers(len(talk) - seconds * CLIP_SAMPLES + 1))
    samples = from_int16(talk[begin : begin + seconds * CLIP_SAMPLES])[None]
    samples = vary(samples, samples, corpus.noise, words, g)
    return (samples * (10 ** (level_db / 10) / speech_power(samples).clamp_min(1e-8)).sqrt()[:, None])[0]


def _piece(
    corpus, keywords, others, recipe: PieceConfig, level_db: float, words: Augmentation, rng, g
) -> tuple[Tensor, np.ndarray]:
    """Samples (clips * 16000,) and labels (clips,) of one piece of words."""
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
    power = torch.from_numpy(10 ** ((level_db + rng.uniform(-6, 6, n)) / 10) * spoken).float()
    return (clips * (power / speech_power(clips).clamp_min(1e-8)).sqrt()[:, None]).reshape(-1), keyword
