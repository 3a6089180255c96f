"""A whole study from one command: the notebooks one after another, progress, a log, and what failed in the end.

What is done is read from the disk, as the notebooks leave it, so a run that was killed is taken up where it was.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

from joblib import cpu_count
from tqdm import tqdm

from kwslib import paths, processes
from kwslib.lab import verify
from kwslib.lab.run import is_copy
from kwslib.lab.study import ExperimentError, Study
from kwslib.results import page, provenance, records, sentences, tables
from kwslib.training import checkpoints

*STEPS, PLOTS = page.NOTEBOOKS
AT_FIRST_S = 600.0  # of work that is believed to be as quick as the published study's
PATIENCE_S = 30  # for a notebook to save what it has
PUBLISHED = "synthetic-sheila-speaker"  # what its runs took tells how long others take


class Log:
    """Lines for the terminal and for ``reports/<study>/run.log``, which keeps those of earlier runs."""

    def __init__(self, path: Path, quiet: bool = False):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.quiet = path, quiet

    def __call__(self, line: str, important: bool = False) -> None:
        """Write a line with the time; in the terminal only what is ``important`` when it is to be quiet."""
        with self.path.open("a") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
        if important or not self.quiet:
            with suppress(BrokenPipeError):  # a reader that has seen enough does not end the study
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()


def reproduce(
    study: Study, only: Sequence[str] = (), quiet: bool = False, people: str = "", **parameters: str
) -> list[str]:
    """Run every notebook of a study that is not done, then draw the report; a sentence for everything that failed.

    A notebook that fails does not stop those after it, nor the report: they work with what there is.

    Args:
        only: run these notebooks and nothing else.
        quiet: only what failed goes to the terminal; the log has everything.
        people: a folder of recordings on which every model is scored, after the notebooks and before the report.
        parameters: of the notebooks named in ``only``.

    Raises:
        Busy: another process reproduces this study.
        RecordError: there is not a single record to draw a report of.
        ExperimentError: the package was installed without its repository.
    """
    if not (paths.ROOT / "notebooks").exists():
        raise ExperimentError("this runs the notebooks, which an installed package has not: clone the repository")
    folder = paths.reports(study.name)
    if list(only) == [PLOTS]:
        records.load(study.name)  # complains when there is nothing to draw
    log = Log(folder / "run.log", quiet)
    # A report can be drawn while the rest still runs.
    with processes.only_one(folder, "-".join(Path(name).name for name in only) or "reproduce"):
        if only:
            failed = [sentence for name in only for sentence in execute(study, name, log, **parameters)]
            for reports in (folder, *(paths.reports(f"{study.name}-{name}") for name in page.APPENDICES.values())):
                failed += _failed_runs(reports, log)
            return failed
        for left in (folder, folder / "figures", folder / "notebooks"):
            processes.remove_left_behind(left, older_than_s=3600)
        stamp, sources, failed = folder / ".state", _sources(study), []
        ran = not stamp.exists() or stamp.read_text() != _state(study, sources)
        if ran:
            stamp.unlink(missing_ok=True)
            records.forget_failures(study.name)
            code = provenance.of_run()
            sizes = f"profile {study.profile.name}, seeds: {study.seeds}"
            log(f"{study.name}, {sizes}, commit {code['commit']}, {code['cores']} cores of {code['cpu']}")
            with _progress(study, log, quiet) as look:
                for i, name in enumerate(STEPS):
                    failed += execute(study, name, log, look)
                    with suppress(records.RecordError):  # nothing to read yet
                        to_come = ", ".join(STEPS[i + 1 :]) or "the figures"
                        written = page.write(study.name, f"{to_come} to come, {look()}")
                        log(f"to read so far: {written}")
            failed += _failed_runs(folder, log)
        if failed and not list(records.folder(study.name).glob("*.json")):
            return failed
        not_scored = []  # no reason to run notebooks again
        if people:
            not_scored += _attempt(
                "people", lambda: log(sentences.say_people(verify.score_people(study, people, quiet))), log
            )
        if ran or not (folder / page.WRONG).exists():
            not_scored += _attempt("mistakes", lambda: keep_mistakes(study), log)
        failed += execute(study, PLOTS, log)
        with suppress(records.RecordError):  # whatever became of the figures, nothing is to come any more
            page.write(study.name)
        if ran and not failed:
            paths.write_atomically(stamp, _state(study, sources))
        return failed + not_scored


def _failed_runs(reports: Path, log: Log) -> list[str]:
    failed = [f"{row['experiment']}, seed {row['seed']}: {row['error']}" for row in records.failures(reports)]
    for sentence in failed:
        log(f"FAILED {sentence}", important=True)
    return failed


def _attempt(what: str, do: Callable, log: Log) -> list[str]:
    """Do what the report can come without; a sentence if that failed."""
    try:
        do()
        return []
    except (ValueError, OSError, RuntimeError) as error:
        log(f"FAILED {what}: {error}", important=True)
        return [f"{what}: {error}"]


def keep_mistakes(study: Study, published: bool = False) -> Path | None:
    """Write what the clip model to take gets wrong into ``mistakes.json`` in the report's folder, for its page.

    Args:
        published: of the study as it came with the repository, not of one's own runs.

    Returns:
        The file, or nothing where no clip model is one to take.

    Raises:
        RecordError: the study has no records, or they are of other clips.
        CheckpointError: the model is missing or damaged.
    """
    folder, models = paths.reports(study.name), paths.checkpoints(study.name)
    if published:
        folder, models = (paths.published(kind, study.name) for kind in ("reports", "checkpoints"))
    found = records.load_folder(folder / "records")
    if found[0]["data"]["corpus_fingerprint"] != study.corpus.fingerprint:
        raise records.RecordError(f"the records of {study.name} are of other clips than {study.corpus.name} holds now")
    chosen = tables.recommended(found, records.summary(found), records.stream_points(found))
    if "clips" not in chosen:
        (folder / page.WRONG).unlink(missing_ok=True)
        return None
    model = checkpoints.load(models / tables.published_file(chosen["clips"]))[0]
    of_run = {key: chosen["clips"][key] for key in ("experiment", "seed")}
    paths.write_json(folder / page.WRONG, of_run | study.mistakes(model))
    return folder / page.WRONG


def execute(study: Study, name: str, log: Log, look: Callable = lambda: None, **parameters: str) -> list[str]:
    """Run one notebook headless with papermill and make its HTML; a sentence if it failed, nothing otherwise.

    A cell that fails does not stop those after it: they may hold other experiments. Then the copy stays, with the
    tracebacks in it, as ``unfinished_*.ipynb``; only one without any gets the notebook's name.

    Args:
        name: of a notebook in ``notebooks/``, without suffix; a folder may stand before it.
        look: called every second while it runs.
        parameters: of this notebook, besides those that say which study it is.
    """
    source, done = paths.ROOT / "notebooks" / f"{name}.ipynb", paths.reports(study.name) / "notebooks"
    executed, unfinished = done / source.name, done / f"unfinished_{source.name}"
    done.mkdir(parents=True, exist_ok=True)
    unfinished.unlink(missing_ok=True)
    log(f"{source.stem} ...")
    began = time.monotonic()
    named = {"corpus": study.corpus_argument, "keyword": study.keyword, "split": study.split_name}
    named |= {"profile": study.profile.name, "seeds": study.seeds, **parameters}
    command = [sys.executable, "-m", "kwslib.processes", str(os.getpid()), str(source), str(unfinished)]
    with log.path.open("a") as file:
        # A bar in a file is a line without end; and what is to be reproduced is trained, not copied.
        quiet = {**os.environ, "TQDM_DISABLE": "1", "KWS_PUBLISHED": "0"}
        child = subprocess.Popen([*command, json.dumps(named)], stdout=file, stderr=file, cwd=paths.ROOT, env=quiet)
        try:
            while child.poll() is None:
                time.sleep(1)
                with suppress(OSError):  # a file that is just being replaced, a full disk: no reason to stop
                    look()
        except BaseException:
            child.send_signal(signal.SIGINT)  # after Ctrl-C it has this already: the notebook saves what it has
            with suppress(subprocess.TimeoutExpired):
                child.wait(PATIENCE_S)
            child.terminate()
            raise
    if child.returncode:
        sentence = f"{source.stem}: {_first_error(unfinished) or f'it was killed, see {log.path}'}"
        log(f"FAILED {sentence}", important=True)
        return [sentence]
    os.replace(unfinished, executed)
    page.notebook_html(executed)
    log(f"{source.stem} took {_minutes(time.monotonic() - began)}")
    return []


def _first_error(notebook: Path) -> str:
    """What the first failed cell of an executed notebook says, in one line."""
    import nbformat

    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (OSError, ValueError):  # killed before papermill could save it
        return ""
    errors = [o for cell in cells for o in cell.get("outputs", []) if o.output_type == "error"]
    return f"{errors[0].ename}: {errors[0].evalue}" if errors else ""


def _sources(study: Study) -> str:
    """A digest of everything that notebooks read: code, notebooks, specifications of streams, data, parameters."""
    files = [*(paths.ROOT / "kwslib").rglob("*.py"), *(paths.ROOT / "notebooks" / f"{name}.ipynb" for name in STEPS)]
    files += paths.stream_spec("any").parent.glob("*.json")
    digest = hashlib.sha256(repr((study, study.corpus.fingerprint, study.split.sha256)).encode())
    for file in sorted(files):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _state(study: Study, sources: str) -> str:
    """A digest of what the notebooks read and of what they left behind: while it fits there is nothing to run.

    A touched file changes nothing, a deleted or edited one is noticed; of figures and notebooks, a deleted one.
    """
    folder, digest = paths.reports(study.name), hashlib.sha256(sources.encode())
    for file in sorted([*paths.checkpoints(study.name).glob("*"), *records.folder(study.name).glob("*.json")]):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    left = [file.name for file in (*(folder / "figures").glob("*.svg"), *(folder / "notebooks").glob("0*"))]
    digest.update(repr(sorted(name for name in left if not name.startswith("people-"))).encode())  # 06 draws those
    return digest.hexdigest()


@contextmanager
def _progress(study: Study, log: Log, quiet: bool):
    """A function that looks at the disk: a line per run that has ended, a bar of the work; it returns the time left."""
    expected = expected_s(study)
    work_s = max(1.0, sum(expected.values()))
    places, logs = records.folder(study.name), paths.reports(study.name) / "logs"
    began, seen = time.monotonic(), _modified(places)
    copies = {label: changed for label, changed in seen.items() if _is_copy(places / f"{label}.json")}
    ended: set[str] = set()  # in this run; the latency is written into a record later, once more
    shown = True if quiet else None  # None: a bar where a person sits, none where output goes to a file
    looks = {"bar_format": "{desc}: {percentage:3.0f} % of the work |{bar}|{postfix}", "dynamic_ncols": True}
    with tqdm(total=work_s, desc=study.name, disable=shown, leave=False, **looks) as bar:

        def look() -> str:
            now = dict(_modified(places).items() - copies.items())  # copies are still to be trained
            fresh = [label for label, changed in now.items() if label not in ended and seen.get(label) != changed]
            ended.update(fresh)
            finished_s = sum(expected.get(label, 0.0) for label in ended)
            open_s = sum(seconds for label, seconds in expected.items() if label not in now)
            # As fast as expected, until there is more to go by than the first runs, which wait for their data.
            pace = (time.monotonic() - began + AT_FIRST_S / cpu_count()) / (finished_s + AT_FIRST_S)
            left_s, all_ = open_s * pace, len(expected.keys() | now.keys())
            share = f"{1 - open_s / work_s:.0%} of the work, {len(now)} of {all_} runs"
            for label in fresh:
                log(f"  {share}: {_said(places / f'{label}.json')}; {time_left(left_s)}")
            bar.n = work_s - open_s
            bar.set_postfix_str(f"{time_left(left_s)}; {_training_now(logs)}")
            return time_left(left_s)

        yield look


def _modified(folder: Path) -> dict[str, int]:
    """Names of the records of a folder and when they were written, in ns."""
    return {file.stem: file.stat().st_mtime_ns for file in folder.glob("*.json")}


def _is_copy(record: Path) -> bool:
    """Whether a record was taken from the published ones, so that its run is still to be done."""
    with suppress(records.RecordError):
        return is_copy(records.read(record))
    return False


def _said(record: Path) -> str:
    """What a finished run has to say, in one line."""
    try:
        r = records.read(record)
        area = tables.area(r["metrics"]["au_fa_fr"])
        return f"{r['experiment']}, seed {r['seed']}: AU-FA-FR {area}e-5, {_minutes(r['run']['wall_s'])}"
    except (records.RecordError, KeyError):
        return record.stem


def _training_now(logs: Path, within_s: float = 60) -> str:
    """Which runs wrote an epoch lately, and which epoch."""
    found = []
    for file in sorted(logs.glob("*.csv")):
        if time.time() - file.stat().st_mtime < within_s:
            epoch = file.read_text().rpartition("\n")[0].rpartition("\n")[2].partition(",")[0]
            found.append(f"{file.stem} epoch {epoch}")
    return ", ".join(found[:2])


def expected_s(study: Study) -> dict[str, float]:
    """Seconds that each run of a study may take, by label: those of a published study, for as many epochs.

    Only for saying how far it is; a run that is not in it is counted when it appears.
    """
    folder = paths.ROOT / "reports" / "reference"
    own = folder / study.name if (folder / study.name).exists() else folder / PUBLISHED
    took: dict[str, list[float]] = {}
    for file in sorted((own / "records").glob("*-seed*.json")):
        took.setdefault(paths.split_label(file.stem)[0], []).append(json.loads(file.read_bytes())["run"]["wall_s"])
    share = study.profile.epochs_percent / 100
    return {
        paths.label(name, seed): share * sum(seconds) / len(seconds)
        for name, seconds in took.items()
        for seed in range(study.seeds)
    }


def time_left(seconds: float) -> str:
    """For people.

    >>> time_left(30), time_left(1000).partition(",")[0]
    ('less than a minute left', 'about 17 min left')
    """
    if seconds < 60:
        return "less than a minute left"
    return f"about {_minutes(seconds)} left, until {datetime.now() + timedelta(seconds=seconds):%H:%M}"


def _minutes(seconds: float) -> str:
    """A time for people.

    >>> _minutes(52.3), _minutes(754), _minutes(7540)
    ('52 s', '13 min', '2.1 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
