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

from kwslib.config import SAMPLE_RATE, CRNNConfig, FeatureConfig
from kwslib.data.features import SILENCE, LogMel, n_frames
from kwslib.nets import cost
from kwslib.streaming.decision import Decision, read_decision
from kwslib.streaming.model import State, StreamingModel
from kwslib.training.quantize import INT8, DynamicInt8, Half

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

    forward(samples): (B, N) -> (B, F, frames); each ends a hop after the one before, the first after the longer of
    hop and n_fft
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
        x = samples[:, max(0, self.hop - self.n_fft) :].unfold(1, self.n_fft, self.hop) * self.window
        half = self.n_fft // 2
        rising, falling = x[..., 1:half], x[..., half + 1 :].flip(-1)
        even = torch.cat([x[..., :1], rising + falling, x[..., half : half + 1]], dim=-1)
        power = (even @ cos).square() + ((rising - falling) @ sin).square()
        return torch.log((power @ self.mel).clamp(1e-9, 1e9)).transpose(1, 2)


class Detector(nn.Module):
    """A whole detector that advances by one hop of samples, with its state as plain tensors of fixed shapes.

    forward(samples (1, hop), *state) -> probability (1,), then the new state, in the order of ``names``.

    Args:
        decision: whose calibrated probability it gives; smoothing and threshold are left to the caller.
    """

    def __init__(self, streaming: StreamingModel, keep_tables: bool = True, decision: Decision = Decision()):
        super().__init__()
        self.scale, self.offset = decision.scale, decision.offset
        self.streaming, self.log_mel = streaming, _LogMel(streaming.front_end, keep_tables)
        config, front_end = streaming.model.config, streaming.front_end.config
        self.overlap = front_end.span - front_end.hop_length  # of a frame with the samples before its hop
        self.hop = config.stride[1] // config.every * front_end.hop_length
        self.n_caches = len(streaming.model.initial_caches(1))
        self.recurs = streaming.model.initial_state(1).numel() > 0

    @property
    def names(self) -> list[str]:
        """Of the state's parts: sound, frames, what deeper convolutions keep, recurrent state, attention's window."""
        deeper = [f"frames_{i}" for i in range(2, self.n_caches + 1)]
        sound, recurrent = ["audio"] if self.overlap else [], ["hidden"] if self.recurs else []
        return [*sound, "frames", *deeper, *recurrent, "outputs", "energies"]

    def initial_state(self) -> tuple[Tensor, ...]:
        """After endless silence, with recurrent layers and attention that have heard nothing."""
        streaming, model, dtype = self.streaming, self.streaming.model, self.streaming.dtype
        n_read = (model.config.kernel_size[1] - 1) // model.config.every + 1
        frames = torch.full((1, model.config.n_mels, n_read), SILENCE)
        with torch.no_grad():
            _, caches = model.columns(frames, model.initial_caches(1))
        return (
            *([torch.zeros(1, self.overlap)] if self.overlap else []),
            *caches,
            *([model.initial_state(1)] if self.recurs else []),
            torch.zeros(1, streaming.window, model.config.hidden_size, dtype=dtype),
            torch.full((1, streaming.window), -torch.inf, dtype=dtype),  # attention sees no step yet
        )

    def as_state(self, parts: Sequence[Tensor]) -> State:
        """The same as the state of the streaming model."""
        rest = list(parts)
        audio = rest.pop(0) if self.overlap else torch.zeros(1, 0)
        caches, rest = tuple(rest[: self.n_caches]), rest[self.n_caches :]
        hidden = rest.pop(0) if self.recurs else self.streaming.model.initial_state(1)
        return State(audio, caches, hidden, *rest)

    def forward(self, samples: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        state = self.as_state(parts)
        audio = torch.cat([state.samples, samples], dim=1)
        column, caches = self.streaming.model.columns(self.log_mel(audio), state.caches)
        score, hidden, outputs, energies = self.streaming.advance(column, state.hidden, state.outputs, state.energies)
        recurrent = (hidden,) if self.recurs else ()
        kept = (audio[:, -self.overlap :],) if self.overlap else ()
        probability = torch.sigmoid(self.scale * score + self.offset)
        return probability, *kept, *caches, *recurrent, outputs, energies


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


PARITY = 1e-4  # in probability, over a minute of sound


class ExportError(ValueError):
    """The model cannot be exported, or what was exported does not do what the model does."""


def detector(model: nn.Module, suffix: str, described: dict) -> bytes:
    """A whole detector as a file for another runtime, compared with the model before it is handed out.

    Args:
        model: one that streams, of any precision; of one with torch's int8 layers TorchScript only.
        suffix: ``.onnx`` for ONNX Runtime and others, ``.ts`` for TorchScript. Neither has a device baked in.
        described: its sidecar; keyword, threshold, decision and sizes go into the file as ``kws``, a JSON text.

    Raises:
        ExportError: another suffix, int8 layers in ONNX, or a probability that is off by more than 1e-4.
        ValueError: the model does not stream.
    """
    if suffix not in (".onnx", ".ts"):
        raise ExportError(f"a detector is written as .onnx or .ts, not as {suffix or 'a file without a suffix'}")
    decision = read_decision(described) or Decision()
    whole = Detector(StreamingModel(model), suffix == ".ts", decision).eval()
    example = (torch.zeros(1, whole.hop), *whole.initial_state())
    about = {
        key: described.get(key) for key in ("keyword", "threshold", "experiment", "precision", "model", "decision")
    }
    about |= {"sample_rate": SAMPLE_RATE, "hop_samples": whole.hop}
    # An event begins where the mean logit of the last smoothing_steps reaches the threshold.
    about["threshold_probability"] = float(decision.probability(decision.threshold))
    about["threshold_logit"] = decision.scale * decision.threshold + decision.offset
    about |= {"smoothing_steps": decision.smoothing_steps, "refractory_s": decision.refractory_s}
    about |= {"inputs": {"samples": [1, whole.hop]}, "first_state": {}}
    for name, part in zip(whole.names, whole.initial_state(), strict=True):
        about["inputs"][name] = list(part.shape)
        about["first_state"][name] = _first(name, part)
    about["outputs"] = ["probability", *(f"{name}_next" for name in whole.names)]
    if suffix == ".ts":
        content = _torchscript(whole, example, about)
        run = _torchscript_call(content)
    else:
        if any(isinstance(layer, INT8) for layer in model.modules()):
            raise ExportError("torch's int8 layers are known to torch alone: export as .ts, or a model of WeightInt")
        names = tuple(about["inputs"]), tuple(about["outputs"])
        content = _with_metadata(onnx_bytes(whole, example, names), about)
        run = _session_call(content)
    worst = parity(whole, run)
    if not worst <= PARITY:
        raise ExportError(f"the exported detector is off by {worst:.1e} in probability, more than {PARITY:.0e}")
    return content


def _first(name: str, part: Tensor) -> list[float]:
    """What a part of the state is filled with at the start: a number, or one for each of its rows."""
    if name.startswith("frames"):
        return [round(value, 5) for value in part[0, :, 0].tolist()]
    return [-1e30] if name == "energies" else [0.0]  # JSON has no -inf; whoever weighs nothing is not seen


@torch.no_grad()
def parity(whole: Detector, run: Callable, seconds: float = 60.0) -> float:
    """Largest difference in probability between a file and the streaming model, over a track of noise and tones.

    Args:
        run: called with a hop of samples and the state, as the detector is.
    """
    track = _track(round(seconds * SAMPLE_RATE / whole.hop) * whole.hop)
    state = whole.initial_state()
    start = whole.as_state(state)
    start = start._replace(outputs=start.outputs[:, :0], energies=start.energies[:, :0])
    expected, _ = whole.streaming.step(track, start)
    found = []
    for samples in track.split(whole.hop, dim=1):
        score, *state = run(samples, *state)
        found.append(float(score))
    probability = torch.sigmoid(whole.scale * expected[0] + whole.offset)
    return float((torch.tensor(found) - probability).abs().max())


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


def real_time_factors(models: dict[str, tuple[nn.Module, dict]], rounds: int = 200) -> pd.DataFrame:
    """Time that a whole detector takes for a step, over the time that the step's sound takes, on one thread.

    Front end included; samples go in and a probability comes out. All take turns.

    Args:
        models: (model, its sidecar) by name; each one that streams.

    Returns:
        One row per (model, runtime): ``median, q25, q75``, and ``bytes`` of the file that runs.
    """
    calls, sizes, hop_ms = {}, {}, {}
    for name, (model, described) in models.items():
        streaming = StreamingModel(model)
        whole = Detector(streaming)
        samples = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (1, whole.hop)).astype(np.float32))
        onnx, script = detector(model, ".onnx", described), detector(model, ".ts", described)
        _, state = streaming.step(samples.repeat(1, 40), streaming.initial_state())  # the window is full
        run, parts = _torchscript_call(script), (samples, *whole.initial_state())
        calls[name, "ONNX Runtime"] = onnx_call(onnx, parts)
        calls[name, "TorchScript"] = lambda run=run, parts=parts: run(*parts)
        calls[name, "torch, eager"] = lambda s=streaming, x=samples, state=state: s.step(x, state)
        sizes |= {(name, "ONNX Runtime"): len(onnx), (name, "TorchScript"): len(script)}
        hop_ms |= dict.fromkeys([key for key in calls if key[0] == name], 1000 * whole.hop / SAMPLE_RATE)
    table = cost.latencies_ms(calls, rounds).div(pd.Series(hop_ms), axis=0)
    table.index.names = ["model", "runtime"]
    return table.assign(bytes=pd.Series(sizes, dtype="Int64"))


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
