"""Fewer units: hidden units and convolution channels cut out whole, with everything that belongs to them.

A hidden unit is one row in every gate, one column in its own recurrence and one column in whatever
reads it. Report C cut each gate for itself; what is left then is not a smaller net but a scrambled one.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kwslib.config import CELLS
from kwslib.nets.crnn import CRNN
from kwslib.training.loop import Training

CRITERIA = ("magnitude", "random")


@dataclass(frozen=True)
class Prune:
    """Cut a share of the hidden units of every layer, of the attention's inner units and of the channels.

    Attributes:
        amount: share that goes, of the hidden units of each recurrent layer and the attention's inner units.
        channels: the same for the channels of the convolution.
        criterion: ``magnitude`` keeps the units whose weights, coming in and going out, have the largest
            norm; ``random``, one draw for all seeds, is its control.
        training: fine-tuning after the cut, with the experiment's losses and teacher; none when left out.
        rounds: cut and fine-tune so many times, a bit more each time.
        penalty: regularise, then cut: before each cut the model is tuned under ``group_norm`` of this weight, and the
            last epoch is kept: the penalty works at the expense of the area on val.

    Raises:
        ValueError: an unknown criterion, an amount outside [0, 1), fewer than one round, a penalty without
            training, or nothing is left.
    """

    amount: float
    channels: float = 0.0
    criterion: str = "magnitude"
    training: Training | None = None
    rounds: int = 1
    penalty: float = 0.0

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {self.criterion!r}: choose one of {', '.join(CRITERIA)}")
        if not (0 <= self.amount < 1 and 0 <= self.channels < 1):
            raise ValueError(f"a share to prune is at least 0 and below 1, not {self.amount} and {self.channels}")
        if self.rounds < 1:
            raise ValueError(f"pruning takes at least one round, not {self.rounds}")
        if self.penalty and self.training is None:
            raise ValueError("a penalty before the cut needs a training to apply it in")

    def __call__(self, model: CRNN, tune: Callable | None = None) -> CRNN:
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
            if self.penalty:
                tune(model, self.training, penalty=partial(group_norm, weight=self.penalty), keep="last")
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


def unit_weights(model: CRNN) -> dict[str, Tensor]:
    """What belongs to each unit, a row for each: the weights that go in, those that come out, its biases.

    A weight between two units is in both rows. The biases of the channels are not: they hold the absorbed mean of
    the log-mels. Keys: ``hidden 0`` for each recurrent layer, ``inner`` of the attention, ``channels``.
    """
    config, state = model.config, dict(model.named_parameters())
    layers, gates = range(config.gru_num_layers), CELLS[config.cell]
    head = _attention_head(model)
    rows = {}
    for layer in layers:
        own = [state[f"gru.{kind}_l{layer}"].unflatten(0, (gates, -1)).transpose(0, 1).flatten(1)
               for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]  # fmt: skip
        readers = (head, "classifier.weight") if layer == layers[-1] else (f"gru.weight_ih_l{layer + 1}",)
        rows[f"hidden {layer}"] = own + [state[name].T for name in (f"gru.weight_hh_l{layer}", *readers)]
    if config.attention_inner_size:
        bias, out = "attention.energy.0.bias", "attention.energy.2.weight"
        rows["inner"] = [state[head], state[bias][:, None], state[out].T]
    read = state["gru.weight_ih_l0"].unflatten(1, (config.cnn_out_channels, -1))  # (gates * H, C, bins)
    rows["channels"] = [state[f"{_convolution(model)}.weight"].flatten(1), read.transpose(0, 1).flatten(1)]
    return {name: torch.cat(parts, dim=1) for name, parts in rows.items()}


def group_norm(model: CRNN, weight: float) -> Tensor:
    """Sum of the norms of all units' weights: a penalty that empties whole units instead of single weights.

    Group lasso (Yuan, Lin 2006); over all that belongs to a recurrent unit: Wen et al. 2018, arXiv:1709.05027.
    """
    return weight * sum(rows.norm(dim=1).sum() for rows in unit_weights(model).values())


def _attention_head(model: CRNN) -> str:
    """Name of the attention's weight that reads the hidden units."""
    return "attention.energy.0.weight" if model.config.attention_inner_size else "attention.energy.weight"


def _convolution(model: CRNN) -> str:
    """Name of the convolution that makes the channels."""
    return "conv.1" if model.config.separable else "conv.0"


@torch.no_grad()
def cut(model: CRNN, hidden: int, inner: int, channels: int, criterion: str = "magnitude") -> CRNN:
    """A new, smaller model with these numbers of hidden units, attention units and channels.

    The outputs of what stays are unchanged when what goes has no influence; with all sizes as they were
    the model is the same.
    """
    config, state = model.config, {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    random = torch.Generator().manual_seed(0)
    left = {"inner": inner, "channels": channels}
    stay = {}  # indices of the units to keep, in their order
    for kind, weights in unit_weights(model).items():
        score = weights.cpu().square().sum(1)
        if criterion == "random":
            score = torch.rand(len(score), generator=random)
        stay[kind] = score.argsort(descending=True, stable=True)[: left.get(kind, hidden)].sort().values

    new = dict(state)
    for part in ("weight", "bias"):
        name = f"{_convolution(model)}.{part}"
        new[name] = state[name][stay["channels"]]
    read = state["gru.weight_ih_l0"].unflatten(1, (config.cnn_out_channels, -1))
    new["gru.weight_ih_l0"] = read[:, stay["channels"]].flatten(1)
    for layer in range(config.gru_num_layers):
        units = stay[f"hidden {layer}"]
        rows = torch.cat([units + gate * config.hidden_size for gate in range(CELLS[config.cell])])
        if layer:
            new[f"gru.weight_ih_l{layer}"] = state[f"gru.weight_ih_l{layer}"][:, stay[f"hidden {layer - 1}"]]
        new[f"gru.weight_hh_l{layer}"] = state[f"gru.weight_hh_l{layer}"][:, units]
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            new[f"gru.{kind}_l{layer}"] = new[f"gru.{kind}_l{layer}"][rows]
    head = _attention_head(model)
    for name in (head, "classifier.weight"):
        new[name] = state[name][:, units]
    if config.attention_inner_size:
        bias, out = "attention.energy.0.bias", "attention.energy.2.weight"
        new |= {head: new[head][stay["inner"]], bias: state[bias][stay["inner"]], out: state[out][:, stay["inner"]]}
    smaller = CRNN(dataclasses.replace(config, hidden_size=hidden, attention_size=inner, cnn_out_channels=channels))
    smaller.load_state_dict({name: tensor.clone() for name, tensor in new.items()})
    return smaller.train(model.training)
