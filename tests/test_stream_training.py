"""Learning from clips in a row: what is scored, what is asked, and that it helps on a stream."""

import numpy as np
import pytest
import torch

from kwslib import train
from kwslib.augment import WITHOUT_MASKS
from kwslib.config import CELLS, CRNNConfig
from kwslib.losses import Labels, SoftTargets
from kwslib.models import CRNN, keyword_score
from kwslib.train import Data, Sequences, StreamTune, Training

TINY = CRNNConfig(cnn_out_channels=2, hidden_size=6, gru_num_layers=1)


def net(**sizes):
    torch.manual_seed(0)
    return CRNN(CRNNConfig(2, hidden_size=6, **sizes)).eval()


@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_logits_after_each_step_by_plain_loops(cell):
    model, window = net(cell=cell), 4
    x = torch.randn(2, 40, 150, generator=torch.Generator().manual_seed(0)) * 4 - 8
    found = model.step_logits(x, window)
    hidden, _ = model.gru(model.steps(x))
    for step in range(hidden.shape[1]):
        context, _ = model.attention(hidden[:, max(0, step - window + 1) : step + 1])
        torch.testing.assert_close(found[:, step], model.classifier(context), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_clip_counts_by_its_highest_step_but_not_just_after_a_keyword():
    model, clips = net(), 3
    x = torch.randn(6, 40, 101, generator=torch.Generator().manual_seed(0)) * 4 - 8
    labels = torch.tensor([0, 1, 0, 1, 0, 0])
    found = train._pooled(model, x, labels, clips).logits
    for row in range(2):
        parts = [x[row * clips]] + [x[row * clips + i][:, train.SEAM :] for i in (1, 2)]
        stream = torch.cat(parts, dim=1)
        logits = model.step_logits(stream[None], model.config.n_steps(101))[0]
        first = 0
        for number, part in enumerate(parts):
            last = first + part.shape[1]
            asked = []
            for step, logit in enumerate(logits):
                end = step * 8 + 20 - 1  # the last frame that the step saw
                quiet = number > 0 and labels[row * clips + number - 1] == 1 and end < first + 49
                if first <= end < last and not quiet:
                    asked.append(logit)
            best = max(asked, key=lambda logit: keyword_score(logit[None]).item())
            torch.testing.assert_close(found[row * clips + number], best, atol=1e-5, rtol=0)
            first = last


@pytest.fixture(scope="module")
def data():
    """A tone in the middle is the keyword; tones elsewhere, and noise, are not."""
    rng = np.random.default_rng(0)
    labels = (np.arange(240) % 4 == 0).astype(np.int64)
    logmels = rng.normal(-10, 1, (240, 40, 101)).astype(np.float32)
    for clip, label in zip(logmels, labels, strict=True):
        bins = 20 if label else rng.choice([5, 35])
        clip[bins - 2 : bins + 2, 30:70] += 3
    return Data(logmels[None, :160].astype(np.float16), labels[:160], logmels[160:], labels[160:])


def alarms_and_misses(model, data) -> tuple[float, float]:
    """Of the val clips in a row: share of others and of keywords whose highest score is on the wrong side."""
    x, labels = torch.from_numpy(data.val), torch.from_numpy(data.val_labels)
    with torch.no_grad():
        score = keyword_score(train._pooled(model, x, labels, clips=10).logits)
    return (score[labels == 0] > 0).float().mean().item(), (score[labels == 1] <= 0).float().mean().item()


def test_it_helps_on_a_stream(data):
    torch.manual_seed(0)
    model = CRNN(TINY)
    train.fit(model, data, Training(epochs=6, batch_size=16), (Labels(),), WITHOUT_MASKS, seed=0)
    before = alarms_and_misses(model, data)

    def tune(model, training, **options):
        train.fit(model, data, training, (Labels(),), WITHOUT_MASKS, seed=0, trained=True, **options)

    tuned = StreamTune(Training(epochs=20, batch_size=40), Sequences(clips=5, keyword_share=0.25))(model, tune)
    after = alarms_and_misses(tuned, data)
    assert sum(after) < sum(before) and max(after) <= 0.1


@pytest.mark.parametrize("bits", [0, 4])
def test_a_teacher_and_rounded_weights_go_with_it(data, bits):
    teacher, model = net(), CRNN(TINY)
    losses = (Labels(0.5), SoftTargets(0.5, 2.0))
    rows = train.fit(
        model, data, Training(epochs=2, batch_size=40), losses, WITHOUT_MASKS, seed=0,
        teacher=teacher, weight_bits=bits, sequences=Sequences(clips=4),
    )  # fmt: skip
    assert [row["best"] for row in rows] == [1, 1]  # the last one is kept
    assert all(row["softtargets_1"] > 0 for row in rows)


def test_an_interrupted_tuning_ends_the_same(data, tmp_path):
    def run(resume, stop=None):
        torch.manual_seed(0)
        model = CRNN(TINY)

        def on_epoch(row):
            if stop and row["epoch"] == stop:
                raise KeyboardInterrupt

        recipe = Training(epochs=3, batch_size=40)
        train.fit(
            model, data, recipe, (Labels(),), WITHOUT_MASKS, 0, sequences=Sequences(4), resume=resume, on_epoch=on_epoch
        )
        return model.state_dict()

    whole = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=2)
    again = run(tmp_path / "b")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_sequences_that_make_no_sense_are_refused():
    for wrong in ({"clips": 1}, {"keyword_share": 0.0}, {"keyword_share": 1.0}):
        with pytest.raises(ValueError, match="two clips or more, some of them keywords"):
            Sequences(**wrong)
