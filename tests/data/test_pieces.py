"""Pieces of stream: made once, the same every time, and what they hold."""

import numpy as np
import pytest
import torch

from kwslib.data import corpora, pieces
from kwslib.data.augment import WITHOUT_MASKS
from kwslib.data.pieces import PieceConfig


def test_pieces_that_make_no_sense_are_refused():
    for wrong in (
        {"clips": 1},
        {"keyword_share": 0.0},
        {"keyword_share": 1.0},
        {"part_share": 1.0},
        {"talk_share": 1.0},
        {"gate_share": -0.1},
        {"narrow_share": 1.0},
    ):
        with pytest.raises(ValueError, match="two clips or more, some of them keywords"):
            PieceConfig(**wrong)


@pytest.fixture
def corpus(folder):
    return corpora.load(str(folder), "go")


def test_pieces_of_stream_are_the_same_every_time_and_say_what_they_hold(corpus):
    rows, is_keyword = np.arange(len(corpus.clips)), corpus.is_keyword("go")
    recipe = PieceConfig(clips=4, keyword_share=0.3, talk_share=0.0)
    logmels, said = pieces.bank(corpus, rows, is_keyword, 300, recipe, WITHOUT_MASKS, "go")
    assert logmels.shape == (300, 40, 401) and said.shape == (300, 4)
    assert 0.2 < said.mean() < 0.4
    before, labels = np.array(logmels), np.array(said)
    for file in corpus.folder.glob("pieces-*"):
        file.unlink()
    fewer, fewer_said = pieces.bank(corpus, rows, is_keyword, 280, recipe, WITHOUT_MASKS, "go")
    np.testing.assert_array_equal(fewer, before[:280])  # more pieces change no earlier one
    np.testing.assert_array_equal(fewer_said, labels[:280])


def test_pieces_without_their_labels_are_made_again(corpus):
    rows, is_keyword = np.arange(len(corpus.clips)), corpus.is_keyword("go")
    _, said = pieces.bank(corpus, rows, is_keyword, 5, PieceConfig(clips=3, talk_share=0.0), WITHOUT_MASKS, "go")
    (made,) = set(corpus.folder.glob("pieces-*.npy")) - set(corpus.folder.glob("*-labels.npy"))
    made.rename(made.with_suffix(".npy.tmp"))  # killed before the pieces had their name
    _, again = pieces.bank(corpus, rows, is_keyword, 5, PieceConfig(clips=3, talk_share=0.0), WITHOUT_MASKS, "go")
    np.testing.assert_array_equal(said, again)


def test_half_a_word_is_silent_where_the_other_half_was():
    word = torch.zeros(16_000)
    word[4_800:9_600] = 0.5
    first, second = pieces.half_of(word, 0.5, first=True), pieces.half_of(word, 0.5, first=False)
    assert first.nonzero().min() == 4_800 and first.nonzero().max() == 7_199
    assert second.nonzero().min() == 7_200 and second.nonzero().max() == 9_599
    torch.testing.assert_close(first + second, word)


def test_nobody_says_the_keyword_in_talk():
    rng = np.random.default_rng(0)
    said = [pieces.sentence("hap", rng) for _ in range(500)]
    assert len(set(said)) > 400 and not any("hap" in text or "{" in text for text in said)
    assert not any("Monday" in pieces.sentence("monday", rng) for _ in range(300))
    with pytest.raises(ValueError, match="hardly a sentence goes without 'i o e'"):
        pieces.sentence("i o e", rng)


def test_nobody_says_in_talk_what_sounds_like_the_keyword():
    alike = pieces.sounding_like("write")
    assert set(alike) == {"right", "write"} and pieces.sounding_like("jarvis") == []
    rng = np.random.default_rng(0)
    assert any("right now" in pieces.sentence("write", rng) for _ in range(300))
    assert not any("right" in pieces.sentence("write", rng, alike) for _ in range(300))


@pytest.mark.slow
def test_talk_is_the_same_every_time_of_other_voices_in_each_part_and_longer_talk_begins_alike(corpus):
    minute = {part: np.array(pieces.talk(corpus, "go", part, 60)) for part in ("train", "test")}
    longer = pieces.talk(corpus, "go", "train", 85)
    assert len(minute["train"]) == 60 * 16_000 and len(longer) == 90 * 16_000
    np.testing.assert_array_equal(longer[: 60 * 16_000], minute["train"])
    assert (minute["train"] != minute["test"]).mean() > 0.5
    loud = np.abs(minute["train"].reshape(60, -1).astype(int)).max(1) > 1000
    assert loud.mean() > 0.9  # pauses between sentences are short


@pytest.mark.slow
def test_a_share_of_the_pieces_is_talk(corpus):
    rows, is_keyword = np.arange(len(corpus.clips)), corpus.is_keyword("go")
    recipe = PieceConfig(clips=3, keyword_share=0.5, talk_share=0.5)
    _, said = pieces.bank(corpus, rows, is_keyword, 200, recipe, WITHOUT_MASKS, "go")
    _, words = pieces.bank(corpus, rows, is_keyword, 200, PieceConfig(3, 0.5, talk_share=0.0), WITHOUT_MASKS, "go")
    assert 0.35 < (said.sum() / words.sum()) < 0.65


def test_a_gate_leaves_exact_zeros_and_what_is_loud_with_its_tail():
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 1e-3, 16_000)
    samples[4_800:8_000] += rng.normal(0, 0.1, 3_200)
    gated = pieces.gated(torch.from_numpy(samples).float(), depth_db=25, hold_s=0.1).numpy()
    power = [np.mean(samples[start : start + 320] ** 2) for start in range(0, 16_000, 320)]
    for frame in range(50):  # a plain loop: open when this frame or one of the five before is loud
        is_open = any(10 * np.log10(power[i] / max(power)) >= -25 for i in range(max(0, frame - 5), frame + 1))
        mine = gated[frame * 320 : (frame + 1) * 320]
        np.testing.assert_array_equal(mine, samples[frame * 320 : (frame + 1) * 320].astype(np.float32) * is_open)
    assert (gated == 0).sum() == 16_000 - 3_200 - 1_600


def test_a_telephone_has_nothing_above_its_band_and_leaves_what_is_below():
    t = np.arange(16_000) / 16_000
    low, high = np.sin(2 * np.pi * 1_000 * t), np.sin(2 * np.pi * 5_000 * t)
    narrowed = pieces.narrowed(torch.from_numpy(low + high).float(), 3_400).numpy()
    np.testing.assert_allclose(narrowed, low, atol=1e-4)


def test_pieces_behind_gates_and_telephones_say_what_the_others_say(corpus):
    rows, is_keyword = np.arange(len(corpus.clips)), corpus.is_keyword("go")
    plain = PieceConfig(clips=3, keyword_share=0.3, talk_share=0.0, gate_share=0.0, narrow_share=0.0)
    worse = PieceConfig(clips=3, keyword_share=0.3, talk_share=0.0, gate_share=0.99, narrow_share=0.99)
    empty = [
        (pieces.bank(corpus, rows, is_keyword, 20, recipe, WITHOUT_MASKS, "go")[0][:, -5:, 3:] < -20).mean()
        for recipe in (worse, plain)
    ]
    assert empty[0] > 0.9 and empty[1] < 0.01  # the highest bins hold noise, or nothing at all
