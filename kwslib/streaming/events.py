"""Events: what a user would notice of a stream's scores, and how keywords found and false alarms are counted.

A keyword counts as found, once, by an event between its start and half a second after its end; every other event
is a false alarm, counted per hour of sound in which there is nothing to be found. PocketSphinx is counted in the same
way: a keyphrase spotter that a maker would use without training anything, for it knows how English words sound
(Huggins-Daines et al. 2006; https://pypi.org/project/pocketsphinx).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from kwslib.config import SAMPLE_RATE, FeatureConfig
from kwslib.data.features import n_frames
from kwslib.nets.crnn import keyword_score, step_logits
from kwslib.processes import in_helpers
from kwslib.streaming.model import FIRST_S
from kwslib.streaming.tracks import Track, Tracks
from kwslib.training.quantize import INT8

TOGETHER = 16  # tracks that are scored at once
SPHINX_CHUNK = 1280  # samples handed to PocketSphinx at a time, as many as a step of our models takes
TOLERANCE_S = 0.5  # an event this long after a keyword's end still belongs to it (MLPerf Tiny's value)


def scored(way: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], tracks: Iterable[Track]) -> "list[ScoredTrack]":
    """Tracks of sound, scored by a function from samples to times and scores, as ``carried_scores``."""
    return [ScoredTrack(track.keywords_s, track.seconds, *way(track.samples)) for track in tracks]


def count_events(
    events_s: Sequence[float], keywords_s: Sequence[tuple[float, float]], tolerance_s: float = TOLERANCE_S
) -> tuple[int, int]:
    """Keywords found and false alarms among the events of a stream.

    An event between a keyword's start and ``tolerance_s`` after its end finds that keyword, once;
    further events there count as nothing. Every other event is a false alarm.

    >>> count_events([1.5, 2.4], keywords_s=[(1.0, 2.0), (2.0, 3.0)])
    (2, 0)

    >>> count_events([1.2, 1.4, 5.0], keywords_s=[(0.5, 1.0), (8.0, 9.0)])
    (1, 1)
    """
    found: set[int] = set()
    false_alarms = 0
    for t in events_s:
        near = [i for i, (start, end) in enumerate(keywords_s) if start <= t <= end + tolerance_s]
        found.update([i for i in near if i not in found][:1])  # of two neighbours, the one not found yet
        false_alarms += not near
    return len(found), false_alarms


def watch(
    scored: Iterable[tuple[float, float]], threshold: float, refractory_s: float = 1.0
) -> Iterator[tuple[float, float, bool]]:
    """Every time and score as it comes, and whether an event begins there: see ``detect``."""
    silent_until = -float("inf")
    for t, value in scored:
        fires = value >= threshold and t >= silent_until
        if fires:
            silent_until = t + refractory_s
        yield t, value, fires


def detect(
    times_s: Iterable[float], scores: Iterable[float], threshold: float, refractory_s: float = 1.0
) -> Iterator[tuple[float, float]]:
    """Detections a user would notice: a score at or above threshold, then silence for a while.

    Yields:
        (time, score) of each score that fires; what follows within ``refractory_s`` is the same event.

    >>> list(detect([0.1, 0.2, 0.3, 1.2], [0.9, 0.95, 0.1, 0.8], threshold=0.5))
    [(0.1, 0.9), (1.2, 0.8)]
    """
    pairs = watch(zip(times_s, scores, strict=True), threshold, refractory_s)
    yield from ((t, value) for t, value, fires in pairs if fires)


class ScoredTrack(NamedTuple):
    """What a detector said on one track: (start, end) of its keywords and its length in seconds, times and scores."""

    keywords_s: list[tuple[float, float]]
    seconds: float
    times_s: np.ndarray
    scores: np.ndarray

    @property
    def other_hours(self) -> float:
        """Hours in which an event is a false alarm: all but the keywords and half a second after each."""
        counted_until, other_s = 0.0, 0.0
        for start, end in self.keywords_s:
            other_s += max(0.0, start - counted_until)
            counted_until = end + TOLERANCE_S
        return (other_s + max(0.0, self.seconds - counted_until)) / 3600


@torch.no_grad()
def score_tracks(model: nn.Module, tracks: Tracks, reset_steps: int = 0) -> list[ScoredTrack]:
    """A model's scores on prepared tracks, many steps in one call.

    Equal to ``score_chunks`` to rounding.

    Args:
        reset_steps: 0 carries the state from the beginning of each track on. Otherwise the model starts afresh
            every so many steps, on the last second of log-mels.

    Raises:
        ValueError: the model has torch's dynamic int8 layers, which scale what they read by call.
    """
    if any(isinstance(layer, INT8) for layer in model.modules()):
        raise ValueError("torch's dynamic int8 must be heard step by step: take carried_scores")
    config, window = model.config, n_frames(FeatureConfig())
    dtype, hop_s = next(model.parameters()).dtype, FeatureConfig().hop_length / SAMPLE_RATE
    scored: list[ScoredTrack] = []
    for _, alike in groupby(zip(*tracks, strict=True), key=lambda track: track[0].shape):
        alike = list(alike)
        for few in (alike[i : i + TOGETHER] for i in range(0, len(alike), TOGETHER)):
            x = torch.from_numpy(np.stack([logmels for logmels, _, _ in few])).to(dtype)
            if reset_steps:
                hop = reset_steps * config.stride[1]
                steps = model.convolved(x).unfold(1, config.n_steps(window), reset_steps)  # (B, windows, C, S)
                clips = steps[:, : (x.shape[2] - window) // hop + 1].transpose(2, 3)
                logits = torch.cat([model.read(part).logits for part in clips.flatten(0, 1).split(1024)])
                ends = np.arange(clips.shape[1]) * hop + window - 1
            else:
                logits = step_logits(model, x, config.n_steps(window)).flatten(0, 1)
                ends = np.arange(len(logits) // len(few)) * config.stride[1] + config.kernel_size[1] - 1
            scores = keyword_score(logits).view(len(few), -1).double().numpy()  # a threshold just above one is above it
            times_s = ends * hop_s
            heard = times_s >= FIRST_S
            rows = zip(few, scores[:, heard], strict=True)
            scored += [ScoredTrack(said, seconds, times_s[heard], score) for (_, said, seconds), score in rows]
    return scored


def smoothed(scores: np.ndarray, steps: int) -> np.ndarray:
    """Mean of each score and those just before it, over at most so many steps.

    >>> smoothed(np.array([3.0, 0.0, 0.0, 6.0]), 3).tolist()
    [3.0, 1.5, 1.0, 2.0]
    """
    sums = np.cumsum(np.concatenate([[0.0], scores]))
    ends = np.arange(1, len(scores) + 1)
    starts = np.maximum(ends - steps, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def count(tracks: Sequence[ScoredTrack], thresholds: Sequence[float], refractory_s: float = 1.0) -> pd.DataFrame:
    """What a detector does at each threshold, counted over all tracks.

    Returns:
        A row per threshold: ``threshold, found, keywords, false_alarms, other_hours, miss_rate, fa_per_h``,
        ``latency_s`` (median delay of the first event after the end of the keyword; below 0: before it).
    """
    rows = []
    hours = sum(track.other_hours for track in tracks)
    keywords = sum(len(track.keywords_s) for track in tracks)
    for threshold in thresholds:
        found = false_alarms = 0
        delays: list[float] = []
        for track in tracks:
            fired = event_times(track, threshold, refractory_s)
            hits, wrong = count_events(fired, track.keywords_s)
            found, false_alarms = found + hits, false_alarms + wrong
            for start, end in track.keywords_s:
                delays += [t - end for t in fired if start <= t <= end + TOLERANCE_S][:1]
        row = {"threshold": float(threshold), "found": found, "keywords": keywords}
        row |= {"false_alarms": false_alarms, "other_hours": hours}
        row |= {"miss_rate": 1 - found / keywords if keywords else np.nan}
        row |= {"fa_per_h": false_alarms / hours if hours else np.nan}
        rows.append(row | {"latency_s": float(np.median(delays)) if delays else np.nan})
    return pd.DataFrame(rows)


def event_times(track: ScoredTrack, threshold: float, refractory_s: float = 1.0) -> list[float]:
    """When events begin: as ``detect``, which is only asked about the few scores that can be one."""
    high = track.scores >= threshold
    return [t for t, _ in detect(track.times_s[high], track.scores[high], threshold, refractory_s)]


def det(tracks: Sequence[ScoredTrack], refractory_s: float = 1.0, points: int = 120) -> pd.DataFrame:
    """Miss rate against false alarms per hour, the detection error trade-off: rows of ``count`` by falling threshold.

    An alarm can hide a keyword that follows within the refractory time, so a lower threshold may find less:
    ``least_miss_rate`` is the least that is reached with no more false alarms.
    """
    scores = np.concatenate([track.scores for track in tracks])
    shares = np.logspace(-np.log10(len(scores)), -0.5, points)  # from the highest score to a third of all
    table = count(tracks, np.unique(np.quantile(scores, 1 - shares))[::-1], refractory_s)
    table = table.sort_values(["fa_per_h", "miss_rate"], kind="stable", ignore_index=True)
    return table.assign(least_miss_rate=table["miss_rate"].cummin())


def most_fa_per_h(false_alarms: int, hours: float) -> float:
    """The rate that so many false alarms in so many hours leave possible: none at all still allow 3 in that time.

    Upper end of the one-sided 95 % interval of a Poisson rate.

    >>> round(most_fa_per_h(0, 2.0), 1)
    1.5
    """
    from scipy.stats import chi2

    return float(chi2.ppf(0.95, 2 * (false_alarms + 1)) / 2 / hours)


class NoSphinx(RuntimeError):
    """PocketSphinx cannot be asked; the message says why."""


def sphinx(tracks: Sequence[Track], keyword: str, thresholds: Sequence[float]) -> pd.DataFrame:
    """What PocketSphinx finds on these tracks at each of its thresholds, and how long it takes.

    Args:
        thresholds: its ``kws_threshold``, from 1e-50 (much is found) to 1 (little).

    Returns:
        A row per threshold: the columns of ``count`` and ``real_time_factor``, of one core.

    Raises:
        NoSphinx: it is not installed, or its English dictionary does not have the keyword.
    """
    _sphinx_decoder(keyword, 1.0)  # complains now, not in another process
    calls = ((track.samples, keyword, threshold) for threshold in thresholds for track in tracks)
    results = in_helpers(_sphinx_fired, calls, in_order=True)
    rows = []
    for threshold in thresholds:
        found = [next(results) for _ in tracks]
        said = [  # an event is a score of 1
            ScoredTrack(track.keywords_s, track.seconds, np.array(fired), np.ones(len(fired)))
            for track, (fired, _) in zip(tracks, found, strict=True)
        ]
        took_s = sum(seconds for _, seconds in found)
        row = count(said, [0.5]).iloc[0].to_dict()
        rows.append(row | {"threshold": threshold, "real_time_factor": took_s / sum(t.seconds for t in tracks)})
    return pd.DataFrame(rows)


def _sphinx_fired(samples: np.ndarray, keyword: str, threshold: float) -> tuple[list[float], float]:
    """When it says that it heard the keyword, in seconds, and the time it took."""
    decoder, raw = _sphinx_decoder(keyword, threshold), (samples * 32767).astype("<i2")
    fired, began = [], time.perf_counter()
    decoder.start_utt()
    for start in range(0, len(raw), SPHINX_CHUNK):
        chunk = raw[start : start + SPHINX_CHUNK]
        decoder.process_raw(chunk.tobytes(), False, False)
        if decoder.hyp() is not None:
            fired.append((start + len(chunk)) / SAMPLE_RATE)
            decoder.end_utt()
            decoder.start_utt()
    decoder.end_utt()
    return fired, time.perf_counter() - began


def _sphinx_decoder(keyword: str, threshold: float):
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise NoSphinx("PocketSphinx is not installed: .venv/bin/pip install -e '.[dev]'") from None
    words = keyword.lower().split()
    decoder = Decoder(keyphrase=" ".join(words), kws_threshold=threshold, lm=None, loglevel="FATAL")
    if not all(decoder.lookup_word(word) for word in words):  # it would take the phrase and never say anything
        raise NoSphinx(f"PocketSphinx does not know how {keyword!r} sounds")
    return decoder
