"""Fewer bits: half precision, dynamic int8, and checkpoints of every precision.

A checkpoint names its weights as the float model does; an int8 one holds integer tensors with
their scales under the same names. All are plain tensors: nothing is ever unpickled as code.
"""

import copy
import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import dynamic

from kwslib import paths
from kwslib.architectures import build, config_of
from kwslib.models import CheckpointError, on_grid, read_sidecar, read_tensors, round_weights, tensors_file
from kwslib.train import Training

SIDECAR_SCHEMA = 1
INT8 = (dynamic.GRU, dynamic.LSTM, dynamic.Linear)


class PrecisionError(ValueError):
    """The model cannot be held in the wanted precision; the message says which weight breaks."""


@dataclass(frozen=True)
class Half:
    """Cast to float16, weights and arithmetic, as in reports A, D and E.

    Raises:
        PrecisionError: a weight is not finite or exceeds what float16 can hold (65,504).
    """

    precision = "float16"

    def __call__(self, model: nn.Module) -> nn.Module:
        for name, weight in model.state_dict().items():
            if not torch.isfinite(weight.half()).all():
                raise PrecisionError(f"{name} does not fit into float16: its largest value is {weight.abs().max()}")
        return model.half().eval()


@dataclass(frozen=True)
class DynamicInt8:
    """Weights of GRU, LSTM and Linear as int8, activations quantized on the fly, as in reports B and C.

    Convolution and RNN stay in float32: torch has no dynamic kind of either. CPU only.
    """

    precision = "int8"

    def __call__(self, model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():  # deprecated since 2.10, but torchao has no dynamic GRU
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            return torch.ao.quantization.quantize_dynamic(
                model.float().cpu().eval(), {nn.GRU, nn.LSTM, nn.Linear}, dtype=torch.qint8
            )


@dataclass(frozen=True)
class WeightInt:
    """Weights of every layer, convolution, GRU and RNN too, as whole numbers of 8 or 4 bits with a scale per row.

    The file holds them packed, scales and biases in float16; the model computes in float32 with the rounded
    weights: smaller, not faster.

    Raises:
        ValueError: another number of bits.
    """

    bits: int = 8

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise ValueError(f"weights have 8 or 4 bits, not {self.bits}")

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> nn.Module:
        model = round_weights(copy.deepcopy(model).float().cpu().eval(), self.bits)
        for value in model.parameters():
            if value.dim() == 1:
                value.copy_(value.half())
        model.weight_bits = self.bits
        return model


@dataclass(frozen=True)
class QAT:
    """Quantization-aware tuning, then ``WeightInt``: the weights learn to live on the grid of so many bits.

    Attributes:
        bits: 8 or 4.
        training: with the experiment's losses, teacher and augmentation.
    """

    bits: int = 8
    training: Training = Training(epochs=10, learning_rate=1e-3)

    def __call__(self, model: nn.Module, tune: Callable) -> nn.Module:
        last = WeightInt(self.bits)
        tune(model, self.training, weight_bits=self.bits)
        return last(model)


PRECISIONS = {
    "float32": None,
    "float16": Half(),
    "int8": DynamicInt8(),
    "weight-int8": WeightInt(8),
    "weight-int4": WeightInt(4),
}


def precision_of(model: nn.Module) -> str:
    """One of ``PRECISIONS``."""
    if bits := getattr(model, "weight_bits", 0):
        return f"weight-int{bits}"
    if any(isinstance(module, INT8) for module in model.modules()):
        return "int8"
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights under the names of the float model; int8 ones are quantized tensors, ``WeightInt`` ones packed."""
    state: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, dynamic.GRU | dynamic.LSTM):
            named = {**module.get_weight(), **module.get_bias()}
        elif isinstance(module, dynamic.Linear):
            named = {"weight": module.weight(), "bias": module.bias()}
        else:
            named = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        state |= {f"{prefix}.{name}": value.detach() for name, value in named.items()}
    if bits := getattr(model, "weight_bits", 0):
        return _packed(state, bits)
    return state


def _packed(state: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Weights as int8, or two to a byte, each with its ``.scale``; biases as float16."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.dim() == 1:
            out[name] = value.half()
            continue
        whole, scale = on_grid(value, bits)
        if bits == 4:
            pairs = nn.functional.pad(whole.flatten(), (0, whole.numel() % 2)).view(-1, 2).to(torch.uint8) & 15
            whole = pairs[:, 0] | pairs[:, 1] << 4
        out |= {name: whole, f"{name}.scale": scale.flatten().half()}
    return out


def _unpacked(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What ``_packed`` packed, as float32 in the shapes of the model's parameters."""
    out: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = state[name]
        if parameter.dim() > 1:
            if model.weight_bits == 4:
                low, high = (value & 15).to(torch.int8), (value >> 4).to(torch.int8)
                whole = torch.stack([low, high], dim=1).flatten()[: parameter.numel()]
                value = torch.where(whole > 7, whole - 16, whole).view(parameter.shape)
            value = value * state[f"{name}.scale"].float().reshape(-1, *[1] * (parameter.dim() - 1))
        out[name] = value.float()
    return out


def sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model.

    ``state_dict_bytes``: of ``torch.save(model.state_dict())``, the convention of the reports (of the packed
    tensors for ``WeightInt``), half of it container for a small model. ``weights_bytes``: the weights alone,
    an int8 tensor with the 4 bytes of its scale.
    """
    weights = tensors(model)
    saved = weights if getattr(model, "weight_bits", 0) else model.state_dict()
    return {
        "state_dict_bytes": len(tensors_file(saved)),
        "weights_bytes": sum(t.numel() * t.element_size() + (4 if t.is_quantized else 0) for t in weights.values()),
    }


def save(path: Path, model: nn.Module, sidecar: dict) -> dict:
    """Write a checkpoint: tensors in ``path``, and beside it the JSON that rebuilds the model.

    The ``.pt`` comes last and whole, so a checkpoint that exists can be used.

    Returns:
        The sidecar as written: with ``schema, precision, checkpoint_bytes, sha256`` added.
    """
    content = tensors_file(tensors(model))
    sidecar = {
        **sidecar,
        "schema": SIDECAR_SCHEMA,
        "precision": precision_of(model),
        "checkpoint_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    paths.write_json(path.with_suffix(".json"), sidecar)
    paths.write_atomically(path, content)
    return sidecar


def load(path: Path) -> tuple[nn.Module, dict]:
    """The model of a checkpoint in its own precision, in eval mode, and its sidecar.

    Raises:
        CheckpointError: missing, damaged, foreign, changed after it was written, or of another schema.
    """
    path = Path(path)
    state = read_tensors(path)
    sidecar = read_sidecar(path)
    if sidecar.get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest():
        raise CheckpointError(f"{path} and {path.with_suffix('.json').name} do not belong together: train it again")
    if sidecar.get("schema") != SIDECAR_SCHEMA:
        raise CheckpointError(f"{path} has schema {sidecar.get('schema')}, this version reads {SIDECAR_SCHEMA}")
    try:
        model = build(config_of(sidecar["model"])).eval()
        convert = PRECISIONS[sidecar["precision"]]
        model = convert(model) if convert else model
        if set(state) != set(tensors(model)):
            raise KeyError(f"its weights are {', '.join(sorted(set(state) ^ set(tensors(model))))} off")
        _fill(model, _unpacked(state, model) if hasattr(model, "weight_bits") else state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit its description: {error}") from None
    return model, sidecar


def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put saved tensors into a freshly built model of the same precision."""
    for prefix, module in model.named_modules():
        own = {name.removeprefix(f"{prefix}."): t for name, t in state.items() if name.rpartition(".")[0] == prefix}
        if isinstance(module, INT8):  # torch keeps the float biases of quantized layers as parameters
            own = {name: t if t.is_quantized else nn.Parameter(t) for name, t in own.items()}
        if isinstance(module, dynamic.GRU | dynamic.LSTM):
            module.set_weight_bias(own)
        elif isinstance(module, dynamic.Linear):
            module.set_weight_bias(own["weight"], own["bias"])
        elif own:
            module.load_state_dict(own)
