"""Training: one loop for every recipe, resumable after each epoch.

On one machine's CPU the result depends on recipe, data and seed alone: an interrupted and
resumed training ends with the same bytes as an undisturbed one.

Words: the *model* learns; what it *said* of a batch stands beside what the *teacher* *taught* of it; a *helper* is what
a loss term learns itself; *kept* are the weights that the model has in the end.
Letters: B examples of a batch, F mel bins, T frames, S steps of the model, Q seconds of a piece of stream.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kwslib import paths
from kwslib.metrics import au_fa_fr
from kwslib.nets.crnn import CRNN, Outputs, absorb_normalization, score
from kwslib.training.checkpoints import CheckpointError, read_tensors, tensors_file
from kwslib.training.material import Material, Taught, said_of
from kwslib.training.quantize import round_weights

VERSION = 3  # raise it when the same recipe would give other weights
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
class Objective:
    """What a training is after.

    Attributes:
        losses: terms of ``kwslib.nets.losses``, added up.
        teacher: sees the same sound as the model, in eval mode, without gradient.
        taught: what it says of everything there is to hear, if that is known, see ``teach``.
        penalty: of the model's weights, added to the losses.
        weight_bits: quantization-aware: forward and backward see weights of so many bits, and the rounded
            model is validated (scales and biases still in float32); the optimizer moves the unrounded ones
            (straight-through, Bengio et al. 2013, arXiv:1308.3432). 0 leaves the weights alone.
        tunes: the model was trained before and is tuned further: its function is kept at the start.
        keep: which epoch's weights are kept, the ``best`` one on val, or the ``last`` one, where what is learnt is
            not what the area on val measures: streams, empty units.

    Raises:
        ValueError: no loss, a loss that needs a teacher and has none, or nothing of that name to keep.
    """

    losses: tuple
    teacher: nn.Module | None = None
    taught: Taught | None = None
    penalty: Callable[[nn.Module], Tensor] | None = None
    weight_bits: int = 0
    tunes: bool = False
    keep: str = "best"

    def __post_init__(self):
        if not self.losses:
            raise ValueError("a training needs at least one loss term, for example Labels()")
        if self.teacher is None and any(term.needs_teacher for term in self.losses):
            raise ValueError("a distillation loss needs a teacher: name one in the experiment")
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep is best or last, not {self.keep!r}")


class NotANumber(RuntimeError):
    """The loss became NaN or infinite."""


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
    material: Material,
    objective: Objective,
    training: Training,
    seed: int,
    resume: Path | None = None,
    on_epoch: Callable[[dict], None] = lambda row: None,
    device: str = "cpu",
) -> list[dict]:
    """Train in place and leave the weights of the epoch that is to be kept in ``model``.

    Args:
        resume: file that holds the whole state after each epoch; picked up when it exists.
        on_epoch: called with each row of the history as it is made.

    Returns:
        One row per epoch: ``epoch, loss``, one column per term, ``val_au_fa_fr, val_loss,
        learning_rate, wall_s, best`` (1 when it would be kept so far).

    Raises:
        ValueError: a net is to be normalized that cannot absorb it.
        NotANumber: the loss is not finite.
    """
    if training.normalize and not isinstance(model, CRNN):
        raise ValueError(f"a {type(model).__name__} cannot absorb a normalization: train it with normalize=False")
    loop = _Loop(model, material, objective, training, seed, device)
    history = loop.load(resume) if resume is not None else []
    for row in history:
        on_epoch(row)
    for epoch in range(len(history), training.epochs):
        began = time.perf_counter()
        sums = loop.epoch(epoch)
        row = {"epoch": epoch + 1, **sums, **loop.validate()}
        row["learning_rate"] = loop.optimizer.param_groups[0]["lr"]
        row["wall_s"] = round(time.perf_counter() - began, 3)
        history.append(row)
        if resume is not None:
            loop.save(resume, history)
        on_epoch(row)
    model.load_state_dict(loop.kept["model"])
    model.eval()
    return history


class _Loop:
    """The state that must survive an interruption, and what it works on."""

    def __init__(self, model, material, objective, training, seed: int, device: str):
        self.model, self.material, self.device = model.to(device), material, device
        self.objective, self.training = objective, training
        self.teacher = objective.teacher.to(device).eval() if objective.teacher is not None else None
        self.random = Generator().manual_seed(seed)
        torch.manual_seed(seed)  # dropout draws from the global generator
        self.helpers = self._helpers()
        self.weights = list(model.parameters())
        learnt = [*self.weights, *self.helpers.parameters()]
        how = {"lr": training.learning_rate, "weight_decay": training.weight_decay, "fused": device == "cpu"}
        self.optimizer = torch.optim.Adam(learnt, **how)
        self.average = None
        if training.ema:  # statistics of normalisation layers are copied, not averaged
            steps = training.epochs * -(-material.source.seconds // training.batch_size)
            decay = min(training.ema, max(0.0, 1 - 10 / steps))
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.scaler = torch.amp.GradScaler(device, enabled=training.precision == "float16")
        self.mean, self.std = 0.0, 1.0
        if training.normalize:
            some = torch.from_numpy(np.array(material.source.some)).float()
            self.mean, self.std = float(some.mean()), float(some.std(correction=0))
        self.kept = {"key": [float("inf")] * 2, "model": _copy(model)}
        if objective.tunes and training.normalize:  # it has absorbed these constants; now they come from outside
            absorb_normalization(model, -self.mean / self.std, 1 / self.std)

    @torch.no_grad()
    def _helpers(self) -> nn.ModuleDict:
        """What the loss terms themselves learn, by the term's name."""
        wanted = {_name(i, term): term for i, term in enumerate(self.objective.losses) if hasattr(term, "helper")}
        if not wanted:
            return nn.ModuleDict()
        x = torch.from_numpy(np.array(self.material.source.some[:1])).float().to(self.device)
        said, taught = self.model.eval().outputs(x), self.teacher.outputs(x)
        return nn.ModuleDict({name: term.helper(said, taught) for name, term in wanted.items()}).to(self.device)

    def epoch(self, epoch: int) -> dict:
        """One pass; returns the mean of the loss and of each of its terms."""
        self.model.train()
        batches = list(self.material.source.batches(self.training.batch_size, self.random))
        n = sum(len(labels) for _, labels in batches)
        sums: dict[str, float] = {}
        for i, (index, labels) in enumerate(batches):
            rate = learning_rate_factor(self.training, (epoch + i / len(batches)) / self.training.epochs)
            self.optimizer.param_groups[0]["lr"] = self.training.learning_rate * rate
            x = self.material.heard(index, self.random).to(self.device)
            labels = torch.from_numpy(labels).long().to(self.device)
            for name, value in self._step(x, labels, self._taught(index, x, labels)).items():
                sums[name] = sums.get(name, 0.0) + value * len(labels) / n
        return sums

    @torch.no_grad()
    def _taught(self, index: tuple[np.ndarray, ...], x: Tensor, labels: Tensor) -> Outputs | None:
        """What the teacher says of a batch."""
        if self.objective.taught is not None:
            return self.objective.taught.at(index)
        return said_of(self.teacher, x, labels) if self.teacher is not None else None

    def _step(self, x: Tensor, labels: Tensor, taught: Outputs | None) -> dict[str, float]:
        """Learn from one batch, (B, F, T) and (B,), or (B, F, 100 Q + 1) and (B, Q); the value of each loss term."""
        bits, penalty = self.objective.weight_bits, self.objective.penalty
        with torch.no_grad():
            unrounded = [weight.clone() for weight in self.weights] if bits else []
        if bits:
            round_weights(self.model, bits)
        with torch.autocast(self.device, getattr(torch, self.training.precision), self.training.precision != "float32"):
            said = said_of(self.model, (x - self.mean) / self.std, labels)
        said = said._replace(**{name: part.float() for name, part in said._asdict().items() if part is not None})
        terms = {}
        for i, term in enumerate(self.objective.losses):
            name = _name(i, term)
            terms[name] = term(said, taught, labels.flatten(), self.helpers[name] if name in self.helpers else None)
        loss = sum(terms.values()) + (penalty(self.model) if penalty is not None else 0.0)
        if not torch.isfinite(loss):
            raise NotANumber(f"the loss became {loss.item()}: lower the learning rate or the loss weights")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        with torch.no_grad():
            for weight, before in zip(self.weights, unrounded, strict=False):
                weight.copy_(before)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.weights, self.training.max_grad_norm, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return {"loss": loss.item(), **{name: value.item() for name, value in terms.items()}}

    def validate(self) -> dict:
        """Score the clips of val; keep the weights where they are to be kept so far."""
        model, bits = self.model if self.average is None else self.average.module, self.objective.weight_bits
        if self.training.normalize or bits:
            model = copy.deepcopy(model)
        if bits:
            round_weights(model, bits)
        if self.training.normalize:
            absorb_normalization(model, self.mean, self.std)
        is_keyword = self.material.val_labels == 1
        scores = score(model, self.material.val, self.device).astype(np.float64)
        area = au_fa_fr(scores, is_keyword)
        loss = float(np.mean(np.logaddexp(0, np.where(is_keyword, -scores, scores))))
        better = [area, loss] < self.kept["key"]  # equal areas (often 0): the lower loss
        if better or self.objective.keep == "last":
            better, self.kept = True, {"key": [area, loss], "model": _copy(model)}
        return {"val_au_fa_fr": area, "val_loss": loss, "best": int(better)}

    def _modules(self) -> dict:
        """Everything with a state dict of its own."""
        named = {"model": self.model, "helpers": self.helpers, "optimizer": self.optimizer, "scaler": self.scaler}
        return named | ({"average": self.average} if self.average is not None else {})

    def save(self, path: Path, history: list[dict]) -> None:
        state = {name: module.state_dict() for name, module in self._modules().items()}
        state |= {"random": self.random.get_state(), "torch_random": torch.get_rng_state()}
        state |= {"kept": self.kept, "history": history}
        paths.write_atomically(path, tensors_file(state))

    def load(self, path: Path) -> list[dict]:
        """Take up a saved state; nothing saved, or a file that a crash damaged, starts from the beginning."""
        try:
            state = read_tensors(path)
            self.kept = state["kept"]
        except (CheckpointError, KeyError):
            return []
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        self.random.set_state(state["random"])
        torch.set_rng_state(state["torch_random"])
        return state["history"]


def _name(position: int, term: object) -> str:
    """Column name of a loss term: ``labels_0``, ``softtargets_1``."""
    return f"{type(term).__name__.lower()}_{position}"


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
