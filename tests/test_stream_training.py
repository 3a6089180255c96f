"""Learning from clips in a row: what is scored, what is asked, and that it helps on a stream."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kwslib import corpora, sequences, train
from kwslib.architectures import Ensemble
from kwslib.augment import WITHOUT_MASKS
from kwslib.config import CELLS, CRNNConfig
from kwslib.losses import Labels, SoftTargets
from kwslib.models import CRNN, keyword_score, step_logits
from kwslib.sequences import Sequences
from kwslib.train import Data, StreamTune, Training

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
    found = train._pooled(model, x, labels).unflatten(0, (2, seconds))
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
def data():
    """A tone in the middle of a second is the keyword; tones elsewhere, and noise, are not."""
    rng = np.random.default_rng(0)

    def seconds(labels):
        logmels = rng.normal(-10, 1, (labels.size, 40, 100)).astype(np.float32)
        for second, label in zip(logmels, labels.flat, strict=True):
            bins = 20 if label else rng.choice([5, 35])
            second[bins - 2 : bins + 2, 30:70] += 3
        return logmels

    def after_silence(logmels):
        return np.concatenate([np.full((len(logmels), 40, 1), -20.0, np.float32), logmels], axis=2)

    labels, said = (np.arange(240) % 4 == 0).astype(np.int64), (rng.random((60, 5)) < 0.2).astype(np.int8)
    clips = after_silence(seconds(labels))
    pieces = after_silence(seconds(said).reshape(60, 5, 40, 100).transpose(0, 2, 1, 3).reshape(60, 40, 500))
    bank, val = clips[None, :160].astype(np.float16), clips[160:]
    return Data(bank, labels[:160], val, labels[160:], pieces.astype(np.float16), said)


def alarms_and_misses(model, data) -> tuple[float, float]:
    """Of the seconds of pieces: share of others and of keywords whose highest score is on the wrong side."""
    x, labels = torch.from_numpy(data.pieces).float(), torch.from_numpy(data.said).long()
    with torch.no_grad():
        score = keyword_score(train._pooled(model, x, labels))
    labels = labels.flatten()
    return (score[labels == 0] > 0).float().mean().item(), (score[labels == 1] <= 0).float().mean().item()


def on_clips(data):
    return replace(data, pieces=None, said=None)


def test_it_helps_on_a_stream(data):
    torch.manual_seed(0)
    model = CRNN(TINY)
    train.fit(model, on_clips(data), Training(epochs=6, batch_size=16), (Labels(),), WITHOUT_MASKS, seed=0)
    before = alarms_and_misses(model, data)

    def tune(model, training, sequences, **options):
        train.fit(model, data, training, (Labels(),), WITHOUT_MASKS, seed=0, trained=True, **options)

    tuned = StreamTune(Training(epochs=20, batch_size=40))(model, tune)
    after = alarms_and_misses(tuned, data)
    assert sum(after) < sum(before) and max(after) <= 0.1


def test_an_ensemble_teaches_by_the_mean_of_what_its_members_say_at_their_best_steps(data):
    members = [net(), net(cell="rnn")]
    loop = train._Loop(CRNN(TINY), None, data, Training(epochs=1), (Labels(),), WITHOUT_MASKS, 0, "cpu")
    x, labels = torch.from_numpy(data.pieces[:3]).float(), torch.from_numpy(data.said[:3]).long()
    with torch.no_grad():
        found = loop._outputs(Ensemble(members), x, labels)
        each = [train._pooled(member, x, labels) for member in members]
    torch.testing.assert_close(found.logits, (each[0] + each[1]) / 2)
    assert found.attention is None


@pytest.mark.parametrize("bits", [0, 4])
def test_a_teacher_and_rounded_weights_go_with_it(data, bits):
    teacher, model = net(), CRNN(TINY)
    losses = (Labels(0.5), SoftTargets(0.5, 2.0))
    rows = train.fit(
        model, data, Training(epochs=2, batch_size=40), losses, WITHOUT_MASKS, seed=0, teacher=teacher, weight_bits=bits
    )
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
        train.fit(model, data, recipe, (Labels(),), WITHOUT_MASKS, 0, resume=resume, on_epoch=on_epoch)
        return model.state_dict()

    whole = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=2)
    again = run(tmp_path / "b")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_sequences_that_make_no_sense_are_refused():
    for wrong in ({"clips": 1}, {"keyword_share": 0.0}, {"keyword_share": 1.0}, {"part_share": 1.0}):
        with pytest.raises(ValueError, match="two clips or more, some of them keywords"):
            Sequences(**wrong)


@pytest.fixture
def corpus(folder):
    return corpora.load(str(folder), "go")


def test_pieces_of_stream_are_the_same_every_time_and_say_what_they_hold(corpus):
    rows, is_keyword = np.arange(len(corpus.clips)), corpus.is_keyword("go")
    recipe = Sequences(clips=4, keyword_share=0.3)
    logmels, said = sequences.bank(corpus, rows, is_keyword, 300, recipe, WITHOUT_MASKS)
    assert logmels.shape == (300, 40, 401) and said.shape == (300, 4)
    assert 0.2 < said.mean() < 0.4
    before, labels = np.array(logmels), np.array(said)
    for file in corpus.folder.glob("sequences-*"):
        file.unlink()
    fewer, fewer_said = sequences.bank(corpus, rows, is_keyword, 280, recipe, WITHOUT_MASKS)
    np.testing.assert_array_equal(fewer, before[:280])  # more pieces change no earlier one
    np.testing.assert_array_equal(fewer_said, labels[:280])


def test_pieces_without_their_labels_are_made_again(corpus):
    rows, is_keyword = np.arange(len(corpus.clips)), corpus.is_keyword("go")
    _, said = sequences.bank(corpus, rows, is_keyword, 5, Sequences(clips=3), WITHOUT_MASKS)
    (pieces,) = set(corpus.folder.glob("sequences-*.npy")) - set(corpus.folder.glob("*-labels.npy"))
    pieces.rename(pieces.with_suffix(".npy.tmp"))  # killed before the pieces had their name
    _, again = sequences.bank(corpus, rows, is_keyword, 5, Sequences(clips=3), WITHOUT_MASKS)
    np.testing.assert_array_equal(said, again)


def test_half_a_word_is_silent_where_the_other_half_was():
    word = torch.zeros(16_000)
    word[4_800:9_600] = 0.5
    first, second = sequences.half_of(word, 0.5, first=True), sequences.half_of(word, 0.5, first=False)
    assert first.nonzero().min() == 4_800 and first.nonzero().max() == 7_199
    assert second.nonzero().min() == 7_200 and second.nonzero().max() == 9_599
    torch.testing.assert_close(first + second, word)
