from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from kwslib import metrics


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_area_equals_p_q_one_minus_auc_of_sklearn_with_ties(data):
    n = data.draw(st.integers(2, 60))
    scores = np.array(data.draw(st.lists(st.integers(-5, 5), min_size=n, max_size=n)), float)
    labels = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    if labels.all() or not labels.any():
        labels[0] = not labels[0]
    theirs, p, p0 = roc_auc_score(labels, scores), labels.mean(), 1734 / 64_721
    assert metrics.au_fa_fr_as_is(scores, labels) == pytest.approx(p * (1 - p) * (1 - theirs), abs=1e-12)
    assert metrics.au_fa_fr(scores, labels) == pytest.approx(p0 * (1 - p0) * (1 - theirs), abs=1e-12)
    assert metrics.roc_auc(metrics.au_fa_fr(scores, labels)) == pytest.approx(theirs, abs=1e-9)
    assert metrics.roc_auc(metrics.au_fa_fr_as_is(scores, labels), p) == pytest.approx(theirs, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_equal_rankings_have_equal_areas_to_the_last_bit(data):
    """Which epoch is kept must not hang on rounding: of equal areas the lower loss decides."""
    n = data.draw(st.integers(2, 400))
    labels = np.random.default_rng(n).random(n) < 0.3
    labels[:2] = True, False
    scores = np.random.default_rng(data.draw(st.integers(0, 1000))).permutation(n).astype(float)
    wrong = sum((scores[~labels] > score).sum() for score in scores[labels])
    exact = 1734 / 64_721 * (1 - 1734 / 64_721) * (float(wrong) / float(labels.sum() * (~labels).sum()))
    assert metrics.au_fa_fr(scores, labels) == exact


def test_area_does_not_depend_on_the_share_of_keywords():
    scores, labels = np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, True, False, False])
    more = np.r_[np.repeat(scores[labels], 5), scores[~labels]], np.r_[np.repeat(True, 10), False, False]
    assert metrics.au_fa_fr(*more) == pytest.approx(metrics.au_fa_fr(scores, labels), rel=1e-12)
    assert metrics.au_fa_fr_as_is(*more) != pytest.approx(metrics.au_fa_fr_as_is(scores, labels))


def test_area_equals_counting_pairs():
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=200).round(1), rng.random(200) < 0.2
    wrong = sum((n > k) + 0.5 * (n == k) for k in scores[labels] for n in scores[~labels])
    assert metrics.au_fa_fr_as_is(scores, labels) == pytest.approx(wrong / 200**2, abs=1e-15)


@pytest.mark.parametrize("constant", [0.0, 1.0, -np.inf, np.inf])
def test_a_constant_score_does_not_look_perfect(constant):
    labels = np.arange(10) < 3
    assert metrics.au_fa_fr_as_is(np.full(10, constant), labels) == pytest.approx(0.3 * 0.7 / 2)


def test_weights_equal_repeating_clips():
    rng = np.random.default_rng(2)
    scores, labels, weights = rng.normal(size=30), np.arange(30) < 8, rng.integers(0, 4, 30)
    weights[[0, 29]] = 1
    repeated = metrics.au_fa_fr(np.repeat(scores, weights), np.repeat(labels, weights))
    assert metrics.au_fa_fr(scores, labels, weights) == pytest.approx(repeated, abs=1e-15)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.07, 0.1, 0.5, 1.0])
def test_misses_at_a_share_of_false_accepts_equal_a_plain_loop_with_ties(share):
    rng = np.random.default_rng(4)
    labels = np.arange(130) < 30
    scores = (rng.normal(size=130) + labels).round(1)
    missed = 1.0
    for threshold in scores:
        if sum(score >= threshold for score in scores[~labels]) <= round(share * 100):
            missed = min(missed, sum(score < threshold for score in scores[labels]) / 30)
    assert metrics.miss_rate_at(share, scores, labels) == pytest.approx(missed, abs=1e-15)
    weights = rng.integers(1, 4, 130)
    repeated = metrics.miss_rate_at(share, np.repeat(scores, weights), np.repeat(labels, weights))
    assert metrics.miss_rate_at(share, scores, labels, weights) == pytest.approx(repeated, abs=1e-15)


def test_bootstrap_of_another_metric_is_that_metric_of_every_resample():
    speakers, labels = np.repeat(np.arange(6), 5), np.tile(np.arange(5) < 2, 6)
    scores = np.random.default_rng(5).normal(size=30) + labels
    found = metrics.bootstrap(scores, labels, speakers, 20, partial(metrics.miss_rate_at, 0.2))
    plain = [metrics.miss_rate_at(0.2, scores, labels, w) for w in metrics.speaker_weights(speakers, 20)]
    assert found.tolist() == plain and len(set(plain)) > 1


def test_bootstrap_draws_speakers_not_clips():
    speakers = np.repeat(["a", "b", "c"], 5)
    weights = metrics.speaker_weights(speakers, 50)
    assert weights.shape == (50, 15)
    assert (weights.reshape(50, 3, 5) == weights.reshape(50, 3, 5)[:, :, :1]).all()
    assert (weights.reshape(50, 3, 5)[:, :, 0].sum(1) == 3).all()


def test_interval_narrows_with_more_speakers():
    rng = np.random.default_rng(3)
    widths = []
    for n in (10, 160):
        speakers = np.repeat(np.arange(n), 10)
        labels = np.tile(np.arange(10) < 2, n)
        scores = rng.normal(size=10 * n) + labels
        low, high = metrics.interval95(metrics.bootstrap(scores, labels, speakers, 300))
        assert low < metrics.au_fa_fr(scores, labels) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, np.nan], [True, False], "not numbers"),
        ([1.0, 2.0], [True, True], "one of them is missing"),
        ([1.0], [True, False], "equal 1-D shapes"),
    ],
)
def test_bad_input_is_named(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.au_fa_fr(np.array(scores), np.array(labels))
