import copy
import json

import numpy as np
import pandas as pd
import pytest

from kwslib import metrics
from kwslib.results import records, sentences, tables
from kwslib.results.records import RecordError


def record(name, seed, area, macs=1000, size=4000, control=None, order=0, replicates=None, precision="float32"):
    """A record with numbers that can be checked by hand."""
    return {
        "schema": 1,
        "experiment": name,
        "seed": seed,
        "order": order,
        "control": control,
        "note": "",
        "profile": "smoke",
        "precision": precision,
        "epochs": 1,
        "features": {},
        "metrics": {
            "au_fa_fr": area,
            "au_fa_fr_as_is": area * 2,
            "au_fa_fr_val": area / 2,
            "au_fa_fr_ci95": [area / 3, area * 3],
            "roc_auc": 0.9,
            "n_keyword": 7,
            "n_other": 93,
            "n_speakers": 5,
            "bootstrap": replicates or [area] * 4,
        },
        "cost": {
            "params": 10,
            "macs_per_clip": macs,
            "macs_per_second": macs,
            "state_dict_bytes": size,
            "weights_bytes": size // 2,
        },
        "run": {"latency_ms_per_clip": 0.5, "latency_ms_per_step": 0.25, "wall_s": 1.0},
    }


def test_a_whole_detector_computes_the_frames_that_its_net_reads():
    dense, sparse = record("dense", 0, 1e-5), record("sparse", 0, 1e-5)
    sparse["model"] = {"class": "TimeNetConfig", "hop_ms": 60}
    whole = records.results([dense, sparse])["detector_macs_per_clip"]
    assert whole.to_list() == [1000 + 101 * 11_635, 1000 + 17 * 11_635]  # 0, 60, ..., 960 ms


def test_summary_by_hand():
    found = [
        record("baseline", 0, 2e-5, replicates=[1e-5, 2e-5, 3e-5, 4e-5]),
        record("baseline", 1, 4e-5, replicates=[3e-5, 4e-5, 5e-5, 6e-5]),
        record("small", 0, 1e-5, 100, 400, "baseline", 1, replicates=[1e-5, 1e-5, 2e-5, 2e-5]),
        record("small", 1, 3e-5, 100, 400, "baseline", 1, replicates=[1e-5, 1e-5, 2e-5, 2e-5]),
    ]
    same_seeds = [2e-5, 3e-5, 4e-5, 5e-5]
    found[0]["metrics"]["bootstrap"] = found[1]["metrics"]["bootstrap"] = same_seeds

    table = records.summary(found)
    small = table.loc["small"]
    assert small["au_fa_fr"] == pytest.approx(2e-5) and small["ratio"] == pytest.approx(2 / 3)
    assert (small["speed_up"], small["compression"], small["seeds"]) == (10.0, 10.0, 2)
    # replicates that do not depend on the seed: baseline 2 3 4 5, small 1 1 2 2, so gains of 1 2 2 3
    expected = np.percentile([1e-5, 2e-5, 2e-5, 3e-5], [2.5, 97.5])
    assert [small["gain_low"], small["gain_high"]] == pytest.approx(list(expected))
    assert small["gain"] == pytest.approx(1e-5)
    assert tables.verdict(small) == "better"
    assert pd.isna(table.loc["baseline", "gain"])


def test_seeds_that_disagree_widen_the_interval_but_not_that_of_a_paired_difference():
    found = [record("baseline", seed, area, replicates=[area] * 500) for seed, area in enumerate((1e-5, 2e-5, 6e-5))]
    found += [
        record(
            "paired",
            r["seed"],
            0,
            control="baseline",
            order=1,
            replicates=[b - 1e-6 for b in r["metrics"]["bootstrap"]],
        )
        for r in found
    ]
    table = records.summary(found)
    assert table.loc["baseline", "ci95_low"] < 1.5e-5 and table.loc["baseline", "ci95_high"] > 4.5e-5
    assert table.loc["paired", "gain_low"] == pytest.approx(1e-6) == table.loc["paired", "gain_high"]


def test_what_lost_is_said_to_have_lost():
    found = [
        record("baseline", 0, 1e-5),
        record("worse", 0, 9e-5, 100, 400, "baseline", 1),
        record("same-fp16", 0, 1e-5, 1000, 2000, "baseline", 2, precision="float16"),
    ]
    said = tables.findings(records.summary(found))
    assert "Above the reports' bar of 5.50e-5 (AU-FA-FR ×1e5): worse (9.00)." in said["failed"]
    assert any(s.startswith("baseline: AU-FA-FR 1.00e-5, below") for s in said["worked"])
    assert "Worse than its control, beyond the interval (gain ×1e5): worse (-8.00)." in said["failed"]
    assert "Smaller than its control without a clear loss (gain ×1e5): same-fp16 (0.00)." in said["worked"]


def test_sentences_to_quote():
    found = [
        record("baseline", 0, 1e-5, 1000, 4000),
        record("small", 0, 2e-5, 100, 400, "baseline", 1),
        record("smaller", 0, 9e-5, 50, 200, "small", 2),
    ]
    table = records.summary(found)
    assert sentences.say_smallest(table).startswith(
        "The fewest MACs below the reports' bar of 5.50e-5 are those of small: 10.0× fewer MACs and 10.0× fewer bytes"
    )
    assert sentences.say_smallest(table.loc[["smaller"]]).startswith("None of these 1 models stays below")
    assert sentences.say_gains(table.loc[["small", "smaller"]], "nets").startswith("Of 2 nets, 0 were clearly better")
    assert sentences.say_rivals(table, ["smaller"], "small").endswith("with 100 MACs and 0.4 kB.")
    tied = table.assign(macs_per_clip=100, ratio=float("nan")).sort_values("au_fa_fr", ascending=False)
    assert " are those of baseline: " in sentences.say_smallest(tied) and "nan" not in sentences.say_smallest(tied)


def test_a_perfect_or_missing_baseline_gives_no_ratio_but_a_table():
    perfect = records.summary([record("baseline", 0, 0.0), record("small", 0, 1e-5, order=1)])
    assert perfect["ratio"].isna().all() and (perfect["speed_up"] == 1).all()
    missing = records.summary([record("small", 0, 1e-5)])
    assert missing[["ratio", "speed_up", "compression"]].isna().all().all()
    for table in (perfect, missing):
        assert "nan" not in tables.display_table(table).to_string()


def test_gains_compare_the_seeds_that_both_have():
    found = [record("baseline", seed, area) for seed, area in enumerate((1e-5, 2e-5, 9e-5))]
    found += [record("small", 1, 1.5e-5, control="baseline", order=1)]
    assert records.summary(found).loc["small", "gain"] == pytest.approx(0.5e-5)


def test_a_longer_profile_that_has_begun_hides_the_quick_one():
    records.write("s", record("baseline", 0, 1e-5, replicates=[1e-5] * 3))
    records.write("s", record("small", 0, 1e-5) | {"profile": "standard"})
    assert [r["experiment"] for r in records.load("s")] == ["small"]


def test_missing_damaged_and_foreign_records_are_named(home):
    with pytest.raises(RecordError, match="no records in .* run 'make reproduce' first"):
        records.load("nothing")
    path = records.write("s", record("baseline", 0, 1e-5))
    path.write_text("{")
    with pytest.raises(RecordError, match="is not a record"):
        records.load("s")
    path.write_text('{"schema": 99}')
    with pytest.raises(RecordError, match="schema 99"):
        records.load("s")


def with_people(found, **missed) -> dict:
    """What ``people.json`` says of these records; misses of each experiment, the same in every resample."""
    about = {"folder": "some", "corpus_fingerprint": "0", "keyword": "go", "interval_over": "people", "n_keyword": 1250}
    about |= {"n_other": 6000, "n_speakers": 900, "known_clips": 3, "clips_of_known_speakers": 0, "resamples": 40}
    runs = {}
    for r in found:
        r["checkpoint"] = {"sha256": f"of {r['experiment']} {r['seed']}"}
        miss = missed[r["experiment"]] * (1 + r["seed"])
        scored = {"miss_at_1pct_fa": miss, "miss_at_0_1pct_fa": 2 * miss, "au_fa_fr": miss / 100}
        bootstrap = [round(records.MISSES_OF * miss)] * 39 + [None]
        runs[f"{r['experiment']}-seed{r['seed']}"] = {**r["checkpoint"], **scored, "bootstrap": bootstrap}
    return {**about, "runs": runs}


def test_people_are_columns_of_their_own():
    found = [record("baseline", 0, 1e-5), record("baseline", 1, 1e-5), record("small", 0, 2e-5, 100, order=1)]
    found += [record("big", 0, 0.5e-5, 2000, order=2)]
    people = with_people(found, baseline=0.04, small=0.03, big=0.08)
    found[-1]["checkpoint"]["sha256"] = "trained anew"
    summary = records.summary(found, people=people)
    assert summary.loc["small", list(records.OF_PEOPLE)].tolist() == pytest.approx([0.03, 0.03, 0.03, 0.0003])
    mean, low, high, area = summary.loc["baseline", list(records.OF_PEOPLE)]
    assert (mean, area) == pytest.approx((0.06, 0.0006)) and 0.04 <= low <= high <= 0.08 and low < high
    assert summary.loc["big", list(records.OF_PEOPLE)].isna().all()
    assert records.pareto(summary, "macs_per_clip", "people_miss") == ["small"]
    shown = tables.display_table(summary)[tables.PEOPLE]
    assert shown["small"] == "3.0 (3.0 to 3.0)" and shown["big"] == "–"
    without = records.summary(found)
    assert without[list(records.OF_PEOPLE)].isna().all().all()
    assert tables.PEOPLE not in tables.display_table(without)
    assert "1,250 recordings of go and 6,000 of other words in some, by 900 speakers" in sentences.say_people(people)
    assert "the file names do not tell" in sentences.say_people(people | {"n_speakers": None})
    assert sentences.say_people(None).startswith("No people yet: `make people PEOPLE=<folder>`")


def test_a_damaged_file_of_people_is_named(tmp_path):
    assert records.people(tmp_path) is None
    good = with_people([record("small", 0, 2e-5)], small=0.03)
    (tmp_path / "people.json").write_text(json.dumps(good))
    assert records.people(tmp_path) == good
    short = copy.deepcopy(good)
    short["runs"]["small-seed0"]["bootstrap"].pop()
    unnamed = {key: value for key, value in good.items() if key != "folder"}
    no_numbers = good | {"runs": {"small-seed0": {"sha256": "0"}}}
    for damaged, why in ((short, "39 resamples"), (unnamed, "folder is missing"), (no_numbers, "bootstrap is missing")):
        (tmp_path / "people.json").write_text(json.dumps(damaged))
        with pytest.raises(RecordError, match=f"people.json is damaged .*{why}.*: delete it and run 'make people"):
            records.people(tmp_path)
    for content in ("{", "[]", '{"runs": 5}', "[" * 100_000):
        (tmp_path / "people.json").write_text(content)
        with pytest.raises(RecordError, match="is damaged"):
            records.people(tmp_path)


def test_published_rows_stand_beside_ours():
    table = tables.beside(records.summary([record("baseline", 0, 1e-5), record("a1-kd", 0, 1e-5, 100)]))
    assert set(table.index) == {"A1", "B0"}
    assert table.loc["A1", "speed_up, published"] == 10.3
    assert table.loc["A1", "speed_up, ours"] == 10.0


def test_stream_points_become_a_table_and_sentences():
    def point(stream, asked, missed, alarms, hours):
        rates = {"miss_rate": missed, "val_miss_rate": missed, "fa_per_h": alarms / hours, "most_fa_per_h": 9.0}
        counts = {"keywords": 100, "false_alarms": alarms, "other_hours": hours, "latency_s": 0.05}
        return {"stream": stream, "state": "carried", "asked_fa_per_h": asked, **rates, **counts}

    def run(name, seed, missed):
        points = [point("ordinary", 0.5, missed, 1, 4.0), point("noise", None, None, 0, 1.0)]
        return {"experiment": name, "seed": seed, "metrics": {"streams": {"points": points}}}

    found = [run("big", 0, 0.02), run("big", 1, 0.04), run("small", 0, 0.10), run("worse", 0, 0.30)]
    points = records.stream_points([*found, {"experiment": "clips", "seed": 0, "metrics": {}}])
    assert len(points) == 8 and records.stream_points([]).empty
    table = tables.stream_table(points)
    assert table.loc["big", "ordinary, carried: found, %"] == "97.0 (96.0 to 98.0)"
    assert table.loc["big", "ordinary, carried: FA/h, asked 0.5"] == "0.25"
    assert table.loc["small", "noise: FA/h"] == "0.00 (≤ 9.0)"
    summary = pd.DataFrame({"speed_up": [1.0, 12.0, 12.0]}, index=["big", "small", "worse"])
    said = sentences.say_streams(points, summary)
    assert "10 times fewer MACs, small, finds 90.0 % of the keywords at 0.25 false alarms per hour" in said
    assert "more MACs, big, finds 97.0 %" in said
    assert "ordinary 4.0 h with 100 keywords" in sentences.say_hours(points)


@pytest.mark.parametrize("spread", [0.05, 0.1, 0.4])
def test_the_ratio_that_a_test_sees_is_that_of_the_normal_distribution(spread):
    """Of two independent areas whose logarithms have this spread: exp((1.96 + 0.84) sqrt(2) spread)."""
    rng = np.random.default_rng(0)
    drawn = [(1e-5 * np.exp(spread * rng.normal(size=50_000))).tolist() for _ in range(2)]
    found = [record("a", 0, 1e-5, replicates=drawn[0]), record("b", 0, 1e-5, control="a", replicates=drawn[1])]
    seen = records.clear_ratios(found, records.summary(found))
    assert list(seen.index) == ["b"]
    assert np.log(seen["b"]) == pytest.approx((1.96 + 0.8416) * np.sqrt(2) * spread, rel=0.03)
    assert f"a true ratio to the control of {seen['b']:.2f} clear" in sentences.say_power(seen)


def test_the_ratio_that_a_test_sees_is_called_clear_in_four_repeats_of_five():
    """A plain simulation: clips of one speaker each, whose errors are drawn anew, and the verdict's own interval."""
    rng, n, ratio = np.random.default_rng(1), 400, None
    clear = 0
    for _ in range(100):
        theirs = rng.exponential(1.0, n) * (rng.random(n) < 0.2)
        mine = rng.exponential(1.0, n) * (rng.random(n) < 0.2)
        resamples = rng.multinomial(n, np.full(n, 1 / n), 400)
        ratio = ratio or metrics.clear_ratio(resamples @ mine, resamples @ theirs)
        low, _ = metrics.interval95(resamples @ theirs - resamples @ mine / ratio)
        clear += low > 0
    assert 1.2 < ratio < 3 and 65 <= clear <= 95


def test_no_ratio_can_be_seen_without_errors_or_without_a_control():
    perfect = [record("a", 0, 0.0, replicates=[0.0] * 4), record("b", 0, 1e-5, control="a")]
    assert records.clear_ratios(perfect, records.summary(perfect)).isna().all()
    alone = [record("a", 0, 1e-5)]
    assert sentences.say_power(records.clear_ratios(alone, records.summary(alone))) == ""


def test_what_is_tried_follows_from_the_recipe_alone():
    tried = {"recipe": {"after": [], "teacher": None}, "model": {"class": "CRNNConfig"}}
    made = record("a", 0, 1e-5) | tried
    assert records.technique(record("a", 0, 1e-5)) == records.technique(made) == "plain"
    made["model"]["class"] = "SeparableConfig"
    assert records.technique(made) == "other net"
    made["recipe"]["teacher"] = ["baseline", "rival"]
    assert records.technique(made) == "distilled"
    made["precision"] = "weight-int4"
    assert records.technique(made) == "fewer bits"
    made["recipe"]["after"] = [{"class": "Prune"}, {"class": "QAT"}]
    assert records.technique(made) == "pruned"
    made["metrics"]["streams"] = {"points": []}
    assert records.technique(made) == "stream"
