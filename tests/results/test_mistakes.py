"""What the clip model to take gets wrong: the list, its sound, and where it stands in the report."""

import base64
import io
import json
import shutil
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import soundfile
from torch import nn

from kwslib import audio, paths
from kwslib.lab import reproduce
from kwslib.lab.study import open_study
from kwslib.nets import crnn
from kwslib.results import page, records

REFERENCE = paths.ROOT / "reports" / "reference"
STUDY = "synthetic-sheila-speaker"


def test_a_small_flac_sounds_like_its_clip():
    clip = (9000 * np.sin(np.arange(16_000) / 20) * np.linspace(0, 1, 16_000)).astype(np.int16)
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(audio.small_flac(clip))))
    assert rate == 16_000 and np.abs(heard - clip / np.abs(clip).max()).max() < 0.02  # full scale, eight bits
    assert base64.b64decode(audio.small_flac(np.zeros(16_000, np.int16))).startswith(b"fLaC")


@pytest.mark.parametrize("study", sorted(file.parent.name for file in REFERENCE.glob(f"*/{page.WRONG}")))
def test_published_mistakes_belong_to_the_model_to_take_and_only_voices_are_heard(study):
    found = json.loads((REFERENCE / study / page.WRONG).read_bytes())
    chosen = json.loads((paths.ROOT / "checkpoints" / "reference" / "recommended.json").read_bytes())[study]["clips"]
    assert chosen.startswith(f"{study}/{paths.label(found['experiment'], found['seed'])}.")
    record = records.read(REFERENCE / study / "records" / f"{paths.label(found['experiment'], found['seed'])}.json")
    assert found["missed"]["clips"] == record["metrics"]["n_keyword"]
    assert found["accepted"]["clips"] == record["metrics"]["n_other"]
    for kind, side, alike in (("missed", -1, "speaker"), ("accepted", 1, "word")):
        worst = found[kind]["worst"]
        apart = [side * (clip["score"] - found["threshold"]) for clip in worst]
        assert all(distance >= 0 for distance in apart) and apart == sorted(apart, reverse=True)
        assert len({clip[alike] for clip in worst}) == len(worst) <= 6
        assert sum(clip["alike"] for clip in worst) <= found[kind]["wrong"]
        for clip in worst:
            assert (clip["word"] == record["keyword"]) == (kind == "missed")
            assert bool(clip["flac"]) == study.startswith("synthetic-")


def test_the_counts_are_those_of_the_curve():
    """At so many false accepts the record's own curve has as many misses, up to clips whose scores rounding swaps."""
    found = json.loads((REFERENCE / STUDY / page.WRONG).read_bytes())
    label = paths.label(found["experiment"], found["seed"])
    curve = records.read(REFERENCE / STUDY / "records" / f"{label}.json")["metrics"]["curve"]
    p0 = max(curve["fr"])  # the share of keyword clips there; the rest are others
    missed = [fr for fa, fr in zip(curve["fa"], curve["fr"], strict=True)
              if fa / (1 - p0) <= (found["accepted"]["wrong"] + 0.5) / found["accepted"]["clips"]]  # fmt: skip
    fewer = min(missed) / p0 * found["missed"]["clips"]
    assert fewer - 1 <= found["missed"]["wrong"] <= fewer + 20  # it has the lowest threshold for them


def test_the_worst_of_each_speaker_and_of_each_word_are_found(folder, monkeypatch):
    study = open_study(str(folder), "go")
    clips, n = study.corpus.clips, len(study.corpus.clips)
    scores = np.random.default_rng(1).normal(0, 5, n)
    scores[study.split.val] = 1
    study.__dict__["logmels"] = np.arange(n)  # each clip is its number
    monkeypatch.setattr(crnn, "score", lambda model, rows: scores[rows])
    found = study.mistakes(nn.Identity(), most=2)
    assert found["threshold"] == 1
    for kind, alike in (("missed", "speaker"), ("accepted", "word")):
        of = [row for row in study.split.test if (clips["word"][row] == "go") == (kind == "missed")]
        wrong = [row for row in of if (scores[row] < 1) == (kind == "missed")]
        best = {}
        for row in sorted(wrong, key=lambda row: -abs(scores[row] - 1)):
            best.setdefault(clips[alike][row], row)
        assert (found[kind]["clips"], found[kind]["wrong"]) == (len(of), len(wrong)) and wrong
        for clip, row in zip(found[kind]["worst"], list(best.values())[:2], strict=True):
            assert clip == {
                "word": clips["word"][row],
                "speaker": clips["speaker"][row],
                "score": round(scores[row], 4),
                "alike": sum(clips[alike][other] == clips[alike][row] for other in wrong),
                "alike_clips": sum(clips[alike][other] == clips[alike][row] for other in of),
                "flac": "",  # a recording stays where it is
            }


def test_models_are_not_scored_on_other_clips_than_their_records():
    study = open_study(to_read=True)
    study.__dict__["corpus"] = SimpleNamespace(name="synthetic", fingerprint="another")
    with pytest.raises(records.RecordError, match="are of other clips than synthetic holds now"):
        reproduce.keep_mistakes(study, published=True)


@pytest.fixture
def report(tmp_path):
    """A report with two models, one of them the one to take, and what that one gets wrong."""
    (tmp_path / "records").mkdir()
    for name in ("baseline-seed0", "rival-kd-qat4-seed1"):
        shutil.copy(REFERENCE / STUDY / "records" / f"{name}.json", tmp_path / "records")
    shutil.copy(REFERENCE / STUDY / page.WRONG, tmp_path)
    return tmp_path


def test_the_report_says_what_is_wrong_where_somebody_looked(report):
    shown = page.render(STUDY, report)
    assert 'href="#wrong"' in shown and "of 660 test clips of “sheila” it misses" in shown
    assert shown.count("data-flac=") == 12
    found = json.loads((report / page.WRONG).read_bytes())
    found["missed"] = {"clips": 660, "wrong": 0, "worst": []}
    found["accepted"]["worst"][0] |= {"word": "<b>", "flac": ""}
    (report / page.WRONG).write_text(json.dumps(found))
    shown = page.render(STUDY, report)
    assert "No keyword is missed." in shown and "&lt;b&gt;" in shown and shown.count("data-flac=") == 5
    for damaged in ('{"missed": 1}', "[]", "{"):
        (report / page.WRONG).write_text(damaged)
        with pytest.raises(records.RecordError, match="mistakes.json is not a record .*: delete it"):
            page.render(STUDY, report)
    (report / page.WRONG).unlink()
    assert 'id="wrong"' not in (shown := page.render(STUDY, report)) and "#wrong" not in shown


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_a_mistake_is_heard(tmp_path):
    with browser.Page(REFERENCE / STUDY / "index.html", tmp_path / "profile") as opened:
        opened.run(
            "void (window.Plain = Audio, window.Audio = function (url) { return window.heard = new Plain(url); })"
        )
        opened.run("void document.querySelector('[data-flac]').click()")
        opened.until("window.heard && heard.ended")
        assert opened.run("heard.duration") == pytest.approx(1, abs=0.01) and opened.errors == []
