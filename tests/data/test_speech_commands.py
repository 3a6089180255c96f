"""The download against a small archive of the same layout, served on this machine; the split against the lists."""

import hashlib
import io
import os
import shutil
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
import soundfile

from kwslib import paths
from kwslib.data import corpora, speech_commands, splits
from kwslib.data.speech_commands import DownloadError

HERE = Path(__file__).parent
LISTS = HERE.parents[2] / "shared" / "corpora" / "speech_commands_v0.01"
NAME = "speech_commands_v0.01"
PART, WHOLE = speech_commands.PART, speech_commands.WHOLE


def member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def archive_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves ``content`` under any name; may cut the connection, ignore ranges, or be missing."""

    content, cut_after, ranges, status, length = b"", None, True, 200, True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requested: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requested.append(wanted)
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        rest = self.server.content[first:]
        code = 416 if first and not rest else 206 if first else self.server.status
        self.send_response(code)
        if self.server.length:
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.server.cut_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder, monkeypatch):
    """A server with the tiny corpus as its archive, under the name and checksum of the real one."""
    noise = (folder / "_background_noise_" / "hiss.wav").read_bytes()
    members = [member("./_background_noise_/README.md", b"noise"), member("./_background_noise_/hiss.wav", noise)]
    members += [member("./testing_list.txt", b"go/x.wav\n"), member("./go", type=tarfile.DIRTYPE)]
    for file in sorted(folder.glob("*/*.wav")):
        if file.parent.name != "_background_noise_":
            members.append(member(f"./{file.parent.name}/{file.name}", file.read_bytes()))
    with Server() as running:
        serve(running, archive_of(members), monkeypatch)
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def serve(server: Server, content: bytes, monkeypatch, sha256: str | None = None) -> None:
    server.content = content
    url = f"http://127.0.0.1:{server.server_port}/{NAME}.tar.gz"
    checksum = sha256 or hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(speech_commands, "ARCHIVES", dict.fromkeys((NAME, WHOLE), (url, checksum)))


def left_behind() -> list[str]:
    return sorted(path.name for path in paths.downloads().glob("*") if path.suffix != ".lock")


def test_the_dataset_is_downloaded_once_and_read_like_a_folder(server):
    corpus = corpora.load(NAME, "go")
    assert corpus.name == NAME
    assert set(corpus.clips["word"]) == {"go", "stop", "zoom in"}
    assert len(corpus.clips) == 36 and list(corpus.noise) == ["hiss.wav"]
    assert left_behind() == [NAME]  # neither the archive nor anything half-made
    corpora.load(NAME, "stop")
    assert len(server.requested) == 1


def test_addresses_and_checksums_are_those_of_torchaudio():
    url, sha256 = speech_commands.ARCHIVES["speech_commands_v0.02"]
    assert url == "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
    assert sha256 == "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"


def test_an_interrupted_download_goes_on_where_it_stopped(server):
    server.cut_after = 5000
    with pytest.raises(DownloadError, match="ended .* MB early.*run again to continue"):
        corpora.load(NAME, "go")
    assert left_behind() == [NAME + ".tar.gz.part"]
    server.cut_after = None
    assert len(corpora.load(NAME, "go").clips) == 36
    assert server.requested == [None, "bytes=5000-"]


def test_a_server_without_ranges_starts_over(server):
    server.cut_after = 5000
    with pytest.raises(DownloadError):
        corpora.load(NAME, "go")
    server.cut_after, server.ranges = None, False
    assert len(corpora.load(NAME, "go").clips) == 36


def test_a_server_that_does_not_say_how_much_is_enough_is_held_to_the_checksum(server):
    server.length = False
    assert len(corpora.load(NAME, "go").clips) == 36


def test_a_download_killed_before_its_checksum_was_taken_is_taken_up(server):
    paths.downloads().mkdir(parents=True)
    (paths.downloads() / f"{NAME}.tar.gz.part").write_bytes(server.content)
    assert len(corpora.load(NAME, "go").clips) == 36
    assert server.requested == [f"bytes={len(server.content)}-"]


def test_a_wrong_checksum_is_said_and_the_file_removed(server, monkeypatch):
    serve(server, server.content, monkeypatch, sha256="0" * 64)
    with pytest.raises(DownloadError, match="has the SHA-256 .*, not 0000.*run again to download anew"):
        corpora.load(NAME, "go")
    assert left_behind() == []


def test_no_network_is_one_sentence(monkeypatch):
    monkeypatch.setattr(speech_commands, "ARCHIVES", {NAME: ("http://127.0.0.1:9/x.tar.gz", "0" * 64)})
    with pytest.raises(DownloadError, match="could not be downloaded .*refused"):
        corpora.load(NAME, "go")
    assert left_behind() == []


def test_a_missing_file_is_one_sentence(server):
    server.status = 404
    with pytest.raises(DownloadError, match="could not be downloaded .*404"):
        corpora.load(NAME, "go")


@pytest.mark.parametrize(
    "bad",
    [
        member("../outside.wav", b"x"),
        member("/outside.wav", b"x"),
        member("go/../../outside.wav", b"x"),
        member("go/link.wav", type=tarfile.SYMTYPE, linkname="/etc/hostname"),
        member("go/hard.wav", type=tarfile.LNKTYPE, linkname="../../outside.wav"),
        member("go/device", type=tarfile.CHRTYPE),
        member("go\\..\\..\\outside.wav", b"x"),
    ],
    ids=lambda pair: pair[0].name,
)
def test_a_malicious_archive_writes_nothing(server, monkeypatch, home, bad):
    serve(server, archive_of([member("go/a_nohash_0.wav", b"x"), bad]), monkeypatch)
    with pytest.raises(DownloadError, match="is not a file inside the dataset"):
        corpora.load(NAME, "go")
    assert left_behind() == [NAME + ".tar.gz"]  # its checksum was right: kept for a look
    assert not [f for f in home.parent.rglob("outside*")]


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"not an archive"], ids=["cut", "text"])
def test_an_archive_that_cannot_be_unpacked_leaves_no_folder(server, monkeypatch, damage):
    serve(server, damage(server.content), monkeypatch)
    with pytest.raises(DownloadError, match="cannot be unpacked .*delete it and run again"):
        corpora.load(NAME, "go")
    assert left_behind() == [NAME + ".tar.gz"]


def test_a_full_disk_does_not_ask_to_delete_a_good_archive(server, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(speech_commands.shutil, "copyfileobj", full)
    with pytest.raises(DownloadError, match="No space left on device.*: make room and run again"):
        corpora.load(NAME, "go")
    assert left_behind() == [NAME + ".tar.gz"]


def test_unpacking_that_was_killed_is_done_again(server):
    half = paths.downloads() / f"{NAME}.tmp" / "go"
    half.mkdir(parents=True)
    (half / "half_nohash_0.wav").write_bytes(b"RIFF")
    assert len(corpora.load(NAME, "go").clips) == 36


def test_a_word_of_ones_own_beside_the_dataset_is_split_by_speaker_too():
    takes = [speech_commands.subset_of(f"hey/alice_{take}.wav") for take in range(20)]
    assert len(set(takes)) == 1


def test_the_sample_of_the_official_lists_is_reproduced():
    sample = pd.read_csv(HERE / "speech_commands_v0.01_sample.csv")
    assert len(sample) == 200
    assigned = splits.assign(list(sample["clip"]), "speaker", speech_commands.subset_of).set_index("clip")["subset"]
    assert (assigned[sample["clip"]].to_numpy() == sample["subset"].to_numpy()).all()


@pytest.mark.skipif(not LISTS.is_dir(), reason="the official lists are not here; the sample of 200 names is tested")
def test_both_official_lists_are_reproduced_name_by_name():
    names = {s: (LISTS / f"{f}_list.txt").read_text().split() for s, f in (("val", "validation"), ("test", "testing"))}
    assert len(names["val"]) + len(names["test"]) == 13_633
    for subset, clips in names.items():
        assert {speech_commands.subset_of(clip) for clip in clips} == {subset}


def test_a_copy_of_the_dataset_in_another_place_gets_the_official_split(folder):
    copy = folder.with_name(NAME)
    shutil.copytree(folder, copy)
    words = {word.name: sorted(word.iterdir()) for word in copy.iterdir() if not word.name.startswith("_")}
    for files in words.values():  # names whose speakers fall into all three subsets
        for speaker, file in zip(("0c40e715", "0ea0e2f4", "026290a7", "060cd039", "a", "c"), files, strict=False):
            os.rename(file, file.with_name(f"{speaker}_nohash_0.wav"))
        for file in files[6:]:
            file.unlink()
    corpus = corpora.load(str(copy), "go")
    split = splits.load(corpus, "go", "speaker")
    speakers = {s: set(corpus.clips["speaker"].iloc[getattr(split, s)]) for s in ("val", "test")}
    assert {"026290a7", "060cd039"} <= speakers["val"] and {"0c40e715", "0ea0e2f4"} <= speakers["test"]


@pytest.fixture
def listed(folder, tmp_path, monkeypatch) -> Path:
    """The list of a part: the first takes of the tiny corpus, and its noise."""
    lines = ["clip,sha256"]
    for file in sorted(folder.glob("*/*.wav")):
        samples, _ = soundfile.read(file, dtype="int16")
        name = file.relative_to(folder).with_suffix(".flac").as_posix()
        lines.append(f"{name},{hashlib.sha256(samples.tobytes()).hexdigest()}")
    path = tmp_path / "clips.csv"
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(paths, "clip_list", lambda name: path)
    return path


def test_the_part_is_picked_once_and_equals_a_folder_of_its_recordings(server, listed, tmp_path):
    corpus = corpora.load(PART, "go")
    assert corpus.name == PART and len(corpus.clips) == 36 and list(corpus.noise) == ["hiss.flac"]
    assert left_behind() == [PART, WHOLE]
    copy = tmp_path / "elsewhere" / PART
    shutil.copytree(paths.downloads() / PART, copy)
    same = corpora.load(str(copy), "go")
    assert (same.name, same.fingerprint) == (corpus.name, corpus.fingerprint)
    shutil.rmtree(paths.downloads() / WHOLE)  # not needed any more
    corpora.load(PART, "stop")
    assert len(server.requested) == 1


def test_a_part_that_lies_there_is_taken_without_its_list(folder, server):
    paths.downloads().mkdir(parents=True)
    folder.rename(paths.downloads() / PART)
    assert len(corpora.load(PART, "go").clips) == 72
    assert server.requested == []


def test_a_listed_recording_with_other_samples_is_one_sentence(server, listed):
    lines = listed.read_text().split("\n")
    lines[2] = lines[2][:-64] + "0" * 64
    listed.write_text("\n".join(lines))
    with pytest.raises(DownloadError, match=r"1 of the 37 .* first is go/s00_nohash_0.flac \(it has other samples\)"):
        corpora.load(PART, "go")
    assert left_behind() == [WHOLE]


def test_a_listed_recording_that_is_missing_is_one_sentence(server, listed):
    with listed.open("a") as file:
        file.write(f"go/zoe_nohash_0.flac,{0:064}\nstop/zoe_nohash_0.flac,{0:064}\n")
    with pytest.raises(
        DownloadError, match=r"2 of the 39 .* first is go/zoe_nohash_0.flac \(it is missing or damaged\)"
    ):
        corpora.load(PART, "go")
    assert left_behind() == [WHOLE]


def test_an_interrupted_or_failed_pick_leaves_no_folder(server, listed, monkeypatch):
    write, reasons = soundfile.write, iter([KeyboardInterrupt(), OSError(28, "No space left on device")])

    def fail_at_the_second_word(file, *rest):
        if "stop" in Path(file).parts:
            raise next(reasons)
        write(file, *rest)

    monkeypatch.setattr(soundfile, "write", fail_at_the_second_word)
    with pytest.raises(KeyboardInterrupt):
        corpora.load(PART, "go")
    assert left_behind() == [WHOLE]
    with pytest.raises(DownloadError, match="No space left on device.*: make room and run again"):
        corpora.load(PART, "go")
    assert left_behind() == [WHOLE]


def test_the_recorded_split_of_the_part_is_that_of_its_listed_clips():
    listed = set(pd.read_csv(paths.clip_list(PART), dtype=str)["clip"])
    recorded = (paths.ROOT / "data_splits" / PART / "speaker.csv").read_text()
    clips = [line.partition(",")[0] for line in recorded.splitlines()[1:]]
    assert set(clips) <= listed and len(listed) == 7297
    assert splits.assign(clips, "speaker").to_csv(index=False) == recorded
