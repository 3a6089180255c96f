"""Whether files hold what their records say: loaded again in processes that trained nothing."""

import os
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor

from kwslib import checkpoints, metrics, records, train
from kwslib.study import Study


def rescore(study: Study, experiments: Sequence[str]) -> pd.DataFrame:
    """Score the torch file and the compact file of each run on test, in fresh processes.

    Returns:
        One row per file: ``experiment, seed, file, bytes, recorded, rescored`` (AU-FA-FR), ``equal,
        process``.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    runs = [r for r in records.load(study.name) if r["experiment"] in experiments]
    # Processes of its own: workers that trained could remember more than the files say.
    with ProcessPoolExecutor(max_workers=cpu_count()) as pool:
        rows = list(pool.map(_rescored, [replace(study)] * len(runs), runs))
    return pd.DataFrame([row for pair in rows for row in pair])


def _rescored(study: Study, run: dict) -> list[dict]:
    """The row of each of a run's two files; scored on one thread, as after its training."""
    torch.set_num_threads(1)
    test, recorded = study.split.test, run["metrics"]["au_fa_fr"]
    checkpoint = study.checkpoint(run["experiment"], run["seed"])
    rows = []
    for file in (checkpoint, checkpoint.with_suffix(checkpoints.COMPACT_SUFFIX)):
        scores = train.score(checkpoints.load(file)[0], study.logmels[test])
        area = metrics.au_fa_fr(scores, study.labels[test] == 1)
        row = {"experiment": run["experiment"], "seed": run["seed"], "file": file.name, "bytes": file.stat().st_size}
        rows.append(row | {"recorded": recorded, "rescored": area, "equal": recorded == area, "process": os.getpid()})
    return rows
