"""Sound from files, pipes and microphones."""

import io
import struct
import sys
import types

import numpy as np
import pytest
import soundfile
import soxr

from kwslib.streaming import listen


class Pipe(io.RawIOBase):
    """Gives its pieces one by one, as a slow writer would."""

    def __init__(self, pieces):
        self.pieces = list(pieces)

    def read1(self, size):
        return self.pieces.pop(0) if self.pieces else b""


def sine(rate, seconds=1.0):
    return np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate).astype(np.float32) * 0.5


def test_samples_may_come_in_two_pieces():
    values = np.array([0, 1, -1, 32767, -32768, 1000], "<i2")
    raw = values.tobytes()
    for cuts in ([1, 2, 9], [3], [], [5, 6, 7, 8]):
        pieces = [bytes(p) for p in np.split(np.frombuffer(raw, np.uint8), cuts)]
        heard = np.concatenate(list(listen.from_pipe(Pipe(pieces))))
        assert (heard == values / np.float32(32768)).all()


def test_sound_is_handed_on_when_it_is_there():
    """Not when some buffer is full: a generator that takes one piece gives one chunk."""
    pipe = Pipe([b"\0\0" * 10, b"\0\0" * 20])
    chunks = listen.from_pipe(pipe)
    assert len(next(chunks)) == 10 and len(pipe.pieces) == 1


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_resampling_in_chunks_has_no_seams(rate):
    whole = sine(rate)
    pieces = np.split(whole, [1, 7, 500, 501, rate // 2])
    ours = np.concatenate(list(listen.resampled(pieces, rate)))
    theirs = soxr.resample(whole, rate, 16_000)
    assert abs(len(ours) - 16_000) <= 1
    assert np.abs(ours[: len(theirs)] - theirs[: len(ours)]).max() < 1e-4
    assert np.abs(ours[2_000:14_000] - sine(16_000)[2_000:14_000]).max() < 1e-3


def test_a_recording_of_another_rate(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(44_100, 0.55), 44_100)
    heard = np.concatenate(list(listen.from_file(tmp_path / "a.wav")))
    assert np.abs(heard - soxr.resample(sine(44_100, 0.55), 44_100, 16_000)).max() < 1e-3


def test_no_rate_is_named():
    with pytest.raises(listen.ListenError, match="0 Hz is no sample rate"):
        listen.from_pipe(io.BytesIO(), 0)


def wav(samples, rate=16_000, subtype="PCM_16", format="WAV"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype, format=format)
    return file.getvalue()


def heard(raw, *told):
    return np.concatenate(list(listen.from_pipe(Pipe(raw if isinstance(raw, list) else [raw]), *told)))


@pytest.mark.parametrize(("subtype", "format"), [("PCM_16", "WAV"), ("FLOAT", "WAV"), ("DOUBLE", "WAVEX")])
@pytest.mark.parametrize("promised", [None, 0, 128, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_in_a_pipe_is_read_by_its_header_whatever_length_that_promises(subtype, format, promised):
    stereo = np.stack([sine(48_000), 0.5 * sine(48_000)], 1)
    raw = wav(stereo, 48_000, subtype, format)
    at = raw.index(b"data") + 4
    if promised is not None:
        raw = raw[:at] + struct.pack("<I", promised) + raw[at + 4 :]
    in_pieces = [raw[i : i + 7] for i in range(0, 140, 7)] + [raw[140:]]
    wanted = soxr.resample(stereo.mean(axis=1), 48_000, 16_000)
    assert np.abs(heard(in_pieces) - wanted).max() < 1e-3


def test_what_a_file_says_behind_its_sound_is_not_heard():
    assert len(heard(wav(sine(16_000)) + b"LIST" + struct.pack("<I", 5) + b"hello\0")) == 16_000


def test_the_mean_of_raw_channels_is_heard():
    stereo = (np.stack([sine(16_000), 0.5 * sine(16_000)], 1) * 32767).astype("<i2")
    assert np.abs(heard(stereo.tobytes(), 16_000, 2) - 0.75 * sine(16_000)).max() < 1e-4


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "no sound came through the pipe"),
        (wav(np.zeros(0)), "no sound came through the pipe"),
        (b"\0" * 7, "ends within a sample, 1 bytes of 2"),
        (wav(np.zeros((9, 2)))[:-1], "ends within a sample, 3 bytes of 4"),
        (wav(np.zeros(9))[:30], "ends within the header of a WAV"),
        (wav(np.zeros(9), subtype="PCM_24"), "samples of 24 bits .format 1.*arecord -f S16_LE"),
        (wav(np.zeros(9), subtype="ULAW"), "samples of 8 bits .format 7"),
        (wav(np.zeros(9), rate=5), "5 Hz is no sample rate"),
        (wav(np.full(9, np.nan), subtype="FLOAT"), "not numbers"),
        (wav(np.zeros(9)).replace(b"fmt ", b"junk"), "damaged header"),
        (wav(np.zeros(9), format="FLAC"), "holds FLAC, not raw samples or a WAV"),
    ],
)
def test_a_pipe_that_holds_no_such_sound_gets_a_sentence(raw, message):
    with pytest.raises(listen.ListenError, match=message):
        heard(raw)


def test_no_number_of_channels_is_named():
    with pytest.raises(listen.ListenError, match="0 is no number of channels"):
        listen.from_pipe(io.BytesIO(), 16_000, 0)


class Microphone:
    """A sounddevice that hears more than fits, before anybody listens."""

    heard = 130  # chunks of a tenth of a second: ten seconds may wait

    def __init__(self, callback, device, samplerate, channels, dtype, blocksize):
        if device == "none":
            raise ValueError("No input device matching 'none'")
        self.callback, self.blocksize = callback, blocksize

    def __enter__(self):
        for i in range(self.heard):
            self.callback(np.full((self.blocksize, 1), i, np.float32), self.blocksize, None, None)

    def __exit__(self, *_):
        pass


@pytest.fixture
def sounddevice(monkeypatch):
    inputs = [{"name": "Speakers", "max_input_channels": 0}, {"name": "Desk", "max_input_channels": 1}]
    fake = types.SimpleNamespace(
        InputStream=Microphone, PortAudioError=RuntimeError, query_devices=lambda: inputs,
        default=types.SimpleNamespace(device=(1, 0)),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "sounddevice", fake)


def test_a_microphone_that_is_not_listened_to_keeps_ten_seconds(sounddevice):
    sound = listen.from_microphone()
    with pytest.warns(UserWarning, match="3.0 s of sound were lost"):
        first = next(sound)
    assert len(first) == 1600 and first[0] == 0
    assert [next(sound)[0] for _ in range(99)] == list(range(1, 100))


@pytest.mark.parametrize("known", [{(48_000, 1)}, {(48_000, 2)}, set()])
def test_a_microphone_that_knows_no_16_khz_is_opened_as_it_is(sounddevice, monkeypatch, known):
    class Usb(Microphone):
        heard = 10

        def __init__(self, samplerate, channels, **others):
            if (samplerate, channels) not in known:
                raise RuntimeError("Invalid sample rate")
            super().__init__(samplerate=samplerate, channels=channels, **others)

    own = {"default_samplerate": 48_000.0, "max_input_channels": 2}
    monkeypatch.setattr(sys.modules["sounddevice"], "InputStream", Usb)
    monkeypatch.setattr(sys.modules["sounddevice"], "query_devices", lambda device, kind: own)
    sound = listen.from_microphone()
    if known:
        samples = np.concatenate([next(sound) for _ in range(10)])
        assert 15_000 < len(samples) <= 16_000
    else:
        with pytest.raises(listen.ListenError, match="Invalid sample rate.*kws stream --stdin --rate 48000"):
            next(sound)


def test_microphones_are_listed(sounddevice):
    assert listen.devices() == [{"device": 1, "name": "Desk", "default": True}]
    with pytest.raises(listen.ListenError, match="does not open .*matching 'none'.*kws devices"):
        next(listen.from_microphone("none"))


def test_without_sounddevice_there_is_another_way(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(listen.ListenError, match="pip install -e .* or pipe samples into kws stream --stdin"):
        listen.devices()


def test_without_portaudio_that_is_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(listen.ListenError, match="needs PortAudio .*not found.*libportaudio2, or pipe") as raised:
        listen.devices()
    assert "pip install" not in str(raised.value)
