"""Recordings of any kind become float32 mono at 16 kHz, or a sentence."""

import numpy as np
import pytest
import soundfile

from kwslib import audio
from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE


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
    samples = audio.read(file)
    assert abs(len(samples) - SAMPLE_RATE) <= 0.1 * SAMPLE_RATE  # MP3 adds some at its ends
    assert file.suffix in audio.SUFFIXES
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
    with pytest.raises(audio.AudioError, match="cut off|cannot read|no samples"):
        audio.read(file)


@pytest.mark.parametrize("length", [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\xf0\xff\x7f"])
def test_a_header_that_did_not_know_its_length_is_no_loss(tmp_path, length):
    """Programs that write a WAV to a pipe put 2 or 4 GB where the length goes."""
    soundfile.write(tmp_path / "a.wav", sine(1.0, SAMPLE_RATE), SAMPLE_RATE)
    content = (tmp_path / "a.wav").read_bytes()
    assert content[36:40] == b"data"
    (tmp_path / "a.wav").write_bytes(content[:4] + length + content[8:40] + length + content[44:])
    assert len(audio.read(tmp_path / "a.wav")) == SAMPLE_RATE


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_on_the_scale_of_whole_numbers_are_refused(tmp_path, subtype):
    for factor in (32768, 2**31, 20):
        soundfile.write(tmp_path / "a.wav", factor * sine(1.0, SAMPLE_RATE), SAMPLE_RATE, subtype=subtype)
        with pytest.raises(audio.AudioError, match=rf"a.wav run to {factor // 4}, not to 1: .* by 32768"):
            audio.read(tmp_path / "a.wav")
    soundfile.write(tmp_path / "a.wav", 12 * sine(1.0, SAMPLE_RATE), SAMPLE_RATE, subtype=subtype)
    assert audio.read(tmp_path / "a.wav").max() == pytest.approx(3, abs=0.01)  # no more than loud


def test_stereo_and_other_rates_become_mono_16k(tmp_path):
    t = np.arange(44_100) / 44_100
    left = 0.5 * np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / "a.wav", np.stack([left, 0 * left], axis=1), 44_100)
    mono = audio.read(tmp_path / "a.wav")
    assert len(mono) == SAMPLE_RATE
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    assert np.abs(mono - expected)[200:-200].max() < 1e-3


def test_of_a_long_recording_the_loudest_second_stays():
    samples = np.full(5 * SAMPLE_RATE, 0.01, np.float32)
    samples[41_000:55_000] = 0.5
    kept = audio.one_second(samples)
    assert len(kept) == CLIP_SAMPLES
    assert (kept == 0.5).sum() == 14_000


def test_channels_of_opposite_phase_are_not_silence(tmp_path):
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, -tone], axis=1), SAMPLE_RATE)
    assert np.abs(audio.read(tmp_path / "a.wav") - tone).max() < 1e-3
    soundfile.write(tmp_path / "b.wav", np.stack([tone, 0 * tone], axis=1), SAMPLE_RATE)
    assert np.abs(audio.read(tmp_path / "b.wav") - tone / 2).max() < 1e-3
