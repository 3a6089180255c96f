"""A search for small models: Optuna proposes sizes and recipes, costs first, then training with early stopping.

Every proposal whose MACs exceed the budget is answered from a formula and never trained. Trials live in
a database: a sweep goes on where it stopped, and any number of workers, on this machine or others, may
share one. Selection is on val; nothing here looks at the test part.
"""

import re
from dataclasses import replace

import optuna
import pandas as pd
import torch
from joblib import Parallel, cpu_count
from optuna.trial import TrialState
from tqdm.auto import tqdm

from kwslib import paths, processes
from kwslib.config import CRNNConfig, FeatureConfig, identity
from kwslib.data import augment, features
from kwslib.data.augment import WITHOUT_MASKS
from kwslib.lab.study import Study
from kwslib.nets import cost
from kwslib.nets.losses import Labels, SoftTargets
from kwslib.nets.rivals import build
from kwslib.training.loop import NotANumber, Objective, Training, fit
from kwslib.training.material import Clips, Material

OVER_BUDGET = "over budget"  # why a trial was not trained
TRAINING = Training(epochs=12, weight_decay=1e-3, ema=0.99)  # as in notebook 03, but shorter; the rate is searched


def storage_of(study: Study) -> str:
    """Where trials are kept unless another database is named: SQLite beside the records."""
    folder = paths.reports(study.name)
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'sweep.db'}"


def propose(trial: optuna.trial.BaseTrial) -> CRNNConfig:
    """Sizes within the range of the reports and the best public solutions."""
    frames = trial.suggest_int("kernel_frames", 12, 24)
    return CRNNConfig(
        cnn_out_channels=trial.suggest_int("channels", 1, 4),
        kernel_size=(trial.suggest_int("kernel_bins", 3, 11), frames),
        stride=(trial.suggest_int("stride_bins", 2, 7), trial.suggest_int("stride_frames", 6, 12)),
        hidden_size=trial.suggest_int("hidden", 8, 32),
        gru_num_layers=trial.suggest_int("layers", 1, 2),
        cell=trial.suggest_categorical("cell", ["gru", "rnn"]),
    )


def sweep(
    study: Study,
    trials: int,
    max_macs: int,
    training: Training = TRAINING,
    storage: str = "",
    teacher: str | None = None,
) -> pd.DataFrame:
    """Train until the database holds this many trained trials; as many at a time as there are cores.

    Trials of other data, another profile or another recipe stand in the same database under another name.

    Args:
        trials: trained ones, finished or stopped early, those of earlier calls included.
        max_macs: largest MACs per clip that is worth a training.
        training: of each trial, in epochs of the standard profile; its learning rate is searched.
        storage: database URL of Optuna; SQLite in the study's folder by default.
        teacher: experiment whose seed 0 teaches; the share and temperature of its voice are searched, too.

    Returns:
        See ``table``.

    Raises:
        ValueError: fewer than one trial, a budget below any model, or a database that cannot be used.
    """
    if trials < 1:
        raise ValueError(f"a sweep needs at least one trial, not {trials}")
    if max_macs < 1000:
        raise ValueError(f"no model fits into {max_macs} MACs per clip: the smallest need some thousands")
    if storage:
        _opened(storage)  # whatever is wrong with it is said before anything is prepared
    storage = storage or storage_of(study)
    _ = study.logmels, study.bank(WITHOUT_MASKS)  # computed before the workers start
    training = study.sized(training)
    data = study.corpus.fingerprint, study.split.sha256, study.profile.views
    question = f"{study.name}-{identity(data, features.VERSION, augment.VERSION, WITHOUT_MASKS, training, teacher)}"
    database = _database(question, storage)
    jobs = min(cpu_count(), trials)
    what = study, question, trials, max_macs, training, storage, teacher
    Parallel(n_jobs=jobs)(processes.helped(_work)(*what, worker) for worker in range(jobs))
    return table(study, database)


def _database(question: str, storage: str) -> optuna.Study:
    """The trials of one question: made at first use. What a killed worker was training stays uncounted."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=4)
    where = {"study_name": question, "storage": _opened(storage), "load_if_exists": True}
    return optuna.create_study(**where, direction="minimize", pruner=pruner)


def _opened(storage: str) -> optuna.storages.RDBStorage:
    """The database at a URL, with Optuna's tables.

    Raises:
        ValueError: it cannot be used.
    """
    try:
        opened = optuna.storages.RDBStorage(storage)
        url = opened.engine.url
        if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
            raise ValueError("in memory each worker would have its own")
        return opened
    except Exception as error:  # each kind of database has errors of its own
        reason = str(error.__cause__ if isinstance(error, ImportError) else error).partition("\n")[0]
    where = re.sub("//.*@", "//***@", storage)  # no password on a screen
    raise ValueError(
        f"trials cannot be kept in {where} ({reason}): give the URL of a database whose folder and driver are there, "
        "for example sqlite:////folder/sweep.db"
    )


def _is_trained(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.state.is_finished() and "best_val_au_fa_fr" in trial.user_attrs


def _work(study, question, trials, max_macs, training, storage, teacher, worker: int) -> None:
    """One process: ask for a proposal, price it, train it, tell how good it was; until there are enough."""
    torch.set_num_threads(1)
    database = _database(question, storage)
    database.sampler = optuna.samplers.TPESampler(seed=len(database.trials) * 1000 + worker)
    quiet = {"disable": True} if worker else {}  # the first one speaks, where TQDM_DISABLE lets it
    bar = tqdm(desc=f"sweep, worker {worker}", total=trials, unit="trial", **quiet)
    while (done := sum(map(_is_trained, database.get_trials(deepcopy=False)))) < trials:
        bar.update(done - bar.n)
        trial = database.ask()
        try:
            config = propose(trial)
            macs = cost.formula_macs(config)
        except ValueError:  # a kernel that does not fit
            database.tell(trial, state=TrialState.PRUNED)
            continue
        trial.set_user_attr("macs_per_clip", macs)
        if macs > max_macs or config.n_steps(features.n_frames(FeatureConfig())) < 2:
            trial.set_user_attr("stopped", OVER_BUDGET)
            database.tell(trial, state=TrialState.PRUNED)
            continue
        state, value = _train(study, trial, config, training, teacher)
        database.tell(trial, value, state)
    bar.update(trials - bar.n)


def _train(
    study: Study, trial: optuna.Trial, config: CRNNConfig, training: Training, teacher: str | None
) -> tuple[TrialState, float | None]:
    """Train one proposal; its best val area so far is on record after every epoch."""
    losses: tuple = (Labels(),)
    if teacher is not None:
        share = trial.suggest_float("kd_share", 0.0, 0.9)
        losses = (Labels(1 - share), SoftTargets(share, trial.suggest_float("temperature", 1.0, 20.0, log=True)))
    training = replace(training, learning_rate=trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True))
    torch.manual_seed(trial.number)
    model = build(config)
    trial.set_user_attr("params", sum(p.numel() for p in model.parameters()))
    best = float("inf")

    def report(row: dict) -> None:
        nonlocal best
        best = min(best, row["val_au_fa_fr"])
        trial.set_user_attr("best_val_au_fa_fr", best)
        trial.report(best, row["epoch"])
        if trial.should_prune():
            raise optuna.TrialPruned

    val = study.split.val
    source = Clips(study.bank(WITHOUT_MASKS), study.labels[study.heard])
    material = Material(source, study.logmels[val], study.labels[val])
    objective = Objective(losses, study.model(teacher, 0) if teacher else None)
    try:
        fit(model, material, objective, training, trial.number, on_epoch=report)
    except (optuna.TrialPruned, NotANumber):
        return TrialState.PRUNED, None
    return TrialState.COMPLETE, best


def table(study: Study, database: optuna.Study) -> pd.DataFrame:
    """All trained trials, best val area first, with costs, sizes and recipe; ``front`` marks the Pareto front.

    Written to ``reports/<study>/sweep.csv`` as well.
    """
    found = [t for t in database.get_trials(deepcopy=False) if _is_trained(t)]
    rows = [
        {"trial": t.number, "val_au_fa_fr": t.user_attrs["best_val_au_fa_fr"]}
        | {key: t.user_attrs[key] for key in ("macs_per_clip", "params")}
        | {"stopped_early": t.state != TrialState.COMPLETE, **t.params}
        for t in found
    ]
    out = pd.DataFrame(rows).sort_values(["macs_per_clip", "val_au_fa_fr"])
    out["front"] = out["val_au_fa_fr"] < out["val_au_fa_fr"].cummin().shift(fill_value=float("inf"))
    out = out.sort_values(["val_au_fa_fr", "macs_per_clip"]).set_index("trial")
    paths.write_atomically(paths.reports(study.name) / "sweep.csv", out.to_csv())
    return out
