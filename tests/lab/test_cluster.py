"""The same study on a Dask cluster of two local workers, one of which is killed on the way."""

import json
import os
import signal
import threading
import time

import pytest

from kwslib import paths
from kwslib.config import CRNNConfig
from kwslib.lab.run import Experiment
from kwslib.lab.study import ExperimentError, open_study
from kwslib.lab.workers import run
from kwslib.nets.losses import Labels, SoftTargets
from kwslib.results import records
from kwslib.training.loop import Training

distributed = pytest.importorskip("distributed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # a killed worker makes the library warn
LONG = Training(epochs=800, batch_size=16)  # the smoke profile makes 40 of them: some seconds
TINY = CRNNConfig(cnn_out_channels=2, hidden_size=6, gru_num_layers=1)
EXPERIMENTS = [
    Experiment("baseline", student=TINY, training=LONG),
    Experiment("student", student=TINY, teacher="baseline", losses=(Labels(0.4), SoftTargets(0.6)), training=LONG),
]


def stable(study) -> dict[str, dict]:
    found = {f.name: json.loads(f.read_text()) for f in (paths.reports(study.name) / "records").glob("*.json")}
    return {name: {key: value for key, value in record.items() if key != "run"} for name, record in found.items()}


def kill_when_busy(pid: int, folder) -> None:
    """SIGKILL as soon as an epoch was saved somewhere: in the middle of a training."""
    while not list(folder.glob("*.resume")):
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.proof
def test_a_cluster_gives_the_same_records_and_survives_the_loss_of_a_worker(folder, home, tmp_path, monkeypatch):
    study = open_study(str(folder), "go", "speaker", "smoke", seeds=2)
    run(study, EXPERIMENTS)
    expected = stable(study)
    assert len(expected) == 4
    monkeypatch.setenv("KWS_HOME", str(tmp_path / "other"))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        monkeypatch.setenv("KWS_CLUSTER", cluster.scheduler_address)
        study = open_study(str(folder), "go", "speaker", "smoke", seeds=2)
        victim = cluster.workers[0].pid
        killer = threading.Thread(target=kill_when_busy, args=(victim, paths.checkpoints(study.name)))
        killer.start()
        run(study, EXPERIMENTS)
        killer.join()
        assert cluster.workers[0].pid != victim
    assert stable(study) == expected
    assert records.load(study.name)[0]["run"]["latency_ms_per_step"] > 0


@pytest.mark.proof
def test_an_address_without_a_scheduler_and_workers_with_threads_are_refused(folder, monkeypatch):
    study = open_study(str(folder), "go", "speaker", "smoke", seeds=1)
    monkeypatch.setenv("KWS_CLUSTER", "tcp://127.0.0.1:9")
    with pytest.raises(ExperimentError, match="no Dask scheduler at tcp://127.0.0.1:9"):
        run(study, EXPERIMENTS)
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster:
        monkeypatch.setenv("KWS_CLUSTER", cluster.scheduler_address)
        with pytest.raises(ExperimentError, match="one thread each: start them with --nthreads 1"):
            run(study, EXPERIMENTS)
