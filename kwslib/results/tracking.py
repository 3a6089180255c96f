"""Logging of trainings: a CSV file always, Weights & Biases as a copy of it.

The copy is made after the trainings by a process of its own with a time limit: a tracker that
fails, hangs or has no network costs a warning, never a result. ``WANDB_MODE`` decides as
everywhere in wandb: ``offline`` (default here, ``wandb sync`` later), ``online`` or ``disabled``.
"""

import csv
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TextIO

from kwslib import paths

TIME_LIMIT_S = 120


def csv_path(study: str, experiment: str, seed: int) -> Path:
    """Where the training log of a run is kept."""
    return paths.reports(study) / "logs" / f"{paths.label(experiment, seed)}.csv"


class CsvLog:
    """One row per epoch, flushed at once; no file without a row. A resumed training rewrites the rows it remembers."""

    def __init__(self, path: Path):
        self._path = path
        self._file: TextIO | None = None

    def __call__(self, row: dict) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", newline="")
            self._writer = csv.DictWriter(self._file, row.keys())
            self._writer.writeheader()
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def mirror(study: str, logs: list[Path], time_limit_s: float = TIME_LIMIT_S) -> bool:
    """Copy finished CSV logs to Weights & Biases; False and a warning when that did not work."""
    mode = os.environ.get("WANDB_MODE", "offline")
    if mode == "disabled" or not logs:
        return True
    folder = paths.reports(study)
    command = [sys.executable, "-m", "kwslib.results.tracking", study, str(folder), *map(str, logs)]
    environment = {**os.environ, "WANDB_MODE": mode, "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    try:
        # Without a key wandb would ask for one: nobody is there to answer.
        quiet = {"capture_output": True, "stdin": subprocess.DEVNULL}
        subprocess.run(command, env=environment, timeout=time_limit_s, check=True, cwd=paths.ROOT, **quiet)
        return True
    except subprocess.TimeoutExpired:
        reason = f"no answer within {time_limit_s:g} s"
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
    except OSError as error:
        reason = str(error)
    warnings.warn(
        f"Weights & Biases did not take the logs ({reason}). The CSV files in {folder / 'logs'} are complete; "
        "set WANDB_MODE=disabled to silence this",
        stacklevel=2,
    )
    return False


def _copy_to_wandb(study: str, folder: Path, logs: list[Path]) -> None:
    import wandb

    for log in logs:
        name, seed = paths.split_label(log.stem)
        run = wandb.init(project=f"kws-{study}", name=log.stem, group=name, dir=folder, config={"seed": seed})
        with log.open(newline="") as rows:
            for row in csv.DictReader(rows):
                run.log({key: json.loads(value) for key, value in row.items()})
        run.finish()


if __name__ == "__main__":
    _copy_to_wandb(sys.argv[1], Path(sys.argv[2]), [Path(p) for p in sys.argv[3:]])
