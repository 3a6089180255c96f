"""From scores to decisions: when a stream's scores become an event, and what a score is worth as a probability.

A model trained on as many keywords as other words, or nearly so, takes too much for the keyword where keywords are
rare. What it says is therefore put right on streams of val speakers, and the result is kept with the checkpoint.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import logit
from torch import nn

from kwslib.metrics import threshold_keeping
from kwslib.streaming.events import (
    TOLERANCE_S,
    ScoredTrack,
    count,
    count_events,
    det,
    event_times,
    most_fa_per_h,
    score_tracks,
    smoothed,
    watch,
)
from kwslib.streaming.model import probability
from kwslib.streaming.tracks import SpecError, StreamSpec, Tracks

SMOOTHING = (1, 2, 3)  # steps, tried on val
RESET_STEPS = 2  # how often the model starts afresh where the state is not carried
CURVE_POINTS = 60
WISHES = ("fa_per_h", "hours", "least_found")  # what a decision was made for; one made otherwise has none
VERSION = 5  # raise it when the same streams would give another decision or other figures


@dataclass(frozen=True)
class Decision:
    """What turns scores, logit differences, into events and probabilities.

    Attributes:
        threshold: of the smoothed score; an event begins where it is reached.
        smoothing_steps: a smoothed score is the mean of the last so many.
        refractory_s: nothing follows an event for so long.
        scale, offset: the keyword's probability is the logistic function of scale * score + offset.
        fa_per_h, hours: at most so many false alarms per hour were allowed, on so many hours of val streams.
        least_found: share of the keywords of those streams that should be found.
    """

    threshold: float = 0.0
    smoothing_steps: int = 1
    refractory_s: float = 1.0
    scale: float = 1.0
    offset: float = 0.0
    fa_per_h: float | None = None
    hours: float | None = None
    least_found: float | None = None

    def probability(self, score: float | np.ndarray) -> np.ndarray:
        """Smoothed score -> probability of the keyword.

        >>> float(Decision(scale=2.0, offset=-1.0).probability(0.5))
        0.5
        """
        return probability(self.scale * np.asarray(score, np.float64) + self.offset)

    def at_probability(self, share: float) -> "Decision":
        """The same with the threshold at this probability.

        Raises:
            ValueError: it is none.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"a threshold is a probability from 0 to 1, not {share}")
        return replace(self, threshold=float((logit(share) - self.offset) / self.scale))

    def watch(self, scored: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float, bool]]:
        """Time, smoothed score and whether an event begins, for each time and score as it comes.

        >>> list(Decision(threshold=1.0, smoothing_steps=2).watch([(0.1, 0.0), (0.2, 2.0), (0.3, 4.0)]))
        [(0.1, 0.0, False), (0.2, 1.0, True), (0.3, 3.0, False)]
        """
        yield from watch(self._smoothed(scored), self.threshold, self.refractory_s)

    def _smoothed(self, scored):
        last: deque = deque(maxlen=self.smoothing_steps)
        for t, score in scored:
            last.append(score)
            yield t, sum(last) / len(last)

    def smooth(self, tracks: list[ScoredTrack]) -> list[ScoredTrack]:
        """The same tracks with smoothed scores."""
        return [track._replace(scores=smoothed(track.scores, self.smoothing_steps)) for track in tracks]


@dataclass(frozen=True)
class Decide:
    """A step that leaves the model as it is: its decision is made on val streams and measured on test streams.

    Attributes:
        streams: their specifications. Where one with keywords names a rate that is allowed, a decision is made for it;
            the first such decision is kept with the model. One without keywords that names a rate, talk, is a
            condition for all of them: none may raise more alarms on it.
        reset: names of those on which the model is also run with its state reset before each window, which is slow.
    """

    streams: tuple[StreamSpec, ...]
    reset: tuple[str, ...] = ("dense",)

    def __post_init__(self):
        names, rated = [spec.name for spec in self.streams], {spec.name for spec in self.made_on}
        found = {spec.name for spec in self.made_on if _has_keywords(spec)}
        if not all(names) or len(set(names)) < len(names):
            raise ValueError(f"each stream needs a name of its own, not {names}")
        if not found:
            raise ValueError(
                "a decision needs a stream with keywords that says fa_per_h, the rate that is allowed on it"
            )
        if not set(self.reset) <= rated:
            raise ValueError(f"reset names {', '.join(self.reset)}, of which not all have a rate")

    def __call__(self, model: nn.Module) -> nn.Module:
        return model

    @property
    def made_on(self) -> tuple[StreamSpec, ...]:
        """The streams with a rate, which are also made of val speakers."""
        return tuple(spec for spec in self.streams if spec.fa_per_h is not None)

    def sized(self, percent: float) -> "Decide":
        """The same on shorter or longer streams."""
        return replace(self, streams=tuple(replace(s, minutes=s.minutes * percent / 100) for s in self.streams))


def _has_keywords(spec: StreamSpec) -> bool:
    return bool(spec.keyword_times_s) or bool(spec.keyword_share and spec.words_per_minute)


class Compared(NamedTuple):
    """Several ways to score the same tracks, by ``compare``."""

    table: pd.DataFrame  # by way: keywords found, how many there are, false alarms
    track: int  # the first one that tells the ways apart, 0 if none does
    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # of that track, by way: times in seconds, probabilities
    threshold: float  # as a probability
    events_s: list[float]  # of that track, the first way


def compare(decision: Decision, scored: Mapping[str, Sequence[ScoredTrack]]) -> Compared:
    """What each of several ways to score tracks finds with one decision.

    Args:
        scored: way -> all tracks. Of a way whose steps are longer than those of the first one, fewer are smoothed.
    """
    step_s, curves, events_s, counts = None, {}, {}, {}
    for way, tracks in scored.items():
        this_s = tracks[0].times_s[1] - tracks[0].times_s[0]
        step_s = step_s or this_s
        steps = max(1, round(decision.smoothing_steps * step_s / this_s))
        smooth = replace(decision, smoothing_steps=steps).smooth(tracks)
        curves[way] = [(track.times_s, decision.probability(track.scores)) for track in smooth]
        events_s[way] = [event_times(track, decision.threshold, decision.refractory_s) for track in smooth]
        counts[way] = [count_events(of, track.keywords_s) for of, track in zip(events_s[way], tracks, strict=True)]
    by_track = list(zip(*counts.values(), strict=True))
    apart = next((i for i, of in enumerate(by_track) if len(set(of)) > 1), 0)
    table = pd.DataFrame({way: np.sum(of, axis=0) for way, of in counts.items()}, index=["found", "false alarms"]).T
    table.insert(1, "keywords", [sum(len(track.keywords_s) for track in tracks) for tracks in scored.values()])
    shown = {way: of[apart] for way, of in curves.items()}
    threshold = float(decision.probability(decision.threshold))
    return Compared(table, apart, shown, threshold, next(iter(events_s.values()))[apart])


def calibrate(tracks: Sequence[ScoredTrack], fa_per_h: float, refractory_s: float = 1.0) -> float:
    """The lowest threshold with at most so many false alarms per hour on these tracks, which should be of val.

    Raises:
        SpecError: the tracks have no time without keyword.
    """
    if not sum(track.other_hours for track in tracks):
        raise SpecError("there is no time without keyword to count false alarms in")
    peaks = [peak for track in tracks for peak in _false_peaks(track, refractory_s)]
    lowest = np.inf
    for peak in sorted(peaks, reverse=True):
        threshold = float(np.nextafter(peak, np.inf))  # this peak no longer counts, all lower ones do not either
        if count(tracks, [threshold], refractory_s)["fa_per_h"].iloc[0] > fa_per_h:
            break
        lowest = threshold
    return lowest


def _false_peaks(track: ScoredTrack, refractory_s: float, most: int = 200) -> list[float]:
    """The highest scores away from every keyword, each at least ``refractory_s`` from the others."""
    times, scores = track.times_s, track.scores
    away = np.ones(len(times), bool)
    for start, end in track.keywords_s:
        away &= (times < start) | (times > end + TOLERANCE_S)
    times, scores = times[away], scores[away]
    peaks: list[float] = []
    while len(scores) and len(peaks) < most:
        best = scores.argmax()
        peaks.append(float(scores[best]))
        keep = np.abs(times - times[best]) >= refractory_s
        times, scores = times[keep], scores[keep]
    return peaks


def closest(
    tracks: list[ScoredTrack], fa_per_h: float, conditions: Sequence[tuple[list[ScoredTrack], float]] = ()
) -> Decision:
    """The decision that misses least with at most so many false alarms per hour on these tracks.

    Its threshold is the lowest, its smoothing the one that misses least there, of equals the shortest.

    Args:
        conditions: other tracks with the rate that is allowed on those.
    """
    hours = round(sum(track.other_hours for track in tracks), 3)
    tried = []
    for steps in SMOOTHING:
        smooth = Decision(smoothing_steps=steps).smooth(tracks)
        lowest = calibrate(smooth, fa_per_h)
        for others, rate in conditions:
            lowest = max(lowest, calibrate(Decision(smoothing_steps=steps).smooth(others), rate))
        missed = count(smooth, [lowest])["miss_rate"].iloc[0]
        tried.append((missed, steps, lowest))
    _, steps, threshold = min(tried)
    return Decision(threshold, steps, fa_per_h=fa_per_h, hours=hours)


def with_room(tracks: list[ScoredTrack], nearest: Decision, least_found: float | None = None) -> Decision:
    """A decision from what a model says on val streams: ``closest`` with room to both sides, and probabilities.

    The threshold of ``nearest``, the closest one on these tracks, has no room left for people who sound unlike those
    of val. Where a higher one still finds ``least_found``, the threshold is in the middle between both: as far from too
    many alarms as from too few keywords.
    """
    highest, is_keyword = highest_scores(nearest.smooth(tracks))
    threshold = nearest.threshold
    if least_found is not None and is_keyword.any():
        highest_good = threshold_keeping(least_found, highest[is_keyword])
        threshold = max(threshold, (threshold + highest_good) / 2)
    scale, offset = fitted_probability(highest, is_keyword)
    return replace(nearest, threshold=threshold, least_found=least_found, scale=scale, offset=offset)


def read_decision(sidecar: dict) -> Decision | None:
    """The decision that a checkpoint's description holds, if any.

    Raises:
        ValueError: it is damaged.
    """
    described = sidecar.get("decision")
    if not described:
        return None
    try:
        decision = Decision(**described)
        numbers = [n for name, n in described.items() if n is not None or name not in WISHES]
        fits = all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e30 for n in numbers)
        fits = fits and decision.scale > 0 and decision.refractory_s >= 0 and 1 <= decision.smoothing_steps <= 1000
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"the decision of this checkpoint makes no sense: {str(described)[:200]}")
    return replace(decision, smoothing_steps=int(decision.smoothing_steps))


def highest_scores(tracks: list[ScoredTrack]) -> tuple[np.ndarray, np.ndarray]:
    """The highest score of each keyword and of each other second of the tracks, and which is which, (N,), (N,) bool."""
    found: list[tuple[float, bool]] = []
    for track in tracks:
        free = 0.0
        for start, end in [*track.keywords_s, (track.seconds, None)]:
            spans = [(t, t + 1, False) for t in np.arange(free, start - 1 + 1e-9)]
            if end is not None:
                free = end + TOLERANCE_S
                spans.append((start, free, True))
            for begin, stop, is_keyword in spans:
                inside = track.scores[np.searchsorted(track.times_s, begin) : np.searchsorted(track.times_s, stop)]
                if len(inside):
                    found.append((inside.max(), is_keyword))
    scores, is_keyword = zip(*found, strict=True) if found else ((), ())
    return np.array(scores, float), np.array(is_keyword, bool)


def fitted_probability(scores: np.ndarray, is_keyword: np.ndarray) -> tuple[float, float]:
    """Scale and offset with which the logistic function of the scores gives the most likely probabilities.

    Source: Platt 1999, with his targets that keep both finite where the classes do not overlap.
    """
    from scipy.optimize import minimize

    ones, zeros = int(is_keyword.sum()), int((~is_keyword).sum())
    target = np.where(is_keyword, (ones + 1) / (ones + 2), 1 / (zeros + 2))
    middle, spread = (float(scores.mean()), float(scores.std()) or 1.0) if len(scores) else (0.0, 1.0)
    z = (scores - middle) / spread

    def loss(parameters: np.ndarray) -> float:
        logits = parameters[0] * z + parameters[1]
        return float((np.logaddexp(0, logits) - target * logits).sum())

    scale, offset = minimize(loss, np.array([1.0, 0.0]), method="Nelder-Mead", options={"maxiter": 2000}).x
    scale = max(scale, 1e-6)  # a detector that is wrong more often than not gets no say, not a reversed one
    return float(scale / spread), float(offset - scale * middle / spread)


def measure(model: nn.Module, step: Decide, val: dict[str, Tracks], test: dict[str, Tracks]) -> tuple[Decision, dict]:
    """A model's decision from val streams, and what it does on test streams, as plain values.

    Returns:
        The decision, and ``points`` (what is counted, one row for each stream, way of running and rate that was
        allowed; ``val_miss_rate`` is at that rate on val, without any distance, so that models can be compared) with
        ``curves`` (false alarms per hour and the least miss rate, by stream and way of running).
    """
    points, curves = [], {}
    decision = None
    on_test = {name: score_tracks(model, tracks) for name, tracks in test.items()}
    talks = [(spec.name, spec.fa_per_h) for spec in step.made_on if not _has_keywords(spec)]
    found = [spec for spec in step.made_on if _has_keywords(spec)]
    conditions: dict[int, list] = {}  # by way of running: the same for every stream
    for name, fa_per_h, least_found in ((spec.name, spec.fa_per_h, spec.least_found) for spec in found):
        for state, reset_steps in (("carried", 0), ("reset", RESET_STEPS))[: 1 + (name in step.reset)]:
            on_val = score_tracks(model, val[name], reset_steps)
            if reset_steps not in conditions:
                conditions[reset_steps] = [(score_tracks(model, val[talk], reset_steps), rate) for talk, rate in talks]
            nearest = closest(on_val, fa_per_h, conditions[reset_steps])
            made = with_room(on_val, nearest, least_found)
            decision = decision or made  # of the first stream, with carried state
            tracks = score_tracks(model, test[name], reset_steps) if reset_steps else on_test[name]
            row = {"stream": name, "state": state, "asked_fa_per_h": fa_per_h, **outcome(tracks, made)}
            points.append(row | {"val_miss_rate": outcome(on_val, nearest)["miss_rate"]})
            curve = det(made.smooth(tracks), made.refractory_s, CURVE_POINTS).drop_duplicates("fa_per_h")
            curves[f"{name}, {state}"] = {
                "fa_per_h": curve["fa_per_h"].round(4).tolist(),
                "miss_rate": curve["least_miss_rate"].round(4).tolist(),
            }
    for name, tracks in on_test.items():
        if name != found[0].name:  # the stored decision elsewhere
            row = {"stream": name, "state": "carried", "asked_fa_per_h": None}
            points.append(row | outcome(tracks, decision))
    return decision, {"decision": asdict(decision), "points": points, "curves": curves}


def outcome(tracks: list[ScoredTrack], decision: Decision) -> dict:
    """What a decision does on tracks, as plain values: found keywords, false alarms, their rates, latency.

    ``most_fa_per_h`` is the rate that so few alarms leave possible, see ``events.most_fa_per_h``.
    """
    tracks = decision.smooth(tracks)
    row = count(tracks, [decision.threshold], decision.refractory_s).iloc[0]
    most = most_fa_per_h(int(row["false_alarms"]), row["other_hours"])
    counted = {name: int(row[name]) for name in ("found", "keywords", "false_alarms")}
    rest = {name: row[name] for name in ("threshold", "other_hours", "miss_rate", "fa_per_h", "latency_s")}
    rest = {name: round(float(value), 4) if np.isfinite(value) else None for name, value in rest.items()}
    return {**counted, **rest, "most_fa_per_h": round(most, 3), "smoothing_steps": decision.smoothing_steps}
