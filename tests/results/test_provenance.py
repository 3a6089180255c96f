import subprocess

from kwslib import paths
from kwslib.results import provenance


def git(folder, *arguments: str) -> str:
    name = ["-c", "user.name=t", "-c", "user.email=t@pytest.example"]
    return subprocess.run(["git", "-C", str(folder), *name, *arguments], capture_output=True, text=True).stdout.strip()


def test_a_commit_is_named_with_its_state_and_only_by_its_own_repository(tmp_path):
    assert provenance.commit(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "kwslib").mkdir()
    (tmp_path / "kwslib" / "room.py").write_text("one")
    (tmp_path / "README.md").write_text("one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    assert provenance.commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "inside").mkdir()
    assert provenance.commit(tmp_path / "inside") is None  # unpacked in somebody else's
    (tmp_path / "README.md").write_text("two")  # no result depends on it
    assert provenance.commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "kwslib" / "room.py").write_text("two")
    assert provenance.commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD") + "-dirty"


def test_a_table_counts_what_differs_and_says_what_is_missing():
    def record(**run) -> dict:
        return {"run": {"wall_s": 60.0, **run}, "data": {"corpus_fingerprint": "f" * 64, "split_sha256": "a" * 64}}

    table = provenance.table([record(commit="x", cores=2), record(commit="y", cores=2), record(cores=2)])["value"]
    assert table["git commit"] == "x (1 runs), y (1 runs), not recorded (1 runs)"
    assert table["cores"] == "2" and table["processor"] == "not recorded" and table["time of all runs"] == "3 min"


def test_a_run_names_its_lock_and_machine():
    found = provenance.of_run()
    assert set(found) == {*provenance.SHOWN} - {"device"} and len(found["lock_sha256"]) == 64
    assert (paths.ROOT / "requirements.lock").exists() and found["cpu_features"]
