import shutil
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
    assert corpus.clips.iloc[0].to_dict() == {"clip": "go/s00_nohash_0.wav", "word": "go", "speaker": "s00"}
    assert set(corpus.clips["word"]) == {"go", "stop", "zoom in"}
    assert corpus.is_keyword("zoom in").sum() == 24
    original, _ = soundfile.read(folder / "go" / "s00_nohash_0.wav", dtype="int16")
    assert (corpus.waveforms[0][: len(original)] == original).all()  # 16-bit audio survives bit by bit
    assert not corpus.waveforms[0][len(original) :].any()
    assert list(corpus.noise) == ["hiss"]
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
    with pytest.raises(CorpusError, match="8 of 80 files"):
        corpora.load(str(folder), "go")


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
