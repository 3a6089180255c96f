"""Sound as it arrives: a recording, raw samples from a pipe, a microphone; as float32 chunks at 16 kHz.

No ffmpeg anywhere. Memory stays bounded however slowly the chunks are taken: a pipe waits, a microphone
loses its newest sound and says so.
"""

import io
import queue
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


def from_raw(pipe: BinaryIO, rate: int = SAMPLE_RATE) -> Iterator[np.ndarray]:
    """Signed 16-bit little-endian mono samples, as ``arecord -f S16_LE -t raw`` or ``sox -t s16`` write them.

    A chunk is handed on as soon as there is any sound, so that nothing waits for a full buffer.

    Raises:
        ListenError: the rate makes no sense.
    """
    return resampled(_decoded(pipe), rate)


def _decoded(pipe: BinaryIO) -> Iterator[np.ndarray]:
    read = getattr(pipe, "read1", pipe.read)  # what is there, without waiting for more
    half = b""  # of a sample that came in two pieces
    while piece := read(64_000):
        piece = half + piece
        whole = len(piece) // 2 * 2
        half = piece[whole:]
        if whole:
            yield np.frombuffer(piece[:whole], "<i2").astype(np.float32) / 32768


def resampled(chunks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Chunks of another rate at 16 kHz, as if the whole had been resampled at once.

    Raises:
        ListenError: the rate makes no sense.
    """
    if not 1_000 <= rate <= 1_000_000:
        raise ListenError(f"{rate} Hz is no sample rate: 8000 to 192000 are usual")
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
        microphone = sounddevice.InputStream(
            samplerate=SAMPLE_RATE, channels=1, dtype="float32", device=device, callback=heard,
            blocksize=round(CHUNK_S * SAMPLE_RATE),
        )  # fmt: skip
    except (sounddevice.PortAudioError, ValueError) as error:
        raise ListenError(f"the microphone does not open ({error}): 'kws devices' lists what there is") from None
    with microphone:
        while True:
            if lost:
                warnings.warn(f"{lost * CHUNK_S:.1f} s of sound were lost: scoring is slower than life", stacklevel=2)
                lost = 0
            yield waiting.get()


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
