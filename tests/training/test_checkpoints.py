"""Files of weights: what comes back, what is refused, and what others published."""

import hashlib
import io
import json
import pickle

import pytest
import torch

from kwslib.config import CRNNConfig, FeatureConfig, describe
from kwslib.nets.crnn import CRNN
from kwslib.training import checkpoints, quantize
from kwslib.training.checkpoints import CheckpointError
from kwslib.training.quantize import DynamicInt8, Half

TINY = CRNNConfig(cnn_out_channels=2, hidden_size=8, gru_num_layers=2, attention_size=5)


def saved(path, convert=lambda m: m):
    torch.manual_seed(0)
    model = convert(CRNN(TINY).eval())
    checkpoints.save(path, model, {"model": describe(TINY), "features": describe(FeatureConfig())})
    return model


@pytest.mark.parametrize("convert", [lambda m: m, Half(), DynamicInt8()], ids=["float32", "float16", "int8"])
def test_a_checkpoint_comes_back_as_it_was(tmp_path, convert):
    model = saved(tmp_path / "m.pt", convert)
    loaded, sidecar = checkpoints.load(tmp_path / "m.pt")
    x = torch.randn(3, 40, 101).to(next(model.parameters()).dtype)
    assert torch.equal(model(x), loaded(x))
    assert checkpoints.sizes(model) == checkpoints.sizes(loaded)
    assert sidecar["checkpoint_bytes"] == (tmp_path / "m.pt").stat().st_size
    assert quantize.precision_of(loaded) == sidecar["precision"]
    assert set(torch.load(tmp_path / "m.pt", weights_only=True)) == set(CRNN(TINY).state_dict())
    first = (tmp_path / "m.pt").read_bytes()
    saved(tmp_path / "another-name.pt", convert)
    assert (tmp_path / "another-name.pt").read_bytes() == first


def test_int8_weights_are_the_float_weights_rounded_to_their_scale():
    torch.manual_seed(0)
    model = CRNN(TINY).eval()
    integers = checkpoints.tensors(DynamicInt8()(model))
    for name, weight in checkpoints.tensors(model).items():
        if integers[name].is_quantized:
            assert (integers[name].dequantize() - weight).abs().max() <= integers[name].q_scale() * 0.51
        else:
            assert torch.equal(integers[name], weight)
    assert {n for n, t in integers.items() if t.is_quantized} == {
        n for n in integers if "weight" in n and not n.startswith("conv")
    }


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint of this project"),
        (b"hello", "not a checkpoint of this project"),
        (pickle.dumps(Evil(), protocol=2), "not a checkpoint of this project"),
        ("list", "holds a list"),
    ],
)
def test_a_foreign_file_gets_one_sentence_and_runs_nothing(tmp_path, content, message):
    path = tmp_path / "m.pt"
    saved(path)
    if content == "list":
        buffer = io.BytesIO()
        torch.save([torch.zeros(1)], buffer)
        content = buffer.getvalue()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(path)


def test_missing_damaged_and_mixed_up_checkpoints_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoints.load(tmp_path / "none.pt")
    saved(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes())
    with pytest.raises(CheckpointError, match="needs its description b.json"):
        checkpoints.load(tmp_path / "b.pt")
    saved(tmp_path / "c.pt", Half())
    (tmp_path / "c.json").write_bytes((tmp_path / "a.json").read_bytes())
    with pytest.raises(CheckpointError, match="do not belong together"):
        checkpoints.load(tmp_path / "c.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoints.load(tmp_path / "a.pt")


def test_a_sidecar_of_another_kind_or_weights_that_are_missing_are_named(tmp_path):
    path = tmp_path / "m.pt"
    saved(path)
    sidecar = json.loads(path.with_suffix(".json").read_text())
    for content, message in (("[]", "does not describe"), (json.dumps(sidecar | {"schema": 99}), "schema 99")):
        path.with_suffix(".json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(path)
    state = torch.load(path, weights_only=True)
    del state["classifier.bias"]
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(sidecar | {"sha256": digest}))
    with pytest.raises(CheckpointError, match="does not fit its description.*classifier.bias"):
        checkpoints.load(path)


def published(path, config=CRNNConfig(), change=lambda state: state, half=False):
    torch.manual_seed(0)
    model = CRNN(config).eval()
    state = change((model.half() if half else model).state_dict())
    torch.save(state, path)
    return model


@pytest.mark.parametrize(
    "config",
    [
        CRNNConfig(),
        CRNNConfig(cnn_out_channels=2, hidden_size=22, gru_num_layers=1),
        CRNNConfig(cnn_out_channels=4, hidden_size=20, attention_size=15),
        CRNNConfig(cnn_out_channels=3, kernel_size=(3, 14), stride=(2, 13), hidden_size=11),
        CRNNConfig(cnn_out_channels=2, hidden_size=24, gru_num_layers=1, attention_size=0),
        CRNNConfig(cnn_out_channels=3, stride=(5, 8), hidden_size=20, cell="rnn"),
        CRNNConfig(cnn_out_channels=3, hidden_size=7, cell="lstm", separable=True),
    ],
    ids=["base", "A1", "B2", "wide-stride", "A2", "E2", "separable-lstm"],
)
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_a_published_state_dict_is_understood_from_its_shapes(tmp_path, config, half):
    theirs = published(tmp_path / "m.pt", config, half=half)
    ours = checkpoints.load_published(tmp_path / "m.pt", frame_stride=config.stride[1])
    x = torch.randn(3, 40, 101).to(torch.float16 if half else torch.float32)
    assert torch.equal(ours(x), theirs(x))
    described = describe(config) | {"attention_size": config.attention_inner_size}
    assert describe(ours.config) == described


def test_an_ambiguous_mel_stride_is_asked_for(tmp_path):
    config = CRNNConfig(cnn_out_channels=3, kernel_size=(7, 20), stride=(12, 8), hidden_size=9)
    theirs = published(tmp_path / "m.pt", config)
    with pytest.raises(CheckpointError, match="3 bins of 40 .* the mel strides that fit are 12, 13, 14, 15, 16"):
        checkpoints.load_published(tmp_path / "m.pt")
    ours = checkpoints.load_published(tmp_path / "m.pt", mel_stride=12)
    x = torch.randn(2, 40, 101)
    assert torch.equal(ours(x), theirs(x))
    with pytest.raises(CheckpointError, match="strides that fit are none"):
        checkpoints.load_published(tmp_path / "m.pt", mel_stride=4)


def test_counters_of_thop_and_a_wrapper_are_ignored(tmp_path):
    def profiled(state):
        zero = torch.zeros(1, dtype=torch.float64)
        return {
            "epoch": 20,
            "state_dict": {**state, "total_ops": zero, "gru.total_ops": zero, "gru.total_params": zero},
        }

    theirs = published(tmp_path / "m.pt", change=profiled)
    x = torch.randn(1, 40, 101)
    assert torch.equal(checkpoints.load_published(tmp_path / "m.pt")(x), theirs(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if not k.startswith("conv")}, "names of the reports: 'conv.0.weight'"),
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, "extra.weight"),
        (lambda s: {**s, "gru.weight_hh_l0": s["gru.weight_hh_l0"][:128]}, "has 2 gates: an RNN has 1, a GRU 3"),
        (lambda s: {**s, "classifier.bias": torch.full((2,), torch.nan)}, "classifier.bias hold values that are not"),
        (lambda s: {k: v.int() for k, v in s.items()}, "holds integer weights"),
        (lambda s: {**s, "classifier.weight": torch.zeros(12, 64)}, "tells 12 classes apart"),
        (lambda s: {"weights": "none"}, "not a plain state dict"),
        (lambda s: list(s.values()), "holds a list"),
    ],
)
def test_a_file_that_is_not_such_a_model_is_refused_with_the_reason(tmp_path, change, message):
    published(tmp_path / "m.pt", change=change)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_published(tmp_path / "m.pt")


def test_a_frame_stride_that_makes_no_steps_is_refused(tmp_path):
    published(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="frame stride of 0 makes no steps"):
        checkpoints.load_published(tmp_path / "m.pt", frame_stride=0)


def test_a_pickled_model_is_never_executed(tmp_path):
    torch.save(CRNN(TINY), tmp_path / "m.pt")  # a whole object, as torch.save(model) leaves it
    with pytest.raises(CheckpointError, match="holds other things than weights and is not opened$"):
        checkpoints.load_published(tmp_path / "m.pt")
