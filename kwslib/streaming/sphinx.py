"""PocketSphinx's keyphrase spotter on our streams: what a maker would use without training anything.

It knows English words by their sounds. Huggins-Daines et al. 2006; https://pypi.org/project/pocketsphinx.
"""

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
from joblib import Parallel, cpu_count

from kwslib.config import SAMPLE_RATE
from kwslib.processes import helped
from kwslib.streaming.events import ScoredTrack, count
from kwslib.streaming.tracks import Track

CHUNK = 1280  # samples handed over at a time, as many as a step of our models takes


class NoSphinx(RuntimeError):
    """PocketSphinx cannot be asked; the message says why."""


def spot(tracks: Sequence[Track], keyword: str, thresholds: Sequence[float]) -> pd.DataFrame:
    """What it finds on these tracks at each of its thresholds, and how long it takes.

    Args:
        thresholds: its ``kws_threshold``, from 1e-50 (much is found) to 1 (little).

    Returns:
        A row per threshold: the columns of ``events.count`` and ``real_time_factor``, of one core.

    Raises:
        NoSphinx: it is not installed, or its English dictionary does not have the keyword.
    """
    _decoder(keyword, 1.0)  # complains now, not in another process
    calls = [helped(_fired)(track.samples, keyword, t) for t in thresholds for track in tracks]
    results = iter(Parallel(n_jobs=cpu_count())(calls))
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


def _fired(samples: np.ndarray, keyword: str, threshold: float) -> tuple[list[float], float]:
    """When it says that it heard the keyword, in seconds, and the time it took."""
    decoder, raw = _decoder(keyword, threshold), (samples * 32767).astype("<i2")
    fired, began = [], time.perf_counter()
    decoder.start_utt()
    for start in range(0, len(raw), CHUNK):
        chunk = raw[start : start + CHUNK]
        decoder.process_raw(chunk.tobytes(), False, False)
        if decoder.hyp() is not None:
            fired.append((start + len(chunk)) / SAMPLE_RATE)
            decoder.end_utt()
            decoder.start_utt()
    decoder.end_utt()
    return fired, time.perf_counter() - began


def _decoder(keyword: str, threshold: float):
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise NoSphinx("PocketSphinx is not installed: .venv/bin/pip install -e '.[dev]'") from None
    words = keyword.lower().split()
    decoder = Decoder(keyphrase=" ".join(words), kws_threshold=threshold, lm=None, loglevel="FATAL")
    if not all(decoder.lookup_word(word) for word in words):  # it would take the phrase and never say anything
        raise NoSphinx(f"PocketSphinx does not know how {keyword!r} sounds")
    return decoder
