"""Log-mel front end, and the log-mels of a corpus computed once and shared.

Shapes: B batch, N samples, F mel bins, T frames.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram
from tqdm.auto import tqdm

from kwslib import paths
from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE, FeatureConfig, identity
from kwslib.data.corpora import Corpus
from kwslib.processes import in_helpers, made_once

VERSION = 3  # raise it when the same samples would give other log-mels
ROWS = 8  # frames in one product: of more, OpenBLAS rounds by their place, and a frame would depend on its neighbours
SILENCE = float(np.log(1e-9))  # what an empty or masked bin becomes


def from_int16(samples: np.ndarray) -> Tensor:
    """int16 samples as float32 in [-1, 1)."""
    return torch.from_numpy(np.array(samples)).float() / 32768


class LogMel(nn.Module):
    """Natural log of the mel power spectrum, clamped to [1e-9, 1e9].

    Shapes:
        forward(samples): (B, N) -> (B, F, T); one second gives T = 101
        frames(samples):  the same without any padding, T = (N - n_fft) // hop_length + 1
    """

    def __init__(self, config: FeatureConfig = FeatureConfig()):
        super().__init__()
        self.config = config
        with warnings.catch_warnings():  # 40 bins on 201 frequencies leave none empty here
            warnings.simplefilter("ignore", UserWarning)
            self.mel = MelSpectrogram(
                SAMPLE_RATE, config.n_fft, hop_length=config.hop_length, n_mels=config.n_mels, center=False
            )

    def forward(self, samples: Tensor) -> Tensor:
        n_fft = self.config.n_fft
        if self.config.framing == "causal":
            return self.frames(nn.functional.pad(samples, (n_fft, 0)))
        return self.frames(nn.functional.pad(samples, (n_fft // 2, n_fft // 2), mode="reflect"))

    def frames(self, samples: Tensor) -> Tensor:
        return torch.log(self.mel(samples).clamp(1e-9, 1e9))


def n_frames(config: FeatureConfig) -> int:
    """Frames of one clip: 101."""
    return CLIP_SAMPLES // config.hop_length + 1


@torch.no_grad()
def prepared(samples: Tensor, front_end: LogMel) -> Tensor:
    """The log-mels of clips as all trainings read them, (B, N) -> (B, F, T).

    The same as ``front_end`` to rounding, by numpy's Fourier transform and product, which round alike everywhere.
    """
    config = front_end.config
    if config.framing == "causal":
        padded = nn.functional.pad(samples, (config.n_fft, 0))
    else:
        padded = nn.functional.pad(samples, (config.n_fft // 2, config.n_fft // 2), mode="reflect")
    frames = padded.unfold(1, config.n_fft, config.hop_length) * front_end.mel.spectrogram.window  # (B, T, n_fft)
    spectrum = np.fft.rfft(frames.numpy(), axis=2)
    n = spectrum.shape[0] * spectrum.shape[1]
    power = np.zeros((-(-n // ROWS) * ROWS, spectrum.shape[2]), np.float32)
    power[:n] = (spectrum.real**2 + spectrum.imag**2).reshape(n, -1)
    mel = (power.reshape(-1, ROWS, power.shape[1]) @ front_end.mel.mel_scale.fb.numpy()).reshape(len(power), -1)[:n]
    return torch.from_numpy(mel).clamp(1e-9, 1e9).log().view(*frames.shape[:2], -1).transpose(1, 2)


def logmels(corpus: Corpus, config: FeatureConfig = FeatureConfig(), block: int = 2048) -> np.ndarray:
    """Log-mels of every clip of a corpus, float32 (clips, F, T), memory-mapped, computed once."""
    path = corpus.folder / f"logmels-{identity(VERSION, config)}.npy"
    with made_once(path) as missing:
        if missing:
            n = len(corpus.clips)
            with new_array(path, np.float32, (n, config.n_mels, n_frames(config))) as out:
                blocks = [slice(i, i + block) for i in range(0, n, block)]
                calls = ((corpus.waveforms[part], config, out[part]) for part in blocks)
                for _ in tqdm(in_helpers(_block, calls), desc="log-mels", total=len(blocks), unit="block"):
                    pass
    return np.load(path, mmap_mode="r")


def _block(waveforms: np.ndarray, config: FeatureConfig, out: np.ndarray, batch: int = 128) -> None:
    front_end = LogMel(config)
    with one_thread():
        for i in range(0, len(waveforms), batch):
            out[i : i + batch] = prepared(from_int16(waveforms[i : i + batch]), front_end).numpy()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch takes one thread inside: so many processes as cores do not stand in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def new_array(path: Path, dtype: type, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A memory-mapped array that gets its name only when it is complete."""
    paths.require_space(path.parent, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    temporary = paths.temporary_for(path)
    array = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
    try:
        yield array
    except BaseException:
        temporary.unlink()
        raise
    array.flush()
    temporary.replace(path)
