"""Fewer bits: half precision, dynamic int8, whole-number weights of 8 or 4 bits, and tuning for them."""

import copy
import re
import warnings
from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import dynamic

from kwslib.config import FeatureConfig
from kwslib.data.features import SILENCE, n_frames
from kwslib.metrics import au_fa_fr
from kwslib.nets.crnn import CRNN, score
from kwslib.nets.integer import on_grid
from kwslib.nets.rivals import TimeNet, folded


@torch.no_grad()
def round_weights(model: nn.Module, bits: int, names: Container[str] | None = None) -> nn.Module:
    """Move every weight, or those of these names, to its grid, in place; biases, few as they are, stay."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and (names is None or name in names):
            whole, scale = on_grid(weight, bits)
            weight.copy_(whole * scale)
    return model


def packed(state: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Weights as int8, or two to a byte, each with its ``.scale``; biases as float16."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.dim() < 2:
            if value.is_floating_point():  # not the counter of a normalisation layer
                out[name] = value.half()
            continue
        whole, scale = on_grid(value, bits)
        if bits == 4:
            pairs = nn.functional.pad(whole.flatten(), (0, whole.numel() % 2)).view(-1, 2).to(torch.uint8) & 15
            whole = pairs[:, 0] | pairs[:, 1] << 4
        out |= {name: whole, f"{name}.scale": scale.flatten().half()}
    return out


def unpacked(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What ``packed`` packed, as float32 in the shapes of the model's state."""
    out: dict[str, Tensor] = {}
    for name, target in model.state_dict().items():
        value = state.get(name, target)
        if target.dim() > 1:
            if model.weight_bits == 4:
                low, high = (value & 15).to(torch.int8), (value >> 4).to(torch.int8)
                whole = torch.stack([low, high], dim=1).flatten()[: target.numel()]
                value = torch.where(whole > 7, whole - 16, whole).view(target.shape)
            value = value * state[f"{name}.scale"].float().reshape(-1, *[1] * (target.dim() - 1))
        out[name] = value.to(target.dtype)
    return out


INT8 = (dynamic.GRU, dynamic.LSTM, dynamic.Linear)


class PrecisionError(ValueError):
    """The model cannot be held in the wanted precision; the message says what breaks."""


def _refuse_whole_numbers(model: nn.Module) -> None:
    if bits := getattr(model, "weight_bits", 0):
        raise PrecisionError(
            f"the weights are whole numbers of {bits} bits already: leave this step out, or put it before"
        )


@dataclass(frozen=True)
class Half:
    """Cast to float16, weights and arithmetic, as in reports A, D and E; runs on CPU and GPU.

    Raises:
        PrecisionError: a weight is not finite or exceeds what float16 can hold (65,504), or the logits of
            a silent or of the loudest possible clip do.
    """

    precision = "float16"

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> nn.Module:
        _refuse_whole_numbers(model)
        for name, weight in model.state_dict().items():
            if not torch.isfinite(weight.half()).all():
                raise PrecisionError(f"{name} does not fit into float16: its largest value is {weight.abs().max()}")
        model = model.half().eval()
        clip = torch.ones(1, model.config.n_mels, n_frames(FeatureConfig())).to(next(model.parameters()))
        for loudness, log_energy in (("a silent", SILENCE), ("the loudest possible", -SILENCE)):
            if not torch.isfinite(model(clip * log_energy)).all():
                raise PrecisionError(
                    f"the logits of {loudness} clip do not fit into float16: keep the model in float32"
                )
        return model


@dataclass(frozen=True)
class DynamicInt8:
    """Weights of GRU, LSTM and Linear as int8, activations quantized on the fly, as in reports B and C.

    Convolution and RNN stay in float32: torch has no dynamic kind of either. CPU only.
    """

    precision = "int8"

    def __call__(self, model: nn.Module) -> nn.Module:
        _refuse_whole_numbers(model)
        with warnings.catch_warnings():  # deprecated since 2.10, but torchao has no dynamic GRU
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            return torch.ao.quantization.quantize_dynamic(
                model.float().cpu().eval(), {nn.GRU, nn.LSTM, nn.Linear}, dtype=torch.qint8
            )


def round_inputs(model: CRNN) -> CRNN:
    """Let the recurrent layers, the attention and the classifier read 8-bit numbers, in place.

    Every vector has a scale of its own, taken from its values, so chunks of a stream and clips of a batch do not
    touch one another. What a recurrent layer hands on, to itself or to the next one, stays as it is, as in torch's
    dynamic int8; so do the log-mels.

    Raises:
        ValueError: not a CRNN.
    """
    if not isinstance(model, CRNN):
        raise ValueError(f"only a CRNN can round its activations, not a {type(model).__name__}")
    if getattr(model, "activation_bits", 0):
        return model
    model.activation_bits = 8
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.RNNBase):
            layer.register_forward_pre_hook(lambda _, args: (to_8_bits(args[0]), *args[1:]))
    return model


def to_8_bits(x: Tensor) -> Tensor:
    """Vectors (..., size) rounded to 255 equal steps around 0; gradients pass as if nothing happened.

    >>> to_8_bits(torch.tensor([127.0, 30.4, -2.5])).tolist()
    [127.0, 30.0, -2.0]
    """
    scale = (x.detach().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return x + ((x / scale).round() * scale - x).detach()


@dataclass(frozen=True)
class WeightInt:
    """Weights of every layer, convolution, GRU and RNN too, as whole numbers of 8 or 4 bits with a scale per row.

    The file holds them packed, scales and biases in float16; the model computes in float32 with the rounded
    weights: smaller, not faster.

    Attributes:
        bits: 8 or 4.
        activations: what recurrent and linear layers read is rounded to 8 bits too, see ``round_inputs``.

    Raises:
        ValueError: another number of bits.
        PrecisionError: a weight is not finite, or its scale or a bias exceeds what float16 can hold.
    """

    bits: int = 8
    activations: bool = False

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise ValueError(f"weights have 8 or 4 bits, not {self.bits}")

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> nn.Module:
        model = round_weights(copy.deepcopy(model).float().cpu().eval(), self.bits)
        for name, value in model.state_dict().items():
            if value.dim() == 1:
                value.copy_(value.half())
            if not torch.isfinite(value).all():
                raise PrecisionError(f"{name} does not fit: its scales and biases are kept in float16")
        model.weight_bits = self.bits
        return round_inputs(model) if self.activations else model


@dataclass(frozen=True)
class Fold:
    """Let convolutions absorb the normalization layers of a ``TimeNet``; a step before ``WeightInt``.

    Weights that were tuned for few bits stay on their grid: only the scales of rows change.

    Raises:
        ValueError: a net of another kind, or one that is folded already.
    """

    def __call__(self, model: nn.Module) -> nn.Module:
        if type(model) is not TimeNet:
            raise ValueError(f"only a TimeNet can be folded, once, not a {type(model).__name__}")
        return folded(model.float().eval())


PRECISIONS = {
    "float32": None,
    "float16": Half(),
    "int8": DynamicInt8(),
    "weight-int8": WeightInt(8),
    "weight-int4": WeightInt(4),
    "weight-int8-act8": WeightInt(8, activations=True),
    "weight-int4-act8": WeightInt(4, activations=True),
}


def precision_of(model: nn.Module) -> str:
    """One of ``PRECISIONS``."""
    if bits := getattr(model, "weight_bits", 0):
        return f"weight-int{bits}" + ("-act8" if getattr(model, "activation_bits", 0) else "")
    if any(isinstance(module, INT8) for module in model.modules()):
        return "int8"
    return str(next(model.parameters()).dtype).removeprefix("torch.")


@torch.no_grad()
def layer_errors(model: nn.Module, bits: int, logmels: np.ndarray, is_keyword: np.ndarray) -> pd.DataFrame:
    """What rounding one layer's weights alone does, layer by layer: where precision breaks.

    Args:
        model: in float32.
        logmels, is_keyword: clips (N, F, T) and (N,) to measure on; layer outputs on the first 256.

    Returns:
        A row per layer, one for all together: ``weights, weights_sqnr_db, output_sqnr_db`` (signal to
        rounding noise, of its weights and of what it puts out, of a recurrent layer what the last one puts out;
        6 dB for each bit), ``au_fa_fr, change``.
    """

    def layer_of(name: str) -> str:
        number = re.search(r"_l(\d+)$", name)
        return name.split(".")[0] + (f" layer {number[1]}" if number else "")

    weights = {name: value for name, value in model.named_parameters() if value.dim() > 1}
    layers = list(dict.fromkeys(map(layer_of, weights)))
    some = torch.from_numpy(np.array(logmels[:256])).float()
    before = au_fa_fr(score(model, logmels), is_keyword)
    rows = {}
    for layer in [*layers, "all"]:
        own = [name for name in weights if layer in ("all", layer_of(name))]
        rounded = round_weights(copy.deepcopy(model), bits, own)
        part = layer.split()[0]
        exact, noisy = (_output_of(net, "" if layer == "all" else part, some) for net in (model, rounded))
        area = au_fa_fr(score(rounded, logmels), is_keyword)
        both = (torch.cat([net.get_parameter(name).flatten() for name in own]) for net in (model, rounded))
        rows[layer] = {"weights": sum(weights[name].numel() for name in own), "weights_sqnr_db": sqnr_db(*both)}
        rows[layer] |= {"output_sqnr_db": sqnr_db(exact, noisy), "au_fa_fr": area, "change": area - before}
    return pd.DataFrame(rows).T.astype({"weights": int})


def _output_of(model: nn.Module, part: str, x: Tensor) -> Tensor:
    """What a part of the model puts out when the whole one reads x."""
    caught = []
    hook = model.get_submodule(part).register_forward_hook(lambda _, __, out: caught.append(out))
    model(x)
    hook.remove()
    return caught[0][0] if isinstance(caught[0], tuple) else caught[0]


def sqnr_db(exact: Tensor, noisy: Tensor) -> float:
    """Signal to quantization noise ratio in dB.

    >>> round(sqnr_db(torch.tensor([1.0, 1.0]), torch.tensor([1.1, 0.9])), 2)
    20.0
    """
    return float(10 * torch.log10(exact.square().sum() / (exact - noisy).square().sum()))
