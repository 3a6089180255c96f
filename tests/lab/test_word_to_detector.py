"""From a word to a detector: its recipe, its doubts, its folder and its card."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import tone

from kwslib import paths
from kwslib.cli import main
from kwslib.config import SAMPLE_RATE
from kwslib.data import synthesis
from kwslib.lab import detector
from kwslib.lab.study import Study
from kwslib.nets import crnn
from kwslib.streaming import events, tracks
from kwslib.streaming.decision import Decision
from kwslib.training import checkpoints


def test_words_that_make_bad_detectors_are_doubted():
    assert detector.doubts("jarvis") == []
    (short,) = [said for said in detector.doubts("cat") if "syllable" in said]
    assert "take a longer one" in short
    assert any("sounds like" in said and "write" in said for said in detector.doubts("right"))
    (said,) = detector.doubts("happy")
    assert "everyday talk" in said
    with pytest.raises(ValueError, match="cannot speak the keyword"):
        detector.doubts("привет")


def test_what_to_expect_among_people_is_told_by_words_of_like_length():
    assert list(detector.checked("jarvis")) == ["happy"]
    assert {"cat", "stop", "yes"} <= set(detector.checked("go"))
    shares = list(detector.checked("go").values())
    assert shares == sorted(shares)


def test_those_who_judge_do_not_teach():
    voices = synthesis.speakers(600)
    parts = {
        part: {v.partition("_")[0] for v in voices if synthesis.subset_of(v, detector.VOICES) == part}
        for part in ("train", "val", "test")
    }
    assert not (parts["train"] & parts["test"] or parts["train"] & parts["val"] or parts["val"] & parts["test"])
    assert len(parts["train"]) > 60 and min(map(len, parts.values())) >= 8


def test_its_streams_are_those_of_the_studies_a_third_as_long():
    for spec in detector.STREAMS:
        file = replace(tracks.read_spec(paths.stream_spec(spec.name)), minutes=3 * spec.minutes)
        rates = {"fa_per_h": spec.fa_per_h, "least_found": spec.least_found}  # these are its own
        assert replace(spec, minutes=3 * spec.minutes) == replace(file, **rates)


def test_recordings_of_the_keyword_alone_are_doubted(tmp_path):
    rng = np.random.default_rng(0)
    (doubt,) = detector.doubts_of_recordings(_with(tmp_path, "jarvis", rng))
    assert "nothing but 'jarvis'" in doubt and "add other words by the same people" in doubt
    assert detector.doubts_of_recordings(_with(tmp_path, "table", rng)) == []


def _with(tmp_path, word, rng):
    (tmp_path / "mine" / word).mkdir(parents=True)
    for i in range(12):  # names that tell no speakers: they all teach
        soundfile.write(tmp_path / "mine" / word / f"{i}.wav", tone(500.0, rng), SAMPLE_RATE)
    study = detector.study_of("jarvis", str(tmp_path / "mine"), "smoke")
    speakers = study.corpus.clips["speaker"]
    assert set(speakers.iloc[study.split.train]) >= {str(i) for i in range(12)}
    return study


def test_few_recordings_are_heard_often_and_voices_once():
    voices = list(synthesis.speakers(8))

    def heard(n_recorded, n_others, argument="synthetic+mine"):
        clips = pd.DataFrame({"speaker": voices * 40 + ["me"] * (n_recorded + n_others)})
        labels = np.array([0, 1] * 160 + [1] * n_recorded + [0] * n_others)
        given = SimpleNamespace(clips=clips), SimpleNamespace(train=np.arange(len(clips))), labels, argument
        told = SimpleNamespace(**dict(zip(("corpus", "split", "labels", "corpus_argument"), given, strict=True)))
        return np.bincount(Study.heard.func(told), minlength=len(clips))

    often = heard(10, 10)  # 160 clips of the keyword by voices: 80 by people make a third
    assert set(often[:320]) == {1} and set(often[320:]) == {8}
    assert set(heard(2, 0)[320:]) == {20}  # that is the most
    assert set(heard(10, 150)[320:]) == {2}  # nor are they more than the voices'
    assert set(heard(200, 0)) == set(heard(10, 10, "mine")) == {1}


@pytest.mark.slow
def test_a_word_and_a_folder_of_recordings_become_a_detector_with_its_card(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for root, speakers in (("mine", ("me", "you")), ("others", ("a", "b", "f1"))):
        for word, frequency in (("jarvis", 500.0), ("table", 900.0)):
            (tmp_path / root / word).mkdir(parents=True)
            for speaker in speakers:  # f1 is a voice, too, and is not the one that teaches
                file = tmp_path / root / word / f"{speaker}_0.wav"
                soundfile.write(file, tone(frequency, rng), SAMPLE_RATE)
    (tmp_path / "talk").mkdir()
    soundfile.write(tmp_path / "talk" / "radio.wav", rng.standard_normal(20 * SAMPLE_RATE) * 0.1, SAMPLE_RATE)
    folders = ["--recordings", str(tmp_path / "mine"), "--people", str(tmp_path / "others"), "--profile", "smoke"]
    folders += ["--negatives", str(tmp_path / "talk")]
    assert main(["make", "jarvis", *folders]) == 0
    said = capsys.readouterr().out
    made = paths.home() / "detectors" / "jarvis"
    assert {file.name for file in made.iterdir()} == {"card.md", "jarvis.kws", "jarvis.onnx", "index.html"}
    card = (made / "card.md").read_text()
    assert card in said and str(tmp_path) not in card
    assert "| your recordings without it, those that had no say | – |" in card
    assert "and 2 people" in card and '3 recordings of "jarvis" and 3 of other words' in card

    assert "http" not in (made / "index.html").read_text().replace("http://www.w3.org", "")
    study = detector.study_of("jarvis", str(tmp_path / "mine"), "smoke")
    record = json.loads((paths.reports(study.name) / "records" / "detector-seed0.json").read_text())
    ordinary = record["metrics"]["streams"]["points"][0]
    assert f"{ordinary['found']} of {ordinary['keywords']} | {ordinary['false_alarms']} in" in card
    model, sidecar = checkpoints.load(made / "jarvis.kws")
    assert sidecar["keyword"] == "jarvis" and sidecar["decision"] and model.on_streams

    spec = replace(detector.ORDINARY, minutes=detector.ORDINARY.minutes * study.profile.stream_percent / 100)
    steps = sidecar["decision"]["smoothing_steps"]
    for share in detector.PROBABILITIES:  # a plain loop over the means of its last scores
        found = said = false_alarms = 0
        for track in events.score_tracks(model, study.tracks("test", [spec])["ordinary"]):
            means = [track.scores[max(0, i + 1 - steps) : i + 1].mean() for i in range(len(track.scores))]
            threshold = Decision(**sidecar["decision"]).at_probability(share).threshold
            fired = [t for t, _ in events.detect(track.times_s, means, threshold)]
            hits, wrong = events.count_events(fired, track.keywords_s)
            found, said, false_alarms = found + hits, said + len(track.keywords_s), false_alarms + wrong
        assert f"| {share} | {found} of {said} | {false_alarms} |" in card

    test = study.split.test  # a plain loop over what it takes for the keyword
    scores, words = crnn.score(model, study.logmels[test]), study.corpus.clips["word"].to_numpy()[test]
    threshold = np.quantile([score for score, word in zip(scores, words, strict=True) if word != "jarvis"], 0.99)
    for word, share in detector.confused(study, model).items():
        taken = [score > threshold for score, its_word in zip(scores, words, strict=True) if its_word == word]
        assert word != "jarvis" and share == sum(taken) / len(taken) > 0

    monkey = (made / "jarvis.kws").stat().st_mtime_ns
    assert main(["make", "jarvis", *folders]) == 0  # goes on: nothing is trained again
    assert (made / "jarvis.kws").stat().st_mtime_ns > monkey

    people = paths.reports(study.name) / "people.json"
    found = json.loads(people.read_text())
    for runs in ({}, {"detector-seed0": {**found["runs"]["detector-seed0"], "sha256": "of an earlier detector"}}):
        paths.write_json(people, {**found, "runs": runs})
        detector.deliver(study, [])
        assert "it was not tried" in (made / "card.md").read_text()


def test_a_word_nobody_can_say_and_a_folder_that_is_not_there_get_a_sentence(capsys, tmp_path, monkeypatch):
    assert main(["make", "привет"]) == 2
    assert "Latin letters" in capsys.readouterr().err
    assert main(["make", "jarvis", "--recordings", "/nowhere/at/all"]) == 2
    assert "no corpus at /nowhere/at/all" in capsys.readouterr().err
    assert main(["make", "jarvis", "--negatives", "/nowhere/at/all"]) == 2
    assert "no recordings in /nowhere/at/all" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)  # where the shell is, as with any command line tool
    assert main(["make", "jarvis", "--people", "mine"]) == 2
    assert f"no corpus at {tmp_path / 'mine'}" in capsys.readouterr().err
