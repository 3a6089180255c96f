"""What a training hears: clips or pieces of stream to learn from, clips of val that tell how good it is; and what a
teacher says of them.

Letters: N clips in V augmented views, P pieces of stream of Q seconds each, M clips of val, B examples of a batch,
F mel bins, T frames, S steps of a model, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn

from kwslib.data.augment import WITHOUT_MASKS, Augmentation, spec_augment, warp_mels
from kwslib.nets.crnn import Outputs, keyword_score, step_logits
from kwslib.nets.rivals import Ensemble


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

    def batches(self, n: int, random: Generator) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        """Of an epoch's batches where their log-mels are, and their labels (n,); each clip in a view drawn by lot."""
        weights = 1.0 / np.maximum(np.bincount(self.labels, minlength=2), 1)
        weights = torch.from_numpy(weights)[torch.from_numpy(self.labels).long()]
        clips = torch.multinomial(weights, len(self.labels), replacement=True, generator=random).numpy()
        views = torch.randint(len(self.logmels), (len(clips),), generator=random).numpy()
        for start in range(0, len(clips), n):
            batch = slice(start, start + n)
            yield (views[batch], clips[batch]), self.labels[clips[batch]]


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

    def batches(self, n: int, random: Generator) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        """Of an epoch's batches where their log-mels are, and their labels (n / Q, Q)."""
        of_piece = self.labels.shape[1]
        many, n = max(1, self.seconds // of_piece), max(1, n // of_piece)
        chosen = torch.randint(len(self.logmels), (many,), generator=random).numpy()
        for start in range(0, many, n):
            batch = chosen[start : start + n]
            yield (batch,), self.labels[batch]


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

    @property
    def varies(self) -> bool:
        """Whether the same example is heard otherwise every time."""
        return bool(self.mel_warp or self.masks.frequency_mask or self.masks.time_mask)

    def heard(self, index: tuple[np.ndarray, ...], random: Generator) -> Tensor:
        """A batch as it is heard this time, (B, F, T) float32."""
        x = torch.from_numpy(self.source.logmels[index]).float()
        if self.mel_warp:
            x = warp_mels(x, self.mel_warp, random)
        return spec_augment(x, self.masks, random) if self.varies else x


@dataclass(frozen=True)
class Taught:
    """What a teacher says of all there is to learn from, so that it is asked once and not in every epoch.

    Attributes:
        logits: (V, N, K) of clips, (P, Q, K) of pieces.
        attention: (V, N, S), where the teacher has one.
    """

    logits: np.ndarray
    attention: np.ndarray | None = None

    def at(self, index: tuple[np.ndarray, ...]) -> Outputs:
        """Of one batch; the seconds of its pieces one after another."""
        logits = torch.from_numpy(self.logits[index]).reshape(-1, self.logits.shape[-1])
        return Outputs(logits, None if self.attention is None else torch.from_numpy(self.attention[index]))


@torch.no_grad()
def teach(teacher: nn.Module, source: Clips | Pieces, seconds: int = 512) -> Taught:
    """Ask a teacher about everything, as it stands in the source, so many seconds at a time."""
    of_clips = isinstance(source, Clips)
    shape, many = (source.logmels.shape[:2], seconds) if of_clips else (source.labels.shape, seconds // 10)
    logmels = source.logmels.reshape(-1, *source.logmels.shape[-2:])
    labels = np.broadcast_to(source.labels, shape).reshape(-1) if of_clips else source.labels
    said = []
    for start in range(0, len(logmels), many):
        x, its_labels = (torch.from_numpy(np.array(part[start : start + many])) for part in (logmels, labels))
        said.append(said_of(teacher.eval(), x.float(), its_labels.long()))
    parts = [name for name in ("logits", "attention") if getattr(said[0], name) is not None]
    whole = {name: torch.cat([getattr(part, name) for part in said]).view(*shape, -1).numpy() for name in parts}
    return Taught(**whole)


def said_of(model: nn.Module, x: Tensor, labels: Tensor) -> Outputs:
    """What a model says of each clip; of pieces of stream, its logits for each second, (B * Q, K)."""
    if labels.dim() == 1:
        return model.outputs(x)
    members = model.members if isinstance(model, Ensemble) else [model]
    return Outputs(torch.stack([_highest(member, x, labels) for member in members]).mean(0))


def _highest(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Logits of each second of pieces of stream, at the step that scores highest.

    (B, F, 100 Q + 1), (B, Q) -> (B * Q, 2)
    """
    config, seconds = model.config, labels.shape[1]
    length = x.shape[2] // seconds  # frames of a second
    logits = step_logits(model, x, config.n_steps(length + 1))  # (B, S, 2)
    ends = torch.arange(logits.shape[1], device=x.device) * config.stride[1] + config.kernel_size[1] - 1
    second = (ends - 1) // length  # (S,): the one a step belongs to: where its last frame lies
    into = ends - 1 - second * length  # (S,): frames since that second began
    after_keyword = nn.functional.pad(labels[:, :-1], (1, 0)).bool()  # (B, Q)
    scores = keyword_score(logits.flatten(0, 1)).unflatten(0, logits.shape[:2])  # (B, S)
    best = []
    for number in range(seconds):
        asked = (second == number) & ~(after_keyword[:, number, None] & (into < length // 2))  # (B, S)
        best.append(scores.masked_fill(~asked, -torch.inf).argmax(1))
    index = torch.stack(best, dim=1)[..., None].expand(-1, -1, logits.shape[2])  # (B, Q, 2)
    return logits.gather(1, index).flatten(0, 1)
