import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from kwslib import corpora, paths
from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE
from kwslib.corpora import CorpusError


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
        patched.setattr(corpora, "read_clip", lambda path: pytest.fail("read again"))
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
    with pytest.raises(CorpusError, match=message):
        corpora.load(where, keyword)


def sine(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return 0.25 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize(
    ("suffix", "rate", "options", "accuracy"),
    [
        ("wav", 8_000, {}, 1e-3),
        ("wav", 48_000, {"subtype": "FLOAT"}, 1e-3),
        ("wav", 16_000, {"subtype": "PCM_U8"}, 0.01),
        ("wav", 22_050, {"subtype": "PCM_24"}, 1e-3),
        ("wav", 16_000, {"subtype": "ULAW"}, 0.02),
        ("aiff", 44_100, {}, 1e-3),
        ("flac", 16_000, {}, 1e-3),
        ("ogg", 44_100, {}, 0.05),
        ("mp3", 44_100, {}, 0.05),
        ("opus", 48_000, {"format": "OGG", "subtype": "OPUS"}, 0.05),
    ],
)
def test_many_formats_become_mono_16k(tmp_path, suffix, rate, options, accuracy):
    file = tmp_path / f"a.{suffix}"
    soundfile.write(file, sine(1.0, rate), rate, **options)
    samples = corpora.read_clip(file)
    assert abs(len(samples) - SAMPLE_RATE) <= 0.1 * SAMPLE_RATE  # MP3 adds some at its ends
    assert file.suffix in corpora.AUDIO
    middle = samples[4_000:12_000].astype(float)
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 16_000))
    assert spectrum.argmax() == pytest.approx(440, abs=2)
    assert np.abs(middle).max() == pytest.approx(0.25, abs=accuracy)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff", "au", "caf"])
def test_a_recording_that_was_cut_off_is_not_taken_for_a_short_one(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, SAMPLE_RATE), SAMPLE_RATE)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match="cut off|cannot read|no samples"):
        corpora.read_clip(file)


@pytest.mark.parametrize("length", [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\xf0\xff\x7f"])
def test_a_header_that_did_not_know_its_length_is_no_loss(tmp_path, length):
    """Programs that write a WAV to a pipe put 2 or 4 GB where the length goes."""
    soundfile.write(tmp_path / "a.wav", sine(1.0, SAMPLE_RATE), SAMPLE_RATE)
    content = (tmp_path / "a.wav").read_bytes()
    assert content[36:40] == b"data"
    (tmp_path / "a.wav").write_bytes(content[:4] + length + content[8:40] + length + content[44:])
    assert len(corpora.read_clip(tmp_path / "a.wav")) == SAMPLE_RATE


def test_a_messy_folder_is_read_and_what_is_left_out_is_listed(folder):
    """Names with blanks and other letters, formats side by side, copies, hidden and foreign files."""
    rng = np.random.default_rng(5)
    (folder / "été").mkdir()
    (folder / "_private").mkdir()
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
    soundfile.write(folder / "_private" / "y_1.wav", rng.uniform(-0.1, 0.1, 5_000), SAMPLE_RATE)
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
    assert "not in a word's folder" in left_out.pop("go/deep/x_1.wav")
    assert "not in a word's folder" in left_out.pop("_private/y_1.wav")
    assert set(corpus.noise) == {"file.wav", "hiss.flac", "hiss.wav"}
    assert left_out.pop("été/zoë 1_1.wav") == "the same recording as été/also_1.wav"
    for copy in ("été/zoë 0_1.wav", "été/copy_1.wav", "go/copy_1.wav"):  # under two words: which one is right?
        assert "the same recording as" in left_out.pop(copy)
    assert not left_out


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


def test_stereo_and_other_rates_become_mono_16k(tmp_path):
    t = np.arange(44_100) / 44_100
    left = 0.5 * np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / "a.wav", np.stack([left, 0 * left], axis=1), 44_100)
    mono = corpora.read_clip(tmp_path / "a.wav")
    assert len(mono) == SAMPLE_RATE
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    assert np.abs(mono - expected)[200:-200].max() < 1e-3


def test_of_a_long_recording_the_loudest_second_stays():
    samples = np.full(5 * SAMPLE_RATE, 0.01, np.float32)
    samples[41_000:55_000] = 0.5
    kept = corpora.one_second(samples)
    assert len(kept) == CLIP_SAMPLES
    assert (kept == 0.5).sum() == 14_000


def test_an_interrupted_preparation_leaves_nothing_that_looks_complete(folder, monkeypatch):
    calls = []

    def stop_half_way(path, read=corpora.read_clip):
        calls.append(path)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return read(path)

    with monkeypatch.context() as patched:
        patched.setattr(corpora, "read_clip", stop_half_way)
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

    def counting(path, read=corpora.read_clip):
        reads.append(path)
        return read(path)

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setattr(corpora, "read_clip", counting)
        both = list(pool.map(lambda _: corpora.load(str(folder), "go"), range(2)))
    assert both[0].fingerprint == both[1].fingerprint
    assert len(reads) == 72 + 1  # once: the clips and the noise
