"""Records: the JSON that one experiment and seed leaves behind, and tables made of them.

A record is all that crosses from training to plots and report. What differs between two equal
runs (times, machine) sits in its ``run`` block; everything else is reproducible.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from kwslib import paths
from kwslib.config import PROFILES, SAMPLE_RATE, FeatureConfig
from kwslib.metrics import clear_ratio, interval95

SCHEMA = 1
COSTS = ("params", "macs_per_clip", "macs_per_second", "state_dict_bytes", "weights_bytes", "compact_bytes")
OF_DETECTOR = "detector_macs_per_clip"  # of the net and of the log-mels it reads
LATENCIES = ("latency_ms_per_clip", "latency_ms_per_step")
NUMBER = int | float
MEASURED = int | float | None  # None or NaN where there was nothing to measure
POINT = {
    **dict.fromkeys(("stream", "state"), str),
    **dict.fromkeys(("keywords", "false_alarms"), int),
    **dict.fromkeys(("other_hours", "fa_per_h", "most_fa_per_h"), NUMBER),
    **dict.fromkeys(("asked_fa_per_h", "miss_rate", "val_miss_rate?", "latency_s"), MEASURED),
}
# What a record holds at least, and what tables take from it, by its type. A list holds any number of such, a tuple
# as many as it says; what has a ? may be missing.
LEAST = {"experiment": str, "seed": int, "order": int, "profile": str, "metrics": {}, "cost": {}, "run": {}}
FORM = {
    "control": str | None,
    "note": str,
    "precision": str,
    "epochs": int,
    "metrics": {
        "au_fa_fr": NUMBER,
        "au_fa_fr_as_is?": NUMBER,  # early records: their au_fa_fr is that
        "au_fa_fr_val": NUMBER,
        "au_fa_fr_ci95": (MEASURED, MEASURED),
        "roc_auc": MEASURED,
        "n_keyword": int,
        "n_other": int,
        "bootstrap": [MEASURED],
        "streams?": {"points": [POINT]},
        "curve?": {"fa": [NUMBER], "fr": [NUMBER]},
    },
    "cost": {
        **dict.fromkeys(("params", "macs_per_clip", "state_dict_bytes", "weights_bytes"), int),
        **dict.fromkeys(("macs_per_second?", "compact_bytes?"), MEASURED),
    },
    "history?": {"epoch?": [int], "val_au_fa_fr?": [NUMBER]},
    "run": {"wall_s": NUMBER, **dict.fromkeys((f"{key}?" for key in LATENCIES), MEASURED)},
    "checkpoint?": {"sha256?": str},
    "recipe?": {"after?": [{"class": str}]},
    "model?": {"class?": str},
}
# What people.json holds, and each of its runs.
PEOPLE = {
    **dict.fromkeys(("folder", "corpus_fingerprint", "keyword", "interval_over"), str),
    **dict.fromkeys(("n_keyword", "n_other", "known_clips", "clips_of_known_speakers", "resamples"), int),
    "n_speakers": int | None,  # None: the file names tell none
    "runs": {},
}
SCORED = {"sha256": str, "bootstrap": [MEASURED]}
SCORED |= dict.fromkeys(("miss_at_1pct_fa", "miss_at_0_1pct_fa", "au_fa_fr"), NUMBER)
MISSES_OF = 1000  # their bootstraps count the misses of so many keywords: whole numbers keep a large file small
OF_PEOPLE = ("people_miss", "people_miss_low", "people_miss_high", "people_area")  # columns of a summary


class RecordError(ValueError):
    """A record cannot be read; the message says which and what to do."""


def folder(study: str) -> Path:
    """Where the records of a study are kept."""
    return paths.reports(study) / "records"


def path(study: str, experiment: str, seed: int) -> Path:
    """Where the record of a run is kept."""
    return folder(study) / f"{paths.label(experiment, seed)}.json"


def write(study: str, record: dict) -> Path:
    """Write a record atomically, with the schema's number and a checksum, which shows whether it was edited."""
    target = path(study, record["experiment"], record["seed"])
    record = {"schema": SCHEMA, **record}
    paths.write_json(target, record | {"run": record["run"] | {"sha256": _digest(record)}})
    return target


def _digest(record: dict) -> str:
    """Of everything outside the ``run`` block: two equal runs have the same."""
    text = json.dumps({key: value for key, value in record.items() if key != "run"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _failure(study: str, experiment: str, seed: int) -> Path:
    return paths.reports(study) / "failures" / f"{paths.label(experiment, seed)}.json"


def note_failure(study: str, experiment: str, seed: int, error: str) -> None:
    """Leave a note of a run that failed, unless the disk is full: the report shows it until the run is tried again."""
    with contextlib.suppress(OSError):
        paths.write_json(_failure(study, experiment, seed), {"experiment": experiment, "seed": seed, "error": error})


def forget_failures(study: str, runs: Iterable[tuple[str, int]] | None = None) -> None:
    """Remove the notes of earlier failures, of these runs or of a whole study, for they are tried again."""
    if runs is None:
        shutil.rmtree(paths.reports(study) / "failures", ignore_errors=True)
    for experiment, seed in runs or ():
        with contextlib.suppress(OSError):
            _failure(study, experiment, seed).unlink()


def failures(reports: Path) -> list[dict]:
    """Runs of the study in this folder that failed and were not tried again: ``experiment, seed, error`` of each."""
    found = []
    for file in sorted((reports / "failures").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            row = json.loads(file.read_bytes())
            found.append({key: row[key] for key in ("experiment", "seed", "error")})
    return found


def read(file: Path) -> dict:
    """One record.

    Raises:
        RecordError: damaged, edited, or written by another version.
    """
    try:
        record = json.loads(file.read_bytes())
        known = record["schema"] == SCHEMA
        checked = known and "sha256" in record["run"]  # early ones have none
        edited = checked and record["run"]["sha256"] != _digest(record)
    except (AttributeError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise RecordError(f"{file} is not a record ({error}): delete it and run the study again") from None
    if not known:
        raise RecordError(f"{file} has schema {str(record['schema'])[:40]}, this version reads {SCHEMA}")
    if edited:
        raise RecordError(f"{file} was edited after it was written: restore it, or delete it and run the study again")
    require(record, LEAST, file)
    if record["profile"] not in PROFILES or record["experiment"] != paths.slug(record["experiment"]):
        what = f"no experiment is called {record['experiment'][:80]!r} in profile {record['profile'][:80]!r}"
        raise RecordError(f"{file} is not a record ({what}): delete it and run the study again")
    return record


def require(record: dict, form: dict, what: object) -> None:
    """Raise a ``RecordError`` that names the first value that is missing or of another type than in ``form``."""
    if misfit := _misfit(record, form, "it"):
        raise RecordError(f"{what} is not a record ({misfit}): delete it and run the study again")


def _misfit(value: object, form: object, name: str) -> str:
    """What is wrong with a value, in a few words, or nothing.

    >>> _misfit({"seed": "x"}, {"seed": int}, "it"), _misfit([1, None], [MEASURED], "it")
    ("seed is 'x'", '')
    """
    if isinstance(form, dict) and isinstance(value, dict):
        for key in form:
            bare = key.removesuffix("?")
            if bare not in value and key == bare:
                return f"{key} is missing"
            if bare in value and (misfit := _misfit(value[bare], form[key], bare)):
                return misfit
        return ""
    if isinstance(form, list | tuple) and isinstance(value, list):
        if isinstance(form, tuple) and len(value) != len(form):
            return f"{name} has not {len(form)} values"
        return next(filter(None, (_misfit(item, form[0], f"in {name} something") for item in value)), "")
    fits = not isinstance(form, dict | list | tuple) and isinstance(value, form)
    if fits and isinstance(value, str):
        fits = not any(0xD800 <= ord(letter) <= 0xDFFF for letter in value)  # halves of letters cannot be written
    if fits and isinstance(value, int | float):
        fits = (abs(value) < 1e15 and not isinstance(value, bool)) or (form == MEASURED and value != value)
    return "" if fits else f"{name} is {str(value)[:40]!r}"


def load(study: str) -> list[dict]:
    """All records of a study, in the order in which its notebooks ran them.

    Raises:
        RecordError: there are none, or one is damaged.
    """
    return load_folder(folder(study))


def load_folder(where: Path) -> list[dict]:
    """The same for any folder; of a quick profile and a longer one that replaces it, the longer one alone counts."""
    found = []
    for file in sorted(where.glob("*.json")):
        found.append(read(file))
        require(found[-1], FORM, file)
    if not found:
        raise RecordError(f"no records in {where}: run 'make reproduce' first")
    longest = max((r["profile"] for r in found), key=list(PROFILES).index)
    found = [r for r in found if r["profile"] == longest]
    runs, resamples = {(r["experiment"], r["seed"]) for r in found}, {len(r["metrics"]["bootstrap"]) for r in found}
    if len(runs) < len(found) or len(resamples) > 1 or 0 in resamples:
        raise RecordError(
            f"the records in {where} do not belong together: two are of one run, or their bootstraps are not of one "
            "length: delete those that do not belong there and run the study again"
        )
    return sorted(found, key=lambda r: (r["order"], r["experiment"], r["seed"]))


def people(reports: Path) -> dict | None:
    """How the models of the study in this folder do among people, as ``kwslib.lab.verify`` left it; ``None``: not yet.

    Raises:
        RecordError: the file is damaged.
    """
    file = reports / "people.json"
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes())
        misfit = _misfit(found, PEOPLE, "it")
        for label, run in found["runs"].items() if not misfit else ():
            misfit = misfit or _misfit(run, SCORED, label)
            if not misfit and not len(run["bootstrap"]) == found["resamples"] > 0:
                misfit = f"{label} has {len(run['bootstrap'])} resamples"
    except (OSError, ValueError, RecursionError) as error:
        misfit = str(error)
    if misfit:
        raise RecordError(f"{file} is damaged ({misfit}): delete it and run 'make people PEOPLE=<folder>' again")
    return found


def results(records: list[dict]) -> pd.DataFrame:
    """One row per record: what ``results.csv`` holds. AU-FA-FR is on test unless it says val."""
    rows = []
    for r in records:
        metrics, cost = r["metrics"], r["cost"]
        row = {"experiment": r["experiment"], "seed": r["seed"]}
        row |= {"au_fa_fr": metrics["au_fa_fr"], "au_fa_fr_as_is": metrics.get("au_fa_fr_as_is", metrics["au_fa_fr"])}
        row |= {"au_fa_fr_val": metrics["au_fa_fr_val"]}
        row |= dict(zip(("ci95_low", "ci95_high"), metrics["au_fa_fr_ci95"], strict=True))
        row |= {key: metrics[key] for key in ("roc_auc", "n_keyword", "n_other")}
        row |= {key: cost.get(key, np.nan) for key in COSTS}
        log_mel = FeatureConfig(hop_length=SAMPLE_RATE * r.get("model", {}).get("hop_ms", 10) // 1000)
        row[OF_DETECTOR] = cost["macs_per_clip"] + log_mel.frames_per_clip * log_mel.macs_per_frame
        row |= {"precision": r["precision"], **{key: _measured(r, key) for key in LATENCIES}}
        rows.append(row | {"epochs": r["epochs"], "wall_s": r["run"]["wall_s"]})
    return pd.DataFrame(rows)


def technique(record: dict) -> str:
    """What an experiment tries by its own recipe, whatever it starts from: the first of these that is so, or plain.

    >>> technique({"metrics": {}, "precision": "int8", "recipe": {"teacher": "baseline"}})
    'fewer bits'
    """
    recipe = record.get("recipe", {})
    tried = {
        "stream": "streams" in record["metrics"],
        "pruned": any(step["class"] == "Prune" for step in recipe.get("after", ())),
        "fewer bits": record["precision"] != "float32",
        "distilled": recipe.get("teacher") is not None,
        "other net": record.get("model", {}).get("class", "CRNNConfig") != "CRNNConfig",
    }
    return next((name for name, so in tried.items() if so), "plain")


def stream_points(records: list[dict]) -> pd.DataFrame:
    """What was counted on streams of test speakers: one row per run, stream, state and rate that was allowed.

    Columns: ``experiment, seed``, then those of the points of ``kwslib.streaming.decision.measure``.
    Empty where nothing was counted.
    """
    rows = [
        {"experiment": r["experiment"], "seed": r["seed"], "val_miss_rate": np.nan}
        | {name: np.nan if value is None else value for name, value in point.items()}
        for r in records
        for point in r["metrics"].get("streams", {}).get("points", ())
    ]
    return pd.DataFrame(rows)


def _measured(record: dict, key: str) -> float:
    """A figure of the ``run`` block; NaN for a run that was interrupted before it was timed."""
    value = record["run"].get(key)
    return np.nan if value is None else value


def replicates(records: list[dict], experiment: str, only: set[int] | None = None) -> np.ndarray:
    """Bootstrap replicates of the mean over seeds, resampling test speakers and seeds, (resamples,).

    Resample b drew the same speakers and the same seeds in every experiment, so replicates of two
    experiments can be subtracted: a seed stands against itself (same start, same teacher).
    ``only`` names the seeds to use; all by default.
    """
    runs = [r for r in records if r["experiment"] == experiment and (only is None or r["seed"] in only)]
    return _over_seeds([r["metrics"]["bootstrap"] for r in runs])


def _over_seeds(bootstraps: list[list]) -> np.ndarray:
    """The mean over seeds, drawn anew in each resample, (seeds, resamples) -> (resamples,)."""
    own = np.array(bootstraps, dtype=float)
    n_seeds, resamples = own.shape
    seeds = np.random.default_rng(0).integers(0, n_seeds, (n_seeds, resamples))
    return own[seeds, np.arange(resamples)].mean(axis=0)


def summary(records: list[dict], baseline: str = "baseline", people: dict | None = None) -> pd.DataFrame:
    """One row per experiment, means over seeds, intervals over speakers and seeds, ratios to the baseline.

    Columns: ``au_fa_fr, au_fa_fr_val, ci95_low, ci95_high, seed_low, seed_high, ratio`` (to the baseline's
    AU-FA-FR), ``speed_up, compression`` (baseline's MACs and state-dict bytes over these),
    ``compact_compression`` (baseline's state-dict bytes over those of this one's compact file),
    ``control, gain, gain_low, gain_high`` (control's AU-FA-FR minus this one, positive is better,
    with the interval of that difference on the same resampled speakers and seeds), costs, ``technique, seeds, note``.

    With ``people``, of the function of that name, ``people_miss, people_miss_low, people_miss_high`` (keywords of
    people missed at 1 % false accepts, interval over people and seeds) and ``people_area`` (AU-FA-FR on them); NaN
    where a run was not scored, or has another checkpoint since.
    """
    table = results(records)
    first = {r["experiment"]: r for r in reversed(records)}
    rows = {}
    for name, runs in table.groupby("experiment", sort=False):
        mean, record = runs.mean(numeric_only=True), first[name]
        low, high = interval95(replicates(records, name))
        rows[name] = {key: mean[key] for key in ("au_fa_fr", "au_fa_fr_val")} | {"ci95_low": low, "ci95_high": high}
        rows[name] |= {"seed_low": runs["au_fa_fr"].min(), "seed_high": runs["au_fa_fr"].max()}
        whole = (*(key for key in COSTS if key not in ("macs_per_second", "compact_bytes")), OF_DETECTOR)
        rows[name] |= {key: int(mean[key]) for key in whole}
        rows[name] |= {"compact_bytes": mean["compact_bytes"], **{key: runs[key].median() for key in LATENCIES}}
        rows[name] |= {key: record[key] for key in ("precision", "control", "note")}
        rows[name] |= {"technique": technique(record), "seeds": len(runs)}
        rows[name] |= _among_people([r for r in records if r["experiment"] == name], people)
    out = pd.DataFrame(rows).T.infer_objects()
    base = out.loc[baseline] if baseline in out.index else {}
    for ratio, column in (("ratio", "au_fa_fr"), ("speed_up", "macs_per_clip"), ("compression", "state_dict_bytes")):
        of_base = base.get(column) or np.nan  # no baseline, or a perfect one: no ratio
        out[ratio] = (out[column] / of_base if ratio == "ratio" else of_base / out[column]).astype(float)
    out["compact_compression"] = (out["compression"] * out["state_dict_bytes"] / out["compact_bytes"]).astype(float)
    out[["gain", "gain_low", "gain_high"]] = np.nan
    areas = table.pivot(index="seed", columns="experiment", values="au_fa_fr")
    for name, control in out["control"].items():
        common = areas[[name, control]].dropna() if control in rows and control != name else pd.DataFrame()
        if len(common):
            seeds = set(common.index)
            difference = replicates(records, control, seeds) - replicates(records, name, seeds)
            gain = (common[control] - common[name]).mean()
            out.loc[name, ["gain", "gain_low", "gain_high"]] = (gain, *interval95(difference))
    out[list(OF_PEOPLE)] = out[list(OF_PEOPLE)].astype(float)
    return out


def _among_people(runs: list[dict], people: dict | None) -> dict[str, float]:
    """The columns ``OF_PEOPLE`` of one experiment."""
    scored = []
    for r in runs:
        row = (people or {"runs": {}})["runs"].get(paths.label(r["experiment"], r["seed"]))
        if row is None or row["sha256"] != r.get("checkpoint", {}).get("sha256"):
            return dict.fromkeys(OF_PEOPLE, np.nan)
        scored.append(row)
    low, high = interval95(_over_seeds([row["bootstrap"] for row in scored]) / MISSES_OF)
    miss, area = (np.mean([row[key] for row in scored]) for key in ("miss_at_1pct_fa", "au_fa_fr"))
    return dict(zip(OF_PEOPLE, (miss, low, high, area), strict=True))


def clear_ratios(records: list[dict], summary: pd.DataFrame) -> pd.Series:
    """Of each experiment with a control: the smallest true ratio of both that this test would call clear."""
    seeds: dict[str, set] = {}
    for r in records:
        seeds.setdefault(r["experiment"], set()).add(r["seed"])
    found = {}
    for name, control in summary["control"].items():
        if control != name and (both := seeds.get(control, set()) & seeds[name]):
            found[name] = clear_ratio(replicates(records, name, both), replicates(records, control, both))
    return pd.Series(found, dtype=float)


def pareto(summary: pd.DataFrame, cost: str, quality: str = "au_fa_fr") -> list[str]:
    """Experiments that no other one beats in both cost and quality, cheapest first.

    >>> table = pd.DataFrame({"c": [1, 2, 3], "q": [5.0, 6.0, 1.0]}, index=["a", "b", "d"])
    >>> pareto(table, "c", "q")
    ['a', 'd']
    """
    front, best = [], float("inf")
    for name, row in summary.sort_values([cost, quality]).iterrows():
        if row[quality] < best:
            front.append(name)
            best = row[quality]
    return front
