"""Augmentation: of the waveform, kept as a bank of log-mel views, and of the log-mels, batch by batch.

The bank is computed once per corpus and read by every experiment, seed and worker process.

Own code, because the well-kept library for it, audiomentations 0.43, works clip by clip: the like of
``vary`` (stretch, shift, impulse response, shelves, gain, background) took it 5.5 ms per clip on one
core, this took 1.0 ms in the same minute; and it measures the signal-to-noise ratio with the silence.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE, FeatureConfig, identity
from kwslib.data.corpora import Corpus
from kwslib.data.features import SILENCE, LogMel, from_int16, n_frames, new_array, one_thread, prepared
from kwslib.data.features import VERSION as LOGMELS_VERSION
from kwslib.processes import in_helpers, made_once

FRAME = 320  # samples of a 20-ms frame, the grain at which speech is told from silence
VERSION = 3  # raise it when the same recipe would give other views


@dataclass(frozen=True)
class Augmentation:
    """How training clips are varied. A share is the part of the clips to which it happens; 0 turns it off.

    Attributes:
        shift_ms: the clip moves by up to this much either way; what leaves is lost, zeros enter.
        speed: range of playback speeds, pitch and tempo together; (1, 1) is unchanged.
        context_share: another word ends shortly before the clip's own begins, as on a stream, so that
            the model does not learn that words come out of silence.
        room_share, rt60_s: reverberation of a small room, and the range of reverberation times.
        tilt_db: the spectrum is tilted by up to this much per octave either way, as by a microphone.
        gain_db: range of levels.
        noise_share, snr_db: background recordings or white noise, and the range of ratios of the
            speech's power (of its loud frames, not of the silence around it) to the noise's.
        four_ways: instead of room, tilt, gain and noise, what the reports did: nothing, Gaussian noise
            (sigma 0.01), a quarter of the level, or background noise at 20 dB, with equal probability.
        frequency_mask, time_mask: SpecAugment, largest width in mel bins and frames. The reports' 15
            and 35: a third of a second is most of a word, narrower masks were better on val.
    """

    shift_ms: float = 100.0
    speed: tuple[float, float] = (0.85, 1.15)
    context_share: float = 0.0
    room_share: float = 0.15
    rt60_s: tuple[float, float] = (0.1, 0.5)
    tilt_db: float = 1.0
    gain_db: tuple[float, float] = (-12.0, 3.0)
    noise_share: float = 0.4
    snr_db: tuple[float, float] = (8.0, 30.0)
    four_ways: bool = False
    frequency_mask: int = 4
    time_mask: int = 8


# What the course and the five reports did, as far as a recipe can say it.
REPORTS = Augmentation(shift_ms=0, speed=(1, 1), context_share=0, four_ways=True, frequency_mask=15, time_mask=35)

# For small students, which did better on val without; see the appendix on augmentation.
WITHOUT_MASKS = Augmentation(frequency_mask=0, time_mask=0)

# What made clip models from voices know people better; twice as wide masks undid it (CHANGELOG.md).
STRONG = Augmentation(speed=(0.75, 1.3), room_share=0.4, tilt_db=3.0, noise_share=0.7, snr_db=(0.0, 30.0),
                      frequency_mask=8, time_mask=16)  # fmt: skip


def shift(samples: Tensor, offsets: Tensor, speeds: Tensor) -> Tensor:
    """Play each row at its speed, around its middle, then move it right by its offset; zeros enter.

    Faster is also higher, as on a tape: that is another speaker at another pace. Samples between
    samples are interpolated linearly. (B, N), (B,), (B,) -> (B, N)

    >>> shift(torch.tensor([[1., 2., 3., 4.], [1., 2., 3., 4.]]), torch.tensor([1, -2]), torch.ones(2))
    tensor([[0., 1., 2., 3.],
            [3., 4., 0., 0.]])
    """
    n = samples.shape[1]
    middle = (n - 1) / 2
    source = (torch.arange(n) - middle - offsets[:, None]) * speeds[:, None] + middle
    below = source.floor().long()
    share = source - below
    padded = nn.functional.pad(samples, (1, 1))  # what lies outside is silence
    left, right = (padded.gather(1, (below + side).clamp(0, n + 1)) for side in (1, 2))
    return left * (1 - share) + right * share


def loud_frames(samples: Tensor) -> Tensor:
    """Which 20-ms frames belong to the speech: those within 20 dB of the loudest. (B, N) -> (B, N // 320) bool"""
    power = samples.unfold(1, FRAME, FRAME).square().mean(2)
    return power >= power.max(1, keepdim=True).values.clamp_min(1e-12) / 100


def speech_power(samples: Tensor) -> Tensor:
    """Mean power of the loud frames, (B, N) -> (B,). Silence around a word does not count."""
    power, loud = samples.unfold(1, FRAME, FRAME).square().mean(2), loud_frames(samples)
    return (power * loud).sum(1) / loud.sum(1).clamp_min(1)


def at_snr(samples: Tensor, noise: Tensor, snr_db: Tensor) -> Tensor:
    """Add noise so that speech power over mean noise power is ``snr_db``, (B, N), (B, N), (B,)."""
    power = speech_power(samples) / noise.square().mean(1).clamp_min(1e-12)
    return samples + noise * (power * 10 ** (-snr_db / 10)).sqrt()[:, None]


def after_a_word(samples: Tensor, before: Tensor, gaps: Tensor) -> Tensor:
    """Let the word of ``before`` end ``gaps`` samples before the word of ``samples`` begins, equally loud.

    Whatever of it lies before the clip is lost. (B, N), (B, N), (B,) -> (B, N)
    """
    n = samples.shape[1]
    first = loud_frames(samples).float().argmax(1) * FRAME
    last = (before.shape[1] // FRAME - loud_frames(before).flip(1).float().argmax(1)) * FRAME
    position = torch.arange(n) - (first - gaps - last)[:, None]  # where in ``before`` this sample comes from
    inside = (position >= 0) & (position < last[:, None])
    level = (speech_power(samples) / speech_power(before).clamp_min(1e-12)).sqrt()
    return samples + before.gather(1, position.clamp(0, n - 1)) * inside * level[:, None]


def in_a_room(samples: Tensor, rt60_s: Tensor, g: Generator) -> Tensor:
    """Reverberation of a small room: decaying noise follows the sound, down 60 dB after ``rt60_s``.

    (B, N), (B,) -> (B, N)
    """
    n = samples.shape[1]
    t_s = torch.arange(n // 2) / SAMPLE_RATE
    level = 0.01 + 0.07 * torch.rand(len(samples), 1, generator=g)
    tail = torch.randn(len(samples), len(t_s), generator=g) * 10 ** (-3 * t_s / rt60_s[:, None]) * level
    tail[:, 0] = 1.0
    size = n + len(t_s)
    spectrum = np.fft.rfft(samples.numpy(), size) * np.fft.rfft(tail.numpy(), size)
    return torch.from_numpy(np.fft.irfft(spectrum, size)[:, :n])


def tilted(samples: Tensor, tilt_db: Tensor) -> Tensor:
    """The spectrum raised by ``tilt_db`` per octave above 1 kHz and lowered below. (B, N), (B,) -> (B, N)"""
    n = samples.shape[1]
    octaves = torch.log2(torch.fft.rfftfreq(n, 1 / SAMPLE_RATE).clamp_min(60) / 1000)
    spectrum = np.fft.rfft(samples.numpy()) * (10 ** (tilt_db[:, None] * octaves / 20)).numpy()
    return torch.from_numpy(np.fft.irfft(spectrum, n))


def vary(samples: Tensor, others: Tensor, noise: dict[str, np.ndarray], config: Augmentation, g: Generator) -> Tensor:
    """One random variant of every clip, in the order of the world: speaker, words before, room, microphone, noise.

    Args:
        samples: (B, N) in [-1, 1].
        others: (B, N), clips of other words for what is said before.
        noise: background recordings by name, int16.

    Returns:
        (B, N) in [-1, 1].
    """
    n = len(samples)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=g)

    reach = int(config.shift_ms * SAMPLE_RATE / 1000)
    offsets = torch.randint(-reach, reach + 1, (n,), generator=g)
    samples = shift(samples, offsets, uniform(*config.speed))
    preceded = uniform(0, 1) < config.context_share
    gaps = uniform(0, 0.15 * SAMPLE_RATE).long()
    samples[preceded] = after_a_word(samples[preceded], others[preceded], gaps[preceded])
    background = _excerpts(list(noise.values()), n, g)
    if config.four_ways:
        samples = _one_of_four(samples, background, g)
    else:
        reverberant, rt60_s = uniform(0, 1) < config.room_share, uniform(*config.rt60_s)
        if reverberant.any():  # the FFT library refuses an empty batch
            samples[reverberant] = in_a_room(samples[reverberant], rt60_s[reverberant], g)
        samples = tilted(samples, uniform(-config.tilt_db, config.tilt_db))
        samples = samples * 10 ** (uniform(*config.gain_db) / 20)[:, None]
        white = uniform(0, 1) < 0.25
        background[white] = torch.randn(int(white.sum()), background.shape[1], generator=g)
        noisy, snr_db = uniform(0, 1) < config.noise_share, uniform(*config.snr_db)
        if noisy.any():  # longer samples than a clip have no background
            samples[noisy] = at_snr(samples[noisy], background[noisy], snr_db[noisy])
    return samples.clamp(-1, 1)


def _one_of_four(samples: Tensor, background: Tensor, g: Generator) -> Tensor:
    variants = [
        samples,
        samples + 0.01 * torch.randn(samples.shape, generator=g),
        samples * 0.25,
        at_snr(samples, background, torch.full((len(samples),), 20.0)),
    ]
    return torch.stack(variants)[torch.randint(4, (len(samples),), generator=g), torch.arange(len(samples))]


def _excerpts(recordings: list[np.ndarray], n: int, g: Generator) -> Tensor:
    """``n`` random seconds of random recordings, (n, 16000)."""
    which = torch.randint(len(recordings), (n,), generator=g).tolist()
    where = torch.rand(n, generator=g).tolist()
    starts = [int(u * (len(recordings[i]) - CLIP_SAMPLES)) for i, u in zip(which, where, strict=True)]
    pairs = zip(which, starts, strict=True)
    return from_int16(np.stack([recordings[i][s : s + CLIP_SAMPLES] for i, s in pairs]))


def bank(
    corpus: Corpus, rows: np.ndarray, others: np.ndarray, views: int, config: Augmentation, features: FeatureConfig
) -> np.ndarray:
    """Augmented log-mels of the training clips, float16 (views, len(rows), F, T), memory-mapped.

    Half precision: its rounding (below 0.01 in the log) is far below the noise that was added.
    ``others`` are rows of clips that may be heard before a word, if the recipe wants that.
    """
    masks_come_later = replace(config, frequency_mask=0, time_mask=0)
    others = others if config.context_share else others[:0]  # else nobody hears them
    heard = rows.tolist(), others.tolist(), views, masks_come_later
    key = identity(VERSION, LOGMELS_VERSION, corpus.fingerprint, *heard, features)
    path = corpus.folder / f"bank-{key}.npy"
    with made_once(path) as missing:
        if missing:
            shape = (views, len(rows), features.n_mels, n_frames(features))
            with new_array(path, np.float16, shape) as out:
                blocks = [(v, slice(i, i + 2048)) for v in range(views) for i in range(0, len(rows), 2048)]
                calls = (
                    (corpus, rows[block], others, (v, block.start), config, features, out[v, block])
                    for v, block in blocks
                )
                for _ in tqdm(in_helpers(_view_block, calls), desc="augmented views", total=len(blocks), unit="block"):
                    pass
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def _view_block(corpus, rows, others, seed, config, features, out, batch=128) -> None:
    """One view of some clips into ``out``. The seed is that of view and block: more views change no earlier one."""
    front_end, g = LogMel(features), Generator().manual_seed(int(identity(seed), 16) % 2**63)
    with one_thread():
        for i in range(0, len(rows), batch):
            chosen = rows[i : i + batch]
            clips = words_before = from_int16(corpus.waveforms[chosen])
            if len(others):
                before = others[torch.randint(len(others), (len(chosen),), generator=g).numpy()]
                words_before = from_int16(corpus.waveforms[before])
            out[i : i + batch] = prepared(vary(clips, words_before, corpus.noise, config, g), front_end).numpy()


def warp_mels(logmel: Tensor, most: float, g: Generator) -> Tensor:
    """Stretch or squeeze the mel axis of every example by up to ``most``, as a shorter or longer vocal tract does.

    What lies between bins is interpolated; above the highest bin it is repeated. (B, F, T) -> same.

    Source: vocal tract length perturbation, Jaitly, Hinton 2013, who scale frequencies instead of mels.
    """
    factors = 1 + most * (2 * torch.rand(len(logmel), generator=g) - 1)
    highest = logmel.shape[1] - 1
    source = (torch.arange(highest + 1) * factors[:, None]).clamp(max=highest)  # (B, F): where each bin is read
    below = source.long().clamp(max=highest - 1)
    left, right = (logmel.gather(1, (below + side)[..., None].expand(-1, -1, logmel.shape[2])) for side in (0, 1))
    return torch.lerp(left, right, (source - below)[..., None])


def spec_augment(logmel: Tensor, config: Augmentation, g: Generator) -> Tensor:
    """Mask one band of mel bins and one stretch of frames in every example.

    Width uniform up to the configured one, place uniform; a masked bin gets the value of an empty
    one (the reports masked the power before the logarithm, which is the same). (B, F, T) -> same.

    Source: Park et al. 2019, arXiv:1904.08779.
    """
    masked = torch.zeros(logmel.shape, dtype=torch.bool)
    for axis, widest in ((1, config.frequency_mask), (2, config.time_mask)):
        size, n = logmel.shape[axis], len(logmel)
        width = torch.rand(n, generator=g) * widest
        start = torch.rand(n, generator=g) * (size - width)
        position = torch.arange(size)
        hit = (position >= start.floor()[:, None]) & (position < (start.floor() + width.floor())[:, None])
        masked |= hit.unsqueeze(3 - axis)
    return logmel.masked_fill(masked.to(logmel.device), SILENCE)
