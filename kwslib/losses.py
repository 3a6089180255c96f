"""Loss terms of a recipe. A recipe adds up as many as it likes; each carries its own weight.

Every term is a frozen dataclass (so that it can be stored and compared) that is called with what
the student and the teacher put out. Gradient flows into the student only. Each term is a mean
over the batch, in nats unless said otherwise, already multiplied by its weight.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from kwslib.models import Outputs

KINDS = ("kl", "ce", "mse")


@dataclass(frozen=True)
class Labels:
    """Cross entropy with the true class.

    >>> import torch
    >>> even = Outputs(torch.zeros(1, 2), torch.ones(1, 1), torch.zeros(1, 1, 1))
    >>> round(Labels()(even, None, torch.tensor([1])).item(), 4)  # log 2
    0.6931
    """

    weight: float = 1.0
    needs_teacher = False

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        return self.weight * functional.cross_entropy(student.logits, labels)


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

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def __call__(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
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

    def __call__(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        if student.attention.shape != teacher.attention.shape:
            raise ValueError(
                f"attention distillation needs equal numbers of steps, the student has {student.attention.shape[1]}, "
                f"the teacher {teacher.attention.shape[1]}: give both the same kernel and stride in time"
            )
        floor = 1e-9  # the logarithm of a weight that underflowed
        log_student = student.attention.clamp_min(floor).log()
        log_teacher = teacher.attention.detach().clamp_min(floor).log()
        return self.weight * functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
