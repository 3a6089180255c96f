"""Where recordings come from: the synthetic corpus, Speech Commands, or any folder of audio files.

All become the same thing, prepared once: a table of clips and one memory-mapped int16 array
with a row of 16,000 samples for each, in ``data/``. A changed folder is prepared anew.
"""

import difflib
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from kwslib import audio, paths
from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE, SynthesisConfig, identity, profile
from kwslib.data import speech_commands, synthesis
from kwslib.processes import in_fresh_process, made_once

NAMES = ("synthetic", *speech_commands.NAMES)  # what is not a folder
WITH_VOICES = "synthetic+"  # before a folder: its recordings, and the voices of the synthesizer
FEW_SPEAKERS = 10  # of recordings beside those voices: fewer, or nobody knows how many, all teach
NOISE_FOLDER = "_background_noise_"
LAYOUTS = {1: "<root>/<word>/<file>", 2: "<root>/<word>/<speaker>/<file>"}  # by the number of / in a clip's name
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}  # hardly all the words there are
DEAD = "a dead link: there is no file where it leads"
UNUSABLE_LIMIT = 0.05  # a larger share of files that cannot be read stops the preparation
VERSION = 2  # raise it when the same recordings would be prepared differently


class CorpusError(ValueError):
    """The corpus cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Corpus:
    """Clips of at most one second, 16 kHz mono, with a word and a speaker each.

    Attributes:
        name: short name, used for folders.
        clips: one row per clip, columns ``clip word speaker content`` (a digest of its samples);
            row i is ``waveforms[i]``.
        waveforms: int16, (clips, 16000), memory-mapped.
        noise: background recordings by name, int16, 1-D.
        unusable: files left out, columns ``clip reason``.
        fingerprint: changes when any name or sample changes.
        planned: names this corpus would hold at full size (the smoke profile speaks fewer).
        folder: where its prepared arrays are kept.
        subset_of: its own rule of who is in which subset, by a speaker's name; None: any rule will do.
    """

    name: str
    clips: pd.DataFrame
    waveforms: np.ndarray
    noise: dict[str, np.ndarray]
    unusable: pd.DataFrame
    fingerprint: str
    planned: list[str]
    folder: Path
    subset_of: Callable[[str], str] | None = None

    def is_keyword(self, keyword: str) -> np.ndarray:
        """True for each clip of the keyword, (clips,)."""
        return (self.clips["word"] == paths.composed(keyword)).to_numpy()

    @property
    def subset_of_voice(self) -> Callable[[str], str]:
        """Which of the synthesizer's voices teach: here its own rule, where they speak in it."""
        own = self.subset_of is not None and self.name.startswith("synthetic")
        return self.subset_of if own else synthesis.subset_of

    @property
    def names_tell_speakers(self) -> bool:
        """Whether most clips have a speaker's folder or a ``_`` in their name, and some a speaker in common."""
        with_speaker = self.clips["clip"].str.contains("^[^/]*/.*[/_]").mean()
        return bool(with_speaker > 0.5 and self.clips["speaker"].duplicated().any())

    def summary(self) -> pd.Series:
        """What there is: clips, hours, words, speakers, files left out, fingerprint."""
        speakers = self.clips["speaker"].nunique() if self.names_tell_speakers else "unknown: the file names tell none"
        hours = round(len(self.clips) * CLIP_SAMPLES / SAMPLE_RATE / 3600, 2)
        rows = {"corpus": self.name, "clips": len(self.clips), "hours": hours, "words": self.clips["word"].nunique()}
        rows |= {"speakers": speakers, "files left out": len(self.unusable), "fingerprint": self.fingerprint[:12]}
        return pd.Series(rows, name="value")


def load(
    corpus: str,
    keyword: str | None,
    profile_name: str = "standard",
    synthesis_config: SynthesisConfig = SynthesisConfig(),
) -> Corpus:
    """The corpus of that name or folder, prepared if that was not done before.

    Args:
        corpus: ``synthetic``, ``speech_commands_v0.01``, ``speech_commands_v0.02`` (downloaded on first
            use), ``speech_commands_part`` (picked from the latter), a folder of one of the ``LAYOUTS``, or
            ``synthetic+`` and such a folder, for both together.
        keyword: must be one of its words; the synthetic corpus speaks any word. ``None``: not needed.
        profile_name: how many speakers the synthetic corpus has.
        synthesis_config: how the synthetic corpus speaks.

    Raises:
        CorpusError: no such folder, no audio in it, the keyword is not there, or more than
            5 % of the files are unusable.
        ValueError: a keyword that the voices cannot say.
        DownloadError: Speech Commands could not be fetched.
    """
    if keyword is not None and not keyword.strip():
        raise CorpusError("the keyword is empty: give a word, for example KEYWORD=sheila")
    if corpus == "synthetic":
        return _synthetic(keyword or "sheila", profile(profile_name).synthetic_speakers, synthesis_config)
    if corpus.startswith(WITH_VOICES):
        if (folder := corpus.removeprefix(WITH_VOICES).strip()) in ("", "synthetic"):
            raise CorpusError("these are no recordings: give a folder <root>/<word>/*.wav")
        recorded = load(folder, keyword)
        if voices := sorted(filter(synthesis.is_voice, recorded.clips["speaker"].unique())):
            called = f"speakers of {recorded.name} are called like voices of the synthesizer: {', '.join(voices)}"
            raise CorpusError(f"{called}. Rename their files or folders, for example to {voices[0]}-recorded")
        return _joined(load("synthetic", keyword, profile_name, synthesis_config), recorded)
    root = speech_commands.folder(corpus) if corpus in speech_commands.NAMES else _folder(corpus)
    return _from_folder(root, keyword)


def _folder(corpus: str) -> Path:
    try:
        root = paths.folder(corpus)
        if root.is_dir():
            return root
        reason = f"no corpus at {root}"
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, nobody's home, a circle of links
        reason = f"{corpus[:80]!r} cannot be a folder ({error})"
    raise CorpusError(f"{reason}: give {', '.join(NAMES)}, or a folder <root>/<word>/*.wav")


def clean_keyword(corpus: str, keyword: str) -> str:
    """The keyword as the corpus spells it: the synthetic one knows no capitals, and é is one letter.

    >>> clean_keyword("synthetic", " Sheila")
    'sheila'
    """
    return synthesis.clean(keyword) if corpus == "synthetic" else keyword


def speaker_of(clip: str) -> str:
    """The speaker: a folder in the word's, or, as in Speech Commands, the file name before the first ``_``.

    Of a name with neither nobody knows the speaker: the whole name is taken.

    >>> speaker_of("sheila/0a7c2a8d_nohash_0.wav"), speaker_of("sheila/zoe_b/1.wav")
    ('0a7c2a8d', 'zoe_b')
    """
    return clip.split("/")[1] if clip.count("/") == 2 else Path(clip).stem.split("_")[0]


def _synthetic(keyword: str, n_speakers: int, config: SynthesisConfig) -> Corpus:
    synthesis.check_spelling(keyword)
    key = identity(VERSION, synthesis.VERSION, keyword, n_speakers, config)
    parts = ["synthetic", "" if keyword == "sheila" else paths.slug(keyword)]
    parts.append("" if config == SynthesisConfig() else identity(config)[:6])
    name = "-".join(filter(None, parts))
    folder = paths.data() / f"{name}-{key[:8]}"

    def make(build: Path) -> None:
        words, voices = synthesis.vocabulary(keyword, config), synthesis.speakers(n_speakers)
        said = synthesis.plan(voices, words, config)
        clips = [utterance.clip for part in said for utterance in part]
        waveforms = _new_store(build, len(clips))
        noise = synthesis.make_corpus(said, voices, config, waveforms)
        full_size = synthesis.speakers(profile("standard").synthetic_speakers)
        planned = [utterance.clip for part in synthesis.plan(full_size, words, config) for utterance in part]
        table = _table(clips, [_content(row) for row in waveforms])
        _finish(build, table, noise, _left_out({}), planned)

    _prepare_once(folder, make)
    return _open(folder, name, partial(synthesis.subset_of, config=config))


def _joined(spoken: Corpus, recorded: Corpus) -> Corpus:
    """Both as one; of recordings, the speakers are split as those of Speech Commands, if there are enough of them."""
    name = f"{spoken.name}+{recorded.name}-{recorded.fingerprint[:6]}"
    folder = paths.data() / f"{name}-{identity(spoken.fingerprint, recorded.fingerprint)[:8]}"
    n = len(spoken.clips)

    def make(build: Path) -> None:
        store = _new_store(build, n + len(recorded.clips))
        store[:n], store[n:] = spoken.waveforms, recorded.waveforms
        clips, planned = pd.concat([spoken.clips, recorded.clips]), spoken.planned + recorded.planned
        _finish(build, clips, spoken.noise | recorded.noise, recorded.unusable, planned, own_noise=True)

    _prepare_once(folder, make)
    few = not recorded.names_tell_speakers or recorded.clips["speaker"].nunique() < FEW_SPEAKERS

    def subset_of(speaker: str) -> str:
        of_person = "train" if few else speech_commands.subset_of(speaker)
        return spoken.subset_of(speaker) if synthesis.is_voice(speaker) else of_person

    return _open(folder, name, subset_of)


def _from_folder(root: Path, keyword: str | None) -> Corpus:
    name = paths.slug(root.name)
    found = audio.files_below(root)
    if found and all(file.startswith(("train/audio/", "test/audio/")) for file in found):
        root = root / "train" / "audio"  # Kaggle's Speech Commands; nobody says what the words of its test part are
        found = audio.files_below(root)
    noise_files = [file for file in found if file.rpartition("/")[0] == NOISE_FOLDER]
    of_words = [file for file in found if file.count("/") in LAYOUTS and not file.startswith(f"{NOISE_FOLDER}/")]
    depth = min((file.count("/") for file in of_words), default=1)  # a folder in a word's is no speaker beside files
    files = [file for file in of_words if file.count("/") == depth]
    dead = {file for file in found if not os.path.exists(root / file)}
    if dead.issuperset(files):
        rest = f". What there is lies elsewhere or is a dead link, such as {paths.printable(found[0])}" if found else ""
        raise CorpusError(f"no recordings in {root}, where {LAYOUTS[1]} or {LAYOUTS[2]} is expected{rest}")
    place = f"this folder is read as {LAYOUTS[depth]}, its noise as <root>/{NOISE_FOLDER}/<file>"
    _check_words(root, found, sorted({paths.printable(_word(file)) for file in files}), keyword, place)
    listing = []
    for file in found:
        status = os.stat(root / file, follow_symlinks=file not in dead)
        listing.append((ascii(file), status.st_size, status.st_mtime_ns))
    listing += [ascii(file) for file in files if file.startswith("_")]  # what was prepared without them is no use
    folder = paths.data() / f"{name}-{identity(VERSION, audio.VERSION, listing)[:8]}"
    files, noise_files = ([file for file in some if file not in dead] for some in (files, noise_files))

    def make(build: Path) -> None:
        clips, left_out = _read_files(root, files, _new_store(build, len(files)))
        noise, no_noise = _read_noise(root, noise_files)
        own_noise, noise = bool(noise), noise or in_fresh_process(synthesis.noise_recordings, "background")
        elsewhere = sorted(set(found).difference(files, noise_files))
        misplaced = {paths.printable(file): DEAD if file in dead else f"lies elsewhere: {place}" for file in elsewhere}
        _finish(build, clips, noise, _left_out(left_out | no_noise | misplaced), list(clips["clip"]), own_noise, root)

    _prepare_once(folder, make)
    corpus = _open(folder, name, speech_commands.subset_of if name in speech_commands.ARCHIVES else None)
    if keyword is not None and not corpus.is_keyword(keyword).any():
        raise CorpusError(f"no recording of {keyword!r} in {root} could be read: see {folder / 'unusable.csv'}")
    return corpus


def _check_words(root: Path, found: list[str], words: list[str], keyword: str | None, place: str) -> None:
    """Refuse a folder without the keyword, or one whose folders may be no words."""
    if keyword is None and LAYOUTS[2] in place and (len(words) == 1 or PARTS.issuperset(words)):
        raise CorpusError(
            f"in {root}, is {words[0]!r} a word, with a folder for each speaker, or does it hold the folders of words? "
            f"If it is a word, name the keyword; if not, give {root / words[0]}"
        )
    if keyword is not None and (word := paths.composed(keyword)) not in words:
        near = words if len(words) <= 20 else difflib.get_close_matches(word, words, 5, cutoff=0)
        its = "its words are" if near is words else f"the nearest of its {len(words):,} words are"
        other = [file for file in map(paths.printable, found) if word in file.split("/")[:-1]][:1]
        hint = "".join(f". {file} is not of that word: {place}" for file in other)
        hint += "".join(f". Capitals count: rename {name} to {word}" for name in words if name.lower() == word.lower())
        raise CorpusError(f"the keyword {keyword!r} is not in {root}: {its} {', '.join(near)}{hint}")


def _left_out(reasons: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame(reasons.items(), columns=["clip", "reason"])


def _content(row: np.ndarray) -> str:
    """32 hex digits that two clips share only when all their samples are equal."""
    return hashlib.sha256(row.tobytes()).hexdigest()[:32]


def _word(clip: str) -> str:
    return clip.partition("/")[0]


def _table(clips: list[str], contents: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        {"clip": clips, "word": map(_word, clips), "speaker": map(speaker_of, clips), "content": contents}
    )


def _read_files(root: Path, files: list[str], store: np.ndarray) -> tuple[pd.DataFrame, dict[str, str]]:
    """Fill the first rows of ``store`` with the usable files; the others by name, with the reason."""
    by_content: dict[str, str] = {}
    names: set[str] = set()
    contradicted: set[str] = set()
    copies: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    for file in tqdm(files, desc=f"reading {root.name}", unit="clip"):
        clip = paths.printable(file)
        try:
            samples = _usable(root / file)
        except audio.AudioError as error:
            unreadable[clip] = str(error)
            continue
        content = _content(samples)
        if content in by_content:
            twin = by_content[content]
            copies[clip] = f"the same recording as {twin}"
            if _word(clip) != _word(twin):  # one of the two words is wrong, nobody knows which
                copies[twin] = f"the same recording as {clip}"
                contradicted.add(content)
        elif clip in names:
            copies[ascii(file)] = f"in another spelling of Unicode {clip} is there already"
        else:
            store[len(by_content)] = samples
            by_content[content] = clip
            names.add(clip)
    missed = [reason for clip, reason in unreadable.items() if not clip.startswith("_")]  # _silence_ may be silent
    if len(missed) > UNUSABLE_LIMIT * len(files):
        listing = paths.data() / f"{paths.slug(root.name)}-unusable.csv"
        paths.write_atomically(listing, _left_out(unreadable).to_csv(index=False))
        raise CorpusError(
            f"{len(missed)} of {len(files)} files in {root} cannot be used, for example: "
            f"{missed[0]}. All of them: {listing}"
        )
    kept = [row for row, content in enumerate(by_content) if content not in contradicted]
    if contradicted:
        for to, row in enumerate(kept):
            store[to] = store[row]
    contents = list(by_content)
    table = _table([by_content[contents[row]] for row in kept], [contents[row] for row in kept])
    return table, unreadable | copies


def _usable(file: Path) -> np.ndarray:
    """One second of a recording as int16, or the reason why not."""
    if not paths.is_unicode(str(file)):
        raise audio.AudioError("its name is not UTF-8")
    samples = audio.to_int16(audio.one_second(audio.read(file)))
    if not samples.any():
        raise audio.AudioError(f"{file} is silent: too faint for 16 bits")
    return samples


def _read_noise(root: Path, files: list[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The corpus's own background recordings that are longer than a clip; the others, with the reason."""
    noise, left_out = {}, {}
    for file in files:
        try:
            samples = audio.to_int16(audio.read(root / file))
        except audio.AudioError as error:
            left_out[paths.printable(file)] = str(error)
            continue
        if len(samples) > CLIP_SAMPLES:
            noise[paths.printable(file.rpartition("/")[2])] = samples
        else:
            left_out[paths.printable(file)] = "background noise must be longer than a second"
    return noise, left_out


def _prepare_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Let ``make`` fill a folder beside its final place and move it there when it is complete.

    A second process that wants the same corpus waits for the first one and finds it done.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with made_once(folder, "meta.json") as missing:
        if not missing:
            return
        build = paths.temporary_for(folder)  # a helper of a killed preparation knows another name
        build.mkdir()
        try:
            make(build)
        except BaseException:
            shutil.rmtree(build, ignore_errors=True)
            raise
        build.rename(folder)


def _new_store(folder: Path, n_clips: int) -> np.memmap:
    paths.require_space(folder, n_clips * CLIP_SAMPLES * 2)
    return np.lib.format.open_memmap(folder / "waveforms.npy", "w+", np.int16, (n_clips, CLIP_SAMPLES))


def _finish(folder: Path, clips, noise: dict, unusable, planned: list[str], own_noise=False, root=None) -> None:
    """Write everything but the waveforms, which are there already; ``root`` is where they came from."""
    digest = hashlib.sha256("\n".join(clips["clip"] + " " + clips["content"]).encode())
    if own_noise:  # synthesized noise is the same for everybody
        for name, samples in sorted(noise.items()):
            digest.update(name.encode() + samples.tobytes())
    clips.to_csv(folder / "clips.csv", index=False)
    unusable.to_csv(folder / "unusable.csv", index=False)
    np.savez(folder / "noise.npz", **{f"noise_{i}": samples for i, samples in enumerate(noise.values())})
    meta = {"fingerprint": digest.hexdigest(), "planned": planned, "noise": list(noise), "root": root and str(root)}
    (folder / "meta.json").write_text(json.dumps(meta))


def _open(folder: Path, name: str, subset_of: Callable[[str], str] | None) -> Corpus:
    text = {"dtype": str, "keep_default_na": False}  # a word may be called "null"
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        clips, unusable = (pd.read_csv(folder / f"{table}.csv", **text) for table in ("clips", "unusable"))
        waveforms = np.load(folder / "waveforms.npy", mmap_mode="r")[: len(clips)]
        with np.load(folder / "noise.npz") as stored:
            noise = {name: stored[f"noise_{i}"] for i, name in enumerate(meta["noise"])}
        found = name, clips, waveforms, noise, unusable, meta["fingerprint"], meta["planned"], folder, subset_of
        return Corpus(*found)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CorpusError(f"{folder} is damaged ({error}): delete it, it is made again when needed") from None
