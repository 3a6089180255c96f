"""Recipe x seed -> checkpoint + record: cached, resumed, in parallel.

An experiment is data. Its identity is a hash of the recipe, the corpus, the split, the seed and
what it starts from. Same identity: the result is loaded. Interrupted: training goes on after the
last epoch. Anything else: it is trained.
"""

import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from torch import nn
from tqdm.auto import tqdm

from kwslib import (
    augment,
    checkpoints,
    cost,
    decide,
    metrics,
    models,
    paths,
    processes,
    provenance,
    records,
    sequences,
    stream,
    streams,
    tracking,
    train,
)
from kwslib.architectures import Config, Ensemble, build
from kwslib.augment import Augmentation
from kwslib.config import FeatureConfig, describe, identity
from kwslib.decide import Decide
from kwslib.features import one_thread
from kwslib.losses import Labels
from kwslib.sequences import Sequences
from kwslib.study import ExperimentError, Results, Study
from kwslib.train import Training

SHORT_OF_MEMORY = "out of memory: "
GPU_JOBS = 4  # trainings that share one GPU: each takes about half a gigabyte of its memory


@dataclass(frozen=True)
class Experiment:
    """A named recipe, run once per seed.

    Attributes:
        name: of its files; also how other experiments refer to it.
        student: architecture. Leave it out when ``start`` gives the model.
        teacher: name of the experiment whose model of the same seed teaches.
        ensemble: the teacher's models of all seeds teach together.
        losses: terms of ``kwslib.losses``, added up.
        training, augmentation: how it is trained.
        start: name of the experiment whose trained model ``after`` is applied to.
        after: steps such as ``Half()`` or ``Prune(0.3)``, in order. One with a ``training`` of its own tunes the
            model with the losses, teacher and augmentation given here.
        control: name of the experiment this one is compared with, for example without teacher.
        note: one line for the report.
    """

    name: str
    student: Config | None = None
    teacher: str | None = None
    ensemble: bool = False
    losses: tuple = (Labels(),)
    training: Training = Training()
    augmentation: Augmentation = Augmentation()
    start: str | None = None
    after: tuple = ()
    control: str | None = None
    note: str = ""

    def __post_init__(self):
        if self.name != paths.slug(self.name):
            raise ValueError(
                f"experiment name {self.name!r} is not usable as a file name: try {paths.slug(self.name)!r}"
            )
        if (self.student is None) == (self.start is None):
            raise ValueError(f"experiment {self.name!r} needs either a student to train or a start to build on")
        if self.name in (self.control, self.teacher, self.start):
            raise ValueError(f"experiment {self.name!r} cannot be its own control, teacher or start")
        if self.ensemble and not self.teacher:
            raise ValueError(f"experiment {self.name!r} wants an ensemble but names no teacher")
        if self.teacher is None and any(term.needs_teacher for term in self.losses):
            raise ValueError(f"experiment {self.name!r} distils but names no teacher")

    @property
    def tuning_steps(self) -> list:
        """Those of the steps after training that train again."""
        return [step for step in self.after if getattr(step, "training", None)]

    @property
    def decides(self) -> Decide | None:
        """The step that wants a decision for streams, if there is one."""
        return next((step for step in self.after if isinstance(step, Decide)), None)

    @property
    def trains(self) -> bool:
        """Whether anything is trained: a student, or by a step."""
        return self.student is not None or bool(self.tuning_steps)

    @property
    def needs(self) -> list[str]:
        """Experiments that must be finished first."""
        return [name for name in (self.teacher, self.start) if name]


@dataclass(frozen=True)
class _Task:
    """One experiment and seed, with everything a worker process needs to know."""

    study: Study
    experiment: Experiment
    seed: int
    order: int

    @property
    def label(self) -> str:
        return f"{self.experiment.name}-seed{self.seed}"

    @property
    def teacher_seeds(self) -> list[int]:
        """The same seed; for an ensemble all that the teacher was ever trained with."""
        if not self.experiment.ensemble:
            return [self.seed]
        files = self.study.checkpoint(self.experiment.teacher).parent.glob(f"{self.experiment.teacher}-seed*.pt")
        return sorted(_split_label(file.stem)[1] for file in files) or [self.seed]

    @cached_property
    def identity(self) -> str:
        training = self.study.sized(self.experiment.training)
        recipe = {**describe(self.experiment), "name": "", "note": "", "control": "", "training": training}
        origins = [
            _identity_on_disk(self.study, name, seed) for name in self.experiment.needs for seed in self.teacher_seeds
        ]
        profile = self.study.profile
        trained = (profile.views, augment.VERSION) if self.experiment.trains else ()
        tuned = [self.study.sized(step.training).epochs for step in self.experiment.tuning_steps]
        pieces = [sequences.VERSION for step in self.experiment.tuning_steps if hasattr(step, "sequences")]
        heard = [profile.stream_percent, streams.VERSION, decide.VERSION] if self.experiment.decides else []
        sizes = (profile.bootstrap, *trained, *tuned, *pieces, *heard)
        return identity(recipe, self.study.corpus.fingerprint, self.study.split.sha256, self.seed, origins, sizes)

    @property
    def needed_labels(self) -> set[str]:
        """Runs that must be finished first: those with the same seed; for an ensemble all of the teacher."""
        experiment, seeds = self.experiment, range(self.study.seeds) if self.experiment.ensemble else [self.seed]
        return {f"{name}-seed{seed}" for name in experiment.needs for seed in seeds}

    def is_done(self) -> bool:
        """Whether record and checkpoint of exactly this recipe are there and belong together."""
        file = records.path(self.study.name, self.experiment.name, self.seed)
        checkpoint = self.study.checkpoint(self.experiment.name, self.seed)
        try:
            record, sidecar = records.read(file), checkpoints.load(checkpoint)[1]
            checkpoints.load(checkpoint.with_suffix(checkpoints.COMPACT_SUFFIX))
        except (records.RecordError, models.CheckpointError):
            return False
        same_file = record["checkpoint"]["sha256"] == sidecar.get("sha256")
        same_file &= all(record[key] == sidecar.get(key) for key in ("model", "features", "keyword", "threshold"))
        return record["identity"] == self.identity == sidecar.get("identity") and same_file


def _split_label(label: str) -> tuple[str, int]:
    """Experiment and seed of a run's label, which is also the name of its files.

    >>> _split_label("a1-kd-seed2")
    ('a1-kd', 2)
    """
    name, _, seed = label.rpartition("-seed")
    return name, int(seed)


def _identity_on_disk(study: Study, experiment: str, seed: int) -> str:
    checkpoint = study.checkpoint(experiment, seed)
    try:
        return models.read_sidecar(checkpoint)["identity"]
    except (models.CheckpointError, KeyError) as error:
        raise ExperimentError(
            f"{experiment!r} (seed {seed}) is needed but has no checkpoint in {checkpoint.parent}: "
            f"run the notebook that defines it first ({error})"
        ) from None


def run(study: Study, experiments: Sequence[Experiment]) -> Results:
    """Run what is not done yet, in parallel over cores, and return all results so far.

    Raises:
        ExperimentError: something an experiment needs is missing, or a run failed. What the
            other runs computed is kept.
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
        seeds_left = {e.name: study.seeds - sum(_split_label(f)[0] == e.name for f in failures) for e in experiments}
        if not all(seeds_left.values()):
            raise ExperimentError(listing)
        warnings.warn(listing, stacklevel=2)
    return study.results()


def _run(study: Study, experiments: Sequence[Experiment]) -> dict[str, str]:
    """Run what is not done; returns what failed and why, by label."""
    names = [e.name for e in experiments]
    offset = _next_order(study, names)
    waiting = [
        _Task(study, experiment, seed, offset + position)
        for position, experiment in enumerate(experiments)
        for seed in range(study.seeds)
    ]
    failures = _without_origin(waiting)  # complains before anything is computed
    _check_controls(study, experiments)
    for task in waiting:
        records.forget_failure(study.name, task.experiment.name, task.seed)
    logs: list[Path] = []
    with tqdm(total=len(waiting), desc=study.name, unit="run") as bar:
        while waiting:
            open_names = {task.experiment.name for task in waiting}
            wave = [task for task in waiting if not open_names.intersection(task.experiment.needs)]
            if not wave:
                raise ExperimentError(
                    f"these experiments need one another in a circle: {', '.join(sorted(open_names))}"
                )
            waiting = [task for task in waiting if task not in wave]
            for task in wave:
                if broken := task.needed_labels.intersection(failures):
                    failures[task.label] = f"needs {', '.join(sorted(broken))}, which failed"
            wave = [task for task in wave if task.label not in failures]
            todo = [task for task in wave if not task.is_done()]
            bar.update(len(wave) - len(todo))
            for task in wave:
                if task not in todo:
                    _refresh(task)
            _prepare_data(study, todo)
            _drop_other_recipes(todo)
            for label, error in _each_once_more(todo):
                bar.set_postfix_str(label)
                bar.update()
                if error:
                    failures[label] = error
            for task in wave:
                if task.label not in failures:
                    _time(task)
            logs += [tracking.csv_path(study.name, t.experiment.name, t.seed) for t in todo if t.experiment.trains]
    for label, error in failures.items():
        records.note_failure(study.name, *_split_label(label), error)
    tracking.mirror(study.name, [log for log in logs if log.exists()])
    return failures


def _without_origin(tasks: list[_Task]) -> dict[str, str]:
    """Runs that build on one of an earlier notebook that failed, and why, by label.

    Raises:
        ExperimentError: what an experiment builds on is missing for every seed: it was never run.
    """
    here = {task.experiment.name for task in tasks}
    reasons: dict[str, str] = {}
    for experiment in dict.fromkeys(task.experiment for task in tasks):
        own = [task for task in tasks if task.experiment is experiment]
        for name in set(experiment.needs) - here:
            missing = {}
            for task in own:
                try:
                    _identity_on_disk(task.study, name, task.seed)
                except ExperimentError as error:
                    missing[task.label] = error
            if len(missing) == len(own):
                raise next(iter(missing.values()))
            reasons |= {label: str(error) for label, error in missing.items()}
    return reasons


def _check_controls(study: Study, experiments: Sequence[Experiment]) -> None:
    """A control that is missing, or was trained for another time, would make a gain that means nothing."""
    here = {experiment.name: experiment for experiment in experiments}
    for experiment in [e for e in experiments if e.control]:
        if experiment.control in here:
            control = describe(here[experiment.control])
        else:
            found = [records.path(study.name, experiment.control, seed) for seed in range(study.seeds)]
            found = [file for file in found if file.exists()]
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


def _refresh(task: _Task) -> None:
    """Keep order, control and note of a finished record up to date; they are not part of its identity."""
    record = records.read(records.path(task.study.name, task.experiment.name, task.seed))
    fresh = _wording(task)
    if any(record[key] != value for key, value in fresh.items()):
        records.write(task.study.name, record | fresh)


def _wording(task: _Task) -> dict:
    return {"order": task.order, "control": task.experiment.control, "note": task.experiment.note}


def _drop_other_recipes(todo: list[_Task]) -> None:
    """Remove runs of these experiments that other seeds left behind under another recipe or data.

    Otherwise a run with fewer seeds would be averaged with what is no longer the same experiment.
    """
    for experiment, study in {task.experiment: task.study for task in todo}.items():
        for file in (paths.reports(study.name) / "records").glob(f"{experiment.name}-seed*.json"):
            seed = _split_label(file.stem)[1]
            task = _Task(study, experiment, seed, order=0)
            try:
                same = seed < study.seeds or task.is_done()
            except ExperimentError:  # what it started from is gone
                same = False
            if not same:
                checkpoint = study.checkpoint(experiment.name, seed)
                for old in (file, checkpoint, checkpoint.with_suffix(".json")):
                    old.unlink(missing_ok=True)


def _time(task: _Task) -> None:
    """Measure the latency of a finished run, now that nothing else is running, into its record.

    Also of one that an interruption left untimed; one that has its figures keeps them.
    """
    record = records.read(records.path(task.study.name, task.experiment.name, task.seed))
    if record["run"].get("latency_ms_per_clip") is not None:
        return
    model = task.study.model(task.experiment.name, task.seed)
    if hasattr(model, "columns"):
        record["run"]["latency_ms_per_step"] = round(cost.step_latency_ms(stream.StreamingModel(model)), 3)
    record["run"]["latency_ms_per_clip"] = round(cost.clip_latency_ms(model), 3)
    records.write(task.study.name, record)


def _prepare_data(study: Study, tasks: list[_Task]) -> None:
    """Compute what the workers share before they start, so that none waits for another."""
    if tasks:
        _ = study.logmels
        for augmentation in {task.experiment.augmentation for task in tasks if task.experiment.trains}:
            study.bank(augmentation)
        for experiment in {task.experiment for task in tasks}:
            for step in experiment.tuning_steps:
                if hasattr(step, "sequences"):
                    study.pieces(step.sequences, experiment.augmentation)
            if experiment.decides:
                wanted = experiment.decides.sized(study.profile.stream_percent)
                study.streams("val", wanted.made_on)
                study.streams("test", wanted.streams)


def _each_once_more(tasks: list[_Task]):
    """(label, error or '') of each task as it ends.

    A process that the system kills, for want of memory most likely, takes others with it; and trainings that share
    one memory can be too many for it. What was lost so is tried once more, one task at a time.
    """
    ended = set()
    try:
        for label, error in _in_parallel(tasks):
            if not error.startswith(SHORT_OF_MEMORY):
                ended.add(label)
                yield label, error
    except TerminatedWorkerError:
        pass
    for task in [task for task in tasks if task.label not in ended]:
        try:
            yield from _in_parallel([task])
        except TerminatedWorkerError:
            yield task.label, "its process was killed twice, for want of memory perhaps: run again with more"


def _in_parallel(tasks: list[_Task]):
    """(label, error or '') of each task as it ends. One process per core, one thread each.

    With ``KWS_CLUSTER=tcp://host:port``, the address of a Dask scheduler, its workers are used instead: as
    many tasks at a time as they have threads, on other machines too when all see the same ``KWS_HOME``. What
    a lost worker was doing is given to another one.
    """
    address = os.environ.get("KWS_CLUSTER")
    home = str(paths.home())
    # A fresh study has read nothing yet: its data is not sent around, each process maps the files itself.
    parent = None if address else os.getpid()
    calls = [delayed(_attempt)(dataclasses.replace(t, study=dataclasses.replace(t.study)), home, parent) for t in tasks]
    if not address:
        most = cpu_count() if _device() == "cpu" else min(cpu_count(), GPU_JOBS)
        # At least two workers, though perhaps one task at a time: with one joblib would train in this process,
        # which has to outlive whatever happens to a training.
        yield from Parallel(max(2, min(most, len(tasks))), return_as="generator_unordered", pre_dispatch=most)(calls)
    elif tasks:
        with _cluster(address), parallel_config(backend="dask"):
            yield from Parallel(return_as="generator_unordered")(calls)


def _cluster(address: str):
    """A client of the scheduler at this address, whose workers run one task at a time each."""
    try:
        from distributed import Client
    except ImportError:
        raise ExperimentError("KWS_CLUSTER needs the package distributed: pip install 'kwslib[cluster]'") from None
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise ExperimentError(f"no Dask scheduler at {address} ({error}): start one, or unset KWS_CLUSTER") from None
    threads = [worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    if not threads or max(threads) > 1:  # two trainings in one process would share a random generator
        client.close()
        raise ExperimentError(f"{address} needs workers with one thread each: start them with --nthreads 1")
    return client


def _attempt(task: _Task, home: str, parent: int | None) -> tuple[str, str]:
    os.environ["KWS_HOME"] = home  # a worker may have been started for another home
    if parent is not None:
        processes.end_with(parent)
    with one_thread():
        try:
            _execute(task)
            return task.label, ""
        except (MemoryError, torch.OutOfMemoryError) as error:
            told = str(error).partition("\n")[0]
            return task.label, f"{SHORT_OF_MEMORY}{told or 'no more'} (an empty CUDA_VISIBLE_DEVICES trains on the CPU)"
        except Exception as error:  # one failing run must not take the others with it
            return task.label, f"{type(error).__name__}: {error}"


def _execute(task: _Task) -> None:
    """Train or convert one model, save it, load it again, score it, write the record."""
    began = time.perf_counter()
    study, experiment = task.study, task.experiment
    model, history = _trained(task)
    config = model.config
    checkpoint = study.checkpoint(experiment.name, task.seed)
    described = {
        "experiment": experiment.name,
        "seed": task.seed,
        "identity": task.identity,
        "study": study.name,
        "keyword": study.keyword,
        "features": describe(FeatureConfig()),
        "model": describe(config),
        "threshold": study.threshold(model),
    }
    sidecar = checkpoints.save(checkpoint, model.cpu(), described)
    written = study.model(experiment.name, task.seed)  # what is scored is what was written
    on_streams = {}
    if experiment.decides:
        step = experiment.decides.sized(study.profile.stream_percent)
        val, test = study.streams("val", step.made_on), study.streams("test", step.streams)
        decision, on_streams["streams"] = decide.measure(written, step, val, test)
        sidecar = checkpoints.save(checkpoint, model, described | {"decision": dataclasses.asdict(decision)})
    record = {
        **described,
        **_wording(task),
        "profile": study.profile.name,
        "precision": sidecar["precision"],
        "epochs": len(history),
        "recipe": describe(experiment),
        "data": _data(study),
        "cost": {
            **cost.cost(config),
            **checkpoints.sizes(written),
            "checkpoint_bytes": sidecar["checkpoint_bytes"],
            "compact_bytes": sidecar["compact_bytes"],
        },
        "metrics": {**_measure(study, written), **on_streams},
        "history": {key: [row[key] for row in history] for key in (history[0] if history else {}) if key != "wall_s"},
        "checkpoint": {"file": checkpoint.name, "sha256": sidecar["sha256"]},
        "run": {
            "wall_s": round(time.perf_counter() - began, 1),
            "latency_ms_per_clip": None,  # measured when the machine is quiet, see _time
            "latency_ms_per_step": None,
            "device": _device(),
            **provenance.of_run(),
        },
    }
    records.write(study.name, record)
    for file in _resume_file(task).parent.glob(f"{task.label}.{task.identity}.*resume"):
        file.unlink()


def _fit(
    task: _Task, model: nn.Module, training: Training, resume: Path, sequences: Sequences | None = None, **options
) -> None:
    """Train a model in place with the experiment's losses, teacher and augmentation, on clips or pieces of stream."""
    study, experiment = task.study, task.experiment
    teacher = None
    if experiment.ensemble:
        teacher = Ensemble([study.model(experiment.teacher, seed) for seed in task.teacher_seeds])
    elif experiment.teacher:
        teacher = study.model(experiment.teacher, task.seed)
    train_rows, val_rows = study.split.train, study.split.val
    pieces, said = (None, None) if sequences is None else study.pieces(sequences, experiment.augmentation)
    data = train.Data(
        bank=study.bank(experiment.augmentation),
        labels=study.labels[train_rows],
        val=study.logmels[val_rows],
        val_labels=study.labels[val_rows],
        pieces=pieces,
        said=said,
    )
    train.fit(
        model,
        data,
        study.sized(training),
        experiment.losses,
        experiment.augmentation,
        task.seed,
        teacher=teacher,
        resume=resume,
        device=_device(),
        **options,
    )


def _trained(task: _Task) -> tuple[nn.Module, list[dict]]:
    """The model of an experiment, trained or taken from another one, after all its steps; and the history."""
    study, experiment = task.study, task.experiment
    log = tracking.CsvLog(tracking.csv_path(study.name, experiment.name, task.seed))
    history: list[dict] = []

    def keep(row: dict) -> None:
        history.append({**row, "epoch": len(history) + 1})
        log(history[-1])

    def tune(model: nn.Module, training: Training, **options) -> None:
        resume = _resume_file(task).with_suffix(f".{len(history)}.resume")
        _fit(task, model, training, resume, on_epoch=keep, trained=True, **options)

    try:
        if experiment.student is None:
            model = study.model(experiment.start, task.seed)
        else:
            torch.manual_seed(task.seed)
            model = build(experiment.student)
            _fit(task, model, experiment.training, _resume_file(task), on_epoch=keep)
        for step in experiment.after:
            model = step(model.cpu(), tune) if step in experiment.tuning_steps else step(model.cpu())
    finally:
        log.close()
    return model, history


def _resume_file(task: _Task) -> Path:
    """The state of an unfinished training; its name holds the identity, so another recipe never resumes it."""
    return paths.checkpoints(task.study.name) / f"{task.label}.{task.identity}.resume"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _data(study: Study) -> dict:
    return {
        "corpus": study.corpus.name,
        "corpus_fingerprint": study.corpus.fingerprint,
        "split": study.split.name,
        "split_sha256": study.split.sha256,
        "n_train": len(study.split.train),
        "n_val": len(study.split.val),
        "n_test": len(study.split.test),
    }


def _measure(study: Study, model: nn.Module) -> dict:
    """The metrics part of a record: selected on val, reported on test."""
    val, test = study.split.val, study.split.test
    on_val = train.score(model, study.logmels[val])
    on_test = train.score(model, study.logmels[test])
    is_keyword = study.labels[test] == 1
    speakers = study.corpus.clips["speaker"].to_numpy()[test]
    area = metrics.au_fa_fr(on_test, is_keyword)
    replicates = metrics.bootstrap(on_test, is_keyword, speakers, study.profile.bootstrap)
    fa, fr, _ = metrics.fa_fr_curve(on_test, is_keyword)
    corner = np.flatnonzero(np.diff(fr, prepend=np.inf, append=np.inf)[:-1] != 0)  # where a keyword is gained
    return {
        "au_fa_fr": area,
        "au_fa_fr_val": metrics.au_fa_fr(on_val, study.labels[val] == 1),
        "au_fa_fr_ci95": list(records.interval95(replicates)),
        "roc_auc": metrics.roc_auc(area, is_keyword),
        "n_keyword": int(is_keyword.sum()),
        "n_other": int((~is_keyword).sum()),
        "n_speakers": len(np.unique(speakers)),
        "interval_over": metrics.units(speakers, is_keyword),
        "bootstrap": [float(f"{value:.4g}") for value in replicates],
        "curve": {"fa": fa[corner].tolist(), "fr": fr[corner].tolist()},
    }
