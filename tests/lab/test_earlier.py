"""What becomes of a result when its recipe changes, and what is taken from the published ones instead of training."""

import dataclasses
import shutil

import pytest

from kwslib import paths
from kwslib.config import CRNNConfig
from kwslib.lab import reproduce, verify
from kwslib.lab.run import Experiment
from kwslib.lab.study import ExperimentError, open_study
from kwslib.lab.workers import run
from kwslib.nets.losses import Labels, SoftTargets
from kwslib.results import page, records
from kwslib.training.loop import Training

TINY = CRNNConfig(cnn_out_channels=2, hidden_size=6, gru_num_layers=1)
QUICK = Training(epochs=20, batch_size=16)  # the smoke profile makes 1 of them
BASELINE = Experiment("baseline", student=TINY, training=QUICK)
COLD = Experiment(
    "student",
    student=TINY,
    teacher="baseline",
    losses=(Labels(0.4), SoftTargets(0.6, 10.0)),
    training=QUICK,
    control="baseline",
)
WARM = dataclasses.replace(COLD, losses=(Labels(0.4), SoftTargets(0.6, 2.0)))


@pytest.fixture
def study(folder):
    return open_study(str(folder), "go", "speaker", "smoke", seeds=1)


def publish(study, tmp_path, monkeypatch) -> None:
    """Move all that the study has to where published results are; large compact files are left out there."""
    root = tmp_path / "root"
    monkeypatch.setattr(paths, "ROOT", root)
    monkeypatch.setattr(verify, "REFERENCE", root / "reports" / "reference")
    shutil.copytree(records.folder(study.name), verify.REFERENCE / study.name / "records")
    published = shutil.copytree(paths.checkpoints(study.name), root / "checkpoints" / "reference" / study.name)
    (published / "baseline-seed0.kws").unlink()
    shutil.rmtree(paths.checkpoints(study.name))
    shutil.rmtree(paths.reports(study.name))


def content(study) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in paths.checkpoints(study.name).iterdir()}


def test_the_result_of_another_recipe_stays_and_is_loaded_when_the_recipe_comes_back(study, trained):
    run(study, [BASELINE, COLD])
    before, record = content(study), records.read(records.path(study.name, "student", 0))
    warm = run(study, [BASELINE, WARM])
    assert len(warm.records) == 2  # what stays is none of the study's results
    page.write(study.name)
    assert trained == ["baseline-seed0", "student-seed0", "student-seed0"]

    back = run(study, [BASELINE, COLD])
    assert len(trained) == 3 and content(study) == before
    assert records.read(records.path(study.name, "student", 0)) == record
    (kept,) = (paths.reports(study.name) / "earlier").iterdir()
    assert kept.name == f"student-seed0.{warm.records[1]['identity']}"
    assert "| losses[1].temperature | 10.0 | 2.0 |" in back.compare("student").data


def test_old_and_new_stand_side_by_side(folder):
    study = open_study(str(folder), "go", "speaker", "smoke", seeds=2)
    results = run(study, [BASELINE, COLD])
    assert "nothing older than this of `student`" in results.compare("student").data
    with pytest.raises(ExperimentError, match="'nobody' has no result yet"):
        results.compare("nobody")
    run(study, [WARM])
    larger = dataclasses.replace(WARM, student=dataclasses.replace(TINY, hidden_size=8))
    rows = run(study, [larger]).compare("student").data.splitlines()
    table = {cells[1]: cells[2:-1] for cells in ([cell.strip() for cell in row.split("|")] for row in rows)}
    assert table["what"][0] == "now" and all(title.startswith("until ") for title in table["what"][1:])
    assert table["student.hidden_size"] == ["8", "6", "6"]
    assert table["losses[1].temperature"] == ["2.0", "2.0", "10.0"]
    assert table["seeds"] == ["2", "2", "2"]
    assert not {"control", "note", "training.epochs"} & set(table)  # what did not change
    gain = table["gain of now over it ×1e5 ↑"]
    now, last, first = (float(cell.strip("*")) for cell in table["AU-FA-FR ×1e5 ↓"])
    assert gain[0] == "–" and float(gain[1].split()[0]) == pytest.approx(last - now, abs=0.011)
    assert float(gain[2].split()[0]) == pytest.approx(first - now, abs=0.011)
    # The same clips and seeds are drawn for all, so what was put aside has the interval that it had.
    assert table["95 % interval"][2] == results.table("student").data.splitlines()[2].split("|")[3].strip()
    for file in table["file"]:
        assert "student-seed0" in file
        assert (paths.home() / file.strip("`")).with_suffix(".json").exists()


def test_what_learnt_from_another_teacher_is_told_apart_though_its_recipe_is_the_same(study):
    run(study, [BASELINE, COLD])
    other = dataclasses.replace(BASELINE, student=dataclasses.replace(TINY, cell="rnn"))
    text = run(study, [other, COLD]).compare("student").data
    assert (
        "losses" not in text and "Of the same recipe and data, built on other models or by other code: until " in text
    )


def test_a_recipe_that_fails_takes_the_old_result_away_but_not_for_good(study, trained):
    run(study, [BASELINE])
    before = content(study)
    broken = dataclasses.replace(BASELINE, student=CRNNConfig(kernel_size=(5, 200)))  # longer than a clip
    with pytest.raises(ExperimentError, match="1 runs failed"):
        run(study, [broken])
    assert content(study) == {}
    trained.clear()
    run(study, [BASELINE])
    assert content(study) == before and not trained


def test_a_published_result_is_taken_where_that_is_asked_for(study, trained, tmp_path, monkeypatch):
    run(study, [BASELINE, COLD])
    before, expected = content(study), records.load(study.name)
    publish(study, tmp_path, monkeypatch)
    trained.clear()
    monkeypatch.setenv("KWS_PUBLISHED", "1")
    taken = run(study, [BASELINE, WARM])
    assert trained == ["student-seed0"]
    assert {name: file for name, file in content(study).items() if name.startswith("baseline")} == {
        name: file for name, file in before.items() if name.startswith("baseline")
    }
    found = taken.records[0]
    assert found["run"].pop("copy_of_published") and found["run"].pop("sha256") == expected[0]["run"].pop("sha256")
    assert found == expected[0]  # its times and machine are those of whoever published it
    assert "| what | now | published |" in taken.compare("student").data
    trained.clear()
    run(study, [BASELINE, COLD])
    assert not trained and content(study) == before


def test_a_reproduction_trains_what_was_taken(study, trained, tmp_path, monkeypatch):
    run(study, [BASELINE])
    publish(study, tmp_path, monkeypatch)
    monkeypatch.setenv("KWS_PUBLISHED", "1")
    run(study, [BASELINE])
    assert verify.check(study)["compared"] == []  # a copy agrees with itself, which says nothing
    trained.clear()
    monkeypatch.setenv("KWS_PUBLISHED", "0")
    results = run(study, [BASELINE])
    assert trained == ["baseline-seed0"] and "copy_of_published" not in results.records[0]["run"]
    assert verify.check(study)["compared"][0]["compared"] == 1


def test_published_results_of_other_clips_are_not_taken(study, trained, tmp_path, monkeypatch, folder):
    run(study, [BASELINE])
    publish(study, tmp_path, monkeypatch)
    trained.clear()
    monkeypatch.setenv("KWS_PUBLISHED", "1")
    next((folder / "go").glob("*.wav")).unlink()
    fewer = open_study(str(folder), "go", "random", "smoke", seeds=1)
    shutil.copytree(verify.REFERENCE / study.name, verify.REFERENCE / fewer.name)
    reference = paths.ROOT / "checkpoints" / "reference"
    shutil.copytree(reference / study.name, reference / fewer.name)
    run(fewer, [BASELINE])
    assert trained == ["baseline-seed0"]


def test_the_bar_says_what_was_loaded_and_what_is_trained(study, capsys):
    run(study, [BASELINE])
    assert "0 loaded, 1 of 1 trained: baseline-seed0" in capsys.readouterr().err
    run(study, [BASELINE, WARM])
    assert "1 loaded, 1 of 1 trained: student-seed0" in capsys.readouterr().err
    run(study, [BASELINE, COLD])
    run(study, [BASELINE, WARM])
    assert "2 loaded (1 earlier), nothing to train" in capsys.readouterr().err


def test_notebooks_of_a_reproduction_are_told_to_train(study, tmp_path, monkeypatch):
    told = {}

    def started(command, env, **_):
        told.update(env)
        raise KeyboardInterrupt

    monkeypatch.setenv("KWS_PUBLISHED", "1")  # a terminal inside JupyterLab
    monkeypatch.setattr(reproduce.subprocess, "Popen", started)
    with pytest.raises(KeyboardInterrupt):
        reproduce.execute(study, "01_split_and_baseline", reproduce.Log(tmp_path / "log"))
    assert told["KWS_PUBLISHED"] == "0"
