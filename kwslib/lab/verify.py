"""Whether results hold: files against their records, fresh records against the published ones, models among people."""

import json
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import cpu_count
from joblib.externals.loky.process_executor import ProcessPoolExecutor
from tqdm.auto import tqdm

from kwslib import metrics, paths, processes
from kwslib.config import profile
from kwslib.data import corpora, features, synthesis
from kwslib.lab.run import is_copy
from kwslib.lab.study import Study
from kwslib.nets import crnn
from kwslib.results import records
from kwslib.training import checkpoints, compact

REFERENCE = paths.ROOT / "reports" / "reference"
# What two runs of a study must agree in. Costs and counts: the same number. Trainings: on another processor rounding
# sends them elsewhere, as another seed would, so the mean over seeds must lie in the published 95 % interval over
# speakers and seeds, widened by half of its width on both sides: two runs differ by more than one from the truth, and
# more than a hundred means must all lie inside. Of fewer seeds than published, a mean says little: of three seeds of
# a pruned net one is often three times the others. Then each run counts by itself, with its interval over speakers.
# Where both were trained in pinned arithmetic (kwslib.arithmetic), checkpoints are the same bytes on any processor.
# A file scored again: some swapped pairs of clips among millions.
COUNTS = ("params", "macs_per_clip", "state_dict_bytes", "weights_bytes", "n_keyword", "n_other", "epochs", "precision")
RESCORED_TOLERANCE = 1e-6
PEOPLE_VERSION = 1  # raise it when the same models would get other figures of the same people


def compare(fresh: list[dict], published: list[dict]) -> pd.DataFrame:
    """Records of one's own against those of another run of the same study; only runs that both have count.

    Returns:
        One row per question: ``compared, agree, tolerance, required`` (whether a result holds only if all agree),
        ``outside`` (names of those that do not agree).

    Raises:
        RecordError: they have no run in common.
    """
    pairs = _pairs(fresh, published)
    mine, theirs = (records.results([pair[i] for pair in pairs]) for i in (0, 1))
    rows = {
        "corpus": _row(pairs, lambda r: r["data"]["corpus_fingerprint"], "same"),
        "split": _row(pairs, lambda r: r["data"]["split_sha256"], "same"),
        "recipe and data": _row(pairs, lambda r: r["identity"], "same"),
        **{column: _counted(mine[column] == theirs[column], pairs, "same") for column in COUNTS},
        **_areas(pairs, published),
        "checkpoint": _row(pairs, lambda r: r["checkpoint"]["sha256"], *_bytes_expected(pairs)),
        "record": _row(pairs, _constant, "all but times and machine", required=False),
    }
    return pd.DataFrame(rows).T.rename_axis("what")


def check(study: Study, seeds: Collection[int] | None = (0,)) -> dict:
    """All that can be checked of a published study on this machine, as plain values.

    Args:
        seeds: whose published files are scored again; None for all.

    Returns:
        ``published`` (number of runs), ``compared`` (rows of ``compare``, none without records of one's own),
        ``files, exact, close`` (published files scored again, those exactly as recorded, those within the tolerance),
        ``largest_difference``, ``holds``.

    Raises:
        RecordError: the study is not among the published ones.
    """
    if not (REFERENCE / study.name).exists():
        there = ", ".join(sorted(folder.name for folder in REFERENCE.iterdir() if folder.is_dir()))
        raise records.RecordError(f"{study.name} is not among the published studies: {there}")
    published = records.load_folder(REFERENCE / study.name / "records")
    if published[0]["data"]["corpus_fingerprint"] != study.corpus.fingerprint:
        raise records.RecordError(
            f"{study.name} was published of other clips than {study.corpus.name} holds now: its files cannot be scored "
            "again, nor runs compared, until it is published anew (CHANGELOG.md says what changed)"
        )
    there = list(records.folder(study.name).glob("*.json"))
    own = [r for r in records.load(study.name) if not is_copy(r)] if there else []  # a copy would agree with itself
    compared = compare(_of_profile(own, published), published) if own else pd.DataFrame()
    files = rescore(study, {r["experiment"] for r in published}, seeds, published=True)
    apart = (files["recorded"] - files["rescored"]).abs()
    close = apart <= RESCORED_TOLERANCE
    required = compared[compared["required"].astype(bool)] if own else compared
    return {
        "published": len(published),
        "compared": compared.reset_index().to_dict("records"),
        "files": len(files),
        "exact": int(files["equal"].sum()),
        "close": int(close.sum()),
        "largest_difference": float(apart.max()),
        "holds": bool(close.all()) and (not own or bool((required["agree"] == required["compared"]).all())),
    }


def _of_profile(fresh: list[dict], published: list[dict]) -> list[dict]:
    mine, theirs = fresh[0]["profile"], published[0]["profile"]
    if mine != theirs:
        raise records.RecordError(
            f"your records are of profile {mine!r}, the published ones of {theirs!r}: they cannot agree. "
            f"Run 'make reproduce PROFILE={theirs}', or set KWS_HOME to another folder"
        )
    return fresh


def _pairs(fresh: list[dict], published: list[dict]) -> list[tuple[dict, dict]]:
    """Runs of both, by experiment and seed.

    Raises:
        RecordError: they have none in common.
    """
    by_label = {(r["experiment"], r["seed"]): r for r in published}
    pairs = [(r, by_label[r["experiment"], r["seed"]]) for r in fresh if (r["experiment"], r["seed"]) in by_label]
    if not pairs:
        raise records.RecordError("the two runs have no experiment in common: nothing can be compared")
    return pairs


def _bytes_expected(pairs: list[tuple[dict, dict]]) -> tuple[str, bool]:
    """Tolerance of checkpoints, and whether it is required: both in pinned arithmetic, by the same libraries."""
    runs = [r["run"] for pair in pairs for r in pair]
    told = "byte for byte, not expected: "
    for who, of in (("yours", runs[::2]), ("published", runs[1::2])):
        if not all("pinned" in run.get("cpu_features", "") and run["device"] == "cpu" for run in of):
            return f"{told}{who} not in pinned arithmetic", False
    for name in ("torch", "numpy"):
        if len({run[name] for run in runs}) > 1:
            return f"{told}another {name}", False
    return "byte for byte", True


def _constant(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in ("run", "order", "note")}


def _row(pairs, what: Callable[[dict], object], tolerance: str, required: bool = True) -> dict:
    return _counted([what(a) == what(b) for a, b in pairs], pairs, tolerance, required)


def _counted(equal: Iterable[bool], pairs, tolerance: str, required: bool = True) -> dict:
    labels = [paths.label(a["experiment"], a["seed"]) for a, _ in pairs]
    outside = [label for label, same in zip(labels, equal, strict=True) if not same]
    agree = len(labels) - len(outside)
    row = {"compared": len(labels), "agree": agree, "tolerance": tolerance, "required": required}
    return row | {"outside": ", ".join(outside)}


def _areas(pairs: list[tuple[dict, dict]], published: list[dict]) -> dict[str, dict]:
    """Rows of the areas: means of the experiments that have every published seed, of the others run by run."""
    own = {(r["experiment"], r["seed"]) for r, _ in pairs}
    fewer = {r["experiment"] for r in published if (r["experiment"], r["seed"]) not in own}
    whole = [pair for pair in pairs if pair[0]["experiment"] not in fewer]
    single = [pair for pair in pairs if pair[0]["experiment"] in fewer]
    rows = {"AU-FA-FR, mean over seeds": _means_inside(whole)} if whole else {}
    return rows | ({"AU-FA-FR, seed by seed": _runs_inside(single, published)} if single else {})


def _means_inside(pairs: list[tuple[dict, dict]]) -> dict:
    """How many experiments have a fresh mean inside the widened interval over speakers and seeds."""
    mine, theirs = (records.summary([pair[i] for pair in pairs]) for i in (0, 1))
    more = (theirs["ci95_high"] - theirs["ci95_low"]) / 2 + RESCORED_TOLERANCE
    inside = (mine["au_fa_fr"] >= theirs["ci95_low"] - more) & (mine["au_fa_fr"] <= theirs["ci95_high"] + more)
    counts = {"compared": len(inside), "agree": int(inside.sum())}
    about = {"tolerance": "published 95 % interval, twice as wide", "required": True}
    return counts | about | {"outside": ", ".join(inside.index[~inside])}


def _runs_inside(pairs: list[tuple[dict, dict]], published: list[dict]) -> dict:
    """How many fresh runs have an interval over speakers that meets the widened one of all published seeds."""
    meets = []
    for mine, _ in pairs:
        seeds = [r["metrics"]["au_fa_fr_ci95"] for r in published if r["experiment"] == mine["experiment"]]
        lowest, highest = min(low for low, _ in seeds), max(high for _, high in seeds)
        more = (highest - lowest) / 2 + RESCORED_TOLERANCE
        low, high = mine["metrics"]["au_fa_fr_ci95"]
        meets.append(high >= lowest - more and low <= highest + more)
    return _counted(meets, pairs, "95 % interval meets those of the published seeds, twice as wide")


def rescore(
    study: Study, experiments: Collection[str], seeds: Collection[int] | None = None, published: bool = False
) -> pd.DataFrame:
    """Score the torch file and the compact file of each run on test, in fresh processes.

    Args:
        seeds: those wanted; all by default.
        published: of the study as it came with the repository, not of one's own runs.

    Returns:
        One row per file that is there: ``experiment, seed, file, bytes, recorded, rescored`` (AU-FA-FR),
        ``equal, process``.

    Raises:
        CheckpointError: a torch file is missing, or a file is damaged.
    """
    found = records.load_folder(REFERENCE / study.name / "records") if published else records.load(study.name)
    runs = [r for r in found if r["experiment"] in experiments and (seeds is None or r["seed"] in seeds)]
    folder = paths.published("checkpoints", study.name) if published else paths.checkpoints(study.name)
    _ = study.logmels, study.split  # computed before the others start
    # Processes of its own: workers that trained could remember more than the files say.
    with ProcessPoolExecutor(max_workers=cpu_count()) as pool:
        work = pool.map(_rescored, [replace(study)] * len(runs), runs, [folder] * len(runs))
        rows = list(tqdm(work, total=len(runs), desc="scoring files", unit="run"))
    return pd.DataFrame([row for pair in rows for row in pair])


def _rescored(study: Study, run: dict, folder: Path) -> list[dict]:
    """The row of each of a run's files; scored on one thread, as after its training."""
    torch.set_num_threads(1)
    test, recorded = study.split.test, run["metrics"]["au_fa_fr"]
    checkpoint = folder / f"{paths.label(run['experiment'], run['seed'])}.pt"
    small = checkpoint.with_suffix(compact.SUFFIX)
    rows = []
    for file in (checkpoint, small) if small.exists() else (checkpoint,):  # large ones are not published
        scores = crnn.score(checkpoints.load(file)[0], study.logmels[test])
        area = metrics.au_fa_fr(scores, study.labels[test] == 1)
        row = {"experiment": run["experiment"], "seed": run["seed"], "file": file.name, "bytes": file.stat().st_size}
        rows.append(row | {"recorded": recorded, "rescored": area, "equal": recorded == area, "process": os.getpid()})
    return rows


def people_for(study: Study, folder: str) -> tuple[corpora.Corpus, np.ndarray, dict]:
    """Recordings of people that no model of a study was trained on.

    Args:
        folder: ``<root>/<word>/<speaker>_*.wav``, or a version of Speech Commands.

    Returns:
        Their corpus, its rows that count, and what ``people.json`` says of both. Left out are clips that the study
        holds itself, and clips by speakers of its train and val parts, where the file names of both tell speakers.

    Raises:
        CorpusError: no such folder, the keyword is not in it, or nothing is left to score.
    """
    if folder.strip() in ("", "synthetic"):
        raise corpora.CorpusError("these are no people: give a folder <root>/<word>/*.wav, as in PEOPLE=path/to/words")
    corpus = corpora.load(folder, study.keyword)
    clips, own = corpus.clips, study.corpus.clips
    known = clips["content"].isin(own["content"]).to_numpy()
    heard = np.zeros(len(clips), bool)
    # Synthetic speakers have names of their own, which mean nothing among people.
    if study.corpus_argument != "synthetic" and study.corpus.names_tell_speakers and corpus.names_tell_speakers:
        learnt_from = own["speaker"].iloc[np.union1d(study.split.train, study.split.val)]
        if study.corpus_argument.startswith(corpora.WITH_VOICES):
            learnt_from = learnt_from[~learnt_from.map(synthesis.is_voice)]
        heard = clips["speaker"].isin(learnt_from).to_numpy() & ~known
    rows = np.flatnonzero(~known & ~heard)
    is_keyword, speakers = corpus.is_keyword(study.keyword)[rows], clips["speaker"].to_numpy()[rows]
    about = {"folder": corpus.name, "corpus_fingerprint": corpus.fingerprint, "keyword": study.keyword}
    about |= {"n_keyword": int(is_keyword.sum()), "n_other": int((~is_keyword).sum())}
    about |= {"n_speakers": len(np.unique(speakers)) if corpus.names_tell_speakers else None}
    about |= {"known_clips": int(known.sum()), "clips_of_known_speakers": int(heard.sum())}
    if not (about["n_keyword"] and about["n_other"]):
        raise corpora.CorpusError(
            f"{corpus.name} leaves {about['n_keyword']} clips of {study.keyword!r} and {about['n_other']} of other "
            f"words to score, both are needed: {about['known_clips']} clips are in the study itself, "
            f"{about['clips_of_known_speakers']} by speakers of its train and val parts"
        )
    over = metrics.units(speakers, is_keyword)
    return corpus, rows, about | {"interval_over": "people" if over == "speakers" else over}


def score_people(study: Study, folder: str, quiet: bool = False) -> dict:
    """Score every model of a study among people it was not trained on, into ``reports/<study>/people.json``.

    What was scored already is not scored again, so a run that was stopped is taken up where it was.

    Args:
        folder: as for ``people_for``.
        quiet: no progress bar.

    Returns:
        What is in the file: see ``kwslib.results.records.PEOPLE`` and ``SCORED``.

    Raises:
        CorpusError: see ``people_for``.
        RecordError: the study has no records.
        CheckpointError: a model is missing or damaged.
        Busy: another process scores them.
    """
    found, reports = records.load(study.name), paths.reports(study.name)
    study = replace(study, profile=profile(found[0]["profile"]))  # the one it was run in
    corpus, rows, about = people_for(study, folder)
    about |= {"resamples": study.profile.bootstrap, "versions": [PEOPLE_VERSION, features.VERSION]}
    wanted = {paths.label(r["experiment"], r["seed"]): r.get("checkpoint", {}).get("sha256") for r in found}
    with processes.only_one(reports, "people"):
        try:
            kept = records.people(reports) or {"runs": {}}
        except records.RecordError:  # a damaged one is made anew
            kept = {"runs": {}}
        same = about.items() <= kept.items()
        runs = {k: run for k, run in kept["runs"].items() if same and run["sha256"] == wanted.get(k)}
        open_ = [label for label in wanted if label not in runs]
        clips = corpus.clips.iloc[rows]
        of_people = (features.logmels(corpus).filename, rows, corpus.is_keyword(study.keyword)[rows])
        score = partial(_among_people, *of_people, clips["speaker"].to_numpy(), study.profile.bootstrap)
        files = [paths.checkpoints(study.name) / f"{label}.pt" for label in open_]
        bar = {"desc": "scoring people", "unit": "model", "total": len(files), "disable": True if quiet else None}
        try:
            ends = {"initializer": processes.end_with, "initargs": (os.getpid(),)}
            with ProcessPoolExecutor(max_workers=cpu_count(), **ends) as pool:
                for label, run in zip(open_, tqdm(pool.map(score, files), **bar), strict=True):
                    runs[label] = run
                    if len(runs) % 20 == 0:  # what a killed run keeps
                        _write_people(reports, about, runs)
        finally:
            _write_people(reports, about, runs)
    return {**about, "runs": runs}


def _write_people(reports: Path, about: dict, runs: dict) -> None:
    text = json.dumps({**about, "runs": runs}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    paths.write_atomically(reports / "people.json", text + "\n")


def _among_people(
    logmels: str, rows: np.ndarray, is_keyword: np.ndarray, speakers: np.ndarray, resamples: int, checkpoint: Path
) -> dict:
    """What one model does among people, on one thread.

    Args:
        logmels: file of the log-mels of all clips, (clips, F, T).
        rows: those that count, (N,), with ``is_keyword`` and ``speakers`` of each, (N,).
    """
    torch.set_num_threads(1)
    model, sidecar = checkpoints.load(checkpoint)
    scores = crnn.score(model, np.load(logmels, mmap_mode="r"))[rows]
    at_1pct, at_0_1pct = (partial(metrics.miss_rate_at, share) for share in (0.01, 0.001))
    # Resample b draws the same people for every model. One that drew no keyword, or nothing else, is null.
    drawn = metrics.bootstrap(scores, is_keyword, speakers, resamples, at_1pct)
    measured = {"miss_at_1pct_fa": at_1pct, "miss_at_0_1pct_fa": at_0_1pct, "au_fa_fr": metrics.au_fa_fr}
    return {
        "sha256": sidecar["sha256"],
        **{name: float(f"{metric(scores, is_keyword):.4g}") for name, metric in measured.items()},
        "bootstrap": [None if np.isnan(miss) else round(miss * records.MISSES_OF) for miss in drawn],
    }
