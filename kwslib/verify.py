"""Whether files hold what their records say: loaded again in processes that trained nothing."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, cpu_count, delayed
from joblib.externals.loky import get_reusable_executor

from kwslib import checkpoints, metrics, records, train
from kwslib.study import Study


def rescore(study: Study, experiments: Sequence[str]) -> pd.DataFrame:
    """Score the torch file and the compact file of each run on test, in fresh processes.

    Returns:
        One row per file: ``experiment, seed, file, bytes, recorded, rescored`` (AU-FA-FR), ``equal``.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    runs = [r for r in records.load(study.name) if r["experiment"] in experiments]
    torch_files = [study.checkpoint(r["experiment"], r["seed"]) for r in runs]
    files = [[file, file.with_suffix(checkpoints.COMPACT_SUFFIX)] for file in torch_files]
    get_reusable_executor().shutdown()  # workers that trained could remember more than the files say
    pool = Parallel(n_jobs=min(cpu_count(), len(runs)) or 1)
    areas = pool(delayed(_areas)(replace(study), pair) for pair in files)
    rows = []
    for run, pair, rescored in zip(runs, files, areas, strict=True):
        for file, area in zip(pair, rescored, strict=True):
            recorded = run["metrics"]["au_fa_fr"]
            rows.append(
                (run["experiment"], run["seed"], file.name, file.stat().st_size, recorded, area, recorded == area)
            )
    return pd.DataFrame(rows, columns=["experiment", "seed", "file", "bytes", "recorded", "rescored", "equal"])


def _areas(study: Study, files: Sequence[Path]) -> list[float]:
    """Test AU-FA-FR of the model in each file."""
    torch.set_num_threads(1)
    test = study.split.test
    models = (checkpoints.load(file)[0] for file in files)
    return [metrics.au_fa_fr(train.score(model, study.logmels[test]), study.labels[test] == 1) for model in models]
