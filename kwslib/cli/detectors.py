"""Commands that read a model: score, cost, evaluate, stream, export."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from kwslib import audio, metrics, paths
from kwslib.cli import models, show
from kwslib.cli.sounds import load_corpus
from kwslib.config import CRNNConfig, FeatureConfig, describe
from kwslib.data import corpora, features
from kwslib.data.features import LogMel
from kwslib.nets import cost, crnn
from kwslib.nets.rivals import TimeNetConfig, read_by
from kwslib.streaming import export, listen, tracks
from kwslib.streaming.decision import Decision, outcome, read_decision
from kwslib.streaming.events import most_fa_per_h, score_tracks
from kwslib.streaming.model import StreamingModel, score_chunks
from kwslib.training import checkpoints, compact


def _open_checkpoint(options: argparse.Namespace) -> tuple:
    """Model, its front end, and what else is known: of a published state dict, nothing."""
    options.checkpoint = models.take(options)
    is_compact = options.checkpoint.suffix == compact.SUFFIX
    if options.command == "stream" or is_compact or checkpoints.is_described(options.checkpoint):
        model, sidecar = checkpoints.load(options.checkpoint)
        return model, checkpoints.features_of(sidecar), sidecar
    model = checkpoints.load_published(options.checkpoint, options.mel_stride, options.frame_stride)
    print(
        f"{options.checkpoint} has no description beside it: taken for a published state dict, "
        f"centered log-mels, strides {model.config.stride}",
        file=sys.stderr,
    )
    return model, FeatureConfig(framing="centered"), {}


def kws_score(options: argparse.Namespace) -> int:
    """Probability of the keyword in the loudest second of each file; 2 when some could not be read."""
    model, front_end, known = _open_checkpoint(options)
    files, clips = [], []
    for file in options.files:
        try:
            clips.append(audio.one_second(audio.read(file)))
            files.append(str(file))
        except audio.AudioError as error:  # the others are scored all the same
            print(f"kws score: {error}", file=sys.stderr)
    scores = []
    if clips:
        logits = crnn.score(model, LogMel(front_end)(torch.from_numpy(np.stack(clips))).numpy())
        scores = (read_decision(known) or Decision()).probability(logits).tolist()
    show([{"file": file, "score": score} for file, score in zip(files, scores, strict=True)], options.json)
    return 0 if len(files) == len(options.files) else 2


def kws_cost(options: argparse.Namespace) -> None:
    """What the net of a checkpoint costs, and on a stream the log-mels that it reads."""
    model, _, _ = _open_checkpoint(options)
    on_stream = isinstance(model.config, CRNNConfig | TimeNetConfig)
    log_mels = {"log_mel_macs_per_second": read_by(model.config).macs_per_second} if on_stream else {}
    show({**cost.cost(model.config), **log_mels, **checkpoints.sizes(model)}, options.json)


def kws_evaluate(options: argparse.Namespace) -> None:
    """AU-FA-FR and rates on a corpus, or what is counted on a stream made of it; false alarms among negatives."""
    model, front_end, known = _open_checkpoint(options)
    if options.negatives is not None:
        found = _among_negatives(options, StreamingModel(model, framing=front_end.framing), _decided(options, known))
        moments = [] if options.json else found.pop("moments")
        show(found, options.json)
        for moment in moments:
            print(f"  {moment['file']} {moment['t_s']:.2f} s, {moment['score']:.4f}")
        return
    keyword = corpora.clean_keyword(options.corpus, options.keyword or known.get("keyword") or "")
    if not keyword:
        raise ValueError("this checkpoint does not say its keyword: name it with --keyword")
    # A keyword named here must be there; the checkpoint's own may be missing: then others are all there is to hear.
    wanted = keyword if options.corpus == "synthetic" else options.keyword
    corpus = load_corpus(options.corpus, wanted)
    if options.stream is not None:
        show(_on_a_stream(options, model, front_end, known, corpus, keyword), options.json)
        return
    scores = crnn.score(model, features.logmels(corpus, front_end))
    is_keyword, speakers = corpus.is_keyword(keyword), corpus.clips["speaker"].to_numpy()
    result = {"n_keyword": int(is_keyword.sum()), "n_other": int((~is_keyword).sum())}
    threshold, decision = known.get("threshold"), _decided(options, known)
    if options.threshold is not None:
        threshold = decision.threshold
    if threshold is not None:
        result["threshold"] = float(decision.probability(threshold))
        if not is_keyword.all():
            result["fa_rate"] = float((scores >= threshold)[~is_keyword].mean())
        if is_keyword.any():
            result["miss_rate"] = float((scores < threshold)[is_keyword].mean())
    if is_keyword.any() and not is_keyword.all():
        area = metrics.au_fa_fr(scores, is_keyword)
        interval = metrics.interval95(metrics.bootstrap(scores, is_keyword, speakers, resamples=1000))
        result |= {"au_fa_fr": area, "au_fa_fr_ci95": list(interval)}
        result |= {"interval_over": metrics.units(speakers, is_keyword), "roc_auc": metrics.roc_auc(area)}
        result |= {"au_fa_fr_as_is": metrics.au_fa_fr_as_is(scores, is_keyword)}
        result |= {"miss_at_1pct_fa": metrics.miss_rate_at(0.01, scores, is_keyword)}
        result |= {"miss_at_0_1pct_fa": metrics.miss_rate_at(0.001, scores, is_keyword)}
    elif threshold is None:
        raise ValueError(
            f"{options.corpus} has no clips of {keyword!r}, or nothing else: "
            "only the rate at a threshold could be given, name one with --threshold"
        )
    show(result, options.json)


def _on_a_stream(options, model, front_end, known: dict, corpus, keyword: str) -> dict:
    """What is counted on a stream made of all clips of a corpus."""
    StreamingModel(model, framing=front_end.framing)  # complains of models that do not run on a stream
    prepared = tracks.prepare(corpus, range(len(corpus.clips)), keyword, tracks.read_spec(options.stream))
    decision = _decided(options, known)
    counted = outcome(score_tracks(model, prepared), decision)
    return counted | {"threshold": float(decision.probability(decision.threshold))}


def _decided(options: argparse.Namespace, known: dict) -> Decision:
    """The checkpoint's decision, at another probability if one is asked for."""
    decision = read_decision(known) or Decision()
    return decision if options.threshold is None else decision.at_probability(options.threshold)


def _among_negatives(options: argparse.Namespace, streaming: StreamingModel, decision: Decision) -> dict:
    """False alarms per hour on recordings without the keyword, each a stream of its own, and when they were."""
    names = tracks.long_recordings(options.negatives)
    seconds, moments, left_out = 0.0, [], []
    for name in tqdm(names, desc="listening", unit="file", disable=None):
        try:
            heard_s, fired = listen.alarms(streaming, decision, options.negatives / name)
        except audio.AudioError as error:
            left_out.append({"file": name, "reason": str(error)})
            continue
        seconds += heard_s
        moments += [{"file": name, "t_s": round(t_s, 3), "score": score} for t_s, score in fired]
    if not seconds:
        raise ValueError(
            f"none of the {len(names)} recordings in {options.negatives} can be read: {left_out[0]['reason']}"
        )
    if options.cut is not None:
        for moment in moments:
            target = options.cut / f"{paths.slug(Path(moment['file']).stem)}-{moment['t_s']:.2f}s.wav"
            listen.cut(options.negatives / moment["file"], moment["t_s"], target)
    hours = seconds / 3600
    counted = {"hours": hours, "recordings": len(names) - len(left_out), "false_alarms": len(moments)}
    counted |= {"fa_per_h": len(moments) / hours, "most_fa_per_h": most_fa_per_h(len(moments), hours)}
    return counted | {"left_out": left_out, "moments": moments}


def kws_stream(options: argparse.Namespace) -> None:
    """Scores and events of a recording, a pipe or a microphone as they come."""
    model, front_end, known = _open_checkpoint(options)
    streaming = StreamingModel(model, framing=front_end.framing)
    if options.stdin:
        chunks = listen.from_pipe(sys.stdin.buffer, options.rate, options.channels)
    elif options.mic is not None:
        name = options.mic
        chunks = listen.from_microphone(int(name) if name.isdigit() else name or None)
    else:
        chunks = listen.from_file(options.wav)
    decision = _decision(options, known)
    bar = sys.stdout.isatty() and not options.json and not options.events
    every_step = options.json and not options.events
    try:
        for t_s, smoothed, fired in decision.watch(score_chunks(streaming, chunks)):
            if not (fired or bar or every_step):
                continue
            score = float(decision.probability(smoothed))
            row = {"t_s": round(t_s, 3), "score": score}
            if every_step:
                print(json.dumps(row), flush=True)
            if bar:  # written over itself; an event stays
                print(f"\r{t_s:8.2f} s  {_bar(score)} {score:.3f} ", end="", flush=True)
            if fired and options.json:
                print(json.dumps({"event": "detected", **row}), flush=True)
            elif fired:
                detected = f"{t_s:8.2f} s  {known.get('keyword') or 'keyword'} detected, {score:.4f}"
                print(f"\r{detected:<70}" if bar else detected, flush=True)
    except KeyboardInterrupt:  # how a microphone is meant to end
        pass
    finally:
        if bar:
            print()


def _decision(options: argparse.Namespace, known: dict):
    """The checkpoint's decision, with what was asked for instead; says on stderr what it is."""
    made = read_decision(known)
    decision = made or Decision()
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
    marks = "█·"
    try:
        marks.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # of a narrow terminal
        marks = "#-"
    full = round(share * width)
    return marks[0] * full + marks[1] * (width - full)


def kws_export(options: argparse.Namespace) -> None:
    """Write a detector for another runtime."""
    model, _, known = _open_checkpoint(options)
    suffix = options.out.suffix
    if suffix == compact.SUFFIX:
        described = {"features": describe(FeatureConfig()), "model": describe(model.config), **known}
        content = checkpoints.compact_bytes(model, described)
    else:
        content = export.detector(model, suffix, {**known, "model": describe(model.config)})
    paths.write_atomically(options.out, content)
    show({"file": str(options.out), "bytes": len(content), "keyword": known.get("keyword")}, options.json)
