"""Where recordings come from: the synthetic corpus or a folder of audio files.

Both become the same thing, prepared once: a table of clips and one memory-mapped int16 array
with a row of 16,000 samples for each, in ``data/``. A changed folder is prepared anew.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from scipy import signal
from tqdm.auto import tqdm

from kwslib import paths, synthesis
from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE, identity, profile

AUDIO = {".wav", ".flac"}
NOISE_FOLDER = "_background_noise_"
UNUSABLE_LIMIT = 0.05  # a larger share of files that cannot be used stops the preparation


class CorpusError(ValueError):
    """The corpus cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Corpus:
    """Clips of at most one second, 16 kHz mono, with a word and a speaker each.

    Attributes:
        name: short name, used for folders.
        clips: one row per clip, columns ``clip word speaker``; row i is ``waveforms[i]``.
        waveforms: int16, (clips, 16000), memory-mapped.
        noise: background recordings by name, int16, 1-D.
        unusable: files left out, columns ``clip reason``.
        fingerprint: changes when any name or sample changes.
        planned: names this corpus would hold at full size (the smoke profile speaks fewer).
        folder: where its prepared arrays are kept.
    """

    name: str
    clips: pd.DataFrame
    waveforms: np.ndarray
    noise: dict[str, np.ndarray]
    unusable: pd.DataFrame
    fingerprint: str
    planned: list[str]
    folder: Path

    def is_keyword(self, keyword: str) -> np.ndarray:
        """True for each clip of the keyword, (clips,)."""
        return (self.clips["word"] == keyword).to_numpy()

    def summary(self) -> pd.Series:
        return pd.Series(
            {
                "corpus": self.name,
                "clips": len(self.clips),
                "hours": round(len(self.clips) * CLIP_SAMPLES / SAMPLE_RATE / 3600, 2),
                "words": self.clips["word"].nunique(),
                "speakers": self.clips["speaker"].nunique(),
                "unusable files": len(self.unusable),
                "fingerprint": self.fingerprint[:12],
            },
            name="value",
        )


def load(corpus: str, keyword: str, profile_name: str = "standard") -> Corpus:
    """The corpus of that name or folder, prepared if that was not done before.

    Args:
        corpus: ``synthetic``, or a folder ``<root>/<word>/<speaker>_*.{wav,flac}``.
        keyword: must be one of its words; the synthetic corpus speaks any word.
        profile_name: how many speakers the synthetic corpus has.

    Raises:
        CorpusError: no such folder, no audio in it, the keyword is not there, or more than
            5 % of the files are unusable.
    """
    if not keyword.strip():
        raise CorpusError("the keyword is empty: give a word, for example KEYWORD=sheila")
    if corpus == "synthetic":
        return _synthetic(keyword, profile(profile_name).synthetic_speakers)
    root = paths.corpus_folder(corpus)
    if not root.is_dir():
        raise CorpusError(f"no corpus at {root}: give 'synthetic' or a folder <root>/<word>/*.wav")
    return _from_folder(root, keyword)


def clean_keyword(corpus: str, keyword: str) -> str:
    """The keyword as the corpus spells it: the synthetic one knows no capitals.

    >>> clean_keyword("synthetic", " Sheila")
    'sheila'
    """
    return keyword.strip().lower() if corpus == "synthetic" else keyword


def speaker_of(clip: str) -> str:
    """The speaker, by the convention of Speech Commands: the file name before the first ``_``.

    >>> speaker_of("sheila/0a7c2a8d_nohash_0.wav")
    '0a7c2a8d'
    """
    return Path(clip).stem.split("_")[0]


def words_of(keyword: str) -> list[str]:
    """What the synthetic speakers say: the 30 words, the keyword and its near-misses."""
    if keyword != clean_keyword("synthetic", keyword):
        raise CorpusError(f"synthetic words are lower case without blanks around them: {keyword!r} is not")
    words = sorted({*synthesis.WORDS, keyword})
    return words + synthesis.in_fresh_process(synthesis.near_misses, keyword, words)


def _synthetic(keyword: str, n_speakers: int) -> Corpus:
    name = "synthetic" if keyword == "sheila" else f"synthetic-{paths.slug(keyword)}"
    folder = paths.data() / f"{name}-{identity(synthesis.VERSION, keyword, n_speakers)[:8]}"
    if not (folder / "meta.json").exists():
        words = words_of(keyword)
        with _preparing(folder) as build:
            uttered, noise = synthesis.make_corpus(n_speakers, words, lambda n: _new_store(build, n))
            clips = pd.DataFrame({"clip": u.clip, "word": u.word, "speaker": u.speaker} for u in uttered)
            full_size = synthesis.speakers(profile("standard").synthetic_speakers)
            planned = [u.clip for part in synthesis.plan(full_size, words) for u in part]
            _finish(build, clips, noise, pd.DataFrame({"clip": [], "reason": []}), planned)
    return _open(folder, name)


def _from_folder(root: Path, keyword: str) -> Corpus:
    files = sorted(f for f in root.glob("*/*") if f.suffix.lower() in AUDIO and not f.name.startswith("."))
    noise_files = [f for f in files if f.parent.name == NOISE_FOLDER]
    files = [f for f in files if not f.parent.name.startswith(("_", "."))]
    words = sorted({f.parent.name for f in files})
    if not files:
        raise CorpusError(f"no recordings in {root}: expected <root>/<word>/*.wav or *.flac")
    if keyword not in words:
        raise CorpusError(f"the keyword {keyword!r} is not in {root}: its words are {', '.join(words)}")
    listing = [(f.relative_to(root).as_posix(), f.stat().st_size, f.stat().st_mtime_ns) for f in files + noise_files]
    name = paths.slug(root.name)
    folder = paths.data() / f"{name}-{identity(listing)[:8]}"
    if not (folder / "meta.json").exists():
        with _preparing(folder) as build:
            clips, unusable = _read_files(root, files, _new_store(build, len(files)))
            noise = _read_noise(noise_files)
            own_noise = bool(noise)
            noise = noise or synthesis.in_fresh_process(synthesis.noise_recordings, "background")
            _finish(build, clips, noise, unusable, list(clips["clip"]), own_noise)
    corpus = _open(folder, name)
    if not corpus.is_keyword(keyword).any():
        raise CorpusError(f"no recording of {keyword!r} in {root} could be read: see {folder / 'unusable.csv'}")
    return corpus


def read_clip(path: Path) -> np.ndarray:
    """Audio of any length and rate as float32 mono at 16 kHz, (samples,).

    Raises:
        CorpusError: unreadable, empty, or all zeros.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise CorpusError(f"cannot read {path}: {error}") from None
    if len(samples) == 0:
        raise CorpusError(f"{path} holds no samples")
    if not np.isfinite(samples).all():
        raise CorpusError(f"{path} holds samples that are not numbers")
    mono = samples.mean(axis=1)
    if not mono.any():
        raise CorpusError(f"{path} is silent: every sample is zero")
    if rate != SAMPLE_RATE:
        mono = signal.resample_poly(mono, SAMPLE_RATE, rate).astype(np.float32)
    return mono


def one_second(samples: np.ndarray) -> np.ndarray:
    """Exactly one second: shorter audio gets zeros behind it, of longer the loudest second stays.

    >>> one_second(np.ones(3, np.float32))[:5]
    array([1., 1., 1., 0., 0.], dtype=float32)
    """
    if len(samples) > CLIP_SAMPLES:
        energy = np.cumsum(np.concatenate([[0.0], samples.astype(np.float64) ** 2]))
        start = int(np.argmax(energy[CLIP_SAMPLES:] - energy[:-CLIP_SAMPLES]))
        return samples[start : start + CLIP_SAMPLES]
    return np.pad(samples, (0, CLIP_SAMPLES - len(samples)))


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1) as 16-bit integers; louder ones are clipped."""
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)


def _read_files(root: Path, files: list[Path], store: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fill the first rows of ``store`` with the readable files; list the others with the reason."""
    clips, unusable = [], []
    for file in tqdm(files, desc=f"reading {root.name}", unit="clip"):
        clip = file.relative_to(root).as_posix()
        try:
            store[len(clips)] = to_int16(one_second(read_clip(file)))
            clips.append({"clip": clip, "word": file.parent.name, "speaker": speaker_of(clip)})
        except CorpusError as error:
            unusable.append({"clip": clip, "reason": str(error)})
    if len(unusable) > UNUSABLE_LIMIT * len(files):
        raise CorpusError(
            f"{len(unusable)} of {len(files)} files in {root} cannot be used, for example: {unusable[0]['reason']}"
        )
    return pd.DataFrame(clips), pd.DataFrame(unusable, columns=["clip", "reason"])


def _read_noise(files: list[Path]) -> dict[str, np.ndarray]:
    """The corpus's own background recordings that are longer than a clip."""
    noise = {f.stem: to_int16(read_clip(f)) for f in files}
    return {name: samples for name, samples in noise.items() if len(samples) > CLIP_SAMPLES}


class _preparing:
    """Build a corpus beside its final place and move it there only when complete."""

    def __init__(self, folder: Path):
        self.folder, self.build = folder, folder.with_name(folder.name + ".tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.build, ignore_errors=True)
        self.build.mkdir(parents=True)
        return self.build

    def __exit__(self, failed, *_):
        if failed:
            shutil.rmtree(self.build, ignore_errors=True)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.build.rename(self.folder)


def _new_store(folder: Path, n_clips: int) -> np.memmap:
    paths.require_space(folder, n_clips * CLIP_SAMPLES * 2)
    return np.lib.format.open_memmap(folder / "waveforms.npy", "w+", np.int16, (n_clips, CLIP_SAMPLES))


def _finish(
    folder: Path,
    clips: pd.DataFrame,
    noise: dict[str, np.ndarray],
    unusable: pd.DataFrame,
    planned: list[str],
    own_noise: bool = False,
) -> None:
    """Write everything but the waveforms, which are there already."""
    waveforms = np.load(folder / "waveforms.npy", mmap_mode="r")[: len(clips)]
    digest = hashlib.sha256("\n".join(clips["clip"]).encode())
    for rows in _blocks(waveforms):
        digest.update(rows.tobytes())
    if own_noise:  # synthesized noise is the same for everybody
        for name, samples in sorted(noise.items()):
            digest.update(name.encode() + samples.tobytes())
    clips.to_csv(folder / "clips.csv", index=False)
    unusable.to_csv(folder / "unusable.csv", index=False)
    np.savez(folder / "noise.npz", **noise)
    meta = {"fingerprint": digest.hexdigest(), "planned": planned}
    (folder / "meta.json").write_text(json.dumps(meta))


def _blocks(waveforms: np.ndarray, size: int = 1024) -> Iterator[np.ndarray]:
    return (waveforms[i : i + size] for i in range(0, len(waveforms), size))


def _open(folder: Path, name: str) -> Corpus:
    meta = json.loads((folder / "meta.json").read_text())
    text = {"dtype": str, "keep_default_na": False}  # a word may be called "null"
    clips = pd.read_csv(folder / "clips.csv", **text)
    with np.load(folder / "noise.npz") as noise:
        recordings = dict(noise)
    return Corpus(
        name=name,
        clips=clips,
        waveforms=np.load(folder / "waveforms.npy", mmap_mode="r")[: len(clips)],
        noise=recordings,
        unusable=pd.read_csv(folder / "unusable.csv", **text),
        fingerprint=meta["fingerprint"],
        planned=meta["planned"],
        folder=folder,
    )
