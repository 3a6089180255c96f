"""The published models to take: a list, and the one that a command takes when none is named."""

import argparse
import json
import sys
from pathlib import Path

from kwslib import paths
from kwslib.cli import show

HOME = paths.ROOT / "checkpoints" / "reference"
PURPOSE = {"score": "clips", "export": "smallest"}  # of a command; the others take the one for streams


def published() -> list[dict]:
    """``study, keyword, purpose, file`` of each model of ``recommended.json``; studies of people come first.

    Without the repository there are none.
    """
    listed = HOME / "recommended.json"
    if not listed.exists():
        return []
    rows = []
    for study, files in sorted(json.loads(listed.read_bytes()).items(), key=lambda of: of[0].startswith("synthetic-")):
        for purpose, file in files.items():
            keyword = json.loads((HOME / file).with_suffix(".json").read_bytes())["keyword"]
            rows.append({"study": study, "keyword": keyword, "purpose": purpose, "file": HOME / file})
    return rows


def take(options: argparse.Namespace) -> Path:
    """The checkpoint that was named, or else the recommended one for this command; says which on stderr.

    Raises:
        ValueError: there is none, or none for that keyword.
    """
    chosen = getattr(options, "keyword", None)
    if options.checkpoint is not None:
        if chosen and options.command != "evaluate":
            raise ValueError("--keyword chooses one of kws models, --checkpoint names a file: give one of them")
        return options.checkpoint
    on_clips = options.command == "evaluate" and options.negatives is None and options.stream is None
    purpose = "clips" if on_clips else PURPOSE.get(options.command, "stream")
    rows = [row for row in published() if row["purpose"] == purpose]
    if not rows:
        raise ValueError("--checkpoint is needed: the recommended models come with the repository, and it is not here")
    row = next((row for row in rows if chosen in (None, row["keyword"])), None)
    if row is None:
        known = ", ".join(dict.fromkeys(row["keyword"] for row in rows))
        raise ValueError(
            f"no published model for {chosen!r}, only for {known}: name a file with --checkpoint; "
            "make detector KEYWORD=WORD makes a detector of another word"
        )
    said = f"taken: {row['file'].name} of {row['study']}, recommended for {row['keyword']!r}, {purpose}"
    print(f"{said} (kws models lists all)", file=sys.stderr)
    return row["file"]


def kws_models(options: argparse.Namespace) -> None:
    """What to take for what: file, bytes, what it finds and a command to begin with."""
    from kwslib.results import page, records, tables

    rows = published()
    for row in rows:
        file = row["file"]
        record = paths.published("reports", row["study"]) / "records" / f"{file.stem}.json"
        found = tables.finds(records.read(record)) if record.exists() else ("–", "–")
        _, command, last = page.FOR[row["purpose"]]
        row |= {"file": str(file), "bytes": file.stat().st_size, "found": found[0], "false_alarms": found[1]}
        row["command"] = f".venv/bin/kws {command} --keyword {row['keyword']} {last}"
    if options.json:
        show(rows, as_json=True)
        return
    if not rows:
        raise ValueError("no recommended models here: they come with the repository")
    for study in dict.fromkeys(row["study"] for row in rows):
        print(f"{study}: each file chosen on val; what it finds in the test part")
        for row in (row for row in rows if row["study"] == study):
            name = f"{row['keyword']}, {row['purpose']}"
            print(f"  {name:<18} {Path(row['file']).name:<30} {row['bytes']:>6,} bytes  {row['command']}")
            print(f"  {'':<18} finds {row['found']}, false alarms: {row['false_alarms']}")
