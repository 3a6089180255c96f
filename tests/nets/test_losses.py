import math

import pytest
import torch

from kwslib.config import CRNNConfig
from kwslib.nets.crnn import CRNN, Outputs
from kwslib.nets.losses import AttentionKL, Labels, LayerwiseMSE, SoftTargets

TINY = CRNNConfig(cnn_out_channels=2, hidden_size=8, gru_num_layers=1)


def outputs(batch=5, steps=11, seed=0, dtype=torch.float64) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, 2, generator=g, dtype=dtype)
    attention = torch.randn(batch, steps, generator=g, dtype=dtype).softmax(-1)
    steps_out, hidden = (torch.randn(batch, steps, n, generator=g, dtype=dtype) for n in (6, 4))
    return Outputs(logits, attention, steps_out, hidden, torch.randn(batch, 4, generator=g, dtype=dtype))


def softmax(values, temperature=1.0):
    exps = [math.exp(v / temperature) for v in values]
    return [e / sum(exps) for e in exps]


LABELS = torch.tensor([0, 1, 1, 0, 1])


def loop(kind, student, teacher, t):
    total = 0.0
    for s_row, t_row in zip(student.logits.tolist(), teacher.logits.tolist(), strict=True):
        p, q = softmax(t_row, t), softmax(s_row, t)
        if kind == "kl":
            total += t * t * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        elif kind == "ce":
            total += t * t * -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
        else:
            total += sum((a - b) ** 2 for a, b in zip(t_row, s_row, strict=True)) / 2
    return total / len(student.logits)


@pytest.mark.parametrize("kind", ["kl", "ce", "mse"])
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_soft_targets_equal_plain_loops(kind, temperature):
    student, teacher = outputs(seed=1), outputs(seed=2)
    term = SoftTargets(0.6, temperature, kind)
    expected = 0.6 * loop(kind, student, teacher, temperature)
    assert term(student, teacher, LABELS).item() == pytest.approx(expected, abs=1e-12)


def test_labels_equal_plain_loops():
    student = outputs(seed=1)
    rows = zip(student.logits.tolist(), LABELS.tolist(), strict=True)
    expected = sum(-math.log(softmax(row)[label]) for row, label in rows) / 5
    assert Labels(0.4)(student, None, LABELS).item() == pytest.approx(0.4 * expected, abs=1e-12)


def test_attention_kl_equals_plain_loops():
    student, teacher = outputs(seed=1), outputs(seed=2)
    pairs = zip(teacher.attention.tolist(), student.attention.tolist(), strict=True)
    expected = sum(a * math.log(a / b) for p, q in pairs for a, b in zip(p, q, strict=True)) / 5
    assert AttentionKL(2.0)(student, teacher, LABELS).item() == pytest.approx(2 * expected, abs=1e-12)


def test_smoothed_labels_equal_plain_loops():
    student, share = outputs(seed=1), 0.2
    total = 0.0
    for row, label in zip(student.logits.tolist(), LABELS.tolist(), strict=True):
        target = [share / 2 + (1 - share) * (k == label) for k in range(2)]
        total += sum(-t * math.log(p) for t, p in zip(target, softmax(row), strict=True))
    assert Labels(smoothing=share)(student, None, LABELS).item() == pytest.approx(total / 5, abs=1e-12)


@pytest.mark.parametrize("layers", [("hidden", "hidden"), ("steps", "hidden"), ("context", "context")])
def test_layerwise_mse_equals_plain_loops(layers):
    student, teacher = outputs(seed=1), outputs(seed=2)
    term = LayerwiseMSE(0.5, *layers)
    linear = term.helper(student, teacher).double()
    seen, target = getattr(student, layers[0]), getattr(teacher, layers[1])
    squares = []
    for row, wanted in zip(seen.reshape(-1, seen.shape[-1]), target.reshape(-1, target.shape[-1]), strict=True):
        for weights, bias, value in zip(linear.weight.tolist(), linear.bias.tolist(), wanted.tolist(), strict=True):
            out = sum(w * x for w, x in zip(weights, row.tolist(), strict=True)) + bias
            squares.append((out - value) ** 2)
    expected = 0.5 * sum(squares) / len(squares)
    assert term(student, teacher, LABELS, linear).item() == pytest.approx(expected, abs=1e-12)


def test_layerwise_mse_starts_without_losing_a_direction_and_cannot_be_shrunk_by_its_map():
    student, teacher = outputs(seed=1), outputs(seed=2)
    term = LayerwiseMSE()
    linear = term.helper(student, teacher).double()
    torch.testing.assert_close(linear.weight @ linear.weight.T, torch.eye(4).double(), atol=1e-6, rtol=0)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    assert term(student, teacher, LABELS, linear).item() == pytest.approx(teacher.hidden.square().mean().item())
    teacher.hidden.requires_grad_()
    term(student, teacher, LABELS, linear).backward()
    assert teacher.hidden.grad is None and linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("term", [SoftTargets(1.0, 10.0, "kl"), SoftTargets(kind="mse"), AttentionKL()])
def test_a_student_equal_to_its_teacher_has_no_loss(term):
    same = outputs(seed=3)
    assert term(same, same, LABELS).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["kl", "ce", "mse"])
def test_the_gradient_pulls_the_student_to_the_teacher_and_leaves_the_teacher_alone(kind):
    student, teacher = outputs(seed=1), outputs(seed=2)
    student.logits.requires_grad_()
    teacher.logits.requires_grad_()
    SoftTargets(1.0, 4.0, kind)(student, teacher, LABELS).backward()
    assert teacher.logits.grad is None
    difference = (teacher.logits - student.logits).detach()
    toward = (difference - difference.mean(1, keepdim=True)) * -student.logits.grad
    assert (toward.sum(1) > 0).all()


def test_temperature_squared_keeps_the_size_of_the_gradient():
    sizes = []
    for temperature in (20.0, 40.0):
        student, teacher = outputs(seed=1), outputs(seed=2)
        student.logits.requires_grad_()
        SoftTargets(1.0, temperature)(student, teacher, LABELS).backward()
        sizes.append(student.logits.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_every_weight_of_a_student_receives_gradient():
    student, teacher = CRNN(TINY), CRNN(TINY).eval()
    x = torch.randn(4, 40, 101)
    terms = (Labels(0.4), SoftTargets(0.6, 10.0), AttentionKL())
    loss = sum(term(student.outputs(x), teacher.outputs(x), LABELS[:4]) for term in terms)
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in student.named_parameters() if "energy.2.bias" not in n
    )
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_without_the_wanted_part_is_named():
    logits_only = outputs(steps=11)._replace(attention=None, hidden=None)
    with pytest.raises(ValueError, match="has no attention"):
        AttentionKL()(outputs(steps=11), logits_only, LABELS)
    with pytest.raises(ValueError, match="has no hidden"):
        LayerwiseMSE().helper(outputs(steps=11), logits_only)


def test_unequal_steps_and_bad_settings_are_named():
    with pytest.raises(ValueError, match="the student has 9, the teacher 11"):
        AttentionKL()(outputs(steps=9), outputs(steps=11), LABELS)
    with pytest.raises(ValueError, match="layer-wise .* the student has 9, the teacher 11"):
        LayerwiseMSE()(outputs(steps=9), outputs(steps=11), LABELS, torch.nn.Identity())
    with pytest.raises(ValueError, match="unknown layer"):
        LayerwiseMSE(student_layer="conv")
    with pytest.raises(ValueError, match="no time axis"):
        LayerwiseMSE(student_layer="context")
    with pytest.raises(ValueError, match="unknown kind"):
        SoftTargets(kind="cosine")
    with pytest.raises(ValueError, match="positive"):
        SoftTargets(temperature=0.0)
