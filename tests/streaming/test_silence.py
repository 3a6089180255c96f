"""Exact zeros between words, noise gates and telephone bands: what published stream models learnt to hear."""

from functools import cache

import numpy as np
import pytest
from scipy.signal import resample_poly

from kwslib import paths
from kwslib.config import SAMPLE_RATE
from kwslib.data import synthesis
from kwslib.processes import in_fresh_process
from kwslib.streaming.decision import read_decision
from kwslib.streaming.events import count_events
from kwslib.streaming.model import StreamingModel, score_chunks
from kwslib.training import checkpoints

PUBLISHED = paths.ROOT / "checkpoints" / "reference" / "synthetic-sheila-speaker"
MODELS = ("brook-stream-qat4-seed0.kws", "baseline-stream-seed0.pt")
HISS = 1e-3


def say() -> list[tuple[bool, np.ndarray]]:
    """Twenty voices: another word, then the keyword."""
    espeak, said = synthesis.Espeak(), []
    for i, voice in enumerate(list(synthesis.speakers(120).values())[60:100:2]):
        espeak.voice(voice)
        for word in ("seven" if i % 2 else "window", "sheila"):
            said.append((word == "sheila", espeak.say(word, 150, 50, 50)))
    return said


@cache
def said() -> list[tuple[bool, np.ndarray]]:
    return in_fresh_process(say)


@cache
def track(kind: str) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Words 1.2 s apart in faint hiss; behind a gate that opens for them; in zeros; or below 4 kHz."""
    rng, pieces, keywords_s, t = np.random.default_rng(1), [np.zeros(2 * SAMPLE_RATE)], [], 2 * SAMPLE_RATE
    for is_keyword, word in said():
        pieces += [word * 0.4, np.zeros(int(1.2 * SAMPLE_RATE))]
        if is_keyword:
            keywords_s.append((t / SAMPLE_RATE, (t + len(word)) / SAMPLE_RATE))
        t += sum(map(len, pieces[-2:]))
    words = np.concatenate(pieces)
    hiss = rng.normal(0, HISS, len(words)) * (kind != "zeros")
    if kind == "gate":
        hiss *= np.convolve(np.abs(words) > 0, np.ones(800), "same") > 0
    sound = words + hiss
    if kind == "telephone":
        sound = resample_poly(resample_poly(sound, 1, 2), 2, 1)
    return (np.round(sound * 32767) / 32768).astype(np.float32), keywords_s


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["hiss", "gate", "zeros", "telephone"])
def test_keywords_are_found_in_any_silence(name, kind):
    model, sidecar = checkpoints.load(PUBLISHED / name)
    samples, keywords_s = track(kind)
    scored = score_chunks(StreamingModel(model), np.array_split(samples, 200))
    fired = [t for t, _, begins in read_decision(sidecar).watch(scored) if begins]
    found, _ = count_events(fired, keywords_s)
    assert found >= 18, f"{found} of {len(keywords_s)}"
