"""A page that listens: one compact file, a few tracks, and the JavaScript beside this file that runs both.

Knows no torch, except to read a checkpoint that is not a compact file. What a page needs are plain values, kept in
``reports/<study>/player.json``, so that a report is drawn again from what is published. Recordings of people are not
published: a report's own track is spoken by the synthesizer's voices of ``test``, whatever the corpus.
"""

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kwslib import paths
from kwslib.config import SAMPLE_RATE, SynthesisConfig
from kwslib.data import synthesis
from kwslib.processes import in_fresh_process

HERE = Path(__file__).parent
FILE = "player.json"
RECOMMENDED = "recommended.json"  # among the published checkpoints: {study: {"stream": file, ...}}
SPOKEN_S = 8
SAID = (0, 1, None, 0, 2, None, 0)  # of a spoken track: another word, a near-miss of some rank, None is the keyword


class Spoken(NamedTuple):
    """Audio with known keywords, as ``tracks.Track``."""

    samples: np.ndarray
    keywords_s: list[tuple[float, float]]


class Player:
    """Shows itself in a notebook, and in the HTML that is exported from it, without a kernel and without a network."""

    def __init__(self, given: dict[str, Any]):
        self.given = given

    def __repr__(self) -> str:
        return f"The detector {self.given['name']} listens where HTML is shown: in a notebook, or in its export."

    def _repr_html_(self) -> str:
        return html(self.given)


def player(checkpoint: Path, clips: Any, name: str = "") -> Player:
    """A detector that can be heard at work: on these tracks, on dropped recordings, at the microphone.

    Args:
        checkpoint: a compact file, or a checkpoint, of a CRNN or a TimeNet.
        clips: a track of 16 kHz, or several by what their buttons say; ten seconds are 430 kB of the page.
        name: of the detector; of its file when left out.

    Raises:
        CheckpointError: as ``checkpoints.load``.
    """
    if checkpoint.suffix == ".kws" and checkpoint.exists():
        content = checkpoint.read_bytes()
    else:
        from kwslib.training import checkpoints

        content = checkpoints.compact_bytes(*checkpoints.load(checkpoint))
    by_name = clips if isinstance(clips, Mapping) else {"Play": clips}
    return Player(given(content, by_name, name or checkpoint.stem))


def given(kws: bytes, clips: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """What the page gets, as plain values: ``kws`` and samples in base64, the latter of 16 bits."""
    shown = [
        {
            "name": said,
            "samples": _text(np.round(np.clip(clip.samples, -1, 1 - 2**-15) * 32768).astype("<i2").tobytes()),
            "keywords": [[round(float(t), 3) for t in times] for times in clip.keywords_s],
        }
        for said, clip in clips.items()
    ]
    return {"name": name, "kws": _text(kws), "clips": shown}


def html(given: dict[str, Any]) -> str:
    """A player as a piece of HTML; several of them get along in one page."""
    data = json.dumps(given).replace("<", "\\u003c")
    without = f"<noscript>The detector {escape(given['name'])} listens here where JavaScript is allowed.</noscript>"
    return (
        f"<style>\n{(HERE / 'player.css').read_text('utf-8')}</style>\n"
        f'<div class="kws-player">{without}<script type="application/json">{data}</script></div>\n'
        f"<script>\n{(HERE / 'player.js').read_text('utf-8')}kwsPlayer.all();\n</script>"
    )


def page(keyword: str, compact: bytes, config: SynthesisConfig) -> str:
    """A page of its own that listens, to the microphone, dropped recordings and voices of the synthesizer."""
    track = spoken(keyword, config)
    listens = html(given(compact, {} if track is None else {"Synthetic voices": track}, keyword))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(keyword)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"></head>\n'
        '<body style="font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem">\n'
        f"<main>\n<h1>{escape(keyword)}</h1>\n"
        f"<p>{len(compact):,} bytes in this page listen; nothing is sent anywhere.</p>\n"
        f"{listens}\n</main></body></html>\n"
    )


def keep(study: str, keyword: str) -> Path | None:
    """Write what the report of a study plays: its recommended stream detector, or its smallest one, and a spoken track.

    Returns:
        The file, or nothing when no stream detector of the study is here; what was kept before then stays.
    """
    if (detector := _detector(study)) is None:
        return None
    track, file = spoken(keyword), paths.reports(study) / FILE
    clips = {} if track is None else {"Synthetic voices": track}
    paths.write_json(file, given(detector.read_bytes(), clips, detector.stem))
    return file


def kept(folder: Path) -> dict[str, Any] | None:
    """What ``keep`` wrote into the folder of a report, if anything.

    Raises:
        ValueError: it is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes())
        if not (isinstance(found["name"], str) and isinstance(found["kws"], str) and isinstance(found["clips"], list)):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{file} is damaged: delete it, 06_plots writes it anew") from None
    return found


def _detector(study: str) -> Path | None:
    folder, chosen = paths.checkpoints(study), paths.checkpoints("reference") / RECOMMENDED
    if chosen.exists():
        named = json.loads(chosen.read_bytes()).get(study.removeprefix("reference/"), {}).get("stream")
        if named and (file := (folder / Path(named).name).with_suffix(".kws")).exists():
            return file
    found = sorted(folder.glob("*-stream*-seed0.kws"))
    return min(found, key=lambda file: file.stat().st_size, default=None)


def spoken(keyword: str, config: SynthesisConfig = SynthesisConfig()) -> Spoken | None:
    """Seven words by as many of the synthesizer's test voices, two of them the keyword, over faint noise.

    Nothing where eSpeak NG cannot say the keyword. ``config`` says which voices those are.
    """
    try:
        return Spoken(*in_fresh_process(_spoken, keyword, synthesis.vocabulary(keyword), config))
    except ValueError:
        return None


def _spoken(
    keyword: str, words: synthesis.Vocabulary, config: SynthesisConfig
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    rng, espeak, every = np.random.default_rng(0), synthesis.Espeak(), synthesis.speakers(200)
    voices = {name: voice for name, voice in every.items() if synthesis.subset_of(name, config) == "test"}
    samples = rng.normal(0, 10 ** (-55 / 20), SPOKEN_S * SAMPLE_RATE)
    names, keywords_s = rng.choice(sorted(voices), len(SAID), replace=False), []
    for i, (name, rank) in enumerate(zip(names, SAID, strict=True)):
        other = words.near_misses[rank - 1] if rank else str(rng.choice(words.others))
        word = keyword if rank is None else other
        said = synthesis.speak(espeak, voices[name], synthesis.Utterance(str(name), word), config)[:SAMPLE_RATE]
        start = round((0.4 + 1.08 * i) * SAMPLE_RATE)
        samples[start : start + len(said)] += said * rng.uniform(0.15, 0.4) / np.abs(said).max()
        if rank is None:
            keywords_s.append((start / SAMPLE_RATE, (start + len(said)) / SAMPLE_RATE))
    return samples.astype(np.float32), keywords_s


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
