"""``kws``: score, measure and stream from a shell. ``--json`` prints for programs; bad input exits with 2.

Here stands what can be typed. What a command does stands in a file that is imported when it is called, so that none
waits for what another one needs:

``sounds``     commands that need no model
``models``     the published ones to take
``detectors``  commands that read one
``studies``    those that run and show studies
"""

import argparse
import importlib
import json
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from kwslib import __version__, processes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 when part of a study failed, or 2 after a sentence that says why."""
    if hasattr(sys.stdout, "reconfigure"):  # a narrow terminal shows \\xe9 for an é; stderr does so by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    if sys.stderr is None or not sys.stderr.isatty():  # before tqdm is imported: in a file, a bar is one endless line
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        room, name = options.run
        return getattr(importlib.import_module(f"kwslib.cli.{room}"), name)(options) or 0
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, processes.Busy, zipfile.BadZipFile) as error:
        print(f"kws {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = options.command in ("reproduce", "sweep", "people", "make")
        kept = "; what was finished is kept, the same command goes on" if goes_on else ""
        print(f"kws {options.command}: stopped{kept}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kws", description="Small-footprint keyword spotting.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, room: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=(room, f"kws_{name}"))
        return added

    def of_a_model(name: str, text: str) -> argparse.ArgumentParser:
        added = command(name, "detectors", text)
        which = "a .pt or .kws file of this project, or a plain state dict with the names of the reports"
        added.add_argument("--checkpoint", type=_path, metavar="P", help=f"{which} (default: the recommended one)")
        if name != "evaluate":
            added.add_argument("--keyword", metavar="W", help="whose recommended model to take, see kws models")
        if name != "stream":  # published models were trained on frames that look ahead
            added.add_argument("--mel-stride", type=int, metavar="N", help="of a plain state dict, where ambiguous")
            added.add_argument("--frame-stride", type=int, default=8, metavar="N", help="of a plain state dict (8)")
        return added

    score = of_a_model("score", "probability of the keyword in audio files")
    score.add_argument("files", nargs="+", type=_path, metavar="FILE", help="WAV or FLAC, any rate; its loudest second")
    price = of_a_model("cost", "parameters, MACs and bytes of a model")
    evaluate = of_a_model("evaluate", "AU-FA-FR of a model on recordings; of others than the keyword, the FA rate")
    on = evaluate.add_mutually_exclusive_group(required=True)
    on.add_argument("--corpus", metavar="C", help="a folder <root>/<word>/*.wav, or a known name")
    on.add_argument("--negatives", type=_path, metavar="FOLDER",
                    help="long recordings without the keyword: false alarms per hour")  # fmt: skip
    evaluate.add_argument("--cut", type=_path, metavar="DIR", help="write two seconds around each false alarm there")
    evaluate.add_argument("--keyword", metavar="W", help="the word to detect (default: that of the model)")
    evaluate.add_argument("--threshold", type=float, metavar="P", help="a probability (default: the model's)")
    evaluate.add_argument("--stream", type=_path, metavar="SPEC",
                          help="count on a stream made of all clips, as data_splits/streams/*.json say")  # fmt: skip
    stream = of_a_model("stream", "run a model over a recording, a pipe or a microphone")
    source = stream.add_mutually_exclusive_group(required=True)
    source.add_argument("--wav", type=_path, metavar="F", help="WAV or FLAC of any length and rate")
    source.add_argument("--stdin", action="store_true", help="a WAV, or raw signed 16-bit little-endian samples")
    source.add_argument("--mic", nargs="?", const="", metavar="DEVICE", help="a microphone, see kws devices")
    stream.add_argument("--rate", type=int, default=16_000, metavar="HZ", help="of raw samples from stdin (16000)")
    stream.add_argument("--channels", type=int, default=1, metavar="N", help="of raw samples from stdin (1)")
    stream.add_argument("--events", action="store_true", help="print detections alone, also in a terminal or as JSON")
    stream.add_argument("--threshold", type=float, metavar="P", help="probability of an event (default: the model's)")
    stream.add_argument("--refractory-s", type=float, metavar="S", help="an event lasts this long (default 1 s)")
    export = of_a_model("export", "write a detector for another runtime, compared with the model first")
    export.add_argument("--out", type=_path, required=True, metavar="F",
                        help=".onnx (ONNX Runtime), .ts (TorchScript) or .kws (compact)")  # fmt: skip

    models = command("models", "models", "the recommended models: for what, file, bytes, what they find, a command")
    corpus = command("corpus", "sounds", "what a corpus holds, and which files were left out")
    corpus.add_argument("corpus", metavar="CORPUS", help="a folder <root>/<word>/*.wav, or a known name")
    corpus.add_argument("--keyword", help="of the synthetic corpus (default sheila)")
    devices = command("devices", "sounds", "list microphones")

    make = command("make", "studies", "a detector for a word; goes on where it stopped")
    make.add_argument("keyword", metavar="WORD", help="English sounds in Latin letters, shorter than a second to say")
    make.add_argument("--recordings", default="", metavar="FOLDER",
                      help="<word>/<speaker>_*.wav of the word and of others, to learn from, too")  # fmt: skip
    make.add_argument("--people", default="", metavar="FOLDER", help="such recordings, to be judged by")
    make.add_argument("--negatives", default="", metavar="FOLDER",
                      help="long recordings without the word, on which it should be quiet")  # fmt: skip
    make.add_argument("--profile", default="standard")
    name = command("name", "studies", "print the name of a study")
    reproduce = command("reproduce", "studies", "run a study's notebooks that are not done, then its report")
    reproduce.add_argument("--quiet", action="store_true", help="print what failed and the results only")
    reproduce.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these notebooks and nothing else")
    reproduce.add_argument("--other", default="", help="parameter of appendix/augmentation_and_transfer")
    people = command("people", "studies", "score every model of a study on recordings of people it was not trained on")
    mistakes = command("mistakes", "studies", "which test clips the clip model to take gets wrong, for the report")
    mistakes.add_argument("--published", action="store_true", help="of the study that came with the repository")
    sweep = command("sweep", "studies", "search for small models; goes on where it stopped")
    sweep.add_argument("--trials", type=int, default=40, help="trained ones, earlier ones included (40)")
    sweep.add_argument("--max-macs", type=int, default=93_000, help="per clip; more is not trained (93,000)")
    sweep.add_argument("--epochs", type=int, default=12, help="of each trial (12)")
    sweep.add_argument("--teacher", help="experiment that teaches, for example baseline")
    sweep.add_argument("--storage", default="", metavar="URL", help="Optuna database, shared by many workers")
    verify = command("verify", "studies", "own records against the published ones; published files scored again")
    verify.add_argument("--all", action="store_true", help="score the files of all seeds, not of the first only")
    people_are = "recordings <root>/<word>/<speaker>_*.wav of the keyword and of other words"
    people.add_argument("--people", required=True, metavar="FOLDER", help=people_are)
    reproduce.add_argument("--people", default="", metavar="FOLDER", help="then score every model on these recordings")
    for which in (name, reproduce, people, mistakes, verify, sweep):
        which.add_argument("--corpus", default="synthetic")
        which.add_argument("--keyword", default="sheila")
        which.add_argument("--split", default="speaker")
    for which in (reproduce, sweep):
        which.add_argument("--profile", default="standard")
    reproduce.add_argument("--seeds", type=int, default=0)
    for known, text in (
        ("report", "write the HTML report of a study from its records"),
        ("table", "print the results of a study"),
        ("publish", "copy a study to reports/reference and checkpoints/reference"),
    ):
        command(known, "studies", text).add_argument("study", help="for example synthetic-sheila-speaker")
    for which in (score, price, evaluate, stream, export, models, corpus, devices, verify):
        which.add_argument("--json", action="store_true", help="print JSON for programs")
    return parser


def _path(typed: str) -> Path:
    """A path as it was typed: a shell knows ``~`` at the beginning of a word only, not in ``--wav=~/a.wav``."""
    return Path(os.path.expanduser(typed))


def show(values: dict | list, as_json: bool) -> None:
    """Print values for people, or as JSON for programs."""
    if as_json:
        print(json.dumps(values))
    elif isinstance(values, list):
        for row in values:
            print("  ".join(str(value) for value in row.values()))
    else:
        width = max(map(len, values))
        for key, value in values.items():
            print(f"{key:<{width}}  {value}")
