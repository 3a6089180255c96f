"""What results say, as sentences to quote: all made from records."""

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from kwslib.results.tables import BAR, CLEAR, area, decided, times, val_misses, verdict


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
    below = rows[rows["au_fa_fr"] <= BAR]
    bar = f"the reports' bar of {area(BAR)}e-5"
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
        f"{'below' if row['au_fa_fr'] <= BAR else 'above'} the reports' bar of {area(BAR)}e-5, "
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


def say_runs(counts: Counter) -> str:
    """How many runs were loaded, and how many of those that are to be trained already were.

    >>> say_runs(Counter({"loaded": 5, "published": 3, "to train": 3, "trained": 1}))
    '5 loaded (3 published), 1 of 3 trained'
    """
    sources = [f"{counts[source]} {source}" for source in ("earlier", "published") if counts[source]]
    loaded = f"{counts['loaded']} loaded" + (f" ({', '.join(sources)})" if sources else "")
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    trained = f"{counts['trained']} of {counts['to train']} trained" if counts["to train"] else "nothing to train"
    return f"{loaded}, {trained}{failed}"
