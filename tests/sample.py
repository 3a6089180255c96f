"""The sound that comes with the repository, and the picture of what a detector makes of it.

Voices of a synthesizer talk, and two of them say the keyword of the recommended stream detector on its own. They are
voices of the test part, chosen among those that a detector which learnt from people understands (``found_among_voices``
counts them); inside a running sentence it does not hear the word.

``python tests/sample.py`` makes ``docs/sample.flac`` and ``docs/detection.svg`` anew; with a folder it writes there.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import soundfile

from kwslib import audio, paths
from kwslib.cli import models
from kwslib.config import SAMPLE_RATE
from kwslib.data import synthesis
from kwslib.results import plots
from kwslib.streaming.decision import Decision, read_decision
from kwslib.streaming.model import StreamingModel, score_chunks
from kwslib.streaming.tracks import Track
from kwslib.training import checkpoints

KEYWORD = "happy"
TURNS = (  # voice of the test part, what it says, words per minute
    ("en-us+linda", "the doctor left before breakfast", 175),
    ("en-029+f4", "happy", 165),
    ("en-gb-x-rp+Alex", "it may happen again on a cold morning", 180),
    ("en-gb-x-gbclan+grandma", "happy", 165),
    ("en-us-nyc+miguel", "no letter is as old as this one", 170),
)
PAUSE_S, PEAK, NOISE = 0.6, 0.4, 2e-3


def spoken() -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Samples, and start and end of each keyword in seconds. Call it in a process that has not spoken yet."""
    espeak, pause = synthesis.Espeak(), np.zeros(int(PAUSE_S * SAMPLE_RATE), np.float32)
    pieces, keywords_s = [pause], []
    for voice, text, rate in TURNS:
        espeak.voice(voice)
        speech = espeak.say(text, rate, 50, 55)
        start_s = sum(map(len, pieces)) / SAMPLE_RATE
        if text == KEYWORD:
            keywords_s.append((start_s, start_s + len(speech) / SAMPLE_RATE))
        pieces += [PEAK * speech / np.abs(speech).max(), pause]
    samples = np.concatenate(pieces)
    return samples + np.random.default_rng(0).normal(0, NOISE, len(samples)).astype(np.float32), keywords_s


def recommended() -> tuple[StreamingModel, Decision, str]:
    """The detector that ``kws stream`` takes, its decision, and the name of its file."""
    file = next(row["file"] for row in models.published() if row["purpose"] == "stream")
    model, known = checkpoints.load(file)
    assert known["keyword"] == KEYWORD
    framing = checkpoints.features_of(known).framing
    return StreamingModel(model, framing=framing), read_decision(known), file.name


def found_among_voices() -> tuple[int, int]:
    """How many voices of the test part say the keyword so that the detector finds it, and how many there are."""
    streaming, decision, _ = recommended()
    espeak, second = synthesis.Espeak(), np.zeros(SAMPLE_RATE, np.float32)
    voices = [v for who, v in synthesis.speakers(328).items() if synthesis.subset_of(who) == "test"]
    found, noise = 0, np.random.default_rng(0)
    for voice in voices:
        espeak.voice(voice)
        speech = espeak.say(KEYWORD, 165, 50, 55)
        samples = np.concatenate([second, PEAK * speech / np.abs(speech).max(), second])
        samples = samples + noise.normal(0, NOISE, len(samples)).astype(np.float32)
        found += any(fired for *_, fired in decision.watch(score_chunks(streaming, [samples])))
    return found, len(voices)


def draw(samples: np.ndarray, keywords_s: list[tuple[float, float]], picture: Path) -> None:
    """The sound, the probability of the keyword over it, the threshold, and where it was detected."""
    streaming, decision, name = recommended()
    heard = list(decision.watch(score_chunks(streaming, [samples])))
    times = np.array([t_s for t_s, *_ in heard])
    curve = decision.probability(np.array([score for _, score, _ in heard]))
    threshold = float(decision.probability(decision.threshold))
    events_s = [t_s for t_s, _, fired in heard if fired]
    figure = plots.stream_track(Track(samples, keywords_s), {name: (times, curve)}, threshold, events_s)
    with matplotlib.rc_context(plots.STYLE):
        figure.savefig(picture, metadata={"Date": None, "Description": "drawn by tests/sample.py"})


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else paths.ROOT / "docs"
    samples, keywords_s = spoken()
    soundfile.write(folder / "sample.flac", samples, SAMPLE_RATE, "PCM_16")
    draw(audio.read(folder / "sample.flac"), keywords_s, folder / "detection.svg")
    print(
        [list(ends) for ends in keywords_s]
        if len(sys.argv) > 1
        else "found {} of {} voices".format(*found_among_voices())
    )
