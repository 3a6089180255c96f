"""Small-footprint keyword spotting: train, distil, quantize, stream, measure.

On the ground, without torch:

``paths``       where things live
``config``      sizes and settings
``metrics``     AU-FA-FR, thresholds, intervals over speakers
``audio``       a recording of any kind -> float32 mono at 16 kHz
``arithmetic``  the same bytes on any processor
``processes``   locks, files made once, helpers that end with their run

And above it six rooms; each imports only from those before it, and inside from the top of its own list down:

``data``       recordings -> clips, split, log-mels, augmented views, pieces of stream
``nets``       what is trained, on what terms, and what it costs
``training``   how a net learns, shrinks and becomes a file
``streaming``  the same weights on endless sound, what becomes an event, other runtimes
``results``    records -> tables, figures, the report; no torch
``lab``        what is tried, once per seed: cached, resumed, in parallel

``kwslib.cli`` offers the same in a shell. What notebooks need can be had from here and is imported when it is touched:
``from kwslib import Experiment, Labels, Training, open_study, run``.
"""

import importlib

from kwslib import arithmetic

arithmetic.pin()
__version__ = "0.1.0"

OFFERED = {
    "config": "CLIP_SAMPLES SAMPLE_RATE CRNNConfig SynthesisConfig",
    "data.augment": "REPORTS STRONG WITHOUT_MASKS Augmentation",
    "data.pieces": "PieceConfig",
    "nets.losses": "AttentionKL Labels LayerwiseMSE SoftTargets",
    "nets.rivals": "BCResNetConfig SeparableConfig TimeNetConfig",
    "training.loop": "Training",
    "training.quantize": "PRECISIONS DynamicInt8 Fold Half WeightInt",
    "training.tune": "QAT StreamTune Tune",
    "training.prune": "Prune",
    "streaming.tracks": "StreamSpec",
    "streaming.decision": "Decide",
    "lab.run": "Experiment",
    "lab.study": "open_study",
    "lab.workers": "run",
}
_ROOM = {name: room for room, names in OFFERED.items() for name in names.split()}


def __getattr__(name: str):
    if name not in _ROOM:
        raise AttributeError(f"kwslib offers no {name!r}: there are {', '.join(sorted(_ROOM))}")
    return getattr(importlib.import_module(f"kwslib.{_ROOM[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_ROOM]
