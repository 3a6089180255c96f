"""Models outside torch: a whole detector as TorchScript or ONNX, and how long each runtime takes.

A detector's file takes a hop of samples and its state, and gives the probability of the keyword and the new
state: log-mel, net, attention window and softmax are inside. The graphs that are timed begin after the log-mel.
"""

import copy
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from kwslib import cost
from kwslib.config import SAMPLE_RATE, CRNNConfig, FeatureConfig
from kwslib.features import SILENCE, LogMel, n_frames
from kwslib.quantize import INT8, DynamicInt8, Half
from kwslib.stream import State, StreamingModel

OPSET = 18


class _Step(nn.Module):
    """A streaming model's step as plain tensors in and out, in a stream whose attention window is full."""

    def __init__(self, streaming: StreamingModel):
        super().__init__()
        self.streaming = streaming

    def forward(self, frames: Tensor, hidden: Tensor, outputs: Tensor, energies: Tensor) -> tuple[Tensor, ...]:
        return self.streaming.advance(self.streaming.model.steps(frames), hidden, outputs, energies)


class _LogMel(nn.Module):
    """The frames of ``features.LogMel`` in plain matrix products, which every runtime has.

    The halves of a frame are folded first: a cosine sees their sum, a sine their difference. Half the work, and
    no complex numbers. Tables that are not kept are computed on the way: ONNX Runtime does that once, when it loads
    a file that is then 320 kB smaller.

    forward(samples): (B, N) -> (B, F, (N - n_fft) // hop_length + 1)
    """

    def __init__(self, front_end: LogMel, keep_tables: bool = True):
        super().__init__()
        self.n_fft, self.hop = front_end.config.n_fft, front_end.config.hop_length
        self.register_buffer("index", torch.arange(self.n_fft // 2 + 1, dtype=torch.float32))
        self.tables = self._tables() if keep_tables else None
        self.register_buffer("window", front_end.mel.spectrogram.window)
        self.register_buffer("mel", front_end.mel.mel_scale.fb)

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every frequency at every sample."""
        # k n modulo n_fft is exact in whole numbers; the angle itself would lose digits in float32.
        turns = torch.remainder(self.index[:, None] @ self.index[None], float(self.n_fft))
        angle = turns * (2 * torch.pi / self.n_fft)
        return angle.cos(), angle[1:-1].sin()

    def forward(self, samples: Tensor) -> Tensor:
        cos, sin = self.tables or self._tables()
        x = samples.unfold(1, self.n_fft, self.hop) * self.window
        half = self.n_fft // 2
        rising, falling = x[..., 1:half], x[..., half + 1 :].flip(-1)
        even = torch.cat([x[..., :1], rising + falling, x[..., half : half + 1]], dim=-1)
        power = (even @ cos).square() + ((rising - falling) @ sin).square()
        return torch.log((power @ self.mel).clamp(1e-9, 1e9)).transpose(1, 2)


class Detector(nn.Module):
    """A whole detector that advances by one hop of samples, with its state as plain tensors of fixed shapes.

    forward(samples (1, hop), audio, frames, hidden, outputs, energies) -> probability (1,), then the new state.
    """

    def __init__(self, streaming: StreamingModel, keep_tables: bool = True):
        super().__init__()
        self.streaming, self.log_mel = streaming, _LogMel(streaming.front_end, keep_tables)
        config, front_end = streaming.model.config, streaming.front_end.config
        self.frame_stride = config.stride[1]
        self.overlap = front_end.n_fft - front_end.hop_length
        self.hop = self.frame_stride * front_end.hop_length

    def initial_state(self) -> tuple[Tensor, ...]:
        """After endless silence, with a net that has heard nothing: audio, frames, hidden, outputs, energies."""
        streaming, config = self.streaming, self.streaming.model.config
        return (
            torch.zeros(1, self.overlap),
            torch.full((1, config.n_mels, config.kernel_size[1] - self.frame_stride), SILENCE),
            streaming.model.initial_state(1),
            torch.zeros(1, streaming.window, config.hidden_size, dtype=streaming.dtype),
            torch.full((1, streaming.window), -torch.inf, dtype=streaming.dtype),  # attention sees no step yet
        )

    def forward(
        self, samples: Tensor, audio: Tensor, frames: Tensor, hidden: Tensor, outputs: Tensor, energies: Tensor
    ) -> tuple[Tensor, ...]:
        audio = torch.cat([audio, samples], dim=1)
        frames = torch.cat([frames, self.log_mel(audio)], dim=2)
        column = self.streaming.model.steps(frames.to(self.streaming.dtype))
        score, hidden, outputs, energies = self.streaming.advance(column, hidden, outputs, energies)
        state = (audio[:, -self.overlap :], frames[:, :, self.frame_stride :], hidden, outputs, energies)
        return torch.sigmoid(score), *state


def clip_graph(model: nn.Module) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model and an example of what it reads: the log-mels of one clip, (1, F, T)."""
    like = next(model.parameters())
    return model.eval(), (torch.zeros(1, model.config.n_mels, n_frames(FeatureConfig())).to(like),)


def step_graph(model: nn.Module) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """One streaming step and an example of what it reads: frames under the kernel (1, F, frames) and the state."""
    streaming, config = StreamingModel(model), model.config
    frames = torch.zeros(1, config.n_mels, config.kernel_size[1])
    outputs, energies = torch.zeros(1, streaming.window, config.hidden_size), torch.zeros(1, streaming.window)
    parts = (frames, model.initial_state(1), outputs, energies)
    return _Step(streaming).eval(), tuple(part.to(streaming.dtype) for part in parts)


def onnx_bytes(graph: nn.Module, example: Sequence[Tensor], names: tuple = ((), ())) -> bytes:
    """An ONNX file of a net in float32 or float16, for inputs of exactly these shapes.

    Args:
        names: of the inputs and of the outputs.
    """
    file = io.BytesIO()
    inputs, outputs = map(list, names)
    with warnings.catch_warnings():  # the older exporter warns that it is older; it keeps a GRU whole, in 0.1 s
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph, tuple(example), file, dynamo=False, opset_version=OPSET, input_names=inputs, output_names=outputs
        )
    return file.getvalue()


STATE = ("audio", "frames", "hidden", "outputs", "energies")
NAMES = (("samples", *STATE), ("probability", *(f"{name}_next" for name in STATE)))
PARITY = 1e-4  # in probability, over a minute of sound


class ExportError(RuntimeError):
    """The model cannot be exported, or what was exported does not do what the model does."""


def detector(model: nn.Module, suffix: str, described: dict) -> bytes:
    """A whole detector as a file for another runtime, compared with the model before it is handed out.

    Args:
        model: a CRNN of any precision; of one with torch's int8 layers TorchScript only.
        suffix: ``.onnx`` for ONNX Runtime and others, ``.ts`` for TorchScript. Neither has a device baked in.
        described: its sidecar; keyword, threshold and sizes go into the file as ``kws``, a JSON text.

    Raises:
        ExportError: another suffix, int8 layers in ONNX, or a probability that is off by more than 1e-4.
        ValueError: the model does not stream.
    """
    if suffix not in (".onnx", ".ts"):
        raise ExportError(f"a detector is written as .onnx or .ts, not as {suffix or 'a file without a suffix'}")
    whole = Detector(StreamingModel(model), keep_tables=suffix == ".ts").eval()
    example = (torch.zeros(1, whole.hop), *whole.initial_state())
    about = {key: described.get(key) for key in ("keyword", "threshold", "experiment", "precision", "model")}
    about |= {"sample_rate": SAMPLE_RATE, "hop_samples": whole.hop}
    if suffix == ".ts":
        content = _torchscript(whole, example, about)
        run = _torchscript_call(content)
    else:
        if any(isinstance(layer, INT8) for layer in model.modules()):
            raise ExportError("torch's int8 layers are known to torch alone: export as .ts, or a model of WeightInt")
        content = _with_metadata(onnx_bytes(whole, example, NAMES), about)
        run = _session_call(content)
    worst = parity(whole, run)
    if not worst <= PARITY:
        raise ExportError(f"the exported detector is off by {worst:.1e} in probability, more than {PARITY:.0e}")
    return content


@torch.no_grad()
def parity(whole: Detector, run: Callable, seconds: float = 60.0) -> float:
    """Largest difference in probability between a file and the streaming model, over a track of noise and tones.

    Args:
        run: called with a hop of samples and the state, as the detector is.
    """
    track = _track(round(seconds * SAMPLE_RATE / whole.hop) * whole.hop)
    state = whole.initial_state()
    start = State(*state[:3], outputs=state[3][:, :0], energies=state[4][:, :0])
    expected, _ = whole.streaming.step(track, start)
    found = []
    for samples in track.split(whole.hop, dim=1):
        probability, *state = run(samples, *state)
        found.append(float(probability))
    return float((torch.tensor(found) - torch.sigmoid(expected[0])).abs().max())


def _track(n_samples: int) -> Tensor:
    """Sound between silence and full scale: noise whose loudness rises and falls, and a sweep, (1, samples)."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(n_samples) / SAMPLE_RATE
    loudness = 10 ** (2 * torch.sin(2 * torch.pi * t / 7) - 2.5)
    sweep = torch.sin(2 * torch.pi * (200 + 50 * t) * t) * (torch.sin(2 * torch.pi * t / 3) > 0)
    return (loudness * (torch.randn(n_samples, generator=generator) + sweep)).clamp(-1, 1)[None]


def _torchscript(whole: Detector, example: Sequence[Tensor], about: dict) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():  # deprecated, and it warns of the sizes that are fixed on purpose
        warnings.simplefilter("ignore")
        traced = torch.jit.freeze(torch.jit.trace(whole, tuple(example), check_trace=False))
        torch.jit.save(traced, file, _extra_files={"kws.json": json.dumps(about)})
    return file.getvalue()


def _torchscript_call(content: bytes) -> Callable:
    """A TorchScript file as a function of tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(io.BytesIO(content), map_location="cpu")


def _with_metadata(content: bytes, about: dict) -> bytes:
    import onnx

    graph = onnx.load_from_string(content)
    onnx.helper.set_model_props(graph, {"kws": json.dumps(about)})
    return graph.SerializeToString()


def _session(content: bytes):
    """An ONNX Runtime session on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _session_call(content: bytes) -> Callable:
    """An ONNX file as a function of tensors."""
    session = _session(content)
    names = [wanted.name for wanted in session.get_inputs()]

    def call(*parts: Tensor) -> list[Tensor]:
        feed = {name: np.asarray(part) for name, part in zip(names, parts, strict=True)}
        return [torch.from_numpy(part) for part in session.run(None, feed)]

    return call


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
    session = _session(content)
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
            plain, int8 = graph(model), graph(DynamicInt8()(model))
            half = graph(Half()(copy.deepcopy(model)))  # the only one that works in place
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
