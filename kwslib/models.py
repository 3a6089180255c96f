"""The keyword detector of the reports: convolution, GRU, additive attention, linear classifier.

Shapes: B batch, C conv channels, F mel bins, T frames, S convolution steps, H hidden size, K classes.
State-dict names are those of the reports (``conv.0.*``, ``gru.*``, ``attention.energy.{0,2}.*``,
``classifier.*``), so their checkpoints load.
"""

import io
import json
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kwslib.config import CRNNConfig


class Outputs(NamedTuple):
    """What a loss may look at: logits (B, K), attention weights (B, S), GRU outputs (B, S, H)."""

    logits: Tensor
    attention: Tensor
    hidden: Tensor


class Attention(nn.Module):
    """Additive attention over time without a query: one energy per step, softmax, weighted sum.

    forward(hidden): (B, S, H) -> context (B, H), weights (B, S)
    """

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(hidden_size, inner_size), nn.Tanh(), nn.Linear(inner_size, 1))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(self.energy(hidden).squeeze(-1), dim=-1)
        return (weights.unsqueeze(-1) * hidden).sum(1), weights


class CRNN(nn.Module):
    """A log-mel picture in, logits out; the last class is the keyword.

    Shapes:
        forward(logmel): (B, F, T) -> logits (B, K)
        outputs(logmel): the same with attention weights and GRU outputs
        steps(logmel):   (B, F, T) -> convolution outputs (B, S, C * bins), the GRU's input

    Raises:
        ValueError: another number of mel bins, or fewer frames than the convolution needs.
    """

    def __init__(self, config: CRNNConfig = CRNNConfig()):
        super().__init__()
        self.config = config
        self.conv = nn.Sequential(
            nn.Conv2d(1, config.cnn_out_channels, config.kernel_size, config.stride),
            nn.Flatten(start_dim=1, end_dim=2),  # (B, C, bins, S) -> (B, C * bins, S)
        )
        self.gru = nn.GRU(
            config.gru_input_size,
            config.hidden_size,
            config.gru_num_layers,
            batch_first=True,
            dropout=0.1 if config.gru_num_layers > 1 else 0.0,
        )
        self.attention = Attention(config.hidden_size, config.attention_size or config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_classes)

    def steps(self, logmel: Tensor) -> Tensor:
        if logmel.shape[-2] != self.config.n_mels or logmel.shape[-1] < self.config.kernel_size[1]:
            raise ValueError(
                f"expected log-mels (batch, {self.config.n_mels}, at least {self.config.kernel_size[1]} frames), "
                f"got {tuple(logmel.shape)}"
            )
        return self.conv(logmel.unsqueeze(1)).transpose(1, 2)

    def outputs(self, logmel: Tensor) -> Outputs:
        hidden, _ = self.gru(self.steps(logmel))
        context, attention = self.attention(hidden)
        return Outputs(self.classifier(context), attention, hidden)

    def forward(self, logmel: Tensor) -> Tensor:
        return self.outputs(logmel).logits


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
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} needs its description {sidecar.name} beside it: {error}") from None
    if not isinstance(described, dict) or not {"features", "model", "precision"} <= set(described):
        raise CheckpointError(f"{sidecar} does not describe a checkpoint of this project: train it again")
    return described


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict from a file, tensors only, never code.

    Raises:
        CheckpointError: missing, truncated, or holding anything but a dict of tensors.
    """
    try:
        with warnings.catch_warnings():  # torch's own reader of quantized tensors warns about itself
            warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}: train it first, or check the name") from None
    except Exception as error:  # torch raises a dozen kinds for a damaged or foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a checkpoint of this project: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not the weights of a model")
    return state
