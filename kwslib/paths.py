"""Where things live. Every path in notebooks, rooms and tests comes from here.

Outputs go to the repository, whatever directory a kernel was started in; set ``KWS_HOME`` to
keep a run's data, splits, checkpoints and reports elsewhere (the tests do). Where this package was
installed without its repository, they go to the working directory.
"""

import hashlib
import json
import os
import re
import shutil
import unicodedata
import uuid
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 80  # of a slug: a study's name has up to four, and no system takes more than 255


def label(experiment: str, seed: int) -> str:
    """The name of a run, with which those of its files begin.

    >>> label("a1-kd", 2), split_label("a1-kd-seed2")
    ('a1-kd-seed2', ('a1-kd', 2))
    """
    return f"{experiment}-seed{seed}"


def split_label(run: str) -> tuple[str, int]:
    """Experiment and seed of a run's label."""
    name, _, seed = run.rpartition("-seed")
    return name, int(seed)


def folder(typed: str) -> Path:
    """A folder as somebody wrote it: ``~`` is theirs, a relative one starts at the repository, wherever the kernel did.

    Of a package that was installed without its repository it starts at the working directory, as anywhere else.

    Raises:
        OSError, ValueError, RuntimeError: there can be no such folder.
    """
    in_checkout = (ROOT / "pyproject.toml").exists() and (ROOT / "notebooks").exists()
    return ((ROOT if in_checkout else Path.cwd()) / Path(typed).expanduser()).resolve()


def home() -> Path:
    """Folder that holds ``data/ data_splits/ checkpoints/ reports/`` of a run: ``KWS_HOME``, see ``folder``."""
    return folder(os.environ.get("KWS_HOME", ""))


def slug(name: str) -> str:
    """A name that is safe as a folder name on every system; of a long one the beginning and a digest.

    >>> slug("Zoom in!"), slug("speech_commands_v0.02"), slug("../con")
    ('zoom-in', 'speech_commands_v0.02', 'con-')
    """
    safe = re.sub(r"[^\w.-]+", "-", name.strip().lower()).strip("-.") or "unnamed"
    if len(safe.encode()) > MOST_BYTES:
        begin = safe.encode()[: MOST_BYTES - 9].decode(errors="ignore")
        safe = f"{begin}-{hashlib.sha256(safe.encode()).hexdigest()[:8]}"
    return re.sub(r"^(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)", r"\1-", safe)  # devices of Windows


def composed(name: str) -> str:
    """A name in Unicode's composed form: macOS writes é as e and an accent, others as one letter."""
    return unicodedata.normalize("NFC", name)


def printable(name: str) -> str:
    """The name of a file in a form that can be written down whatever bytes it has."""
    name = composed(name)
    return name if is_unicode(name) else ascii(name)


def is_unicode(name: str) -> bool:
    """False for a name whose bytes are not UTF-8, which Python keeps as surrogates."""
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in name)


def study_name(corpus: str, keyword: str, split: str) -> str:
    """The name under which all outputs of one corpus, keyword and split live.

    >>> study_name("synthetic", "sheila", "speaker")
    'synthetic-sheila-speaker'
    >>> study_name("/data/my words/", "zoom in", "random")
    'my-words-zoom-in-random'
    """
    spoken, plus, recorded = corpus.partition("+") if corpus.startswith("synthetic+") else ("", "", corpus)
    try:
        name = folder(recorded).name  # what . or ~ or a link means: the corpus and its split are called so, too
    except (OSError, ValueError, RuntimeError):  # ``corpora`` says what is wrong with it
        name = Path(recorded).name
    return "-".join(slug(part) for part in (spoken + plus + name, keyword, split))


def _inside(folder: Path, name: str) -> Path:
    """A folder or file of that name in one of a run's folders, never elsewhere.

    Raises:
        ValueError: the name leads out of it, or nowhere.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or "\\" in name:
        raise ValueError(f"{name!r} is no name in {folder}: give one like synthetic-sheila-speaker")
    return folder / path


def data() -> Path:
    """Prepared corpora: waveform stores and log-mels. Safe to delete."""
    return home() / "data" / "prepared"


def downloads() -> Path:
    """Datasets as they were published."""
    return home() / "data" / "downloads"


def stream_spec(name: str) -> Path:
    """The specification of a stream that comes with the repository."""
    return ROOT / "data_splits" / "streams" / f"{name}.json"


def clip_list(corpus_name: str) -> Path:
    """The clips, by name and samples, of a corpus that is part of another one; comes with the repository."""
    return ROOT / "data_splits" / corpus_name / "clips.csv"


def split_csv(corpus_name: str, split: str) -> Path:
    """The recorded split of a corpus."""
    return _inside(home() / "data_splits", f"{corpus_name}/{split}.csv")


def checkpoints(study: str) -> Path:
    """Trained models of a study."""
    return _inside(home() / "checkpoints", study)


def reports(study: str) -> Path:
    """Records, figures, notebooks and the report of a study."""
    return _inside(home() / "reports", study)


def published(kind: str, study: str) -> Path:
    """The ``checkpoints`` or ``reports`` of a study that came with the repository."""
    return ROOT / kind / "reference" / study


def require_space(folder: Path, n_bytes: int) -> None:
    """Refuse to start a large file that will not fit: a full disk under a memory map kills the process.

    Raises:
        OSError: the disk of ``folder`` has less room than that.
    """
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise OSError(
            f"{folder} needs {n_bytes / 1e6:,.0f} MB, its disk has {free / 1e6:,.0f} MB left: make room first"
        )


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write to a temporary name of one's own, then rename: a reader never sees half a file, nor two writers mixed.

    A killed writer leaves its ``.tmp`` behind, which the next holder of the folder removes (``processes``).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(path)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:  # a full disk, for example: give back what was taken of it
        temporary.unlink(missing_ok=True)
        raise


def temporary_for(path: Path) -> Path:
    """A name beside ``path`` that no other process uses, ending in ``.tmp``."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, sorted and indented, lists of numbers on one line each."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    write_atomically(path, text + "\n")
