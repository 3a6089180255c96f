import sys
import time

import pytest

from kwslib import paths
from kwslib.results import tracking


@pytest.fixture
def log(home):
    path = tracking.csv_path("s", "baseline", 0)
    writer = tracking.CsvLog(path)
    writer({"epoch": 1, "loss": 0.5})
    writer({"epoch": 2, "loss": 0.25})
    assert path.read_text() == "epoch,loss\n1,0.5\n2,0.25\n"  # flushed before it is closed
    writer.close()
    return path


def test_a_tracker_that_hangs_fails_or_is_absent_costs_a_warning(log, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    python = sys.executable
    for body, reason in (("import time; time.sleep(60)", "no answer within"), ("raise OSError('no key')", "no key")):
        fake = tmp_path / "python"
        fake.write_text(f"#!{python}\n{body}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(tracking.sys, "executable", str(fake))
        began = time.monotonic()
        with pytest.warns(UserWarning, match=reason):
            assert not tracking.mirror("s", [log], time_limit_s=3)
        assert time.monotonic() - began < 10
    monkeypatch.setattr(tracking.sys, "executable", str(tmp_path / "absent"))
    with pytest.warns(UserWarning, match="No such file"):
        assert not tracking.mirror("s", [log])


def test_disabled_means_no_process(log, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(tracking.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    assert tracking.mirror("s", [log])


@pytest.mark.slow
def test_wandb_keeps_an_offline_copy(log, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking.mirror("s", [log])
    assert list((paths.reports("s") / "wandb").glob("offline-run-*/*.wandb"))
