"""Speech Commands (Warden 2018, arXiv:1804.03209): its archives, a listed part of it, its own rule of subsets.

Addresses and checksums are torchaudio's. The rest is done here, because torchaudio's downloader starts
over after an interruption, unpacks whatever an archive says, and takes a half-unpacked folder for complete.
"""

import csv
import gzip
import hashlib
import http.client
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import soundfile
from torchaudio.datasets.speechcommands import _CHECKSUMS
from tqdm.auto import tqdm

from kwslib import paths
from kwslib.config import SAMPLE_RATE
from kwslib.processes import made_once

ARCHIVES = {url.rpartition("/")[2].removesuffix(".tar.gz"): (url, sha256) for url, sha256 in _CHECKSUMS.items()}
PART, WHOLE = "speech_commands_part", "speech_commands_v0.02"  # a list in data_splits/, and what it lists clips of
NAMES = (*ARCHIVES, PART)
UNPACKED = 1.7  # times the size of the archive
TIMEOUT_S = 60
DAMAGED = (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, ValueError, ArithmeticError, RecursionError)
LARGEST_NAME = 1_000_000  # bytes of a header that only says how the next member is called


class DownloadError(ValueError):
    """The dataset could not be fetched; the message says why and what to do."""


def subset_of(clip: str) -> str:
    """``train``, ``val`` or ``test``: the rule of the dataset's README, a hash of the speaker's name.

    About 80, 10 and 10 % of the speakers; reproduces the published lists.

    >>> subset_of("bed/0c40e715_nohash_0.wav"), subset_of("bed/026290a7_nohash_0.wav")
    ('test', 'val')
    """
    speaker = PurePosixPath(clip).stem.split("_")[0]
    largest = 2**27 - 1
    percent = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % (largest + 1) * (100 / largest)
    return "val" if percent < 10 else "test" if percent < 20 else "train"


def folder(name: str) -> Path:
    """The unpacked dataset, downloaded when it is not there yet. An interrupted download is continued.

    The part is picked from the whole dataset; one that lies there already is taken as it is.

    Raises:
        DownloadError: no network, cut off, a wrong checksum, an archive that is not what it should be, or
            too little room, or recordings that are not those of the part's list.
    """
    (target := paths.downloads() / name).parent.mkdir(parents=True, exist_ok=True)
    with made_once(target) as missing:
        if missing and name == PART:
            _pick(folder(WHOLE), target)
        elif missing:
            archive = target.with_name(name + ".tar.gz")
            if not archive.exists():
                _download(*ARCHIVES[name], archive)
            _unpack(archive, target)
            archive.unlink()
    return target


def _download(url: str, sha256: str, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    try:
        _fetch(url, part)
    except (OSError, http.client.HTTPException) as error:
        kept = f"{part.stat().st_size / 1e6:,.0f} MB are kept, " if part.exists() else ""
        rest = f"{kept}run again to continue, or give a folder that holds it"
        raise DownloadError(f"{url} could not be downloaded ({error}): {rest}") from None
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        raise DownloadError(f"{url} has the SHA-256 {found}, not {sha256}: it was deleted, run again to download anew")
    part.rename(target)


def _fetch(url: str, part: Path) -> None:
    """Append to ``part`` what it does not hold yet."""
    done = part.stat().st_size if part.exists() else 0
    try:
        response = urlopen(Request(url, headers={"Range": f"bytes={done}-"} if done else {}), timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code != 416:  # then nothing is left to fetch
            raise
        return
    with response:
        if response.status != 206:  # the server begins at the beginning
            done = 0
        length = int(response.headers["Content-Length"] or 0)  # a proxy may leave it out
        total = done + length if length else None
        paths.require_space(part.parent, int(UNPACKED * (total or 0)) + length)
        bar = tqdm(desc=f"downloading {part.stem}", total=total, initial=done, unit="B", unit_scale=True)
        with bar, part.open("ab" if done else "wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
                done += len(block)
                bar.update(len(block))
    if total is not None and done < total:
        raise OSError(f"the connection ended {(total - done) / 1e6:,.1f} MB early")


def _unpack(archive: Path, target: Path) -> None:
    """Write the archive's regular files below ``target``, which appears only when all of them are there."""
    build = target.with_name(target.name + ".tmp")
    shutil.rmtree(build, ignore_errors=True)
    try:
        with tarfile.open(archive, "r:gz", tarinfo=_Member) as tar:
            for member in tqdm(tar, desc=f"unpacking {target.name}", unit="file"):
                _write_member(tar, member, build)
        if not build.is_dir():
            raise tarfile.TarError("it holds no files")
        build.rename(target)
    except DAMAGED as error:
        raise DownloadError(f"{archive} cannot be unpacked ({error}): delete it and run again") from None
    except OSError as error:
        raise DownloadError(f"{archive} could not be unpacked ({str(error)[:500]}): make room and run again") from None
    finally:
        shutil.rmtree(build, ignore_errors=True)


def _pick(whole: Path, target: Path) -> None:
    """Write the listed recordings as FLAC below ``target``, which appears only when all are there, sample by sample."""
    with paths.clip_list(PART).open(newline="") as file:
        listed = {row["clip"]: row["sha256"] for row in csv.DictReader(file)}
    build = paths.temporary_for(target)
    unfit: dict[str, str] = {}
    try:
        for clip, sha256 in tqdm(listed.items(), desc=f"picking {target.name}", unit="file"):
            source, copy = (whole / clip).with_suffix(".wav"), build / clip
            try:
                samples, _ = soundfile.read(source, dtype="int16")
            except soundfile.SoundFileError:
                unfit[clip] = "it is missing or damaged"
                continue
            if hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest() != sha256:
                unfit[clip] = "it has other samples"
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(copy, samples, SAMPLE_RATE)
        if not unfit:
            build.rename(target)
    except (OSError, soundfile.SoundFileError) as error:
        raise DownloadError(f"{target} could not be made ({error}): make room and run again") from None
    finally:
        shutil.rmtree(build, ignore_errors=True)
    if unfit:
        first, reason = next(iter(unfit.items()))
        raise DownloadError(
            f"{len(unfit)} of the {len(listed)} recordings in {paths.clip_list(PART)} are not those of {whole}, "
            f"the first is {first} ({reason}): delete {whole} and run again to download it anew"
        )


class _Member(tarfile.TarInfo):
    """A member whose size can be trusted, in an archive that ends where it says.

    tarfile goes round for ever where a size is below 0, takes all the memory for which a header of headers asks, and
    takes a header that it cannot read for the end.
    """

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it ends early or is damaged: {error}") from None
        if member.size < 0 or (member.size > LARGEST_NAME and not member.isreg()):
            raise tarfile.ReadError(f"{member.name[:200]!r} cannot have {member.size:,} bytes")
        return member


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    name = PurePosixPath(member.name)
    outside = name.is_absolute() or ".." in name.parts or "\\" in member.name
    if outside or not (member.isdir() or (member.isfile() and name.parts)):
        raise tarfile.TarError(f"{member.name[:200]!r} is not a file inside the dataset")
    if member.size < 0 or member.issparse():
        raise tarfile.TarError(f"{member.name[:200]!r} cannot have {member.size:,} bytes")
    if member.isfile():
        (path := folder / name).parent.mkdir(parents=True, exist_ok=True)
        paths.require_space(path.parent, member.size)
        with tar.extractfile(member) as source, path.open("wb") as copy:
            shutil.copyfileobj(source, copy)
