"""The files a model is kept in, of every precision: a torch file with its JSON, and one compact file.

Both name or order the weights as the float model does, and hold plain tensors: nothing is ever
unpickled as code. Every file of weights is written and read here; the layout of a compact one is in ``compact``.
"""

import dataclasses
import hashlib
import io
import json
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import dynamic

from kwslib import paths
from kwslib.config import FeatureConfig, describe
from kwslib.data.features import n_frames
from kwslib.nets.crnn import CRNN, config_of_shapes
from kwslib.nets.rivals import Config, build, config_of
from kwslib.training import compact
from kwslib.training.compact import CheckpointError
from kwslib.training.quantize import INT8, PRECISIONS, packed, precision_of, unpacked

SIDECAR_SCHEMA = 1
MOST_LAYERS = 100  # of a model that is read; no detector has so many


def save(path: Path, model: nn.Module, sidecar: dict) -> dict:
    """Write a checkpoint: tensors in ``path``; beside it the JSON that rebuilds the model, and its compact file.

    The ``.pt`` comes last and whole, so a checkpoint that exists can be used.

    Returns:
        The sidecar as written: with ``schema, precision, checkpoint_bytes, compact_bytes, sha256`` added.
    """
    content, small = tensors_file(tensors(model)), compact_bytes(model, sidecar)
    sidecar = {**sidecar, "schema": SIDECAR_SCHEMA, "precision": precision_of(model)}
    sidecar |= {"checkpoint_bytes": len(content), "compact_bytes": len(small)}
    sidecar |= {"sha256": hashlib.sha256(content).hexdigest()}
    paths.write_json(path.with_suffix(".json"), sidecar)
    paths.write_atomically(path.with_suffix(compact.SUFFIX), small)
    paths.write_atomically(path, content)
    return sidecar


def load(path: Path) -> tuple[nn.Module, dict]:
    """The model of a checkpoint, or of a compact file, in its own precision, in eval mode, and its description.

    One whose description holds a decision is meant for streams, see ``crnn.score``.

    Raises:
        CheckpointError: missing, damaged, foreign, changed after it was written, or of another schema.
    """
    path = Path(path)
    model, sidecar = _load_compact(path) if path.suffix == compact.SUFFIX else _load_described(path)
    model.on_streams = bool(sidecar.get("decision"))
    return model, sidecar


def _load_described(path: Path) -> tuple[nn.Module, dict]:
    state = read_tensors(path)
    sidecar = read_sidecar(path)
    if sidecar.get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest():
        raise CheckpointError(f"{path} and {path.with_suffix('.json').name} do not belong together: train it again")
    if sidecar.get("schema") != SIDECAR_SCHEMA:
        raise CheckpointError(
            f"{path} has schema {str(sidecar.get('schema'))[:40]}, this version reads {SIDECAR_SCHEMA}"
        )
    try:
        config = config_of(sidecar["model"])
        _check_description(sidecar, config, features_of(sidecar), most=2 * path.stat().st_size)
        model = _empty(config, sidecar["precision"])
        if set(state) != set(tensors(model)):
            raise ValueError(f"its weights are {', '.join(sorted(set(state) ^ set(tensors(model))))} off")
        _fill(model, state)
    except Exception as error:  # torch raises a dozen kinds for sizes and weights that make no model
        raise _unfit(path, error) from None
    return model, sidecar


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
        return packed(state, bits)
    return state


def sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model.

    ``state_dict_bytes``: of ``torch.save(model.state_dict())``, the convention of the reports (of the packed
    tensors for ``WeightInt``), half of it container for a small model. ``weights_bytes``: the weights alone,
    an int8 tensor with the 4 bytes of its scale.
    """
    weights = tensors(model)
    saved = weights if getattr(model, "weight_bits", 0) else model.state_dict()
    return {"state_dict_bytes": len(tensors_file(saved)), "weights_bytes": sum(map(compact.n_bytes, weights.values()))}


def features_of(sidecar: dict) -> FeatureConfig:
    """The front end that a sidecar describes."""
    return FeatureConfig(**{name: value for name, value in sidecar["features"].items() if name != "class"})


def read_sidecar(path: Path) -> dict:
    """The JSON beside a checkpoint.

    Raises:
        CheckpointError: it is missing or not readable.
    """
    sidecar = path.with_suffix(".json")
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: train it first, or check the name")
    try:
        described = json.loads(sidecar.read_bytes())
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


def tensors_file(state: dict) -> bytes:
    """The bytes of ``torch.save(state, path)``, but the same whatever the path is called."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


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


def _empty(config: Config, precision: str) -> nn.Module:
    """An untrained model in this precision."""
    convert = PRECISIONS[precision]
    model = build(config).eval()
    return convert(model) if convert else model


def _check_description(described: dict, config: Config, features: FeatureConfig, most: int) -> None:
    """A hostile description must not make this program build a net that fills the memory, nor fail later."""
    for name, value in {**dataclasses.asdict(config), **dataclasses.asdict(features)}.items():
        sizes = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(size, int | float) and not 0 <= size <= max(most, features.n_fft) for size in sizes):
            raise ValueError(f"{name} is {value}")
        if len(sizes) > MOST_LAYERS or name == "gru_num_layers" and value > MOST_LAYERS:
            raise ValueError(f"{name} says more than {MOST_LAYERS} layers")
    if features != FeatureConfig(n_mels=config.n_mels, framing=features.framing):
        raise ValueError(f"another front end: {features}")
    threshold, keyword, decision = (described.get(name) for name in ("threshold", "keyword", "decision"))
    if not isinstance(threshold, float | int | None) or not isinstance(keyword, str | None):
        raise ValueError("its threshold is no number or its keyword no text")
    if not isinstance(decision, dict | None):
        raise ValueError("its decision is no object")
    with torch.device("meta"):  # takes no memory
        promised = sum(p.numel() for p in build(config).parameters())
    if promised > most:
        raise ValueError(f"it promises {promised} weights and holds {most // 2} bytes")


def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put saved tensors into a freshly built model of the same precision, and let it read a second of anything."""
    if getattr(model, "weight_bits", 0):
        state = unpacked(state, model)
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
    with torch.no_grad():
        second = torch.zeros(1, model.config.n_mels, n_frames(FeatureConfig()), dtype=next(model.parameters()).dtype)
        if model(second).shape != (1, 2):
            raise ValueError("it does not tell a keyword from the rest")


def _unfit(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).partition("\n")[0][:500] or type(error).__name__
    return CheckpointError(f"{path} does not fit its description: {reason}")


def compact_bytes(model: nn.Module, sidecar: dict) -> bytes:
    """The content of a model's compact file.

    Args:
        sidecar: of its checkpoint; kept are keyword, threshold, decision, features and sizes.
    """
    config, decision = config_of(sidecar["model"]), sidecar.get("decision") or {}
    described = {"precision": precision_of(model), "keyword": sidecar.get("keyword")}
    described |= {"threshold": sidecar.get("threshold")}
    described |= {"decision": {name: compact.short(value) for name, value in decision.items() if value is not None}}
    described |= {"model": {"class": type(config).__name__, **compact.changed(config)}}
    described |= {"features": compact.changed(features_of(sidecar))}
    return compact.pack(described, tensors(model).values())


def _load_compact(path: Path) -> tuple[nn.Module, dict]:
    described, body = compact.read(path)
    try:
        config, features = config_of(described["model"]), FeatureConfig(**described.get("features", {}))
        _check_description(described, config, features, most=2 * len(body))  # at least 4 bits for each weight
        model = _empty(config, described["precision"])
        _fill(model, compact.unpack(body, tensors(model)))
    except Exception as error:  # as above
        raise _unfit(path, error) from None
    return model, {**described, "features": describe(features), "model": describe(config)}


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
        config = config_of_shapes({name: tuple(t.shape) for name, t in state.items()}, mel_stride, frame_stride)
        with torch.device("meta"):  # takes no memory, whatever the shapes say
            model = CRNN(config)
        model.load_state_dict(state, assign=True)
    except (LookupError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not a CRNN with the names of the reports: {reason}") from None
    return model.to(state["conv.0.weight"].dtype).eval()
