"""An experiment as data; one seed of it: train or convert a model, save it, load it again, score it, write the record.

A run's identity is a hash of the recipe, the corpus, the split, the seed and what it starts from.
"""

import dataclasses
import io
import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kwslib import metrics, paths
from kwslib.config import FeatureConfig, describe, identity
from kwslib.data import augment, features, pieces
from kwslib.data.augment import Augmentation
from kwslib.lab.study import ExperimentError, Study
from kwslib.nets import cost
from kwslib.nets.crnn import score
from kwslib.nets.losses import Labels
from kwslib.nets.rivals import Config, Ensemble, build
from kwslib.processes import made_once
from kwslib.results import provenance, records, tracking
from kwslib.streaming import decision, tracks
from kwslib.streaming.decision import Decide
from kwslib.streaming.model import StreamingModel
from kwslib.training import checkpoints, compact, loop
from kwslib.training.loop import Objective, Training, fit
from kwslib.training.material import Clips, Material, Pieces, Taught, teach


@dataclass(frozen=True)
class Experiment:
    """A named recipe, run once per seed.

    Attributes:
        name: of its files; also how other experiments refer to it.
        student: architecture. Leave it out when ``start`` gives the model.
        teacher: name of the experiment whose model of the same seed teaches; several names: they teach together, by
            the mean of what they say.
        ensemble: the teacher's models of all seeds teach together.
        losses: terms of ``kwslib.nets.losses``, added up.
        training, augmentation: how it is trained.
        start: name of the experiment whose trained model ``after`` is applied to.
        after: steps such as ``Half()`` or ``Prune(0.3)``, in order. One with a ``training`` of its own tunes the
            model with the losses, teacher and augmentation given here.
        control: name of the experiment this one is compared with, for example without teacher.
        note: one line for the report.
    """

    name: str
    student: Config | None = None
    teacher: str | tuple[str, ...] | None = None
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
        if self.name in (self.control, self.start, *self.teachers):
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
    def piece_steps(self) -> list:
        """Those of them that train on pieces of stream."""
        return [step for step in self.tuning_steps if hasattr(step, "pieces")]

    @property
    def decision_step(self) -> Decide | None:
        """The step that wants a decision for streams, if there is one."""
        return next((step for step in self.after if isinstance(step, Decide)), None)

    @property
    def trains(self) -> bool:
        """Whether anything is trained: a student, or by a step."""
        return self.student is not None or bool(self.tuning_steps)

    @property
    def epochs(self) -> int:
        """Of all its trainings, as the recipe asks for them."""
        return (self.training.epochs if self.student else 0) + sum(step.training.epochs for step in self.tuning_steps)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the experiments that teach."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher or ()

    @property
    def needs(self) -> list[str]:
        """Experiments that must be finished first."""
        return [*self.teachers, *filter(None, [self.start])]


@dataclass(frozen=True)
class Run:
    """One experiment and seed, with everything a worker process needs to know."""

    study: Study
    experiment: Experiment
    seed: int
    order: int

    @property
    def label(self) -> str:
        return paths.label(self.experiment.name, self.seed)

    @property
    def teacher_seeds(self) -> list[int]:
        """The same seed; for an ensemble all that the (first) teacher was ever trained with."""
        if not self.experiment.ensemble:
            return [self.seed]
        name = self.experiment.teachers[0]
        files = self.study.checkpoint(name).parent.glob(f"{name}-seed*.pt")
        return sorted(paths.split_label(file.stem)[1] for file in files) or [self.seed]

    @cached_property
    def identity(self) -> str:
        training = self.study.sized(self.experiment.training)
        recipe = {**describe(self.experiment), "name": "", "note": "", "control": "", "training": training}
        origins = [
            identity_on_disk(self.study, name, seed) for name in self.experiment.needs for seed in self.teacher_seeds
        ]
        profile = self.study.profile
        trained = (profile.views, features.VERSION, augment.VERSION, loop.VERSION) if self.experiment.trains else ()
        tuned = [self.study.sized(step.training).epochs for step in self.experiment.tuning_steps]
        on_pieces = [pieces.VERSION for _ in self.experiment.piece_steps]
        decided = (profile.stream_percent, tracks.VERSION, decision.VERSION) if self.experiment.decision_step else ()
        sizes = (profile.bootstrap, *trained, *tuned, *on_pieces, *decided)
        return identity(recipe, self.study.corpus.fingerprint, self.study.split.sha256, self.seed, origins, sizes)

    @property
    def needed_labels(self) -> set[str]:
        """Runs that must be finished first: those with the same seed; for an ensemble all of the teacher."""
        experiment, seeds = self.experiment, range(self.study.seeds) if self.experiment.ensemble else [self.seed]
        return {paths.label(name, seed) for name in experiment.needs for seed in seeds}

    def is_done(self) -> bool:
        """Whether record and checkpoint of exactly this recipe are there and belong together."""
        file = records.path(self.study.name, self.experiment.name, self.seed)
        checkpoint = self.study.checkpoint(self.experiment.name, self.seed)
        try:
            record, sidecar = records.read(file), checkpoints.load(checkpoint)[1]
            checkpoints.load(checkpoint.with_suffix(compact.SUFFIX))
        except (records.RecordError, checkpoints.CheckpointError):
            return False
        same_file = record.get("checkpoint") == {"file": checkpoint.name, "sha256": sidecar.get("sha256")}
        same_file &= all(record.get(key) == sidecar.get(key) for key in ("model", "features", "keyword", "threshold"))
        same = record.get("identity") == self.identity == sidecar.get("identity")
        return same and same_file and not (is_copy(record) and not takes_published())


def takes_published() -> bool:
    """Whether a published result of the same identity is taken instead of training: ``KWS_PUBLISHED=1``.

    ``make lab`` says so; ``make reproduce`` says 0 to its notebooks, for copies would prove nothing.
    """
    return os.environ.get("KWS_PUBLISHED") == "1"


def is_copy(record: dict) -> bool:
    """Whether a run's record was taken from the published ones, not made here."""
    return bool(record["run"].get("copy_of_published"))


def identity_on_disk(study: Study, experiment: str, seed: int) -> str:
    """The identity that a run's checkpoint was saved with.

    Raises:
        ExperimentError: there is no checkpoint, or its description is damaged.
    """
    checkpoint = study.checkpoint(experiment, seed)
    try:
        return checkpoints.read_sidecar(checkpoint)["identity"]
    except (checkpoints.CheckpointError, KeyError) as error:
        raise ExperimentError(
            f"{experiment!r} (seed {seed}) is needed but has no checkpoint in {checkpoint.parent}: "
            f"run the notebook that defines it first ({error})"
        ) from None


def refresh(run: Run) -> None:
    """Keep order, control and note of a finished record up to date; they are not part of its identity."""
    record = records.read(records.path(run.study.name, run.experiment.name, run.seed))
    fresh = _wording(run)
    if any(record[key] != value for key, value in fresh.items()):
        records.write(run.study.name, record | fresh)


def _wording(run: Run) -> dict:
    return {"order": run.order, "control": run.experiment.control, "note": run.experiment.note}


def take_time(run: Run) -> None:
    """Measure the latency of a finished run, now that nothing else is running, into its record.

    Also of one that an interruption left untimed; one that has its figures keeps them.
    """
    record = records.read(records.path(run.study.name, run.experiment.name, run.seed))
    if record["run"].get("latency_ms_per_clip") is not None:
        return
    model = run.study.model(run.experiment.name, run.seed)
    if hasattr(model, "columns"):
        record["run"]["latency_ms_per_step"] = round(cost.step_latency_ms(StreamingModel(model)), 3)
    record["run"]["latency_ms_per_clip"] = round(cost.clip_latency_ms(model), 3)
    records.write(run.study.name, record)


def execute(run: Run) -> None:
    """Train or convert one model, save it, load it again, score it, write the record."""
    began = time.perf_counter()
    study, experiment = run.study, run.experiment
    model, history = _trained(run)
    model.on_streams, config = bool(experiment.decision_step), model.config
    checkpoint = study.checkpoint(experiment.name, run.seed)
    described = {"experiment": experiment.name, "seed": run.seed, "identity": run.identity, "study": study.name}
    described |= {"keyword": study.keyword, "threshold": study.threshold(model)}
    described |= {"features": describe(FeatureConfig()), "model": describe(config)}
    sidecar = checkpoints.save(checkpoint, model.cpu(), described)
    written = study.model(experiment.name, run.seed)  # what is scored is what was written
    on_streams = {}
    if experiment.decision_step:
        step = experiment.decision_step.sized(study.profile.stream_percent)
        val, test = study.tracks("val", step.made_on), study.tracks("test", step.streams)
        made, on_streams["streams"] = decision.measure(written, step, val, test)
        sidecar = checkpoints.save(checkpoint, model, described | {"decision": dataclasses.asdict(made)})
        written = study.model(experiment.name, run.seed)
    record = {
        **described,
        **_wording(run),
        "profile": study.profile.name,
        "precision": sidecar["precision"],
        "epochs": len(history),
        "recipe": describe(experiment),
        "data": _data(study),
        "cost": {
            **cost.cost(config),
            **checkpoints.sizes(written),
            **{key: sidecar[key] for key in ("checkpoint_bytes", "compact_bytes")},
        },
        "metrics": {**_measure(study, written), **on_streams},
        "history": {key: [row[key] for row in history] for key in (history[0] if history else {}) if key != "wall_s"},
        "checkpoint": {"file": checkpoint.name, "sha256": sidecar["sha256"]},
        "run": {
            "wall_s": round(time.perf_counter() - began, 1),
            **dict.fromkeys(records.LATENCIES),  # measured when the machine is quiet, see take_time
            "device": device(),
            **provenance.of_run(),
        },
    }
    records.write(study.name, record)
    for file in _resume_file(run).parent.glob(f"{run.label}.{run.identity}.*resume"):
        file.unlink()


def _fit(run: Run, model, training: Training, resume: Path, on_epoch, pieces=None, mel_warp=0.0, **special) -> None:
    """Train a model in place with the experiment's losses, teacher and augmentation, on clips or pieces of stream.

    ``pieces`` says what pieces of stream are made of; ``special`` goes into the training's objective.
    """
    study, experiment = run.study, run.experiment
    heard, val, augmentation = study.heard, study.split.val, experiment.augmentation
    members = [study.model(name, seed) for name in experiment.teachers for seed in run.teacher_seeds]
    teacher = Ensemble(members) if len(members) > 1 else next(iter(members), None)
    if pieces is None:
        source = Clips(study.bank(augmentation), study.labels[heard])
    else:
        source = Pieces(*study.pieces(pieces, augmentation), seconds=len(heard))
    material = Material(source, study.logmels[val], study.labels[val], augmentation, mel_warp)
    read = {part for term in experiment.losses for part in term.reads}
    if read and read <= {"logits", "attention"} and not material.varies:
        special["taught"] = _taught(run, teacher, source, augmentation, pieces)
    objective = Objective(experiment.losses, teacher, **special)
    fit(model, material, objective, study.sized(training), run.seed, resume, on_epoch, device())


def _taught(run: Run, teacher: nn.Module, source: Clips | Pieces, *what: object) -> Taught:
    """What a teacher says of everything in the source, asked once for all experiments that learn from it."""
    study = run.study
    files = [study.checkpoint(name, seed) for name in run.experiment.teachers for seed in run.teacher_seeds]
    who = [checkpoints.read_sidecar(file)["sha256"] for file in files]
    versions = features.VERSION, augment.VERSION, pieces.VERSION
    said_of = study.profile.views, study.split.sha256, what
    path = study.corpus.folder / f"taught-{identity(who, versions, said_of)}.npz"
    with made_once(path) as missing:
        if missing:
            content, taught = io.BytesIO(), teach(teacher, source)
            np.savez(content, **{name: part for name, part in vars(taught).items() if part is not None})
            paths.write_atomically(path, content.getvalue())
    with np.load(path) as kept:
        return Taught(**kept)


def _trained(run: Run) -> tuple[nn.Module, list[dict]]:
    """The model of an experiment, trained or taken from another one, after all its steps; and the history."""
    study, experiment = run.study, run.experiment
    log = tracking.CsvLog(tracking.csv_path(study.name, experiment.name, run.seed))
    history: list[dict] = []

    def keep(row: dict) -> None:
        history.append({**row, "epoch": len(history) + 1})
        log(history[-1])

    def tune(model: nn.Module, training: Training, **options) -> None:
        resume = _resume_file(run).with_suffix(f".{len(history)}.resume")
        _fit(run, model, training, resume, keep, tunes=True, **options)

    try:
        if experiment.student is None:
            model = study.model(experiment.start, run.seed)
        else:
            torch.manual_seed(run.seed)
            model = build(experiment.student)
            _fit(run, model, experiment.training, _resume_file(run), keep)
        for step in experiment.after:
            model = step(model.cpu(), tune) if step in experiment.tuning_steps else step(model.cpu())
    finally:
        log.close()
    return model, history


def _resume_file(run: Run) -> Path:
    """The state of an unfinished training; its name holds the identity, so another recipe never resumes it."""
    return paths.checkpoints(run.study.name) / f"{run.label}.{run.identity}.resume"


def device() -> str:
    """Where models train: a GPU when there is one. Everything is measured on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _data(study: Study) -> dict:
    corpus, split = study.corpus, study.split
    where = {"corpus": corpus.name, "corpus_fingerprint": corpus.fingerprint}
    where |= {"split": split.name, "split_sha256": split.sha256}
    return where | {"n_train": len(split.train), "n_val": len(split.val), "n_test": len(split.test)}


def _measure(study: Study, model: nn.Module) -> dict:
    """The metrics part of a record: selected on val, reported on test."""
    val, test = study.split.val, study.split.test
    on_val = score(model, study.logmels[val])
    on_test = score(model, study.logmels[test])
    is_keyword = study.labels[test] == 1
    speakers = study.corpus.clips["speaker"].to_numpy()[test]
    area = metrics.au_fa_fr(on_test, is_keyword)
    replicates = metrics.bootstrap(on_test, is_keyword, speakers, study.profile.bootstrap)
    fa, fr = metrics.at_share(*metrics.fa_fr_curve(on_test, is_keyword)[:2])
    corner = np.flatnonzero(np.diff(fr, prepend=np.inf, append=np.inf)[:-1] != 0)  # where a keyword is gained
    return {
        "au_fa_fr": area,
        "au_fa_fr_val": metrics.au_fa_fr(on_val, study.labels[val] == 1),
        "au_fa_fr_ci95": list(metrics.interval95(replicates)),
        "au_fa_fr_as_is": metrics.au_fa_fr_as_is(on_test, is_keyword),
        "roc_auc": metrics.roc_auc(area),
        "n_keyword": int(is_keyword.sum()),
        "n_other": int((~is_keyword).sum()),
        "n_speakers": len(np.unique(speakers)),
        "interval_over": metrics.units(speakers, is_keyword),
        "bootstrap": [float(f"{value:.4g}") for value in replicates],
        "curve": {"fa": fa[corner].tolist(), "fr": fr[corner].tolist()},
    }
