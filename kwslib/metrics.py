"""Clip metrics: the FA-FR curve, the area under it, and intervals over speakers.

FA and FR are divided by the number of *all* clips, as in the reports, so with p the share of
keyword clips the area equals p (1 - p) (1 - ROC AUC). Lower is better. So that corpora compare, clips
are weighted to one share of keywords, that of the reports' corpus.
"""

import math
from collections.abc import Callable

import numpy as np

KEYWORD_SHARE = 1734 / 64_721  # of one word in Speech Commands v0.01: at another, the bar of 5.5e-5 means another net


def _counted(
    scores: np.ndarray, is_keyword: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Others accepted, keywords rejected, and the threshold, for each distinct score; whole numbers stay exact."""
    scores, is_keyword = np.asarray(scores, np.float64), np.asarray(is_keyword, bool)
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    if scores.ndim != 1 or scores.shape != is_keyword.shape or scores.shape != weights.shape:
        raise ValueError(f"expected equal 1-D shapes, got {scores.shape}, {is_keyword.shape}, {weights.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {len(scores)} scores are not numbers (NaN)")
    positive, negative = weights * is_keyword, weights * ~is_keyword
    if positive.sum() == 0 or negative.sum() == 0:
        raise ValueError("the curve needs keyword clips and other clips, one of them is missing")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last_of_tie = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    others = np.concatenate([[0.0], np.cumsum(negative[order])[last_of_tie]])
    accepted = np.concatenate([[0.0], np.cumsum(positive[order])[last_of_tie]])
    return others, accepted[-1] - accepted, np.concatenate([[np.inf], ranked[last_of_tie]])


def fa_fr_curve(
    scores: np.ndarray, is_keyword: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False acceptances and rejections at every threshold, as shares of all clips.

    Args:
        scores: (N,), any real numbers, higher means keyword. Equal scores share a threshold.
        is_keyword: (N,), bool.
        weights: (N,), how often each clip counts; ``None`` counts each once.

    Returns:
        fa, fr, thresholds, each (distinct scores + 1,). A clip is accepted when its score is
        >= the threshold. The first point accepts nothing (threshold inf, FA = 0), the last
        everything (FR = 0): the curve is closed, so a constant score cannot look perfect.

    Raises:
        ValueError: shapes differ, a score is not a number, or one of the two classes is missing.

    >>> fa, fr, thresholds = fa_fr_curve(np.array([0.9, 0.2, 0.6, 0.1]), np.array([1, 1, 0, 0], bool))
    >>> fa.tolist(), fr.tolist()
    ([0.0, 0.0, 0.25, 0.25, 0.5], [0.5, 0.25, 0.25, 0.0, 0.0])
    """
    others, rejected, thresholds = _counted(scores, is_keyword, weights)
    total = others[-1] + rejected[0]
    return others / total, rejected / total, thresholds


def at_share(fa: np.ndarray, fr: np.ndarray, share: float = KEYWORD_SHARE) -> tuple[np.ndarray, np.ndarray]:
    """A curve as it would be if keywords made up this share of all clips.

    >>> fa, fr = at_share(np.array([0.0, 0.25, 0.5]), np.array([0.5, 0.25, 0.0]), share=0.2)
    >>> fa.tolist(), fr.tolist()
    ([0.0, 0.4, 0.8], [0.2, 0.1, 0.0])
    """
    return fa / fa[-1] * (1 - share), fr / fr[0] * share


def au_fa_fr(scores: np.ndarray, is_keyword: np.ndarray, weights: np.ndarray | None = None) -> float:
    """AU-FA-FR where keywords are ``KEYWORD_SHARE`` of all clips: p0 (1 - p0) (1 - ROC AUC). Arguments as above.

    Computed from whole numbers of pairs in the wrong order, so equal rankings have equal areas, to the last bit.

    >>> au_fa_fr(np.array([0.9, 0.8, 0.1]), np.array([True, True, False]))
    0.0
    """
    others, rejected, _ = _counted(scores, is_keyword, weights)
    wrong = float(np.trapezoid(rejected, others)) / float(others[-1] * rejected[0])  # 1 - ROC AUC
    return KEYWORD_SHARE * (1 - KEYWORD_SHARE) * wrong


def au_fa_fr_as_is(scores: np.ndarray, is_keyword: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under FR against FA by the trapezoid rule over every threshold, at the share of keywords there is.

    The reports' own number. Arguments as of ``fa_fr_curve``.

    >>> au_fa_fr_as_is(np.zeros(4), np.array([True, False, False, False]))  # constant: p (1 - p) / 2
    0.09375
    """
    others, rejected, _ = _counted(scores, is_keyword, weights)
    return float(np.trapezoid(rejected, others)) / float(others[-1] + rejected[0]) ** 2


def roc_auc(area: float, share: float = KEYWORD_SHARE) -> float:
    """ROC AUC from the AU-FA-FR at a share p of keywords, exact: 1 - area / (p (1 - p)).

    >>> roc_auc(0.09375, 0.25)
    0.5
    """
    return float(1 - area / (share * (1 - share)))


def miss_rate_at(
    most_accepted: float, scores: np.ndarray, is_keyword: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Share of the keyword clips missed at the lowest threshold that accepts at most this share of the others.

    Args:
        most_accepted: 0.01 for 1 % false accepts, of the clips of other words.
        scores, is_keyword, weights: as for ``fa_fr_curve``, with its errors.

    >>> miss_rate_at(0.5, np.array([0.9, 0.2, 0.6, 0.1]), np.array([True, True, False, False]))
    0.0
    >>> miss_rate_at(0.4, np.array([0.9, 0.2, 0.6, 0.1]), np.array([True, True, False, False]))
    0.5
    """
    fa, fr, _ = fa_fr_curve(scores, is_keyword, weights)
    allowed = fa <= most_accepted * fa[-1] * (1 + 1e-9)  # 0.01 of 100 clips is one clip, whatever the rounding
    return float(fr[allowed][-1] / fr[0])


def threshold_keeping(share: float, keyword_scores: np.ndarray) -> float:
    """The highest threshold at which at least this share of keyword clips is accepted.

    >>> threshold_keeping(0.75, np.array([4.0, 1.0, 2.0, 3.0]))
    2.0
    """
    n = len(keyword_scores)
    accepted = math.ceil(share * n - 1e-9)  # 0.99 * 100 is a little more than 99
    return float(np.sort(keyword_scores)[n - accepted])


def units(speakers: np.ndarray, is_keyword: np.ndarray) -> str:
    """What an interval can be about: ``speakers``, or ``clips`` when a single one says the keyword."""
    return "speakers" if len(np.unique(speakers[is_keyword])) > 1 else "clips"


def speaker_weights(speakers: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each clip counts in each bootstrap resample of *speakers*, (resamples, N).

    Clips of one speaker succeed and fail together, so speakers are drawn, not clips. The same
    speakers and seed give the same draws: replicates of two models can be subtracted.
    """
    names, index = np.unique(speakers, return_inverse=True)
    draws = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    return np.stack([np.bincount(d, minlength=len(names)) for d in draws])[:, index]


def bootstrap(
    scores: np.ndarray,
    is_keyword: np.ndarray,
    speakers: np.ndarray,
    resamples: int,
    metric: Callable[..., float] = au_fa_fr,
) -> np.ndarray:
    """AU-FA-FR of each resample of speakers, (resamples,); NaN where a resample has one class only.

    Where a single speaker says the keyword, clips are drawn: the interval then tells nothing of other people.

    Args:
        metric: another one with the arguments of ``au_fa_fr``.
    """
    drawn = speakers if units(speakers, is_keyword) == "speakers" else np.arange(len(scores))
    weights = speaker_weights(drawn, resamples)
    both = (weights[:, is_keyword].sum(1) > 0) & (weights[:, ~is_keyword].sum(1) > 0)
    return np.array([metric(scores, is_keyword, w) if ok else np.nan for w, ok in zip(weights, both, strict=True)])


def interval95(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap replicates (percentile method)."""
    return tuple(np.nanpercentile(values, [2.5, 97.5]).tolist())


def clear_ratio(mine: np.ndarray, theirs: np.ndarray, power: float = 0.8) -> float:
    """The smallest true ratio of two errors that a test would call clear in so many of its repeats.

    From paired bootstrap replicates. An interval of the difference is clear of 0 where that of the ratio is clear of 1,
    and a truly larger ratio moves its logarithm without changing its spread: each resample is a repeat.

    Args:
        mine, theirs: (resamples,), of two models on the same resamples.

    Returns:
        Infinite where too many resamples hold no error of theirs, NaN where neither model makes any.
    """
    some = mine + theirs > 0  # False for NaN, too
    if not some.any():
        return np.nan
    with np.errstate(divide="ignore"):
        apart = np.log(theirs[some]) - np.log(mine[some])
    middle, unlucky, low = np.percentile(apart, [50, 100 * (1 - power), 2.5], method="inverted_cdf")
    if not np.isfinite(middle):
        return np.nan
    return float(np.exp(2 * middle - unlucky - low))
