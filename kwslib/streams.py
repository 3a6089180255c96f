"""Long recordings with known keywords, made of clips and noise; and what a detector does on them.

A specification is a few numbers in a JSON file; the sound is made when it is needed, the same every time.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, cpu_count, delayed
from torch import nn
from tqdm.auto import tqdm

from kwslib import paths
from kwslib.augment import FRAME, loud_frames, speech_power
from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE, FeatureConfig, identity
from kwslib.corpora import Corpus
from kwslib.features import LogMel, from_int16, n_frames, new_array, one_thread
from kwslib.metrics import TOLERANCE_S, count_events
from kwslib.models import keyword_score, step_logits
from kwslib.processes import made_once
from kwslib.quantize import INT8
from kwslib.sequences import COLOURS, noise
from kwslib.stream import Track, events

TRACK_S = 300.0  # a stream is made and heard in tracks of so many seconds, each a fresh start
CLIP_S = CLIP_SAMPLES / SAMPLE_RATE
LOUDEST_DB = 200  # beyond, levels are no numbers any more
VERSION = 3  # raise it when the same specification would give another sound


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
        name: of the file that says all this.
        fa_per_h: false alarms per hour that a detector is allowed on it, where one is to be tuned to it.
        least_found: share of its keywords that this detector should find, see ``decide.decide``.

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
    name: str = ""
    fa_per_h: float | None = None
    least_found: float | None = None

    def __post_init__(self):
        for name in ("snr_db", "noise", "keyword_times_s"):
            if not isinstance(getattr(self, name), list | tuple):
                raise SpecError(f"{name} must be a list, not {getattr(self, name)!r}")
        levels_db = (self.noise_db, *self.snr_db)
        numbers = (self.seed, self.minutes, self.words_per_minute, self.keyword_share, *levels_db)
        if not all(isinstance(n, int | float) and abs(n) < np.inf for n in (*numbers, *self.keyword_times_s)):
            raise SpecError(f"a stream is described by finite numbers, not by {self}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise SpecError(f"seed must be a whole number from 0 on, not {self.seed}")
        if not 0.05 <= self.minutes <= 10_000:
            raise SpecError(f"minutes must be from 0.05 to 10,000, not {self.minutes}")
        if not 0 <= self.words_per_minute <= 60:
            raise SpecError(
                f"words_per_minute must be from 0 to 60, one clip after another, not {self.words_per_minute}"
            )
        if not 0 <= self.keyword_share <= 1:
            raise SpecError(f"keyword_share must be from 0 to 1, not {self.keyword_share}")
        if self.fa_per_h is not None and not (isinstance(self.fa_per_h, int | float) and 0 <= self.fa_per_h < np.inf):
            raise SpecError(f"fa_per_h must be a number from 0 on, not {self.fa_per_h}")
        if self.least_found is not None:
            share = self.least_found
            if self.fa_per_h is None or not (isinstance(share, int | float) and 0 < share <= 1):
                raise SpecError(f"least_found is a share above 0, up to 1, beside a fa_per_h, not {share}")
        if any(abs(level) > LOUDEST_DB for level in levels_db):
            raise SpecError(f"noise_db and snr_db are from -{LOUDEST_DB} to {LOUDEST_DB}, not {levels_db}")
        if len(self.snr_db) != 2 or self.snr_db[0] > self.snr_db[1]:
            raise SpecError(f"snr_db is a range from low to high, not {self.snr_db}")
        if unknown := set(self.noise).difference({*COLOURS, "corpus"}):
            raise SpecError(f"unknown noise {', '.join(sorted(unknown))}: choose of {', '.join(COLOURS)}, corpus")
        if len(self.keyword_times_s) > TRACK_S or any(not 0 <= t <= TRACK_S - CLIP_S for t in self.keyword_times_s):
            raise SpecError(f"keyword_times_s lie in a track of {TRACK_S:g} s, not at {self.keyword_times_s}")


def read_spec(path: Path) -> StreamSpec:
    """A specification from a JSON file; what it leaves out is as in ``StreamSpec``.

    Raises:
        SpecError: no JSON object, an unknown name, or a value that makes no stream.
    """
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{path} is no specification of a stream: {error}") from None
    known = {f.name for f in dataclasses.fields(StreamSpec)}
    if not isinstance(described, dict) or set(described).difference(known):
        raise SpecError(f"{path} must be an object with some of {', '.join(sorted(known))}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in described.items()}
    values["name"] = path.stem
    try:
        return StreamSpec(**values)
    except (TypeError, SpecError) as error:
        raise SpecError(f"{path}: {str(error)[:500]}") from None  # a list may be long


def render(corpus: Corpus, rows: Sequence[int], keyword: str, spec: StreamSpec) -> Iterator[Track]:
    """The tracks of a stream, one by one: words of these rows at their times, over noise.

    Each other word is as likely as any, however many clips there are of it: near-misses, of which a corpus may hold
    many to learn from, are as rare as they are in speech. A keyword ends where its speech does, not where its clip
    does. No keyword follows directly on another: what is counted are events, and one lasts about as long as a word.

    Args:
        rows: clips to draw from, for example the test part of a split.

    Raises:
        SpecError: keywords are wanted and these rows have none, or other words.
    """
    for number in range(len(_lengths_s(spec))):
        yield _track(corpus, np.asarray(rows), keyword, spec, number)


def _lengths_s(spec: StreamSpec) -> list[float]:
    """Of each track; a rest of less than two seconds is left out."""
    n_tracks = max(1, int(np.ceil((spec.minutes * 60 - 2) / TRACK_S)))
    return [min(TRACK_S, spec.minutes * 60 - number * TRACK_S) for number in range(n_tracks)]


def _track(corpus: Corpus, rows: np.ndarray, keyword: str, spec: StreamSpec, number: int) -> Track:
    is_keyword = corpus.is_keyword(keyword)[rows]
    keywords, spoken = rows[is_keyword], corpus.clips["word"].to_numpy()[rows]
    others = [rows[spoken == word] for word in np.unique(spoken[~is_keyword])]
    wants_keywords = bool(spec.keyword_times_s) or (spec.keyword_share > 0 and spec.words_per_minute > 0)
    if wants_keywords and not len(keywords):
        raise SpecError(f"a stream with the keyword needs clips of {keyword!r}, and these have none")
    if spec.words_per_minute > 0 and spec.keyword_share < 1 and not len(others):
        raise SpecError("a stream with other words needs clips of them, and these have none")
    seconds = _lengths_s(spec)[number]
    rng = np.random.default_rng([spec.seed, number])
    samples = _noise(corpus, spec, round(seconds * SAMPLE_RATE), rng)
    planned = [(t, True) for t in spec.keyword_times_s if t + CLIP_S <= seconds]
    gap = 60 / spec.words_per_minute if spec.words_per_minute else np.inf
    if gap <= seconds + 1e-9:  # there is room for a word
        begins = np.arange(0, seconds - gap + 1e-9, gap) + rng.uniform(
            0, max(gap - CLIP_S, 0), int((seconds + 1e-9) // gap)
        )
        taken = [t for t, _ in planned]
        for begin in begins:
            directly_after = planned[-1:] and planned[-1][1] and begin - planned[-1][0] < 2 * CLIP_S
            wanted = not spec.keyword_times_s and not directly_after and rng.random() < spec.keyword_share
            if not wanted and not others:
                continue
            if all(abs(begin - t) >= CLIP_S for t in taken):  # keywords with a time of their own go first
                planned.append((float(begin), wanted))
    noise_power = 10 ** (spec.noise_db / 10)
    keywords_s = []
    for begin, is_wanted in sorted(planned):
        chosen = keywords if is_wanted else others[rng.integers(len(others))]  # a word first, then a clip of it
        clip = from_int16(corpus.waveforms[rng.choice(chosen)])
        power = float(speech_power(clip[None])) or 1.0  # of silence: none
        gain = np.sqrt(noise_power * 10 ** (rng.uniform(*spec.snr_db) / 10) / power)
        start = round(begin * SAMPLE_RATE)
        samples[start : start + CLIP_SAMPLES] += clip.numpy() * gain
        if is_wanted:
            last = int(loud_frames(clip[None])[0].nonzero().max()) + 1
            keywords_s.append((start / SAMPLE_RATE, (start + last * FRAME) / SAMPLE_RATE))
    return Track(np.clip(samples, -1, 1), keywords_s)


def _noise(corpus: Corpus, spec: StreamSpec, n_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of the wanted level whose kind changes every half minute, float32 (n_samples,)."""
    out = np.zeros(n_samples, np.float32)
    kinds = [kind for kind in spec.noise if kind != "corpus" or corpus.noise]
    for start in range(0, n_samples if kinds else 0, 30 * SAMPLE_RATE):
        piece = out[start : start + 30 * SAMPLE_RATE]
        piece += noise(kinds[rng.integers(len(kinds))], corpus.noise, len(piece), rng) * np.float32(
            10 ** (spec.noise_db / 20)
        )
    return out


class Heard(NamedTuple):
    """What a detector said on one track: (start, end) of its keywords and its length in seconds, times and scores."""

    keywords_s: list[tuple[float, float]]
    seconds: float
    times_s: np.ndarray
    scores: np.ndarray

    @property
    def other_hours(self) -> float:
        """Hours in which an event is a false alarm: all but the keywords and half a second after each."""
        heard_until, other_s = 0.0, 0.0
        for start, end in self.keywords_s:
            other_s += max(0.0, start - heard_until)
            heard_until = end + TOLERANCE_S
        return (other_s + max(0.0, self.seconds - heard_until)) / 3600


class Tracks(NamedTuple):
    """A rendered stream as models read it: log-mels (F, T) of each track, its keywords and its length in seconds."""

    logmels: list[np.ndarray]
    keywords_s: list[list[tuple[float, float]]]
    seconds: list[float]


def prepare(corpus: Corpus, rows: Sequence[int], keyword: str, spec: StreamSpec) -> Tracks:
    """The log-mels of a stream, float32, memory-mapped; computed once for all models that hear it.

    Raises:
        SpecError: as ``render``.
    """
    rows = np.asarray(rows)
    heard = replace(spec, name="", fa_per_h=None, least_found=None)  # these change no sample
    key = identity(VERSION, corpus.fingerprint, rows.tolist(), keyword, heard)
    path, about = corpus.folder / f"stream-{key}.npy", corpus.folder / f"stream-{key}.json"
    with made_once(path) as missing:
        if missing:
            _prepare(corpus, rows, keyword, spec, path, about)
    described, logmels = json.loads(about.read_text()), np.load(path, mmap_mode="r")
    keywords_s = [[(start, end) for start, end in track] for track in described["keywords_s"]]
    return Tracks(np.split(logmels, described["ends"][:-1], axis=1), keywords_s, described["seconds"])


def _prepare(corpus, rows, keyword, spec, path: Path, about: Path) -> None:
    """Write the log-mels; what says where tracks begin gets its name first."""
    seconds = _lengths_s(spec)
    hop = FeatureConfig().hop_length
    ends = np.cumsum([round(s * SAMPLE_RATE) // hop + 1 for s in seconds]).tolist()
    keywords_s = []
    with new_array(path, np.float32, (FeatureConfig().n_mels, ends[-1])) as out:
        tracks = Parallel(n_jobs=cpu_count(), return_as="generator")(
            delayed(_track_logmels)(corpus, rows, keyword, spec, number) for number in range(len(seconds))
        )
        for end, (logmels, said) in zip(ends, tqdm(tracks, desc="rendering a stream", total=len(seconds)), strict=True):
            out[:, end - logmels.shape[1] : end] = logmels
            keywords_s.append(said)
        paths.write_json(about, {"ends": ends, "keywords_s": keywords_s, "seconds": seconds})


@torch.no_grad()
def _track_logmels(corpus, rows, keyword, spec, number: int) -> tuple[np.ndarray, list]:
    with one_thread():
        track = _track(corpus, rows, keyword, spec, number)
        return LogMel()(torch.from_numpy(track.samples)[None])[0].numpy(), track.keywords_s


@torch.no_grad()
def listen(model: nn.Module, tracks: Tracks, reset_steps: int = 0) -> list[Heard]:
    """A model's scores on prepared tracks, many steps in one call.

    Equal to ``StreamingModel`` to rounding.

    Args:
        reset_steps: 0 carries the state from the beginning of each track on. Otherwise the model starts afresh
            every so many steps, on the last second of log-mels.

    Raises:
        ValueError: the model has torch's dynamic int8 layers, which scale what they read by call.
    """
    if any(isinstance(layer, INT8) for layer in model.modules()):
        raise ValueError("torch's dynamic int8 must be heard step by step: take stream.carried_scores")
    config, heard = model.config, []
    window, dtype = n_frames(FeatureConfig()), next(model.parameters()).dtype
    for logmels, keywords_s, seconds in zip(*tracks, strict=True):
        x = torch.from_numpy(np.array(logmels)).to(dtype)
        if reset_steps:
            hop = reset_steps * config.stride[1]
            clips = x.unfold(1, window, hop).transpose(0, 1)  # (windows, F, window)
            scores = torch.cat([keyword_score(model(part)) for part in clips.split(512)])
            ends = np.arange(len(scores)) * hop + window - 1
        else:
            scores = keyword_score(step_logits(model, x[None], config.n_steps(window))[0])
            ends = np.arange(len(scores)) * config.stride[1] + config.kernel_size[1] - 1
        heard.append(Heard(keywords_s, seconds, ends * FeatureConfig().hop_length / SAMPLE_RATE, scores.numpy()))
    return heard


def smoothed(scores: np.ndarray, steps: int) -> np.ndarray:
    """Mean of each score and those just before it, over at most so many steps.

    >>> smoothed(np.array([3.0, 0.0, 0.0, 6.0]), 3).tolist()
    [3.0, 1.5, 1.0, 2.0]
    """
    sums = np.cumsum(np.concatenate([[0.0], scores]))
    ends = np.arange(1, len(scores) + 1)
    starts = np.maximum(ends - steps, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def heard(tracks: Sequence[Heard], thresholds: Sequence[float], refractory_s: float = 1.0) -> pd.DataFrame:
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
            fired = fires(track, threshold, refractory_s)
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


def fires(track: Heard, threshold: float, refractory_s: float = 1.0) -> list[float]:
    """When events begin: as ``stream.events``, which is only asked about the few scores that can be one."""
    high = track.scores >= threshold
    return [t for t, _ in events(track.times_s[high], track.scores[high], threshold, refractory_s)]


def det(tracks: Sequence[Heard], refractory_s: float = 1.0, points: int = 120) -> pd.DataFrame:
    """Miss rate against false alarms per hour, the detection error trade-off: rows of ``heard`` by falling threshold.

    An alarm can hide a keyword that follows within the refractory time, so a lower threshold may find less:
    ``least_miss_rate`` is the least that is reached with no more false alarms.
    """
    scores = np.concatenate([track.scores for track in tracks])
    shares = np.logspace(-np.log10(len(scores)), -0.5, points)  # from the highest score to a third of all
    table = heard(tracks, np.unique(np.quantile(scores, 1 - shares))[::-1], refractory_s)
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


def calibrate(tracks: Sequence[Heard], fa_per_h: float, refractory_s: float = 1.0) -> float:
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
        if heard(tracks, [threshold], refractory_s)["fa_per_h"].iloc[0] > fa_per_h:
            break
        lowest = threshold
    return lowest


def _false_peaks(track: Heard, refractory_s: float, most: int = 200) -> list[float]:
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
