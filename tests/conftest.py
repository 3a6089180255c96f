"""Shared fixtures: a tiny corpus of tones, written as real files with a fixed seed."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from kwslib.config import SAMPLE_RATE

WORDS = {"go": 300.0, "stop": 700.0, "zoom in": 1500.0}  # each word is a tone of its own pitch


def tone(frequency_hz: float, rng: np.random.Generator, seconds: float = 0.8, rate: int = SAMPLE_RATE) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * frequency_hz * t) + 0.02 * rng.standard_normal(len(t))).astype(np.float32)


def stripes(labels: np.ndarray, rng: np.random.Generator, loudness: float, frames: int = 101) -> np.ndarray:
    """Log-mels of noise, (N, 40, frames): keyword clips hold a stripe in the middle bins, the others one elsewhere."""
    logmels = rng.normal(-10, 1, (labels.size, 40, frames)).astype(np.float32)
    for clip, label in zip(logmels, labels.flat, strict=True):
        bins = 20 if label else rng.choice([5, 35])
        clip[bins - 2 : bins + 2, 30:70] += loudness
    return logmels


def pytest_collection_modifyitems(items):
    """The longest files first: two processes that share the tests then end together."""
    longest = ("test_smoke", "test_reproduce", "test_faults")
    items.sort(key=lambda item: next((i for i, name in enumerate(longest) if name in item.nodeid), len(longest)))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """Every test writes into a folder of its own."""
    monkeypatch.setenv("KWS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("KWS_PUBLISHED", raising=False)  # a terminal inside JupyterLab has it
    return tmp_path / "home"


def write_tones(root: Path) -> Path:
    """A folder corpus: 3 words x 12 speakers x 2 takes, WAV and FLAC, and a background recording."""
    rng = np.random.default_rng(0)
    (root / "_background_noise_").mkdir(parents=True)
    soundfile.write(root / "_background_noise_" / "hiss.wav", rng.uniform(-0.1, 0.1, 3 * SAMPLE_RATE), SAMPLE_RATE)
    for word, frequency in WORDS.items():
        (root / word).mkdir(parents=True)
        for speaker in range(12):
            for take in range(2):
                samples = tone(frequency * (1 + 0.01 * speaker), rng)
                suffix = "flac" if take else "wav"
                soundfile.write(root / word / f"s{speaker:02d}_nohash_{take}.{suffix}", samples, SAMPLE_RATE)
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder corpus of ``write_tones``, new for every test."""
    return write_tones(tmp_path / "tones")


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Labels of what was trained, as it happens."""
    from kwslib.lab import workers  # not every test needs it

    labels, in_earnest = [], workers._in_parallel

    def noted(take):
        def and_note(most: int) -> list:
            chosen = take(most)
            labels.extend(one.label for one in chosen)
            return chosen

        return in_earnest(and_note)

    monkeypatch.setattr(workers, "_in_parallel", noted)
    return labels
