"""The same numbers from ONNX Runtime, in every precision it can run, per clip and per step."""

import copy

import numpy as np
import pytest
import torch

from kwslib.config import CELLS, CRNNConfig
from kwslib.nets import cost
from kwslib.nets.crnn import CRNN
from kwslib.nets.rivals import SeparableConfig, build
from kwslib.streaming import export
from kwslib.streaming.model import StreamingModel
from kwslib.training.quantize import Half, WeightInt

GENERATOR = torch.Generator().manual_seed(3)
CONFIGS = {cell: CRNNConfig(2, hidden_size=9, gru_num_layers=2, cell=cell, attention_size=4) for cell in CELLS}


def like(example):
    return tuple(torch.randn(x.shape, generator=GENERATOR).to(x.dtype) for x in example)


@pytest.mark.parametrize(("convert", "within"), [(lambda m: m, 1e-5), (Half(), 5e-3), (WeightInt(8), 1e-5)])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("graph", [export.clip_graph, export.step_graph])
@torch.no_grad()
def test_onnx_gives_what_torch_gives(graph, cell, convert, within):
    net, example = graph(convert(CRNN(CONFIGS[cell]).eval()))
    inputs = like(example)
    expected = net(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = export.onnx_call(export.onnx_bytes(net, example), inputs)()
    assert len(found) == len(expected)
    for ours, theirs in zip(expected, found, strict=True):
        np.testing.assert_allclose(theirs, ours.numpy(), atol=within)


@torch.no_grad()
def test_steps_in_a_row_are_the_stream():
    """The step's graph, fed frame by frame with its own state, against the streaming model."""
    model = CRNN(CONFIGS["gru"]).eval()
    streaming = StreamingModel(model)
    samples = torch.randn(1, 48_000, generator=GENERATOR) * 0.1
    scores, _ = streaming.step(samples, streaming.initial_state())
    frames = streaming.front_end(samples)
    net, (_, hidden, outputs, energies) = export.step_graph(model)
    kernel, stride = model.config.kernel_size[1], model.config.stride[1]
    last = []
    energies = energies - torch.inf  # an empty window: nothing to attend to yet
    for start in range(0, frames.shape[2] - kernel + 1, stride):
        score, hidden, outputs, energies = net(frames[:, :, start : start + kernel], hidden, outputs, energies)
        last.append(score.item())
    np.testing.assert_allclose(last, scores[0].numpy(), atol=1e-5)


def test_onnx_runtime_leaves_the_gru_in_float():
    import onnx

    net, example = export.clip_graph(CRNN(CONFIGS["gru"]).eval())
    plain = export.onnx_bytes(net, example)
    kinds = {node.op_type for node in onnx.load_from_string(export.onnx_int8(plain)).graph.node}
    assert {"GRU", "MatMulInteger", "ConvInteger"} <= kinds


def test_every_runtime_and_precision_takes_its_turn():
    models = {"small": CRNN(CONFIGS["gru"]).eval(), "rival": build(SeparableConfig()).eval()}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    table = export.latency_ms(models, rounds=2)
    assert len(table) == 3 * 6  # clip and step of the one, clips of the other; two runtimes, three precisions
    assert (
        (table["q25"] <= table["median"]).all() and (table["median"] <= table["q75"]).all() and (table > 0).all().all()
    )
    assert table.loc[("small", "clip", "ONNX Runtime", "float16"), "onnx_bytes"] > 0
    for name, model in models.items():  # conversions worked on copies
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before[name].items())


def test_calls_take_turns():
    order = []
    table = cost.latencies_ms({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, in_a_row=2)
    assert "".join(order) == "aabb" * 4  # the first turn warms up
    assert list(table.index) == ["a", "b"] and list(table.columns) == ["median", "q25", "q75"]
