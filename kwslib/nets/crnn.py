"""The keyword detector of the reports: convolution, recurrent layers, attention, linear classifier.

Shapes: B batch, C conv channels, F mel bins, T frames, S convolution steps, H hidden size, K classes.
State-dict names are those of the reports (``conv.0.*``, ``gru.*``, ``attention.energy.{0,2}.*``,
``classifier.*``), so their checkpoints load.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kwslib.config import CELLS, CRNNConfig
from kwslib.nets import engine


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
        hidden, energies, classify, read: the rest, by ``nets.engine`` where it can; ``forward`` by the layers alone

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

    def hidden(self, steps: Tensor) -> Tensor:
        """The recurrent layers from nothing on, (B, S, C * bins) -> (B, S, H)."""
        return engine.recur(self.gru, steps) if engine.takes(self, steps) else self.gru(steps)[0]

    def energies(self, hidden: Tensor) -> Tensor:
        """Of the attention, before their softmax, (B, S, H) -> (B, S)."""
        layers = self.attention.energy
        if not engine.takes(self, hidden):
            return layers(hidden)[..., 0]
        if isinstance(layers, nn.Linear):
            return engine.linear(layers, hidden)[..., 0]
        return engine.linear(layers[2], torch.tanh(engine.linear(layers[0], hidden)))[..., 0]

    def classify(self, context: Tensor) -> Tensor:
        """(..., H) -> (..., K)"""
        layer = self.classifier
        return engine.linear(layer, context) if engine.takes(self, context) else layer(context)

    def read(self, steps: Tensor) -> Outputs:
        """What comes after the convolution, (B, S, C * bins)."""
        hidden = self.hidden(steps)
        attention = self.energies(hidden).softmax(-1)
        context = (attention.unsqueeze(-1) * hidden).sum(1)
        return Outputs(self.classify(context), attention, steps, hidden, context)

    def convolved(self, logmel: Tensor) -> Tensor:
        """As ``steps``; in training by the engine."""
        if torch.is_grad_enabled() and engine.takes(self, logmel) and not self.config.separable:
            return engine.convolve(self.conv[0], logmel)
        return self.steps(logmel)

    def outputs(self, logmel: Tensor) -> Outputs:
        return self.read(self.convolved(logmel))

    def forward(self, logmel: Tensor) -> Tensor:
        hidden, _ = self.gru(self.steps(logmel))
        return self.classifier(self.attention(hidden)[0])


def step_logits(model: nn.Module, logmel: Tensor, window: int) -> Tensor:
    """Logits after every step, as a stream gives them: (B, F, T) -> (B, S, K).

    The recurrent state is carried through; attention ends at each step and sees the last ``window`` ones, in the
    beginning fewer.
    """
    hidden = model.hidden(model.convolved(logmel))
    return windowed_logits(model, hidden, model.energies(hidden), window, missing=window - 1)


def windowed_logits(model: nn.Module, outputs: Tensor, energies: Tensor, window: int, missing: int) -> Tensor:
    """Logits for each ``window`` steps that follow one another, by attention over them.

    Args:
        outputs: (B, S, H) of the recurrent layers.
        energies: (B, S) of the attention.
        missing: steps before the first one, which nobody heard.

    Returns:
        (B, missing + S - window + 1, K)
    """
    earlier = nn.functional.pad(outputs, (0, 0, missing, 0)).unfold(1, window, 1)  # (B, windows, H, window)
    weights = nn.functional.pad(energies, (missing, 0), value=-torch.inf).unfold(1, window, 1).softmax(-1)
    return model.classify((earlier * weights.unsqueeze(2)).sum(-1))


@torch.no_grad()
def absorb_normalization(model: CRNN, mean: float, std: float) -> CRNN:
    """Let a model that was fed (x - mean) / std take x itself: its convolution absorbs both, exactly, in place."""
    convolution = model.conv[0]
    convolution.weight /= std
    convolution.bias -= convolution.weight.sum((1, 2, 3)) * mean
    return model


def keyword_score(logits: Tensor) -> Tensor:
    """Logit of the keyword minus logit of the rest, (B, 2) -> (B,) in float32.

    Ranks like the softmax but does not saturate; its logistic function is the probability.
    """
    logits = logits.float()
    return logits[:, 1] - logits[:, 0]


def config_of_shapes(shapes: dict[str, tuple], mel_stride: int | None, frame_stride: int) -> CRNNConfig:
    """The sizes that the shapes of a state dict tell, with the names of the reports.

    Raises:
        LookupError, ValueError, ArithmeticError: these are no shapes of a CRNN, or several mel strides fit.
    """
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
    layers = sum(name.startswith("gru.weight_hh_l") for name in shapes)
    inner = 0 if "attention.energy.weight" in shapes else shapes["attention.energy.0.weight"][0]
    kernel, stride = (kernel_bins, kernel_frames), (fitting[0], frame_stride)
    is_separable = "conv.1.weight" in shapes
    return CRNNConfig(channels, kernel, stride, hidden, layers, inner, cell=cells[0], separable=is_separable)


@torch.no_grad()
def score(model: nn.Module, logmels: np.ndarray, device: str = "cpu", batch: int = 512) -> np.ndarray:
    """Keyword scores (logit differences) of log-mels (N, F, T), in eval mode, float32 (N,).

    A model that is meant for streams, one whose file holds a decision (``on_streams``), hears a clip as a stream that
    begins and ends with it: its highest score on the way counts, as there. Any other gives one at the end.
    """
    model.eval()
    steps = model.config.n_steps(logmels.shape[2]) if getattr(model, "on_streams", False) else 0
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    parts = []
    for i in range(0, len(logmels), batch):
        part = torch.from_numpy(np.array(logmels[i : i + batch])).to(device, dtype)
        if steps:
            logits = step_logits(model, part, steps)
            scores = keyword_score(logits.flatten(0, 1)).view(logits.shape[:2]).amax(1)
        else:
            scores = keyword_score(model.outputs(part).logits)
        parts.append(scores.cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
