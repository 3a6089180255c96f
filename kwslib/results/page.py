"""The HTML report of a study and the tables of README and ``docs/results.md``, made from records and nothing else.

One self-contained page: figures inside, a detector that listens, nothing from a network, readable on a phone.
"""

import base64
import json
import re
import shutil
from pathlib import Path
from shlex import quote

import pandas as pd
from scipy.special import expit

from kwslib import paths
from kwslib.config import PROFILES
from kwslib.results import provenance, records, sentences, tables
from kwslib.streaming import player

PAGE = {  # what the page takes from the first record, besides what tables do
    "keyword": str,
    "data": dict.fromkeys(("corpus", "split", "corpus_fingerprint", "split_sha256"), str),
    "metrics": {"n_speakers": int},
    "cost": {"macs_convention": str},
    "run": dict.fromkeys(("python", "torch", "torchaudio", "numpy", "system", "cores", "device"), str | int),
}
APPENDICES = {"augmentation_and_transfer": "appendix", "distillation_grid": "grid"}  # notebook -> variant of the study
FILLED = ("README.md", "docs/results.md")  # pages between whose marks ``fill_readme`` writes
FOR = {
    "clips": ("Short recordings", "score", "FILE.wav"),
    "stream": ("A microphone", "stream", "--mic"),
    "smallest": ("The fewest bytes", "export", "--out detector.onnx"),
}  # purpose -> for people, and the command to begin with
WRONG = "mistakes.json"  # in a report's folder: what the clip model to take gets wrong, of ``Study.mistakes``
_CLIP = {"word": str, "speaker": str, "score": int | float, "alike": int, "alike_clips": int, "flac": str}
_KIND = {"clips": int, "wrong": int, "worst": [_CLIP]}  # ``alike``: of the same speaker, or word, so many are wrong
MISTAKES = {"experiment": str, "seed": int, "threshold": int | float, "missed": _KIND, "accepted": _KIND}
NOTEBOOKS = ("01_split_and_baseline", "02_streaming", "03_kd", "04_attention_kd", "05_quant_fp16", "06_plots")


def write(study: str, still: str = "") -> Path:
    """Write ``reports/<study>/index.html`` and ``results.csv``; returns the page.

    Args:
        still: what is to come, of a study that is still running.

    Raises:
        RecordError: there are no records, or one is damaged.
    """
    folder = paths.reports(study)
    table = records.results(records.load(study))
    paths.write_atomically(folder / "results.csv", table.to_csv(index=False))
    paths.write_atomically(folder / "index.html", render(study, folder, still))
    return folder / "index.html"


def render(study: str, folder: Path, still: str = "") -> str:
    """The page of a study, from the records, figures, notebooks and player in its folder and nothing else."""
    found = records.load_folder(folder / "records")
    records.require(found[0], PAGE, f"the first record of {study}")
    people = records.people(folder)
    summary, points = records.summary(found, people=people), records.stream_points(found)
    clips = _of_clips(summary, points)
    playing = player.kept(folder)
    svgs = {svg.stem: base64.b64encode(svg.read_bytes()).decode() for svg in sorted((folder / "figures").glob("*.svg"))}
    said, executed = [], lambda name: folder / "notebooks" / f"{name}.html"
    if not points.empty:
        said = [sentences.say_streams(points, summary), sentences.say_hours(points, found[0]["data"]["split"])]
    cheap = summary.index[summary["speed_up"] >= tables.FEWER_MACS]
    small = points[points["experiment"].isin(cheap)] if len(points) else points
    answers = [sentences.say_combination(clips), sentences.say_compared(clips)]
    if len(small):
        answers.insert(1, f"On streams: {sentences.say_streams(small, summary)}")
    published_one = folder.parent.name == "reference"
    home = f"checkpoints/{'reference/' if published_one else ''}{study}"
    way_home = "../../" + "../" * published_one + home
    return _template("page.html.j2").render(
        study=study,
        still=still,
        first=found[0],
        n_records=len(found),
        n_seeds=int(summary["seeds"].max()),
        table=_html(tables.display_table(summary)),
        people=_of_people(summary, people),
        front=_html(_narrow(tables.display_table(tables.front(clips)))),
        judges=_judges(found[0]),
        smoke=tables.SMOKE if found[0]["profile"] == "smoke" else "",
        answers=answers,
        take=models(tables.recommended(found, summary, points), summary),
        home=home,
        way_home=way_home,
        sentences=[sentences.say_smallest(clips), sentences.say_power(records.clear_ratios(found, clips))],
        streams=[] if points.empty else [_html(table) for table in _carried_and_all(points)],
        stream_sentences=said,
        published=_html(_rounded(tables.beside(summary))),
        summary=summary,
        findings=tables.findings(clips),
        bar=tables.BAR,
        playing=playing,
        mistakes=_mistakes(folder / WRONG),
        player="" if playing is None else player.html(playing),
        explored=tables.explored(found, summary, points, f"{way_home}/"),
        explore=_explore_js(),
        synthetic=_is_synthetic(found[0]),
        figures={name: f"data:image/svg+xml;base64,{content}" for name, content in svgs.items()},
        notebooks=[name for name in (*NOTEBOOKS, *APPENDICES) if name == NOTEBOOKS[-1] or executed(name).exists()],
        command=command(found[0], int(summary["seeds"].max())),
        origin=provenance.table(found).to_html(header=False, border=0, escape=True),
        failures=records.failures(folder),
        area=tables.area,
        times=tables.times,
    )


def explorer(study: str):
    """The plot to explore of the report, to be shown in a notebook; it also works in the HTML exported from it."""
    from IPython.display import HTML

    found = records.load(study)
    summary = records.summary(found, people=records.people(paths.reports(study)))
    points = records.stream_points(found)
    explored = tables.explored(found, summary, points, home="", to_records="../records/")  # as seen from notebooks/
    drawn = _template("explore.html.j2").render(explored=explored, summary=summary)
    return HTML(f"{drawn}\n<script>\n{{\n{_explore_js()}\nkwsExplore.start();\n}}\n</script>")


def _template(name: str):
    from jinja2 import Environment, PackageLoader, StrictUndefined

    look = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True}
    return Environment(loader=PackageLoader("kwslib.results", "."), **look).get_template(name)


def _explore_js() -> str:
    return (Path(__file__).parent / "explore.js").read_text("utf-8")


def _of_clips(summary: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """Without the models that have a decision made on streams: those are judged on streams alone. All, if all have."""
    others = summary.drop(index=set(points["experiment"])) if len(points) else summary
    return others if len(others) else summary


def _mistakes(file: Path) -> dict | None:
    """What is in ``mistakes.json``, a probability beside each score; nothing where there is no file.

    Raises:
        RecordError: it is damaged.
    """
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    records.require(found, MISTAKES, file)
    for clip in (found, *found["missed"]["worst"], *found["accepted"]["worst"]):
        clip["probability"] = f"{tables.percent(expit(clip.get('score', found['threshold'])))} %"
    return found


def models(chosen: dict[str, dict], summary: pd.DataFrame) -> list[dict]:
    """What people read about models to take, in the order of ``chosen``: purpose -> record."""
    rows = []
    for purpose, record in chosen.items():
        file, cost = tables.published_file(record), record["cost"]
        n_bytes = cost["compact_bytes"] if file.endswith(".kws") else cost["state_dict_bytes"]
        row = {"purpose": purpose, "experiment": record["experiment"], "file": file, "kb": f"{n_bytes / 1e3:.1f} kB"}
        row |= dict(zip(("title", "command", "last"), FOR.get(purpose, ("", "", "")), strict=True))
        row |= dict(zip(("found", "at"), tables.finds(record), strict=True))
        row |= {"macs": cost["macs_per_clip"], "fewer": tables.times(summary["speed_up"][record["experiment"]])}
        rows.append(row)
    return rows


def _of_people(summary: pd.DataFrame, people: dict | None) -> str:
    """Which people stand in the table; nothing where none do."""
    return sentences.say_people(people) if summary["people_miss"].notna().any() else ""


def _is_synthetic(record: dict) -> bool:
    return record["data"]["corpus"] in ("synthetic", f"synthetic-{paths.slug(record['keyword'])}")


def command(record: dict, n_seeds: int) -> str:
    """The shell line that repeats the study of a record."""
    corpus, split, synthetic = record["data"]["corpus"], record["data"]["split"], _is_synthetic(record)
    by_name = corpus.startswith(("speech_commands_v0.0", "speech_commands_part"))
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
        out[column] = out[column].map(tables.area if column.startswith("AU") else tables.times)
    return out.rename(columns=lambda c: c.replace("AU-FA-FR", "AU-FA-FR ×1e5").replace("speed_up", "fewer MACs"))


def _html(table: pd.DataFrame) -> str:
    html = table.reset_index().to_html(index=False, border=0, escape=True)
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html)


def _judges(record: dict) -> str:
    counts = (record["metrics"][key] for key in ("n_keyword", "n_other", "n_speakers"))
    return sentences.say_judges(record["data"]["corpus"], record["data"]["split"], *counts)


NARROW = ["AU-FA-FR ×1e5 ↓", "95 % interval", tables.PEOPLE, "ratio to baseline ↓", "MACs per clip ↓",
                  "fewer MACs ↑", "size, kB ↓", "compression ↑", "compact file, kB ↓",
                  "compression, compact ↑"]  # fmt: skip


def _narrow(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that fit on a page; that of people only where there are any."""
    return table[[column for column in NARROW if column in table]]


def model_table(study: str, reference: Path) -> str:
    """The baseline and the models to take of a published study, as the README shows them."""
    found = records.load_folder(reference / study / "records")
    summary, points = records.summary(found), records.stream_points(found)
    baseline = min((r for r in found if r["experiment"] == "baseline"), key=lambda r: r["metrics"]["au_fa_fr_val"])
    rows = [
        {
            "for": row["title"] or "the net of the reports, to compare",
            "model": row["experiment"],
            "MACs per clip ↓": f"{row['macs']:,}",
            "fewer MACs ↑": row["fewer"],
            "file ↓": row["kb"],
            "finds ↑": row["found"],
            "false alarms ↓": row["at"],
        }
        for row in models({"": baseline, **tables.recommended(found, summary, points)}, summary)
    ]
    return tables.markdown(pd.DataFrame(rows).set_index("for"))


def _carried_and_all(points: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of streams without those on which the state is reset, and with them."""
    table = tables.stream_table(points)
    return table[[column for column in table if ", reset" not in column]], table


def readme_results(study: str, reference: Path) -> str:
    """The results of a published study as ``docs/results.md`` shows them: sentences and the front of the table."""
    found = records.load_folder(reference / study / "records")
    people = records.people(reference / study)
    summary, first = records.summary(found, people=people), found[0]
    metrics, points = first["metrics"], records.stream_points(found)
    clips = _of_clips(summary, points)
    said = clips.apply(tables.verdict, axis=1)
    said = said[said.isin(tables.CLEAR)]
    clear = [f"{name} ({word} than {summary.loc[name, 'control']})" for name, word in said.items()]
    before = (
        f"{_judges(first)} Study `{study}`, keyword `{first['keyword']}`, mean of {int(summary.seeds.max())} seeds, "
        f"interval over {metrics.get('interval_over', 'speakers')} and seeds. "
        f"Clip models that differ from their control beyond their interval: {', '.join(clear) or 'none'}. "
        f"{sentences.say_power(records.clear_ratios(found, clips))} "
        f"{sentences.say_smallest(clips)} {sentences.say_combination(clips)}"
    )
    which = "The baseline and the clip models that no other one beats in both quality and MACs, or quality and bytes:"
    front = _narrow(tables.display_table(tables.front(clips)))
    parts = [before, which, tables.markdown(front), *filter(None, [_of_people(summary, people)])]
    if len(points):
        said = f"{sentences.say_streams(points, summary)} {sentences.say_hours(points, first['data']['split'])}"
        parts += [f"On streams: {said}", tables.markdown(_carried_and_all(points)[0])]
    return "\n\n".join(parts)


def fill_readme(text: str, reference: Path) -> str:
    """A page with what stands between its marks ``<!-- results: STUDY -->`` and ``<!-- models: STUDY -->`` made anew.

    Args:
        reference: the folder of the published studies; a study that is not there keeps its text.
    """
    writers = {"results": readme_results, "models": model_table}

    def fresh(match: re.Match) -> str:
        if not (reference / match[3]).exists():
            return match[0]
        return f"{match[1]}\n\n{writers[match[2]](match[3], reference)}\n\n{match[4]}"

    return re.sub(r"(<!-- (results|models): (\S+) -->).*?(<!-- end -->)", fresh, text, flags=re.DOTALL)


def recommend(reference: Path) -> dict[str, dict[str, str]]:
    """What ``checkpoints/reference/recommended.json`` says: study -> purpose -> file, below ``checkpoints/reference``.

    Args:
        reference: the folder of the published studies.
    """
    files = {}
    for folder in sorted(found.parent for found in reference.glob("*/records")):
        found = records.load_folder(folder / "records")
        chosen = tables.recommended(found, records.summary(found), records.stream_points(found))
        files[folder.name] = {why: f"{folder.name}/{tables.published_file(record)}" for why, record in chosen.items()}
    return files


def notebook_html(executed: Path) -> Path:
    """An executed notebook as HTML beside it. Progress bars, which need scripts, are left out."""
    from nbconvert import HTMLExporter

    notebook = _without_progress(executed)
    notebook.metadata["title"] = executed.stem
    body, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
    paths.write_atomically(page := executed.with_suffix(".html"), body)
    return page


def publish(study: str) -> None:
    """Copy a study to ``reports/reference/`` and ``checkpoints/reference/`` and fill in README and results.

    Recordings are removed from the notebooks, for they belong to their corpus; a player of synthetic voices stays.
    """
    import nbformat

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
    for extra in ("sweep.csv", "people.json", WRONG):
        if (source / extra).exists():
            shutil.copy(source / extra, target / extra)
    executed_ones = sorted((source / "notebooks").glob("0*.ipynb"))
    for appendix, variant in APPENDICES.items():
        if (source / "notebooks" / f"{appendix}.ipynb").exists():
            shutil.copytree(records.folder(f"{study}-{variant}"), target / f"{variant}-records")
            executed_ones.append(source / "notebooks" / f"{appendix}.ipynb")
    for executed in executed_ones:
        notebook = _without_progress(executed)
        _drop_audio(notebook, _is_synthetic(found[0]))
        for part in (notebook, *notebook.cells):
            part.metadata.pop("papermill", None)  # holds times and paths of this machine
        copy = target / "notebooks" / executed.name
        paths.write_atomically(copy, nbformat.writes(notebook))
        notebook_html(copy)
    shutil.copytree(paths.checkpoints(study), paths.checkpoints(f"reference/{study}"), ignore=_left_at_home)
    reference = paths.reports("reference")
    paths.write_json(paths.checkpoints("reference") / "recommended.json", recommend(reference))
    player.keep(f"reference/{study}", found[0]["keyword"])
    paths.write_atomically(target / "index.html", render(study, target))
    for filled in (paths.ROOT / name for name in FILLED):
        paths.write_atomically(filled, fill_readme(filled.read_text("utf-8"), reference))


def _left_at_home(folder: str, names: list[str]) -> set[str]:
    """What is not published of checkpoints: unfinished ones, and large compact files, whose torch file has as much."""
    large = {
        name for name in names if name.endswith(".kws") and (Path(folder) / name).stat().st_size > tables.COMPACT_BYTES
    }
    return large | {name for name in names if name.endswith((".resume", ".tmp"))}


def _drop_audio(notebook, synthetic: bool) -> None:
    """Leave out what can be heard, but of synthetic voices the first player: several make a large file."""
    players = 0
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        shown = output.get("data", {}).get("text/html", "")
        players += "kws-player" in shown
        if "<audio" in shown or "kws-player" in shown and not (synthetic and players == 1):
            output["data"] = {"text/plain": "(no audio in the published copy: run the notebook to listen)"}


def _without_progress(executed: Path):
    """An executed notebook without progress bars, which need scripts, and progress lines."""
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("widgets", None)
    bar = "application/vnd.jupyter.widget-view+json"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if bar not in o.get("data", {}) and o.get("name") != "stderr"]
    return notebook
