"""Fewer units: hidden units and convolution channels cut out whole, with everything that belongs to them.

A hidden unit is one row in every gate, one column in its own recurrence and one column in whatever
reads it. Report C cut each gate for itself; what is left then is not a smaller net but a scrambled one.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kwslib.config import CELLS
from kwslib.models import CRNN
from kwslib.train import Training

CRITERIA = ("magnitude", "random")
Tune = Callable[[nn.Module, Training], None]


@dataclass(frozen=True)
class Prune:
    """Cut a share of the hidden units of every layer, of the attention's inner units and of the channels.

    Attributes:
        amount: share that goes, of the hidden units of each recurrent layer and the attention's inner units.
        channels: the same for the channels of the convolution.
        criterion: ``magnitude`` keeps the units whose weights, coming in and going out, have the largest
            norm; ``random`` is its control.
        training: fine-tuning after the cut, with the experiment's losses and teacher; none when left out.
        rounds: cut and fine-tune so many times, a bit more each time.

    Raises:
        ValueError: an unknown criterion, an amount outside [0, 1), fewer than one round, or nothing is left.
    """

    amount: float
    channels: float = 0.0
    criterion: str = "magnitude"
    training: Training | None = None
    rounds: int = 1

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {self.criterion!r}: choose one of {', '.join(CRITERIA)}")
        if not (0 <= self.amount < 1 and 0 <= self.channels < 1):
            raise ValueError(f"a share to prune is at least 0 and below 1, not {self.amount} and {self.channels}")
        if self.rounds < 1:
            raise ValueError(f"pruning takes at least one round, not {self.rounds}")

    def __call__(self, model: CRNN, tune: Tune | None = None) -> CRNN:
        config = model.config
        for done in range(1, self.rounds + 1):
            hidden, inner, channels = (
                _left(size, share * done / self.rounds)
                for size, share in (
                    (config.hidden_size, self.amount),
                    (config.attention_inner_size, self.amount),
                    (config.cnn_out_channels, self.channels),
                )
            )
            model = cut(model, hidden, inner, channels, self.criterion)
            if self.training is not None:
                tune(model, self.training)
        return model.eval()


def _left(size: int, share: float) -> int:
    """Units that stay of so many: 24 less 30 % are 17, as in report C."""
    left = size - round(size * share)
    if size and left < 1:
        raise ValueError(f"pruning {share:.0%} of {size} units leaves nothing: prune less")
    return left


@torch.no_grad()
def cut(model: CRNN, hidden: int, inner: int, channels: int, criterion: str = "magnitude") -> CRNN:
    """A new, smaller model with these numbers of hidden units, attention units and channels.

    The outputs of what stays are unchanged when what goes has no influence; with all sizes as they were
    the model is the same.
    """
    config, state = model.config, {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    random = torch.Generator().manual_seed(0)

    def kept(groups: list[Tensor], n: int) -> Tensor:
        """Indices of the n units to keep, in their order; groups are (units, weights) matrices."""
        score = torch.cat(groups, dim=1).square().sum(1)
        if criterion == "random":
            score = torch.rand(len(score), generator=random)
        return score.argsort(descending=True, stable=True)[:n].sort().values

    layers, gates = range(config.gru_num_layers), CELLS[config.cell]
    head = "attention.energy.0.weight" if config.attention_inner_size else "attention.energy.weight"
    units = []
    for layer in layers:
        groups = [state[f"gru.{kind}_l{layer}"].unflatten(0, (gates, -1)).transpose(0, 1).flatten(1)
                  for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]  # fmt: skip
        readers = (head, "classifier.weight") if layer == layers[-1] else (f"gru.weight_ih_l{layer + 1}",)
        groups += [state[name].T for name in (f"gru.weight_hh_l{layer}", *readers)]
        units.append(kept(groups, hidden))
    convolution = "conv.1" if config.separable else "conv.0"
    read = state["gru.weight_ih_l0"].unflatten(1, (config.cnn_out_channels, -1))  # (gates * H, C, bins)
    maps = kept([state[f"{convolution}.weight"].flatten(1), read.transpose(0, 1).flatten(1)], channels)

    new = dict(state)
    for part in ("weight", "bias"):
        new[f"{convolution}.{part}"] = state[f"{convolution}.{part}"][maps]
    new["gru.weight_ih_l0"] = read[:, maps].flatten(1)
    for layer, stay in zip(layers, units, strict=True):
        rows = torch.cat([stay + gate * config.hidden_size for gate in range(gates)])
        if layer:
            new[f"gru.weight_ih_l{layer}"] = state[f"gru.weight_ih_l{layer}"][:, units[layer - 1]]
        new[f"gru.weight_hh_l{layer}"] = state[f"gru.weight_hh_l{layer}"][:, stay]
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            new[f"gru.{kind}_l{layer}"] = new[f"gru.{kind}_l{layer}"][rows]
    for name in (head, "classifier.weight"):
        new[name] = state[name][:, units[-1]]
    if config.attention_inner_size:
        bias, out = "attention.energy.0.bias", "attention.energy.2.weight"
        stay = kept([state[head], state[bias][:, None], state[out].T], inner)
        new |= {head: new[head][stay], bias: state[bias][stay], out: state[out][:, stay]}
    smaller = CRNN(dataclasses.replace(config, hidden_size=hidden, attention_size=inner, cnn_out_channels=channels))
    smaller.load_state_dict({name: tensor.clone() for name, tensor in new.items()})
    return smaller.train(model.training)
