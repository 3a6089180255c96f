"""The engine against torch's own layers: the same outputs and gradients."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from kwslib.config import CRNNConfig
from kwslib.nets import engine
from kwslib.nets.crnn import CRNN

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}  # float32 sums of up to 25,000 numbers, in another order


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((out * weight).mean(), inputs)


def same(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    for mine, other in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("b", "s"), [(7, 11), (1, 1), (3, 40)])
def test_recurrent_layers(kind, layers, b, s):
    net, x = kind(6, 5, layers, batch_first=True), torch.randn(b, s, 6, requires_grad=True)
    same(engine.recur(net, x), net(x)[0], [x, *net.parameters()])


def test_dropout_stands_between_layers_in_training_alone():
    net, x = nn.GRU(6, 5, 2, batch_first=True, dropout=0.5), torch.randn(4, 9, 6)
    assert not torch.equal(engine.recur(net, x), engine.recur(net, x))
    net.eval()
    torch.testing.assert_close(engine.recur(net, x), net(x)[0])


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_linear(shape):
    layer, x = nn.Linear(4, 3), torch.randn(shape, requires_grad=True)
    same(engine.linear(layer, x), layer(x), [x, *layer.parameters()])


@pytest.mark.parametrize(
    ("channels", "kernel", "stride"), [(2, (5, 20), (2, 8)), (3, (7, 20), (7, 12)), (1, (40, 3), (1, 1))]
)
def test_the_convolution(channels, kernel, stride):
    layer, x = nn.Conv2d(1, channels, kernel, stride), torch.randn(3, 40, 101)
    theirs = layer(x.unsqueeze(1)).flatten(1, 2).transpose(1, 2)
    same(engine.convolve(layer, x), theirs, list(layer.parameters()))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(9, 2, 4), (11, 2, 0), (13, 3, 6), (4, 1, 0)])
def test_convolutions_over_time(kernel, stride, padding):
    layer, x = engine.Depthwise(6, kernel, stride, padding), torch.randn(3, 6, 50, requires_grad=True)
    theirs = nn.functional.conv1d(x, layer.weight, None, stride, padding, groups=6)
    same(layer(x), theirs, [x, layer.weight])
    with torch.no_grad():
        assert torch.equal(layer(x), theirs)


@pytest.mark.parametrize(
    "config",
    [CRNNConfig(), CRNNConfig(2, hidden_size=8, attention_size=0), CRNNConfig(3, cell="rnn"),
     CRNNConfig(separable=True), CRNNConfig(2, cell="lstm")],
    ids=["base", "linear-attention", "rnn", "separable", "lstm"],
)  # fmt: skip
def test_a_training_step_is_that_of_the_layers_alone(config):
    model, x = CRNN(config), torch.randn(4, 40, 101)
    model.gru.dropout = 0.0
    same(model.outputs(x).logits, model(x), list(model.parameters()))


def test_what_it_cannot_do_is_left_to_the_layers():
    model, x = CRNN(CRNNConfig(2, hidden_size=8)), torch.randn(2, 40, 101)
    assert engine.takes(model, x)
    assert not engine.takes(copy.deepcopy(model).half(), x.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert not engine.takes(model, x)
    model.activation_bits = 8
    assert not engine.takes(model, x)


def test_a_product_by_plain_loops():
    a, b = torch.randn(3, 4), torch.randn(4, 2)
    expected = [[sum(float(a[i, k]) * float(b[k, j]) for k in range(4)) for j in range(2)] for i in range(3)]
    np.testing.assert_allclose(engine.product(a, b).numpy(), expected, rtol=1e-5)
