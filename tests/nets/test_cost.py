import pytest
import torch

from kwslib.config import CELLS, CRNNConfig
from kwslib.nets import cost
from kwslib.nets.crnn import CRNN
from kwslib.results import tables
from kwslib.training import checkpoints
from kwslib.training.quantize import PRECISIONS, DynamicInt8


@pytest.mark.parametrize("name", tables.ARCHITECTURES)
def test_published_counts_recompute(name):
    config, params, macs, macs_with_bias = tables.ARCHITECTURES[name]
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


PRECISION = dict(zip(("float32", "float16", "int8"), range(3), strict=True))


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("name", tables.FILE_BYTES)
def test_file_sizes_of_the_reports_recompute(tmp_path, name, precision):
    config, _, *_ = tables.ARCHITECTURES[name]
    convert = PRECISIONS[precision] or (lambda model: model)
    model = convert(CRNN(config).eval())
    published_bytes = tables.FILE_BYTES[name][PRECISION[precision]]
    # The file's own name stands in each of its entries. With one of eleven letters all bytes are there; ours,
    # which are called "archive" whatever the path, are up to 4 % smaller.
    torch.save(model.state_dict(), tmp_path / "eleven_long.pt")
    assert abs((tmp_path / "eleven_long.pt").stat().st_size - published_bytes) <= 64  # tensors are aligned to 64 bytes
    assert 0.96 * published_bytes < checkpoints.sizes(model)["state_dict_bytes"] < published_bytes


def test_weights_bytes_by_hand():
    gru = [(192, 144), (192, 64), (192, 64), (192, 64)]
    int8 = sum(a * b for a, b in gru) + 64 * 64 + 64 + 2 * 64
    float32 = 4 * (808 + 4 * 192 + 64 + 1 + 2)
    scales = 4 * (len(gru) + 3)
    assert checkpoints.sizes(CRNN())["weights_bytes"] == 4 * 70_443
    assert checkpoints.sizes(DynamicInt8()(CRNN()))["weights_bytes"] == int8 + float32 + scales
