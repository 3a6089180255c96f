"""Commands about sound: what a corpus holds, which microphones there are."""

import argparse
import json
import os
from pathlib import Path

from kwslib.cli import show


def kws_devices(options: argparse.Namespace) -> None:
    """The microphones there are."""
    from kwslib.streaming import listen

    found = listen.devices()
    lines = [f"{row['device']:3d}  {row['name']}{'  (default)' if row['default'] else ''}" for row in found]
    print(json.dumps(found) if options.json else "\n".join(lines or ["no microphone is connected"]))


def kws_corpus(options: argparse.Namespace) -> None:
    """What a corpus holds, and which files were left out."""
    from kwslib.data import corpora

    keyword = options.keyword and corpora.clean_keyword(options.corpus, options.keyword)
    corpus = load_corpus(options.corpus, keyword)
    if options.json:
        left_out = corpus.unusable.to_dict("records")
        print(json.dumps({**corpus.summary().to_dict(), "fingerprint": corpus.fingerprint, "left_out": left_out}))
        return
    show({**corpus.summary().to_dict(), "prepared in": corpus.folder}, as_json=False)
    for clip, reason in corpus.unusable.head(20).itertuples(index=False):
        print(f"  left out: {clip}: {reason}")
    if len(corpus.unusable) > 20:
        print(f"  and {len(corpus.unusable) - 20} more: {corpus.folder / 'unusable.csv'}")


def load_corpus(argument: str, keyword: str | None):
    """A corpus of a known name, or of a folder relative to the shell."""
    from kwslib.data import corpora

    return corpora.load(as_in_shell(argument), keyword)


def as_in_shell(argument: str) -> str:
    """A known name, nothing, or a folder that starts where the shell is, as with any command line tool."""
    from kwslib.data import corpora

    known = not argument or argument in corpora.NAMES
    return argument if known else str(Path(os.path.expanduser(argument)).absolute())
