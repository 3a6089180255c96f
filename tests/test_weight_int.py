"""Whole-number weights: the grid, the packed file, and tuning on the grid."""

import numpy as np
import pytest
import torch

from kwslib import quantize, stream, train
from kwslib.augment import Augmentation
from kwslib.config import CELLS, CRNNConfig, describe
from kwslib.losses import Labels
from kwslib.models import CRNN, on_grid, round_weights
from kwslib.quantize import QAT, WeightInt
from kwslib.train import Data, Training

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
    sidecar = quantize.save(tmp_path / "m.pt", model, {"model": describe(model.config), "features": {}})
    again, _ = quantize.load(tmp_path / "m.pt")
    assert sidecar["precision"] == f"weight-int{bits}" == quantize.precision_of(again)
    assert torch.equal(again(X), model(X))
    size = quantize.sizes(again)
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
    streaming = stream.StreamingModel(model)
    samples = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(2)) * 0.1
    scores, _ = streaming.step(samples, streaming.initial_state())
    logits = model(streaming.front_end(samples))
    assert scores[0, -1].item() == pytest.approx((logits[0, 1] - logits[0, 0]).item(), abs=1e-5)


def test_tuning_on_the_grid_beats_rounding_and_keeps_what_it_validated():
    rng = np.random.default_rng(0)
    labels = (np.arange(160) % 4 == 0).astype(np.int64)
    logmels = rng.normal(-10, 1, (160, 40, 101)).astype(np.float32)
    for clip, label in zip(logmels, labels, strict=True):
        bins = 20 if label else rng.choice([5, 35])
        clip[bins - 2 : bins + 2, 30:70] += 2
    data = Data(logmels[None, :96].astype(np.float16), labels[:96], logmels[96:], labels[96:])

    def tune(model, training, **options):
        history.extend(train.fit(model, data, training, (Labels(),), MASKS, 0, trained=True, **options))

    torch.manual_seed(0)
    model, history = CRNN(CRNNConfig(2, hidden_size=6, gru_num_layers=1)), []
    train.fit(model, data, Training(epochs=5, batch_size=16), (Labels(),), MASKS, 0)

    def loss(net) -> float:
        score = train.score(net, data.val).astype(float)
        return float(np.mean(np.logaddexp(0, np.where(data.val_labels == 1, -score, score))))

    rounded = WeightInt(4)(model)
    tuned = QAT(4, Training(epochs=5, batch_size=16))(model, tune)
    kept = min((row["val_au_fa_fr"], row["val_loss"]) for row in history)[1]
    assert loss(tuned) < loss(rounded)
    assert loss(tuned) == pytest.approx(kept, rel=0.02)  # but for biases and scales in float16
    assert quantize.precision_of(tuned) == "weight-int4"


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(ValueError, match="8 or 4 bits, not 3"):
        WeightInt(3)
