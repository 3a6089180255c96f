"""Hostile files are refused in one sentence by the room that opens them: no crash, no hang, nothing run or left behind.

Each room gets valid files of its own with bytes, numbers and types changed. A bare run always tries the same
ones, in some 20 s; ``KWS_FUZZ_MINUTES=10 pytest tests/test_hostile.py`` tries others each time, for about so long.
"""

import copy
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kwslib import audio, paths
from kwslib.config import SAMPLE_RATE, CRNNConfig, FeatureConfig, describe
from kwslib.data import corpora, speech_commands, splits
from kwslib.data.corpora import CorpusError
from kwslib.data.speech_commands import DownloadError
from kwslib.data.splits import SplitError
from kwslib.nets.rivals import BCResNetConfig, SeparableConfig, TimeNetConfig, build
from kwslib.results import page
from kwslib.results.records import RecordError
from kwslib.streaming import tracks
from kwslib.streaming.decision import read_decision
from kwslib.streaming.tracks import SpecError
from kwslib.training import checkpoints
from kwslib.training.checkpoints import CheckpointError
from kwslib.training.quantize import PRECISIONS

MINUTES = float(os.environ.get("KWS_FUZZ_MINUTES", 0))
GIVE_UP_S = 20
MOST_BYTES = 2 << 30  # of memory that a small file may make a room ask for

DEEP = b"[" * 100_000
LONG_NUMBER = b"9" * 10_000
ODD = st.sampled_from(
    [None, True, -1, 0, 1, 2, 0.5, -0.5, 1e308, 5e-324, 10**6, 10**30, 10**400, float("nan"), float("inf"), "", "x"]
    + ["5", "../../x", "<script>", "\0", "\ud800", [], [0], ["x"], [[]], [10**9] * 3, [1] * 1000, {}, {"x": []}]
)
PIECES = st.one_of(
    st.binary(max_size=8),
    st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8, b'"', b",", b"\n", b"["]),
)


def tries(n: int):
    """So many examples in a bare run, the same ones each time; more, and new ones, in a longer one."""
    return settings(
        max_examples=round(n * max(1, 6 * MINUTES)),
        derandomize=not MINUTES,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The bytes of a valid file with up to four pieces overwritten, removed or inserted; sometimes any bytes."""
    if draw(st.integers(0, 9)) == 9:
        return draw(st.binary(max_size=300))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(content), 100)) | st.integers(0, len(content)))
        removed = draw(st.sampled_from([0, 1, 2, 4, 8, 50, len(content)]))
        content = content[:at] + draw(PIECES) + content[at + removed :]
    return content


def _places(value) -> list[tuple]:
    """Every (object or list, key or index) inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(value, key), *_places(inner)]]


@st.composite
def changed(draw, value):
    """A JSON value with up to three of its parts replaced, left out or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        if not (places := _places(value)):
            break
        inside, key = places[draw(st.integers(0, len(places) - 1))]
        what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        if what == "replace":
            inside[key] = copy.deepcopy(draw(ODD))
            continue
        part = inside.pop(key)
        if what == "rename" and isinstance(inside, dict):
            inside[draw(st.sampled_from(["x", "", "class"]))] = part
    return value


def json_like(value):
    """The bytes of a JSON file: of this value with odd parts, of other values, damaged."""
    encoded = changed(value) | changed(value) | ODD
    return encoded.map(lambda v: json.dumps(v).encode()) | damaged(json.dumps(value).encode())


def opened(error: type[Exception], read, *arguments):
    """What reading gives, or None where it is refused in a sentence, soon, and before the memory is full."""
    try:
        signal.setitimer(signal.ITIMER_REAL, GIVE_UP_S)
        return read(*arguments)
    except error as refusal:
        assert 0 < len(str(refusal)) < 2000 and not re.search("[Aa]llocate|MemoryError", str(refusal))
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture(autouse=True)
def guard():
    """No more memory than ``MOST_BYTES`` beyond what is taken already; a hang ends as a failure."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":  # elsewhere nobody enforces it
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_BYTES, before[1]))
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"hangs: not done after {GIVE_UP_S} s"))
    yield
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


# Checkpoints

TINY = CRNNConfig(2, hidden_size=4, gru_num_layers=1)
DECISION = {"threshold": -1.5, "smoothing_steps": 2, "refractory_s": 1.0, "scale": 0.5, "offset": 0.1}
DECISION |= {"fa_per_h": 0.5, "hours": 4.0}


def saved(config, precision: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model, convert = build(config).eval(), PRECISIONS[precision]
    sidecar = {"keyword": "sheila", "threshold": -1.25, "decision": DECISION}
    sidecar |= {"model": describe(config), "features": describe(FeatureConfig())}
    checkpoints.save(folder / "m.pt", convert(model) if convert else model, sidecar)
    return folder / "m.pt"


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> list[tuple[bytes, dict, bytes]]:
    """The torch file, description and compact file of checkpoints of several kinds."""
    found = []
    nets = [(TINY, "float32"), (CRNNConfig(2, hidden_size=4), "int8"), (TINY, "weight-int4"), (TINY, "float16")]
    nets += [(SeparableConfig((4, 4, 4)), "float32"), (TimeNetConfig((4, 4, 4)), "weight-int8")]
    for config, precision in [*nets, (BCResNetConfig(2), "float32")]:
        path = saved(config, precision, tmp_path_factory.mktemp("valid"))
        sidecar = json.loads(path.with_suffix(".json").read_text())
        found.append((path.read_bytes(), sidecar, path.with_suffix(".kws").read_bytes()))
    return found


@torch.no_grad()
def use(loaded) -> None:
    """What programs do with a model that was opened: nothing of it may fail but in a sentence."""
    if loaded is None:
        return
    model, sidecar = loaded
    features = checkpoints.features_of(sidecar)
    assert isinstance(sidecar.get("keyword") or "", str)
    assert isinstance(sidecar.get("threshold") or 0.0, int | float)
    opened(ValueError, read_decision, sidecar)
    logmel = torch.zeros(1, features.n_mels, 101, dtype=next(model.parameters(), torch.zeros(0)).dtype)
    assert model(logmel).shape == (1, 2)


def load_torch(path: Path, content: bytes, sidecar) -> tuple | None:
    """Open a torch file with a description that, where it can, has its checksum; None where it is refused."""
    path.write_bytes(content)
    if isinstance(sidecar, dict) and "sha256" in sidecar:
        sidecar = {**sidecar, "sha256": hashlib.sha256(content).hexdigest()}
    path.with_suffix(".json").write_bytes(sidecar if isinstance(sidecar, bytes) else json.dumps(sidecar).encode())
    loaded = opened(CheckpointError, checkpoints.load, path)
    use(loaded)
    return loaded


@torch.no_grad()
def use_published(path: Path) -> None:
    """Open a torch file without its description, and read a second with what is in it."""
    model = opened(CheckpointError, checkpoints.load_published, path)
    if model is not None:
        opened(ValueError, model, torch.zeros(1, 40, 101, dtype=next(model.parameters()).dtype))


@given(data=st.data())
@tries(60)
def test_a_damaged_torch_file(valid, tmp_path, data):
    content, sidecar, _ = data.draw(st.sampled_from(valid))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = data.draw(st.sampled_from(list(parts)))
    parts[name] = data.draw(damaged(parts[name]))
    rewritten = io.BytesIO()
    with zipfile.ZipFile(rewritten, "w") as archive:
        for part, inside in parts.items():
            archive.writestr(part, inside)
    for attempt in (rewritten.getvalue(), data.draw(damaged(content))):
        load_torch(tmp_path / "m.pt", attempt, sidecar)
        use_published(tmp_path / "m.pt")


@given(data=st.data())
@tries(90)
def test_a_description_that_lies(valid, tmp_path, data):
    content, sidecar, _ = data.draw(st.sampled_from(valid))
    load_torch(tmp_path / "m.pt", content, data.draw(changed(sidecar) | json_like(sidecar)))


@pytest.mark.parametrize("content", [DEEP, LONG_NUMBER, b'{"model": ' + DEEP, b"\xff\xfe{}"], ids=lambda c: c[:10])
def test_a_description_that_is_no_json(valid, tmp_path, content):
    assert load_torch(tmp_path / "m.pt", valid[0][0], content) is None


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 10**6},
        {"gru_num_layers": 10**6},
        {"stride": [0, 8]},
        {"cell": "tcn"},
        {"num_classes": 1},
        "CRNN",
    ],
    ids=str,
)
def test_a_description_of_a_net_that_is_not_there(valid, tmp_path, sizes):
    content, sidecar, _ = valid[0]
    model = {**sidecar["model"], **sizes} if isinstance(sizes, dict) else sizes
    assert load_torch(tmp_path / "m.pt", content, {**sidecar, "model": model}) is None


class Bomb:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return (os.system, (self.command,))


def test_code_in_a_torch_file_does_not_run(valid, tmp_path):
    bomb = Bomb(f"touch '{tmp_path / 'ran'}'")
    for state in (bomb, {"conv.0.weight": bomb}, {"model": {"x": [bomb]}}):
        for zipped in (True, False):
            torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
            with pytest.raises(CheckpointError, match="is not a checkpoint of this project"):
                checkpoints.load_published(tmp_path / "m.pt")
            assert load_torch(tmp_path / "m.pt", (tmp_path / "m.pt").read_bytes(), valid[0][1]) is None
    assert not (tmp_path / "ran").exists()


HUGE = 10**12  # numbers
with torch.sparse.check_sparse_tensor_invariants(False):
    SPARSE = torch.sparse_coo_tensor(size=(10**9, 10**9))
ODD_TENSORS = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(HUGE, 0),
        torch.zeros(1).expand(HUGE),
        torch.zeros(1).expand(10**6, 10**6),
        torch.zeros(1).expand(2, 1, 5, 20),
        SPARSE,
        torch.zeros(2, 1, 5, 20, device="meta"),
        torch.zeros(2, 4, dtype=torch.complex64),
        torch.zeros(2, 4, dtype=torch.bool),
        torch.zeros(2, 4, dtype=torch.float64),
        torch.zeros(2, 4, dtype=torch.float8_e4m3fn),
        torch.quantize_per_tensor(torch.ones(2, 4), 0.1, 0, torch.qint8),
        torch.quantize_per_tensor(torch.ones(2, 4), 0.1, 0, torch.quint8),
        torch.quantize_per_tensor(torch.ones(12, 4), float("nan"), 0, torch.qint8),
        torch.quantize_per_channel(torch.ones(12, 4), torch.ones(12), torch.zeros(12), 0, torch.qint8),
        torch.full((2,), torch.nan),
        torch.nn.Parameter(torch.zeros(2)),
        {},
        {"conv.0.weight": torch.zeros(1)},
        None,
        7,
        "x",
        [torch.zeros(1)],
    ]
)


@given(data=st.data())
@tries(60)
def test_weights_of_odd_shapes_and_kinds(valid, tmp_path, data):
    content, sidecar, _ = data.draw(st.sampled_from(valid))
    state = torch.load(io.BytesIO(content), weights_only=True)
    for name in data.draw(st.lists(st.sampled_from(list(state)), min_size=1, max_size=3)):
        state[name] = data.draw(ODD_TENSORS)
    for key in data.draw(st.lists(st.sampled_from([0, None, ("x", 1), "x", "model", "state_dict"]), max_size=1)):
        state[key] = data.draw(ODD_TENSORS)
    torch.save(state, tmp_path / "m.pt")
    load_torch(tmp_path / "m.pt", (tmp_path / "m.pt").read_bytes(), sidecar)
    use_published(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "state",
    [
        {"conv.0.weight": torch.zeros(HUGE, 0, 5, 20), "conv.0.bias": torch.zeros(1).expand(HUGE)},
        {"conv.0.weight": torch.zeros(1_000_000, 0, 5, 20), "gru.weight_ih_l0": torch.zeros(0, 18_000_000)},
        {"gru.weight_hh_l0": torch.zeros(0, 0)},
        {"conv.0.weight": torch.zeros(0, 1, 5, 20)},
        {"gru.weight_hh_l0": torch.zeros(1).expand(300_000, 100_000)},
        {"classifier.weight": torch.zeros(1).expand(2, 10**10)},
        {0: torch.zeros(1)},
        {"classifier.weight": torch.zeros(2, 64, dtype=torch.float8_e4m3fn)},
        {"x": SPARSE},
    ],
    ids=lambda state: next(iter(state)),
)
def test_a_published_file_of_weights_that_are_not_there(tmp_path, state):
    torch.save({**build(CRNNConfig()).state_dict(), **state}, tmp_path / "m.pt")
    assert opened(CheckpointError, checkpoints.load_published, tmp_path / "m.pt") is None


def test_a_torch_file_that_grows_when_it_is_unpacked(tmp_path):
    torch.save(build(CRNNConfig()).state_dict(), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, bytes(300_000_000) if name.endswith("data/0") else content)
    with pytest.raises(CheckpointError, match="larger than the file"):
        checkpoints.load_published(tmp_path / "bomb.pt")


def repacked(content: bytes, header: bytes, body: bytes | None = None) -> bytes:
    """A compact file with another description and other weights, and a checksum that fits."""
    end = 6 + struct.unpack("<H", content[4:6])[0]
    body = content[end:-4] if body is None else body
    fresh = content[:4] + struct.pack("<H", min(len(header), 65_535)) + header + body
    return fresh + struct.pack("<I", zlib.crc32(fresh))


def described_in(content: bytes) -> bytes:
    return content[6 : 6 + struct.unpack("<H", content[4:6])[0]]


@given(data=st.data())
@tries(120)
def test_a_damaged_compact_file_with_a_checksum_that_fits(valid, tmp_path, data):
    _, _, content = data.draw(st.sampled_from(valid))
    described = described_in(content)
    body = content[6 + len(described) : -4]
    attempt = data.draw(
        st.one_of(
            json_like(json.loads(described)).map(lambda header: repacked(content, header)),
            damaged(body).map(lambda other: repacked(content, described, other)),
            damaged(content[4:-4]).map(lambda c: b"KWS1" + c + struct.pack("<I", zlib.crc32(b"KWS1" + c))),
        )
    )
    (tmp_path / "m.kws").write_bytes(attempt)
    use(opened(CheckpointError, checkpoints.load, tmp_path / "m.kws"))


@pytest.mark.parametrize(
    "model",
    [
        {"class": "SeparableConfig", "channels": [], "kernels": [], "strides": []},
        {"class": "CRNNConfig", "gru_num_layers": 100_000, "hidden_size": 1},
        {"class": "SeparableConfig", "channels": [1] * 9_000, "kernels": [1] * 9_000, "strides": [1] * 9_000},
    ],
    ids=["empty", "deep", "long"],
)
def test_a_compact_file_of_a_net_that_cannot_be_built(valid, tmp_path, model):
    header = json.dumps({"precision": "float32", "model": model}, separators=(",", ":")).encode()
    (tmp_path / "m.kws").write_bytes(repacked(valid[0][2], header, bytes(10_000_000)))
    assert opened(CheckpointError, checkpoints.load, tmp_path / "m.kws") is None


@given(described=changed({"decision": DECISION}))
@example({"decision": DECISION | {"threshold": None}})
@tries(100)
def test_a_decision_that_makes_no_sense(described):
    made = opened(ValueError, read_decision, described if isinstance(described, dict) else {})
    if made is not None:
        said = list(made.watch([(0.1, 0.0), (0.2, 5.0), (0.3, float("nan"))]))
        assert len(said) == 3 and 0 <= made.probability(said[1][1]) <= 1


# Archives

NAME = "speech_commands_v0.01"
NAMES_IN_ARCHIVES = st.one_of(
    st.sampled_from(["go/a.wav", "go", "./go/b.wav", "..", "../x", "/x", "go/../../x", ".", "", "go//a", "go/a.wav/b"]),
    st.sampled_from(["\0", "a\0b", "\udcff/x", "e\u0301", "\u202egpj.exe", "x" * 300, "a/" * 3000, "..\\x", "C:\\x"]),
    st.text(max_size=20),
)


def unpacked(folder: Path, content: bytes) -> list[str]:
    """Unpack an archive; whatever it is, nothing appears but the dataset, and that only when it is whole."""
    folder.mkdir(exist_ok=True)
    (folder / f"{NAME}.tar.gz").write_bytes(content)
    before = {str(p) for p in folder.parent.rglob("*")}
    opened(DownloadError, speech_commands._unpack, folder / f"{NAME}.tar.gz", folder / NAME)
    made = {str(p.relative_to(folder.parent)) for p in folder.parent.rglob("*") if str(p) not in before}
    assert all(name.startswith(f"{folder.name}/{NAME}") for name in made)
    assert not (folder / f"{NAME}.tmp").exists() and not (folder / NAME).is_file()
    shutil.rmtree(folder / NAME, ignore_errors=True)
    return sorted(made)


@st.composite
def archives(draw) -> bytes:
    """An archive whose members are strange in name, kind, size or extended header."""
    buffer = io.BytesIO()
    style = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    with tarfile.open(fileobj=buffer, mode="w", format=style, errors="surrogatepass") as tar:
        for _ in range(draw(st.integers(1, 3))):
            info, content = tarfile.TarInfo("go/a.wav"), draw(st.binary(max_size=50))
            info.size = len(content)
            if draw(st.booleans()):
                info.type = draw(st.sampled_from([bytes([i]) for i in b"01234567LKSxgX\0"]))
                info.linkname = draw(st.sampled_from(["", "/etc/hostname", "../../x", "go/a.wav"]))
            name, path = draw(NAMES_IN_ARCHIVES), draw(NAMES_IN_ARCHIVES)
            if style == tarfile.PAX_FORMAT and draw(st.booleans()):
                values = st.sampled_from(["-1", "-512", "1e9", "x", "", str(10**30), "1000000000000", "nan", path])
                keys = ["path", "size", "linkpath", "mtime", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major"]
                keys += ["GNU.sparse.minor", "GNU.sparse.realsize", "GNU.sparse.numblocks", "GNU.sparse.name"]
                info.pax_headers = draw(st.dictionaries(st.sampled_from(keys), values, max_size=3))
            else:
                info.name = name
            try:
                tar.addfile(info, io.BytesIO(content))
            except (ValueError, OSError):  # what cannot be written
                pass
    content = buffer.getvalue()
    if draw(st.booleans()):  # a field of the first header changed, with a checksum that fits
        at = draw(st.integers(0, 500))
        block = (content[:at] + draw(PIECES) + content[at + 8 :])[:512].ljust(512, b"\0")
        summed = 256 + sum(block[:148]) + sum(block[156:])
        content = block[:148] + b"%06o\0 " % summed + block[156:] + content[512:]
    return content


@given(data=st.data())
@tries(100)
def test_an_archive_with_strange_members(tmp_path, data):
    content = data.draw(archives())
    packed = gzip.compress(content, 1, mtime=0)
    unpacked(tmp_path / "downloads", data.draw(st.just(packed) | damaged(packed)))


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def archive(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        archive((".", b"x")),
        archive(),
        archive(("go", b"x"), ("go/a.wav", b"x")),
        archive(("go/a.wav", b"x"), ("go/b.wav", b"x"))[:1024],
        archive(("go/a.wav", b"x"))[:1024] + b"garbage " * 256,
        header("go/a.wav", 0, b"x") * 2000,
        archive(("go/" * 3000, b"x")),
        archive(("\u00e9\0/a.wav", b"x")),
    ],
    ids=["the folder as a file", "empty", "file and folder", "cut", "garbage", "headers", "long name", "NUL"],
)
def test_an_archive_that_is_not_whole_is_not_taken_for_a_dataset(tmp_path, content):
    assert unpacked(tmp_path / "downloads", gzip.compress(content)) == []


def test_a_sparse_member_of_a_terabyte(tmp_path):
    described = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)}
    info = tarfile.TarInfo("go/a.wav")
    info.pax_headers, info.size = described, 512
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"0\n".ljust(512, b"\0")))
    assert unpacked(tmp_path / "downloads", gzip.compress(buffer.getvalue())) == []


@pytest.mark.parametrize(
    "content",
    [
        header("go/a.wav", 8 * 2**40),
        header("go/a.wav", -512),
        header("go/a.wav", -512, b"x"),
        header("go/a.wav", -512, b"V"),
        header("././@LongLink", 2**50, b"L"),
        header("././@PaxHeader", 2**50, b"x"),
    ],
    ids=["huge", "negative", "negative pax", "negative unknown", "huge name", "huge pax"],
)
def test_an_archive_that_lies_about_sizes(tmp_path, content):
    assert unpacked(tmp_path / "downloads", gzip.compress(content + bytes(2048))) == []


# Splits


@pytest.fixture
def corpus(folder) -> corpora.Corpus:
    return corpora.load(str(folder), "go")


def load_split(corpus, content: bytes, meta: bytes | None = None) -> None:
    """Load a split file with a description that has its checksum, or with another one."""
    path = paths.split_csv(corpus.name, "speaker")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    digest = splits._digest(content.decode(errors="replace"))
    path.with_suffix(".json").write_bytes(json.dumps({"sha256": digest}).encode() if meta is None else meta)
    split = opened(SplitError, splits.load, corpus, "go", "speaker")
    assert split is None or len(split.train) + len(split.val) + len(split.test) == len(corpus.clips)


@given(data=st.data())
@tries(60)
def test_a_split_that_was_tampered_with(corpus, data):
    content = splits.assign(corpus.planned, "speaker").to_csv(index=False).encode()
    lines = content.splitlines(keepends=True)
    line = data.draw(st.integers(0, len(lines) - 1))
    cells = ["=cmd|'/C calc'!A0,train", "../../x.wav,train", "go/s00_nohash_0.wav,train,train"]
    cells += ['"', '"a\n', "\0,\0", "x", ","] + [
        "clip,subset,clip",
        "clip,clip",
        "subset",
        "Clip,Subset",
        "\ufeffclip,subset",
        "go/s00_nohash_0.wav,",
    ]
    other = data.draw(st.sampled_from(cells) | st.text(max_size=20)).encode(errors="surrogatepass")
    tampered = b"".join([*lines[:line], other, b"\n", *lines[line + data.draw(st.integers(0, 1)) :]])
    load_split(corpus, data.draw(st.just(tampered) | damaged(content)))
    meta = {"corpus": "tones", "split": "speaker", "clips": 24, "sha256": hashlib.sha256(content).hexdigest()}
    load_split(corpus, content, data.draw(json_like(meta)))


@pytest.mark.parametrize(
    "content",
    [b"clip,subset" + b",x" * 1_000_000 + b"\n", b"clip,subset\n" + b"x," * 1_000_000, b"\0" * 1_000_000]
    + ["clip,subset\ngo/s00_nohash_0.wav,train\n".encode("utf-16"), "clip,subset\n\xe9,train\n".encode("latin-1")],
    ids=["columns", "cells", "zeros", "utf-16", "latin-1"],
)
def test_a_split_that_is_no_table_of_clips(corpus, content):
    load_split(corpus, content)


def test_a_description_of_a_split_that_never_ends(corpus):
    load_split(corpus, b"clip,subset\n", DEEP)


# Streams

SPEC = {"seed": 1, "minutes": 1, "words_per_minute": 30.0, "keyword_share": 0.5, "snr_db": [0, 10], "noise": ["pink"]}
SPEC |= {"noise_db": -40.0, "keyword_times_s": [1.5], "fa_per_h": 0.5}


def read_and_render(path: Path, corpus, content: bytes) -> None:
    """Whatever is a specification can be rendered, here its first three seconds."""
    path.write_bytes(content)
    spec = opened(SpecError, tracks.read_spec, path)
    if spec is not None:
        short = dataclasses.replace(spec, minutes=0.05)
        (track,) = opened(SpecError, list, tracks.render(corpus, range(len(corpus.clips)), "go", short))
        assert len(track.samples) == 3 * SAMPLE_RATE and np.isfinite(track.samples).all()


@given(data=st.data())
@example(data=None)
@tries(100)
def test_a_specification_of_no_stream(corpus, tmp_path, data):
    odd = [{"noise": ""}, {"noise": {}}, {"keyword_times_s": ""}, {"noise_db": 1e308}, {"snr_db": [-1e308, 1e308]}]
    odd += [{"words_per_minute": 5e-324, "minutes": 10_000}, {"seed": 10**400}, {"minutes": 10**400}, {"noise": [[]]}]
    odd += [{"keyword_times_s": [1.0] * 100_000}]
    contents = (
        [data.draw(json_like(SPEC))] if data else [*(json.dumps(SPEC | o).encode() for o in odd), DEEP, LONG_NUMBER]
    )
    for content in contents:
        read_and_render(tmp_path / "spec.json", corpus, content)


# Audio

FORMATS = [
    ("wav", "PCM_16"),
    ("wav", "FLOAT"),
    ("wav", "ULAW"),
    ("wav", "IMA_ADPCM"),
    ("flac", "PCM_16"),
    ("ogg", "VORBIS"),
]
FORMATS += [("mp3", "MPEG_LAYER_III"), ("aiff", "PCM_16"), ("au", "PCM_16"), ("caf", "PCM_16"), ("w64", "PCM_16")]


def recording(suffix: str, subtype: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (2000, 2))
    soundfile.write(buffer, noise, SAMPLE_RATE, format=suffix.upper(), subtype=subtype)
    return buffer.getvalue()


def read_recording(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    samples = opened(audio.AudioError, audio.read, path)
    if samples is not None:
        assert samples.dtype == np.float32 and samples.ndim == 1 and np.isfinite(samples).all() and samples.any()


@given(data=st.data())
@tries(200)
def test_a_recording_whose_header_lies(tmp_path, data):
    suffix, subtype = data.draw(st.sampled_from(FORMATS))
    read_recording(tmp_path / f"a.{suffix}", data.draw(damaged(recording(suffix, subtype))))


@pytest.mark.parametrize("rate", [1, 999, 1009, 44_101, 191_999, 2**31 - 1])
def test_a_recording_of_an_odd_rate(tmp_path, rate):
    content = recording("wav", "PCM_16")
    assert content[24:28] == struct.pack("<I", SAMPLE_RATE)
    read_recording(tmp_path / "a.wav", content[:24] + struct.pack("<I", rate) + content[28:])


@pytest.mark.parametrize("promised", [2**31, 2**36 - 1])
def test_a_recording_that_promises_more_than_memory_holds(tmp_path, promised):
    content = bytearray(recording("flac", "PCM_16"))
    content[21:26] = ((content[21] >> 4 << 36) | promised).to_bytes(5, "big")
    (tmp_path / "a.flac").write_bytes(content)
    assert opened(audio.AudioError, audio.read, tmp_path / "a.flac") is None


def test_a_recording_of_hours_of_silence_in_a_few_kilobytes(tmp_path):
    with soundfile.SoundFile(tmp_path / "a.flac", "w", SAMPLE_RATE, 1) as file:
        for _ in range(20):
            file.write(np.zeros(1_000_000, np.int16))
    with pytest.raises(audio.AudioError, match="no recording is so long in so few bytes"):
        audio.read(tmp_path / "a.flac")


@pytest.mark.parametrize("loud", [3e38, float("inf"), float("nan")])
def test_a_recording_that_is_too_loud_for_numbers(tmp_path, loud):
    soundfile.write(tmp_path / "a.wav", np.full((100, 2), loud, np.float32), 8000, subtype="FLOAT")
    with pytest.raises(audio.AudioError, match="not numbers, or far too large"):
        audio.read(tmp_path / "a.wav")


# Records

SCRIPT = "<script>alert('x')</script> **<b onclick=x>** & \"'"


def record(experiment: str = "baseline", seed: int = 0) -> dict:
    point = {"stream": "ordinary", "state": "carried", "asked_fa_per_h": 0.5, "miss_rate": 0.1, "val_miss_rate": 0.1}
    point |= {"fa_per_h": 0.25, "most_fa_per_h": 3.0, "keywords": 100, "false_alarms": 1, "other_hours": 4.0}
    point |= {"found": 90, "latency_s": 0.05, "threshold": 1.0, "smoothing_steps": 1}
    rest = {"stream": "noise", "asked_fa_per_h": None, "miss_rate": None, "val_miss_rate": None, "latency_s": None}
    found = {"schema": 1, "experiment": experiment, "seed": seed, "order": 0, "control": None, "note": ""}
    found |= {"keyword": "sheila", "profile": "smoke", "precision": "float32", "epochs": 1, "threshold": 0.0}
    found["features"] = {}
    found["metrics"] = {
        "au_fa_fr": 1e-5,
        "au_fa_fr_as_is": 2e-5,
        "au_fa_fr_val": 2e-5,
        "au_fa_fr_ci95": [0.0, 1e-4],
        "roc_auc": 0.9,
    }
    found["metrics"] |= {"n_keyword": 7, "n_other": 93, "n_speakers": 5, "bootstrap": [1e-5] * 4}
    found["metrics"]["streams"] = {"points": [point, point | rest]}
    found["cost"] = {"params": 10, "macs_per_clip": 100, "macs_per_second": 100, "macs_convention": "1 MAC"}
    found["cost"] |= {"state_dict_bytes": 4000, "weights_bytes": 2000, "compact_bytes": 2100}
    found["data"] = {
        "corpus": "synthetic",
        "split": "speaker",
        "corpus_fingerprint": "0" * 64,
        "split_sha256": "0" * 64,
    }
    found["run"] = dict.fromkeys(("python", "torch", "torchaudio", "numpy", "system", "device"), "1")
    found["run"] |= {"cores": 2, "latency_ms_per_clip": 0.5, "latency_ms_per_step": None, "wall_s": 1.0}
    return found


def write_report(folder: Path, content: bytes) -> str | None:
    """The page of a study with a sound record and this one."""
    (folder / "records").mkdir(parents=True, exist_ok=True)
    (folder / "records" / "baseline-seed0.json").write_text(json.dumps(record()))
    (folder / "records" / "a1-seed0.json").write_bytes(content)
    written = opened(RecordError, page.write, folder.name)
    ours = r'<script type="application/json" id="explored">.*?</script>|<script>\n/\* One plot .*?</script>'
    return None if written is None else re.sub(ours, "", written.read_text(), flags=re.DOTALL)


@given(content=json_like(record("a1")))
@example(DEEP)
@example(LONG_NUMBER)
@example(b"[]")
@example(b'{"schema": 1}')
@example(json.dumps(record("baseline")).encode())
@tries(60)
def test_a_record_with_odd_values(home, content):
    page = write_report(home / "reports" / "s", content)
    assert page is None or "<script" not in page


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("au_fa_fr", True),
        ("au_fa_fr_ci95", []),
        ("bootstrap", [1e-5]),
        ("roc_auc", "0.9"),
        ("streams", {"points": [1]}),
    ],
)
def test_a_record_with_metrics_that_make_no_table(home, key, value):
    found = record("a1")
    found["metrics"][key] = value
    assert write_report(home / "reports" / "s", json.dumps(found).encode()) is None
    del found["metrics"]["roc_auc"]
    assert write_report(home / "reports" / "s", json.dumps(found).encode()) is None
    assert write_report(home / "reports" / "s", json.dumps(record("a1") | {"keyword": "\ud800"}).encode()) is None


@pytest.mark.parametrize(("key", "value"), [("other_hours", 0), ("other_hours", 5e-324), ("miss_rate", None)])
def test_a_stream_on_which_nothing_could_be_counted(home, key, value):
    found = record("a1")
    for point in found["metrics"]["streams"]["points"]:
        point[key] = value
        point.pop("val_miss_rate")
    assert write_report(home / "reports" / "s", json.dumps(found).encode())


def text_places(value) -> list[tuple]:
    return [(inside, key) for inside, key in _places(value) if isinstance(inside[key], str)]


def test_no_text_of_a_record_becomes_part_of_the_page(home):
    """One after another: keyword, note, names of streams, versions; a name that is no file name is refused."""
    n_texts, shown = len(text_places(record("a1"))), 0
    for number in range(n_texts):
        found = record("a1")
        inside, key = text_places(found)[number]
        inside[key] = SCRIPT
        (home / "reports" / "s").mkdir(parents=True, exist_ok=True)
        page = write_report(home / "reports" / "s", json.dumps(found).encode())
        assert (page is None) == (key in ("experiment", "profile"))
        assert page is None or ("<script" not in page and "<b onclick" not in page)
        shown += page is not None and "&lt;script" in page
    assert shown >= 10


def test_the_line_that_repeats_a_study_is_safe_in_a_shell():
    found = record() | {"keyword": "x'; touch ran; '"}
    found["data"] |= {"corpus": "speech_commands_v0.0; touch ran", "split": "$(touch ran)"}
    words = shlex.split(page.command(found, 1))
    assert words[2:5] == ["CORPUS=speech_commands_v0.0; touch ran", "KEYWORD=x'; touch ran; '", "SPLIT=$(touch ran)"]


# Names

NAMES = st.text(max_size=300) | st.sampled_from(["..", ".", "", "/", "../../etc", "a/../..", "con", "NUL.txt", "a\0b"])
NAMES |= st.sampled_from(["x" * 5000, "é" * 200, "\ud800", "\u202e", "~root", "C:\\x", "-rf", "com1", "\u0130"])


@given(corpus=NAMES, keyword=NAMES, split=NAMES)
@tries(100)
def test_the_name_of_a_study_is_a_folder_in_its_place(home, corpus, keyword, split):
    name = paths.study_name(corpus, keyword, split)
    for folder in (paths.reports(name), paths.checkpoints(name), paths.split_csv(paths.slug(corpus), "speaker").parent):
        folder.mkdir(parents=True, exist_ok=True)
        assert folder.resolve() == folder and folder.parent.parent == home
    assert paths.slug(paths.slug(keyword)) == paths.slug(keyword)
    assert paths.slug(keyword).partition(".")[0] not in {"con", "nul", "com1"}


@pytest.mark.parametrize("name", ["..", ".", "", "/etc", "a/../../../x", "a\0b", "..\\x"])
def test_a_name_that_leads_elsewhere_is_refused(name):
    for place in (paths.reports, paths.checkpoints, page.write, page.publish):
        with pytest.raises(ValueError, match="is no name in|no records in"):
            place(name)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "~nobody-of-this-name/x", "\ud800"])
def test_a_folder_that_cannot_be_is_said_to_be_none(name):
    with pytest.raises(CorpusError, match="no corpus at|cannot be a folder"):
        corpora.load(name, "go")
