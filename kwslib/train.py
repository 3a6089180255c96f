"""Training: one loop for every recipe, resumable after each epoch, best epoch chosen on val.

On one machine's CPU the result depends on recipe, data and seed alone: an interrupted and
resumed training ends with the same bytes as an undisturbed one.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kwslib import paths
from kwslib.architectures import Ensemble
from kwslib.augment import Augmentation, spec_augment, warp_mels
from kwslib.metrics import au_fa_fr
from kwslib.models import (
    CRNN,
    CheckpointError,
    Outputs,
    absorb_normalization,
    keyword_score,
    read_tensors,
    round_weights,
    step_logits,
    tensors_file,
)
from kwslib.sequences import Sequences

SCHEDULES = ("constant", "cosine", "onecycle")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Training:
    """How to train. The reports' base recipe was 20 epochs at a constant rate of 3e-4.

    Attributes:
        epochs: passes over as many clips as the training part holds.
        batch_size: clips; about half of them are keywords (the sampler weighs classes equally).
        learning_rate: of Adam; the peak of the schedule.
        schedule: ``constant``; ``cosine``, which falls to zero; or ``onecycle``, which rises for 30 % of
            the steps from a 25th and falls to nearly nothing (Smith 2018, arXiv:1708.07120).
        warm_up: share of the steps in which constant and cosine rise from zero.
        ema: decay of the running average of the weights that is validated and kept; 0 keeps the
            weights themselves. In a short training it reaches over a tenth of the steps at most.
        precision: of the arithmetic; ``float16`` and ``bfloat16`` are mixed precision, float32 weights
            with autocast (and a scaled loss for float16).
        normalize: a CRNN learns on log-mels of mean 0 and deviation 1, and its convolution absorbs both
            constants afterwards: the same model, but one that is easier to train, the more the smaller it is.
        weight_decay: L2 penalty inside Adam, as in the reports.
        max_grad_norm: gradients are scaled down to this norm.
    """

    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warm_up: float = 0.05
    ema: float = 0.0
    precision: str = "float32"
    normalize: bool = True
    weight_decay: float = 1e-5
    max_grad_norm: float = 5.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if not 0 <= self.ema < 1 or not 0 <= self.warm_up < 1:
            raise ValueError(f"ema and warm_up must be in [0, 1), not {self.ema} and {self.warm_up}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")


@dataclass(frozen=True)
class Tune:
    """A step after training that trains on and changes nothing else: the control of steps that also tune.

    Attributes:
        training: with the experiment's losses, teacher and augmentation.
    """

    training: Training

    def __call__(self, model: nn.Module, tune: Callable) -> nn.Module:
        tune(model, self.training)
        return model.eval()


@dataclass(frozen=True)
class StreamTune:
    """A step after training that tunes on pieces of stream, through which the state is carried.

    Each second counts by its highest score on the way (max pooling over time, Sun et al. 2017, arXiv:1705.02411),
    so other words must stay low at every step, also where one ends and the next begins; a keyword has
    to be heard once. Just after a keyword, for as long as attention still sees it, nothing is asked.

    Attributes:
        training: with the experiment's losses, teacher and augmentation.
        bits: quantization-aware, for a ``WeightInt`` of so many bits that follows; 0 for float32.
        mel_warp: each piece is heard with the mel axis stretched or squeezed by up to this share, differently every
            time, by the teacher, too: more speakers than there are.
    """

    training: Training
    sequences: Sequences = Sequences()
    bits: int = 0
    mel_warp: float = 0.0

    def __call__(self, model: nn.Module, tune: Callable) -> nn.Module:
        tune(model, self.training, sequences=self.sequences, weight_bits=self.bits, mel_warp=self.mel_warp)
        return model.eval()


@dataclass(frozen=True)
class Data:
    """What a training reads: N clips to learn from in V augmented views, and the clips to select on.

    Attributes:
        bank: (V, N, F, T) augmented log-mels, any float type, may be memory-mapped.
        labels: (N,) 0 or 1.
        val, val_labels: (M, F, T) log-mels and (M,) labels of the selection part.
        pieces, said: (P, F, 100 K + 1) log-mels of pieces of stream and (P, K) labels of their seconds, see
            ``sequences.bank``; where there are any, they are learnt from instead of the bank.
    """

    bank: np.ndarray
    labels: np.ndarray
    val: np.ndarray
    val_labels: np.ndarray
    pieces: np.ndarray | None = None
    said: np.ndarray | None = None


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


def learning_rate_factor(training: Training, done: float) -> float:
    """Share of the peak learning rate after the share ``done`` of all steps.

    >>> [round(learning_rate_factor(Training(), done), 2) for done in (0.0, 0.05, 0.525, 1.0)]
    [0.0, 1.0, 0.5, 0.0]
    >>> [round(learning_rate_factor(Training(schedule="onecycle"), done), 2) for done in (0.0, 0.3, 0.65, 1.0)]
    [0.04, 1.0, 0.5, 0.0]
    """

    def cosine(share: float) -> float:  # from 1 to 0
        return 0.5 * (1 + float(np.cos(np.pi * share)))

    if training.schedule == "onecycle":
        if done < 0.3:
            return 1 - (1 - 1 / 25) * cosine(done / 0.3)
        return cosine((done - 0.3) / 0.7)
    if done < training.warm_up:
        return done / training.warm_up
    if training.schedule == "constant":
        return 1.0
    return cosine((done - training.warm_up) / (1 - training.warm_up))


def fit(
    model: nn.Module,
    data: Data,
    training: Training,
    losses: tuple,
    augmentation: Augmentation,
    seed: int,
    teacher: nn.Module | None = None,
    trained: bool = False,
    weight_bits: int = 0,
    mel_warp: float = 0.0,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    resume: Path | None = None,
    on_epoch: Callable[[dict], None] = lambda row: None,
    device: str = "cpu",
) -> list[dict]:
    """Train in place and leave the weights of the best epoch in ``model``.

    Args:
        losses: terms of ``kwslib.losses``, added up.
        teacher: sees the same augmented clips, in eval mode, without gradient.
        trained: the model was trained before and is tuned further: its function is kept at the start.
        weight_bits: quantization-aware: forward and backward see weights of so many bits, and the rounded
            model is validated (scales and biases still in float32); the optimizer moves the unrounded ones
            (straight-through, Bengio et al. 2013, arXiv:1308.3432). 0 leaves the weights alone.
        mel_warp: log-mels are stretched along the mel axis by up to this share, see ``augment.warp_mels``.
        penalty: of the model's weights, added to the losses; then the last epoch is kept instead of the best, as
            it is with pieces of stream: the best clip model is not the best there.
        resume: file that holds the whole state after each epoch; picked up when it exists.
        on_epoch: called with each row of the history as it is made.

    Returns:
        One row per epoch: ``epoch, loss``, one column per term, ``val_au_fa_fr, val_loss,
        learning_rate, wall_s, best`` (1 when it was the best so far).

    Raises:
        ValueError: a loss needs a teacher and there is none, no loss is given, or a net is to be normalized
            that cannot absorb it.
        NotANumber: the loss is not finite.
    """
    if not losses:
        raise ValueError("a training needs at least one loss term, for example Labels()")
    if teacher is None and any(term.needs_teacher for term in losses):
        raise ValueError("a distillation loss needs a teacher: name one in the experiment")
    if training.normalize and not isinstance(model, CRNN):
        raise ValueError(f"a {type(model).__name__} cannot absorb a normalization: train it with normalize=False")
    if teacher is not None:
        teacher = teacher.to(device).eval()
    loop = _Loop(
        model.to(device), teacher, data, training, losses, augmentation, seed, device, weight_bits, mel_warp, penalty
    )
    if trained and training.normalize:  # it has absorbed these constants; now they come from outside again
        absorb_normalization(model, -loop.mean / loop.std, 1 / loop.std)
    history = loop.load(resume) if resume is not None else []
    for row in history:
        on_epoch(row)
    for epoch in range(len(history), training.epochs):
        began = time.perf_counter()
        sums = loop.epoch(epoch)
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
    """The state that must survive an interruption, and what it works on."""

    def __init__(
        self, model, teacher, data, training, losses, augmentation, seed: int, device: str, weight_bits=0,
        mel_warp=0.0, penalty=None,
    ):  # fmt: skip
        self.weight_bits, self.mel_warp, self.penalty = weight_bits, mel_warp, penalty
        self.model, self.teacher, self.data, self.device = model, teacher, data, device
        self.training, self.losses, self.augmentation = training, losses, augmentation
        self.random = Generator().manual_seed(seed)
        torch.manual_seed(seed)  # dropout draws from the global generator
        self.helpers = self._helpers()
        learnt = [*model.parameters(), *self.helpers.parameters()]
        self.optimizer = torch.optim.Adam(learnt, lr=training.learning_rate, weight_decay=training.weight_decay)
        self.average = None
        if training.ema:  # statistics of normalisation layers are copied, not averaged
            steps = training.epochs * -(-len(data.labels) // training.batch_size)
            decay = min(training.ema, max(0.0, 1 - 10 / steps))
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.scaler = torch.amp.GradScaler(device, enabled=training.precision == "float16")
        counts = np.bincount(data.labels, minlength=2)
        self.clip_weights = torch.from_numpy(1.0 / np.maximum(counts, 1))[torch.from_numpy(data.labels).long()]
        self.mean, self.std = 0.0, 1.0
        if training.normalize:
            some = (data.bank[0, ::16] if data.pieces is None else data.pieces[::40]).astype(np.float32)
            self.mean, self.std = float(some.mean()), float(some.std())
        self.best = {"key": [float("inf")] * 2, "model": _copy(model)}

    @torch.no_grad()
    def _helpers(self) -> nn.ModuleDict:
        """What the loss terms themselves learn, by the term's name."""
        wanted = {_name(i, term): term for i, term in enumerate(self.losses) if hasattr(term, "helper")}
        if not wanted:
            return nn.ModuleDict()
        x = torch.from_numpy(self.data.bank[0, :1]).float().to(self.device)
        student, teacher = self.model.eval().outputs(x), self.teacher.outputs(x)
        return nn.ModuleDict({name: term.helper(student, teacher) for name, term in wanted.items()}).to(self.device)

    def epoch(self, epoch: int) -> dict:
        """One pass; returns the mean of the loss and of each of its terms."""
        self.model.train()
        batches = list(self._clips() if self.data.pieces is None else self._pieces())
        n = sum(len(labels) for _, labels in batches)
        sums: dict[str, float] = {}
        source = self.data.bank if self.data.pieces is None else self.data.pieces
        for i, (index, labels) in enumerate(batches):
            rate = learning_rate_factor(self.training, (epoch + i / len(batches)) / self.training.epochs)
            self.optimizer.param_groups[0]["lr"] = self.training.learning_rate * rate
            x = torch.from_numpy(source[index]).float()
            if self.mel_warp:
                x = warp_mels(x, self.mel_warp, self.random)
            x = spec_augment(x, self.augmentation, self.random).to(self.device)
            for name, value in self._step(x, torch.from_numpy(labels).long().to(self.device)).items():
                sums[name] = sums.get(name, 0.0) + value * len(labels) / n
        return sums

    def _clips(self) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        """Batches of an epoch: where their log-mels are in the bank, and their labels."""
        n, size = len(self.data.labels), self.training.batch_size
        clips = torch.multinomial(self.clip_weights, n, replacement=True, generator=self.random).numpy()
        views = torch.randint(len(self.data.bank), (n,), generator=self.random).numpy()
        for start in range(0, n, size):
            batch = slice(start, start + size)
            yield (views[batch], clips[batch]), self.data.labels[clips[batch]]

    def _pieces(self) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
        """The same of pieces of stream, as many seconds as there are clips."""
        seconds = self.data.said.shape[1]
        n, size = max(1, len(self.data.labels) // seconds), max(1, self.training.batch_size // seconds)
        pieces = torch.randint(len(self.data.pieces), (n,), generator=self.random).numpy()
        for start in range(0, n, size):
            batch = pieces[start : start + size]
            yield (batch,), self.data.said[batch]

    def _step(self, x: Tensor, labels: Tensor) -> dict[str, float]:
        with torch.no_grad():
            taught = self._outputs(self.teacher, x, labels) if self.teacher is not None else None
            unrounded = [weight.clone() for weight in self.model.parameters()] if self.weight_bits else []
        if self.weight_bits:
            round_weights(self.model, self.weight_bits)
        with torch.autocast(self.device, getattr(torch, self.training.precision), self.training.precision != "float32"):
            learnt = self._outputs(self.model, (x - self.mean) / self.std, labels)
        learnt = learnt._replace(**{name: part.float() for name, part in learnt._asdict().items() if part is not None})
        terms = {}
        for i, term in enumerate(self.losses):
            name = _name(i, term)
            terms[name] = term(learnt, taught, labels.flatten(), self.helpers[name] if name in self.helpers else None)
        loss = sum(terms.values()) + (self.penalty(self.model) if self.penalty is not None else 0.0)
        if not torch.isfinite(loss):
            raise NotANumber(f"the loss became {loss.item()}: lower the learning rate or the loss weights")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        with torch.no_grad():
            for weight, before in zip(self.model.parameters(), unrounded, strict=False):
                weight.copy_(before)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return {"loss": loss.item(), **{name: value.item() for name, value in terms.items()}}

    def _outputs(self, model: nn.Module, x: Tensor, labels: Tensor) -> Outputs:
        """What a model says of each clip; of each second of a stream, its logits where it scores highest."""
        if labels.dim() == 1:
            return model.outputs(x)
        members = model.members if isinstance(model, Ensemble) else [model]
        return Outputs(torch.stack([_pooled(member, x, labels) for member in members]).mean(0))

    def validate(self, epoch: int) -> dict:
        """Score the selection part; remember the weights when they are the best so far."""
        model = self.model if self.average is None else self.average.module
        if self.training.normalize or self.weight_bits:
            model = copy.deepcopy(model)
        if self.weight_bits:
            round_weights(model, self.weight_bits)
        if self.training.normalize:
            absorb_normalization(model, self.mean, self.std)
        scores = score(model, self.data.val, self.device).astype(np.float64)
        area = au_fa_fr(scores, self.data.val_labels.astype(bool))
        loss = float(np.mean(np.logaddexp(0, np.where(self.data.val_labels == 1, -scores, scores))))
        better = [area, loss] < self.best["key"]  # equal areas (often 0): the lower loss
        better = better or self.penalty is not None or self.data.pieces is not None  # these work at the area's expense
        if better:
            self.best = {"key": [area, loss], "model": _copy(model)}
        return {"val_au_fa_fr": area, "val_loss": loss, "best": int(better)}

    def _modules(self) -> dict:
        """Everything with a state dict of its own."""
        named = {"model": self.model, "helpers": self.helpers, "optimizer": self.optimizer, "scaler": self.scaler}
        return named | ({"average": self.average} if self.average is not None else {})

    def save(self, path: Path, history: list[dict]) -> None:
        state = {name: module.state_dict() for name, module in self._modules().items()}
        state |= {"random": self.random.get_state(), "torch_random": torch.get_rng_state()}
        state |= {"best": self.best, "history": history}
        paths.write_atomically(path, tensors_file(state))

    def load(self, path: Path) -> list[dict]:
        """Take up a saved state; nothing saved, or a file that a crash damaged, starts from the beginning."""
        try:
            state = read_tensors(path)
        except CheckpointError:
            return []
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        self.random.set_state(state["random"])
        torch.set_rng_state(state["torch_random"])
        self.best = state["best"]
        return state["history"]


def _pooled(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Logits of each second of pieces of stream, at the step that scores highest: (B, F, T), (B, K) -> (B * K, 2)."""
    config, seconds = model.config, labels.shape[1]
    length = x.shape[2] // seconds
    logits = step_logits(model, x, config.n_steps(length + 1))
    ends = torch.arange(logits.shape[1], device=x.device) * config.stride[1] + config.kernel_size[1] - 1
    second = (ends - 1) // length  # the one a step belongs to: where its last frame lies
    into = ends - 1 - second * length
    after_keyword = nn.functional.pad(labels[:, :-1], (1, 0)).bool()  # (B, K)
    scores = keyword_score(logits.flatten(0, 1)).unflatten(0, logits.shape[:2])
    best = []
    for number in range(seconds):
        asked = (second == number) & ~(after_keyword[:, number, None] & (into < length // 2))
        best.append(scores.masked_fill(~asked, -torch.inf).argmax(1))
    index = torch.stack(best, dim=1)[..., None].expand(-1, -1, logits.shape[2])
    return logits.gather(1, index).flatten(0, 1)


def _name(position: int, term: object) -> str:
    """Column name of a loss term: ``labels_0``, ``softtargets_1``."""
    return f"{type(term).__name__.lower()}_{position}"


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
