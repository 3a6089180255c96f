"""What a training hears: clips or pieces of stream to learn from, and the clips of val that tell how good it is.

Letters: N clips in V augmented views, P pieces of stream of Q seconds each, M clips of val, F mel bins, T frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from kwslib.data.augment import WITHOUT_MASKS, Augmentation, spec_augment, warp_mels


@dataclass(frozen=True)
class Clips:
    """Single clips: of every batch about half are keywords, however rare they are.

    Attributes:
        logmels: (V, N, F, T), augmented, any float type, may be memory-mapped.
        labels: (N,) 0 or 1.
    """

    logmels: np.ndarray
    labels: np.ndarray

    @property
    def seconds(self) -> int:
        """Heard in an epoch."""
        return len(self.labels)

    @property
    def some(self) -> np.ndarray:
        """Log-mels to take mean and deviation of, (n, F, T)."""
        return self.logmels[0, ::16]

    def batches(self, n: int, random: Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Log-mels (n, F, T) and labels (n,) of an epoch's batches; each clip in a view drawn by lot."""
        weights = 1.0 / np.maximum(np.bincount(self.labels, minlength=2), 1)
        weights = torch.from_numpy(weights)[torch.from_numpy(self.labels).long()]
        clips = torch.multinomial(weights, len(self.labels), replacement=True, generator=random).numpy()
        views = torch.randint(len(self.logmels), (len(clips),), generator=random).numpy()
        for start in range(0, len(clips), n):
            batch = slice(start, start + n)
            yield self.logmels[views[batch], clips[batch]], self.labels[clips[batch]]


@dataclass(frozen=True)
class Pieces:
    """Pieces of stream, whose seconds each have a label.

    Attributes:
        logmels: (P, F, 100 Q + 1), see ``kwslib.data.pieces.bank``.
        labels: (P, Q), which seconds say the keyword.
        seconds: heard in an epoch: as many as the training part has clips.
    """

    logmels: np.ndarray
    labels: np.ndarray
    seconds: int

    @property
    def some(self) -> np.ndarray:
        """Log-mels to take mean and deviation of, (n, F, 100 Q + 1)."""
        return self.logmels[::40]

    def batches(self, n: int, random: Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Log-mels (n / Q, F, 100 Q + 1) and labels (n / Q, Q) of an epoch's batches."""
        of_piece = self.labels.shape[1]
        many, n = max(1, self.seconds // of_piece), max(1, n // of_piece)
        chosen = torch.randint(len(self.logmels), (many,), generator=random).numpy()
        for start in range(0, many, n):
            batch = chosen[start : start + n]
            yield self.logmels[batch], self.labels[batch]


@dataclass(frozen=True)
class Material:
    """All that a training hears.

    Attributes:
        source: what is learnt from.
        val, val_labels: (M, F, T) log-mels and (M,) labels of the clips that tell how good it is.
        masks: an augmentation, whose masks are drawn anew for every batch (the rest of it is in the source).
        mel_warp: log-mels are stretched along the mel axis by up to this share, see ``augment.warp_mels``.
    """

    source: Clips | Pieces
    val: np.ndarray
    val_labels: np.ndarray
    masks: Augmentation = WITHOUT_MASKS
    mel_warp: float = 0.0

    def varied(self, logmels: np.ndarray, random: Generator) -> Tensor:
        """A batch as it is heard this time, (B, F, T) float32."""
        x = torch.from_numpy(logmels).float()
        if self.mel_warp:
            x = warp_mels(x, self.mel_warp, random)
        return spec_augment(x, self.masks, random)
