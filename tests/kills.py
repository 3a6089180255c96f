"""``kill -9`` at random moments, again and again, until a study is done: is it what an undisturbed run makes?

    python tests/kills.py --kills 50 [--make] [--out FILE.json]

Without ``--make`` the study is a small one, made in this process's children in some seconds (``chain``); with it,
``make reproduce PROFILE=smoke`` on the synthetic corpus. Prints what was killed when, and whether records
(outside their ``run`` block) and checkpoints are byte for byte those of a run that nobody disturbed.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


def chain(corpus: str) -> None:
    """A small study from recordings to report: prepare, train, distil, convert, tune, draw."""
    from kwslib import QAT, CRNNConfig, Experiment, Labels, SoftTargets, Training, open_study, run
    from kwslib.results import page, plots, records

    study = open_study(corpus, "go", "speaker", "smoke", seeds=2)
    small = CRNNConfig(cnn_out_channels=2, hidden_size=6, gru_num_layers=1)
    training = Training(epochs=100, batch_size=16)  # 5 of them at this profile
    taught = {"teacher": "baseline", "losses": (Labels(0.4), SoftTargets(0.6, 4.0))}
    results = run(
        study,
        [
            Experiment("baseline", small, training=training),
            Experiment("student", small, training=training, **taught, control="baseline"),
            Experiment("tuned", start="student", after=(QAT(4, training),), **taught, control="student"),
        ],
    )
    found = records.load(study.name)
    plots.save(plots.metric_cost(results.summary, "macs_per_clip", 5.5e-5), study.name, "metric-macs", found)
    page.write(study.name)


def commands(corpus: Path, make: bool) -> list[str]:
    if make:
        return ["make", "--no-print-directory", "reproduce", "PROFILE=smoke"]
    return [sys.executable, __file__, "--chain", str(corpus)]


def started(command: list[str], home: Path, log: Path, **environment: str) -> psutil.Popen:
    variables = {**os.environ, "KWS_HOME": str(home), "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT), **environment}

    def listen_to_ctrl_c() -> None:  # which tests that a shell runs in the background would hand on as ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with log.open("a") as file:
        options = {"stdout": file, "stderr": file, "start_new_session": True, "preexec_fn": listen_to_ctrl_c}
        return psutil.Popen(command, cwd=ROOT, env=variables, **options)


def tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it started."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_all(victims: list[psutil.Process]) -> None:
    """At the same instant: nobody has time to notice that another is gone."""
    for action in ("suspend", "kill"):
        for victim in victims:
            try:
                getattr(victim, action)()
            except psutil.NoSuchProcess:
                pass


def gone(processes: list[psutil.Process], within_s: float = 20) -> list[psutil.Process]:
    """Those that still live after a while: helpers that outlive their run."""
    return psutil.wait_procs(processes, timeout=within_s)[1]


def stable(home: Path) -> dict[str, str]:
    """Digest of every record outside its ``run`` block and of every checkpoint file, by name."""
    found = {}
    for file in sorted((home / "reports").glob("*/records/*.json")):
        record = json.loads(file.read_text())
        record.pop("run")
        found[f"records/{file.name}"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    for file in sorted((home / "checkpoints").glob("*/*")):
        found[f"checkpoints/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def stage(home: Path, make: bool) -> str:
    """What a run is at, judged by what is on the disk."""
    study = next((home / "reports").glob("*"), home / "none")
    if make and (study / "run.log").exists():
        steps = [line.split()[2] for line in (study / "run.log").read_text().splitlines() if line.endswith(" ...")]
        return steps[-1] if steps else "start"
    if list((home / "checkpoints").glob("*/*.resume")):
        return "training"
    if list((home / "reports").glob("*/records/*.json")):
        return "between trainings, timing or report"
    return "preparing" if (home / "data").exists() else "start"


def disturbed(command: list[str], home: Path, kills: int, longest_s: float, rng: random.Random, log: Path, make: bool):
    """Kill a study until it is done or ``kills`` are used up, then let it finish; rows of what was killed when."""
    rows = []
    while True:
        process = started(command, home, log)
        began = time.monotonic()
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and len(rows) < kills:
            moment = time.monotonic() + rng.uniform(0, longest_s)
            while time.monotonic() < moment and process.poll() is None:
                time.sleep(0.02)
            if process.poll() is not None:
                break
            members, at = tree(process), stage(home, make)
            whole = rng.random() < 0.5
            victims = members if whole else [rng.choice(members)]
            rows.append({"after_s": round(time.monotonic() - began, 1), "stage": at, "all": whole})
            kill_all(victims)
            # One that is killed alone is the work of the kernel's memory killer: the rest fails, or goes on.
            if whole or process.poll() is not None or victims[0].pid == process.pid:
                process.wait()
                left = gone(members)
                rows[-1]["survivors"] = len(left)
                kill_all(left)
                break
        else:
            process.wait()
        if process.poll() == 0:
            return rows
        if len(rows) >= kills:
            process = started(command, home, log)
            if process.wait() == 0:
                return rows
            raise RuntimeError(f"undisturbed at last, and it still fails: see {log}")


def survive(command: list[str], folder: Path, kills: int, seed: int = 0, make: bool = False) -> dict:
    """All kills, over as many studies as it takes, against one that nobody disturbed."""
    rng, log = random.Random(seed), folder / "kills.log"
    began = time.monotonic()
    calm = started(command, folder / "calm", log)
    if calm.wait():
        raise RuntimeError(f"the undisturbed run failed: see {log}")
    calm_s = time.monotonic() - began
    expected, rows, studies, different = stable(folder / "calm"), [], 0, []
    while len(rows) < kills:
        home = folder / f"disturbed {studies}"  # with a space in its name
        rows += disturbed(command, home, kills - len(rows), calm_s / 3, rng, log, make)
        studies += 1
        found = stable(home)
        different += sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return {
        "kills": len(rows),
        "of_the_whole_tree": sum(row["all"] for row in rows),
        "of_one_process": sum(not row["all"] for row in rows),
        "stages": dict(Counter(row["stage"] for row in rows)),
        "survivors": sum(row.get("survivors", 0) for row in rows),
        "studies": studies,
        "files_compared": studies * len(expected),
        "different": different,
        "undisturbed_s": round(calm_s),
        "all_s": round(time.monotonic() - began),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--make", action="store_true", help="of make reproduce PROFILE=smoke instead of a small study")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result here, too")
    parser.add_argument("--chain", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.chain:
        chain(options.chain)
        return 0
    from conftest import write_tones

    with tempfile.TemporaryDirectory(prefix="kills") as folder:
        corpus = write_tones(Path(folder) / "tones")
        command = commands(corpus, options.make)
        result = survive(command, Path(folder), options.kills, options.seed, options.make)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["different"] or result["survivors"] else 0


if __name__ == "__main__":
    sys.exit(main())
