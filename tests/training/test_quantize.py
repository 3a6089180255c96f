"""Whole-number weights: the grid, the packed file, and tuning on the grid."""

import numpy as np
import pytest
import torch
from conftest import stripes

from kwslib.config import CELLS, CRNNConfig, describe
from kwslib.data.augment import Augmentation
from kwslib.nets import crnn
from kwslib.nets.crnn import CRNN
from kwslib.nets.losses import Labels
from kwslib.nets.rivals import SeparableConfig, TimeNetConfig, build
from kwslib.streaming.model import StreamingModel
from kwslib.training import checkpoints, loop, quantize
from kwslib.training.loop import Objective, Training
from kwslib.training.material import Clips, Material
from kwslib.training.quantize import Fold, WeightInt, on_grid, packed, round_weights
from kwslib.training.tune import QAT

X = torch.randn(6, 40, 101, generator=torch.Generator().manual_seed(1)) * 4 - 8
MASKS = Augmentation()


def net(cell="gru", **sizes) -> CRNN:
    torch.manual_seed(0)
    return CRNN(CRNNConfig(3, hidden_size=7, gru_num_layers=2, cell=cell, **sizes)).eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_grid_by_plain_loops(bits):
    weight = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    whole, scale = on_grid(weight, bits)
    for row in range(5):
        most = float(weight[row].abs().max())
        expected = float(np.float16(most / (2 ** (bits - 1) - 1))) or 1.0
        assert scale[row].item() == expected
        for value, number in zip(weight[row].flatten().tolist(), whole[row].flatten().tolist(), strict=True):
            assert number == round(value / expected) and abs(number) < 2 ** (bits - 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_twice_is_rounding_once(bits):
    once = round_weights(net(), bits)
    before = [p.clone() for p in once.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, round_weights(once, bits).parameters(), strict=True))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("separable", [False, True])
def test_the_file_gives_back_the_same_model_and_is_as_small_as_it_says(tmp_path, cell, bits, separable):
    model = WeightInt(bits)(net(cell, separable=separable))
    sidecar = checkpoints.save(tmp_path / "m.pt", model, {"model": describe(model.config), "features": {}})
    again, _ = checkpoints.load(tmp_path / "m.pt")
    assert sidecar["precision"] == f"weight-int{bits}" == quantize.precision_of(again)
    assert torch.equal(again(X), model(X))
    size = checkpoints.sizes(again)
    assert size["state_dict_bytes"] == (tmp_path / "m.pt").stat().st_size == sidecar["checkpoint_bytes"]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    packed = sum(-(-p.numel() * bits // 8) + 2 * len(p) for p in matrices)
    assert size["weights_bytes"] == packed + 2 * sum(p.numel() for p in model.parameters() if p.dim() == 1)


def test_eight_bits_hardly_change_the_scores_and_four_change_them_more():
    model = net()
    off = [(WeightInt(bits)(model)(X) - model(X)).abs().max().item() for bits in (8, 4)]
    assert off[0] < 0.02 and off[0] < off[1]


def test_a_stream_of_whole_number_weights_equals_the_clip():
    model = WeightInt(8)(net())
    streaming = StreamingModel(model)
    samples = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(2)) * 0.1
    scores, _ = streaming.step(samples, streaming.initial_state())
    logits = model(streaming.front_end(samples))
    assert scores[0, -1].item() == pytest.approx((logits[0, 1] - logits[0, 0]).item(), abs=1e-5)


def test_tuning_on_the_grid_beats_rounding_and_keeps_what_it_validated():
    labels = (np.arange(160) % 4 == 0).astype(np.int64)
    logmels = stripes(labels, np.random.default_rng(0), 2)
    material = Material(Clips(logmels[None, :96].astype(np.float16), labels[:96]), logmels[96:], labels[96:], MASKS)

    def tune(model, training, **options):
        history.extend(loop.fit(model, material, Objective((Labels(),), tunes=True, **options), training, 0))

    torch.manual_seed(0)
    model, history = CRNN(CRNNConfig(2, hidden_size=6, gru_num_layers=1)), []
    loop.fit(model, material, Objective((Labels(),)), Training(epochs=5, batch_size=16), 0)

    def loss(net) -> float:
        score = crnn.score(net, material.val).astype(float)
        return float(np.mean(np.logaddexp(0, np.where(material.val_labels == 1, -score, score))))

    rounded = WeightInt(4)(model)
    tuned = QAT(4, Training(epochs=5, batch_size=16))(model, tune)
    kept = min((row["val_au_fa_fr"], row["val_loss"]) for row in history)[1]
    assert loss(tuned) < loss(rounded)
    assert loss(tuned) == pytest.approx(kept, rel=0.005)  # but for biases and scales in float16
    assert quantize.precision_of(tuned) == "weight-int4"


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(ValueError, match="8 or 4 bits, not 3"):
        WeightInt(3)


@pytest.mark.parametrize("cell", CELLS)
def test_rounded_activations_by_plain_loops(cell):
    """What every recurrent and linear layer reads, vector by vector: each has a scale of its own."""
    read, model = {}, WeightInt(8, activations=True)(net(cell))
    plain = WeightInt(8)(net(cell))
    layers = ("gru", "attention.energy.0", "attention.energy.2", "classifier")
    for name in layers:  # hooks run in order: this one sees what the rounding leaves
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    with torch.no_grad():
        model(X[:1])
        steps = plain.steps(X[:1])[0]
        hidden, _ = plain.gru(read["gru"])
        energy = plain.attention.energy
        expected = {"gru": steps, "attention.energy.0": hidden[0]}
        expected["attention.energy.2"] = energy[1](energy[0](read["attention.energy.0"]))[0]
        weights = energy[2](read["attention.energy.2"]).softmax(1)
        expected["classifier"] = (weights * hidden).sum(1)
    for name in layers:
        for rounded, exact in zip(read[name].reshape(-1, read[name].shape[-1]), expected[name], strict=True):
            torch.testing.assert_close(rounded, rounded_by_hand(exact), atol=1e-5, rtol=0)


def rounded_by_hand(vector):
    scale = float(vector.abs().max()) / 127
    return torch.tensor([round(value / scale) * scale for value in vector.tolist()])


def test_activations_are_rounded_while_tuning_too():
    tuned = []
    model = QAT(4, activations=True)(net(), lambda model, training, weight_bits: tuned.append(model.activation_bits))
    assert tuned == [8] and quantize.precision_of(model) == "weight-int4-act8"


@pytest.mark.parametrize("bits", [4, 8])
def test_very_small_weights_do_not_turn_over(bits):
    """Their scale is no number that float16 holds exactly: it is too small, and the largest would leave the grid."""
    weight = torch.tensor([[1e-4, 3.3e-5, -1e-4], [2e-6, -1e-6, 1e-7]])
    whole, _ = on_grid(weight, bits)
    assert (whole.sign() * weight.sign() >= 0).all() and whole.int().abs().max() < 2 ** (bits - 1)


@pytest.mark.parametrize("name", ["conv.0.weight", "classifier.bias"])
def test_weights_too_large_for_their_scales_are_refused(name):
    model = net()
    model.get_parameter(name).data.fill_(1e8)
    with pytest.raises(quantize.PrecisionError, match=f"{name} does not fit"):
        WeightInt(8)(model)


def test_a_clip_does_not_depend_on_its_batch():
    model = WeightInt(8, activations=True)(net())
    torch.testing.assert_close(model(X)[2:3], model(X[2:3]), atol=1e-6, rtol=0)


def test_rounded_activations_are_for_a_crnn():
    with pytest.raises(ValueError, match="only a CRNN can round its activations, not a SeparableNet"):
        WeightInt(8, activations=True)(build(SeparableConfig()))


def test_layer_errors_add_up_and_eight_bits_are_25_db_better():
    """Noise falls with the step: 127 steps instead of 7 are 20 log10(127 / 7) = 25.2 dB, for layers of many weights."""
    model = net()
    logmels, is_keyword = X.numpy(), np.array([1, 0, 1, 0, 0, 1], bool)
    eight, four = (quantize.layer_errors(model, bits, logmels, is_keyword) for bits in (8, 4))
    assert list(four.index) == ["conv", "gru layer 0", "gru layer 1", "attention", "classifier", "all"]
    assert four.loc["all", "weights"] == four["weights"][:-1].sum()
    assert four["weights"].sum() == 2 * sum(p.numel() for p in model.parameters() if p.dim() > 1)
    many = four["weights"] > 100
    assert many.sum() == 4
    assert (eight["weights_sqnr_db"] - four["weights_sqnr_db"])[many].between(23.7, 26.7).all()
    assert (eight["output_sqnr_db"] > four["output_sqnr_db"] + 12).all()
    rounded = WeightInt(4)(model)
    with torch.no_grad():
        assert four.loc["all", "output_sqnr_db"] == pytest.approx(quantize.sqnr_db(model(X), rounded(X)), abs=0.5)
    before = crnn.score(model, logmels)
    assert np.array_equal(before, crnn.score(net(), logmels))  # the model itself is left alone


@pytest.mark.parametrize("step", [quantize.Half(), quantize.DynamicInt8()])
def test_whole_numbers_are_the_last_step(step):
    with pytest.raises(quantize.PrecisionError, match="whole numbers of 4 bits already"):
        step(WeightInt(4)(net()))


def test_half_refuses_what_float16_cannot_hold():
    model = CRNN(CRNNConfig(2, hidden_size=8))
    model.classifier.weight.data[0, 0] = 1e6
    with pytest.raises(quantize.PrecisionError, match="classifier.weight does not fit"):
        quantize.Half()(model)


def test_half_refuses_logits_that_float16_cannot_hold():
    """All weights fit, but what they add up to over a loud clip does not."""
    model = CRNN(CRNNConfig(2, hidden_size=8)).eval()
    model.conv[0].weight.data.fill_(60.0)  # 5 x 20 of them times 20.7
    with pytest.raises(quantize.PrecisionError, match="the logits of a silent clip do not fit into float16"):
        quantize.Half()(model)


def test_folding_leaves_weights_of_few_bits_on_their_grid():
    torch.manual_seed(0)
    net = build(TimeNetConfig((6, 8), (9, 5), (3, 2)))
    net.train()(torch.randn(64, 40, 101) * 3 - 8)
    rounded = WeightInt(4)(net)
    lean = WeightInt(4)(Fold()(rounded))
    mine, theirs = packed(lean.state_dict(), 4), packed(rounded.state_dict(), 4)
    weights = [name for name in mine if f"{name}.scale" in mine]
    assert len(weights) == 5 and all(torch.equal(mine[name], theirs[name]) for name in weights)
    x = torch.randn(4, 40, 101) * 3 - 8
    torch.testing.assert_close(lean(x), rounded(x), atol=0.02, rtol=0.02)  # scales and biases are float16
    with pytest.raises(ValueError, match="only a TimeNet can be folded, once, not a FoldedTimeNet"):
        Fold()(lean)
