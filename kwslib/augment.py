"""Augmentation: of the waveform, kept as a bank of log-mel views, and of the log-mels, batch by batch.

The bank is computed once per corpus and read by every experiment, seed and worker process.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE, FeatureConfig, identity
from kwslib.corpora import Corpus
from kwslib.features import SILENCE, LogMel, from_int16, n_frames, new_array


@dataclass(frozen=True)
class Augmentation:
    """How training clips are varied: the reports' four ways plus speed and time shift, tuned on val.

    The reports masked up to 15 bins and 35 frames. A third of a second is most of a word: with
    near-miss words among the negatives the narrower masks here gave a lower val area.

    Attributes:
        shift_ms: the clip moves by up to this much either way; what leaves is lost, zeros enter.
        speed: range of playback speeds, pitch and tempo together; 1 is unchanged.
        noise_sigma: Gaussian noise, samples in [-1, 1].
        gain: factor of the quiet variant.
        background_snr_db: range of signal-to-noise ratios for background recordings.
        frequency_mask, time_mask: SpecAugment, largest width in mel bins and frames.
    """

    shift_ms: float = 100.0
    speed: tuple[float, float] = (0.85, 1.15)
    noise_sigma: float = 0.01
    gain: float = 0.25
    background_snr_db: tuple[float, float] = (5.0, 25.0)
    frequency_mask: int = 4
    time_mask: int = 8


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


def at_snr(samples: Tensor, noise: Tensor, snr_db: Tensor) -> Tensor:
    """Add noise so that the ratio of mean powers is ``snr_db``, (B, N), (B, N), (B,)."""
    power = samples.square().mean(1) / noise.square().mean(1).clamp_min(1e-12)
    return samples + noise * (power * 10 ** (-snr_db / 10)).sqrt()[:, None]


def vary(samples: Tensor, noise: dict[str, np.ndarray], config: Augmentation, g: Generator) -> Tensor:
    """Change speed and place of every clip, then do one of four things to it, as in the reports.

    Nothing, Gaussian noise, gain, background noise: probability 1/4 each. (B, N) -> (B, N)
    """
    n = len(samples)
    reach = int(config.shift_ms * SAMPLE_RATE / 1000)
    slowest, fastest = config.speed
    speeds = slowest + (fastest - slowest) * torch.rand(n, generator=g)
    samples = shift(samples, torch.randint(-reach, reach + 1, (n,), generator=g), speeds)
    low, high = config.background_snr_db
    snr_db = low + (high - low) * torch.rand(n, generator=g)
    variants = [
        samples,
        samples + config.noise_sigma * torch.randn(samples.shape, generator=g),
        samples * config.gain,
        at_snr(samples, _excerpts(list(noise.values()), n, g), snr_db),
    ]
    choice = torch.randint(4, (n,), generator=g)
    return torch.stack(variants)[choice, torch.arange(n)].clamp(-1, 1)


def _excerpts(recordings: list[np.ndarray], n: int, g: Generator) -> Tensor:
    """``n`` random seconds of random recordings, (n, 16000)."""
    which = torch.randint(len(recordings), (n,), generator=g).tolist()
    where = torch.rand(n, generator=g).tolist()
    starts = [int(u * (len(recordings[i]) - CLIP_SAMPLES)) for i, u in zip(which, where, strict=True)]
    pairs = zip(which, starts, strict=True)
    return from_int16(np.stack([recordings[i][s : s + CLIP_SAMPLES] for i, s in pairs]))


@torch.no_grad()
def bank(
    corpus: Corpus, rows: np.ndarray, views: int, config: Augmentation, features: FeatureConfig, batch: int = 256
) -> np.ndarray:
    """Augmented log-mels of the training clips, float16 (views, len(rows), F, T), memory-mapped.

    Half precision: its rounding (below 0.01 in the log) is far below the noise that was added.
    """
    masks_come_later = replace(config, frequency_mask=0, time_mask=0)
    key = identity(corpus.fingerprint, rows.tolist(), views, masks_come_later, features)
    path = corpus.folder / f"bank-{key}.npy"
    if not path.exists():
        front_end, g = LogMel(features), Generator().manual_seed(0)
        shape = (views, len(rows), features.n_mels, n_frames(features))
        starts = [(v, i) for v in range(views) for i in range(0, len(rows), batch)]
        with new_array(path, np.float16, shape) as out:
            for v, i in tqdm(starts, desc="augmented views", unit="batch"):
                samples = from_int16(corpus.waveforms[rows[i : i + batch]])
                out[v, i : i + batch] = front_end(vary(samples, corpus.noise, config, g)).numpy()
    return np.load(path, mmap_mode="r")


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
