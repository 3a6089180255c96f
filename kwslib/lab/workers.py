"""Experiments x seeds -> checkpoints and records: cached, resumed, in parallel.

Same identity: the result is loaded. Interrupted: training goes on after the last epoch. Anything else: it is
trained, and what another recipe left under the same name is put aside. What fails stops nothing but what needs it.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import torch
from joblib import cpu_count
from tqdm.auto import tqdm

from kwslib import paths, processes
from kwslib.config import describe
from kwslib.data.features import one_thread
from kwslib.lab.run import (
    Experiment,
    Run,
    device,
    execute,
    identity_on_disk,
    is_copy,
    refresh,
    take_time,
    takes_published,
)
from kwslib.lab.study import ExperimentError, Results, Study
from kwslib.results import records, sentences, tracking
from kwslib.training import checkpoints, compact

SHORT_OF_MEMORY = "out of memory: "
KILLED = "its process was killed"
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
    places = enumerate(experiments, _next_order(study, [e.name for e in experiments]))
    waiting = [Run(study, experiment, seed, place) for place, experiment in places for seed in range(study.seeds)]
    by_label, urgency = {one.label: one for one in waiting}, _epochs_that_wait(experiments)
    open_, queue, trained = set(by_label), [], []  # labels that have not ended; runs that can be trained; that were
    failures: dict[str, str] = {}
    counts: Counter[str] = Counter()

    def fail(label: str, error: str) -> None:
        failures[label] = error
        records.note_failure(study.name, *paths.split_label(label), error)
        _drop_unless_done(by_label[label])  # of another recipe: it must not be averaged with the seeds that went well

    def settled(one: Run) -> bool:
        """Whether nothing is to be done: it failed, or what it needs did, or it has a result, which is loaded."""
        if one.label not in failures and (broken := one.needed_labels.intersection(failures)):
            fail(one.label, f"needs {', '.join(sorted(broken))}, which failed")
        if one.label in failures:
            return True
        if source := "loaded" if one.is_done() else _take(one):
            counts.update({"loaded", source})
            refresh(one)
            return True
        counts["to train"] += 1
        return False

    def take(most: int) -> list[Run]:
        """Runs to train now, at most so many, the most urgent first. What has a result is loaded on the way."""
        while ready := {one.label for one in waiting if not one.needed_labels & open_}:
            todo = []
            for one in [one for one in waiting if one.label in ready]:
                if settled(one):
                    open_.discard(one.label)
                    bar.update()
                else:
                    todo.append(one)
            waiting[:] = [one for one in waiting if one.label not in ready]
            bar.set_postfix_str(sentences.say_runs(counts))
            _prepare_data(study, todo)
            _drop_other_recipes(todo)
            queue.extend(todo)
        queue.sort(key=lambda one: -urgency[one.experiment.name])
        taken, queue[:] = queue[:most], queue[most:]
        return taken

    lost = _without_origin(study, waiting)  # complains before anything is computed
    _check_controls(study, experiments)
    records.forget_failures(study.name, [(one.experiment.name, one.seed) for one in waiting])
    for label, error in lost.items():
        fail(label, error)
    with tqdm(total=len(waiting), desc=study.name, unit="run") as bar:
        for label, error in _each_once_more(take):
            open_.discard(label)
            trained.append(by_label[label])
            counts["failed" if error else "trained"] += 1
            bar.set_postfix_str(f"{sentences.say_runs(counts)}: {label}", refresh=False)
            bar.update()
            if error:
                fail(label, error)
        for label, one in by_label.items():  # now that nothing else is running
            if label not in failures:
                take_time(one)
    logs = [tracking.csv_path(study.name, t.experiment.name, t.seed) for t in trained if t.experiment.trains]
    tracking.mirror(study.name, [log for log in logs if log.exists()])
    return failures


def _epochs_that_wait(experiments: Sequence[Experiment]) -> dict[str, int]:
    """Epochs of the longest chain of experiments that begins with each one, by name: what has many must not wait."""
    own = {e.name: e.epochs for e in experiments}
    needs = {e.name: own.keys() & e.needs for e in experiments}
    try:
        order = [*TopologicalSorter(needs).static_order()]
    except CycleError as error:
        circle = sorted(set(error.args[1]))
        raise ExperimentError(f"these experiments need one another in a circle: {', '.join(circle)}") from None
    chain: dict[str, int] = {}
    for name in reversed(order):
        chain[name] = own[name] + max((chain[other] for other in order if name in needs[other]), default=0)
    return chain


def _take(one: Run) -> str:
    """Take a result of exactly this identity from elsewhere, instead of training: says from where, or nothing.

    ``earlier``: another recipe had taken its place here. ``published``: it came with the repository.
    """
    study, label = one.study, one.label
    _put_aside(one)
    aside = study.aside(label, one.identity)
    places = {"earlier": (aside / "record.json", aside / f"{label}.pt")}
    if takes_published():
        record = paths.published("reports", study.name) / "records" / f"{label}.json"
        places["published"] = record, paths.published("checkpoints", study.name) / f"{label}.pt"
    for source, (file, checkpoint) in places.items():
        # Not there, damaged, or a full disk: then it is trained.
        with contextlib.suppress(records.RecordError, checkpoints.CheckpointError, OSError):
            record, (model, sidecar) = records.read(file), checkpoints.load(checkpoint)
            if not one.identity == record.get("identity") == sidecar.get("identity"):
                continue
            if source == "published":
                record["run"]["copy_of_published"] = True
            elif is_copy(record) and not takes_published():
                continue
            target = study.checkpoint(one.experiment.name, one.seed)
            _copy_checkpoint(checkpoint, target)
            # Large compact files are not published: they are made anew, of the same bytes.
            paths.write_atomically(target.with_suffix(compact.SUFFIX), checkpoints.compact_bytes(model, sidecar))
            records.write(study.name, record)
            if one.is_done():
                shutil.rmtree(aside, ignore_errors=True)
                return source
    return ""


def _put_aside(one: Run) -> None:
    """Keep what another recipe left under this run's name, before it is replaced; nothing if it is damaged."""
    study, checkpoint = one.study, one.study.checkpoint(one.experiment.name, one.seed)
    with contextlib.suppress(records.RecordError, checkpoints.CheckpointError, OSError):
        file = records.path(study.name, one.experiment.name, one.seed)
        record, sidecar = records.read(file), checkpoints.load(checkpoint)[1]
        with contextlib.suppress(ExperimentError):  # what it started from is gone
            if record.get("identity") == one.identity:
                return
        if record.get("identity") == sidecar.get("identity"):
            aside = study.aside(one.label, str(record["identity"]))
            _copy_checkpoint(checkpoint, aside / checkpoint.name)
            paths.write_atomically(aside / "record.json", file.read_bytes())  # last: then it is whole


def _copy_checkpoint(source: Path, target: Path) -> None:
    for suffix in (".json", ".pt"):
        paths.write_atomically(target.with_suffix(suffix), source.with_suffix(suffix).read_bytes())


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
    if not done:
        _put_aside(one)
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


def _each_once_more(take: Callable[[int], list[Run]]) -> Iterator[tuple[str, str]]:
    """(label, error or '') of each run as it ends.

    A process that the system kills, for want of memory most likely, takes others with it; and trainings that share
    one memory can be too many for it. What was lost so is tried once more, one at a time.
    """
    lost: list[Run] = []
    while True:
        for one, error in _in_parallel(take):
            if error.startswith((SHORT_OF_MEMORY, KILLED)):
                lost.append(one)
            else:
                yield one.label, error
        if not lost:
            return
        alone = [lost.pop(0)]
        for one, error in _in_parallel(lambda most, alone=alone: [alone.pop()] if alone else []):
            yield one.label, error.replace(KILLED, f"{KILLED} twice, for want of memory perhaps: run again with more")


def _in_parallel(take: Callable[[int], list[Run]]) -> Iterator[tuple[Run, str]]:
    """Each run as it ends, and what went wrong. One process per core, one thread each.

    With ``KWS_CLUSTER=tcp://host:port``, the address of a Dask scheduler, its workers are used instead: as
    many runs at a time as they have threads, on other machines too when all see the same ``KWS_HOME``. What
    a lost worker was doing is given to another one.

    Args:
        take: gives what to train next, at most so many; asked again whenever a run has ended.
    """
    if first := take(1):
        with _workers() as (submit, most):
            running: dict[Future, Run] = {}
            chosen = [*first, *take(most - 1)]
            while running or chosen:
                for one in chosen:
                    # A fresh study has read nothing yet: its data is not sent around, each process maps the files.
                    fresh = dataclasses.replace(one, study=dataclasses.replace(one.study))
                    running[submit(fresh, str(paths.home()))] = one
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), KILLED if processes.was_killed(future) else future.result()
                chosen = take(most - len(running))


@contextlib.contextmanager
def _workers() -> Iterator[tuple[Callable[..., Future], int]]:
    """What starts a run somewhere, and how many should go on at a time."""
    if address := os.environ.get("KWS_CLUSTER"):
        with _cluster(address) as client:
            threads = client.scheduler_info(n_workers=-1)["workers"]
            yield functools.partial(client.get_executor(pure=False).submit, _attempt), len(threads)
        return
    most = cpu_count() if device() == "cpu" else min(cpu_count(), GPU_JOBS)
    with processes.workers(most) as submit:
        yield functools.partial(submit, _attempt), most


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


def _attempt(one: Run, home: str) -> str:
    os.environ["KWS_HOME"] = home  # a worker may have been started for another home
    with one_thread():
        try:
            execute(one)
            return ""
        except (MemoryError, torch.OutOfMemoryError) as error:
            told = str(error).partition("\n")[0]
            return f"{SHORT_OF_MEMORY}{told or 'no more'} (an empty CUDA_VISIBLE_DEVICES trains on the CPU)"
        except Exception as error:  # one failing run must not take the others with it
            return f"{type(error).__name__}: {error}"
