"""Which clip is for training, validation and test: recorded in ``data_splits/``, verified at every load.

A split depends on the recorded names alone, never on the order of files or on a random state.
``speaker``: no speaker in two subsets, about 60/20/20 of the clips; for Speech Commands and
synthetic speech their own rules.
``random``: 80/20 by clip, word by word, and the 20 % serve as val and test, as in the reports.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kwslib import paths
from kwslib.config import SPLITS
from kwslib.data.corpora import Corpus, speaker_of

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


class SplitError(ValueError):
    """The split does not exist, does not fit its corpus, or leaks; the message says what to do."""


@dataclass(frozen=True)
class Split:
    """Row numbers of a corpus for each subset, and the digest of the recorded file."""

    name: str
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    sha256: str


def _rank(name: str) -> str:
    """A fixed pseudo-random order of names, the same on every machine."""
    return hashlib.sha256(name.encode()).hexdigest()


def assign(clips: list[str], split: str, subset_of: Callable[[str], str] | None = None) -> pd.DataFrame:
    """Make the split: columns ``clip subset``, sorted by clip.

    ``speaker`` follows the corpus's own rule where it has one (``Corpus.subset_of``).

    >>> names = [f"go/s{i}_nohash_0.wav" for i in range(10)]
    >>> sorted(assign(names, "speaker")["subset"])
    ['test', 'test', 'train', 'train', 'train', 'train', 'train', 'train', 'val', 'val']
    """
    if split not in SPLITS:
        raise SplitError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    table = pd.DataFrame({"clip": sorted(clips)})
    if split == "random":
        of_word = table["clip"].map(_rank).rank().groupby(table["clip"].str.partition("/")[0])
        n = of_word.transform("size")
        n_train = (n - (0.2 * n).round().clip(lower=1)).clip(lower=1)  # one to test, if it is not the only one
        table["subset"] = np.where(of_word.rank() <= n_train, "train", "test")
        return table
    speaker = table["clip"].map(speaker_of)
    if subset_of is not None:
        table["subset"] = speaker.map(subset_of)
        return table
    counts = speaker.value_counts()
    ranked = sorted(counts.index, key=_rank)
    # A speaker belongs where the middle of its clips falls when all clips stand in a row.
    middle = counts[ranked].cumsum() - counts[ranked] / 2
    edges = np.cumsum(list(SHARES.values()))[:-1] * len(table)
    subset = dict(zip(ranked, np.array(list(SHARES))[np.searchsorted(edges, middle)].tolist(), strict=True))
    table["subset"] = speaker.map(subset)
    return table


def load(corpus: Corpus, keyword: str, split: str) -> Split:
    """The recorded split of a corpus, made on first use if it is usable, and verified on every one.

    Raises:
        SplitError: the recorded file was edited, names other clips than the corpus holds,
            shares a speaker between subsets, or leaves a subset without the keyword.
    """
    path = paths.split_csv(corpus.name, split)
    if path.exists():
        return _usable(corpus, keyword, split, *_recorded(corpus, split), where=str(path))
    table = assign(corpus.planned, split, corpus.subset_of)
    text = table.to_csv(index=False)
    subset = table.set_index("clip")["subset"]
    # Only a usable one is recorded: more recordings, the remedy for all others, would not fit it.
    usable = _usable(corpus, keyword, split, subset, _digest(text), where=f"the {split} split of {corpus.name}")
    paths.write_atomically(path, text)
    meta = {"corpus": corpus.name, "split": split, "clips": len(table), "sha256": _digest(text)}
    if corpus.subset_of is None:  # a folder: others may be called so, too
        meta["corpus_fingerprint"] = corpus.fingerprint
    paths.write_json(path.with_suffix(".json"), meta)
    return usable


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _recorded(corpus: Corpus, split: str) -> tuple[pd.Series, str]:
    """Subsets by clip and the digest of the file, if that is as it was written and fits the corpus."""
    path = paths.split_csv(corpus.name, split)
    again = f"delete {path} (and its .json) to make a new one"
    try:
        meta = json.loads(path.with_suffix(".json").read_bytes())
        recorded, made_of = meta["sha256"], meta.get("corpus_fingerprint")
        text = path.read_text("utf-8")
        header, *rows = csv.reader(io.StringIO(text))
        if header != ["clip", "subset"] or any(len(row) != 2 for row in rows):
            raise ValueError("it must have two columns, clip and subset")
        subset = pd.DataFrame(rows, columns=header).set_index("clip")["subset"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, csv.Error) as error:
        raise SplitError(f"the split {path} cannot be read ({error}): {again}") from None
    if _digest(text) != recorded:
        raise SplitError(f"the split {path} was changed after it was recorded: restore it, or {again}")
    if subset.index.has_duplicates or not set(subset) <= set(SHARES):
        raise SplitError(f"the split {path} names a clip twice or an unknown subset: {again}")
    only_corpus = len(set(corpus.planned) - set(subset.index))
    only_split = len(set(subset.index) - set(corpus.planned))
    if only_corpus or only_split or made_of not in (None, corpus.fingerprint):
        differ = f"{only_corpus} clips are new, {only_split} are gone"
        if not (only_corpus or only_split):
            differ = "clips or noise have the names they had, but sound different"
        raise SplitError(
            f"the split {path} does not fit the corpus {corpus.name}: {differ}. "
            f"{_way_out(corpus, made_of)}, or {again}; results of this name are then replaced by new ones"
        )
    rows = corpus.clips["clip"].map(subset)
    if split == "speaker":
        shared = rows.groupby(corpus.clips["speaker"]).nunique() > 1
        if shared.any():
            raise SplitError(f"speaker {shared.idxmax()!r} is in two subsets of {path}: {again}")
    return subset, recorded


def _way_out(corpus: Corpus, made_of: str | None) -> str:
    """What to do when a corpus is not the one that its split was made of: the same folder, or one of the same name?"""
    folders = {}  # as the prepared corpora remember them
    for file in paths.data().glob(f"{corpus.name}-*/meta.json"):
        with suppress(OSError, ValueError, LookupError):
            meta = json.loads(file.read_bytes())
            folders[file.parent] = meta.get("root"), meta["fingerprint"]
    this = folders.get(corpus.folder, (None,))[0]
    made_for = {root for root, fingerprint in folders.values() if root and fingerprint == made_of}
    apart = "rename one of the two, or set KWS_HOME to another folder"
    if this in made_for:
        return "This folder was changed since: restore it"
    if this and made_for:
        return f"It was made for {min(made_for)}: {apart}"
    return f"If another folder called {corpus.name} made it, {apart}. If this one was changed, restore it"


def _usable(corpus: Corpus, keyword: str, split: str, subset: pd.Series, digest: str, where: str) -> Split:
    """The split, if all of its parts have enough of the keyword and of other words."""
    rows = corpus.clips["clip"].map(subset)
    train, val, test = (np.flatnonzero(rows == name) for name in SHARES)
    result = Split(split, train, test if split == "random" else val, test, digest)
    who = "speakers" if split == "speaker" else "clips"  # a split by clip works with one speaker, too
    advice = "record more"
    if split == "speaker":
        known_by = "the name before the first _ of a file is its speaker, or the folder in <word>/<speaker>/<file>"
        advice = f"record more speakers ({known_by}), or use SPLIT=random"
    is_keyword = corpus.is_keyword(keyword)
    for name in SHARES:
        rows_of_part = getattr(result, name)
        spoken = corpus.clips.iloc[rows_of_part[is_keyword[rows_of_part]]]
        found = spoken["speaker" if split == "speaker" else "clip"].nunique()
        if found < 2:
            raise SplitError(
                f"the {name} part of {where} has {found} {who} of {keyword!r}, at least 2 are needed: {advice}"
            )
        if len(spoken) == len(rows_of_part):
            raise SplitError(f"the {name} part of {where} has no other words than {keyword!r}: record some")
    return result


def counts(corpus: Corpus, split: Split, keyword: str) -> pd.DataFrame:
    """Clips, keyword clips and speakers of each subset."""
    is_keyword = corpus.is_keyword(keyword)
    rows = {}
    for name in SHARES:
        index = getattr(split, name)
        rows[name] = {
            "clips": len(index),
            "keyword clips": int(is_keyword[index].sum()),
            "speakers": corpus.clips["speaker"].iloc[index].nunique(),
            "speakers of the keyword": corpus.clips["speaker"].iloc[index][is_keyword[index]].nunique(),
        }
    return pd.DataFrame(rows).T


def leaks(corpus: Corpus, split: Split) -> pd.DataFrame:
    """What two subsets share: identical recordings (by content), speakers, and the share of clips by them."""
    rows = {}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        first, second = corpus.clips.iloc[getattr(split, a)], corpus.clips.iloc[getattr(split, b)]
        rows[f"{a} / {b}"] = {
            "identical recordings": int(second["content"].isin(first["content"]).sum()),
            "shared speakers": len({*first["speaker"]} & {*second["speaker"]}),
            "clips of known speakers": float(second["speaker"].isin(first["speaker"]).mean()),
        }
    return pd.DataFrame(rows).T.astype({"identical recordings": int, "shared speakers": int})


def meaning_of_leaks(corpus: Corpus, split: Split) -> str:
    """One sentence: what the test part of this split can tell, and what not."""
    known = leaks(corpus, split).loc["train / test", "clips of known speakers"]
    if not corpus.names_tell_speakers:
        return (
            "**The file names tell no speakers** (a speaker is what stands before the first `_`, or a folder in the "
            "word's), so the same person may be in all parts: the results say how the model does on people it knows."
        )
    if known == 0:
        return (
            "By the names of files and folders, no test speaker was heard in training: the results say how the model "
            "does on people it has never heard."
        )
    return (
        f"**{known:.1%} of the test clips are by speakers who also speak in training**: the results say how the model "
        "does on people it knows, and flatter it for everybody else."
    )
