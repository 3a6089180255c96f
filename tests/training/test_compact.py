"""The compact file: one small file that is a whole detector."""

import dataclasses
import json
import struct
import zlib

import pytest
import torch

from kwslib.config import CRNNConfig, FeatureConfig, describe
from kwslib.nets.rivals import SeparableConfig, build
from kwslib.training import checkpoints
from kwslib.training.checkpoints import CheckpointError
from kwslib.training.quantize import PRECISIONS

A1 = CRNNConfig(cnn_out_channels=2, hidden_size=22, gru_num_layers=1)
E2 = CRNNConfig(cnn_out_channels=3, stride=(5, 8), hidden_size=20, cell="rnn")
X = torch.randn(6, 40, 101, generator=torch.Generator().manual_seed(1)) * 4 - 8


def in_precision(config, precision):
    torch.manual_seed(0)
    model, convert = build(config).eval(), PRECISIONS[precision]
    return convert(model) if convert else model


def sidecar(config) -> dict:
    return {"model": describe(config), "features": describe(FeatureConfig()), "keyword": "sheila", "threshold": -1.25}


def written(folder, config=A1, precision="weight-int8"):
    model = in_precision(config, precision)
    checkpoints.save(folder / "m.pt", model, sidecar(config))
    return model, folder / "m.kws"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", [A1, E2, CRNNConfig(2, cell="lstm", separable=True)], ids=["gru", "rnn", "lstm"])
def test_it_is_the_same_model_as_the_torch_file(tmp_path, config, precision):
    model, path = written(tmp_path, config, precision)
    again, known = checkpoints.load(path)
    x = X.to(next(model.parameters()).dtype)
    assert torch.equal(again(x), model(x)) and torch.equal(again(x), checkpoints.load(tmp_path / "m.pt")[0](x))
    assert known == {**sidecar(config), "precision": precision} and again.config == config
    assert json.loads((tmp_path / "m.json").read_text())["compact_bytes"] == path.stat().st_size


@pytest.mark.parametrize("precision", ["float32", "float16", "weight-int8", "weight-int4"])
def test_the_rivals_fit_in_too(tmp_path, precision):
    torch.manual_seed(0)
    model = build(SeparableConfig()).train()
    model(X)  # gives the normalisation layers statistics of their own
    model = PRECISIONS[precision](model.eval()) if PRECISIONS[precision] else model.eval()
    checkpoints.save(tmp_path / "m.pt", model, sidecar(SeparableConfig()))
    x = X.to(next(model.parameters()).dtype)
    for name in ("m.pt", "m.kws"):
        assert torch.equal(checkpoints.load(tmp_path / name)[0](x), model(x))


def test_a_model_of_2500_parameters_takes_2800_bytes(tmp_path):
    """2,546 parameters in int8: weights, scales and biases take 2,864 bytes; what it is, about 130 more."""
    model, path = written(tmp_path, E2)
    assert sum(p.numel() for p in model.parameters()) == 2546
    weights = checkpoints.sizes(model)["weights_bytes"]
    assert weights < path.stat().st_size < weights + 200
    assert (tmp_path / "m.pt").stat().st_size > 3 * path.stat().st_size


def test_the_layout_is_what_its_description_says(tmp_path):
    """Read by hand, without the code that wrote it."""
    model, path = written(tmp_path, A1, "float32")
    content = path.read_bytes()
    assert content[:4] == b"KWS1"
    (length,) = struct.unpack("<H", content[4:6])
    header, body = json.loads(content[6 : 6 + length]), content[6 + length : -4]
    sizes = {"class": "CRNNConfig", "cnn_out_channels": 2, "hidden_size": 22, "gru_num_layers": 1}
    assert header == {"precision": "float32", "keyword": "sheila", "threshold": -1.25, "model": sizes}
    assert zlib.crc32(content[:-4]) == struct.unpack("<I", content[-4:])[0]
    first = next(model.parameters()).flatten()
    assert struct.unpack(f"<{len(first)}f", body[: 4 * len(first)]) == tuple(first.tolist())
    assert len(body) == 4 * sum(p.numel() for p in model.parameters())


def repacked(content: bytes, **changes) -> bytes:
    """The same file with another description and a fitting checksum."""
    end = 6 + struct.unpack("<H", content[4:6])[0]
    header = json.dumps({**json.loads(content[6:end]), **changes}).encode()
    fresh = content[:4] + struct.pack("<H", len(header)) + header + content[end:-4]
    return fresh + struct.pack("<I", zlib.crc32(fresh))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: b"", "does not begin with KWS1"),
        (lambda c: b"PK" + c[2:], "does not begin with KWS1"),
        (lambda c: c[:-9], "checksum does not fit"),
        (lambda c: c[:50] + bytes([c[50] ^ 1]) + c[51:], "checksum does not fit"),
        (lambda c: repacked(c, model=describe(dataclasses.replace(A1, hidden_size=21))), "does not fit"),
        (lambda c: repacked(c, model=describe(dataclasses.replace(A1, hidden_size=500))), "promises .* weights"),
        (lambda c: repacked(c, model={"class": "Path"}), "does not fit its description"),
        (lambda c: repacked(c, model="CRNN"), "does not fit its description"),
        (lambda c: repacked(c, precision="float64"), "does not fit its description"),
        (lambda c: repacked(c, features={"n_ffts": 3}), "does not fit its description"),
        (lambda c: repacked(c, features=7), "does not fit its description"),
        (lambda c: repacked(c, features={"n_fft": 10**12}), "n_fft is 1000000000000|another front end"),
        (lambda c: repacked(c, features={"hop_length": 0}), "another front end"),
        (lambda c: repacked(c, model=describe(A1) | {"gru_num_layers": 10**6}), "gru_num_layers is 1000000"),
        (lambda c: repacked(c, model=describe(A1) | {"hidden_size": 10**30}), "hidden_size is 1000"),
        (lambda c: repacked(c, model=describe(A1) | {"hidden_size": -1}), "hidden_size is -1"),
        (lambda c: repacked(c, model=describe(A1) | {"stride": [0, 8]}), "does not fit its description"),
        (lambda c: repacked(c, model=describe(A1) | {"stride": [2, 10**9]}), "stride is"),
        (lambda c: repacked(c, threshold="x"), "threshold is no number"),
        (lambda c: repacked(c, keyword=["x"]), "keyword no text"),
    ],
)
def test_damaged_and_foreign_files_get_one_sentence(tmp_path, damage, message):
    _, path = written(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(path)


def test_a_threshold_of_nought_is_kept(tmp_path):
    checkpoints.save(tmp_path / "m.pt", in_precision(A1, "float32"), sidecar(A1) | {"threshold": 0.0})
    assert checkpoints.load(tmp_path / "m.kws")[1]["threshold"] == 0.0


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / "folder.kws").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint at .*folder.kws.*directory"):
        checkpoints.load(tmp_path / "folder.kws")

    with pytest.raises(CheckpointError, match="no checkpoint at .*none.kws"):
        checkpoints.load(tmp_path / "none.kws")
