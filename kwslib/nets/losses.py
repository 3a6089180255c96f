"""Loss terms of a recipe. A recipe adds up as many as it likes; each carries its own weight.

Every term is a frozen dataclass (so that it can be stored and compared) that is called with what
the student and the teacher put out. Gradient flows into the student only. Each term is a mean
over the batch, in nats unless said otherwise, already multiplied by its weight. ``reads`` names what it needs of
the teacher. A term that learns something itself says what in ``helper``; it is trained along and thrown away.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from kwslib.nets.crnn import Outputs

KINDS = ("kl", "ce", "mse")


@dataclass(frozen=True)
class Labels:
    """Cross entropy with the true class, which counts 1 - smoothing + smoothing / classes.

    Source of the smoothing: Szegedy et al. 2016, arXiv:1512.00567.

    >>> import torch
    >>> even = Outputs(torch.zeros(1, 2), *[torch.zeros(1, 1)] * 4)
    >>> round(Labels()(even, None, torch.tensor([1])).item(), 4)  # log 2
    0.6931
    """

    weight: float = 1.0
    smoothing: float = 0.0
    needs_teacher = False
    reads = ()

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, helper=None) -> Tensor:
        return self.weight * functional.cross_entropy(student.logits, labels, label_smoothing=self.smoothing)


@dataclass(frozen=True)
class SoftTargets:
    """Dark knowledge: the student's logits follow the teacher's.

    ``kl``: KL divergence from teacher to student, both softened by ``temperature``, times
    temperature squared, which keeps the size of the gradient while the temperature is varied.
    ``ce``: cross entropy with the softened teacher, times temperature squared; the same gradient,
    but its least value is the teacher's entropy. ``mse``: squared difference of the logits,
    averaged over classes, no temperature.

    Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, sec. 2; reports A to D.

    Raises:
        ValueError: unknown kind, or a temperature that is not positive.
    """

    weight: float = 1.0
    temperature: float = 1.0
    kind: str = "kl"
    needs_teacher = True
    reads = ("logits",)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def __call__(self, student: Outputs, teacher: Outputs, labels: Tensor, helper=None) -> Tensor:
        target = teacher.logits.detach().to(student.logits)
        if self.kind == "mse":
            return self.weight * functional.mse_loss(student.logits, target)
        scale = self.weight * self.temperature**2
        if self.kind == "ce":
            return scale * functional.cross_entropy(
                student.logits / self.temperature, (target / self.temperature).softmax(-1)
            )
        log_student = (student.logits / self.temperature).log_softmax(-1)
        log_teacher = (target / self.temperature).log_softmax(-1)
        return scale * functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class AttentionKL:
    """The student looks where the teacher looks: KL divergence between attention weights over time.

    Source: report B; in the spirit of Zagoruyko, Komodakis 2017, arXiv:1612.03928.

    Raises:
        ValueError: student and teacher have different numbers of convolution steps.
    """

    weight: float = 1.0
    needs_teacher = True
    reads = ("attention",)

    def __call__(self, student: Outputs, teacher: Outputs, labels: Tensor, helper=None) -> Tensor:
        of_student, of_teacher = _part(student, "attention"), _part(teacher, "attention")
        _require_equal_steps("attention", of_student, of_teacher)
        floor = 1e-9  # the logarithm of a weight that underflowed
        log_student = of_student.clamp_min(floor).log()
        log_teacher = of_teacher.detach().clamp_min(floor).log()
        return self.weight * functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def _require_equal_steps(kind: str, of_student: Tensor, of_teacher: Tensor) -> None:
    if of_student.shape != of_teacher.shape:
        raise ValueError(
            f"{kind} distillation needs equal numbers of steps, the student has {of_student.shape[1]}, "
            f"the teacher {of_teacher.shape[1]}: give both the same kernel and stride in time"
        )


def _part(outputs: Outputs, name: str) -> Tensor:
    """A part of what a model puts out, or a sentence when it has none."""
    found = getattr(outputs, name)
    if found is None:
        raise ValueError(f"a model in this distillation has no {name}: a net without it, or an ensemble")
    return found


LAYERS = ("steps", "hidden", "context")


@dataclass(frozen=True)
class LayerwiseMSE:
    """A layer of the student, seen through a learned linear map, follows a layer of the teacher.

    Mean squared difference over all values. The map belongs to the student's side alone: with one on
    each side, as in report E, both can shrink to zero and the loss with them. It starts orthogonal, so no
    direction is lost, and is not part of the trained model.

    Source: Romero et al. 2015 (FitNets), arXiv:1412.6550; report E.

    Args:
        student_layer, teacher_layer: ``steps`` (convolution), ``hidden`` (recurrent) or ``context``.

    Raises:
        ValueError: an unknown layer, or numbers of convolution steps that differ.
    """

    weight: float = 1.0
    student_layer: str = "hidden"
    teacher_layer: str = "hidden"
    needs_teacher = True
    reads = ("layers",)

    def __post_init__(self):
        for layer in (self.student_layer, self.teacher_layer):
            if layer not in LAYERS:
                raise ValueError(f"unknown layer {layer!r}: choose one of {', '.join(LAYERS)}")
        if (self.student_layer == "context") != (self.teacher_layer == "context"):
            raise ValueError("context has no time axis: it can only follow context")

    def helper(self, student: Outputs, teacher: Outputs) -> nn.Module:
        """The linear map from the student's layer to the teacher's."""
        of_student, of_teacher = _part(student, self.student_layer), _part(teacher, self.teacher_layer)
        linear = nn.Linear(of_student.shape[-1], of_teacher.shape[-1])
        nn.init.orthogonal_(linear.weight)
        return linear

    def __call__(self, student: Outputs, teacher: Outputs, labels: Tensor, helper: nn.Module) -> Tensor:
        seen = helper(getattr(student, self.student_layer))
        target = getattr(teacher, self.teacher_layer).detach()
        _require_equal_steps("layer-wise", seen, target)
        return self.weight * functional.mse_loss(seen, target)
