import io

import pytest
import torch

from kwslib import cost, published, quantize
from kwslib.config import CELLS, CRNNConfig
from kwslib.models import CRNN
from kwslib.quantize import DynamicInt8, Half


@pytest.mark.parametrize("name", published.ARCHITECTURES)
def test_published_counts_recompute(name):
    config, params, macs, macs_with_bias = published.ARCHITECTURES[name]
    counted = cost.cost(config)
    assert counted["params"] == params
    assert counted["thop_macs_batch128"] == macs
    assert counted["thop_macs_batch128_with_bias"] == macs_with_bias
    assert counted["macs_per_clip"] == cost.formula_macs(config)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("attention_size", [None, 0, 7])
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_formula_agrees_with_thop_on_every_kind_of_part(cell, attention_size, separable, layers):
    config = CRNNConfig(3, (5, 13), (4, 8), 9, layers, attention_size, cell=cell, separable=separable)
    assert cost.formula_macs(config) == cost.clip_macs(config)


@pytest.mark.parametrize("cell", CELLS)
def test_exact_counts_are_those_of_the_matrix_products(cell):
    c = CRNNConfig(cell=cell)
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[cell]
    conv, attention = 18 * 8 * 5 * 20, 64 * 64 + 64
    recurrent = gates * 64 * (144 + 64) + gates * 64 * (64 + 64)
    assert cost.exact_clip_macs(c) == 11 * (conv + recurrent + attention) + 64 * 2
    assert cell != "gru" or cost.exact_clip_macs(c) == 913_920


def test_a_second_of_stream_costs_twelve_and_a_half_steps():
    config = CRNNConfig()
    elementwise = 11 * (13 * 64 * 2)  # thop's extra count for the GRU, which step_macs leaves out
    weighted_sum = 11 * 64  # which thop leaves out and a step counts over its whole window
    clip = cost.clip_macs(config) - elementwise - 2 * 64
    per_step = clip / 11 + weighted_sum + 2 * 64
    assert cost.step_macs(config) == per_step
    assert cost.steps_per_second(config) == 12.5


def test_counting_leaves_the_saved_model_clean():
    model = CRNN()
    before = set(model.state_dict())
    cost.cost(model.config)
    assert set(model.state_dict()) == before


@pytest.mark.parametrize(
    ("convert", "published_bytes"), [(lambda m: m, 287_691), (Half(), 146_827), (DynamicInt8(), 84_177)]
)
def test_sizes_of_the_baseline_are_within_one_percent_of_the_published(convert, published_bytes):
    model = convert(CRNN().eval())
    size = quantize.sizes(model)["state_dict_bytes"]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert size == len(buffer.getvalue())
    assert size == pytest.approx(published_bytes, rel=0.01)  # the rest is the file name inside the container


def test_weights_bytes_by_hand():
    gru = [(192, 144), (192, 64), (192, 64), (192, 64)]
    int8 = sum(a * b for a, b in gru) + 64 * 64 + 64 + 2 * 64
    float32 = 4 * (808 + 4 * 192 + 64 + 1 + 2)
    scales = 4 * (len(gru) + 3)
    assert quantize.sizes(CRNN())["weights_bytes"] == 4 * 70_443
    assert quantize.sizes(DynamicInt8()(CRNN()))["weights_bytes"] == int8 + float32 + scales
