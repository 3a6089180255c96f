"""One command for a study: what fails, what is said, what can be stopped."""

import os
import signal

import kills
import nbformat
import pytest

from kwslib import paths
from kwslib.config import CRNNConfig
from kwslib.lab import reproduce
from kwslib.lab.run import Experiment
from kwslib.lab.study import open_study
from kwslib.lab.workers import run
from kwslib.results import page, provenance, records
from kwslib.training.loop import Training

pytestmark = pytest.mark.slow
BASELINE = Experiment("baseline", CRNNConfig(2, hidden_size=6, gru_num_layers=1), training=Training(epochs=20))
FINE = "assert (corpus, keyword, split, profile, seeds)[1:] == ('go', 'speaker', 'smoke', 2)"


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A function that writes the notebooks of a repository of its own: the code of their cells but the first."""
    monkeypatch.setenv("PYTHONPATH", str(paths.ROOT))
    monkeypatch.setattr(paths, "ROOT", tmp_path / "root")
    monkeypatch.setattr(reproduce, "STEPS", ["03_kd", "05_quant_fp16"])
    folder = paths.ROOT / "notebooks"
    folder.mkdir(parents=True)
    (paths.ROOT / "kwslib").mkdir()

    def write(**codes: tuple[str, ...]) -> None:
        for name in (*reproduce.STEPS, reproduce.PLOTS):
            given = nbformat.v4.new_code_cell('corpus = keyword = split = profile = ""\nseeds = 0')
            given.metadata["tags"] = ["parameters"]
            cells = [given, *map(nbformat.v4.new_code_cell, codes.get(name[3:].split("_")[0], (FINE,)))]
            kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
            nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")

    provenance.of_run.cache_clear()  # of this repository
    yield write
    provenance.of_run.cache_clear()


@pytest.fixture
def study(folder):
    opened = open_study(str(folder), "go", "speaker", "smoke", seeds=2)
    run(opened, [BASELINE])
    return opened


def test_a_cell_that_fails_stops_neither_others_nor_the_report(study, notebooks, capsys):
    folder = paths.reports(study.name)
    records.note_failure(study.name, "long-ago", 0, "of an earlier run")
    lost = "from kwslib.results import records; records.note_failure('tones-go-speaker', 'lost', 1, 'NotANumber: nan')"
    notebooks(kd=(lost, "raise RuntimeError('no such teacher')", "print('and on')"))
    assert reproduce.reproduce(study) == ["03_kd: RuntimeError: no such teacher", "lost, seed 1: NotANumber: nan"]
    done = {file.name for file in (folder / "notebooks").iterdir()}
    assert {"05_quant_fp16.html", "06_plots.ipynb", "unfinished_03_kd.ipynb"} <= done and "03_kd.ipynb" not in done
    assert "and on" in (folder / "notebooks" / "unfinished_03_kd.ipynb").read_text()
    log = (folder / "run.log").read_text()
    assert "FAILED 03_kd: RuntimeError" in log and "05_quant_fp16 took" in log and "commit" in log
    assert "FAILED lost, seed 1" in capsys.readouterr().out
    with pytest.raises(records.RecordError, match="tones-go-speaker is not complete, these runs failed: lost-seed1"):
        page.publish(study.name)

    notebooks()
    assert reproduce.reproduce(study, quiet=True) == []
    assert capsys.readouterr().out == ""
    assert not (folder / "notebooks" / "unfinished_03_kd.ipynb").exists() and not records.failures(folder)
    assert reproduce.reproduce(study) == []
    assert capsys.readouterr().out.startswith("06_plots ...")  # nothing else was left to do
    who = study.corpus_argument  # no other people: the report comes all the same, and no notebook runs again
    assert "people: tones leaves 0 clips of 'go'" in reproduce.reproduce(study, quiet=True, people=who)[0]
    assert "FAILED people: tones leaves 0 clips" in capsys.readouterr().out
    (folder / "notebooks" / "03_kd.html").unlink()
    assert reproduce.reproduce(study) == []
    assert "03_kd ..." in capsys.readouterr().out


def test_there_is_something_to_read_after_the_first_notebook(study, notebooks, capsys):
    page_now = f"text = open({str(paths.reports(study.name) / 'index.html')!r}).read()"
    notebooks(
        quant=(page_now, "assert 'still running' in text and '05_quant_fp16 to come, ' in text and ' left' in text")
    )
    assert reproduce.reproduce(study) == []
    assert f"to read so far: {paths.reports(study.name) / 'index.html'}" in capsys.readouterr().out
    assert "still running" not in (paths.reports(study.name) / "index.html").read_text()


def test_progress_counts_work_not_runs(study, monkeypatch):
    expected = {"baseline-seed0": 60.0, "baseline-seed1": 60.0, "large-seed0": 1880.0}
    monkeypatch.setattr(reproduce, "expected_s", lambda _: expected)
    monkeypatch.setattr(reproduce, "cpu_count", lambda: 2)
    said = []
    seen = {}
    monkeypatch.setattr(reproduce, "_modified", lambda _: dict(seen))
    with reproduce._progress(study, said.append, True) as look:
        seen["baseline-seed0"] = 1
        left = look()
    assert said[0].startswith("  3% of the work, 1 of 3 runs: baseline, seed 0: AU-FA-FR")
    # 1940 s of work are open: two at a time, 600 s of which are believed before the first 60 took no time at all
    assert said[0].endswith(f"; {left}") and left == reproduce.time_left(1940 * 300 / 660)


def test_nothing_to_draw_is_said_with_the_reason(folder, notebooks, capsys):
    notebooks(kd=("raise RuntimeError('no cluster')",))
    study = open_study(str(folder), "go", "speaker", "smoke", seeds=2)
    assert reproduce.reproduce(study, quiet=True) == ["03_kd: RuntimeError: no cluster"]
    assert "FAILED 03_kd: RuntimeError: no cluster" in capsys.readouterr().out


def test_it_is_stopped_by_ctrl_c_and_leaves_nobody_behind(folder, tmp_path):
    home, log = tmp_path / "home", tmp_path / "log"
    command = ["python", "-m", "kwslib", "reproduce", "--corpus", str(folder), "--keyword", "go", "--profile", "smoke"]
    process = kills.started([kills.sys.executable, *command[1:]], home, log)
    while not list(home.glob("checkpoints/*/*.resume")):
        kills.time.sleep(0.1)
        assert process.poll() is None, log.read_text()
    members = kills.tree(process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert "stopped; what was finished is kept" in log.read_text() and "Traceback" not in log.read_text()
    assert kills.gone(members) == []


def test_time_left_is_known_from_the_published_runs():
    expected = reproduce.expected_s(open_study())
    assert len(expected) == 153 * 3 and all(seconds > 0 for seconds in expected.values())
    assert sum(reproduce.expected_s(open_study(profile_name="smoke")).values()) < sum(expected.values()) / 20


def test_kill_minus_nine_changes_no_byte(folder, tmp_path):
    """A short one; fifty kills, and those of the whole chain, are in ``kills.py``."""
    found = kills.survive(kills.commands(folder, make=False), tmp_path, kills=4, seed=1)
    assert found["kills"] == 4 and found["survivors"] == 0
    assert found["different"] == [] and found["files_compared"] >= 24
