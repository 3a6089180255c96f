import dataclasses

import numpy as np
import pytest
import torch
from conftest import stripes

from kwslib.config import CRNNConfig
from kwslib.data.augment import Augmentation
from kwslib.metrics import au_fa_fr
from kwslib.nets import crnn
from kwslib.nets.crnn import CRNN
from kwslib.nets.losses import Labels, LayerwiseMSE, SoftTargets
from kwslib.nets.rivals import BCResNet, Ensemble, SeparableNet
from kwslib.training import loop
from kwslib.training.checkpoints import tensors
from kwslib.training.loop import NotANumber, Objective, Training, fit
from kwslib.training.material import Clips, Material
from kwslib.training.prune import group_norm

TINY = CRNNConfig(cnn_out_channels=2, hidden_size=8, gru_num_layers=2)
MASKS = Augmentation(frequency_mask=4, time_mask=8)


@pytest.fixture
def material() -> Material:
    labels = (np.arange(160) % 8 == 0).astype(np.int64)
    logmels = stripes(labels, np.random.default_rng(0), 6)
    return Material(Clips(logmels[None, :96].astype(np.float16), labels[:96]), logmels[96:], labels[96:], MASKS)


def run(material, epochs=4, seed=0, losses=(Labels(),), teacher=None, training=None, **options):
    torch.manual_seed(seed)
    model = CRNN(TINY)
    training = training or Training(epochs=epochs, batch_size=16)
    history = fit(model, material, Objective(losses, teacher), training, seed, **options)
    return model, history


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a).values(), tensors(b).values(), strict=True))


def stripped(history):
    return [{k: v for k, v in row.items() if k != "wall_s"} for row in history]


def test_it_learns_and_keeps_the_best_epoch_of_val(material):
    model, history = run(material, training=Training(epochs=15, batch_size=16, learning_rate=3e-4))
    assert history[-1]["val_au_fa_fr"] < history[0]["val_au_fa_fr"] / 2
    scores = crnn.score(model, material.val)
    kept = min(row["val_au_fa_fr"] for row in history)
    assert au_fa_fr(scores, material.val_labels == 1) == pytest.approx(kept, abs=1e-12)
    assert [row["epoch"] for row in history] == list(range(1, 16))
    assert history[0]["loss"] == pytest.approx(history[0]["labels_0"])


def test_normalization_is_absorbed_exactly():
    model, logmels = CRNN(TINY).eval(), torch.randn(3, 40, 101) * 4 - 9
    expected = model((logmels + 9) / 4)
    assert torch.allclose(crnn.absorb_normalization(model, -9.0, 4.0)(logmels), expected, atol=1e-5)


def test_tuning_starts_from_the_function_that_was_learnt(material):
    model, _ = run(material, epochs=1)
    before = crnn.score(model, material.val)
    still = Training(epochs=1, batch_size=16, learning_rate=0.0)
    fit(model, material, Objective((Labels(),), tunes=True), still, 0)
    np.testing.assert_allclose(crnn.score(model, material.val), before, atol=1e-5)


def test_a_net_that_cannot_absorb_a_normalization_says_so(material):
    with pytest.raises(ValueError, match="SeparableNet cannot absorb"):
        fit(SeparableNet(), material, Objective((Labels(),)), Training(epochs=1), 0)


def test_rival_nets_learn_from_an_ensemble_without_attention(material):
    for net in (SeparableNet(), BCResNet()):
        teacher = Ensemble([CRNN(TINY), SeparableNet()])
        training = Training(epochs=1, batch_size=32, normalize=False)
        history = fit(net, material, Objective((Labels(0.4), SoftTargets(0.6)), teacher), training, 0)
        assert np.isfinite(history[0]["loss"])


def test_same_seed_same_weights_other_seed_others(material):
    first, second, other = run(material), run(material), run(material, seed=1)
    assert same(first[0], second[0]) and stripped(first[1]) == stripped(second[1])
    assert not same(first[0], other[0])


EVERYTHING = {  # all the state that an interruption must not lose
    "training": Training(epochs=4, batch_size=16, ema=0.9, precision="float16", schedule="onecycle"),
    "losses": (Labels(0.5, smoothing=0.1), LayerwiseMSE(0.1)),
}


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_interrupted_and_resumed_equals_undisturbed(material, tmp_path, stop_after, options):
    torch.manual_seed(9)
    options = options | ({"teacher": CRNN(TINY)} if options else {})
    whole, history = run(material, **options)
    seen = []

    def interrupt(row):
        seen.append(row)
        if len(seen) == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(material, resume=tmp_path / "r", on_epoch=interrupt, **options)
    rows = []
    resumed, again = run(material, resume=tmp_path / "r", on_epoch=rows.append, **options)
    assert same(whole, resumed)
    assert stripped(history) == stripped(again) == stripped(rows)


def test_a_damaged_resume_file_starts_from_the_beginning(material, tmp_path):
    (tmp_path / "r").write_bytes(b"half a file")
    assert same(run(material, resume=tmp_path / "r")[0], run(material)[0])


def test_the_teacher_is_not_changed_and_runs_in_eval_mode(material):
    torch.manual_seed(9)
    teacher = CRNN(TINY).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    _, history = run(material, losses=(Labels(0.4), SoftTargets(0.6, 10.0)), teacher=teacher)
    assert not teacher.training
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    for row in history:
        assert row["loss"] == pytest.approx(row["labels_0"] + row["softtargets_1"])


def test_both_classes_are_drawn_equally_often(material):
    random = torch.Generator().manual_seed(0)
    drawn = [labels for _ in range(200) for _, labels in material.source.batches(32, random)]
    assert np.concatenate(drawn).mean() == pytest.approx(0.5, abs=0.02)


def test_a_loss_that_is_not_a_number_stops_the_training(material):
    silent = dataclasses.replace(material.source, logmels=np.full_like(material.source.logmels, np.nan))
    broken = dataclasses.replace(material, source=silent)
    with pytest.raises(NotANumber, match="lower the learning rate"):
        run(broken)


def test_a_projection_is_trained_along_and_thrown_away(material):
    torch.manual_seed(9)
    teacher = CRNN(dataclasses.replace(TINY, hidden_size=12))
    model, history = run(material, epochs=8, losses=(LayerwiseMSE(),), teacher=teacher)
    assert set(tensors(model)) == set(tensors(CRNN(TINY)))
    assert history[-1]["layerwisemse_0"] < 0.7 * history[0]["layerwisemse_0"]


def test_the_kept_weights_are_the_running_average(material):
    """After one epoch of one batch: decay x start + (1 - decay) x trained, by hand."""
    one_batch = Training(epochs=1, batch_size=material.source.seconds, ema=0.75, schedule="constant", warm_up=0)
    averaged, _ = run(material, training=one_batch)
    trained, _ = run(material, training=dataclasses.replace(one_batch, ema=0.0))
    # AveragedModel takes over the first weights it sees: after one step the average is the trained model.
    assert same(averaged, trained)
    two = dataclasses.replace(one_batch, epochs=2)
    second, _ = run(material, training=dataclasses.replace(two, ema=0.0))
    assert same(run(material, training=two)[0], second)  # of so few steps nothing is averaged
    long = dataclasses.replace(one_batch, epochs=200)
    state = loop._Loop(CRNN(TINY), material, Objective((Labels(),)), long, seed=0, device="cpu")
    torch.manual_seed(0)
    state.model.load_state_dict(CRNN(TINY).state_dict())
    for step, weights in enumerate((trained, second)):
        state.model.load_state_dict(weights.state_dict())
        state.average.update_parameters(state.model)
        assert step or same(state.average.module, trained)
    for name, value in state.average.module.state_dict().items():
        expected = 0.75 * trained.state_dict()[name] + 0.25 * second.state_dict()[name]
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("cell", ["gru", "rnn", "lstm"])
def test_mixed_precision_learns_like_float32_and_leaves_float32_weights(material, precision, cell):
    losses = {}
    for arithmetic in ("float32", precision):
        torch.manual_seed(0)
        model = CRNN(dataclasses.replace(TINY, cell=cell))
        training = Training(epochs=4, batch_size=16, precision=arithmetic)
        losses[arithmetic] = [row["loss"] for row in fit(model, material, Objective((Labels(),)), training, 0)]
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[precision] != losses["float32"]  # it did run in other arithmetic
    np.testing.assert_allclose(losses[precision], losses["float32"], atol=0.02)


def test_schedules_go_where_they_say():
    def rates(**options):
        training = Training(**options)
        return [loop.learning_rate_factor(training, done) for done in (0.0, 0.05, 0.1, 0.5, 1.0)]

    assert rates(schedule="constant", warm_up=0.1) == pytest.approx([0, 0.5, 1, 1, 1])
    assert rates(schedule="constant", warm_up=0) == [1, 1, 1, 1, 1]
    cosine = rates(schedule="cosine", warm_up=0.1)
    assert cosine[:3] == pytest.approx([0, 0.5, 1]) and cosine[4] == pytest.approx(0, abs=1e-12)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1), max_lr=1.0, total_steps=1001, final_div_factor=1e9
    )
    onecycle, theirs = Training(schedule="onecycle"), []
    for _ in range(1000):
        theirs.append(reference.get_last_lr()[0])
        reference.optimizer.step()
        reference.step()
    ours = [loop.learning_rate_factor(onecycle, i / 1000) for i in range(1000)]
    np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_missing_parts_are_named(material):
    with pytest.raises(ValueError, match="needs a teacher"):
        run(material, losses=(SoftTargets(),))
    with pytest.raises(ValueError, match="at least one loss"):
        run(material, losses=())
    with pytest.raises(ValueError, match="unknown schedule"):
        Training(schedule="steps")
    with pytest.raises(ValueError, match="at least 1"):
        Training(epochs=0)
    with pytest.raises(ValueError, match="unknown precision"):
        Training(precision="int8")
    with pytest.raises(ValueError, match="in \\[0, 1\\)"):
        Training(ema=1.0)


def test_under_a_penalty_the_last_epoch_is_kept(material):
    """The penalty empties the units at the expense of the area: the best epoch would undo its work."""
    recipe = Training(epochs=4, batch_size=16, normalize=False)
    seen = []
    torch.manual_seed(0)
    model = CRNN(TINY)

    def penalty(model):
        seen.append(group_norm(model, 0.05))
        return seen[-1]

    fit(model, material, Objective((Labels(),), penalty=penalty, keep="last"), recipe, seed=0)
    assert group_norm(model, 0.05) <= min(seen)
    assert group_norm(model, 0.05) < 0.9 * seen[0]
