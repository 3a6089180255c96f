"""Results as people read them: numbers, tables and sentences, all made from records."""

from collections.abc import Sequence

import pandas as pd

from kwslib.results import published, records


def area(value: float) -> str:
    """An AU-FA-FR for people, in units of 1e-5.

    >>> area(3.14159e-5), area(-1e-9)
    ('3.14', '0.00')
    """
    return "–" if pd.isna(value) else f"{round(value * 1e5, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"


def times(value: float) -> str:
    """A ratio for people.

    >>> times(10.304)
    '10.3×'
    """
    return "–" if pd.isna(value) else f"{value:.1f}×"


def milliseconds(value: float) -> str:
    """A latency for people.

    >>> milliseconds(0.456), milliseconds(float("nan"))
    ('0.46', '–')
    """
    return "–" if pd.isna(value) else f"{value:.2f}"


CLEAR = ("better", "worse")  # verdicts whose interval does not hold 0


def verdict(row: pd.Series) -> str:
    """What an experiment bought over its control, in at most three words.

    >>> verdict(pd.Series({"gain": 2e-5, "gain_low": 1e-6, "gain_high": 3e-5}))
    'better'
    """
    if pd.isna(row["gain"]):
        return ""
    if row["gain_low"] > 0:
        return "better"
    return "worse" if row["gain_high"] < 0 else "no clear difference"


PEOPLE = "people: misses at 1 % FA, %"  # a column of ``display_table`` where there are any
SMOKE = "This was a smoke run: it shows that everything runs. Its figures mean nothing."


def percent(value: float) -> str:
    """A share for people, in percent.

    >>> percent(0.0612)
    '6.1'
    """
    return f"{100 * value:.1f}"


def display_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The results table as people read it, one row per experiment."""
    best = summary["au_fa_fr"].idxmin()
    rows = {}
    for name, row in summary.iterrows():
        mean = area(row["au_fa_fr"])
        gain = f"{area(row['gain'])} ({area(row['gain_low'])} to {area(row['gain_high'])})"
        rows[name] = {
            "AU-FA-FR ×1e5 ↓": f"**{mean}**" if name == best else mean,
            "95 % interval": f"{area(row['ci95_low'])} to {area(row['ci95_high'])}",
            "ratio to baseline ↓": "–" if pd.isna(row["ratio"]) else f"{row['ratio']:.2f}",
            "gain over control ×1e5 ↑": "" if pd.isna(row["gain"]) else gain,
            "MACs per clip ↓": f"{row['macs_per_clip']:,}",
            "fewer MACs ↑": times(row["speed_up"]),
            "size, kB ↓": f"{row['state_dict_bytes'] / 1e3:.1f}",
            "compression ↑": times(row["compression"]),
            "compact file, kB ↓": "–" if pd.isna(row["compact_bytes"]) else f"{row['compact_bytes'] / 1e3:.1f}",
            "compression, compact ↑": times(row["compact_compression"]),
            "ms per clip": milliseconds(row["latency_ms_per_clip"]),
            "ms per step": milliseconds(row["latency_ms_per_step"]),
        }
    table = pd.DataFrame(rows).T.rename_axis("experiment")
    if summary["people_miss"].notna().any():
        miss, low, high = (summary[f"people_miss{end}"].map(percent) for end in ("", "_low", "_high"))
        said = (miss + " (" + low + " to " + high + ")").where(summary["people_miss"].notna(), "–")
        table.insert(2, PEOPLE, said)
    return table


def stream_table(points: pd.DataFrame) -> pd.DataFrame:
    """What models do on streams of test speakers as people read it, one row per experiment, means over seeds.

    Args:
        points: of ``kwslib.results.records.stream_points``.
    """
    rows = {}
    for name, runs in points.groupby("experiment", sort=False):
        rows[name] = {}
        for (stream, state), asked in runs[runs["asked_fa_per_h"].notna()].groupby(["stream", "state"], sort=False):
            found = 100 * (1 - asked["miss_rate"])
            what = f"{stream}, {state}: "
            rows[name][what + "found, %"] = f"{found.mean():.1f} ({found.min():.1f} to {found.max():.1f})"
            rows[name][what + f"FA/h, asked {asked['asked_fa_per_h'].iloc[0]:g}"] = f"{asked['fa_per_h'].mean():.2f}"
            if state == "carried":
                late = asked["latency_s"].median()
                rows[name][what + "latency, ms"] = "–" if pd.isna(late) else f"{1000 * late:.0f}"
        for stream, rest in runs[runs["asked_fa_per_h"].isna()].groupby("stream", sort=False):
            alarms, hours = rest["false_alarms"].mean(), max(rest["other_hours"].mean(), 1e-9)
            rows[name][f"{stream}: FA/h"] = f"{alarms / hours:.2f} (≤ {rest['most_fa_per_h'].max():.1f})"
    return pd.DataFrame(rows).T.fillna("–").rename_axis("experiment")


def say_hours(points: pd.DataFrame, split: str = "speaker") -> str:
    """One sentence: what the figures of ``stream_table`` were counted on."""
    who = "val speakers" if split == "speaker" else "the same clips at other times, for in a random split val is test,"
    first = points[points["seed"] == points["seed"].min()].drop_duplicates("stream")
    streams = [f"{row.stream} {row.other_hours:.1f} h with {row.keywords} keywords" for row in first.itertuples()]
    return (
        f"Streams of the test part: {', '.join(streams)}. Each threshold was made on streams of {who} for the "
        "rate that was asked, higher where a higher one finds enough there, too; in brackets the range over seeds. An "
        "event is a score at the threshold, then silence for 1 s; one from a keyword's start to half a second after "
        "its end finds it. FA/h without a rate are at the threshold made on ordinary streams; in brackets the rate "
        "that so few alarms leave possible."
    )


def say_people(people: dict | None) -> str:
    """A few sentences: which people the models were scored on and what is counted; or how to get some.

    Args:
        people: of ``kwslib.results.records.people``.
    """
    if people is None:
        return (
            "No people yet: `make people PEOPLE=<folder>` scores every model on recordings <word>/<speaker>_*.wav that "
            "it was not trained on."
        )
    n_keyword, n_other, known, heard = (
        f"{people[key]:,}" for key in ("n_keyword", "n_other", "known_clips", "clips_of_known_speakers")
    )
    tells = people["n_speakers"] is not None
    speakers = f"{people['n_speakers']:,} speakers" if tells else "speakers that the file names do not tell"
    return (
        f"People: {n_keyword} recordings of {people['keyword']} and {n_other} of other words in {people['folder']}, by "
        f"{speakers}, on which no model was trained. Left out: {known} clips that the study holds itself, {heard} by "
        "speakers of its train and val parts. Misses are those at the lowest threshold that accepts at most 1 % of the "
        f"other words; in brackets the 95 % interval over {people['interval_over']} and seeds."
    )


def decided(points: pd.DataFrame) -> pd.DataFrame:
    """Those with a decision that is made as a detector runs, its state carried on."""
    return points[(points["state"] == "carried") & points["asked_fa_per_h"].notna()]


def val_misses(points: pd.DataFrame) -> pd.Series:
    """Share of the keywords of val streams that each experiment misses at the asked rates: mean of streams, seeds."""
    means = decided(points).groupby(["experiment", "stream"], sort=False)["val_miss_rate"].mean()
    return means.groupby(level="experiment").mean().dropna()


FEWER_MACS, MISSES_FOR_BYTES = 10, 0.02  # what a recommended model needs; what the smallest may miss more than the best


def recommended(found: list[dict], summary: pd.DataFrame, points: pd.DataFrame) -> dict[str, dict]:
    """Which model to take, by purpose: the record of its run. Chosen on val alone, of those with 10 times fewer MACs.

    ``clips``     of those without a decision made on streams, the best AU-FA-FR, mean of the seeds
    ``stream``    of those with one, the fewest keywords missed on val streams, mean of streams and seeds
    ``smallest``  of those that miss at most 2 points more than that one, the fewest bytes of the compact file

    Voices do not tell what people sound like. Where nobody else is in val, the latter two are of those that teachers of
    several kinds taught, if any: people say so (CHANGELOG.md).
    Of its seeds the one that is itself best by the same figure of val: that file is what people get, and test has no
    say. A purpose that nothing serves is left out.
    """
    small = summary.index[summary["speed_up"] >= FEWER_MACS]
    streams = set(points["experiment"]) if len(points) else set()
    areas = summary.loc[[name for name in small if name not in streams], "au_fa_fr_val"].astype(float).dropna()
    of_run = {(r["experiment"], r["seed"]): r["metrics"]["au_fa_fr_val"] for r in found}
    chosen = {"clips": areas.idxmin()} if len(areas) else {}
    missed = val_misses(points) if streams else pd.Series(dtype=float)
    if len(missed := missed[missed.index.isin(small)]):
        of_run |= decided(points).groupby(["experiment", "seed"])["val_miss_rate"].mean().to_dict()
        mixed = {r["experiment"] for r in found if isinstance(r["recipe"]["teacher"], list)}.intersection(missed.index)
        if mixed and found[0]["data"]["corpus"] == "synthetic":
            missed = missed[sorted(mixed)]
        near = missed[missed <= missed.min() + MISSES_FOR_BYTES]
        n_bytes = summary.loc[near.index, "compact_bytes"].astype(float)
        chosen |= {"stream": near.idxmin(), "smallest": n_bytes.idxmin() if n_bytes.notna().any() else near.idxmin()}
    runs = {name: [r for r in found if r["experiment"] == name] for name in chosen.values()}
    return {why: min(runs[name], key=lambda r: of_run[r["experiment"], r["seed"]]) for why, name in chosen.items()}


def finds(record: dict) -> tuple[str, str]:
    """What a run finds in the test part, and at which false alarms: on streams where it has a decision, else in clips.

    >>> finds({"metrics": {"curve": {"fa": [0.0, 0.005, 0.02], "fr": [0.2, 0.01, 0.0]}}})
    ('95.0 %', '1 % of other words')
    """
    points = record["metrics"].get("streams", {}).get("points", ())
    alarms = [f"{point['fa_per_h']:.2f} (≤ {point['most_fa_per_h']:.1f})" for point in points]
    talk = [f", in talk {said}" for point, said in zip(points, alarms, strict=True) if point["stream"] == "sentences"]
    for point, said in zip(points, alarms, strict=True):
        if point["state"] == "carried" and pd.notna(point["asked_fa_per_h"]) and pd.notna(point["miss_rate"]):
            return f"{percent(1 - point['miss_rate'])} %", f"{said} per hour{''.join(talk[:1])}"
    curve = record["metrics"].get("curve", {"fa": [], "fr": []})
    all_missed = max(curve["fr"], default=0)  # where nothing is accepted yet: the share of keywords
    missed = [fr for fa, fr in zip(curve["fa"], curve["fr"], strict=False) if fa <= 0.01 * (1 - all_missed)]
    return (f"{percent(1 - min(missed) / all_missed)} %", "1 % of other words") if all_missed else ("–", "–")


def say_streams(points: pd.DataFrame, summary: pd.DataFrame, speed_up: float = 10) -> str:
    """One sentence to quote: what the best model without and with so many times fewer MACs finds. Chosen on val."""
    means = decided(points).groupby(["experiment", "stream"], sort=False).mean(numeric_only=True)
    missed = val_misses(points)
    is_fast = summary["speed_up"].reindex(missed.index) >= speed_up
    sentences = []
    for kind, names in ((f"{speed_up:g} times fewer MACs", missed[is_fast]), ("more MACs", missed[~is_fast])):
        if len(names):
            found = [
                f"{100 * (1 - row.miss_rate):.1f} % of the keywords at {row.fa_per_h:.2f} false alarms per hour on "
                f"{stream} streams (allowed were {row.asked_fa_per_h:g})"
                for stream, row in means.loc[names.idxmin()].iterrows()
            ]
            sentences.append(f"The best on val with {kind}, {names.idxmin()}, finds {' and '.join(found)}.")
    return " ".join(sentences)


def findings(summary: pd.DataFrame) -> dict[str, list[str]]:
    """What worked and what did not, as sentences that follow from the numbers alone.

    An experiment worked when it is below the reports' bar; of those, the ones that no other one beats in quality
    and MACs get a sentence. A technique worked when its gain over the control is beyond the interval, or, where
    it makes the model smaller than the control, when its loss is not.
    """
    said = summary.apply(verdict, axis=1)
    below = summary["au_fa_fr"] <= published.BAR
    of_control = summary["control"].map(summary["weights_bytes"])
    smaller = summary["weights_bytes"] < of_control
    front = records.pareto(summary, "macs_per_clip")

    def named(rows: pd.Series, start: str) -> list[str]:
        """One sentence with these experiments and their gains, or none."""
        gains = [f"{name} ({area(row['gain'])})" for name, row in summary[rows].iterrows()]
        return [f"{start} (gain ×1e5): {', '.join(gains)}."] if gains else []

    worked = [
        f"{name}: AU-FA-FR {area(row['au_fa_fr'])}e-5, below the reports' bar of {area(published.BAR)}e-5"
        + ("." if name == "baseline" else f", with {times(row['speed_up'])} fewer MACs and {times(row['compression'])} "
           "fewer bytes than the baseline.")
        for name, row in summary[below & summary.index.isin(["baseline", *front])].iterrows()
    ]  # fmt: skip
    worked += named(said == "better", "Better than its control, beyond the interval")
    worked += named(smaller & (said == "no clear difference"), "Smaller than its control without a clear loss")
    failed = named(said == "worse", "Worse than its control, beyond the interval")
    failed += named(~smaller & (said == "no clear difference"), "No clear difference from its control")
    above = [f"{name} ({area(row['au_fa_fr'])})" for name, row in summary[~below].iterrows()]
    if above:
        failed.append(f"Above the reports' bar of {area(published.BAR)}e-5 (AU-FA-FR ×1e5): {', '.join(above)}.")
    return {"worked": worked, "failed": failed}


def say_gains(rows: pd.DataFrame, whom: str) -> str:
    """One sentence to quote: how many of these experiments beat their controls beyond the 95 % interval.

    Of many comparisons that show nothing, one in twenty is beyond its interval by chance; the sentence says so.

    >>> numbers = {"gain": [2e-5, 1e-5], "gain_low": [1e-5, -1e-5], "gain_high": [3e-5, 3e-5]}
    >>> say_gains(pd.DataFrame(numbers, index=["a", "b"]), "students").partition(";")[0]
    'Of 2 students, 1 was clearly better than its control (a), 0 were clearly worse, 1 was not clearly different'
    """
    said = rows.apply(verdict, axis=1)

    def counted(kind: str) -> str:
        names = list(said.index[said == kind])
        return f"{len(names)} {'was' if len(names) == 1 else 'were'}", f" ({', '.join(names)})" if names else ""

    (better, who), (worse, whose), (unclear, _) = map(counted, (*CLEAR, "no clear difference"))
    whose_control = "its control" if better.startswith("1 ") else "their control"
    return (
        f"Of {len(rows)} {whom}, {better} clearly better than {whose_control}{who}, {worse} clearly worse{whose}, "
        f"{unclear} not clearly different; clear means beyond the 95 % interval, where chance alone puts one in "
        f"twenty, and the median gain was {area(rows['gain'].median())}e-5."
    )


def say_judges(corpus: str, split: str, n_keyword: int, n_other: int, n_speakers: int) -> str:
    """One or two sentences that begin everything: who judges, people or voices of a synthesizer, and how many.

    >>> say_judges("speech_commands_part", "speaker", 235, 1200, 161)[:61]
    '**Judged by 161 people**, none of whom was heard in training:'
    """
    clips = f"{n_keyword:,} clips of the keyword and {n_other:,} others"
    if corpus.split("-")[0] == "synthetic":
        return (
            f"**Judged by {n_speakers} voices of a synthesizer**, not by people: {clips}. What holds among voices need "
            "not hold among people: a model that is ten times better here may miss more of them. Believe the study of "
            "recordings, or give recordings of the keyword with `PEOPLE=folder`."
        )
    who = "none of whom was heard in training" if split == "speaker" else "who may have been heard in training, too"
    return f"**Judged by {n_speakers} people**, {who}: {clips}."


def say_compared(clips: pd.DataFrame) -> str:
    """One sentence: how many clip models were clearly better or worse than their control."""
    said = clips.apply(verdict, axis=1)
    better, worse = ((said == word).sum() for word in CLEAR)
    return (
        f"Of {(said != '').sum()} clip models with a control, {better} {'is' if better == 1 else 'are'} clearly better "
        f"than it and {worse} clearly worse; the others differ by less than this test can show."
    )


def say_power(ratios: pd.Series) -> str:
    """One sentence: how large a true difference must be for this test to see it.

    Args:
        ratios: of ``kwslib.results.records.clear_ratios``.

    >>> say_power(pd.Series({"a": 1.44, "b": 1.6, "c": float("nan")}))[:70]
    'In 80 % of repeats this test would call a true ratio to the control of'
    """
    known = ratios.dropna().sort_values()
    if known.empty:
        return ""
    middle, (best, *_, worst) = known.iloc[len(known) // 2], [*known.items(), *known.tail(1).items()]
    said = [f"{ratio:.2f}" if ratio < 100 else "no size" for ratio in (middle, best[1], worst[1])]
    return (
        f"In 80 % of repeats this test would call a true ratio to the control of {said[0]} clear (median of "
        f"{len(known)} comparisons; from {said[1]} for {best[0]} to {said[2]} for {worst[0]}): smaller differences it "
        "does not see."
    )


def say_smallest(rows: pd.DataFrame) -> str:
    """One sentence to quote: the fewest MACs with which a model stays below the reports' bar."""
    below = rows[rows["au_fa_fr"] <= published.BAR]
    bar = f"the reports' bar of {area(published.BAR)}e-5"
    if below.empty:
        return f"None of these {len(rows)} models stays below {bar}."
    name = below.astype({"macs_per_clip": int, "au_fa_fr": float}).sort_values(["macs_per_clip", "au_fa_fr"]).index[0]
    row = below.loc[name]
    ratio = "" if pd.isna(row["ratio"]) else f", {row['ratio']:.2f} times that of the baseline"
    return (
        f"The fewest MACs below {bar} are those of {name}: {times(row['speed_up'])} fewer MACs and "
        f"{times(row['compression'])} fewer bytes than the baseline at an AU-FA-FR of {area(row['au_fa_fr'])}e-5 "
        f"(95 % interval {area(row['ci95_low'])} to {area(row['ci95_high'])}e-5){ratio}."
    )


def say_combination(summary: pd.DataFrame, speed_up: float = 10, compression: float = 60) -> str:
    """One sentence to quote: the best model that is so much faster and smaller than the baseline.

    Chosen on val. Bytes are those of its compact file against the baseline's torch file.
    """
    wanted = f"at least {speed_up:g} times fewer MACs and {compression:g} times fewer bytes than the baseline's file"
    fitting = summary[(summary["speed_up"] >= speed_up) & (summary["compact_compression"] >= compression)]
    if fitting.empty:
        return f"No model has {wanted}."
    name = fitting["au_fa_fr_val"].astype(float).idxmin()
    row = summary.loc[name]
    return (
        f"Of {len(fitting)} models with {wanted}, {name} is best on val: {times(row['speed_up'])} fewer MACs, "
        f"{times(row['compact_compression'])} fewer bytes ({row['compact_bytes'] / 1e3:.1f} kB), test AU-FA-FR "
        f"{area(row['au_fa_fr'])}e-5 (95 % interval {area(row['ci95_low'])} to {area(row['ci95_high'])}e-5), "
        f"{'below' if row['au_fa_fr'] <= published.BAR else 'above'} the reports' bar of {area(published.BAR)}e-5, "
        f"{row['ratio']:.2f} times that of the baseline."
    )


def say_rivals(summary: pd.DataFrame, rivals: Sequence[str], student: str) -> str:
    """One sentence to quote: what other small nets, trained plainly, reach beside a student."""

    def said(name: str) -> str:
        row = summary.loc[name]
        return (
            f"{name} reaches {area(row['au_fa_fr'])}e-5 ({area(row['ci95_low'])} to {area(row['ci95_high'])}e-5) with "
            f"{row['macs_per_clip']:,} MACs and {row['state_dict_bytes'] / 1e3:.1f} kB"
        )

    return f"Just another small net: {'; '.join(map(said, rivals))}; {said(student)}."


def markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown."""
    table = table.reset_index()
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (table.columns, *table.to_numpy())]
    return "\n".join([lines[0], "|---" * len(table.columns) + "|", *lines[1:]])


def front(summary: pd.DataFrame) -> pd.DataFrame:
    """The baseline and what no other experiment beats in both quality and MACs, or quality and bytes."""
    ahead = [*records.pareto(summary, "macs_per_clip"), *records.pareto(summary, "compact_bytes")]
    return summary[summary.index.isin(["baseline", *ahead])]
