"""The HTML report of a study and the tables of the README, made from records and nothing else.

One self-contained page: figures inside, no scripts, readable on a phone.
"""

import base64
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import nbformat
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from kwslib import paths, provenance, published, records
from kwslib.config import PROFILES

PAGE = {  # what the page takes from the first record, besides what tables do
    "keyword": str,
    "data": dict.fromkeys(("corpus", "split", "corpus_fingerprint", "split_sha256"), str),
    "metrics": {"n_speakers": int},
    "cost": {"macs_convention": str},
    "run": dict.fromkeys(("python", "torch", "torchaudio", "numpy", "system", "cores", "device"), str | int),
}
APPENDICES = {"augmentation_and_transfer": "appendix", "distillation_grid": "grid"}  # notebook -> variant of the study
NOTEBOOKS = (
    "01_split_and_baseline",
    "02_streaming",
    "03_kd",
    "04_attention_kd",
    "05_quant_fp16",
    "06_plots",
)


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


def display_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The results table as people read it, one row per experiment."""
    best = summary["au_fa_fr"].idxmin()
    rows = {}
    for name, row in summary.iterrows():
        mean = area(row["au_fa_fr"])
        rows[name] = {
            "AU-FA-FR ×1e5 ↓": f"**{mean}**" if name == best else mean,
            "95 % interval": f"{area(row['ci95_low'])} to {area(row['ci95_high'])}",
            "ratio to baseline ↓": "–" if pd.isna(row["ratio"]) else f"{row['ratio']:.2f}",
            "gain over control ×1e5 ↑": ""
            if pd.isna(row["gain"])
            else f"{area(row['gain'])} ({area(row['gain_low'])} to {area(row['gain_high'])})",
            "MACs per clip ↓": f"{row['macs_per_clip']:,}",
            "speed-up ↑": times(row["speed_up"]),
            "size, kB ↓": f"{row['state_dict_bytes'] / 1e3:.1f}",
            "compression ↑": times(row["compression"]),
            "compact file, kB ↓": "–" if pd.isna(row["compact_bytes"]) else f"{row['compact_bytes'] / 1e3:.1f}",
            "compression, compact ↑": times(row["compact_compression"]),
            "ms per clip": milliseconds(row["latency_ms_per_clip"]),
            "ms per step": milliseconds(row["latency_ms_per_step"]),
        }
    return pd.DataFrame(rows).T.rename_axis("experiment")


def stream_table(points: pd.DataFrame) -> pd.DataFrame:
    """What models do on streams of test speakers as people read it, one row per experiment, means over seeds.

    Args:
        points: of ``kwslib.records.streams``.
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
    others = (
        "val speakers" if split == "speaker" else "the same clips at other times, for in a random split val is test,"
    )
    first = points[points["seed"] == points["seed"].min()].drop_duplicates("stream")
    streams = [f"{row.stream} {row.other_hours:.1f} h with {row.keywords} keywords" for row in first.itertuples()]
    return (
        f"Streams of the test part: {', '.join(streams)}. Each threshold was made on streams of {others} for the "
        "rate that was asked, higher where a higher one finds enough there, too; in brackets the range over seeds. An "
        "event is a score at the threshold, then silence for 1 s; one from a keyword's start to half a second after "
        "its end finds it. FA/h without a rate are at the threshold made on ordinary streams; in brackets the rate "
        "that so few alarms leave possible."
    )


def say_streams(points: pd.DataFrame, summary: pd.DataFrame, speed_up: float = 10) -> str:
    """One sentence to quote: what the best model without and with so many times fewer MACs finds. Chosen on val."""
    made = points[(points["state"] == "carried") & points["asked_fa_per_h"].notna()]
    means = made.groupby(["experiment", "stream"], sort=False).mean(numeric_only=True)
    missed = means["val_miss_rate"].groupby(level="experiment").mean().dropna()
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
    wanted = (
        f"at least {speed_up:g} times fewer MACs and {compression:g} times fewer bytes than the baseline's torch file"
    )
    fitting = summary[(summary["speed_up"] >= speed_up) & (summary["compact_compression"] >= compression)]
    if fitting.empty:
        return f"No model has {wanted}."
    name = fitting["au_fa_fr_val"].astype(float).idxmin()
    row = summary.loc[name]
    side = "below" if row["au_fa_fr"] <= published.BAR else "above"
    return (
        f"Of {len(fitting)} models with {wanted}, {name} is best on val: {times(row['speed_up'])} fewer MACs, "
        f"{times(row['compact_compression'])} fewer bytes ({row['compact_bytes'] / 1e3:.1f} kB), test AU-FA-FR "
        f"{area(row['au_fa_fr'])}e-5 (95 % interval {area(row['ci95_low'])} to {area(row['ci95_high'])}e-5), "
        f"{side} the reports' bar of {area(published.BAR)}e-5, {row['ratio']:.2f} times that of the baseline."
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


def write(study: str) -> Path:
    """Write ``reports/<study>/index.html`` and ``results.csv``; returns the page.

    Raises:
        RecordError: there are no records, or one is damaged.
    """
    folder = paths.reports(study)
    table = records.results(records.load(study))
    paths.write_atomically(folder / "results.csv", table.to_csv(index=False))
    paths.write_atomically(folder / "index.html", render(study, folder))
    return folder / "index.html"


def render(study: str, folder: Path) -> str:
    """The page of a study, from the records, figures and notebooks in its folder and nothing else."""
    found = records.load_folder(folder / "records")
    records.require(found[0], PAGE, f"the first record of {study}")
    summary, points = records.summary(found), records.streams(found)
    template = Environment(
        loader=PackageLoader("kwslib", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).get_template("report.html.j2")
    return template.render(
        study=study,
        first=found[0],
        n_records=len(found),
        n_seeds=int(summary["seeds"].max()),
        table=_html(display_table(summary)),
        front=_html(display_table(_front(summary))),
        sentences=[say_smallest(summary), say_combination(summary)],
        streams=None if points.empty else _html(stream_table(points)),
        stream_sentences=[]
        if points.empty
        else [say_streams(points, summary), say_hours(points, found[0]["data"]["split"])],
        published=_html(_rounded(published.beside(summary))),
        summary=summary,
        findings=findings(summary),
        bar=published.BAR,
        figures={svg.stem: _data_uri(svg) for svg in sorted((folder / "figures").glob("*.svg"))},
        notebooks=[
            name
            for name in (*NOTEBOOKS, *APPENDICES)
            if name == "06_plots" or (folder / "notebooks" / f"{name}.html").exists()
        ],
        command=command(found[0], int(summary["seeds"].max())),
        origin=provenance.table(found).to_html(header=False, border=0, escape=True),
        failures=records.failures(folder),
        area=area,
        times=times,
    )


def command(record: dict, n_seeds: int) -> str:
    """The shell line that repeats the study of a record."""
    corpus, split = record["data"]["corpus"], record["data"]["split"]
    synthetic = corpus in ("synthetic", f"synthetic-{paths.slug(record['keyword'])}")
    by_name = corpus.startswith("speech_commands_v0.0")
    options = [
        "" if synthetic else f"CORPUS={quote(corpus)}" if by_name else f"CORPUS=<folder of {quote(corpus)}>",
        "" if record["keyword"] == "sheila" else f"KEYWORD={quote(record['keyword'])}",
        "" if split == "speaker" else f"SPLIT={quote(split)}",
        "" if record["profile"] == "standard" else f"PROFILE={record['profile']}",
        "" if n_seeds == PROFILES[record["profile"]].seeds else f"SEEDS={n_seeds}",
    ]
    return " ".join(["make reproduce", *filter(None, options)])


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    out = table.copy()
    for column in out.columns[2:]:
        out[column] = out[column].map(area if column.startswith("AU") else times)
    return out.rename(columns=lambda c: c.replace("AU-FA-FR", "AU-FA-FR ×1e5").replace("_", "-"))


def _html(table: pd.DataFrame) -> str:
    html = table.reset_index().to_html(index=False, border=0, escape=True)
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html)


def _data_uri(svg: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()


def markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown."""
    table = table.reset_index()
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (table.columns, *table.to_numpy())]
    return "\n".join([lines[0], "|---" * len(table.columns) + "|", *lines[1:]])


README_COLUMNS = ["AU-FA-FR ×1e5 ↓", "95 % interval", "ratio to baseline ↓", "MACs per clip ↓", "speed-up ↑",
                  "size, kB ↓", "compression ↑", "compact file, kB ↓", "compression, compact ↑"]  # fmt: skip


def _front(summary: pd.DataFrame) -> pd.DataFrame:
    """The baseline and what no other experiment beats in both quality and MACs, or quality and bytes."""
    ahead = [*records.pareto(summary, "macs_per_clip"), *records.pareto(summary, "compact_bytes")]
    return summary[summary.index.isin(["baseline", *ahead])]


def readme_results(study: str, reference: Path) -> str:
    """The results of a published study as the README shows them: sentences and the front of the table."""
    found = records.load_folder(reference / study / "records")
    summary, first = records.summary(found), found[0]
    metrics = first["metrics"]
    verdicts = summary.apply(verdict, axis=1)
    clear = [f"{name} ({said} than {summary.loc[name, 'control']})" for name, said in verdicts.items() if said in CLEAR]
    sentences = (
        f"`{study}`: keyword `{first['keyword']}`, test part of {metrics['n_keyword']} keyword clips and "
        f"{metrics['n_other']} others by {metrics['n_speakers']} speakers, mean of {int(summary.seeds.max())} seeds, "
        f"interval over {metrics.get('interval_over', 'speakers')} and seeds. "
        f"Differences from the control beyond their interval: {', '.join(clear) or 'none'}. {say_smallest(summary)} "
        f"{say_combination(summary)}"
    )
    front = "The baseline and the experiments that no other one beats in both quality and MACs, or quality and bytes:"
    parts = [sentences, front, markdown(display_table(_front(summary))[README_COLUMNS])]
    points = records.streams(found)
    if len(points):
        table = stream_table(points)
        parts += [f"On streams: {say_streams(points, summary)} {say_hours(points, first['data']['split'])}"]
        parts += [markdown(table[[column for column in table if ", reset" not in column]])]
    return "\n\n".join(parts)


def fill_readme(text: str, reference: Path) -> str:
    """The README with the results between its ``<!-- results: STUDY -->`` marks made anew.

    Args:
        reference: the folder of the published studies; a study that is not there keeps its text.
    """

    def fresh(match: re.Match) -> str:
        if not (reference / match[2]).exists():
            return match[0]
        return f"{match[1]}\n\n{readme_results(match[2], reference)}\n\n{match[3]}"

    return re.sub(r"(<!-- results: (\S+) -->).*?(<!-- end -->)", fresh, text, flags=re.DOTALL)


def notebook_html(executed: Path) -> Path:
    """An executed notebook as HTML beside it. Progress bars, which need scripts, are left out."""
    from nbconvert import HTMLExporter

    notebook = _without_progress(executed)
    notebook.metadata["title"] = executed.stem
    body, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
    page = executed.with_suffix(".html")
    paths.write_atomically(page, body)
    return page


def publish(study: str) -> None:
    """Copy a study to ``reports/reference/`` and ``checkpoints/reference/`` and fill in the README.

    Audio players are removed from the notebooks: recordings belong to their corpus.
    """
    source, target = paths.reports(study), paths.reports(f"reference/{study}")
    found = records.load(study)  # complains when there is nothing to publish
    if failed := records.failures(source):
        names = ", ".join(paths.label(row["experiment"], row["seed"]) for row in failed)
        raise records.RecordError(
            f"{study} is not complete, these runs failed: {names}. Run 'make reproduce' again first"
        )
    needed = [source / name for name in ("results.csv", "figures")]
    needed += [source / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS]
    needed += [paths.checkpoints(study) / r["checkpoint"]["file"] for r in found]
    missing = [str(path) for path in needed if not path.exists()]
    if missing:
        raise FileNotFoundError(f"run 'make reproduce' first, missing: {', '.join(missing)}")
    for old in (target, paths.checkpoints(f"reference/{study}")):
        shutil.rmtree(old, ignore_errors=True)
    for part in ("records", "figures"):
        shutil.copytree(source / part, target / part)
    shutil.copy(source / "results.csv", target / "results.csv")
    if (source / "sweep.csv").exists():
        shutil.copy(source / "sweep.csv", target / "sweep.csv")
    executed_ones = sorted((source / "notebooks").glob("0*.ipynb"))
    for appendix, variant in APPENDICES.items():
        if (source / "notebooks" / f"{appendix}.ipynb").exists():
            shutil.copytree(records.folder(f"{study}-{variant}"), target / f"{variant}-records")
            executed_ones.append(source / "notebooks" / f"{appendix}.ipynb")
    for executed in executed_ones:
        notebook = _without_progress(executed)
        _drop_audio(notebook)
        for part in (notebook, *notebook.cells):
            part.metadata.pop("papermill", None)  # holds times and paths of this machine
        copy = target / "notebooks" / executed.name
        paths.write_atomically(copy, nbformat.writes(notebook))
        notebook_html(copy)
    paths.write_atomically(target / "index.html", render(study, target))
    shutil.copytree(
        paths.checkpoints(study),
        paths.checkpoints(f"reference/{study}"),
        ignore=_left_at_home,
    )
    readme = paths.ROOT / "README.md"
    paths.write_atomically(readme, fill_readme(readme.read_text(), paths.reports("reference")))


def _left_at_home(folder: str, names: list[str]) -> set[str]:
    """What is not published of checkpoints: unfinished ones, and large compact files, whose torch file has as much."""
    large = {name for name in names if name.endswith(".kws") and (Path(folder) / name).stat().st_size > 20_000}
    return large | {name for name in names if name.endswith((".resume", ".tmp"))}


def _drop_audio(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "<audio" in output.get("data", {}).get("text/html", ""):
                output["data"] = {"text/plain": "(no audio in the published copy: run the notebook to listen)"}


def _without_progress(executed: Path) -> nbformat.NotebookNode:
    """An executed notebook without progress bars, which need scripts, and progress lines."""
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("widgets", None)
    bar = "application/vnd.jupyter.widget-view+json"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if bar not in o.get("data", {}) and o.get("name") != "stderr"]
    return notebook
