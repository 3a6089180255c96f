"""Models outside torch: ONNX graphs of the clip and of one streaming step, and how long each runtime takes.

The front end is not in these graphs: they compare what runtimes make of the same net.
"""

import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from kwslib import cost
from kwslib.config import CRNNConfig, FeatureConfig
from kwslib.features import n_frames
from kwslib.quantize import DynamicInt8, Half
from kwslib.stream import StreamingModel

OPSET = 18


class _Step(nn.Module):
    """A streaming model's step as plain tensors in and out, in a stream whose attention window is full."""

    def __init__(self, streaming: StreamingModel):
        super().__init__()
        self.streaming = streaming

    def forward(self, frames: Tensor, hidden: Tensor, outputs: Tensor, energies: Tensor) -> tuple[Tensor, ...]:
        return self.streaming.advance(self.streaming.model.steps(frames), hidden, outputs, energies)


def clip_graph(model: nn.Module) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model and an example of what it reads: the log-mels of one clip, (1, F, T)."""
    like = next(model.parameters())
    return model.eval(), (torch.zeros(1, model.config.n_mels, n_frames(FeatureConfig())).to(like),)


def step_graph(model: nn.Module) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """One streaming step and an example of what it reads: frames under the kernel (1, F, frames) and the state."""
    streaming, config = StreamingModel(model), model.config
    state = streaming.initial_state()
    frames = torch.zeros(1, config.n_mels, config.kernel_size[1])
    outputs, energies = torch.zeros(1, streaming.window, config.hidden_size), torch.zeros(1, streaming.window)
    parts = (frames, state.hidden, outputs, energies)
    return _Step(streaming).eval(), tuple(part.to(streaming.dtype) for part in parts)


def onnx_bytes(graph: nn.Module, example: Sequence[Tensor]) -> bytes:
    """An ONNX file of a net in float32 or float16, for inputs of exactly these shapes."""
    file = io.BytesIO()
    with warnings.catch_warnings():  # the older exporter warns that it is older; it keeps a GRU whole, in 0.1 s
        warnings.simplefilter("ignore")
        torch.onnx.export(graph, tuple(example), file, dynamo=False, opset_version=OPSET)
    return file.getvalue()


def onnx_int8(content: bytes) -> bytes:
    """ONNX Runtime's own dynamic int8 of an ONNX file: convolution and linear layers, not GRU, RNN or LSTM."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "int8.onnx"
        logging.disable(logging.WARNING)  # it advises to optimize the graph first; the runtime does
        try:
            quantize_dynamic(onnx.load_from_string(content), file, weight_type=QuantType.QInt8)
        finally:
            logging.disable(logging.NOTSET)
        return file.read_bytes()


def onnx_call(content: bytes, example: Sequence[Tensor]) -> Callable[[], list]:
    """Run an ONNX file on these inputs in ONNX Runtime, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {wanted.name: part.numpy() for wanted, part in zip(session.get_inputs(), example, strict=True)}
    return lambda: session.run(None, feed)


def latency_ms(models: dict[str, nn.Module], rounds: int = 40) -> pd.DataFrame:
    """Milliseconds per clip and per streaming step, of float32, float16 and int8 in torch and ONNX Runtime.

    One thread, front end excluded. All of them take turns, so that what else the machine does hits all alike.

    Args:
        models: by name, in float32.

    Returns:
        One row per (model, unit, runtime, precision): ``median, q25, q75`` in ms, ``onnx_bytes`` of an ONNX file.
    """
    calls, sizes = {}, {}
    for name, model in models.items():
        graphs = {"clip": clip_graph} | ({"step": step_graph} if isinstance(model.config, CRNNConfig) else {})
        for unit, graph in graphs.items():
            half = graph(Half()(copy.deepcopy(model)))
            plain, int8 = graph(copy.deepcopy(model)), graph(DynamicInt8()(copy.deepcopy(model)))
            for precision, (net, example) in (("float32", plain), ("float16", half), ("int8", int8)):
                calls[name, unit, "torch", precision] = lambda net=net, example=example: net(*example)
            contents = {"float32": onnx_bytes(*plain), "float16": onnx_bytes(*half)}
            contents["int8"] = onnx_int8(contents["float32"])
            for precision, content in contents.items():
                key = name, unit, "ONNX Runtime", precision
                calls[key] = onnx_call(content, (half if precision == "float16" else plain)[1])
                sizes[key] = len(content)
    table = cost.latencies_ms(calls, rounds)
    table.index.names = ["model", "unit", "runtime", "precision"]
    return table.assign(onnx_bytes=pd.Series(sizes, dtype="Int64"))
