"""From a word to a detector: what helped among people, each for itself, put together; and a card of what it is worth.

Two wide nets become teachers: one learns from clips in rooms, in noise, at other speeds, with bands masked, the other
to hear streams. From them both a small one, of 4 bits, learns to hear streams: from labels alone it would learn the
synthesizer's voices by heart and forget people (CHANGELOG.md has what was counted). They hear the word from most of the
voices, several times each, and its near-misses no more often than any other word: a net that is to tell "cat" from a
synthesizer's "cap" no longer knows it from people. Counted is among voices that none of them heard, and, where there
are recordings, among people.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from kwslib import paths
from kwslib.config import SynthesisConfig, describe, profile
from kwslib.data import corpora, synthesis
from kwslib.data.augment import STRONG, WITHOUT_MASKS
from kwslib.data.pieces import PieceConfig
from kwslib.lab import verify
from kwslib.lab.run import Experiment
from kwslib.lab.study import ExperimentError, Study, refuse_to_overwrite
from kwslib.lab.workers import run
from kwslib.nets import crnn
from kwslib.nets.losses import Labels, SoftTargets
from kwslib.nets.rivals import TimeNetConfig, read_by
from kwslib.processes import in_fresh_process
from kwslib.results import records
from kwslib.streaming import events, export, player, tracks
from kwslib.streaming.decision import Decide, Decision
from kwslib.streaming.tracks import StreamSpec
from kwslib.training import checkpoints
from kwslib.training.loop import Training
from kwslib.training.quantize import WeightInt
from kwslib.training.tune import StreamTune

MADE = "detector"  # the experiment that is delivered
MOST_TEACH = (*("train",) * 3, "val", *("train",) * 5, "test")  # of ten voices
VOICES = SynthesisConfig(takes=3, near_misses=0, other_words=32, subsets=MOST_TEACH)
# The threshold is half way from two alarms per hour to 70 % found: people who talk alarm it more often than voices.
ORDINARY = StreamSpec(1, 80, 12, keyword_share=0.2, snr_db=(15, 30), name="ordinary", fa_per_h=2, least_found=0.7)
STREAMS = (  # as those in data_splits/streams, a third as long; the decision is made on the rated ones
    ORDINARY,
    StreamSpec(2, 40, 60, keyword_share=0.05, snr_db=(20, 40), name="dense"),
    StreamSpec(5, 20, 0, keyword_share=0, snr_db=(15, 30), talk=True, name="sentences", fa_per_h=1),
    StreamSpec(3, 20, 0, keyword_share=0, noise_db=-30, name="noise"),
)
PROBABILITIES = (0.2, 0.5, 0.8, 0.95, 0.99)  # thresholds that its card shows beside its own
VOWELS = re.compile("[aeiouæɑɐɒɔəɚɛɜɪʊʌː]+")  # a group of them makes a syllable


def experiments(negatives: str = "") -> list[Experiment]:
    """The recipe: two teachers, and what is delivered. Its decision heeds long recordings without the keyword."""
    training = Training(epochs=30, learning_rate=6e-3, weight_decay=1e-3, ema=0.99, normalize=False)
    shorter = replace(training, epochs=16)
    own = (tracks.recordings(Path(negatives)),) if negatives else ()
    decide = Decide(STREAMS + own, reset=())
    talk = PieceConfig(talk_share=0.5)
    streams = StreamTune(training, talk, bits=4, mel_warp=0.1)
    taught = {"teacher": ("listener", "varied"), "losses": (Labels(0.2), SoftTargets(0.8, temperature=2.0))}
    wide, plain = TimeNetConfig((48, 40, 64)), {"augmentation": WITHOUT_MASKS}
    return [
        Experiment("varied", wide, training=replace(training, epochs=26), augmentation=STRONG),
        Experiment("wide", wide, training=shorter, **plain),
        Experiment("small", TimeNetConfig((30, 25, 40)), training=shorter, **plain),
        Experiment("listener", start="wide", after=(StreamTune(replace(training, epochs=20), talk),), **plain),
        Experiment(MADE, start="small", after=(streams, WeightInt(4), decide), **taught, **plain),
    ]


def study_of(keyword: str, recordings: str = "", profile_name: str = "standard") -> Study:
    """Where a detector is trained: synthetic speech by most voices and, where there are any, recordings."""
    sizes = replace(profile(profile_name), seeds=1, views=2)
    corpus = f"synthetic+{recordings}" if recordings else "synthetic"
    return Study(corpus, synthesis.clean(keyword), "speaker", sizes, 1, VOICES, MADE)


def make(
    keyword: str,
    recordings: str = "",
    people: str = "",
    profile_name: str = "standard",
    negatives: str = "",
    say: Callable = print,
) -> Path:
    """Train a detector for a word and write ``detectors/<word>/``: ``.kws``, ``.onnx``, a card, a page that listens.

    What is finished is kept: the same call again goes on, or writes the files anew.

    Args:
        keyword: what the synthesizer's voices say.
        recordings: a folder ``<root>/<word>/<speaker>_*.wav`` of the keyword and of other words, to learn from, too.
        people: such a folder to be judged by; whoever was learnt from is left out.
        negatives: a folder of long recordings without the keyword. The threshold is made so high that there is at most
            one alarm per hour in their first half; counted is on the second.
        say: is told what a maker should know, in sentences.

    Raises:
        CorpusError, SpecError: a word that the voices cannot say, or no such folder.
        ExperimentError: a training failed, or there is a detector of a larger profile.
    """
    study = study_of(keyword, recordings, profile_name)
    refuse_to_overwrite(study)
    recipe = experiments(negatives)
    doubted = doubts(study.keyword)
    if people:
        verify.people_for(study, people)  # whatever is wrong with it is said before anything is trained
    doubted += doubts_of_recordings(study)
    for sentence in doubted:
        say(sentence)
    run(study, recipe)
    if people:
        verify.score_people(study, people)
    return deliver(study, doubted)


def doubts(keyword: str) -> list[str]:
    """Why a word may make a bad detector, in sentences.

    Raises:
        CorpusError: the voices cannot say it.
    """
    near = synthesis.vocabulary(keyword).near_misses[:3]
    everyday = {*synthesis.WORDS, *synthesis.NEIGHBOURS}
    sounds = in_fresh_process(synthesis.sounds_of, keyword, *sorted(everyday))
    alike = [word for word in sorted(everyday) if sounds[word] == sounds[keyword] and word != keyword]
    found = []
    if alike:
        found.append(f"{keyword!r} sounds like {', '.join(alike)}: who says that says the keyword, too")
    if keyword in everyday:
        found.append(f"{keyword!r} is a word of everyday talk: whenever somebody says it, it counts")
    if _short(sounds[keyword]):
        found.append(
            f"{keyword!r} is one syllable ({sounds[keyword]}; near it: {', '.join(near)}), and short words of a "
            "synthesizer carry over badly to people: take a longer one, or add recordings of people"
        )
    return found


def checked(keyword: str) -> dict[str, float]:
    """Share missed at 1 % FA of words that were counted among people (``tests/prove.py words``), if any were.

    Of the words of one syllable if the keyword has one, otherwise of the longer ones: these carry over better.
    """
    file = paths.ROOT / "reports" / "reference" / "proofs" / "words.json"
    counted = json.loads(file.read_bytes())["words"] if file.exists() else {}
    sounds = in_fresh_process(synthesis.sounds_of, keyword, *counted)
    alike = [word for word in counted if _short(sounds[word]) == _short(sounds[keyword])]
    missed = {word: counted[word]["miss_at_1pct_fa"] for word in alike}
    return dict(sorted(missed.items(), key=lambda pair: pair[1]))


def _short(sounds: str) -> bool:
    """Whether these sounds make one syllable."""
    return len(VOWELS.findall(sounds)) < 2


def doubts_of_recordings(study: Study) -> list[str]:
    """Why the recordings that it learns from, if any, may make a bad detector, in sentences."""
    recorded = _recorded(study.corpus)
    if len(recorded.clips) and recorded.is_keyword(study.keyword).all():
        return [
            f"the recordings hold nothing but {study.keyword!r}, so a person's voice alone may pass for it: "
            "add other words by the same people"
        ]
    return []


def _recorded(corpus: corpora.Corpus) -> corpora.Corpus:
    """The clips of a corpus that no voice of the synthesizer says."""
    return replace(corpus, clips=corpus.clips[~corpus.clips["speaker"].map(synthesis.is_voice)])


def deliver(study: Study, doubted: list[str]) -> Path:
    """Write the folder of a detector that is trained; its card says what was doubted.

    Raises:
        ExperimentError: its training failed.
    """
    for failure in records.failures(paths.reports(study.name)):
        raise ExperimentError(f"{failure['experiment']} failed: {failure['error']}")
    record = records.read(records.path(study.name, MADE, 0))
    model, sidecar = checkpoints.load(study.checkpoint(MADE))
    folder = paths.home() / "detectors" / paths.slug(study.keyword)
    compact = study.checkpoint(MADE).with_suffix(".kws").read_bytes()
    onnx = export.detector(model, ".onnx", {**sidecar, "model": describe(model.config)})
    paths.write_atomically(folder / f"{folder.name}.kws", compact)
    paths.write_atomically(folder / f"{folder.name}.onnx", onnx)
    paths.write_atomically(folder / "card.md", card(study, record, model, len(compact), doubted))
    paths.write_atomically(folder / "index.html", player.page(study.keyword, compact, VOICES))
    return folder


def card(study: Study, record: dict, model: nn.Module, n_bytes: int, doubted: list[str]) -> str:
    """What a maker wants to know of a detector before relying on it, as Markdown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    look = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    template = Environment(loader=PackageLoader("kwslib.lab", "."), **look).get_template("card.md.j2")
    clips, recorded = study.corpus.clips, _recorded(study.corpus)
    train, test = (set(clips["speaker"].iloc[rows]) for rows in (study.split.train, study.split.test))
    taught = recorded.clips[recorded.clips["speaker"].isin(train)]
    streams = record["metrics"]["streams"]
    decision = Decision(**streams["decision"])
    people = records.people(paths.reports(study.name))
    among = (people or {"runs": {}})["runs"].get(paths.label(MADE, 0))
    if among and among["sha256"] != record["checkpoint"]["sha256"]:  # of an earlier detector
        among = None
    return template.render(
        keyword=study.keyword,
        profile=study.profile.name,
        file=paths.slug(study.keyword),
        n_bytes=n_bytes,
        macs=record["cost"]["macs_per_second"],
        logmel_macs=read_by(model.config).macs_per_second,
        voices=len(list(filter(synthesis.is_voice, train))),
        recordings=len(taught),
        recorded=taught["speaker"].nunique() if recorded.names_tell_speakers else None,
        judging=len(test.intersection(recorded.clips["speaker"])),
        said=int(study.labels[study.split.train].sum()),
        others=int((study.labels[study.split.train] == 0).sum()),
        thresholds=elsewhere(study, model, decision).to_dict("records"),
        points=[point for point in streams["points"] if point["asked_fa_per_h"] in (None, decision.fa_per_h)],
        confused=confused(study, model),
        decision=decision,
        threshold=float(decision.probability(decision.threshold)),
        people=people,
        among=among,
        doubts=doubted,
        checked=checked(study.keyword),
    )


def elsewhere(study: Study, model: nn.Module, decision: Decision) -> pd.DataFrame:
    """What other thresholds do on the ordinary test stream: rows of ``count`` with their ``probability``."""
    streams = Decide((ORDINARY,), reset=()).sized(study.profile.stream_percent).streams
    scored = decision.smooth(events.score_tracks(model, study.tracks("test", streams)[ORDINARY.name]))
    thresholds = [decision.at_probability(share).threshold for share in PROBABILITIES]
    return events.count(scored, thresholds, decision.refractory_s).assign(probability=PROBABILITIES)


def confused(study: Study, model: nn.Module) -> dict[str, float]:
    """The words most easily taken for the keyword, and the share of their test clips that are, where 1 % of all are."""
    scores = crnn.score(model, study.logmels[study.split.test])
    words, other = study.corpus.clips["word"].to_numpy()[study.split.test], study.labels[study.split.test] == 0
    taken = scores > np.quantile(scores[other], 0.99)
    shares = {str(word): float(taken[words == word].mean()) for word in np.unique(words[other])}
    return {word: share for word, share in sorted(shares.items(), key=lambda pair: -pair[1])[:5] if share > 0}
