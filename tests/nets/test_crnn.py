import pytest
import torch

from kwslib.config import CRNNConfig
from kwslib.nets import crnn
from kwslib.nets.crnn import CRNN

TINY = CRNNConfig(cnn_out_channels=2, hidden_size=8, gru_num_layers=2, attention_size=5)


def test_state_dict_names_are_those_of_the_reports():
    names = set(CRNN(TINY).state_dict())
    assert {n for n in names if not n.startswith("gru.")} == {
        *(f"conv.0.{x}" for x in ("weight", "bias")),
        *(f"attention.energy.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")),
        *(f"classifier.{x}" for x in ("weight", "bias")),
    }


def test_the_model_equals_its_formulas():
    """Convolution, GRU cell, attention and classifier written out, in float64."""
    torch.manual_seed(0)
    config = CRNNConfig(cnn_out_channels=2, hidden_size=4, gru_num_layers=1)
    model = CRNN(config).double().eval()
    w = model.state_dict()
    x = torch.randn(1, 40, 101, dtype=torch.float64)
    hidden, outputs = torch.zeros(4, dtype=torch.float64), []
    for step in range(config.n_steps(101)):
        column = [
            (x[0, 2 * f : 2 * f + 5, 8 * step : 8 * step + 20] * w["conv.0.weight"][c, 0]).sum() + w["conv.0.bias"][c]
            for c in range(2)
            for f in range(config.conv_bins)
        ]
        i = w["gru.weight_ih_l0"] @ torch.stack(column) + w["gru.bias_ih_l0"]
        h = w["gru.weight_hh_l0"] @ hidden + w["gru.bias_hh_l0"]
        reset, update = torch.sigmoid(i[:4] + h[:4]), torch.sigmoid(i[4:8] + h[4:8])
        hidden = (1 - update) * torch.tanh(i[8:] + reset * h[8:]) + update * hidden
        outputs.append(hidden)
    energy = [
        (w["attention.energy.2.weight"] @ torch.tanh(w["attention.energy.0.weight"] @ o + w["attention.energy.0.bias"]))
        + w["attention.energy.2.bias"]
        for o in outputs
    ]
    weights = torch.softmax(torch.cat(energy), 0)
    context = sum(a * o for a, o in zip(weights, outputs, strict=True))
    expected = w["classifier.weight"] @ context + w["classifier.bias"]
    torch.testing.assert_close(model(x)[0], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(model.outputs(x).attention[0], weights, atol=1e-12, rtol=0)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"expected log-mels \(batch, 40.*got \(1, 39, 101\)"):
        CRNN(TINY)(torch.zeros(1, 39, 101))
    with pytest.raises(ValueError, match="at least 20 frames"):
        CRNN(TINY)(torch.zeros(1, 40, 19))


def test_keyword_score_ranks_where_softmax_saturates():
    logits = torch.tensor([[-40.0, 40.0], [-50.0, 50.0]])
    assert logits.softmax(1)[0, 1] == logits.softmax(1)[1, 1] == 1.0
    assert crnn.keyword_score(logits).tolist() == [80.0, 100.0]


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_the_other_cells_equal_their_formulas(cell):
    """One recurrent layer written out, in float64, over the convolution's outputs."""
    torch.manual_seed(0)
    model = CRNN(CRNNConfig(2, hidden_size=4, gru_num_layers=1, cell=cell)).double().eval()
    w = {name.removeprefix("gru."): t for name, t in model.state_dict().items()}
    out = model.outputs(torch.randn(1, 40, 101, dtype=torch.float64))
    h, c = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for x, expected in zip(out.steps[0], out.hidden[0], strict=True):
        sums = w["weight_ih_l0"] @ x + w["bias_ih_l0"] + w["weight_hh_l0"] @ h + w["bias_hh_l0"]
        if cell == "rnn":
            h = torch.tanh(sums)
        else:
            take, forget, new, give = sums.split(4)
            c = torch.sigmoid(forget) * c + torch.sigmoid(take) * torch.tanh(new)
            h = torch.sigmoid(give) * torch.tanh(c)
        torch.testing.assert_close(h, expected, atol=1e-12, rtol=0)


def test_linear_attention_is_a_softmax_over_one_energy_per_step():
    torch.manual_seed(0)
    model = CRNN(CRNNConfig(2, hidden_size=4, attention_size=0)).double().eval()
    with torch.no_grad():
        out = model.outputs(torch.randn(3, 40, 101, dtype=torch.float64))
    energy = model.attention.energy
    for weights, hidden, context in zip(out.attention, out.hidden, out.context, strict=True):
        e = torch.tensor([((energy.weight[0] * h).sum() + energy.bias[0]).item() for h in hidden], dtype=torch.float64)
        torch.testing.assert_close(weights, e.exp() / e.exp().sum(), atol=1e-12, rtol=0)
        torch.testing.assert_close(context, sum(a * h for a, h in zip(weights, hidden, strict=True)))


def test_a_separable_convolution_mixes_one_picture_into_channels():
    torch.manual_seed(0)
    model = CRNN(CRNNConfig(3, hidden_size=4, separable=True)).eval()
    x = torch.randn(2, 40, 101)
    picture = torch.nn.functional.conv2d(x[:, None], model.conv[0].weight, model.conv[0].bias, stride=(2, 8))
    expected = [
        picture[:, 0] * m + b for m, b in zip(model.conv[1].weight[:, 0, 0, 0], model.conv[1].bias, strict=True)
    ]
    torch.testing.assert_close(model.steps(x).transpose(1, 2), torch.cat(expected, dim=1))


def test_sizes_that_make_no_model_are_named():
    with pytest.raises(ValueError, match="unknown cell 'tcn'"):
        CRNNConfig(cell="tcn")
    with pytest.raises(ValueError, match="41 bins does not fit 40"):
        CRNNConfig(kernel_size=(41, 20))
