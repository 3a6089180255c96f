"""What can go wrong on other people's machines, and that nothing computed is lost by it."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import kills
import pytest
import torch

from kwslib import paths, processes
from kwslib.config import CRNNConfig
from kwslib.lab import workers
from kwslib.lab.run import Experiment
from kwslib.lab.study import ExperimentError, open_study
from kwslib.lab.workers import run
from kwslib.nets.losses import Labels
from kwslib.results import page, records, tracking
from kwslib.training.loop import Training

TINY = CRNNConfig(cnn_out_channels=2, hidden_size=6, gru_num_layers=1)
QUICK = Training(epochs=40, batch_size=16)  # the smoke profile makes 2 of them
BASELINE = Experiment("baseline", student=TINY, training=QUICK)


@dataclass(frozen=True)
class Sick:
    """A loss that goes wrong in the runs of one seed, in the way that is asked for; elsewhere that of the labels."""

    how: str
    seed: int = 1
    once: str = ""  # a file: when it is there, all is well
    needs_teacher = False
    reads = ()

    def __call__(self, student, teacher, labels, helper):
        loss = Labels()(student, teacher, labels, helper)
        if torch.initial_seed() != self.seed or (self.once and Path(self.once).exists()):
            return loss
        if self.once:
            Path(self.once).touch()
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss * float("nan")


def sick(how: str, **where) -> Experiment:
    return Experiment("sick", student=TINY, training=QUICK, losses=(Sick(how, **where),))


@pytest.fixture
def study(folder):
    return open_study(str(folder), "go", "speaker", "smoke", seeds=2)


def test_a_loss_that_is_no_number_stops_its_seed_and_nothing_else(study):
    depends = Experiment("depends", start="sick", control="sick")
    with pytest.warns(UserWarning, match="2 runs failed, the others are kept.*the loss became nan: lower the"):
        results = run(study, [BASELINE, sick("nan"), depends])
    assert results.summary["seeds"].to_dict() == {"baseline": 2, "sick": 1, "depends": 1}
    failed = {(f["experiment"], f["seed"]): f["error"] for f in records.failures(paths.reports(study.name))}
    assert failed["sick", 1].startswith("NotANumber") and failed["depends", 1] == "needs sick-seed1, which failed"
    assert "What failed" in (shown := page.write(study.name).read_text()) and "<b>sick</b>, seed 1: NotANumber" in shown
    with pytest.warns(UserWarning, match="1 runs failed.*later-seed1: needs sick-seed1, which failed"):  # elsewhere
        assert run(study, [Experiment("later", start="sick")]).summary.loc["later", "seeds"] == 1
    run(study, [Experiment("sick", student=TINY, training=QUICK), depends])  # a cure
    assert [f["experiment"] for f in records.failures(paths.reports(study.name))] == ["later"]


def test_a_seed_that_fails_is_not_averaged_with_what_it_was_under_another_recipe(study):
    run(study, [Experiment("sick", student=TINY, training=QUICK)])
    with pytest.warns(UserWarning, match="1 runs failed"):
        assert run(study, [sick("nan")]).summary.loc["sick", "seeds"] == 1
    assert not study.checkpoint("sick", 1).exists()
    one = open_study(study.corpus_argument, "go", "speaker", "smoke", seeds=1)
    with pytest.raises(ExperimentError, match="all-seed0: the loss|all-seed0: NotANumber"):  # none of its seeds is left
        run(one, [Experiment("all", student=TINY, training=QUICK, losses=(Sick("nan", seed=0),)), BASELINE])
    assert one.results().summary.loc["baseline", "seeds"] == 1
    with pytest.raises(ExperimentError, match="child-seed0: needs all-seed0, which failed"):
        run(one, [Experiment("child", start="all"), Experiment("other", start="baseline", control="all")])
    assert "other" in one.results().summary.index


def test_a_killed_worker_costs_nothing_but_time(study, tmp_path, home):
    marker = tmp_path / "it happened"
    results = run(study, [BASELINE, sick("killed", once=str(marker))])
    assert marker.exists() and results.summary["seeds"].to_dict() == {"baseline": 2, "sick": 2}
    first = kills.stable(home)
    for file in [*paths.checkpoints(study.name).iterdir(), *records.folder(study.name).iterdir()]:
        file.unlink()
    run(study, [BASELINE, sick("killed", once=str(marker))])
    assert kills.stable(home) == first


def test_a_run_that_is_killed_again_and_again_is_given_up_and_named(study):
    with pytest.warns(UserWarning, match="sick-seed1: its process was killed twice, for want of memory perhaps"):
        results = run(study, [BASELINE, sick("killed")])
    assert results.summary["seeds"].to_dict() == {"baseline": 2, "sick": 1}


def test_trainings_that_are_too_many_for_a_gpu_are_tried_one_at_a_time(study, tmp_path):
    marker = tmp_path / "it happened"
    assert run(study, [sick("gpu", once=str(marker))]).summary.loc["sick", "seeds"] == 2
    assert marker.exists()
    never = Experiment("never", student=TINY, training=QUICK, losses=(Sick("gpu"),))
    with pytest.warns(UserWarning, match="never-seed1: out of memory: CUDA out of memory.*trains on the CPU"):
        run(study, [never])


def test_without_a_gpu_the_cpu_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert workers.device() == "cpu"


@pytest.mark.parametrize("suffix", [".pt", ".json", ".kws"])
@pytest.mark.parametrize("how", ["cut off", "edited"])
def test_a_damaged_file_of_a_checkpoint_is_made_anew(study, suffix, how):
    run(study, [BASELINE])
    file = study.checkpoint("baseline").with_suffix(suffix)
    before = file.read_bytes()
    edited = before[:-9] + b"x" + before[-8:]
    if suffix == ".json":
        edited = before.replace(b'"threshold": ', b'"threshold": 1', 1)
    file.write_bytes(before[: len(before) // 2] if how == "cut off" else edited)
    run(study, [BASELINE])
    assert file.read_bytes() == before


def test_an_edited_record_is_noticed_and_made_anew(study):
    run(study, [BASELINE])
    file = records.path(study.name, "baseline", 1)
    before = json.loads(file.read_text())
    better = before | {"metrics": before["metrics"] | {"au_fa_fr": 0.25}}
    file.write_text(json.dumps(better))
    with pytest.raises(records.RecordError, match="baseline-seed1.json was edited after it was written: restore it"):
        page.write(study.name)
    run(study, [BASELINE])
    assert records.read(file)["metrics"] == before["metrics"]


def test_jumps_of_the_clock_train_nothing_again(study, folder, monkeypatch):
    run(study, [BASELINE])
    everything = [*folder.rglob("*.*"), *paths.data().rglob("*"), *paths.reports(study.name).rglob("*.*")]
    for i, file in enumerate([*everything, *paths.checkpoints(study.name).iterdir()]):
        os.utime(file, (0, 0) if i % 2 else (4e9, 4e9))  # 1970 and 2096
    monkeypatch.setattr(workers, "_in_parallel", lambda take: () if not take(1) else pytest.fail("trained again"))
    run(open_study(str(folder), "go", "speaker", "smoke", seeds=2), [BASELINE])


def test_a_second_run_of_a_study_is_told_who_is_at_it(study):
    code = (
        "import sys; from pathlib import Path; from kwslib import processes\n"
        "with processes.only_one(Path(sys.argv[1]), 'run'): print('held', flush=True); sys.stdin.read()"
    )
    folder = paths.reports(study.name)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=paths.ROOT, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(processes.Busy, match=rf"in use by process {other.pid} on .* \(run, since 20.*stop it"):
            with processes.only_one(folder, "run", patience_s=0.1):
                pass
        other.kill()  # its lock file stays, and holds nothing
    assert (folder / ".run.json").exists()
    run(study, [BASELINE])
    assert not (folder / ".run.json").exists()


def test_only_leftovers_of_the_same_thing_are_removed(tmp_path):
    mine, labels = tmp_path / "words_v0.01-ab.npy", tmp_path / "words_v0.01-ab-labels.npy.1234.tmp"
    other = tmp_path / "words_v0.02-cd.1234.tmp"  # being made at this moment by another process
    labels.touch(), other.mkdir()
    with processes.made_once(mine) as missing:
        assert missing and other.exists() and not labels.exists()


def test_a_worker_ends_with_the_process_that_started_it(tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        "helper = 'import os, time; from kwslib import processes; processes.end_with(os.getppid()); time.sleep(60)'\n"
        "print(subprocess.Popen([sys.executable, '-c', helper]).pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=paths.ROOT, stdout=subprocess.PIPE)
    helper = kills.psutil.Process(int(parent.stdout.readline()))
    kills.time.sleep(2)  # it has to import this package first
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert kills.gone([helper], within_s=10) == []


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_helpers_of_a_preparation_end_with_it(how):
    """Log-mels, views, pieces and streams are made by helpers, too, however their run is ended."""
    code = (
        "import time\nfrom joblib import Parallel\nfrom kwslib.processes import helped\n"
        "Parallel(2)(helped(time.sleep)(60) for _ in range(2))"
    )
    parent = kills.psutil.Popen([sys.executable, "-c", code], cwd=paths.ROOT)
    until = kills.time.time() + 60
    while len(helpers := parent.children(recursive=True)) < 3 and kills.time.time() < until:  # and what tracks them
        kills.time.sleep(0.2)
    kills.time.sleep(3)  # they import the package first
    getattr(parent, how)()
    parent.wait()
    assert helpers and kills.gone(helpers, within_s=10) == []


IN_A_NAMESPACE = """
set -eu
mkdir -p "$1/checkpoints"
mount -t tmpfs -o size=8m tmpfs "$1"
shift
exec "$@"
"""


def confined(script: str, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A Python script whose ``KWS_HOME`` is a disk of 8 MB, which it may mount over as it likes."""
    home.mkdir(parents=True, exist_ok=True)
    probe = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs t "$1"', "sh", str(home)]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("a small disk of one's own cannot be mounted here")
    command = ["unshare", "-rm", "sh", "-c", IN_A_NAMESPACE, "sh", str(home), sys.executable, "-c", script, *arguments]
    environment = {**os.environ, "KWS_HOME": str(home), "PYTHONPATH": f"{paths.ROOT}:{Path(__file__).parent}"}
    return subprocess.run(command, cwd=paths.ROOT, env=environment, capture_output=True, text=True, timeout=300)


FULL_DISK = """
import os, sys, shutil
from test_faults import *
filler = paths.home() / "filler"
def fill(but):
    filler.write_bytes(bytes(shutil.disk_usage(paths.home()).free - but))
def refused(what):
    try: what()
    except (OSError, ExperimentError) as error: print("refused:", error)
    else: raise SystemExit("not refused")
study = open_study(sys.argv[1], "go", "speaker", "smoke", seeds=2)
fill(1_000_000)
refused(lambda: study.corpus)
assert not list(paths.data().glob("*.tmp"))
filler.unlink()
study.logmels, study.bank(BASELINE.augmentation)
fill(24_000)
refused(lambda: run(study, [BASELINE]))
filler.unlink()
assert not list(paths.checkpoints(study.name).glob("*.tmp"))
run(study, [BASELINE])
print(json.dumps(kills.stable(paths.home())))
"""


@pytest.mark.slow
@pytest.mark.proof
def test_a_full_disk_stops_a_run_with_a_sentence_and_damages_nothing(study, folder, home, tmp_path):
    done = confined(FULL_DISK, tmp_path / "small", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    preparing, training, digests = done.stdout.splitlines()
    assert "needs 2 MB, its disk has 1 MB left: make room first" in preparing
    assert "runs failed" in training and "No space left on device" in training
    run(study, [BASELINE])
    assert json.loads(digests) == kills.stable(home)


READ_ONLY = """
import sys, subprocess
from test_faults import *
study = open_study(sys.argv[1], "go", "speaker", "smoke", seeds=2)
run(study, [BASELINE])
before = kills.stable(paths.home())
subprocess.run(["mount", "-o", "remount,ro", str(paths.home())], check=True)
again = open_study(sys.argv[1], "go", "speaker", "smoke", seeds=2)
again.model("baseline"), again.results().table()
try: run(again, [BASELINE])
except OSError as error: print("refused:", error)
assert before == kills.stable(paths.home())
"""


@pytest.mark.slow
@pytest.mark.proof
def test_read_only_checkpoints_can_be_used_and_are_left_alone(folder, tmp_path):
    done = confined(READ_ONLY, tmp_path / "small", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Read-only file system" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_without_key_and_network_costs_a_warning_at_most(study, monkeypatch, mode, recwarn):
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("HOME", str(paths.home()))  # no key of the person who runs this
    monkeypatch.setattr(tracking, "TIME_LIMIT_S", 20)
    if mode == "offline":
        run(study, [BASELINE])
    else:
        with pytest.warns(UserWarning, match="Weights & Biases did not take the logs"):
            run(study, [BASELINE])
    assert len(study.results().records) == 2 and records.failures(paths.reports(study.name)) == []


@pytest.mark.slow
@pytest.mark.proof
def test_hash_seed_language_cores_and_a_path_with_spaces_change_no_byte(folder, tmp_path):
    log = tmp_path / "log"
    command = kills.commands(folder, make=False)
    plain = kills.started(command, tmp_path / "plain", log, PYTHONHASHSEED="0")
    assert plain.wait() == 0, log.read_text()[-2000:]
    odd = {"PYTHONHASHSEED": "12345", "LC_ALL": "C", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "3", "TZ": "Asia/Kathmandu"}
    other = kills.started(["taskset", "-c", "0", *command], tmp_path / "ein Ordner für Töne", log, **odd)
    assert other.wait() == 0, log.read_text()[-2000:]
    assert kills.stable(tmp_path / "ein Ordner für Töne") == kills.stable(tmp_path / "plain")
