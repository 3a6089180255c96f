"""The report's player says what Python says: its code in a JavaScript engine, its page in a browser if there is one."""

import base64
import json
import struct
import zlib
from functools import cache
from itertools import product

import browser
import numpy as np
import pytest
import soundfile
import torch

from kwslib import paths
from kwslib.config import SAMPLE_RATE, CRNNConfig, FeatureConfig, describe
from kwslib.data.features import LogMel
from kwslib.nets.rivals import FoldedTimeNetConfig, SeparableConfig, TimeNetConfig, build
from kwslib.streaming import listen, player
from kwslib.streaming.decision import Decision, read_decision
from kwslib.streaming.events import detect, smoothed
from kwslib.streaming.model import StreamingModel, carried_scores
from kwslib.streaming.tracks import Track
from kwslib.training import checkpoints, compact
from kwslib.training.quantize import PRECISIONS

py_mini_racer = pytest.importorskip("py_mini_racer")
CODE = (player.HERE / "player.js").read_text()
SIZES = {
    "TimeNet": TimeNetConfig(),
    "another TimeNet": TimeNetConfig((7, 5), (5, 3), (2, 3)),
    "a folded TimeNet": FoldedTimeNetConfig((7, 5), (5, 3), (2, 3)),
    "every sixth frame": TimeNetConfig((7, 5), (4, 3), (1, 1), hop_ms=60),
    "CRNN": CRNNConfig(),
    "RNN": CRNNConfig(3, hidden_size=20, gru_num_layers=1, attention_size=5, cell="rnn"),
    "separable": CRNNConfig(4, (9, 12), (3, 5), hidden_size=11, attention_size=0, separable=True),
}
DECISION = {"threshold": 0.2, "smoothing_steps": 3, "refractory_s": 0.7, "scale": 1.5, "offset": -0.3}
PUBLISHED = paths.ROOT / "checkpoints" / "reference" / "synthetic-sheila-speaker" / "brook-stream-qat4-seed0.kws"


@cache
def minute() -> np.ndarray:
    """Noise of every level, and digital silence, at 16 kHz."""
    rng = np.random.default_rng(0)
    levels = 10 ** rng.uniform(-4, -0.5, 60)
    levels[[7, 8, 30]] = 0
    samples = (rng.normal(size=(60, SAMPLE_RATE)) * levels[:, None]).reshape(-1)
    return np.clip(samples, -1, 1).astype(np.float32)


@torch.no_grad()
def made(sizes, precision: str = "float32") -> bytes:
    """The compact file of an untrained net; its normalisation layers have seen noise."""
    torch.manual_seed(1)
    model = build(sizes).train()
    for _ in range(3):
        model(LogMel()(torch.randn(8, SAMPLE_RATE) * 0.1))
    model = (PRECISIONS[precision] or (lambda same: same))(model.eval())
    about = {"keyword": "wörd", "decision": DECISION, "model": describe(sizes), "features": describe(FeatureConfig())}
    return checkpoints.compact_bytes(model, about)


@pytest.fixture(scope="module")
def engine():
    context = py_mini_racer.MiniRacer()
    context.eval(CODE)
    return context


def ask(engine, file: bytes, samples: np.ndarray = np.zeros(0), chunk: int = 777) -> dict:
    """What the player computes: scores and events, or the sentence with which it refuses."""
    return json.loads(
        engine.eval(f"""(function () {{
        const samples = Float32Array.from({samples.tolist()});
        try {{
            const detector = kws.detector(Uint8Array.from({list(file)})), made = kws.decision(detector.about);
            let scored = [];
            for (let i = 0; i < samples.length; i += {chunk})
                scored = scored.concat(detector.feed(samples.subarray(i, i + {chunk})));
            const smooth = kws.smoothed(scored, made.smoothing_steps);
            return JSON.stringify({{
                about: detector.about, scored: scored, limit: made.at(made.probability(made.threshold)),
                chances: smooth.map(pair => made.probability(pair[1])),
                fired: kws.events(smooth, made.threshold, made.refractory_s).map(pair => pair[0]) }});
        }} catch (error) {{ return JSON.stringify({{ error: error.message }}); }}
    }})()""")
    )


def agrees(engine, file: bytes, tmp_path, tolerance: float = 1e-4) -> None:
    (tmp_path / "net.kws").write_bytes(file)
    model, about = checkpoints.load(tmp_path / "net.kws")
    decision = read_decision(about) or Decision()
    times, scores = carried_scores(StreamingModel(model), minute())
    said = ask(engine, file, minute())
    assert len(said["scored"]) == len(scores) > 300 and said["about"]["keyword"] == about["keyword"]
    theirs = np.array(said["scored"])
    assert np.abs(theirs[:, 0] - times).max() < 1e-9 and np.abs(theirs[:, 1] - scores).max() < tolerance
    smooth = smoothed(scores, decision.smoothing_steps)
    assert np.abs(np.array(said["chances"]) - decision.probability(smooth)).max() < tolerance
    assert abs(said["limit"] - decision.threshold) < 1e-9
    assert said["fired"] == [t for t, _ in detect(times, smooth, decision.threshold, decision.refractory_s)]


@pytest.mark.parametrize(("name", "precision"), [*product(SIZES, ("float32", "weight-int4")), ("CRNN", "weight-int8")])
def test_it_scores_a_minute_as_python_does(engine, name, precision, tmp_path):
    agrees(engine, made(SIZES[name], precision), tmp_path)


def test_it_scores_a_minute_as_python_does_with_a_detector_that_was_trained(engine, tmp_path):
    agrees(engine, PUBLISHED.read_bytes(), tmp_path)


def test_half_precision_is_read_and_computed_more_exactly(engine, tmp_path):
    agrees(engine, made(SIZES["TimeNet"], "float16"), tmp_path, tolerance=2e-2)


def test_how_sound_is_cut_does_not_matter(engine):
    file, samples = made(SIZES["CRNN"]), minute()[: 3 * SAMPLE_RATE]
    assert ask(engine, file, samples, 1) == ask(engine, file, samples, 5000) == ask(engine, file, samples, 160)


def test_what_it_cannot_run_gets_a_sentence(engine):
    file = bytearray(made(SIZES["TimeNet"]))
    assert "begins with KWS1" in ask(engine, b"RIFF0000WAVE")["error"]
    assert "begins with KWS1" in ask(engine, b"")["error"]
    file[600] ^= 1
    assert ask(engine, bytes(file))["error"].startswith("This detector is damaged: its checksum does not fit.")
    shorter = made(SIZES["TimeNet"])[:-6]
    shorter += struct.pack("<I", zlib.crc32(shorter))
    assert "does not fit its description" in ask(engine, shorter)["error"]
    assert "int8 run in Python only" in ask(engine, made(SIZES["CRNN"], "int8"))["error"]
    assert "act8 run in Python only" in ask(engine, made(SIZES["CRNN"], "weight-int4-act8"))["error"]
    assert "LSTM run in Python only" in ask(engine, made(CRNNConfig(cell="lstm")))["error"]
    assert "reads whole clips" in ask(engine, made(SeparableConfig()))["error"]
    centered = {"model": describe(CRNNConfig()), "precision": "float32", "features": {"framing": "centered"}}
    assert "centered clips" in ask(engine, compact.pack(centered, []))["error"]


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 96000])
def test_a_microphone_of_any_rate_is_heard_at_16_khz(engine, rate):
    t = np.arange(rate) / rate
    sound = (0.3 * np.sin(2 * np.pi * 440 * t) + 0.1 * np.sin(2 * np.pi * 2600 * t)).astype(np.float32)
    code = f"""(function () {{ const at16k = kws.resampler({rate}), sound = Float32Array.from({sound.tolist()});
        let out = [];
        for (let i = 0; i < sound.length; i += 1000) out = out.concat(Array.from(at16k(sound.subarray(i, i + 1000))));
        return JSON.stringify(out); }})()"""
    heard = np.array(json.loads(engine.eval(code)))
    wanted = np.concatenate(list(listen.resampled([sound], rate)))
    assert 0.99 * SAMPLE_RATE < len(heard) <= SAMPLE_RATE + 1
    assert np.abs(heard - wanted[: len(heard)])[500:-500].max() < 2e-3


def test_the_player_is_small_and_asks_for_nothing():
    assert len(CODE.encode()) <= 30_000
    assert not any(
        word in CODE for word in ("fetch(", "XMLHttpRequest", "import(", "http", "innerHTML = clip", "eval(")
    )


def test_a_notebook_and_its_export_get_one_piece_of_html(tmp_path):
    track = Track(np.array([0.5, -1.5, 2.0], np.float32), [(0.0, 1.0)])
    (tmp_path / "net.kws").write_bytes(made(SIZES["RNN"], "weight-int4"))
    shown = player.player(tmp_path / "net.kws", {"</script> <b>": track})
    text = shown._repr_html_()
    assert "The detector net listens" in repr(shown)
    assert text.count("</script>") == 2 and "kwsPlayer.all();" in text and "<script src" not in text
    (clip,) = shown.given["clips"]
    assert np.frombuffer(base64.b64decode(clip["samples"]), "<i2").tolist() == [16384, -32768, 32767]
    assert base64.b64decode(shown.given["kws"]) == (tmp_path / "net.kws").read_bytes() and shown.given["name"] == "net"
    with pytest.raises(checkpoints.CheckpointError, match="no checkpoint at"):
        player.player(tmp_path / "missing.kws", track)


def test_a_report_keeps_the_recommended_detector_or_else_the_smallest(home, monkeypatch):
    monkeypatch.setattr(player, "spoken", lambda keyword: None)
    folder = home / "checkpoints" / "a-b-c"
    assert player.keep("a-b-c", "b") is None and player.kept(home / "reports" / "a-b-c") is None
    for name, size in (("x-stream-seed0", 9), ("x-stream-qat4-seed0", 5), ("x-stream-qat4-seed1", 4), ("x-seed0", 1)):
        paths.write_atomically(folder / f"{name}.kws", b"." * size)
    player.keep("a-b-c", "b")
    assert player.kept(home / "reports" / "a-b-c")["name"] == "x-stream-qat4-seed0"
    chosen = {"a-b-c": {"stream": "x-stream-qat4-seed1.pt", "clips": "x-seed0.pt"}}
    paths.write_json(home / "checkpoints" / "reference" / player.RECOMMENDED, chosen)
    player.keep("a-b-c", "b")
    assert player.kept(home / "reports" / "a-b-c")["name"] == "x-stream-qat4-seed1"


def test_the_spoken_track_is_the_same_every_time_and_never_stops_a_report():
    track = player.spoken("sheila")
    assert len(track.samples) == player.SPOKEN_S * SAMPLE_RATE and len(track.keywords_s) == 2
    assert np.array_equal(track.samples, player.spoken("sheila").samples)
    model, about = checkpoints.load(PUBLISHED)
    found = read_decision(about).watch(zip(*carried_scores(StreamingModel(model), track.samples), strict=True))
    assert [any(a < t < b + 0.5 for a, b in track.keywords_s) for t, _, begins in found if begins] == [True, True]
    assert player.spoken("快乐") is None


@pytest.fixture
def page(tmp_path):
    """A page with two players: one speaks, the other has nothing to play."""
    track = player.spoken("sheila")
    soundfile.write(tmp_path / "spoken.wav", track.samples, SAMPLE_RATE)
    players = [player.player(PUBLISHED, clips)._repr_html_() for clips in ({"Synthetic voices": track}, {})]
    (tmp_path / "page.html").write_text(f"{HEAD}{''.join(players)}")
    return tmp_path / "page.html"


HEAD = "<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>Two</title>"
PRESS = "[...document.querySelectorAll('button')].find(b => b.textContent.includes('{}')).click()"
REACHED = "[...document.querySelectorAll('li')].every(l => parseFloat(l.textContent.split(', ')[1]) >= {})"
STATUS = "document.querySelector('.kws-status').textContent"


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_clips_and_the_microphone_are_heard(page, tmp_path):
    with browser.Page(page, tmp_path / "profile", microphone=tmp_path / "spoken.wav") as opened:
        opened.until(f"{STATUS}.startsWith('Synthetic voices: “sheila” was detected 2 times in 8.0 s.')")
        opened.run(PRESS.format("Synthetic voices"))
        opened.until("document.querySelector('meter').value > -60")  # it plays
        opened.run(PRESS.format("Microphone"))
        opened.until(f"/^Microphone: “sheila” was detected [2-9]/.test({STATUS})", 60)  # it speaks over and over
        opened.run(PRESS.format("Microphone"))
        assert opened.run(REACHED.format(70)) and not opened.run(REACHED.format(99))
        opened.run(
            "(s => { s.value = 99; s.dispatchEvent(new Event('input')) })(document.querySelector('[type=range]'))"
        )
        opened.until("document.querySelector('output').textContent === '99 %'")
        assert opened.run(REACHED.format(99))
        for name in ("Microphone", "Synthetic voices"):  # pressed again before it began
            opened.run("; ".join([PRESS.format(name)] * 2))
        opened.until(f"{STATUS}.startsWith('Synthetic voices: ')")
        assert opened.run("document.querySelectorAll('[aria-pressed=true]').length") == 0
        assert opened.run("document.querySelectorAll('.kws-player canvas').length") == 2
        assert opened.errors == []


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
def test_on_a_phone_nothing_overflows_and_errors_are_sentences(page, tmp_path):
    drop = """(file => {{ const data = new DataTransfer(); data.items.add(file);
        document.querySelector('.kws-player').dispatchEvent(new DragEvent('drop', {{ dataTransfer: data }})) }})
        (new File([Uint8Array.from({})], 'dropped'))"""
    with browser.Page(page, tmp_path / "profile", width=390) as opened:
        opened.until(f"{STATUS}.includes('detected 2 times')")
        assert opened.run("document.documentElement.scrollWidth") <= 390
        opened.run(PRESS.format("Microphone"))
        opened.until(f"{STATUS}.startsWith('There is no microphone')")
        opened.run(drop.format(list(b"no sound at all")))
        opened.until(f"{STATUS}.startsWith('dropped is not a sound')")
        opened.run(drop.format(list((tmp_path / "spoken.wav").read_bytes())))
        opened.until(f"{STATUS}.startsWith('dropped: “sheila” was detected 2 times in 8.0 s')")
        assert opened.errors == []
