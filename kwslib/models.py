"""The keyword detector of the reports: convolution, recurrent layers, attention, linear classifier.

Shapes: B batch, C conv channels, F mel bins, T frames, S convolution steps, H hidden size, K classes.
State-dict names are those of the reports (``conv.0.*``, ``gru.*``, ``attention.energy.{0,2}.*``,
``classifier.*``), so their checkpoints load.
"""

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kwslib.config import CELLS, CRNNConfig


class Outputs(NamedTuple):
    """What a loss may look at; a net that has no such part, or is asked for its logits alone, leaves it out.

    Attributes:
        logits: (B, K).
        attention: weights over time, (B, S).
        steps: convolution outputs, the recurrent layers' input, (B, S, C * bins).
        hidden: outputs of the last recurrent layer, (B, S, H).
        context: their sum weighted by the attention, (B, H).
    """

    logits: Tensor
    attention: Tensor | None = None
    steps: Tensor | None = None
    hidden: Tensor | None = None
    context: Tensor | None = None


class Attention(nn.Module):
    """Additive attention over time without a query: one energy per step, softmax, weighted sum.

    An inner size of 0 leaves a single linear layer (report A2).

    forward(hidden): (B, S, H) -> context (B, H), weights (B, S)
    """

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        if inner_size:
            self.energy = nn.Sequential(nn.Linear(hidden_size, inner_size), nn.Tanh(), nn.Linear(inner_size, 1))
        else:
            self.energy = nn.Linear(hidden_size, 1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(self.energy(hidden).squeeze(-1), dim=-1)
        return (weights.unsqueeze(-1) * hidden).sum(1), weights


class CRNN(nn.Module):
    """A log-mel picture in, logits out; the last class is the keyword.

    Shapes:
        forward(logmel): (B, F, T) -> logits (B, K)
        outputs(logmel): the same with everything on the way
        steps(logmel):   (B, F, T) -> convolution outputs (B, S, C * bins), the GRU's input

    Raises:
        ValueError: another number of mel bins, or fewer frames than the convolution needs.
    """

    def __init__(self, config: CRNNConfig = CRNNConfig()):
        super().__init__()
        self.config = config
        channels = config.cnn_out_channels
        if config.separable:
            convolutions = [nn.Conv2d(1, 1, config.kernel_size, config.stride), nn.Conv2d(1, channels, 1)]
        else:
            convolutions = [nn.Conv2d(1, channels, config.kernel_size, config.stride)]
        flatten = nn.Flatten(start_dim=1, end_dim=2)  # (B, C, bins, S) -> (B, C * bins, S)
        self.conv = nn.Sequential(*convolutions, flatten)
        cell = {"gru": nn.GRU, "rnn": nn.RNN, "lstm": nn.LSTM}[config.cell]
        self.gru = cell(  # whatever the cell, the weights are called as in the reports
            config.gru_input_size,
            config.hidden_size,
            config.gru_num_layers,
            batch_first=True,
            dropout=0.1 if config.gru_num_layers > 1 else 0.0,
        )
        self.attention = Attention(config.hidden_size, config.attention_inner_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_classes)

    def steps(self, logmel: Tensor) -> Tensor:
        if logmel.shape[-2] != self.config.n_mels or logmel.shape[-1] < self.config.kernel_size[1]:
            raise ValueError(
                f"expected log-mels (batch, {self.config.n_mels}, at least {self.config.kernel_size[1]} frames), "
                f"got {tuple(logmel.shape)}"
            )
        return self.conv(logmel.unsqueeze(1)).transpose(1, 2)

    def initial_caches(self, batch: int) -> tuple[Tensor, ...]:
        """What the convolution keeps of a stream that has not begun, (B, F, 0)."""
        return (torch.zeros(batch, self.config.n_mels, 0),)

    def columns(self, frames: Tensor, caches: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The steps that new frames (B, F, T) of a stream complete, (B, S, C * bins), and what must be kept."""
        frames = torch.cat([*caches, frames], dim=2)
        n_steps = self.config.n_steps(frames.shape[2])
        dtype = self.conv[0].weight.dtype
        if n_steps == 0:
            return torch.zeros(len(frames), 0, self.config.gru_input_size, dtype=dtype), (frames,)
        return self.steps(frames.to(dtype)), (frames[:, :, n_steps * self.config.stride[1] :].clone(),)

    def initial_state(self, batch: int) -> Tensor:
        """The state of a recurrent layer that has heard nothing, (layers, B, H); twice the layers for an LSTM."""
        layers = self.config.gru_num_layers * (2 if self.config.cell == "lstm" else 1)
        return torch.zeros(layers, batch, self.config.hidden_size, dtype=next(self.conv.parameters()).dtype)

    def recur(self, steps: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrent layers from a state on: (B, S, C * bins) -> (B, S, H) and the state after them."""
        if self.config.cell != "lstm":
            return self.gru(steps, state)
        hidden, (h, c) = self.gru(steps, tuple(half.contiguous() for half in state.chunk(2)))
        return hidden, torch.cat([h, c])

    def outputs(self, logmel: Tensor) -> Outputs:
        steps = self.steps(logmel)
        hidden, _ = self.gru(steps)
        context, attention = self.attention(hidden)
        return Outputs(self.classifier(context), attention, steps, hidden, context)

    def forward(self, logmel: Tensor) -> Tensor:
        return self.outputs(logmel).logits


def step_logits(model: nn.Module, logmel: Tensor, window: int) -> Tensor:
    """Logits after every step, as a stream gives them: (B, F, T) -> (B, S, K).

    The recurrent state is carried through; attention sees the last ``window`` steps, in the beginning fewer.
    """
    hidden, _ = model.recur(model.steps(logmel), model.initial_state(len(logmel)))
    energies = model.attention.energy(hidden)[..., 0]
    return model.classifier(attend_windows(hidden, energies, window))


def attend_windows(hidden: Tensor, energies: Tensor, window: int) -> Tensor:
    """Attention that ends at each step and sees the last ``window`` ones: (B, S, H), (B, S) -> contexts (B, S, H)."""
    earlier = nn.functional.pad(hidden, (0, 0, window - 1, 0)).unfold(1, window, 1)  # (B, S, H, window)
    weights = nn.functional.pad(energies, (window - 1, 0), value=-torch.inf).unfold(1, window, 1).softmax(-1)
    return (earlier * weights.unsqueeze(2)).sum(-1)


@torch.no_grad()
def absorb_normalization(model: CRNN, mean: float, std: float) -> CRNN:
    """Let a model that was fed (x - mean) / std take x itself: its convolution absorbs both, exactly, in place."""
    convolution = model.conv[0]
    convolution.weight /= std
    convolution.bias -= convolution.weight.sum((1, 2, 3)) * mean
    return model


def on_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales of a weight: symmetric, one scale for each output channel or gate row.

    The largest value of a row becomes 2^(bits-1) - 1; the scale is one that float16 can hold (of a row of very
    small weights not exactly), and 1 for a row of zeros. Weights that are on the grid stay where they are.
    (O, ...) -> int8 (O, ...), float32 (O, 1, ...)

    >>> whole, scale = on_grid(torch.tensor([[-0.7, 0.31], [0.0, 0.0]]), bits=4)
    >>> whole.tolist(), [round(s, 4) for s in scale.flatten().tolist()]
    ([[-7, 3], [0, 0]], [0.1, 1.0])
    """
    most = 2 ** (bits - 1) - 1
    scale = (weight.detach().float().abs().flatten(1).amax(1) / most).half().float()
    scale = torch.where(scale > 0, scale, 1.0).reshape(-1, *[1] * (weight.dim() - 1))
    return (weight.detach() / scale).round().clamp(-most, most).to(torch.int8), scale


@torch.no_grad()
def round_weights(model: nn.Module, bits: int, names: Container[str] | None = None) -> nn.Module:
    """Move every weight, or those of these names, to its grid, in place; biases, few as they are, stay."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and (names is None or name in names):
            whole, scale = on_grid(weight, bits)
            weight.copy_(whole * scale)
    return model


def keyword_score(logits: Tensor) -> Tensor:
    """Logit of the keyword minus logit of the rest, (B, 2) -> (B,) in float32.

    Ranks like the softmax but does not saturate; its logistic function is the probability.
    """
    logits = logits.float()
    return logits[:, 1] - logits[:, 0]


class CheckpointError(ValueError):
    """The file is not a checkpoint of this project; the message says what it is instead."""


def tensors_file(state: dict) -> bytes:
    """The bytes of ``torch.save(state, path)``, but the same whatever the path is called."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def read_sidecar(path: Path) -> dict:
    """The JSON beside a checkpoint.

    Raises:
        CheckpointError: it is missing or not readable.
    """
    sidecar = path.with_suffix(".json")
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: train it first, or check the name")
    try:
        described = json.loads(sidecar.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} needs its description {sidecar.name} beside it: {error}") from None
    if not isinstance(described, dict) or not {"features", "model", "precision"} <= set(described):
        raise CheckpointError(f"{sidecar} does not describe a checkpoint of this project: train it again")
    return described


def is_described(path: Path) -> bool:
    """Whether the JSON of a checkpoint of this project stands beside the file."""
    try:
        read_sidecar(path)
    except CheckpointError:
        return False
    return True


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict from a file, tensors only, never code.

    Raises:
        CheckpointError: missing, truncated, holding anything but a dict of tensors, or claiming more than it holds.
    """
    try:
        _refuse_to_grow(path)
        with warnings.catch_warnings():  # torch's own reader of quantized tensors warns about itself
            warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}: train it first, or check the name") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is not a checkpoint of this project: it holds other things than weights and is not opened"
        ) from None
    except Exception as error:  # torch raises a dozen kinds for a damaged or foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a checkpoint of this project: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not the weights of a model")
    _check_stored(path, state)
    return state


def _refuse_to_grow(path: Path) -> None:
    """torch stores weights as they are; a file that unpacks to more than it is would fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            n_bytes = sum(part.file_size for part in archive.infolist())
        if n_bytes > path.stat().st_size:
            raise ValueError(f"its parts are larger than the file, {n_bytes / 1e6:,.1f} MB, and are not unpacked")


def _check_stored(path: Path, state: dict) -> None:
    """A tensor may repeat one number without end, or say its shape alone: nothing is to be computed from such."""
    if not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} is not a plain state dict: its weights have no names")
    for name, t in state.items():
        if isinstance(t, Tensor):
            stored = t.layout == torch.strided and t.device.type == "cpu"
            if not stored or t.numel() * t.element_size() > path.stat().st_size:
                raise CheckpointError(f"{path}: {name} has the shape {tuple(t.shape)}, which the file does not hold")


def load_published(path: Path, mel_stride: int | None = None, frame_stride: int = 8) -> CRNN:
    """A model that others published: a plain state dict with the names of the reports.

    All sizes follow from the shapes, except the strides of the convolution: the frame stride leaves no
    trace, and several mel strides can give the same number of bins. fp32 or fp16; the counters that thop
    leaves in a model it measured are dropped. Such models were trained on ``centered`` log-mels.

    Args:
        mel_stride: needed only where the shapes allow several.
        frame_stride: in frames of 10 ms; the reports' default is 8.

    Raises:
        CheckpointError: not a state dict, other names or shapes than the model's, weights that are not
            numbers, or a mel stride that is ambiguous or does not fit.
    """
    state = read_tensors(path)
    for wrapper in ("state_dict", "model_state_dict", "model"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    _check_stored(path, state)
    state = {name: t for name, t in state.items() if name.rpartition(".")[2] not in ("total_ops", "total_params")}
    if not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path} is not a plain state dict: it holds {', '.join(map(str, list(state)[:5]))}")
    if any(t.is_quantized or not t.is_floating_point() or t.element_size() == 1 for t in state.values()):
        raise CheckpointError(
            f"{path} holds integer weights: only fp32 and fp16 state dicts can be read without a JSON"
        )
    bad = [name for name, t in state.items() if not torch.isfinite(t.float()).all()]
    if bad:
        raise CheckpointError(f"{path}: {', '.join(bad)} hold values that are not numbers")
    try:
        config = _config_of_shapes({name: tuple(t.shape) for name, t in state.items()}, mel_stride, frame_stride)
        with torch.device("meta"):  # takes no memory, whatever the shapes say
            model = CRNN(config)
        model.load_state_dict(state, assign=True)
    except (LookupError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not a CRNN with the names of the reports: {reason}") from None
    return model.to(state["conv.0.weight"].dtype).eval()


def _config_of_shapes(shapes: dict[str, tuple], mel_stride: int | None, frame_stride: int) -> CRNNConfig:
    _, _, kernel_bins, kernel_frames = shapes["conv.0.weight"]
    if frame_stride < 1:
        raise ValueError(f"a frame stride of {frame_stride} makes no steps")
    if shapes["classifier.weight"][0] != 2:
        raise ValueError(f"it tells {shapes['classifier.weight'][0]} classes apart, a keyword detector 2")
    channels = shapes.get("conv.1.weight", shapes["conv.0.weight"])[0]
    hidden = shapes["gru.weight_hh_l0"][1]
    gates, rest = divmod(shapes["gru.weight_hh_l0"][0], hidden)
    cells = [cell for cell, its_gates in CELLS.items() if its_gates == gates and not rest]
    if not cells:
        raise ValueError(f"its recurrent layer has {gates} gates: an RNN has 1, a GRU 3, an LSTM 4")
    bins, rest = divmod(shapes["gru.weight_ih_l0"][1], channels)
    mels = CRNNConfig.n_mels
    fitting = [s for s in range(1, mels) if (mels - kernel_bins) // s + 1 == bins and not rest]
    if mel_stride is not None:
        fitting = [s for s in fitting if s == mel_stride]
    if len(fitting) != 1:
        names = ", ".join(map(str, fitting)) or "none"
        raise ValueError(f"{bins} bins of {mels} with kernels of {kernel_bins}: the mel strides that fit are {names}")
    return CRNNConfig(
        cnn_out_channels=channels,
        kernel_size=(kernel_bins, kernel_frames),
        stride=(fitting[0], frame_stride),
        hidden_size=hidden,
        gru_num_layers=sum(name.startswith("gru.weight_hh_l") for name in shapes),
        attention_size=0 if "attention.energy.weight" in shapes else shapes["attention.energy.0.weight"][0],
        cell=cells[0],
        separable="conv.1.weight" in shapes,
    )
