"""Recordings as people have them: files of any format, rate and length -> float32 mono at 16 kHz."""

import base64
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from scipy import signal

from kwslib.config import CLIP_SAMPLES, SAMPLE_RATE

# What a person would call a recording. soundfile reads the first line; a file of the second is
# listed as unusable rather than overlooked.
SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".rf64"}
SUFFIXES |= {".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".3gp"}
RATES_HZ = (1_000, 384_000)  # of recordings
READ_SAMPLES = 1_000_000  # of all channels, at a time
LOUDEST = 4.0  # of floats, where 1 is full scale: up to here they are loud, beyond they are on another scale
VERSION = 1  # raise it when the same file would be read differently, or refused
SAMPLES_PER_BYTE = 100  # speech packs to a byte for 50 at most, but a few bytes may stand for years of silence


class AudioError(ValueError):
    """The recording cannot be used; the message says which and why."""


def files_below(root: Path) -> list[str]:
    """Names of all audio files in a folder and those in it, relative to it, sorted; hidden ones do not count.

    Folders five deep are not looked into, for a link may lead in a circle: their names are given, with a / behind.
    """
    found = []
    for folder, inner, files in os.walk(root, followlinks=True):
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        inner[:] = [name for name in inner if not name.startswith(".")]
        if prefix.count("/") > 3:
            found += [f"{prefix}{name}/" for name in inner]
            inner.clear()
        found += [prefix + f for f in files if os.path.splitext(f)[1].lower() in SUFFIXES and not f.startswith(".")]
    return sorted(found)


def read(path: Path) -> np.ndarray:
    """Audio of any length and rate as float32 mono at 16 kHz, (samples,).

    Raises:
        AudioError: unreadable, cut off, empty, all zeros, or of a rate, length or scale that no recording has.
    """
    rates, pieces = zip(*blocks(path), strict=True)
    mono = np.concatenate(pieces)
    if rates[0] != SAMPLE_RATE:
        mono = signal.resample_poly(mono, SAMPLE_RATE, rates[0]).astype(np.float32)
    return mono


def blocks(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """A recording piece by piece, whatever its header promises: its rate in Hz, and the mean of its channels, float32.

    Of channels that cancel each other (one of them wired the wrong way round), the first.

    Memory does not grow with the file.

    Raises:
        AudioError: as ``read``; of a file that is cut off, empty or silent when its end was read.
    """
    if os.path.isdir(path):
        raise AudioError(f"{path} is a folder: give its files, or kws evaluate --corpus")
    heard, loud = 0, False
    try:
        with soundfile.SoundFile(path) as file:
            promised, rate, remarks = file.frames, file.samplerate, file.extra_info
            most = 10_000_000 + SAMPLES_PER_BYTE * os.stat(path).st_size
            if not RATES_HZ[0] <= rate <= RATES_HZ[1]:
                raise AudioError(f"{path} has a sample rate of {rate} Hz: 8000 to 192000 are usual")
            while len(piece := file.read(READ_SAMPLES // file.channels + 1, dtype="float32", always_2d=True)):
                peak = np.abs(piece).max()
                if not peak < 1e30:
                    raise AudioError(f"{path} holds samples that are not numbers, or far too large")
                if peak > LOUDEST:
                    raise AudioError(
                        f"the samples of {path} run to {peak:.0f}, not to 1: if they were 16-bit numbers, "
                        "divide them by 32768 or save them as 16 bit"
                    )
                heard += len(piece)
                if heard > most:
                    raise AudioError(
                        f"{path} unpacks to more than {most:,} samples: no recording is so long in so few bytes"
                    )
                mono = piece.mean(axis=1)
                if np.square(mono).mean() < 0.01 * np.square(piece).mean():  # channels that cancel each other
                    mono = piece[:, 0].copy()
                loud |= bool(mono.any())
                yield rate, mono
    except AudioError:
        raise
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise AudioError(f"cannot read {path}: {error} Convert it to WAV or FLAC if it plays elsewhere.") from None
    if heard < promised or _promised_more(remarks):
        raise AudioError(f"{path} is cut off: its header promises more than the {heard} samples there are")
    if heard == 0:
        raise AudioError(f"{path} holds no samples")
    if not loud:
        raise AudioError(f"{path} is silent: every sample is zero")


def _promised_more(remarks: str) -> bool:
    """Whether libsndfile remarked that the audio is shorter than its header says.

    A header written to a pipe says 2 or 4 GB because the length was not known: that is no loss.
    """
    sizes = re.findall(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", remarks)
    return any(int(there) < int(said) < 0x7FFFF000 for said, there in sizes)


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


def small_flac(samples: np.ndarray) -> str:
    """A clip of 16 kHz as FLAC in base64, to be heard in a page: at full scale, with 8 bits of its 16, which are small.

    Args:
        samples: int16, (samples,).
    """
    peak = max(int(np.abs(samples.astype(int)).max(initial=0)), 1)
    file = io.BytesIO()
    coarse = 256 * np.round(127 / peak * samples)
    soundfile.write(file, coarse.astype(np.int16), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return base64.b64encode(file.getvalue()).decode()
