"""The compact file: a whole detector in one small file, its description and its weights.

Layout, little-endian: ``KWS1``, length of the description (2 bytes), the description as JSON without what are
defaults, the tensors one after another (a quantized one as its integers and its scale in float32), CRC-32 of
everything before. Names, shapes and types are not written: they follow from the description. safetensors spends
1.3 kB on them for the smallest student.
"""

import dataclasses
import json
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

MAGIC = b"KWS1"
SUFFIX = ".kws"


class CheckpointError(ValueError):
    """The file is not a checkpoint of this project; the message says what it is instead."""


def pack(described: dict, weights: Iterable[Tensor]) -> bytes:
    """A file of this description, whose empty parts are left out, and these weights."""
    brief = {key: value for key, value in described.items() if value is not None and value != {}}
    header = json.dumps(brief, separators=(",", ":")).encode()
    content = MAGIC + struct.pack("<H", len(header)) + header + b"".join(map(_raw, weights))
    return content + struct.pack("<I", zlib.crc32(content))


def read(path: Path) -> tuple[dict, bytes]:
    """The description of a file and the bytes of its weights, for ``unpack``.

    Raises:
        CheckpointError: missing, foreign, or its checksum does not fit.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint at {path}: train it first, or check the name ({error.strerror})"
        ) from None
    if content[:4] != MAGIC or len(content) < 10:
        raise CheckpointError(f"{path} is not a compact file of this project: it does not begin with {MAGIC.decode()}")
    if struct.pack("<I", zlib.crc32(content[:-4])) != content[-4:]:
        raise CheckpointError(f"{path} is damaged: its checksum does not fit, copy or export it again")
    end = 6 + struct.unpack("<H", content[4:6])[0]
    try:
        return json.loads(content[6:end]), content[end:-4]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} does not fit its description: {error}") from None


def unpack(body: bytes, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the names, shapes and types of ``like`` from their bytes.

    Raises:
        ValueError: they are not as many.
    """
    if (needed := sum(map(n_bytes, like.values()))) != len(body):
        raise ValueError(f"its weights take {len(body)} bytes, not {needed}")
    state, at = {}, 0
    for name, tensor in like.items():
        state[name] = _from_raw(body[at : at + n_bytes(tensor)], tensor)
        at += n_bytes(tensor)
    return state


def n_bytes(tensor: Tensor) -> int:
    """Of the numbers alone; a quantized tensor has its scale besides."""
    return tensor.numel() * tensor.element_size() + (4 if tensor.is_quantized else 0)


def short(number: float) -> float:
    """Six digits are enough to decide by.

    >>> short(-1.23456789), short(2)
    (-1.23457, 2)
    """
    return number if isinstance(number, int) else float(f"{number:.6g}")


def changed(config: object) -> dict:
    """The fields of a dataclass that are not at their defaults."""
    fields = dataclasses.fields(config)
    return {f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default}


def _raw(tensor: Tensor) -> bytes:
    """The numbers of a tensor; of a quantized one the integers and, behind them, the scale."""
    if tensor.is_quantized:
        return tensor.int_repr().numpy().tobytes() + struct.pack("<f", tensor.q_scale())
    return tensor.contiguous().numpy().tobytes()


def _from_raw(raw: bytes, like: Tensor) -> Tensor:
    """A tensor of this shape and type from the bytes of ``_raw``."""
    if like.is_quantized:
        integers = torch.frombuffer(bytearray(raw[:-4]), dtype=torch.int8).view(like.shape)
        return torch._make_per_tensor_quantized_tensor(integers, struct.unpack("<f", raw[-4:])[0], 0)
    return torch.frombuffer(bytearray(raw), dtype=like.dtype).view(like.shape)
