"""Learning from clips in a row: what is scored, what is asked, and that it helps on a stream."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import stripes

from kwslib.config import CELLS, CRNNConfig
from kwslib.data.augment import Augmentation
from kwslib.nets.crnn import CRNN, keyword_score, step_logits
from kwslib.nets.losses import AttentionKL, Labels, SoftTargets
from kwslib.nets.rivals import Ensemble
from kwslib.training import loop, material
from kwslib.training.loop import Objective, Training
from kwslib.training.material import Clips, Material, Pieces
from kwslib.training.tune import StreamTune

TINY = CRNNConfig(cnn_out_channels=2, hidden_size=6, gru_num_layers=1)


def net(**sizes):
    torch.manual_seed(0)
    return CRNN(CRNNConfig(2, hidden_size=6, **sizes)).eval()


@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_logits_after_each_step_by_plain_loops(cell):
    model, window = net(cell=cell), 4
    x = torch.randn(2, 40, 150, generator=torch.Generator().manual_seed(0)) * 4 - 8
    found = step_logits(model, x, window)
    hidden, _ = model.gru(model.steps(x))
    for step in range(hidden.shape[1]):
        context, _ = model.attention(hidden[:, max(0, step - window + 1) : step + 1])
        torch.testing.assert_close(found[:, step], model.classifier(context), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_second_counts_by_its_highest_step_but_not_just_after_a_keyword():
    model, seconds = net(), 3
    x = torch.randn(2, 40, 100 * seconds + 1, generator=torch.Generator().manual_seed(0)) * 4 - 8
    labels = torch.tensor([[0, 1, 0], [1, 0, 0]])
    found = material._highest(model, x, labels).unflatten(0, (2, seconds))
    for row in range(2):
        logits = step_logits(model, x[row : row + 1], model.config.n_steps(101))[0]
        for second in range(seconds):
            asked = []
            for step, logit in enumerate(logits):
                end = step * 8 + 20 - 1  # the last frame that the step saw; frame 0 has heard nothing
                quiet = second > 0 and labels[row, second - 1] == 1 and end - 1 < 100 * second + 50
                if 100 * second < end <= 100 * (second + 1) and not quiet:
                    asked.append(logit)
            best = max(asked, key=lambda logit: keyword_score(logit[None]).item())
            torch.testing.assert_close(found[row, second], best, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def heard():
    """Pieces and clips. A tone in the middle of a second is the keyword; tones elsewhere, and noise, are not."""
    rng = np.random.default_rng(0)

    def after_silence(logmels):
        return np.concatenate([np.full((len(logmels), 40, 1), -20.0, np.float32), logmels], axis=2)

    labels, said = (np.arange(240) % 4 == 0).astype(np.int64), (rng.random((60, 5)) < 0.2).astype(np.int8)
    clips = after_silence(stripes(labels, rng, 3, 100))
    pieces = after_silence(
        stripes(said, rng, 3, 100).reshape(60, 5, 40, 100).transpose(0, 2, 1, 3).reshape(60, 40, 500)
    )
    on_pieces = Material(Pieces(pieces.astype(np.float16), said, seconds=160), clips[160:], labels[160:])
    return on_pieces, replace(on_pieces, source=Clips(clips[None, :160].astype(np.float16), labels[:160]))


def alarms_and_misses(model, pieces) -> tuple[float, float]:
    """Of the seconds of pieces: share of others and of keywords whose highest score is on the wrong side."""
    x, labels = torch.from_numpy(pieces.logmels).float(), torch.from_numpy(pieces.labels).long()
    with torch.no_grad():
        score = keyword_score(material._highest(model, x, labels))
    labels = labels.flatten()
    return (score[labels == 0] > 0).float().mean().item(), (score[labels == 1] <= 0).float().mean().item()


def test_it_helps_on_a_stream(heard):
    pieces, clips = heard
    torch.manual_seed(0)
    model = CRNN(TINY)
    loop.fit(model, clips, Objective((Labels(),)), Training(epochs=6, batch_size=16), seed=0)
    before = alarms_and_misses(model, pieces.source)

    def tune(model, training, pieces, mel_warp, **special):
        as_asked = replace(heard[0], mel_warp=mel_warp)
        loop.fit(model, as_asked, Objective((Labels(),), tunes=True, **special), training, seed=0)

    tuned = StreamTune(Training(epochs=20, batch_size=40))(model, tune)
    after = alarms_and_misses(tuned, pieces.source)
    assert sum(after) < sum(before) and max(after) <= 0.1


def test_an_ensemble_teaches_by_the_mean_of_what_its_members_say_at_their_best_steps(heard):
    members = [net(), net(cell="rnn")]
    source = heard[0].source
    x, labels = torch.from_numpy(source.logmels[:3]).float(), torch.from_numpy(source.labels[:3]).long()
    with torch.no_grad():
        found = material.said_of(Ensemble(members), x, labels)
        each = [material._highest(member, x, labels) for member in members]
    torch.testing.assert_close(found.logits, (each[0] + each[1]) / 2)
    assert found.attention is None


@pytest.mark.parametrize("bits", [0, 4])
def test_a_teacher_and_rounded_weights_go_with_it(heard, bits):
    teacher, model = net(), CRNN(TINY)
    losses = (Labels(0.5), SoftTargets(0.5, 2.0))
    objective = Objective(losses, teacher, weight_bits=bits, keep="last")
    rows = loop.fit(model, heard[0], objective, Training(epochs=2, batch_size=40), seed=0)
    assert [row["best"] for row in rows] == [1, 1]  # the last one is kept
    assert all(row["softtargets_1"] > 0 for row in rows)


def test_an_interrupted_tuning_ends_the_same(heard, tmp_path):
    def run(resume, stop=None):
        torch.manual_seed(0)
        model = CRNN(TINY)

        def on_epoch(row):
            if stop and row["epoch"] == stop:
                raise KeyboardInterrupt

        recipe = Training(epochs=3, batch_size=40)
        loop.fit(model, heard[0], Objective((Labels(),), keep="last"), recipe, 0, resume, on_epoch)
        return model.state_dict()

    whole = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=2)
    again = run(tmp_path / "b")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("kind", ["clips", "pieces"])
def test_a_teacher_that_was_asked_once_teaches_as_one_that_is_asked_every_time(heard, kind):
    pieces, clips = heard
    source, keep = (clips, "best") if kind == "clips" else (pieces, "last")
    teacher = Ensemble([net(), net(cell="rnn")]) if kind == "pieces" else net()
    losses = (Labels(0.5), SoftTargets(0.5, 2.0)) + ((AttentionKL(0.1),) if kind == "clips" else ())
    found = []
    for taught in (None, material.teach(teacher, source.source, seconds=70)):
        torch.manual_seed(0)
        model = CRNN(TINY)
        rows = loop.fit(
            model, source, Objective(losses, teacher, taught, keep=keep), Training(epochs=2, batch_size=40), 0
        )
        found.append([row["loss"] for row in rows])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_what_is_heard_otherwise_every_time_is_told_apart(heard):
    plain = heard[0]
    assert not plain.varies and replace(plain, mel_warp=0.1).varies
    assert replace(plain, masks=Augmentation(frequency_mask=0, time_mask=3)).varies
