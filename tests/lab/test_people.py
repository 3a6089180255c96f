import json
import os
import shutil

import numpy as np
import pytest
import soundfile
from conftest import WORDS, tone

from kwslib import metrics, paths
from kwslib.cli import main
from kwslib.config import SAMPLE_RATE, CRNNConfig
from kwslib.data import corpora, features
from kwslib.lab import verify
from kwslib.lab.run import Experiment
from kwslib.lab.study import open_study
from kwslib.lab.workers import run
from kwslib.nets import crnn
from kwslib.results import page, records, tables
from kwslib.training.loop import Training

pytestmark = pytest.mark.slow  # every scoring starts processes of its own
BASELINE = Experiment("baseline", CRNNConfig(2, hidden_size=6, gru_num_layers=1), training=Training(epochs=10))


@pytest.fixture
def study(folder):
    opened = open_study(str(folder), "go", "speaker", "smoke", seeds=2)
    run(opened, [BASELINE])
    return opened


@pytest.fixture
def people(study, folder, tmp_path):
    """Six people who say three words each, one recording of the study, and one by a speaker it was trained on."""
    rng, root = np.random.default_rng(1), tmp_path / "some people"
    trained_on = study.corpus.clips["speaker"].iloc[study.split.train[0]]
    for word, frequency in WORDS.items():
        (root / word).mkdir(parents=True)
        for speaker in [*(f"p{i}" for i in range(6)), *([trained_on] if word == "go" else [])]:
            soundfile.write(root / word / f"{speaker}_nohash_7.wav", tone(1.1 * frequency, rng), SAMPLE_RATE)
    shutil.copy(folder / "stop" / "s03_nohash_0.wav", root / "stop" / "p9_nohash_0.wav")
    return root


def test_every_model_is_scored_on_those_it_was_not_trained_on(study, people, capsys):
    found = verify.score_people(study, str(people))
    assert found == records.people(paths.reports(study.name)) and set(found["runs"]) == {
        "baseline-seed0",
        "baseline-seed1",
    }
    assert (found["n_keyword"], found["n_other"], found["n_speakers"]) == (6, 12, 6)
    assert (found["known_clips"], found["clips_of_known_speakers"], found["resamples"]) == (1, 1, 200)
    assert str(people.parent) not in (paths.reports(study.name) / "people.json").read_text()

    corpus = corpora.load(str(people), "go")
    rows = corpus.clips["clip"].str.contains("/p[0-5]_").to_numpy()
    is_keyword, speakers = corpus.is_keyword("go")[rows], corpus.clips["speaker"].to_numpy()[rows]
    scores = crnn.score(study.model("baseline", 1), features.logmels(corpus))[rows]
    scored = found["runs"]["baseline-seed1"]
    assert scored["miss_at_1pct_fa"] == pytest.approx(
        (scores[is_keyword] <= scores[~is_keyword].max()).mean(), abs=1e-4
    )
    assert scored["au_fa_fr"] == pytest.approx(metrics.au_fa_fr(scores, is_keyword), rel=1e-3)
    drawn = metrics.speaker_weights(speakers, 200)[17]
    assert scored["bootstrap"][17] / records.MISSES_OF == pytest.approx(
        metrics.miss_rate_at(0.01, scores, is_keyword, drawn), abs=5e-4
    )

    summary = study.results().summary
    misses = [run["miss_at_1pct_fa"] for run in found["runs"].values()]
    assert summary.loc["baseline", "people_miss"] == pytest.approx(np.mean(misses))
    shown = page.write(study.name).read_text()
    assert tables.PEOPLE in shown and "6 recordings of go and 12 of other words in some-people, by 6 speakers" in shown
    assert shown.count(tables.SMOKE) == 2 and main(["table", study.name]) == 0
    assert tables.SMOKE in capsys.readouterr().out


def test_what_was_scored_is_not_scored_again(study, people):
    found, file = verify.score_people(study, str(people)), paths.reports(study.name) / "people.json"
    marked = json.loads(file.read_text())
    marked["runs"]["baseline-seed0"]["au_fa_fr"] = 0.5
    marked["runs"]["baseline-seed1"]["sha256"] = "of another checkpoint"
    file.write_text(json.dumps(marked))
    again = verify.score_people(study, str(people))["runs"]
    assert again["baseline-seed0"]["au_fa_fr"] == 0.5 and again["baseline-seed1"] == found["runs"]["baseline-seed1"]
    for other in (json.dumps(marked | {"n_other": 1}), "{"):  # other people, and a damaged file
        file.write_text(other)
        assert verify.score_people(study, str(people)) == found == records.people(paths.reports(study.name))


def test_what_was_scored_before_a_failure_is_kept(study, people):
    os.remove(study.checkpoint("baseline", 1))
    with pytest.raises(ValueError, match="no checkpoint at"):
        verify.score_people(study, str(people))
    assert set(records.people(paths.reports(study.name))["runs"]) == {"baseline-seed0"}


def test_the_shell_says_who_the_people_are_or_what_is_wrong_with_them(study, people, folder, capsys):
    named = ["people", "--corpus", str(folder), "--keyword", "go", "--people"]
    assert main([*named, str(people)]) == 0
    assert "Left out: 1 clips that the study holds itself, 1 by speakers" in capsys.readouterr().out
    assert main(["table", study.name]) == 0
    assert tables.PEOPLE in capsys.readouterr().out
    for wrong, message in (
        ("", "these are no people: give a folder"),
        ("synthetic", "these are no people"),
        ("nowhere", "no corpus at"),
        (
            str(folder),
            "tones leaves 0 clips of 'go' and 0 of other words to score, both are needed: 72 clips are in the",
        ),
    ):
        assert main([*named, wrong]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error
    shutil.rmtree(people / "go")
    assert main([*named, str(people)]) == 2
    assert "the keyword 'go' is not in" in capsys.readouterr().err
