"""Sound as it arrives: a recording, raw samples from a pipe, a microphone; as float32 chunks at 16 kHz.

No ffmpeg anywhere. Memory stays bounded however slowly the chunks are taken: a pipe waits, a microphone
loses its newest sound and says so.
"""

import io
import math
import queue
import struct
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from kwslib import audio, paths
from kwslib.config import SAMPLE_RATE
from kwslib.streaming.decision import Decision
from kwslib.streaming.model import StreamingModel, score_chunks

CHUNK_S = 0.1
WAITING_S = 10.0  # of sound from a microphone that may wait to be scored
KINDS = {(1, 16): "<i2", (3, 32): "<f4", (3, 64): "<f8"}  # of samples in a WAV, by format code and bits
BEHIND_SOUND = {b"LIST", b"id3 ", b"ID3 ", b"bext", b"cue ", b"fact", b"PEAK", b"smpl", b"iXML", b"_PMX"}  # in a WAV
# What else a pipe may bring, by its first bytes.
FORMATS = {b"fLaC": "FLAC", b"OggS": "Ogg", b"FORM": "AIFF", b".snd": "AU", b"caff": "CAF", b"RF64": "RF64"}
FORMATS |= {b"RIFX": "a big-endian WAV", b"ID3\x03": "MP3", b"ID3\x04": "MP3", b"\x1a\x45\xdf\xa3": "WebM"}


class ListenError(ValueError):
    """No sound can be had; the message says why and what to do."""


def from_file(path: Path) -> Iterator[np.ndarray]:
    """A recording of any length and rate, some seconds at a time: memory does not grow with it.

    Raises:
        AudioError: unreadable, cut off, empty, or silent.
    """
    pieces = audio.blocks(path)
    for rate, first in pieces:
        yield from resampled(chain([first], (piece for _, piece in pieces)), rate)


def alarms(streaming: StreamingModel, decision: Decision, path: Path) -> tuple[float, list[tuple[float, float]]]:
    """What a detector takes for its keyword in a recording without it, heard from its beginning with carried state.

    Returns:
        Seconds heard, and for each event its time in seconds and its probability.

    Raises:
        AudioError: as ``from_file``.
    """
    heard = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal heard
        for chunk in from_file(path):
            heard += len(chunk)
            yield chunk

    scored = decision.watch(score_chunks(streaming, counted()))
    fired = [(t, float(decision.probability(score))) for t, score, begins in scored if begins]
    return heard / SAMPLE_RATE, fired


def cut(path: Path, t_s: float, target: Path, around_s: float = 1.0) -> None:
    """Write what is up to ``around_s`` before and after a moment of a recording to a WAV file."""
    with soundfile.SoundFile(path) as file:
        begin = max(0, round((t_s - around_s) * file.samplerate))
        file.seek(min(begin, file.frames))
        samples = file.read(round((t_s + around_s) * file.samplerate) - begin, dtype="float32", always_2d=True)
        content = io.BytesIO()
        soundfile.write(content, samples, file.samplerate, format="WAV")
    paths.write_atomically(target, content.getvalue())


def from_pipe(pipe: BinaryIO, rate: int = SAMPLE_RATE, channels: int = 1) -> Iterator[np.ndarray]:
    """Signed 16-bit little-endian samples, as ``arecord -f S16_LE -t raw`` or ``sox -t s16`` write them, or a WAV.

    A chunk is handed on as soon as there is any sound, so that nothing waits for a full buffer.

    Args:
        rate, channels: of raw samples; a WAV says its own. The mean of the channels is heard.

    Raises:
        ListenError: the rate or the channels make no sense; later, nothing came, what came is no such sound, or it
            ends within a sample.
    """
    _check(rate, channels)
    return _from_pipe(_Pipe(pipe), rate, channels)


def _check(rate: int, channels: int = 1) -> None:
    if not 1_000 <= rate <= 1_000_000:
        raise ListenError(f"{rate} Hz is no sample rate: 8000 to 192000 are usual")
    if not 1 <= channels <= 1_000:
        raise ListenError(f"{channels} is no number of channels: 1 is a microphone's, 2 are stereo")


class _Pipe:
    """Bytes of a pipe: so many at once, or whatever is there."""

    def __init__(self, pipe: BinaryIO):
        self._read = getattr(pipe, "read1", pipe.read)  # what is there, without waiting for more
        self._kept = b""

    def peek(self, n: int) -> bytes:
        """The next n bytes, which stay; fewer at the end."""
        while len(self._kept) < n and (piece := self._read(64_000)):
            self._kept += piece
        return self._kept[:n]

    def take(self, n: int) -> bytes:
        """The next n bytes; fewer at the end."""
        taken = self.peek(n)
        self._kept = self._kept[n:]
        return taken

    def pieces(self, most: float = math.inf) -> Iterator[bytes]:
        """Up to ``most`` bytes, as they come."""
        while most > 0 and self.peek(1):
            piece = self.take(int(min(most, len(self._kept))))
            most -= len(piece)
            yield piece


def _from_pipe(pipe: _Pipe, rate: int, channels: int) -> Iterator[np.ndarray]:
    kind, pieces = "<i2", pipe.pieces()
    if (begin := pipe.peek(4)) in FORMATS:
        raise ListenError(
            f"the pipe holds {FORMATS[begin]}, not raw samples or a WAV: give the file with --wav, or convert it first"
        )
    if begin == b"RIFF" and pipe.peek(12)[8:] == b"WAVE":
        rate, channels, kind, n_bytes = _header(pipe)
        _check(rate, channels)
        pieces = _sound(pipe, n_bytes)
    yield from resampled(_decoded(pieces, kind, channels), rate)


def _header(pipe: _Pipe) -> tuple[int, int, str, int]:
    """Rate, channels, kind of sample and bytes of sound, from what stands before the sound of a WAV."""
    pipe.take(12)
    form = b""
    while len(head := pipe.take(8)) == 8:
        name, n_bytes = struct.unpack("<4sI", head)
        if name == b"data" and len(form) >= 16:
            code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", form[:16])
            if code == 0xFFFE:  # "extensible": the true code stands further behind
                code = int.from_bytes(form[24:26], "little")
            if (code, bits) not in KINDS:
                raise ListenError(
                    f"the WAV in the pipe has samples of {bits} bits (format {code}): 16-bit integers and floats are "
                    "read, such as arecord -f S16_LE gives"
                )
            return rate, channels, KINDS[code, bits], n_bytes
        if name == b"data" or n_bytes > 16_000_000:
            raise ListenError("the WAV in the pipe has a damaged header: pipe raw samples, and tell --rate")
        content = pipe.take(n_bytes + n_bytes % 2)
        form = content if name == b"fmt " else form
    raise ListenError("the pipe ends within the header of a WAV: the program before it may have failed")


def _sound(pipe: _Pipe, n_bytes: int) -> Iterator[bytes]:
    """The sound of a WAV until the pipe ends: who writes into a pipe cannot know the length, and promises anything.

    Only of a finished file it is true; then what is written behind the sound is none.
    """
    yield from pipe.pieces(n_bytes)
    if pipe.peek(4) not in BEHIND_SOUND:
        yield from pipe.pieces()


def _decoded(pieces: Iterable[bytes], kind: str, channels: int) -> Iterator[np.ndarray]:
    width = np.dtype(kind).itemsize * channels
    part, heard = b"", False  # of a sample that came in two pieces
    for piece in pieces:
        piece = part + piece
        whole = len(piece) // width * width
        part = piece[whole:]
        if whole:
            samples = np.frombuffer(piece[:whole], kind).reshape(-1, channels)
            if not (np.abs(samples) < 1e30).all():
                raise ListenError("the pipe holds samples that are not numbers, or far too large")
            heard = True
            yield samples.mean(axis=1, dtype=np.float32) / np.float32(32768 if kind == "<i2" else 1)
    if part:
        raise ListenError(
            f"the pipe ends within a sample, {len(part)} bytes of {width}: it was cut off, or its samples are not of "
            "16 bits, or --channels is wrong"
        )
    if not heard:
        raise ListenError("no sound came through the pipe: the program before it may have failed")


def resampled(chunks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Chunks of another rate at 16 kHz, as if the whole had been resampled at once.

    Raises:
        ListenError: the rate makes no sense.
    """
    _check(rate)
    return iter(chunks) if rate == SAMPLE_RATE else _resampled(chunks, rate)


def _resampled(chunks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    import soxr

    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    for chunk in chunks:
        yield stream.resample_chunk(chunk)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def from_microphone(device: int | str | None = None) -> Iterator[np.ndarray]:
    """A microphone, for ever.

    Args:
        device: number or part of the name, as in ``devices``; the system's default when left out.

    Raises:
        ListenError: sounddevice or PortAudio is missing, or there is no such device.
    """
    sounddevice = _sounddevice()
    waiting: queue.Queue = queue.Queue(maxsize=round(WAITING_S / CHUNK_S))
    lost = 0

    def heard(samples, frames, time, status) -> None:
        nonlocal lost
        try:
            waiting.put_nowait(samples[:, 0].copy())
        except queue.Full:
            lost += 1

    try:
        microphone, rate = _opened(sounddevice, device, heard)
    except (sounddevice.PortAudioError, ValueError) as error:
        raise ListenError(
            f"the microphone does not open ({error}): 'kws devices' lists what there is; or record at a rate it knows, "
            "arecord -f S16_LE -r 48000 -t raw | kws stream --stdin --rate 48000"
        ) from None

    def taken() -> Iterator[np.ndarray]:
        nonlocal lost
        while True:
            if lost:
                warnings.warn(f"{lost * CHUNK_S:.1f} s of sound were lost: scoring is slower than life", stacklevel=2)
                lost = 0
            yield waiting.get()

    with microphone:
        yield from resampled(taken(), rate)


def _opened(sounddevice, device: int | str | None, heard) -> tuple:
    """A microphone and its rate: 16 kHz, or else its own; mono, or else with the channels it has."""

    def at(rate: int, channels: int) -> tuple:
        return sounddevice.InputStream(
            samplerate=rate, channels=channels, dtype="float32", device=device, callback=heard,
            blocksize=round(CHUNK_S * rate),
        ), rate  # fmt: skip

    try:
        return at(SAMPLE_RATE, 1)
    except sounddevice.PortAudioError:  # many know 44.1 and 48 kHz alone
        own = sounddevice.query_devices(device, "input")
    try:
        return at(round(own["default_samplerate"]), 1)
    except sounddevice.PortAudioError:
        return at(round(own["default_samplerate"]), own["max_input_channels"])


def devices() -> list[dict]:
    """Microphones: number, name, and whether it is the default.

    Raises:
        ListenError: sounddevice or PortAudio is missing.
    """
    sounddevice = _sounddevice()
    chosen = sounddevice.default.device[0]
    return [
        {"device": number, "name": found["name"], "default": number == chosen}
        for number, found in enumerate(sounddevice.query_devices())
        if found["max_input_channels"] > 0
    ]


def _sounddevice():
    try:
        import sounddevice

        return sounddevice
    except ImportError as error:
        missing = f"the package sounddevice ({error}): .venv/bin/pip install -e '.[mic]'"
    except OSError as error:  # the package is there, the library of the system is not
        missing = f"PortAudio ({error}): install it, for example apt-get install libportaudio2"
    raise ListenError(f"a microphone needs {missing}, or pipe samples into kws stream --stdin")
