"""Long recordings with known keywords, made of clips and noise.

A specification is a few numbers in a JSON file; the sound is made when it is needed, the same every time.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from kwslib import audio, paths
from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE, FeatureConfig, identity
from kwslib.data import synthesis
from kwslib.data.augment import FRAME, at_snr, loud_frames, speech_power
from kwslib.data.corpora import Corpus
from kwslib.data.features import VERSION as LOGMELS_VERSION
from kwslib.data.features import LogMel, from_int16, new_array, one_thread, prepared
from kwslib.data.pieces import TALK_VERSION, TURN_S, noise, talk
from kwslib.data.synthesis import COLOURS
from kwslib.processes import in_helpers, made_once


class Track(NamedTuple):
    """Audio with known keywords: samples float32 (N,), and (start, end) in seconds of each keyword clip."""

    samples: np.ndarray
    keywords_s: list[tuple[float, float]]

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE

    def excerpt(self, seconds: float = 10.0) -> "Track":
        """So much of it, its first keyword in the middle; of one without any, the beginning."""
        middle = sum(self.keywords_s[0]) / 2 if self.keywords_s else 0.0
        start = max(
            0, min(round((middle - seconds / 2) * SAMPLE_RATE), len(self.samples) - round(seconds * SAMPLE_RATE))
        )
        samples, from_s = self.samples[start : start + round(seconds * SAMPLE_RATE)], start / SAMPLE_RATE
        inside = [(a - from_s, b - from_s) for a, b in self.keywords_s if from_s <= a and b <= from_s + seconds]
        return Track(samples, inside)


def glue(corpus: Corpus, rows: Sequence[int], keyword: str) -> Track:
    """The clips of these rows one after another, without gaps."""
    samples = from_int16(corpus.waveforms[np.asarray(rows)]).reshape(-1).numpy()
    is_keyword = corpus.is_keyword(keyword)
    clip_s = CLIP_SAMPLES / SAMPLE_RATE
    return Track(samples, [(i * clip_s, (i + 1) * clip_s) for i, row in enumerate(rows) if is_keyword[row]])


def over_noise(clip: np.ndarray, noise: np.ndarray, snr_db: float) -> Track:
    """Two seconds of noise, a keyword's clip in it, and another second of noise; at this ratio to the mean noise power.

    Args:
        clip, noise: int16 samples, (16000,) and any length; noise shorter than four seconds is repeated.
    """
    word, loop = from_int16(clip), from_int16(np.resize(noise, 4 * CLIP_SAMPLES))
    under = at_snr(word[None], loop[None, :CLIP_SAMPLES], torch.tensor([snr_db]))[0] - word
    samples = loop * (under.norm() / loop[:CLIP_SAMPLES].norm())
    samples[2 * CLIP_SAMPLES : 3 * CLIP_SAMPLES] += word
    return Track(samples.numpy(), [(2.0, 3.0)])


TRACK_S = 300.0  # a stream is made and heard in tracks of so many seconds, each a fresh start
CLIP_S = CLIP_SAMPLES / SAMPLE_RATE
LOUDEST_DB = 200  # beyond, levels are no numbers any more
VERSION = 4  # raise it when the same specification would give another sound


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
        talk: whether somebody talks all the time, without the keyword: see ``kwslib.data.pieces.talk``. Over the noise
            as words are, by the same voices in every study.
        keyword_times_s: when a keyword clip begins in every track, besides the other words.
        name: of the file that says all this.
        fa_per_h: false alarms per hour that a detector is allowed on it, where one is to be tuned to it.
        least_found: share of its keywords that this detector should find, see ``decision.with_room``.

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
    talk: bool = False
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
        if not isinstance(self.talk, bool):
            raise SpecError(f"talk is true or false, not {self.talk!r}")
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


@dataclass(frozen=True)
class Recordings(StreamSpec):
    """Long recordings without the keyword instead of a stream that is rendered: people talking, a room, a radio.

    Decisions are made on the first half of them, by name, or of the only one; counted is on the other half.

    Attributes:
        folder: of recordings of any kind, also in folders below it.
        n_bytes: of all of them, so that other recordings are another specification.
    """

    words_per_minute: float = 0.0
    keyword_share: float = 0.0
    name: str = "recordings"
    fa_per_h: float | None = 1.0
    folder: str = ""
    n_bytes: int = 0


def long_recordings(folder: Path) -> list[str]:
    """Names of the recordings in a folder and those below it.

    Raises:
        SpecError: there are none.
    """
    names = [name for name in audio.files_below(folder) if not name.endswith("/")]
    if not names:
        raise SpecError(f"no recordings in {folder}: give a folder of long ones without the keyword")
    return names


def recordings(folder: Path) -> Recordings:
    """What is in a folder.

    Raises:
        SpecError: no recordings.
    """
    return Recordings(folder=str(folder), n_bytes=sum((folder / n).stat().st_size for n in long_recordings(folder)))


def read_spec(path: Path) -> StreamSpec:
    """A specification from a JSON file; what it leaves out is as in ``StreamSpec``.

    Raises:
        SpecError: no JSON object, an unknown name, or a value that makes no stream.
    """
    try:
        described = json.loads(path.read_bytes())
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


def render(corpus: Corpus, rows: Sequence[int], keyword: str, spec: StreamSpec, part: str = "test") -> Iterator[Track]:
    """The tracks of a stream, one by one: words of these rows at their times, over noise.

    Each other word is as likely as any, however many clips there are of it: near-misses, of which a corpus may hold
    many to learn from, are as rare as they are in speech. A keyword ends where its speech does, not where its clip
    does. No keyword follows directly on another: what is counted are events, and one lasts about as long as a word.

    Args:
        rows: clips to draw from, for example the test part of a split.
        part: of the synthesizer's voices, which talk.

    Raises:
        SpecError: keywords are wanted and these rows have none, or other words.
    """
    for number in range(len(_lengths_s(spec))):
        yield _track(corpus, np.asarray(rows), keyword, spec, number, part)


def _lengths_s(spec: StreamSpec) -> list[float]:
    """Of each track; a rest of less than two seconds is left out."""
    n_tracks = max(1, int(np.ceil((spec.minutes * 60 - 2) / TRACK_S)))
    return [min(TRACK_S, spec.minutes * 60 - number * TRACK_S) for number in range(n_tracks)]


def _track(corpus: Corpus, rows: np.ndarray, keyword: str, spec: StreamSpec, number: int, part: str) -> Track:
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
    if spec.talk:
        begin = round(number * TRACK_S * SAMPLE_RATE)
        said = from_int16(talk(corpus, keyword, part, spec.minutes * 60)[begin : begin + len(samples)])
        for turn in said.split(TURN_S * SAMPLE_RATE):
            power = float(speech_power(turn[None])) or 1.0
            turn *= np.sqrt(noise_power * 10 ** (rng.uniform(*spec.snr_db) / 10) / power)
        samples += said.numpy()
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
        sound = noise(kinds[rng.integers(len(kinds))], corpus.noise, len(piece), rng)
        piece += sound * np.float32(10 ** (spec.noise_db / 20))
    return out


class Tracks(NamedTuple):
    """A rendered stream as models read it: log-mels (F, T) of each track, its keywords and its length in seconds."""

    logmels: list[np.ndarray]
    keywords_s: list[list[tuple[float, float]]]
    seconds: list[float]


def prepare(corpus: Corpus, rows: Sequence[int], keyword: str, spec: StreamSpec, part: str = "test") -> Tracks:
    """The log-mels of a stream, float32, memory-mapped; computed once for all models that hear it. As ``render``.

    Raises:
        SpecError: as ``render``; of ``Recordings`` none can be read.
    """
    if isinstance(spec, Recordings):
        return _of_recordings(Path(spec.folder), part)
    rows = np.asarray(rows)
    sound = replace(spec, name="", fa_per_h=None, least_found=None)  # these change no sample
    talked = (TALK_VERSION, synthesis.VERSION, part) if spec.talk else ()
    key = identity(VERSION, LOGMELS_VERSION, corpus.fingerprint, rows.tolist(), keyword, sound, *talked)
    path, about = corpus.folder / f"stream-{key}.npy", corpus.folder / f"stream-{key}.json"
    seconds, keywords_s = _lengths_s(spec), []
    ends = np.cumsum([round(s * SAMPLE_RATE) // FeatureConfig().hop_length + 1 for s in seconds]).tolist()
    with made_once(path) as missing:
        if missing:
            if spec.talk:
                talk(corpus, keyword, part, spec.minutes * 60)  # before the others ask for it
            with new_array(path, np.float32, (FeatureConfig().n_mels, ends[-1])) as out:
                calls = ((corpus, rows, keyword, spec, n, part) for n in range(len(seconds)))
                tracks = in_helpers(_track_logmels, calls, in_order=True)
                rendered = tqdm(tracks, desc="rendering a stream", total=len(seconds))
                for end, (logmels, said) in zip(ends, rendered, strict=True):
                    out[:, end - logmels.shape[1] : end] = logmels
                    keywords_s.append(said)
                paths.write_json(about, {"keywords_s": keywords_s})  # gets its name first
    described, logmels = json.loads(about.read_bytes()), np.load(path, mmap_mode="r")
    keywords_s = [[(start, end) for start, end in track] for track in described["keywords_s"]]
    return Tracks(np.split(logmels, ends[:-1], axis=1), keywords_s, seconds)


@torch.no_grad()
def _track_logmels(corpus, rows, keyword, spec, number: int, part: str) -> tuple[np.ndarray, list]:
    with one_thread():
        track = _track(corpus, rows, keyword, spec, number, part)
        return prepared(torch.from_numpy(track.samples)[None], LogMel())[0].numpy(), track.keywords_s


@torch.no_grad()
def _of_recordings(folder: Path, part: str) -> Tracks:
    """The half of the recordings in a folder that a part may hear."""
    names, logmels, seconds = long_recordings(folder), [], []
    half = len(names) // 2
    chosen = names if half == 0 else names[:half] if part == "val" else names[half:]
    for name in tqdm(chosen, desc=f"reading recordings, {part}", unit="file", disable=None):
        with suppress(audio.AudioError), one_thread():
            samples = audio.read(folder / name)
            middle = len(samples) // 2 if half == 0 else 0
            samples = samples[:middle] if middle and part == "val" else samples[middle:]
            step = round(TRACK_S * SAMPLE_RATE)
            pieces = [samples[start : start + step] for start in range(0, len(samples), step)]
            for piece in (piece for piece in pieces if len(piece) >= 2 * CLIP_SAMPLES):
                logmels.append(prepared(torch.from_numpy(piece)[None], LogMel())[0].numpy())
                seconds.append(len(piece) / SAMPLE_RATE)
    if not seconds:
        raise SpecError(f"none of {len(chosen)} recordings in {folder} can be read: give long ones without the keyword")
    return Tracks(logmels, [[] for _ in seconds], seconds)
