"""A whole detector in other runtimes: the same probabilities as the streaming model, its state outside."""

import io
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kwslib.config import CELLS, CRNNConfig
from kwslib.data.features import LogMel
from kwslib.nets.crnn import CRNN
from kwslib.nets.rivals import SeparableConfig, TimeNetConfig, build
from kwslib.streaming import export
from kwslib.streaming.decision import Decision
from kwslib.streaming.model import StreamingModel, score_chunks
from kwslib.training.quantize import PRECISIONS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {cell: CRNNConfig(2, hidden_size=9, gru_num_layers=2, cell=cell, attention_size=4) for cell in CELLS}
DECISION = {"threshold": 1.0, "smoothing_steps": 2, "refractory_s": 1.0, "scale": 0.5, "offset": -1.0}
DESCRIBED = {"keyword": "sheila", "threshold": -0.5, "decision": DECISION}


def net(precision="float32", cell="gru"):
    torch.manual_seed(0)
    convert = PRECISIONS[precision] or (lambda model: model)
    return convert(CRNN(CONFIGS[cell]).eval())


@pytest.mark.parametrize("keep_tables", [True, False])
def test_log_mels_in_plain_products(keep_tables):
    samples = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0)) * 0.1
    samples[1, 4_000:] = 0  # silence is clamped in both
    front_end = LogMel()
    torch.testing.assert_close(
        export._LogMel(front_end, keep_tables)(samples), front_end.frames(samples), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("suffix", [".onnx", ".ts"])
@pytest.mark.parametrize(("precision", "cell"), [*(("float32", cell) for cell in CELLS), ("weight-int8", "gru")])
def test_a_minute_of_sound_gives_the_same_probabilities(cell, suffix, precision):
    model = net(precision, cell)
    content = export.detector(model, suffix, DESCRIBED)  # compares; here again, from outside
    whole = export.Detector(StreamingModel(model), decision=Decision(**DECISION)).eval()
    run = export._session_call(content) if suffix == ".onnx" else export._torchscript_call(content)
    assert export.parity(whole, run, seconds=5) <= 1e-5


SPARSE = TimeNetConfig((7, 5), (4, 3), (1, 1), hop_ms=60)  # it hears 25 ms of every 60


@pytest.mark.parametrize("suffix", [".onnx", ".ts"])
@pytest.mark.parametrize("convert", [lambda m: m, PRECISIONS["weight-int4"]], ids=["float32", "int4"])
def test_a_time_net_is_exported_with_all_its_caches(suffix, convert):
    torch.manual_seed(0)
    model = convert(build(TimeNetConfig()).eval())
    whole = export.Detector(StreamingModel(model))
    assert whole.names == ["audio", "frames", "frames_2", "frames_3", "outputs", "energies"]
    assert export.detector(model, suffix, DESCRIBED)


@pytest.mark.parametrize(("hop_ms", "suffix"), [(60, ".onnx"), (20, ".ts")])
def test_a_time_net_that_reads_few_frames_is_exported(hop_ms, suffix):
    """Where its hop is longer than a frame, no sound has to be kept from hop to hop."""
    torch.manual_seed(0)
    config = replace(SPARSE, hop_ms=hop_ms, strides=(2, 1))
    whole = export.Detector(StreamingModel(build(config).eval()))
    assert whole.names == [*(["audio"] if config.hop_ms < 25 else []), "frames", "frames_2", "outputs", "energies"]
    assert whole.hop == 16 * 10 * config.stride[1]
    assert export.detector(whole.streaming.model, suffix, DESCRIBED)


def test_the_calibrated_probability_is_in_the_file():
    run = export._session_call(export.detector(net(), ".onnx", DESCRIBED))
    plain = export._session_call(export.detector(net(), ".onnx", {"keyword": "sheila"}))
    whole = export.Detector(StreamingModel(net()))
    samples = torch.randn(1, whole.hop, generator=torch.Generator().manual_seed(0)) * 0.1
    share, raw = (float(call(samples, *whole.initial_state())[0]) for call in (run, plain))
    assert np.log(share / (1 - share)) == pytest.approx(0.5 * np.log(raw / (1 - raw)) - 1.0, abs=1e-4)


@pytest.mark.parametrize(("precision", "suffix"), [("float16", ".onnx"), ("float16", ".ts"), ("int8", ".ts")])
def test_coarser_precisions_stay_within_parity_or_say_so(precision, suffix):
    try:
        assert export.detector(net(precision), suffix, DESCRIBED)
    except export.ExportError as error:  # float16 sums in another order
        assert precision == "float16" and "off by" in str(error)


def test_an_onnx_detector_is_little_more_than_its_weights_and_mel_filters():
    model = net()
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert len(export.detector(model, ".onnx", DESCRIBED)) < weights + 4 * 201 * 40 + 30_000


def test_what_it_is_stands_in_the_file():
    import onnx

    content = export.detector(net(), ".onnx", DESCRIBED)
    about = json.loads({p.key: p.value for p in onnx.load_from_string(content).metadata_props}["kws"])
    extra = {"kws.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.load(io.BytesIO(export.detector(net(), ".ts", DESCRIBED)), _extra_files=extra)
    assert about == json.loads(extra["kws.json"])
    assert about["decision"] == DECISION
    assert about["keyword"] == "sheila" and about["threshold"] == -0.5
    assert about["hop_samples"] == 1280 and about["sample_rate"] == 16_000


@pytest.mark.parametrize("kind", ["crnn", "timenet", "sparse"])
def test_a_detector_runs_with_onnx_runtime_and_numpy_alone(kind):
    """As a user would: names, shapes and first state from the file."""
    import onnxruntime

    torch.manual_seed(0)
    model = net() if kind == "crnn" else build(SPARSE if kind == "sparse" else TimeNetConfig()).eval()
    session = onnxruntime.InferenceSession(export.detector(model, ".onnx", DESCRIBED))
    about = json.loads(session.get_modelmeta().custom_metadata_map["kws"])
    state = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()[1:]}
    for name, rows in about["first_state"].items():
        state[name] += np.float32(rows)[:, None]
    state["energies"] -= np.inf
    assert about["threshold_probability"] == pytest.approx(1 / (1 + np.exp(0.5)))  # of 0.5 * 1 - 1
    samples = np.random.default_rng(0).normal(0, 0.1, (1, 5 * about["hop_samples"])).astype(np.float32)
    heard = []
    for hop in np.split(samples, 5, axis=1):
        probability, *new = session.run(None, {"samples": hop, **state})
        state = dict(zip(state, new, strict=True))
        heard.append(float(probability[0]))
    whole = export.Detector(StreamingModel(model), decision=Decision(**DECISION)).eval()
    with torch.no_grad():
        parts = whole.initial_state()
        for hop, found in zip(torch.from_numpy(samples).split(whole.hop, dim=1), heard, strict=True):
            probability, *parts = whole(hop, *parts)
            assert probability.item() == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("config", [TimeNetConfig(), SPARSE, replace(SPARSE, strides=(2, 2))], ids=str)
@torch.no_grad()
def test_a_detector_starts_as_after_endless_silence(config):
    torch.manual_seed(0)
    model = build(config).train()
    model(torch.randn(16, 40, 101) * 4 - 12)
    whole = export.Detector(StreamingModel(model.eval())).eval()
    state, heard = whole.initial_state(), []
    for _ in range(15):
        probability, *state = whole(torch.zeros(1, whole.hop), *state)
        heard.append(probability.item())
    later, _ = whole.streaming.step(torch.zeros(1, 48_000), whole.streaming.initial_state())
    assert heard == pytest.approx([torch.sigmoid(later[0, -1]).item()] * 15, abs=1e-5)


def test_a_file_that_does_something_else_is_not_handed_out(monkeypatch):
    monkeypatch.setattr(export, "_session_call", lambda content: lambda samples, *state: (torch.zeros(1), *state))
    with pytest.raises(export.ExportError, match="off by .* in probability"):
        export.detector(net(), ".onnx", DESCRIBED)


def test_what_cannot_be_exported_is_named():
    with pytest.raises(export.ExportError, match="int8 layers are known to torch alone"):
        export.detector(net("int8"), ".onnx", DESCRIBED)
    with pytest.raises(export.ExportError, match="as .onnx or .ts, not as .tflite"):
        export.detector(net(), ".tflite", DESCRIBED)
    with pytest.raises(ValueError, match="only a CRNN or a TimeNet runs on a stream"):
        export.detector(build(SeparableConfig()).eval(), ".onnx", DESCRIBED)


@pytest.mark.parametrize("cell", ["gru", "time"])
def test_the_file_alone_is_enough_with_the_lines_of_its_page(cell, tmp_path, monkeypatch, capsys):
    """The code of docs/detector.md, run as it stands there, finds what the streaming model finds."""
    torch.manual_seed(0)
    model = net() if cell == "gru" else build(TimeNetConfig()).eval()
    samples = export._track(8 * 16_000)[0].numpy()
    middle = float(np.median([score for _, score in score_chunks(StreamingModel(model), [samples])]))
    decision = Decision(threshold=middle, smoothing_steps=2, refractory_s=0.7, scale=0.5, offset=-1.0)
    (tmp_path / "detector.onnx").write_bytes(export.detector(model, ".onnx", DESCRIBED | {"decision": vars(decision)}))
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(import json.*?)```", (ROOT / "docs" / "detector.md").read_text(), re.DOTALL)[1]
    exec(compile(code, "detector.md", "exec"), {"samples": samples})
    found = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    whole = export.Detector(StreamingModel(model)).eval()  # says raw scores; a file answers from its first hop on
    state, scored = whole.initial_state(), []
    with torch.no_grad():
        for i, hop in enumerate(torch.from_numpy(samples[None]).split(whole.hop, dim=1)):
            probability, *state = whole(hop, *state)
            scored.append(((i + 1) * 0.08, float(torch.logit(probability.double()))))
    expected = [t for t, _, fired in decision.watch(pair for pair in scored if pair[0] >= 1) if fired]
    assert len(found) >= 5 and found == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("suffix", [".onnx", ".ts"])
def test_a_file_names_every_part_of_its_state(suffix):
    content = export.detector(net(), suffix, DESCRIBED)
    if suffix == ".ts":
        extra = {"kws.json": ""}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.load(io.BytesIO(content), _extra_files=extra)
        about = json.loads(extra["kws.json"])
    else:
        about = json.loads(export._session(content).get_modelmeta().custom_metadata_map["kws"])
    whole = export.Detector(StreamingModel(net()), decision=Decision(**DECISION))
    assert list(about["inputs"]) == ["samples", *whole.names] and set(about["first_state"]) == set(whole.names)
    for name, part in zip(whole.names, whole.initial_state(), strict=True):
        first = np.reshape(about["first_state"][name], (1, -1, 1)[: part.dim()])
        filled = torch.from_numpy(np.broadcast_to(first, about["inputs"][name]).astype(np.float32))
        torch.testing.assert_close(filled.clamp_min(-1e6), part.clamp_min(-1e6), atol=1e-4, rtol=0)
    assert about["threshold_logit"] == pytest.approx(0.5 * 1.0 - 1.0) and about["smoothing_steps"] == 2
