import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from kwslib import audio, paths
from kwslib.config import SAMPLE_RATE
from kwslib.data import corpora, splits, synthesis
from kwslib.data.corpora import CorpusError


def test_a_folder_becomes_a_table_and_an_array(folder):
    corpus = corpora.load(str(folder), "go")
    assert corpus.name == "tones"
    assert len(corpus.clips) == len(corpus.waveforms) == 72
    first = corpus.clips.iloc[0]
    assert first[["clip", "word", "speaker"]].to_list() == ["go/s00_nohash_0.wav", "go", "s00"]
    assert set(corpus.clips["word"]) == {"go", "stop", "zoom in"}
    assert corpus.is_keyword("zoom in").sum() == 24
    original, _ = soundfile.read(folder / "go" / "s00_nohash_0.wav", dtype="int16")
    assert (corpus.waveforms[0][: len(original)] == original).all()  # 16-bit audio survives bit by bit
    assert not corpus.waveforms[0][len(original) :].any()
    assert list(corpus.noise) == ["hiss.wav"]
    assert "_background_noise_" not in set(corpus.clips["word"])


def test_a_second_load_reads_nothing_and_a_changed_folder_is_noticed(folder, monkeypatch):
    first = corpora.load(str(folder), "go")
    with monkeypatch.context() as patched:
        patched.setattr(audio, "read", lambda path: pytest.fail("read again"))
        assert corpora.load(str(folder), "stop").fingerprint == first.fingerprint
    samples, _ = soundfile.read(folder / "go" / "s00_nohash_0.wav", dtype="float32")
    soundfile.write(folder / "go" / "s00_nohash_0.wav", samples[::-1], SAMPLE_RATE)
    assert corpora.load(str(folder), "go").fingerprint != first.fingerprint


def test_a_corpus_without_background_noise_gets_synthesized_noise(folder):
    shutil.rmtree(folder / "_background_noise_")
    assert len(corpora.load(str(folder), "go").noise) == 6


def test_a_corpus_with_other_noise_is_another_corpus(folder):
    first = corpora.load(str(folder), "go")
    louder = np.random.default_rng(1).uniform(-0.5, 0.5, 3 * SAMPLE_RATE)
    soundfile.write(folder / "_background_noise_" / "hiss.wav", louder, SAMPLE_RATE)
    assert corpora.load(str(folder), "go").fingerprint != first.fingerprint


def test_too_little_room_is_said_before_a_large_file_is_begun(folder, monkeypatch):
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="needs 2 MB, its disk has 0 MB left: make room first"):
        corpora.load(str(folder), "go")


def test_unusable_files_are_listed_not_fatal(folder):
    (folder / "go" / "s01_nohash_9.wav").write_bytes(b"not audio")
    (folder / "go" / ".hidden.wav").write_bytes(b"not audio either")
    soundfile.write(folder / "stop" / "s01_nohash_9.wav", np.zeros(800), SAMPLE_RATE)
    corpus = corpora.load(str(folder), "go")
    assert len(corpus.clips) == 72
    reasons = dict(corpus.unusable.to_numpy())
    assert "cannot read" in reasons["go/s01_nohash_9.wav"]
    assert "every sample is zero" in reasons["stop/s01_nohash_9.wav"]
    for take in range(10, 16):
        (folder / "go" / f"s01_nohash_{take}.wav").write_bytes(b"")
    with pytest.raises(CorpusError, match="8 of 80 files .* cannot be used, .* All of them: ") as told:
        corpora.load(str(folder), "go")
    listing = Path(str(told.value).rpartition("All of them: ")[2])
    assert len(listing.read_text().splitlines()) == 9


@pytest.mark.parametrize(
    ("corpus", "keyword", "message"),
    [
        ("/no/such/folder", "go", "no corpus at"),
        ("FOLDER", "sheila", "'sheila' is not in .*go, stop, zoom in"),
        ("FOLDER", " ", "keyword is empty"),
        ("synthetic", "Go", "lower case"),
        ("EMPTY", "go", "no recordings in"),
    ],
)
def test_bad_arguments_get_one_sentence(folder, tmp_path, corpus, keyword, message):
    (tmp_path / "empty").mkdir()
    where = {"FOLDER": str(folder), "EMPTY": str(tmp_path / "empty")}.get(corpus, corpus)
    with pytest.raises(ValueError, match=message):
        corpora.load(where, keyword)


def test_a_messy_folder_is_read_and_what_is_left_out_is_listed(folder):
    """Names with blanks and other letters, formats side by side, copies, hidden and foreign files."""
    rng = np.random.default_rng(5)
    (folder / "été").mkdir()
    for i in range(3):
        soundfile.write(folder / "été" / f"zoë {i}_1.wav", rng.uniform(-0.1, 0.1, 5_000), SAMPLE_RATE)
    twin = (folder / "été" / "zoë 0_1.wav").read_bytes()
    (folder / "été" / "copy_1.wav").write_bytes(twin)
    (folder / "été" / "also_1.wav").write_bytes((folder / "été" / "zoë 1_1.wav").read_bytes())
    (folder / "go" / "copy_1.wav").write_bytes(twin)
    (folder / "go" / "._s00_nohash_0.wav").write_bytes(b"resource fork")
    (folder / "go" / "notes.txt").write_text("not audio, not missed")
    (folder / "go" / "phone_1.m4a").write_bytes(b"\0\0\0 ftypM4A ")
    (folder / "go" / "deep").mkdir()
    soundfile.write(folder / "go" / "deep" / "x_1.wav", rng.uniform(-0.1, 0.1, 5_000), SAMPLE_RATE)
    soundfile.write(folder / "y_1.wav", rng.uniform(-0.1, 0.1, 5_000), SAMPLE_RATE)
    (folder / "a" / "b" / "c" / "d" / "e").mkdir(parents=True)
    soundfile.write(folder / "go" / "faint_1.wav", np.full(5_000, 1e-6), SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(folder / "_background_noise_" / "file.wav", rng.uniform(-0.1, 0.1, 20_000), SAMPLE_RATE)
    soundfile.write(folder / "_background_noise_" / "hiss.flac", rng.uniform(-0.1, 0.1, 20_000), SAMPLE_RATE)
    soundfile.write(folder / "_background_noise_" / "blip.wav", rng.uniform(-0.1, 0.1, 800), SAMPLE_RATE)
    corpus = corpora.load(str(folder), "été")
    assert list(corpus.clips["clip"][corpus.is_keyword("été")]) == ["été/also_1.wav", "été/zoë 2_1.wav"]
    first, _ = soundfile.read(folder / "stop" / "s00_nohash_0.wav", dtype="int16")
    row = corpus.clips.index[corpus.clips["clip"] == "stop/s00_nohash_0.wav"][0]
    assert (corpus.waveforms[row][: len(first)] == first).all()  # rows still fit their names
    left_out = dict(corpus.unusable.to_numpy())
    assert left_out.pop("_background_noise_/blip.wav") == "background noise must be longer than a second"
    assert "cannot read" in left_out.pop("go/phone_1.m4a")
    assert "too faint" in left_out.pop("go/faint_1.wav")
    for elsewhere in ("go/deep/x_1.wav", "y_1.wav", "a/b/c/d/e/"):
        assert "lies elsewhere: this folder is read as <root>/<word>/<file>, its noise" in left_out.pop(elsewhere)
    assert set(corpus.noise) == {"file.wav", "hiss.flac", "hiss.wav"}
    assert left_out.pop("été/zoë 1_1.wav") == "the same recording as été/also_1.wav"
    for copy in ("été/zoë 0_1.wav", "été/copy_1.wav", "go/copy_1.wav"):  # under two words: which one is right?
        assert "the same recording as" in left_out.pop(copy)
    assert not left_out


def test_words_may_begin_with_an_underscore_and_silence_may_be_silent(folder):
    first = corpora.load(str(folder), "go")
    (folder / "stop").rename(folder / "_unknown_")
    (folder / "zoom in").rename(folder / "_noise")
    (folder / "_silence_").mkdir()
    for i in range(10):
        soundfile.write(folder / "_silence_" / f"s{i}_0.wav", np.zeros(8_000), SAMPLE_RATE)
    corpus = corpora.load(str(folder), "_unknown_")
    assert corpus.clips["word"].value_counts().to_dict() == {"go": 24, "_unknown_": 24, "_noise": 24}
    assert corpus.folder != first.folder and list(corpus.noise) == ["hiss.wav"]
    assert corpus.unusable["reason"].str.contains("every sample is zero").sum() == len(corpus.unusable) == 10


def test_dead_links_are_left_out(folder):
    try:
        (folder / "go" / "s77_nohash_0.wav").symlink_to(folder / "gone.wav")
        (folder / "go" / "s77_nohash_1.wav").symlink_to("s77_nohash_1.wav")
        (folder / "_background_noise_" / "hum.wav").symlink_to(folder / "gone.wav")
    except OSError:
        pytest.skip("this system does not let everybody make links")
    corpus = corpora.load(str(folder), "go")
    assert len(corpus.clips) == 72 and list(corpus.noise) == ["hiss.wav"]
    assert set(corpus.unusable["reason"]) == {"a dead link: there is no file where it leads"}
    assert len(corpus.unusable) == 3
    shutil.rmtree(folder / "stop")
    (folder / "stop").mkdir()
    (folder / "stop" / "s00_nohash_0.wav").symlink_to(folder / "gone.wav")
    with pytest.raises(CorpusError, match="no recording of 'stop' .* could be read"):
        corpora.load(str(folder), "stop")
    for file in folder.glob("[!_]*/*.wav"):
        file.unlink()
        file.symlink_to(folder / "gone.wav")
    for file in folder.glob("[!_]*/*.flac"):
        file.unlink()
    with pytest.raises(CorpusError, match="no recordings in .* is a dead link, such as"):
        corpora.load(str(folder), "go")


def by_speaker(folder):
    """The same recordings as ``<word>/<speaker>/<take>``."""
    for file in sorted(folder.glob("[!_]*/*")):
        speaker, _, take = file.name.split("_")
        (file.parent / f"p_{speaker}").mkdir(exist_ok=True)
        file.rename(file.parent / f"p_{speaker}" / take)


def test_speakers_may_have_folders(folder):
    flat = corpora.load(str(folder), "go")
    by_speaker(folder)
    corpus = corpora.load(str(folder), "go")
    assert corpus.clips.iloc[0][["clip", "word", "speaker"]].to_list() == ["go/p_s00/0.wav", "go", "p_s00"]
    assert (corpus.clips["content"] == flat.clips["content"]).all() and list(corpus.noise) == ["hiss.wav"]
    assert corpus.names_tell_speakers and corpus.summary()["speakers"] == 12
    assert not replace(corpus, clips=corpus.clips[:0]).names_tell_speakers  # as where nothing is recorded
    assert corpora.load(str(folder), None).fingerprint == corpus.fingerprint
    soundfile.write(folder / "go" / "extra.wav", np.random.default_rng(1).uniform(-0.1, 0.1, 5_000), SAMPLE_RATE)
    message = r"'stop' is not in .*: its words are go. stop/p_s00/0.wav is not of that word: .* <root>/<word>/<file>,"
    with pytest.raises(CorpusError, match=message):  # beside files, a folder in a word's may be anything
        corpora.load(str(folder), "stop")


def test_the_layout_of_kaggle_is_read(folder):
    flat = corpora.load(str(folder), "go")
    root = folder.with_name("kaggle")
    shutil.move(folder, root / "train" / "audio")
    (root / "test" / "audio").mkdir(parents=True)
    shutil.copy(root / "train" / "audio" / "go" / "s00_nohash_0.wav", root / "test" / "audio" / "clip_1.wav")
    corpus = corpora.load(str(root), "go")
    assert corpus.name == "kaggle" and corpus.fingerprint == flat.fingerprint
    (root / "train").rename(root / "training")
    with pytest.raises(CorpusError, match="'go' is not in .* training/audio/go/s00_nohash_0.wav is not of that word"):
        corpora.load(str(root), "go")


@pytest.mark.parametrize("parts", [("words",), ("train", "test")])
def test_folders_of_words_are_not_taken_for_words(folder, parts):
    root = folder.with_name("wrapped")
    for part in parts:
        shutil.copytree(folder, root / part)
    with pytest.raises(CorpusError, match=f"'go' is not in .*its words are .*{parts[-1]}/go/s00_nohash_0.wav is not"):
        corpora.load(str(root), "go")
    with pytest.raises(CorpusError, match="or does it hold the folders of words"):
        corpora.load(str(root), None)
    assert len(corpora.load(str(root / parts[0]), None).clips) == 72


def test_of_many_words_the_nearest_are_named(folder):
    for i in range(100):
        (folder / f"word{i}").mkdir()
        (folder / f"word{i}" / "s_0.wav").write_bytes(b"not looked into")
    with pytest.raises(CorpusError, match="the nearest of its 103 words are stop(, [^,]+){4}$"):
        corpora.load(str(folder), "stopp")


def test_letters_with_accents_are_the_same_however_a_system_writes_them(folder):
    composed, decomposed = "\u00e9t\u00e9", "e\u0301te\u0301"
    (folder / "go").rename(folder / decomposed)
    corpus = corpora.load(str(folder), composed)
    assert corpus.is_keyword(composed).sum() == corpus.is_keyword(decomposed).sum() == 24
    assert paths.study_name("tones", composed, "speaker") == "tones-\u00e9t\u00e9-speaker"


def test_a_name_that_is_not_unicode_is_left_out(folder):
    try:
        copy = os.path.join(os.fsencode(folder), b"go", b"s01\xff_nohash_9.wav")
        with open(copy, "wb") as file:
            file.write((folder / "go" / "s01_nohash_0.wav").read_bytes())
    except OSError:
        pytest.skip("this file system accepts Unicode names only")
    corpus = corpora.load(str(folder), "go")
    assert list(corpus.unusable["reason"]) == ["its name is not UTF-8"]
    assert "udcff" in corpus.unusable["clip"][0]


def test_an_interrupted_preparation_leaves_nothing_that_looks_complete(folder, monkeypatch):
    calls = []

    def stop_half_way(path, read=audio.read):
        calls.append(path)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(audio, "read", stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            corpora.load(str(folder), "go")
    assert len(corpora.load(str(folder), "go").clips) == 72


def test_a_word_may_be_a_link_to_its_folder_and_a_circle_ends(folder, tmp_path):
    (folder / "go").rename(tmp_path / "elsewhere")
    try:
        (folder / "go").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "back").symlink_to(folder)
    except OSError:
        pytest.skip("this system does not let everybody make links")
    corpus = corpora.load(str(folder), "go")
    assert corpus.is_keyword("go").sum() == 24 and len(corpus.clips) == 72


def test_two_that_want_the_same_corpus_wait_for_each_other(folder):
    reads = []

    def counting(path, read=audio.read):
        reads.append(path)
        return read(path)

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setattr(audio, "read", counting)
        both = list(pool.map(lambda _: corpora.load(str(folder), "go"), range(2)))
    assert both[0].fingerprint == both[1].fingerprint
    assert len(reads) == 72 + 1  # once: the clips and the noise


def test_recordings_beside_voices_that_could_be_taken_for_something_else_are_refused(folder):
    for nothing in ("synthetic+", "synthetic+synthetic"):
        with pytest.raises(corpora.CorpusError, match="these are no recordings"):
            corpora.load(nothing, "go", "smoke")
    (folder / "go").rename(folder / "Go")
    with pytest.raises(corpora.CorpusError, match="its words are Go, stop.*: rename Go to go"):
        corpora.load(f"synthetic+{folder}", "go", "smoke")
    (folder / "Go").rename(folder / "go")
    for file in (folder / "go").glob("s01_*"):
        file.rename(file.with_name(file.name.replace("s01", "f1")))
    with pytest.raises(corpora.CorpusError, match="like voices of the synthesizer: f1. Rename .* to f1-recorded"):
        corpora.load(f"synthetic+{folder}", "go", "smoke")


def test_voices_and_recordings_together_are_one_corpus(folder, monkeypatch):
    """Few people all teach; the voices keep their own rule."""
    for other in ("stop", "zoom in"):
        shutil.rmtree(folder / other)
    for speaker in range(4, 12):
        for file in (folder / "go").glob(f"s{speaker:02d}_*"):
            file.unlink()
    recorded = corpora.load(str(folder), "go")
    spoken = corpora.load("synthetic", "go", "smoke")
    both = corpora.load(f"synthetic+{folder}", "go", "smoke")
    assert len(both.clips) == len(spoken.clips) + 8 and set(both.noise) == set(spoken.noise) | set(recorded.noise)
    np.testing.assert_array_equal(both.waveforms[-8:], recorded.waveforms)
    np.testing.assert_array_equal(both.waveforms[:5], spoken.waveforms[:5])
    parts = splits.load(both, "go", "speaker")
    assert set(np.flatnonzero(both.clips["speaker"].str.fullmatch("s0[0-3]"))) <= set(parts.train)
    own = splits.load(spoken, "go", "speaker")
    np.testing.assert_array_equal(parts.test, own.test)
    assert paths.study_name(f"synthetic+{folder}", "go", "speaker") == "synthetic-tones-go-speaker"
    assert both.subset_of_voice("s00") == "train" and recorded.subset_of_voice is synthesis.subset_of
