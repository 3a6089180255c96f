"""Where a result comes from: the code and its state, the environment's lock, the machine in words.

All of it goes into the ``run`` block of a record, which holds what may differ between equal runs.
"""

import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd

from kwslib import arithmetic, paths

CODE = ("kwslib", "notebooks", "data_splits", "tests", "pyproject.toml", "requirements.lock")  # results depend on these
# What the report shows, and its name there; a record of an earlier version has not all of them.
SHOWN = {
    **{"commit": "git commit", "lock_sha256": "requirements.lock", "python": "Python"},
    **{name: name for name in ("torch", "torchaudio", "numpy", "system")},
    **{"cpu": "processor", "cpu_features": "torch computes with", "cores": "cores"},
    **{"memory_gb": "memory, GB", "device": "trained on"},
}


@functools.cache
def of_run() -> dict[str, object]:
    """Code, versions and machine, in words.

    ``commit`` ends in ``-dirty`` where code was changed, and is None outside a git checkout.
    ``cpu_features`` decides which of torch's kernels run (``kwslib.arithmetic``): other ones round differently.
    """
    import torch
    import torchaudio

    lock = paths.ROOT / "requirements.lock"
    return {
        "commit": commit(paths.ROOT),
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchaudio": torchaudio.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cpu_features": torch.backends.cpu.get_cpu_capability() + (", pinned" if arithmetic.is_pinned() else ""),
        "cores": os.cpu_count(),
        "memory_gb": _memory_gb(),
    }


def commit(checkout: Path) -> str | None:
    """The commit of a checkout, ``-dirty`` behind it where what results depend on was changed; None without git."""

    def git(*arguments: str) -> str:
        looking = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # must not stand in the way of somebody's commit
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, env=looking, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        if not (top := git("rev-parse", "--show-toplevel")) or Path(top).resolve() != checkout.resolve():
            return None  # no repository, or unpacked inside somebody else's
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.TimeoutExpired):
        return None


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):  # not every system tells
        return None


def table(records: list[dict]) -> pd.DataFrame:
    """What the records of a study say about where they come from; where they differ, each value with its count."""
    rows = {}
    for key, name in SHOWN.items():
        values = pd.Series([record["run"].get(key) for record in records], dtype=object)
        counts = values.fillna("not recorded").astype(str).value_counts()
        rows[name] = ", ".join(value if len(counts) == 1 else f"{value} ({n} runs)" for value, n in counts.items())
    minutes = sum(record["run"]["wall_s"] for record in records) / 60
    rows["time of all runs"] = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min"
    for key, name in (("corpus_fingerprint", "corpus fingerprint"), ("split_sha256", "split SHA-256")):
        rows[name] = ", ".join(dict.fromkeys(record["data"][key][:16] for record in records))
    return pd.DataFrame({"value": rows})
