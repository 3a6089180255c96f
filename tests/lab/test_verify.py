import copy
import shutil

import pytest

from kwslib import paths
from kwslib.config import CRNNConfig
from kwslib.lab import verify
from kwslib.lab.run import Experiment
from kwslib.lab.study import open_study
from kwslib.lab.workers import run
from kwslib.results import records
from kwslib.training.loop import Training

BASELINE = Experiment(
    "baseline",
    student=CRNNConfig(cnn_out_channels=2, hidden_size=6, gru_num_layers=1),
    training=Training(epochs=20, batch_size=16),
)


@pytest.fixture
def study(folder, tmp_path, monkeypatch):
    """A study that was run, and published under another root."""
    opened = open_study(str(folder), "go", "speaker", "smoke", seeds=2)
    run(opened, [BASELINE])
    root = tmp_path / "root"
    monkeypatch.setattr(verify, "REFERENCE", root / "reports" / "reference")
    shutil.copytree(records.folder(opened.name), verify.REFERENCE / opened.name / "records")
    shutil.copytree(paths.checkpoints(opened.name), root / "checkpoints" / "reference" / opened.name)
    monkeypatch.setattr(paths, "ROOT", root)
    return opened


def test_a_run_agrees_with_itself(study):
    found = verify.check(study, None)
    assert found["holds"] and found["files"] == found["exact"] == 4  # two seeds, torch file and compact file
    assert all(row["agree"] == row["compared"] for row in found["compared"])
    with pytest.raises(records.RecordError, match="is not among the published studies: tones-go-speaker"):
        verify.check(open_study(keyword="unheard"))


def test_a_study_published_of_other_clips_is_not_compared(study):
    for file in (verify.REFERENCE / study.name / "records").glob("*.json"):
        record = records.read(file)
        record["data"]["corpus_fingerprint"] = "0" * 64
        record["run"].pop("sha256")
        paths.write_json(file, record)
    with pytest.raises(records.RecordError, match="published of other clips than tones holds now"):
        verify.check(study)


def test_every_kind_of_difference_is_named(study):
    fresh = records.load(study.name)

    def differs(change) -> list[str]:
        other = copy.deepcopy(fresh)
        change(other[1])
        table = verify.compare(fresh, other)
        assert set(table["outside"]) <= {"", "baseline-seed1", "baseline"}
        return list(table.index[table["agree"] < table["compared"]])

    assert differs(lambda r: r["data"].update(corpus_fingerprint="0")) == ["corpus", "record"]
    assert differs(lambda r: r["cost"].update(params=1)) == ["params", "record"]
    assert differs(lambda r: r["checkpoint"].update(sha256="0")) == ["checkpoint", "record"]
    assert differs(lambda r: r["run"].update(wall_s=9.0)) == []
    with pytest.raises(records.RecordError, match="no experiment in common"):
        verify.compare(fresh, [])


def test_a_mean_outside_the_published_interval_does_not_hold(study):
    fresh = records.load(study.name)
    worse = copy.deepcopy(fresh)
    for r in worse:
        r["metrics"]["au_fa_fr"] += 0.5
    table = verify.compare(worse, fresh)
    assert table.loc["AU-FA-FR, mean over seeds", "outside"] == "baseline"
    assert table.loc["AU-FA-FR, mean over seeds", "required"]


def test_bytes_are_expected_of_pinned_arithmetic_alone(study):
    fresh = records.load(study.name)

    def row(**other):
        published = copy.deepcopy(fresh)
        for r in published:
            r["checkpoint"]["sha256"] = "0"
            r["run"] |= other
        return verify.compare(fresh, published).loc["checkpoint"]

    for r in fresh:
        r["run"] |= {"cpu_features": "AVX2, pinned"}
    assert row()["required"] and row()["tolerance"] == "byte for byte" and row()["agree"] == 0
    for other, why in (
        ({"cpu_features": "AVX512"}, "published not in pinned arithmetic"),
        ({"device": "cuda"}, "published not in pinned arithmetic"),
        ({"torch": "0.1"}, "another torch"),
    ):
        assert not row(**other)["required"] and row(**other)["tolerance"] == f"byte for byte, not expected: {why}"


def test_fewer_seeds_than_published_are_compared_seed_by_seed(study):
    published = records.load(study.name)
    for r, interval in zip(published, ([0.1, 0.2], [0.4, 0.5]), strict=True):
        r["metrics"]["au_fa_fr_ci95"] = interval
    one = copy.deepcopy(published[:1])

    def outside(low: float, high: float) -> str:
        one[0]["metrics"]["au_fa_fr_ci95"] = [low, high]
        table = verify.compare(one, published)
        assert "AU-FA-FR, mean over seeds" not in table.index
        assert table.loc["AU-FA-FR, seed by seed", "compared"] == 1
        return table.loc["AU-FA-FR, seed by seed", "outside"]

    assert outside(0.3, 0.35) == ""  # between the two seeds
    assert outside(0.69, 0.8) == ""  # 0.1 to 0.5, half of its width more on each side: up to 0.7
    assert outside(0.71, 0.8) == "baseline-seed0"


def test_a_published_file_that_scores_otherwise_is_found(study):
    found = verify.REFERENCE / study.name / "records" / "baseline-seed0.json"
    record = records.read(found)
    record["run"].pop("sha256")
    record["metrics"]["au_fa_fr"] += 1e-3
    paths.write_json(found, record)
    result = verify.check(study, None)
    assert not result["holds"] and result["close"] == 2 and result["largest_difference"] == pytest.approx(1e-3)
