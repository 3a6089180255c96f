"""A small detector in whole numbers, from samples to score: the same bits on every machine, in numpy and in torch.

Floating point rounds by processor, library and order of summation. Here every value is a whole number of at most 63
bits: samples, log-mels by a table, weights of 4 or 8 bits, activations and state of 16, and one rounded shift where a
scale changes. What is left of real numbers are the tables and multipliers, made once from the float net.

Letters: B streams, N samples, F mel bins, T frames, C channels, S steps. Arrays are int64, of numpy or of torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kwslib.config import FeatureConfig
from kwslib.data.features import SILENCE, LogMel, n_frames
from kwslib.nets.rivals import FoldedTimeNet, TimeNet, folded, read_by

LEVELS_PER_UNIT = 32  # of a log-mel, natural logarithm; level 0 is silence
SCORE_BITS = 12  # a score of 1 is 4,096
ACTIVATIONS = 2**15 - 1  # the largest
HEADROOM = 1.5  # activations may be so much larger than the largest of the sound that ranges were taken from
Array = np.ndarray | Tensor


def on_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales of a weight: symmetric, one scale for each output channel or gate row.

    The largest value of a row becomes 2^(bits-1) - 1; the scale is one that float16 can hold (of a row of very
    small weights not exactly), and 1 for a row of zeros. Weights that are on the grid stay where they are.
    (O, ...) -> int8 (O, ...), float32 (O, 1, ...)

    >>> whole, scale = on_grid(torch.tensor([[-0.7, 0.31], [0.0, 0.0]]), bits=4)
    >>> whole.tolist(), [round(s, 4) for s in scale.flatten().tolist()]
    ([[-7, 3], [0, 0]], [0.1, 1.0])
    """
    most = 2 ** (bits - 1) - 1
    scale = (weight.detach().float().abs().flatten(1).amax(1) / most).half().float()
    scale = torch.where(scale > 0, scale, 1.0).reshape(-1, *[1] * (weight.dim() - 1))
    return (weight.detach() / scale).round().clamp(-most, most).to(torch.int8), scale


@dataclass(frozen=True)
class Rescaling:
    """Whole numbers to whole numbers of another scale: (x * multiplier + offset) >> shift, for each row."""

    multiplier: np.ndarray
    offset: np.ndarray
    shift: int

    @classmethod
    def of(cls, factors: np.ndarray, offsets: np.ndarray | float = 0.0) -> "Rescaling":
        """x * factor + offset, rounded; the largest factor has 30 bits.

        >>> Rescaling.of(np.array([0.5]), 1.0)(np.array([[3, 4, -3]])).tolist()  # halves up
        [[3, 3, 0]]
        """
        shift = 30 - int(np.ceil(np.log2(np.abs(factors).max())))
        offset = np.round((np.zeros(len(factors)) + offsets + 0.5) * 2.0**shift)
        return cls(np.round(factors * 2.0**shift).astype(np.int64), offset.astype(np.int64), shift)

    def __call__(self, x: Array) -> Array:
        """(B, C, S) -> same"""
        return (x * _as(x, self.multiplier)[:, None] + _as(x, self.offset)[:, None]) >> self.shift

    def summed(self, x: Array) -> Array:
        """All rows together, with the first one's offset: (B, C, S) -> (B, S)"""
        return ((x * _as(x, self.multiplier)[:, None]).sum(1) + int(self.offset[0])) >> self.shift


class IntegerNet:
    """A TimeNet and its log-mels in whole numbers; it streams exactly, however sound is cut.

    Args:
        net: in 4 or 8 bits, or to be rounded to so many; its normalization is folded.
        bits: of its weights.
        samples: int16 clips (B, N) that tell how large activations become.
    """

    def __init__(self, net: TimeNet, bits: int, samples: np.ndarray):
        net = net if isinstance(net, FoldedTimeNet) else folded(net)
        config, front_end = net.config, LogMel(read_by(net.config))
        self.n_fft, self.hop, self.span = (getattr(front_end.config, of) for of in ("n_fft", "hop_length", "span"))
        self.kernels, self.strides = config.kernels, config.strides
        self.window_steps = config.n_steps(n_frames(FeatureConfig()))
        self.window = np.round(front_end.mel.spectrogram.window.double().numpy() * 2**15).astype(np.int64)
        angle = 2 * np.pi / self.n_fft * np.outer(np.arange(self.n_fft), np.arange(self.n_fft // 2 + 1))
        self.cos, self.sin = np.round(2**14 * np.cos(angle)), np.round(2**14 * np.sin(angle))
        self.mel = np.round(front_end.mel.mel_scale.fb.double().numpy() * 2**8).astype(np.int64)
        # Samples have 15 bits after the point, spectra 3 more, their squares 36, mel weights 8: energies 44.
        levels = np.arange(0.5, (18 * np.log(2) - SILENCE) * LEVELS_PER_UNIT)
        self.thresholds = np.round(np.exp(SILENCE + levels / LEVELS_PER_UNIT) * 2.0**44).astype(np.int64)
        self.over_time: list[tuple[np.ndarray, Rescaling]] = []
        self.mixes: list[tuple[np.ndarray, Rescaling]] = []
        silence = np.zeros((len(samples), self.span), np.int64)
        x, scale, zero = self._levels(_cat([silence, samples.astype(np.int64)], 1)), 1 / LEVELS_PER_UNIT, SILENCE
        for i, (along, mix, *_) in enumerate(net.blocks):  # x * scale + zero is what the float net sees
            (taps, tap_scales), (whole, row_scales) = _grid(along.weight, bits), _grid(mix.weight, bits)
            shifts = _numpy(mix.bias) + (whole * row_scales) @ (taps * tap_scales).sum(1) * zero
            sums = _over_time(x, taps, self.strides[i])
            inner = np.abs(sums * tap_scales * scale).max() * HEADROOM / ACTIVATIONS
            self.over_time.append((taps, Rescaling.of(tap_scales[:, 0] * scale / inner)))
            mixed = whole @ self._squeezed(i, sums)
            scale, zero = (mixed * row_scales * inner + shifts[:, None]).max() * HEADROOM / ACTIVATIONS, 0.0
            self.mixes.append((whole, Rescaling.of(row_scales[:, 0] * inner / scale, shifts / scale)))
            x = self._mixed(i, self._squeezed(i, sums))
        (whole, row_scales), (bias_other, bias) = _grid(net.classifier.weight, bits), _numpy(net.classifier.bias)
        towards = np.diff(whole * row_scales, axis=0)[0] * scale / self.window_steps * 2**SCORE_BITS
        self.head = Rescaling.of(towards, (bias - bias_other) * 2**SCORE_BITS)

    def initial_state(self, samples: Array) -> list[Array]:
        """Of as many streams as ``samples`` (B, N) are: silence before them, what blocks keep, the last outputs."""
        channels = *(len(taps) for taps, _ in self.over_time), len(self.mixes[-1][0])
        kept = [np.zeros((len(samples), size, 0), np.int64) for size in channels]
        return [_as(samples, part) for part in (np.zeros((len(samples), self.span), np.int64), *kept)]

    def step(self, samples: Array, state: Sequence[Array]) -> tuple[Array, list[Array]]:
        """Scores of the steps that these samples (B, N) complete, (B, S), 4,096 times the logit; and the new state.

        As long as a second was not heard there are none.
        """
        audio, *caches = state
        audio, kept = _cat([audio, samples], 1), []
        n_new = n_frames_new = max(0, (audio.shape[1] - self.span) // self.hop + 1)
        x = self._levels(audio) if n_new else caches[0]
        for i, cache in enumerate(caches[:-1]):
            x = _cat([cache, x], 2) if n_new else cache
            n_new = max(0, (x.shape[2] - self.kernels[i]) // self.strides[i] + 1)
            kept.append(x[:, :, n_new * self.strides[i] :])
            if n_new:
                x = self._mixed(i, self._squeezed(i, _over_time(x, self.over_time[i][0], self.strides[i])))
        outputs = _cat([caches[-1], x], 2) if n_new else caches[-1]
        n_scores = max(0, outputs.shape[2] - self.window_steps + 1)
        sums = sum(outputs[:, :, k : k + n_scores] for k in range(self.window_steps))
        return self.head.summed(sums), [audio[:, n_frames_new * self.hop :], *kept, outputs[:, :, n_scores:]]

    def scores(self, samples: Array) -> Array:
        """Of whole tracks, from the first step on that has heard a second: (B, N) int16 or int64 -> (B, S)."""
        whole = samples.long() if isinstance(samples, Tensor) else samples.astype(np.int64)
        return self.step(whole, self.initial_state(whole))[0]

    def clip_scores(self, waveforms: np.ndarray, at_once: int = 128) -> np.ndarray:
        """Of clips of one second, (n, 16000) int16 -> (n,)."""
        parts = [self.scores(waveforms[i : i + at_once])[:, -1] for i in range(0, len(waveforms), at_once)]
        return np.concatenate(parts)

    def _levels(self, audio: Array) -> Array:
        """Log-mels in steps above silence, of all frames that are complete: (B, N) -> (B, F, T)."""
        n = (audio.shape[1] - self.span) // self.hop + 1
        index = self.span - self.n_fft + self.hop * np.arange(n)[:, None] + np.arange(self.n_fft)
        framed = (audio[:, _as(audio, index)] * _as(audio, self.window) + 2**8) >> 9  # 6 bits more
        # float64 holds whole numbers below 2^53 exactly, in whatever order they are added up, and is quick.
        if isinstance(audio, Tensor):
            parts = [(framed.double() @ torch.from_numpy(table)).long() >> 17 for table in (self.cos, self.sin)]
            energies = sum(part * part for part in parts) @ torch.from_numpy(self.mel)
            return torch.searchsorted(torch.from_numpy(self.thresholds), energies, right=True).transpose(1, 2)
        parts = [(framed.astype(np.float64) @ table).astype(np.int64) >> 17 for table in (self.cos, self.sin)]
        energies = sum(part * part for part in parts) @ self.mel
        return np.searchsorted(self.thresholds, energies, side="right").transpose(0, 2, 1)

    def _squeezed(self, i: int, sums: Array) -> Array:
        """What a convolution over time adds up, in 16 bits."""
        return self.over_time[i][1](sums).clip(-ACTIVATIONS, ACTIVATIONS)

    def _mixed(self, i: int, squeezed: Array) -> Array:
        """Channels mixed and rectified, in 15 bits."""
        whole, rescaling = self.mixes[i]
        return rescaling(_as(squeezed, whole) @ squeezed).clip(0, ACTIVATIONS)


def _over_time(x: Array, taps: np.ndarray, stride: int) -> Array:
    """Each channel's own convolution, (B, C, T) -> (B, C, S)."""
    n = (x.shape[2] - taps.shape[1]) // stride + 1
    weights = _as(x, taps)
    return sum(x[:, :, k : k + stride * (n - 1) + 1 : stride] * weights[:, k, None] for k in range(taps.shape[1]))


def _as(like: Array, table: np.ndarray) -> Array:
    """A table as an array of the same library."""
    return torch.from_numpy(table) if isinstance(like, Tensor) else table


def _cat(parts: Sequence[Array], axis: int) -> Array:
    return torch.cat(list(parts), axis) if isinstance(parts[0], Tensor) else np.concatenate(parts, axis)


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().double().numpy()


def _grid(weight: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights as whole numbers (O, n), and their scales (O, 1)."""
    whole, scales = on_grid(weight, bits)
    return whole.flatten(1).numpy().astype(np.int64), _numpy(scales).reshape(-1, 1)
