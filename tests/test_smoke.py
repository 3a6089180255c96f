"""The whole chain as a stranger runs it: ``make reproduce`` at the smoke profile, all six notebooks."""

import json
import os
import shutil
import subprocess
import time

import nbformat
import pandas as pd
import pytest

from kwslib import paths
from kwslib.lab.study import open_study
from kwslib.lab.verify import rescore
from kwslib.results import page
from kwslib.training import checkpoints

pytestmark = pytest.mark.slow
STUDY = "synthetic-sheila-speaker"


def make(home, *arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "KWS_HOME": str(home), "WANDB_MODE": "disabled"}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=paths.ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    home = tmp_path_factory.mktemp("a home")  # with a space in its name
    done = make(home, "reproduce", "PROFILE=smoke")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return home, done


def test_it_ends_with_the_table_and_the_page(reproduced):
    home, done = reproduced
    folder = home / "reports" / STUDY
    assert done.stdout.strip().endswith(str(folder / "index.html"))
    assert "a1-kd" in done.stdout and "Its figures mean nothing." in done.stdout
    results = pd.read_csv(folder / "results.csv")
    assert len(results) == len(list((folder / "records").glob("*.json"))) == 153
    assert results["macs_per_clip"].max() == 932_224
    for name in page.NOTEBOOKS:
        assert (folder / "notebooks" / f"{name}.html").stat().st_size > 10_000
        assert nbformat.read(folder / "notebooks" / f"{name}.ipynb", as_version=4).cells
    assert not list((folder / "notebooks").glob("unfinished_*"))
    shown = (folder / "index.html").read_text()
    assert shown.count("<img") >= 6 and 'src="http' not in shown
    assert "Its figures mean nothing." in shown and "Which one should I take?" in shown
    assert "What it gets wrong</h2>" in shown and (folder / page.WRONG).exists()
    for figure in (
        "metric-macs",
        "metric-memory",
        "metric-compact",
        "stream-glued",
        "stream-det-ordinary",
        "stream-det-dense",
        "pruning",
        "latency",
        "gains",
    ):
        assert (folder / "figures" / f"{figure}.svg").exists()


def test_every_checkpoint_loads_and_is_what_its_record_says(reproduced):
    home, _ = reproduced
    for file in (home / "reports" / STUDY / "records").glob("*.json"):
        record = json.loads(file.read_text())
        model, sidecar = checkpoints.load(home / "checkpoints" / STUDY / record["checkpoint"]["file"])
        assert sidecar["sha256"] == record["checkpoint"]["sha256"]
        assert checkpoints.sizes(model).items() <= record["cost"].items()


def test_every_file_scores_as_its_record_says_in_fresh_processes(reproduced, monkeypatch):
    monkeypatch.setenv("KWS_HOME", str(reproduced[0]))
    study = open_study(profile_name="smoke")
    names = list(study.results().summary.index)
    again = rescore(study, names)
    assert len(again) == 2 * len(names) and again["equal"].all(), again[~again["equal"]]


def test_running_it_again_only_redraws(reproduced):
    home, _ = reproduced
    records = home / "reports" / STUDY / "records"
    before = {f: f.stat().st_mtime_ns for f in [*records.iterdir(), *(home / "checkpoints" / STUDY).iterdir()]}
    began = time.monotonic()
    done = make(home, "reproduce", "PROFILE=smoke")
    assert done.returncode == 0 and time.monotonic() - began < 60
    assert "01_split_and_baseline" not in done.stdout and "06_plots" in done.stdout
    assert before == {f: f.stat().st_mtime_ns for f in before}


def test_bad_parameters_stop_make_with_one_sentence(tmp_path):
    for arguments, message in (
        (["PROFILE=fast"], "unknown profile 'fast': choose one of smoke, standard, full"),
        (["CORPUS=/no/such/place"], "no corpus at /no/such/place"),
        (["SPLIT=clip"], "unknown split 'clip'"),
        (["SEEDS=many"], "invalid int value: 'many'"),
        (["KEYWORD=nothing-yet", "report"], "no records in"),
    ):
        done = make(tmp_path, *([] if "report" in arguments else ["reproduce"]), *arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_report_needs_records_only(reproduced, tmp_path):
    home, _ = reproduced
    shutil.copytree(home / "reports" / STUDY / "records", tmp_path / "reports" / STUDY / "records")
    done = make(tmp_path, "report")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "reports" / STUDY / "index.html").exists()
