"""An experiment as data: what is trained, who teaches it, what is done to it afterwards, what it is compared with."""

from dataclasses import dataclass

from kwslib import paths
from kwslib.data.augment import Augmentation
from kwslib.nets.losses import Labels
from kwslib.nets.rivals import Config
from kwslib.streaming.decision import Decide
from kwslib.training.loop import Training


@dataclass(frozen=True)
class Experiment:
    """A named recipe, run once per seed.

    Attributes:
        name: of its files; also how other experiments refer to it.
        student: architecture. Leave it out when ``start`` gives the model.
        teacher: name of the experiment whose model of the same seed teaches.
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
    def needs(self) -> list[str]:
        """Experiments that must be finished first."""
        return [name for name in (self.teacher, self.start) if name]
