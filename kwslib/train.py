"""Training: one loop for every recipe, resumable after each epoch, best epoch chosen on val.

On one machine's CPU the result depends on recipe, data and seed alone: an interrupted and
resumed training ends with the same bytes as an undisturbed one.
"""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn

from kwslib import paths
from kwslib.augment import Augmentation, spec_augment
from kwslib.metrics import au_fa_fr
from kwslib.models import CheckpointError, keyword_score, read_tensors

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Training:
    """How to train. The reports' base recipe was 20 epochs at a constant rate of 3e-4.

    Attributes:
        epochs: passes over as many clips as the training part holds.
        batch_size: clips; about half of them are keywords (the sampler weighs classes equally).
        learning_rate: of Adam; the peak for ``cosine``, which warms up for 5 % of the steps and
            falls to zero.
        weight_decay: L2 penalty inside Adam, as in the reports.
        max_grad_norm: gradients are scaled down to this norm.
    """

    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    weight_decay: float = 1e-5
    max_grad_norm: float = 5.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")


@dataclass(frozen=True)
class Data:
    """What a training reads: N clips to learn from in V augmented views, and the clips to select on.

    Attributes:
        bank: (V, N, F, T) augmented log-mels, any float type, may be memory-mapped.
        labels: (N,) 0 or 1.
        val, val_labels: (M, F, T) log-mels and (M,) labels of the selection part.
    """

    bank: np.ndarray
    labels: np.ndarray
    val: np.ndarray
    val_labels: np.ndarray


class NotANumber(RuntimeError):
    """The loss became NaN or infinite."""


@torch.no_grad()
def score(model: nn.Module, logmels: np.ndarray, device: str = "cpu", batch: int = 512) -> np.ndarray:
    """Keyword scores (logit differences) of log-mels (N, F, T), in eval mode, float32 (N,)."""
    model.eval()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    parts = []
    for i in range(0, len(logmels), batch):
        part = torch.from_numpy(np.array(logmels[i : i + batch])).to(device, dtype)
        parts.append(keyword_score(model(part)).cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def learning_rate_factor(schedule: str, done: float) -> float:
    """Share of the peak learning rate after the share ``done`` of all steps.

    >>> [round(learning_rate_factor("cosine", d), 2) for d in (0.0, 0.05, 0.525, 1.0)]
    [0.0, 1.0, 0.5, 0.0]
    """
    if schedule == "constant":
        return 1.0
    warm_up = 0.05
    if done < warm_up:
        return done / warm_up
    return 0.5 * (1 + float(np.cos(np.pi * (done - warm_up) / (1 - warm_up))))


def fit(
    model: nn.Module,
    data: Data,
    training: Training,
    losses: tuple,
    augmentation: Augmentation,
    seed: int,
    teacher: nn.Module | None = None,
    resume: Path | None = None,
    on_epoch: Callable[[dict], None] = lambda row: None,
    device: str = "cpu",
) -> list[dict]:
    """Train in place and leave the weights of the best epoch in ``model``.

    Args:
        losses: terms of ``kwslib.losses``, added up.
        teacher: sees the same augmented clips, in eval mode, without gradient.
        resume: file that holds the whole state after each epoch; picked up when it exists.
        on_epoch: called with each row of the history as it is made.

    Returns:
        One row per epoch: ``epoch, loss``, one column per term, ``val_au_fa_fr, val_loss,
        learning_rate, wall_s, best`` (1 when it was the best so far).

    Raises:
        ValueError: a loss needs a teacher and there is none, or no loss is given.
        NotANumber: the loss is not finite.
    """
    if not losses:
        raise ValueError("a training needs at least one loss term, for example Labels()")
    if teacher is None and any(term.needs_teacher for term in losses):
        raise ValueError("a distillation loss needs a teacher: name one in the experiment")
    loop = _Loop(model.to(device), data, training, augmentation, seed, device)
    if teacher is not None:
        teacher = teacher.to(device).eval()
    history = loop.load(resume) if resume is not None else []
    for row in history:
        on_epoch(row)
    for epoch in range(len(history), training.epochs):
        began = time.perf_counter()
        sums = loop.epoch(epoch, losses, teacher)
        row = {"epoch": epoch + 1, **sums, **loop.validate(epoch + 1)}
        row["learning_rate"] = loop.optimizer.param_groups[0]["lr"]
        row["wall_s"] = round(time.perf_counter() - began, 3)
        history.append(row)
        if resume is not None:
            loop.save(resume, history)
        on_epoch(row)
    model.load_state_dict(loop.best["model"])
    model.eval()
    return history


class _Loop:
    """The state that must survive an interruption, and nothing else."""

    def __init__(self, model, data: Data, training: Training, augmentation: Augmentation, seed: int, device: str):
        self.model, self.data, self.training, self.device = model, data, training, device
        self.augmentation = augmentation
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        self.random = Generator().manual_seed(seed)
        torch.manual_seed(seed)  # dropout draws from the global generator
        counts = np.bincount(data.labels, minlength=2)
        self.clip_weights = torch.from_numpy(1.0 / np.maximum(counts, 1))[torch.from_numpy(data.labels).long()]
        self.best = {"key": [float("inf")] * 2, "model": _copy(model)}

    def epoch(self, epoch: int, losses: tuple, teacher: nn.Module | None) -> dict:
        """One pass; returns the mean of the loss and of each of its terms."""
        self.model.train()
        n, size = len(self.data.labels), self.training.batch_size
        clips = torch.multinomial(self.clip_weights, n, replacement=True, generator=self.random).numpy()
        views = torch.randint(len(self.data.bank), (n,), generator=self.random).numpy()
        starts = range(0, n, size)
        sums: dict[str, float] = {}
        for i, start in enumerate(starts):
            rate = learning_rate_factor(self.training.schedule, (epoch + i / len(starts)) / self.training.epochs)
            self.optimizer.param_groups[0]["lr"] = self.training.learning_rate * rate
            chosen = clips[start : start + size]
            x = torch.from_numpy(self.data.bank[views[start : start + size], chosen]).float()
            x = spec_augment(x, self.augmentation, self.random).to(self.device)
            labels = torch.from_numpy(self.data.labels[chosen]).long().to(self.device)
            terms = self._step(x, labels, losses, teacher)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value * len(chosen) / n
        return sums

    def _step(self, x: Tensor, labels: Tensor, losses: tuple, teacher: nn.Module | None) -> dict[str, float]:
        with torch.no_grad():
            taught = teacher.outputs(x) if teacher is not None else None
        learnt = self.model.outputs(x)
        terms = {_name(i, term): term(learnt, taught, labels) for i, term in enumerate(losses)}
        loss = sum(terms.values())
        if not torch.isfinite(loss):
            raise NotANumber(f"the loss became {loss.item()}: lower the learning rate or the loss weights")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
        self.optimizer.step()
        return {"loss": loss.item(), **{name: value.item() for name, value in terms.items()}}

    def validate(self, epoch: int) -> dict:
        """Score the selection part; remember the weights when they are the best so far."""
        scores = score(self.model, self.data.val, self.device).astype(np.float64)
        area = au_fa_fr(scores, self.data.val_labels.astype(bool))
        loss = float(np.mean(np.logaddexp(0, np.where(self.data.val_labels == 1, -scores, scores))))
        better = [area, loss] < self.best["key"]  # equal areas (often 0): the lower loss
        if better:
            self.best = {"key": [area, loss], "model": _copy(self.model)}
        return {"val_au_fa_fr": area, "val_loss": loss, "best": int(better)}

    def save(self, path: Path, history: list[dict]) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "torch_random": torch.get_rng_state(),
            "best": self.best,
            "history": history,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        paths.write_atomically(path, buffer.getvalue())

    def load(self, path: Path) -> list[dict]:
        """Take up a saved state; nothing saved, or a file that a crash damaged, starts from the beginning."""
        try:
            state = read_tensors(path)
        except CheckpointError:
            return []
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        torch.set_rng_state(state["torch_random"])
        self.best = state["best"]
        return state["history"]


def _name(position: int, term: object) -> str:
    """Column name of a loss term: ``labels_0``, ``softtargets_1``."""
    return f"{type(term).__name__.lower()}_{position}"


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
