"""Experiments x seeds -> checkpoints and records: cached, resumed, in parallel.

Same identity: the result is loaded. Interrupted: training goes on after the last epoch. Anything else: it is
trained. What fails stops nothing but what needs it.
"""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm.auto import tqdm

from kwslib import paths, processes
from kwslib.config import describe
from kwslib.data.features import one_thread
from kwslib.lab.run import Experiment, Run, device, execute, identity_on_disk, refresh, take_time
from kwslib.lab.study import ExperimentError, Results, Study
from kwslib.results import records, tracking

SHORT_OF_MEMORY = "out of memory: "
GPU_JOBS = 4  # trainings that share one GPU: each takes about half a gigabyte of its memory


def run(study: Study, experiments: Sequence[Experiment]) -> Results:
    """Run what is not done yet, in parallel over cores, and return all results so far.

    A run that fails is warned of and noted for the report; what the others computed is kept.

    Raises:
        ExperimentError: something an experiment needs is missing, or all its seeds failed.
        Busy: another process runs experiments of this study.
    """
    names = [e.name for e in experiments]
    if len(set(names)) < len(names):
        raise ExperimentError(f"two experiments share a name: {', '.join(names)}")
    with processes.only_one(paths.reports(study.name), "run"):
        for folder in (paths.checkpoints(study.name), records.folder(study.name)):
            processes.remove_left_behind(folder)
        failures = _run(study, experiments)
    if failures:
        listing = "; ".join(f"{label}: {error}" for label, error in failures.items())
        listing = f"{len(failures)} runs failed, the others are kept. {listing}"
        seeds_left = {
            e.name: study.seeds - sum(paths.split_label(f)[0] == e.name for f in failures) for e in experiments
        }
        if not all(seeds_left.values()):
            raise ExperimentError(listing)
        warnings.warn(listing, stacklevel=2)
    return study.results()


def _run(study: Study, experiments: Sequence[Experiment]) -> dict[str, str]:
    """Run what is not done; returns what failed and why, by label."""
    names = [e.name for e in experiments]
    offset = _next_order(study, names)
    waiting = [
        Run(study, experiment, seed, offset + position)
        for position, experiment in enumerate(experiments)
        for seed in range(study.seeds)
    ]
    failures: dict[str, str] = {}

    by_label = {one.label: one for one in waiting}

    def fail(label: str, error: str) -> None:
        failures[label] = error
        records.note_failure(study.name, *paths.split_label(label), error)
        _drop_unless_done(by_label[label])  # of another recipe: it must not be averaged with the seeds that went well

    lost = _without_origin(study, waiting)  # complains before anything is computed
    _check_controls(study, experiments)
    records.forget_failures(study.name, [(one.experiment.name, one.seed) for one in waiting])
    for label, error in lost.items():
        fail(label, error)
    logs: list[Path] = []
    with tqdm(total=len(waiting), desc=study.name, unit="run") as bar:
        while waiting:
            open_names = {one.experiment.name for one in waiting}
            wave = [one for one in waiting if not open_names.intersection(one.experiment.needs)]
            if not wave:
                raise ExperimentError(
                    f"these experiments need one another in a circle: {', '.join(sorted(open_names))}"
                )
            waiting = [one for one in waiting if one not in wave]
            for one in wave:
                if broken := one.needed_labels.intersection(failures):
                    fail(one.label, f"needs {', '.join(sorted(broken))}, which failed")
            wave = [one for one in wave if one.label not in failures]
            todo = [one for one in wave if not one.is_done()]
            bar.update(len(wave) - len(todo))
            for one in wave:
                if one not in todo:
                    refresh(one)
            _prepare_data(study, todo)
            _drop_other_recipes(todo)
            for label, error in _each_once_more(todo):
                bar.set_postfix_str(label)
                bar.update()
                if error:
                    fail(label, error)
            for one in wave:
                if one.label not in failures:
                    take_time(one)
            logs += [tracking.csv_path(study.name, t.experiment.name, t.seed) for t in todo if t.experiment.trains]
    tracking.mirror(study.name, [log for log in logs if log.exists()])
    return failures


def _without_origin(study: Study, runs: list[Run]) -> dict[str, str]:
    """Runs that build on one of an earlier notebook that failed, and why, by label.

    Raises:
        ExperimentError: what an experiment builds on is missing, and no failure tells why: it was never run.
    """
    here = {one.experiment.name for one in runs}
    failed = {paths.label(row["experiment"], row["seed"]) for row in records.failures(paths.reports(study.name))}
    reasons: dict[str, str] = {}
    for one in runs:
        for name in set(one.experiment.needs) - here:
            try:
                identity_on_disk(study, name, one.seed)
            except ExperimentError:
                if (origin := paths.label(name, one.seed)) not in failed:
                    raise
                reasons[one.label] = f"needs {origin}, which failed"
    return reasons


def _check_controls(study: Study, experiments: Sequence[Experiment]) -> None:
    """A control that is missing, or was trained for another time, would make a gain that means nothing."""
    here, reports = {experiment.name: experiment for experiment in experiments}, paths.reports(study.name)
    for experiment in [e for e in experiments if e.control]:
        if experiment.control in here:
            control = describe(here[experiment.control])
        else:
            found = [records.path(study.name, experiment.control, seed) for seed in range(study.seeds)]
            found = [file for file in found if file.exists()]
            if not found and experiment.control in {row["experiment"] for row in records.failures(reports)}:
                continue
            if not found:
                raise ExperimentError(
                    f"{experiment.control!r}, the control of {experiment.name!r}, has no record yet: "
                    "run the notebook that defines it first"
                )
            control = records.read(found[0])["recipe"]
        lengths = experiment.training.epochs, control["training"]["epochs"]
        if experiment.student and control["student"] and len(set(lengths)) > 1:
            raise ExperimentError(
                f"{experiment.name!r} trains for {lengths[0]} epochs and its control {experiment.control!r} for "
                f"{lengths[1]}: give both the same, or nobody knows what the difference is due to"
            )


def _next_order(study: Study, names: list[str]) -> int:
    """Where these experiments stand in the tables: their old place, or behind all others."""
    existing = {}
    for file in records.folder(study.name).glob("*.json"):
        with contextlib.suppress(records.RecordError):  # a damaged one is made anew
            record = records.read(file)
            existing[record["experiment"]] = record["order"]
    known = [existing[name] for name in names if name in existing]
    return min(known) if known else max(existing.values(), default=-1) + 1


def _drop_other_recipes(todo: list[Run]) -> None:
    """Remove runs of these experiments that other seeds left behind under another recipe or data.

    Otherwise a run with fewer seeds would be averaged with what is no longer the same experiment.
    """
    for experiment, study in {one.experiment: one.study for one in todo}.items():
        for file in records.folder(study.name).glob(f"{experiment.name}-seed*.json"):
            seed = paths.split_label(file.stem)[1]
            if seed >= study.seeds:
                _drop_unless_done(Run(study, experiment, seed, order=0))


def _drop_unless_done(one: Run) -> None:
    """Remove record and checkpoint of a run when they are of another recipe or data, or damaged."""
    try:
        done = one.is_done()
    except ExperimentError:  # what it started from is gone
        done = False
    checkpoint = one.study.checkpoint(one.experiment.name, one.seed)
    record = records.path(one.study.name, one.experiment.name, one.seed)
    for old in () if done else (record, *(checkpoint.with_suffix(suffix) for suffix in (".pt", ".json", ".kws"))):
        with contextlib.suppress(OSError):  # not there, or nothing can be removed
            old.unlink()


def _prepare_data(study: Study, runs: list[Run]) -> None:
    """Compute what the workers share before they start, so that none waits for another."""
    if runs:
        _ = study.logmels
        for augmentation in {one.experiment.augmentation for one in runs if one.experiment.trains}:
            study.bank(augmentation)
        for experiment in {one.experiment for one in runs}:
            for step in experiment.piece_steps:
                study.pieces(step.pieces, experiment.augmentation)
            if experiment.decision_step:
                wanted = experiment.decision_step.sized(study.profile.stream_percent)
                study.tracks("val", wanted.made_on)
                study.tracks("test", wanted.streams)


def _each_once_more(runs: list[Run]):
    """(label, error or '') of each run as it ends.

    A process that the system kills, for want of memory most likely, takes others with it; and trainings that share
    one memory can be too many for it. What was lost so is tried once more, one at a time.
    """
    ended = set()
    try:
        for label, error in _in_parallel(runs):
            if not error.startswith(SHORT_OF_MEMORY):
                ended.add(label)
                yield label, error
    except TerminatedWorkerError:
        pass
    for one in [one for one in runs if one.label not in ended]:
        try:
            yield from _in_parallel([one])
        except TerminatedWorkerError:
            yield one.label, "its process was killed twice, for want of memory perhaps: run again with more"


def _in_parallel(runs: list[Run]):
    """(label, error or '') of each run as it ends. One process per core, one thread each.

    With ``KWS_CLUSTER=tcp://host:port``, the address of a Dask scheduler, its workers are used instead: as
    many runs at a time as they have threads, on other machines too when all see the same ``KWS_HOME``. What
    a lost worker was doing is given to another one.
    """
    address = os.environ.get("KWS_CLUSTER")
    home = str(paths.home())
    # A fresh study has read nothing yet: its data is not sent around, each process maps the files itself.
    attempt = (delayed if address else processes.helped)(_attempt)  # those of a cluster are nobody's children
    calls = [attempt(dataclasses.replace(t, study=dataclasses.replace(t.study)), home) for t in runs]
    if not address:
        most = cpu_count() if device() == "cpu" else min(cpu_count(), GPU_JOBS)
        # At least two workers, though perhaps one at a time: with one joblib would train in this process,
        # which has to outlive whatever happens to a training.
        yield from Parallel(max(2, min(most, len(runs))), return_as="generator_unordered", pre_dispatch=most)(calls)
    elif runs:
        with _cluster(address), parallel_config(backend="dask"):
            yield from Parallel(return_as="generator_unordered")(calls)


def _cluster(address: str):
    """A client of the scheduler at this address, whose workers run one at a time each."""
    try:
        from distributed import Client
    except ImportError:
        raise ExperimentError(
            "KWS_CLUSTER needs the package distributed: .venv/bin/pip install -e '.[cluster]'"
        ) from None
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise ExperimentError(f"no Dask scheduler at {address} ({error}): start one, or unset KWS_CLUSTER") from None
    threads = [worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    if not threads or max(threads) > 1:  # two trainings in one process would share a random generator
        client.close()
        raise ExperimentError(f"{address} needs workers with one thread each: start them with --nthreads 1")
    return client


def _attempt(one: Run, home: str) -> tuple[str, str]:
    os.environ["KWS_HOME"] = home  # a worker may have been started for another home
    with one_thread():
        try:
            execute(one)
            return one.label, ""
        except (MemoryError, torch.OutOfMemoryError) as error:
            told = str(error).partition("\n")[0]
            return one.label, f"{SHORT_OF_MEMORY}{told or 'no more'} (an empty CUDA_VISIBLE_DEVICES trains on the CPU)"
        except Exception as error:  # one failing run must not take the others with it
            return one.label, f"{type(error).__name__}: {error}"
