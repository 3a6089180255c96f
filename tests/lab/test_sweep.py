import numpy as np
import optuna
import pytest

from kwslib.config import CRNNConfig
from kwslib.lab import sweep
from kwslib.lab.run import Experiment
from kwslib.lab.study import open_study
from kwslib.lab.sweep import OVER_BUDGET
from kwslib.lab.workers import run
from kwslib.nets import cost
from kwslib.training.loop import Training

BUDGET = 40_000
TWO = Training(epochs=40)  # the smoke profile makes 2 epochs of them


@pytest.fixture
def study(folder):
    return open_study(str(folder), "go", "speaker", "smoke")


def trials_of(study):
    storage = sweep.storage_of(study)
    (question,) = optuna.get_all_study_names(storage)
    return sweep._database(question, storage).get_trials()


def test_costs_come_first_and_a_second_sweep_goes_on_with_the_first(study):
    first = sweep.sweep(study, trials=3, max_macs=BUDGET, training=TWO)
    assert len(first) >= 3 and (first["macs_per_clip"] <= BUDGET).all()
    refused = [t for t in trials_of(study) if t.user_attrs.get("stopped") == OVER_BUDGET]
    assert refused and all("best_val_au_fa_fr" not in t.user_attrs for t in refused)
    assert all("learning_rate" not in t.params for t in refused)  # not even asked how to train
    more = sweep.sweep(study, trials=len(first) + 2, max_macs=BUDGET, training=TWO)
    assert len(more) >= len(first) + 2 and set(first.index) <= set(more.index)
    assert (more.loc[first.index, "val_au_fa_fr"] == first["val_au_fa_fr"]).all()
    number, best = more.index[0], more.iloc[0]
    sizes = {k: int(best[k]) for k in ("kernel_bins", "kernel_frames", "stride_bins", "stride_frames", "layers")}
    config = CRNNConfig(
        int(best["channels"]), (sizes["kernel_bins"], sizes["kernel_frames"]),
        (sizes["stride_bins"], sizes["stride_frames"]), int(best["hidden"]), sizes["layers"], cell=best["cell"],
    )  # fmt: skip
    assert cost.clip_macs(config) == best["macs_per_clip"]
    assert trials_of(study)[number].state.is_finished()


def test_the_front_is_what_no_other_trial_beats_in_both(study):
    database = sweep._database("q", sweep.storage_of(study))
    for macs, area in ((3, 1.0), (2, 2.0), (2, 3.0), (1, 9.0), (4, 1.0)):
        trial = database.ask()
        for name, value in (("macs_per_clip", macs), ("best_val_au_fa_fr", area), ("params", 1)):
            trial.set_user_attr(name, value)
        database.tell(trial, area)
    found = sweep.table(study, database)
    assert sorted(found[found["front"]].index) == [0, 1, 3]
    assert found.index[0] == 0


def test_a_hopeless_trial_is_stopped_early(study):
    database = sweep._database("q", sweep.storage_of(study))
    for _ in range(6):
        trial = database.ask()
        for epoch in range(1, 9):
            trial.report(-1.0, epoch)  # better than any model can be
        database.tell(trial, -1.0)
    trial = database.ask()
    state, value = sweep._train(
        study, trial, CRNNConfig(1, hidden_size=8, gru_num_layers=1), Training(epochs=8), teacher=None
    )
    database.tell(trial, value, state)
    last = trials_of(study)[-1]
    assert last.state == optuna.trial.TrialState.PRUNED and last.last_step < 8


def test_a_teacher_is_listened_to(study):
    run(study, [Experiment("baseline", student=CRNNConfig(2, hidden_size=6), training=Training(epochs=20))])
    found = sweep.sweep(study, trials=1, max_macs=BUDGET, teacher="baseline")
    assert found["kd_share"].between(0, 0.9).all() and found["temperature"].between(1, 20).all()


def test_a_trial_hears_what_experiments_hear(study, monkeypatch):
    train = study.split.train
    study.__dict__["heard"] = np.concatenate([train, train[:3]])  # as recordings beside voices: some more often
    asked = []
    monkeypatch.setattr(sweep, "fit", lambda model, material, *_, **__: asked.append(material.source))
    database = sweep._database("q", sweep.storage_of(study))
    sweep._train(study, database.ask(), CRNNConfig(1, hidden_size=8), Training(epochs=1), teacher=None)
    (source,) = asked
    assert source.logmels.shape[1] == len(source.labels) == len(train) + 3


def test_requests_that_make_no_sense_are_refused(study):
    with pytest.raises(ValueError, match="at least one trial"):
        sweep.sweep(study, trials=0, max_macs=BUDGET)
    with pytest.raises(ValueError, match="no model fits into 10 MACs"):
        sweep.sweep(study, trials=1, max_macs=10)
