import pytest
import torch

from kwslib.config import CRNNConfig, describe
from kwslib.nets import cost
from kwslib.nets.crnn import CRNN
from kwslib.nets.rivals import (
    BCResNetConfig,
    Ensemble,
    FoldedTimeNetConfig,
    SeparableConfig,
    TimeNetConfig,
    build,
    config_of,
    folded,
)
from kwslib.training.checkpoints import load, save, tensors


def test_bc_resnet_1_has_its_published_size():
    counted = cost.cost(BCResNetConfig(num_classes=12))
    assert round(counted["params"] / 1e3, 1) == 9.2  # Kim et al. 2021, table 3
    assert counted["macs_exact_per_clip"] < 3.6e6


def test_the_separable_rival_costs_what_a_tenfold_student_costs():
    rival, student = cost.cost(SeparableConfig()), cost.cost(CRNNConfig(2, hidden_size=22, gru_num_layers=1))
    assert 0.9 < rival["macs_per_clip"] / student["macs_per_clip"] < 1.1
    assert rival["params"] < student["params"]


def test_separable_macs_by_closed_formula():
    config, n, size, macs = SeparableConfig(), 101, 40, 0
    for channels, kernel, stride in zip(config.channels, config.kernels, config.strides, strict=True):
        n = (n + 2 * (kernel // 2) - kernel) // stride + 1
        macs += n * size * (kernel + channels)
        size = channels
    assert cost.exact_clip_macs(config) == macs + size * config.num_classes


def test_every_net_comes_back_from_its_description_and_its_file(tmp_path):
    x = torch.randn(2, 40, 101)
    for config in (CRNNConfig(2, hidden_size=6), SeparableConfig(), BCResNetConfig()):
        assert config_of(describe(config)) == config
        model = build(config)
        model.train()(x)  # moves the statistics of the normalisation layers
        save(tmp_path / "net.pt", model.eval(), {"model": describe(config), "features": {}})
        again, _ = load(tmp_path / "net.pt")
        assert torch.equal(model(x), again(x)) and set(tensors(again)) == set(tensors(model))


def test_an_ensemble_gives_the_means():
    members = [CRNN(CRNNConfig(2, hidden_size=size)).eval() for size in (4, 6)]
    x = torch.randn(3, 40, 101)
    out = Ensemble(members).outputs(x)
    first, second = (member.outputs(x) for member in members)
    assert torch.allclose(out.logits, (first.logits + second.logits) / 2)
    assert torch.allclose(out.attention, (first.attention + second.attention) / 2)
    assert out.hidden is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"channels": ()},
        {"kernels": (9, 11)},
        {"strides": (0, 2, 2)},
        {"kernels": (9, 1, 13)},
        {"channels": (24, 0, 32)},
        {"hop_ms": 25},
        {"hop_ms": 0},
    ],
)
def test_a_time_net_that_cannot_stream_is_refused(wrong):
    with pytest.raises(ValueError, match="channels, kernels and strides|from 1 to its kernel|a multiple of 10"):
        TimeNetConfig(**wrong)


@torch.no_grad()
def test_a_time_net_costs_what_its_layers_cost():
    config = TimeNetConfig()
    model, positions = build(config).eval(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv1d):
            layer.register_forward_hook(lambda _, x, y, name=name: positions.update({name: y.shape[2]}))
    model(torch.zeros(1, 40, 101))
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv1d)}
    macs = sum(positions[n] * m.weight.numel() for n, m in convolutions.items())
    assert cost.clip_macs(config) == macs + 2 * config.hidden_size
    model(torch.zeros(1, 40, 77 + 800))
    before = dict(positions)
    model(torch.zeros(1, 40, 77 + 1600))  # eight seconds more
    per_step = sum((positions[n] - before[n]) * m.weight.numel() for n, m in convolutions.items()) / 100
    assert cost.step_macs(config) == per_step + 4 * config.hidden_size + 2 * config.hidden_size


@torch.no_grad()
def test_a_time_net_reads_every_nth_frame_and_costs_less():
    sparse, dense = TimeNetConfig((7, 5), (4, 3), (1, 1), hop_ms=60), TimeNetConfig((7, 5), (4, 3), (1, 1))
    torch.manual_seed(0)
    net, same = build(sparse).eval(), build(dense).eval()
    same.load_state_dict(net.state_dict())
    x = torch.randn(3, 40, 101)
    torch.testing.assert_close(net(x), same(x[:, :, ::6]))
    assert (sparse.stride[1], sparse.kernel_size[1], sparse.n_steps(101)) == (6, 31, net.steps(x).shape[1])
    per_step = 40 * (4 + 7) + 7 * (3 + 5)
    assert cost.step_macs(sparse) == per_step + (sparse.n_steps(101) + 2) * 5
    assert cost.steps_per_second(sparse) == pytest.approx(100 / 6)


def test_a_size_that_older_records_did_not_have_is_not_said_where_they_had_no_other():
    assert "hop_ms" not in describe(TimeNetConfig()) and describe(TimeNetConfig(hop_ms=20))["hop_ms"] == 20
    assert config_of(describe(TimeNetConfig(hop_ms=60))) == TimeNetConfig(hop_ms=60)


@torch.no_grad()
def test_a_folded_net_says_the_same_in_fewer_numbers():
    torch.manual_seed(0)
    net = build(TimeNetConfig((6, 8), (9, 5), (3, 2)))
    net.train()(torch.randn(64, 40, 101) * 3 - 8)  # statistics of its own
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm1d) and module.affine:
            module.weight.uniform_(-2, 2), module.bias.uniform_(-1, 1)
    lean, x = folded(net.eval()), torch.randn(5, 40, 101) * 3 - 8
    torch.testing.assert_close(lean(x), net(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lean.steps(x), net.steps(x), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm1d) for module in lean.modules())
    assert type(config_of(describe(lean.config))) is FoldedTimeNetConfig
    assert cost.clip_macs(lean.config) == cost.clip_macs(net.config)
