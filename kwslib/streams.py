"""Long recordings with known keywords, made of clips and noise; and what a detector does on them.

A specification is a few numbers in a JSON file; the sound is made when it is needed, the same every time.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from kwslib.augment import speech_power
from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE
from kwslib.corpora import Corpus
from kwslib.features import from_int16
from kwslib.metrics import TOLERANCE_S, count_events
from kwslib.models import attend_windows, keyword_score
from kwslib.stream import StreamingModel, Track, events
from kwslib.synthesis import coloured_noise

TRACK_S = 300.0  # a stream is made and heard in tracks of so many seconds, each a fresh start
COLOURS = {"white": 0.0, "pink": 0.5, "brown": 1.0}  # amplitude falls with this power of the frequency
CLIP_S = CLIP_SAMPLES / SAMPLE_RATE


class SpecError(ValueError):
    """A specification that describes no stream; the message says which part of it."""


@dataclass(frozen=True)
class StreamSpec:
    """What a long recording is made of.

    Attributes:
        seed: of everything that is drawn.
        minutes: of stream in all, made in tracks of five.
        words_per_minute: 60 is one clip after another, 12 one in five seconds, 0 none.
        keyword_share: of the words, drawn for each; not where ``keyword_times_s`` says when.
        snr_db: speech over noise, drawn for each word from this range.
        noise: kinds that follow one another: ``white``, ``pink``, ``brown``, or ``corpus``, the recordings
            that came with it; none of them for silence.
        noise_db: level of the noise, full scale is 0.
        keyword_times_s: when a keyword clip begins in every track, besides the other words.

    Raises:
        SpecError: a value that makes no stream.
    """

    seed: int = 0
    minutes: float = 60.0
    words_per_minute: float = 12.0
    keyword_share: float = 0.05
    snr_db: tuple[float, float] = (10.0, 30.0)
    noise: tuple[str, ...] = ("white", "pink", "brown", "corpus")
    noise_db: float = -45.0
    keyword_times_s: tuple[float, ...] = ()

    def __post_init__(self):
        numbers = (self.minutes, self.words_per_minute, self.keyword_share, self.noise_db, *self.snr_db)
        if not all(isinstance(n, int | float) and np.isfinite(n) for n in (self.seed, *numbers, *self.keyword_times_s)):
            raise SpecError(f"a stream is described by finite numbers, not by {self}")
        if not 0 < self.minutes <= 10_000:
            raise SpecError(f"minutes must be above 0 and at most 10,000, not {self.minutes}")
        if not 0 <= self.words_per_minute <= 60:
            raise SpecError(
                f"words_per_minute must be from 0 to 60, one clip after another, not {self.words_per_minute}"
            )
        if not 0 <= self.keyword_share <= 1:
            raise SpecError(f"keyword_share must be from 0 to 1, not {self.keyword_share}")
        if len(self.snr_db) != 2 or self.snr_db[0] > self.snr_db[1]:
            raise SpecError(f"snr_db is a range from low to high, not {self.snr_db}")
        if unknown := set(self.noise).difference({*COLOURS, "corpus"}):
            raise SpecError(f"unknown noise {', '.join(sorted(unknown))}: choose of {', '.join(COLOURS)}, corpus")
        if any(not 0 <= t <= TRACK_S - CLIP_S for t in self.keyword_times_s):
            raise SpecError(f"keyword_times_s lie in a track of {TRACK_S:g} s, not at {self.keyword_times_s}")


def read_spec(path: Path) -> StreamSpec:
    """A specification from a JSON file; what it leaves out is as in ``StreamSpec``.

    Raises:
        SpecError: no JSON object, an unknown name, or a value that makes no stream.
    """
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} is no specification of a stream: {error}") from None
    known = {f.name for f in dataclasses.fields(StreamSpec)}
    if not isinstance(described, dict) or set(described).difference(known):
        raise SpecError(f"{path} must be an object with some of {', '.join(sorted(known))}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in described.items()}
    try:
        return StreamSpec(**values)
    except TypeError as error:
        raise SpecError(f"{path}: {error}") from None


def render(corpus: Corpus, rows: Sequence[int], keyword: str, spec: StreamSpec) -> Iterator[Track]:
    """The tracks of a stream, one by one: words of these rows at their times, over noise.

    Args:
        rows: clips to draw from, for example the test part of a split.

    Raises:
        SpecError: keywords are wanted and these rows have none, or other words.
    """
    rows = np.asarray(rows)
    is_keyword = corpus.is_keyword(keyword)[rows]
    keywords, others = rows[is_keyword], rows[~is_keyword]
    wants_keywords = bool(spec.keyword_times_s) or (spec.keyword_share > 0 and spec.words_per_minute > 0)
    if wants_keywords and not len(keywords):
        raise SpecError(f"a stream with the keyword needs clips of {keyword!r}, and these have none")
    if spec.words_per_minute > 0 and spec.keyword_share < 1 and not len(others):
        raise SpecError("a stream with other words needs clips of them, and these have none")
    left_s = spec.minutes * 60
    for number in range(int(np.ceil(left_s / TRACK_S))):
        rng = np.random.default_rng([spec.seed, number])
        seconds = min(TRACK_S, left_s - number * TRACK_S)
        yield _track(corpus, keywords, others, spec, seconds, rng)


def _track(corpus: Corpus, keywords, others, spec: StreamSpec, seconds: float, rng: np.random.Generator) -> Track:
    samples = _noise(corpus, spec, round(seconds * SAMPLE_RATE), rng)
    planned = [(t, True) for t in spec.keyword_times_s if t + CLIP_S <= seconds]
    if spec.words_per_minute:
        gap = 60 / spec.words_per_minute
        begins = np.arange(0, seconds - gap + 1e-9, gap) + rng.uniform(
            0, max(gap - CLIP_S, 0), int((seconds + 1e-9) // gap)
        )
        taken = [t for t, _ in planned]
        for begin in begins:
            wanted = not spec.keyword_times_s and rng.random() < spec.keyword_share
            if all(abs(begin - t) >= CLIP_S for t in taken):  # keywords with a time of their own go first
                planned.append((float(begin), wanted))
    noise_power = 10 ** (spec.noise_db / 10)
    keywords_s = []
    for begin, is_keyword in sorted(planned):
        clip = from_int16(corpus.waveforms[rng.choice(keywords if is_keyword else others)])
        power = float(speech_power(clip[None])) or 1.0  # of silence: none
        gain = np.sqrt(noise_power * 10 ** (rng.uniform(*spec.snr_db) / 10) / power)
        start = round(begin * SAMPLE_RATE)
        samples[start : start + CLIP_SAMPLES] += clip.numpy() * gain
        if is_keyword:
            keywords_s.append((start / SAMPLE_RATE, start / SAMPLE_RATE + CLIP_S))
    return Track(np.clip(samples, -1, 1), keywords_s)


def _noise(corpus: Corpus, spec: StreamSpec, n_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of the wanted level whose kind changes every half minute, float32 (n_samples,)."""
    out = np.zeros(n_samples, np.float32)
    piece = 30 * SAMPLE_RATE
    recordings = [corpus.noise[name] for name in sorted(corpus.noise)]
    kinds = [kind for kind in spec.noise if kind != "corpus" or recordings]
    for start in range(0, n_samples if kinds else 0, piece):
        size = min(piece, n_samples - start)
        kind = kinds[rng.integers(len(kinds))]
        if kind == "corpus":
            recording = recordings[rng.integers(len(recordings))].astype(np.float32)
            sound = np.resize(np.roll(recording, int(rng.integers(len(recording)))), size)
        else:
            sound = coloured_noise(rng, size, COLOURS[kind], lowest_hz=50.0)
        level = np.sqrt(np.square(sound).mean()) or 1.0
        out[start : start + size] = sound / level * 10 ** (spec.noise_db / 20)
    return out


@torch.no_grad()
def carried_scores(model: nn.Module, samples: np.ndarray, block_s: float = 60.0) -> tuple[np.ndarray, np.ndarray]:
    """Times and scores of a track with carried state, as of ``stream.carried_scores`` but many steps in one call.

    Equal to it to rounding; not for torch's dynamic int8, which scales what it reads by call.
    """
    streaming = StreamingModel(model)
    config, front_end, window = model.config, streaming.front_end, streaming.window
    hop = config.stride[1] * front_end.config.hop_length
    block = round(block_s * SAMPLE_RATE / hop) * hop
    found = []
    audio, frames, hidden, outputs, energies = streaming.initial_state()
    for piece in torch.from_numpy(np.asarray(samples, np.float32))[None].split(block, dim=1):
        audio, new = streaming._take_frames(torch.cat([audio, piece], dim=1))
        frames = torch.cat([frames, new], dim=2)
        n_steps = config.n_steps(frames.shape[2])
        if not n_steps:
            continue
        new_outputs, hidden = model.recur(model.steps(frames.to(streaming.dtype)), hidden)
        frames = frames[:, :, n_steps * config.stride[1] :]
        outputs = torch.cat([outputs, new_outputs], dim=1)
        energies = torch.cat([energies, model.attention.energy(new_outputs)[..., 0]], dim=1)
        context = attend_windows(outputs, energies, window)[0, -n_steps:]
        found.append(keyword_score(model.classifier(context)).numpy())
        outputs, energies = outputs[:, -window:], energies[:, -window:]
    scores = np.concatenate(found) if found else np.zeros(0, np.float32)
    return streaming.step_times_s(0, len(scores)), scores


def smoothed(scores: np.ndarray, steps: int) -> np.ndarray:
    """Mean of each score and those just before it, over at most so many steps.

    >>> smoothed(np.array([3.0, 0.0, 0.0, 6.0]), 3).tolist()
    [3.0, 1.5, 1.0, 2.0]
    """
    sums = np.cumsum(np.concatenate([[0.0], scores]))
    ends = np.arange(1, len(scores) + 1)
    starts = np.maximum(ends - steps, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def heard(
    tracks: Sequence[tuple[Track, np.ndarray, np.ndarray]], thresholds: Sequence[float], refractory_s: float = 1.0
) -> pd.DataFrame:
    """What a detector does at each threshold, counted over all tracks.

    Args:
        tracks: (track, times in seconds, scores) of each.

    Returns:
        A row per threshold: ``threshold, found, keywords, false_alarms, other_hours, miss_rate, fa_per_h``,
        ``latency_s`` (median delay of the first event after the end of the keyword clip; below 0: before it).
    """
    rows = []
    hours = sum(track.other_hours for track, _, _ in tracks)
    keywords = sum(len(track.keywords_s) for track, _, _ in tracks)
    for threshold in thresholds:
        found = false_alarms = 0
        delays: list[float] = []
        for track, times, scores in tracks:
            fired = [t for t, _ in events(times, scores, threshold, refractory_s)]
            hits, wrong = count_events(fired, track.keywords_s)
            found, false_alarms = found + hits, false_alarms + wrong
            for start, end in track.keywords_s:
                delays += [t - end for t in fired if start <= t <= end + TOLERANCE_S][:1]
        rows.append(
            {
                "threshold": float(threshold),
                "found": found,
                "keywords": keywords,
                "false_alarms": false_alarms,
                "other_hours": hours,
                "miss_rate": 1 - found / keywords if keywords else np.nan,
                "fa_per_h": false_alarms / hours if hours else np.nan,
                "latency_s": float(np.median(delays)) if delays else np.nan,
            }
        )
    return pd.DataFrame(rows)


def most_fa_per_h(false_alarms: int, hours: float) -> float:
    """The rate that so many false alarms in so many hours leave possible: none at all still allow 3 in that time.

    Upper end of the one-sided 95 % interval of a Poisson rate.

    >>> round(most_fa_per_h(0, 2.0), 1)
    1.5
    """
    from scipy.stats import chi2

    return float(chi2.ppf(0.95, 2 * (false_alarms + 1)) / 2 / hours)


def calibrate(
    tracks: Sequence[tuple[Track, np.ndarray, np.ndarray]], fa_per_h: float, refractory_s: float = 1.0
) -> float:
    """The lowest threshold with at most so many false alarms per hour on these tracks, which should be of val.

    Raises:
        SpecError: the tracks have no time without keyword.
    """
    hours = sum(track.other_hours for track, _, _ in tracks)
    if not hours:
        raise SpecError("there is no time without keyword to count false alarms in")
    peaks = [peak for track, times, scores in tracks for peak in _false_peaks(track, times, scores, refractory_s)]
    lowest = np.inf
    for peak in sorted(peaks, reverse=True):
        threshold = float(np.nextafter(peak, np.inf))  # this peak no longer counts, all lower ones do not either
        if heard(tracks, [threshold], refractory_s)["fa_per_h"].iloc[0] > fa_per_h:
            break
        lowest = threshold
    return lowest


def _false_peaks(
    track: Track, times: np.ndarray, scores: np.ndarray, refractory_s: float, most: int = 200
) -> list[float]:
    """The highest scores away from every keyword, each at least ``refractory_s`` from the others."""
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
