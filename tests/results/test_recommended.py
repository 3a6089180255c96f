"""Which model a study recommends, and where it is said."""

import json

import pandas as pd
import pytest
from test_records import record

from kwslib import paths
from kwslib.results import page, records, tables

REFERENCE = paths.ROOT / "reports" / "reference"
PUBLISHED = sorted(found.parent.name for found in REFERENCE.glob("*/records"))


def run(name, seed, area, macs, compact=None, missed=()):
    """A record of a clip model, or with shares of keywords missed on val streams one of a stream model."""
    made = record(name, seed, area, macs)
    made |= {"recipe": {"teacher": None}, "data": {"corpus": "people"}}
    made["cost"]["compact_bytes"] = compact
    points = [
        {"stream": stream, "state": "carried", "asked_fa_per_h": 0.5, "val_miss_rate": share, "miss_rate": share / 2}
        | {
            "keywords": 9,
            "false_alarms": 1,
            "other_hours": 1.0,
            "fa_per_h": 1.0,
            "most_fa_per_h": 4.7,
            "latency_s": None,
        }
        for stream, share in zip(("ordinary", "dense"), missed, strict=False)
    ]
    if points:
        made["metrics"]["streams"] = {"points": points}
    return made


def recommended(found):
    chosen = tables.recommended(found, records.summary(found), records.stream_points(found))
    return {why: (r["experiment"], r["seed"]) for why, r in chosen.items()}


def test_the_rule_by_hand():
    found = [
        run("baseline", 0, 1e-5, 1000),
        run("large", 0, 1e-7, 500, 50),
        run("a", 0, 4e-5, 100, 60),
        run("a", 1, 2e-5, 100, 60),
        run("b", 0, 9e-5, 100, 10),
        run("best", 0, 8e-5, 90, 90, (0.03, 0.05)),
        run("best", 1, 9e-6, 90, 90, (0.03, 0.03)),
        run("near", 0, 8e-5, 90, 40, (0.04, 0.06)),
        run("far", 0, 8e-5, 90, 20, (0.04, 0.08)),
        run("wide", 0, 8e-5, 500, 30, (0.01, 0.01)),
    ]
    assert recommended(found) == {"clips": ("a", 1), "stream": ("best", 1), "smallest": ("near", 0)}
    assert recommended(found[:5]) == {"clips": ("a", 1)}  # no stream model, nothing to say of streams
    assert recommended(found[:2]) == {}
    for row in found:
        del row["cost"]["compact_bytes"]  # as in early records
    assert recommended(found)["smallest"] == ("best", 1)


def test_voices_of_a_synthesizer_leave_the_word_to_what_people_said():
    found = [
        run("baseline", 0, 1e-5, 1000),
        run("best", 0, 8e-5, 90, 20, (0.03, 0.05)),
        run("mixed", 0, 8e-5, 90, 90, (0.14, 0.05)),
        run("mixed-small", 0, 8e-5, 90, 40, (0.15, 0.06)),
        run("mixed-far", 0, 8e-5, 90, 10, (0.15, 0.09)),
    ]
    for row in found[2:]:
        row["recipe"]["teacher"] = ["one", "other"]
    assert recommended(found) == {"stream": ("best", 0), "smallest": ("best", 0)}
    for row in found:
        row["data"]["corpus"] = "synthetic"
    assert recommended(found) == {"stream": ("mixed", 0), "smallest": ("mixed-small", 0)}
    assert recommended(found[:2]) == {"stream": ("best", 0), "smallest": ("best", 0)}


@pytest.mark.parametrize("study", PUBLISHED)
def test_the_published_ones_follow_from_a_plain_loop(study):
    found = records.load_folder(REFERENCE / study / "records")
    macs = {r["experiment"]: r["cost"]["macs_per_clip"] for r in found}
    small = [name for name in macs if macs[name] * 10 <= macs["baseline"]]
    streams, clips, by_run = {}, {}, {}
    for r in found:
        name, missed = r["experiment"], []
        for point in r["metrics"].get("streams", {}).get("points", []):
            if point["state"] == "carried" and point["asked_fa_per_h"] is not None:
                missed.append(point["val_miss_rate"])
        figure = sum(missed) / len(missed) if missed else r["metrics"]["au_fa_fr_val"]
        (streams if missed else clips).setdefault(name, []).append(figure)
        by_run[name, r["seed"]] = figure
    mean = {name: sum(values) / len(values) for name, values in (streams | clips).items()}
    compact = {r["experiment"]: [] for r in found}
    for r in found:
        compact[r["experiment"]].append(r["cost"]["compact_bytes"])
    asked = [name for name in small if name in streams]
    if found[0]["data"]["corpus"] == "synthetic":
        kinds = {r["experiment"] for r in found if type(r["recipe"]["teacher"]) is list}
        asked = [name for name in asked if name in kinds] or asked
    best = min(asked, key=mean.get)
    near = [name for name in asked if mean[name] <= mean[best] + 0.02]
    names = {"clips": min((name for name in small if name in clips), key=mean.get), "stream": best}
    names["smallest"] = min(near, key=lambda name: sum(compact[name]) / len(compact[name]))
    expected = {
        why: (name, min((seed for who, seed in by_run if who == name), key=lambda seed: by_run[name, seed]))
        for why, name in names.items()
    }
    assert recommended(found) == expected


def test_the_published_list_is_what_records_say_and_its_files_are_there():
    folder = paths.ROOT / "checkpoints" / "reference"
    listed = json.loads((folder / "recommended.json").read_text())
    assert listed == page.recommend(REFERENCE) and set(listed) == set(PUBLISHED)
    for files in listed.values():
        assert set(files) == set(page.FOR) and all((folder / file).exists() for file in files.values())


def test_what_a_run_finds():
    assert tables.finds(run("a", 0, 1e-5, 9, 9, (0.1, 0.3))) == ("95.0 %", "1.00 (≤ 4.7) per hour")
    assert tables.finds(record("a", 0, 1e-5)) == ("–", "–")  # early records have no curve


def test_stream_models_are_judged_on_streams_alone():
    found = [run("baseline", 0, 1e-5, 1000), run("on-streams", 0, 9e-3, 90, 40, (0.1, 0.1))]
    found[1]["control"] = "baseline"
    summary, points = records.summary(found), records.stream_points(found)
    assert list(page._of_clips(summary, points).index) == ["baseline"]
    assert page._of_clips(summary, pd.DataFrame()) is summary


def test_large_compact_files_are_not_those_to_take():
    sizes = {19_000: "kws", tables.COMPACT_BYTES: "kws", 20_001: "pt", None: "pt"}
    for size, suffix in sizes.items():
        assert tables.published_file(run("a", 2, 1e-5, 9, size)) == f"a-seed2.{suffix}"
