"""CPU seconds of trainings that stand for the rest, by the code of this checkout: ``python tests/engine.py``.

Each is made as in the default study, corpus and sizes of the standard profile, but for a twentieth of the epochs; what
a teacher says and other things that are computed once for a study are made before. Prints one JSON object.
"""

import json
import sys
import time
from dataclasses import replace

import kwslib  # noqa: F401 -- before torch and numpy: it decides how they compute

SHARE = 0.1  # of the epochs of the recipes


def recipes() -> list:
    from kwslib import (
        QAT,
        WITHOUT_MASKS,
        AttentionKL,
        Augmentation,
        CRNNConfig,
        Experiment,
        Labels,
        LayerwiseMSE,
        Prune,
        SeparableConfig,
        SoftTargets,
        StreamTune,
        TimeNetConfig,
        Training,
        Tune,
    )

    a1 = CRNNConfig(2, hidden_size=22, gru_num_layers=1)
    train = Training(epochs=30, learning_rate=6e-3, weight_decay=1e-3, ema=0.99)
    short = replace(train, epochs=10)
    plain, unpadded = {"augmentation": WITHOUT_MASKS}, replace(train, normalize=False)
    kd = {**plain, "teacher": "baseline", "losses": (Labels(0.4), SoftTargets(0.6, temperature=10.0))}
    attention = (Labels(0.4), SoftTargets(0.6, temperature=10.0), AttentionKL(0.1))
    stream_kd = {**plain, "teacher": "brook", "losses": (Labels(0.4), SoftTargets(0.6, temperature=4.0))}
    return [
        Experiment("baseline", CRNNConfig(), training=replace(train, epochs=40), augmentation=Augmentation()),
        Experiment("a1-labels", a1, training=train, **plain),
        Experiment("a1-kd", a1, training=train, **kd),
        Experiment("b2-attention", CRNNConfig(4, hidden_size=20, attention_size=15), training=train,
                   **{**kd, "losses": attention}),
        Experiment("e2-layers", CRNNConfig(3, stride=(5, 8), hidden_size=20, cell="rnn"), training=train,
                   **{**kd, "losses": (Labels(), LayerwiseMSE(1.0))}),
        Experiment("rival-separable", SeparableConfig(), training=unpadded, **plain),
        Experiment("rival-kd", SeparableConfig(), training=unpadded, **kd),
        Experiment("a1-kd-qat4", start="a1-kd", after=(QAT(4, replace(train, epochs=20)),), **kd),
        Experiment("prune-50-tuned", start="baseline", after=(Prune(0.5, 0.5, training=short),), **plain),
        Experiment("baseline-tuned", start="baseline", after=(Tune(short),), **plain),
        Experiment("brook", TimeNetConfig(), training=unpadded, **plain),
        Experiment("baseline-stream", start="baseline", after=(StreamTune(train, mel_warp=0.12),), **plain),
        Experiment("brook-stream", start="brook", after=(StreamTune(replace(unpadded, epochs=60)),), **plain),
        Experiment("brook-stream-kd", start="brook", after=(StreamTune(replace(unpadded, epochs=60)),), **stream_kd),
    ]  # fmt: skip


def main() -> None:
    from kwslib import paths
    from kwslib.config import PROFILES
    from kwslib.data.features import one_thread
    from kwslib.lab.run import Run, execute
    from kwslib.lab.study import Study, open_study
    from kwslib.streaming import tracks
    from kwslib.streaming.decision import Decide, measure

    opened = open_study()
    study = Study("synthetic", "sheila", "speaker", replace(PROFILES["standard"], epochs_percent=100 * SHARE), 1)
    took = {}
    with one_thread():
        for experiment in recipes():
            run = Run(study, experiment, 0, 0)
            for _ in range(2):  # the first time what is kept for a study is made
                began = time.process_time()
                execute(run)
                took[experiment.name] = time.process_time() - began
        specs = (tracks.read_spec(paths.stream_spec(name)) for name in ("ordinary", "dense", "noise", "speech"))
        step = Decide(tuple(specs))
        val, test = opened.tracks("val", step.made_on), opened.tracks("test", step.streams)
        for name in ("baseline", "brook"):
            began = time.process_time()
            measure(study.model(name), step, val, test)
            took[f"decision of {name}"] = time.process_time() - began
    print(json.dumps(took))


if __name__ == "__main__":
    sys.exit(main())
