import itertools

import pytest
import torch

from kwslib.config import CELLS, CRNNConfig
from kwslib.nets import cost
from kwslib.nets.crnn import CRNN
from kwslib.results import tables
from kwslib.training.loop import Training
from kwslib.training.prune import CRITERIA, Prune, cut, group_norm, unit_weights

X = torch.randn(5, 40, 101, generator=torch.Generator().manual_seed(0)) * 4 - 8
EVERY_KIND = [
    CRNNConfig(4, hidden_size=8, gru_num_layers=layers, cell=cell, attention_size=size, separable=separable)
    for cell, layers, size, separable in itertools.product(CELLS, (1, 2), (None, 0, 5), (False, True))
]


@pytest.mark.parametrize("config", EVERY_KIND, ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_pruning_nothing_changes_nothing(config, criterion):
    model = CRNN(config).eval()
    same = Prune(0.0, criterion=criterion)(model)
    assert torch.equal(same(X), model(X))


@pytest.mark.parametrize("config", EVERY_KIND, ids=str)
@torch.no_grad()
def test_units_without_influence_are_the_ones_that_go(config):
    """Silence some units by hand: cutting as many leaves the function as it was, to rounding."""
    model = CRNN(config).eval()
    gates, h = CELLS[config.cell], config.hidden_size
    dead, dead_inner, dead_map = [1, 6], [0, 3], [2]
    for layer in range(config.gru_num_layers):
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            weight = getattr(model.gru, f"{kind}_l{layer}")
            for gate in range(gates):
                weight[[unit + gate * h for unit in dead]] = 0
        getattr(model.gru, f"weight_hh_l{layer}")[:, dead] = 0
        if layer:
            getattr(model.gru, f"weight_ih_l{layer}")[:, dead] = 0
    first = model.attention.energy[0] if config.attention_inner_size else model.attention.energy
    first.weight[:, dead] = 0
    model.classifier.weight[:, dead] = 0
    inner = config.attention_inner_size
    if inner:
        first.weight[dead_inner], first.bias[dead_inner] = 0, 0
        model.attention.energy[2].weight[:, dead_inner] = 0
        inner -= len(dead_inner)
    convolution = model.conv[1] if config.separable else model.conv[0]
    convolution.weight[dead_map] = 0
    columns = range(dead_map[0] * config.conv_bins, (dead_map[0] + 1) * config.conv_bins)
    model.gru.weight_ih_l0[:, list(columns)] = 0
    smaller = cut(model, h - 2, inner, 3)
    torch.testing.assert_close(smaller(X), model(X), atol=1e-6, rtol=1e-5)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    assert cost.clip_macs(smaller.config) == cost.formula_macs(smaller.config)


def test_report_c_cut_has_its_published_size():
    config, *before = tables.ARCHITECTURES["C-prune"]
    _, params, macs, _ = tables.ARCHITECTURES["C-pruned"]
    smaller = Prune(0.3)(CRNN(config).eval())
    assert sum(p.numel() for p in smaller.parameters()) == params < before[0]
    assert cost.clip_macs(smaller.config) * 128 == macs


def test_magnitude_and_chance_keep_other_units():
    model = CRNN(CRNNConfig(8, hidden_size=16)).eval()
    assert not torch.equal(Prune(0.5)(model)(X), Prune(0.5, criterion="random")(model)(X))


def test_rounds_cut_step_by_step_and_tune_after_each():
    sizes = []
    training = Training(epochs=1)
    step = Prune(0.5, 0.5, training=training, rounds=2)
    pruned = step(CRNN(CRNNConfig(8, hidden_size=16)), lambda model, how: sizes.append((model.config.hidden_size, how)))
    assert sizes == [(12, training), (8, training)]
    assert (pruned.config.cnn_out_channels, pruned.config.attention_inner_size) == (4, 8)


def test_requests_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="unknown criterion"):
        Prune(0.1, criterion="luck")
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        Prune(1.0)
    with pytest.raises(ValueError, match="at least one round"):
        Prune(0.1, rounds=0)
    with pytest.raises(ValueError, match="leaves nothing"):
        Prune(0.9)(CRNN(CRNNConfig(2, hidden_size=3)))
    with pytest.raises(ValueError, match="needs a training"):
        Prune(0.1, penalty=0.1)


def test_what_belongs_to_a_unit_is_all_there_is():
    """Every weight is in some unit's row: those between two units in both."""
    model = CRNN(CRNNConfig(4, hidden_size=8, gru_num_layers=2, attention_size=5))
    rows = unit_weights(model)
    assert {name: len(row) for name, row in rows.items()} == {"hidden 0": 8, "hidden 1": 8, "inner": 5, "channels": 4}
    touched = torch.autograd.grad(group_norm(model, 1.0), list(model.parameters()), allow_unused=True)
    untouched = [n for (n, _), g in zip(model.named_parameters(), touched, strict=True) if g is None]
    assert untouched == ["conv.0.bias", "attention.energy.2.bias", "classifier.bias"]


def test_the_group_norm_by_plain_loops():
    model = CRNN(CRNNConfig(2, hidden_size=3, gru_num_layers=1, attention_size=0))
    state = {name: value.tolist() for name, value in model.state_dict().items()}
    total = 0.0
    for unit in range(3):
        own = [state["attention.energy.weight"][0][unit]] + [row[unit] for row in state["classifier.weight"]]
        own += [row[unit] for row in state["gru.weight_hh_l0"]]
        for gate in range(3):
            row = gate * 3 + unit
            own += state["gru.weight_ih_l0"][row] + state["gru.weight_hh_l0"][row]
            own += [state["gru.bias_ih_l0"][row], state["gru.bias_hh_l0"][row]]
        total += sum(value**2 for value in own) ** 0.5
    bins = model.config.conv_bins
    for channel in range(2):
        own = [value for row in state["conv.0.weight"][channel][0] for value in row]
        own += [value for row in state["gru.weight_ih_l0"] for value in row[channel * bins : (channel + 1) * bins]]
        total += sum(value**2 for value in own) ** 0.5
    assert group_norm(model, 0.5).item() == pytest.approx(0.5 * total, rel=1e-5)


def test_regularise_then_cut_tunes_under_the_penalty_first():
    calls = []
    training = Training(epochs=1)
    step = Prune(0.5, training=training, penalty=0.1)
    step(CRNN(CRNNConfig(2, hidden_size=8)), lambda model, how, **o: calls.append((model.config.hidden_size, *o)))
    assert calls == [(8, "penalty", "keep"), (4,)]


def test_the_penalty_empties_units():
    """Plain gradient steps on the penalty alone: the weakest units end far below the strongest."""
    torch.manual_seed(0)
    model = CRNN(CRNNConfig(2, hidden_size=8, gru_num_layers=1))
    before = unit_weights(model)["hidden 0"].norm(dim=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        group_norm(model, 1.0).backward()
        optimizer.step()
    after = unit_weights(model)["hidden 0"].norm(dim=1)
    assert (after < before).all()
    assert (after.min() / after.max()) < (before.min() / before.max())
