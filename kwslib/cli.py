"""``kws``: score, measure and stream from a shell. ``--json`` prints for programs; bad input exits with 2."""

import argparse
import json
import os
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kwslib import (
    checkpoints,
    corpora,
    cost,
    decide,
    export,
    features,
    listen,
    metrics,
    models,
    paths,
    processes,
    records,
    report,
    reproduce,
    stream,
    streams,
    train,
    verify,
)
from kwslib.config import CRNNConfig, FeatureConfig, describe
from kwslib.study import ExperimentError, open_study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 when part of a study failed, or 2 after one sentence that says why."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, ExperimentError, export.ExportError, processes.Busy, OSError, zipfile.BadZipFile) as error:
        print(f"kws {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = options.command in ("reproduce", "sweep")
        kept = "; what was finished is kept, the same command goes on" if goes_on else ""
        print(f"kws {options.command}: stopped{kept}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kws", description="Small-footprint keyword spotting.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, checkpoint: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        if checkpoint:
            added.add_argument(
                "--checkpoint", type=Path, required=True, metavar="P",
                help="a .pt or .kws file of this project, or a plain state dict with the names of the reports",
            )  # fmt: skip
            if name != "stream":  # published models were trained on frames that look ahead
                added.add_argument("--mel-stride", type=int, metavar="N", help="of a plain state dict, where ambiguous")
                added.add_argument("--frame-stride", type=int, default=8, metavar="N", help="of a plain state dict (8)")
            added.add_argument("--json", action="store_true", help="print JSON for programs")
        return added

    score = command("score", _score, "probability of the keyword in audio files")
    score.add_argument("files", nargs="+", type=Path, metavar="FILE", help="WAV or FLAC, any rate; its loudest second")
    command("cost", _cost, "parameters, MACs and bytes of a model")
    evaluate = command(
        "evaluate", _evaluate, "AU-FA-FR of a model on recordings; of others than the keyword, the FA rate"
    )
    evaluate.add_argument("--corpus", required=True, metavar="C", help="a folder <root>/<word>/*.wav, or a known name")
    evaluate.add_argument("--keyword", metavar="W", help="the word to detect (default: the one it was trained for)")
    evaluate.add_argument("--threshold", type=float, help="logit to decide at (default: the checkpoint's)")
    evaluate.add_argument(
        "--stream",
        type=Path,
        metavar="SPEC",
        help="count on a stream made of all clips, as data_splits/streams/*.json say",
    )
    described = command("corpus", _corpus, "what a corpus holds, and which files were left out", checkpoint=False)
    described.add_argument("corpus", metavar="CORPUS", help="a folder <root>/<word>/*.wav, or a known name")
    described.add_argument("--keyword", help="of the synthetic corpus (default sheila)")
    described.add_argument("--json", action="store_true", help="print JSON for programs")
    live = command("stream", _stream, "run a model over a recording, a pipe or a microphone")
    source = live.add_mutually_exclusive_group(required=True)
    source.add_argument("--wav", type=Path, metavar="F", help="WAV or FLAC of any length and rate")
    source.add_argument("--stdin", action="store_true", help="raw signed 16-bit little-endian mono samples")
    source.add_argument("--mic", nargs="?", const="", metavar="DEVICE", help="a microphone, see kws devices")
    live.add_argument("--rate", type=int, default=16_000, metavar="HZ", help="of the samples from stdin (16000)")
    live.add_argument(
        "--threshold", type=float, metavar="P", help="probability of an event (default: the checkpoint's)"
    )
    live.add_argument("--refractory-s", type=float, metavar="S", help="an event lasts this long (default 1 s)")
    microphones = command("devices", _devices, "list microphones", checkpoint=False)
    microphones.add_argument("--json", action="store_true", help="print JSON for programs")
    exported = command("export", _export, "write a detector for another runtime, compared with the model first")
    exported.add_argument(
        "--out", type=Path, required=True, metavar="F", help=".onnx (ONNX Runtime), .ts (TorchScript) or .kws (compact)"
    )

    named = command("name", _name, "print the name of a study", checkpoint=False)
    reproduced = command("reproduce", _reproduce, "run a study's notebooks that are not done, then its report",
                         checkpoint=False)  # fmt: skip
    reproduced.add_argument("--quiet", action="store_true", help="print what failed and the results only")
    reproduced.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these notebooks and nothing else")
    reproduced.add_argument("--other", default="", help="parameter of appendix/augmentation_and_transfer")
    search = command("sweep", _sweep, "search for small models; goes on where it stopped", checkpoint=False)
    search.add_argument("--trials", type=int, default=40, help="trained ones, earlier ones included (40)")
    search.add_argument("--max-macs", type=int, default=93_000, help="per clip; more is not trained (93,000)")
    search.add_argument("--epochs", type=int, default=12, help="of each trial (12)")
    search.add_argument("--teacher", help="experiment that teaches, for example baseline")
    search.add_argument("--storage", default="", metavar="URL", help="Optuna database, shared by many workers")
    verified = command("verify", _verify, "own records against the published ones; published files scored again",
                       checkpoint=False)  # fmt: skip
    verified.add_argument("--all", action="store_true", help="score the files of all seeds, not of the first only")
    verified.add_argument("--json", action="store_true", help="print JSON for programs")
    for parameters in (named, reproduced, verified, search):
        parameters.add_argument("--corpus", default="synthetic")
        parameters.add_argument("--keyword", default="sheila")
        parameters.add_argument("--split", default="speaker")
    for parameters in (reproduced, search):
        parameters.add_argument("--profile", default="standard")
    reproduced.add_argument("--seeds", type=int, default=0)
    for name, run, text in (
        ("report", _report, "write the HTML report of a study from its records"),
        ("table", _table, "print the results of a study"),
        ("publish", _publish, "copy a study to reports/reference and checkpoints/reference"),
    ):
        command(name, run, text, checkpoint=False).add_argument("study", help="for example synthetic-sheila-speaker")
    html = command("html", _html, "turn an executed notebook into HTML", checkpoint=False)
    html.add_argument("notebook", type=Path)
    return parser


def _print(values: dict | list, as_json: bool) -> None:
    if as_json:
        print(json.dumps(values))
    elif isinstance(values, list):
        for row in values:
            print("  ".join(str(value) for value in row.values()))
    else:
        width = max(map(len, values))
        for key, value in values.items():
            print(f"{key:<{width}}  {value}")


def _open_checkpoint(options: argparse.Namespace) -> tuple[torch.nn.Module, CRNNConfig, FeatureConfig, dict]:
    """Model, its sizes, its front end, and what else is known: of a published state dict, nothing."""
    compact = options.checkpoint.suffix == checkpoints.COMPACT_SUFFIX
    if options.command == "stream" or compact or models.is_described(options.checkpoint):
        model, sidecar = checkpoints.load(options.checkpoint)
        return model, model.config, checkpoints.features_of(sidecar), sidecar
    model = models.load_published(options.checkpoint, options.mel_stride, options.frame_stride)
    print(
        f"{options.checkpoint} has no description beside it: taken for a published state dict, "
        f"centered log-mels, strides {model.config.stride}",
        file=sys.stderr,
    )
    return model, model.config, FeatureConfig(framing="centered"), {}


def _corpus_argument(argument: str) -> str:
    """A known name, or a folder relative to the shell, as with any command line tool."""
    return argument if argument in corpora.NAMES else str(Path(argument).resolve())


def _score(options: argparse.Namespace) -> None:
    model, _, front_end, _ = _open_checkpoint(options)
    clips = np.stack([corpora.one_second(corpora.read_clip(file)) for file in options.files])
    logits = train.score(model, features.LogMel(front_end)(torch.from_numpy(clips)).numpy())
    probabilities = stream.probability(logits).tolist()
    pairs = zip(options.files, probabilities, strict=True)
    _print([{"file": str(file), "score": value} for file, value in pairs], options.json)


def _cost(options: argparse.Namespace) -> None:
    model, config, _, _ = _open_checkpoint(options)
    _print({**cost.cost(config), **checkpoints.sizes(model)}, options.json)


def _evaluate(options: argparse.Namespace) -> None:
    model, _, front_end, known = _open_checkpoint(options)
    keyword = corpora.clean_keyword(options.corpus, options.keyword or known.get("keyword") or "")
    if not keyword:
        raise ValueError("this checkpoint does not say its keyword: name it with --keyword")
    # A keyword named here must be there; the checkpoint's own may be missing: then others are all there is to hear.
    wanted = keyword if options.corpus == "synthetic" else options.keyword
    corpus = corpora.load(_corpus_argument(options.corpus), wanted)
    if options.stream is not None:
        _print(_on_a_stream(options, model, front_end, known, corpus, keyword), options.json)
        return
    scores = train.score(model, features.logmels(corpus, front_end))
    is_keyword, speakers = corpus.is_keyword(keyword), corpus.clips["speaker"].to_numpy()
    result = {"n_keyword": int(is_keyword.sum()), "n_other": int((~is_keyword).sum())}
    threshold = known.get("threshold") if options.threshold is None else options.threshold
    if threshold is not None:
        result["threshold"] = threshold
        if not is_keyword.all():
            result["fa_rate"] = float((scores >= threshold)[~is_keyword].mean())
        if is_keyword.any():
            result["miss_rate"] = float((scores < threshold)[is_keyword].mean())
    if is_keyword.any() and not is_keyword.all():
        area = metrics.au_fa_fr(scores, is_keyword)
        interval = records.interval95(metrics.bootstrap(scores, is_keyword, speakers, resamples=1000))
        result |= {"au_fa_fr": area, "au_fa_fr_ci95": list(interval)}
        result |= {"interval_over": metrics.units(speakers, is_keyword), "roc_auc": metrics.roc_auc(area, is_keyword)}
    elif threshold is None:
        raise ValueError(
            f"{options.corpus} has no clips of {keyword!r}, or nothing else: "
            "only the rate at a threshold could be given, name one with --threshold"
        )
    _print(result, options.json)


def _on_a_stream(options, model, front_end, known: dict, corpus: corpora.Corpus, keyword: str) -> dict:
    """What is counted on a stream made of all clips of a corpus."""
    stream.StreamingModel(model, framing=front_end.framing)  # complains of models that do not run on a stream
    decision = decide.decision_of(known) or decide.Decision()
    if options.threshold is not None:
        decision = replace(decision, threshold=options.threshold)
    tracks = streams.prepare(corpus, range(len(corpus.clips)), keyword, streams.read_spec(options.stream))
    return decide.counted(streams.listen(model, tracks), decision)


def _corpus(options: argparse.Namespace) -> None:
    keyword = options.keyword and corpora.clean_keyword(options.corpus, options.keyword)
    corpus = corpora.load(_corpus_argument(options.corpus), keyword)
    if options.json:
        left_out = corpus.unusable.to_dict("records")
        print(json.dumps({**corpus.summary().to_dict(), "fingerprint": corpus.fingerprint, "left_out": left_out}))
        return
    _print({**corpus.summary().to_dict(), "prepared in": corpus.folder}, as_json=False)
    for clip, reason in corpus.unusable.head(20).itertuples(index=False):
        print(f"  left out: {clip}: {reason}")
    if len(corpus.unusable) > 20:
        print(f"  and {len(corpus.unusable) - 20} more: {corpus.folder / 'unusable.csv'}")


def _stream(options: argparse.Namespace) -> None:
    model, _, front_end, known = _open_checkpoint(options)
    streaming = stream.StreamingModel(model, framing=front_end.framing)
    if options.stdin:
        chunks = listen.from_raw(sys.stdin.buffer, options.rate)
    elif options.mic is not None:
        name = options.mic
        chunks = listen.from_microphone(int(name) if name.isdigit() else name or None)
    else:
        chunks = listen.from_file(options.wav)
    decision = _decision(options, known)
    bar = sys.stdout.isatty() and not options.json
    try:
        for t_s, smoothed, fired in decision.watch(stream.scores(streaming, chunks)):
            score = float(decision.probability(smoothed))
            row = {"t_s": round(t_s, 3), "score": score}
            detected = f"{t_s:8.2f} s  {known.get('keyword') or 'keyword'} detected, {score:.4f}"
            if options.json:
                lines = [json.dumps(row)] + ([json.dumps({"event": "detected", **row})] if fired else [])
            elif bar:  # written over itself; an event stays
                lines = [f"\r{detected:<70}"] if fired else []
                print(f"\r{t_s:8.2f} s  {_bar(score)} {score:.3f} ", end="", flush=True)
            else:
                lines = [f"{t_s:8.2f} s  {score:.4f}"] + ([detected] if fired else [])
            for line in lines:
                print(line, flush=True)
    except KeyboardInterrupt:  # how a microphone is meant to end
        pass
    finally:
        if bar:
            print()


def _decision(options: argparse.Namespace, known: dict) -> decide.Decision:
    """The checkpoint's decision, with what was asked for instead; says on stderr what it is."""
    made = decide.decision_of(known)
    decision = made or decide.Decision()
    if options.refractory_s is not None:
        decision = replace(decision, refractory_s=options.refractory_s)
    if options.threshold is not None:
        decision = decision.at_probability(options.threshold)
        why = "as asked for"
    elif made is None:
        why = "this model has no decision made on streams: expect false alarms"
    else:
        why = "as made on val streams"
        if made.fa_per_h is not None and made.hours is not None:
            why = f"at most {made.fa_per_h:g} false alarms per hour on {made.hours:g} h of val streams"
    print(f"an event begins at {float(decision.probability(decision.threshold)):.4g}: {why}", file=sys.stderr)
    return decision


def _bar(share: float, width: int = 40) -> str:
    """A probability as a bar for the terminal.

    >>> _bar(0.5, width=4)
    '██··'
    """
    full = round(share * width)
    return "█" * full + "·" * (width - full)


def _devices(options: argparse.Namespace) -> None:
    found = listen.devices()
    if options.json:
        print(json.dumps(found))
    elif not found:
        print("no microphone is connected")
    for row in [] if options.json else found:
        print(f"{row['device']:3d}  {row['name']}{'  (default)' if row['default'] else ''}")


def _export(options: argparse.Namespace) -> None:
    model, _, _, known = _open_checkpoint(options)
    suffix = options.out.suffix
    if suffix == checkpoints.COMPACT_SUFFIX:
        described = {"features": describe(FeatureConfig()), "model": describe(model.config), **known}
        content = checkpoints.compact(model, described)
    else:
        content = export.detector(model, suffix, {**known, "model": describe(model.config)})
    paths.write_atomically(options.out, content)
    about = {"file": str(options.out), "bytes": len(content), "keyword": known.get("keyword")}
    _print(about, options.json)


def _reproduce(options: argparse.Namespace) -> int:
    to_read = options.only == [reproduce.PLOTS]
    study = open_study(options.corpus, options.keyword, options.split, options.profile, options.seeds, to_read=to_read)
    if not options.only:
        _ = study.split  # prepares the corpus: whatever is wrong with it is said before any notebook runs
    parameters = {"other": options.other} if options.other else {}
    failed = reproduce.reproduce(study, options.only, options.quiet, **parameters)
    if not options.only and list(records.folder(study.name).glob("*.json")):
        print()
        _table(argparse.Namespace(study=study.name))
    if failed:
        print(f"{len(failed)} failed; what they wrote is in {paths.reports(study.name) / 'run.log'}", file=sys.stderr)
    return 1 if failed else 0


def _verify(options: argparse.Namespace) -> int:
    study = open_study(options.corpus, options.keyword, options.split, to_read=True)
    found = verify.check(study, None if options.all else (0,))
    if options.json:
        print(json.dumps(found))
        return 0 if found["holds"] else 1
    if found["compared"]:
        table = pd.DataFrame(found["compared"]).set_index("what")
        runs = f"{found['compared'][0]['compared']} of the {found['published']} published runs"
        print(f"Your records of {study.name}, {runs}, against the published ones:")
        print(table.drop(columns="outside").to_string())
        for what, outside in table.loc[table["outside"] != "", "outside"].items():
            print(f"  {what} differs: {outside if len(outside) < 300 else outside[:300] + ' ...'}")
    else:
        print(f"{study.name} has no records of yours to compare: 'make reproduce' makes them")
    print(
        f"Published files scored again: {found['files']}, of which {found['exact']} exactly as recorded and "
        f"{found['close']} within {verify.RESCORED_TOLERANCE:g}; largest difference {found['largest_difference']:.1g}"
    )
    print("The results hold." if found["holds"] else "NOT ALL RESULTS HOLD.")
    return 0 if found["holds"] else 1


def _sweep(options: argparse.Namespace) -> None:
    from kwslib import sweep  # Optuna takes a second to import, and no other command needs it

    study = open_study(options.corpus, options.keyword, options.split, options.profile)
    found = sweep.sweep(
        study,
        options.trials,
        options.max_macs,
        replace(sweep.TRAINING, epochs=options.epochs),
        options.storage,
        options.teacher or None,
    )
    print(found[found["front"]].drop(columns="front").to_string())
    print(f"\nThe Pareto front on val; all trials: {paths.reports(study.name) / 'sweep.csv'}")


def _name(options: argparse.Namespace) -> None:
    print(paths.study_name(options.corpus, options.keyword, options.split))


def _report(options: argparse.Namespace) -> None:
    print(report.write(options.study))


def _table(options: argparse.Namespace) -> None:
    table = report.display_table(records.summary(records.load(options.study)))
    columns = ["AU-FA-FR ×1e5 ↓", "95 % interval", "speed-up ↑", "compression ↑"]
    print(table[columns].to_string().replace("**", "  "))
    for failure in records.failures(paths.reports(options.study)):
        print(f"FAILED  {failure['experiment']}, seed {failure['seed']}: {failure['error']}")
    print(f"\nReport: {paths.reports(options.study) / 'index.html'}")


def _publish(options: argparse.Namespace) -> None:
    report.publish(options.study)
    print(f"published as {paths.reports('reference') / options.study}")


def _html(options: argparse.Namespace) -> None:
    print(report.notebook_html(options.notebook))


if __name__ == "__main__":
    sys.exit(main())
