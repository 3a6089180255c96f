"""The figures of ``REPRODUCING.md``, measured anew: ``make prove`` (an hour on 2 cores; any part alone is quicker).

    python tests/prove.py [kills] [faults] [processors] [small] [published]

``kills``: 50 times ``kill -9`` during a small study and 10 times during ``make reproduce PROFILE=smoke``.
``faults``: the tests of ``test_faults.py`` and ten minutes of hostile files (``test_hostile.py``).
``processors``: the published files scored, and the baseline trained, with narrower vector units.
``small``: the baseline trained on one core with 4 GB of memory, where the system lets us limit it (Linux, root).
``published``: all published files of the default study, scored again.
``arithmetic``: the digest of a small study's checkpoints and records, beside those of other processors.
``engine``: CPU time of trainings that stand for the rest, by the code of commit ``KWS_BEFORE`` and of this checkout in
turn; runs only when it is named.
``integers``: an hour of sound through a published detector in whole numbers, by numpy and by torch, with all vector
units and with fewer.
``words``: detectors made from each of six words (``make detector``), counted on the recordings of people in the folder
that ``KWS_PEOPLE`` names; runs only when it is named.
``recordings``: detectors of ``happy`` made from voices and up to 900 recordings of it by people of the training part of
the folder that ``KWS_PEOPLE`` names, counted on the people of its other parts; runs only when it is named.
``streams``: the stream models of notebook 02 for ``happy``, trained on voices alone, counted on streams made of those
recordings and on the sentences, without the keyword, in the folder that ``KWS_TALK`` names; only when it is named.
``beside``: PocketSphinx and the published stream models that learnt from people on the same streams of the people in
``KWS_PEOPLE`` who were never learnt from, and on ``KWS_TALK``; only when it is named.
``same``: a smoke run of the commit ``KWS_BEFORE`` against one of this checkout, all files byte for byte; for changes
that are to move no number, so it runs only when it is named.

Each leaves ``reports/reference/proofs/<name>.json``; the text is made from those alone.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from shlex import quote
from xml.etree import ElementTree

from engine import SHARE, recipes
from kills import stable

ROOT = Path(__file__).resolve().parents[1]
PROOFS = ROOT / "reports" / "reference" / "proofs"
PAGE = ROOT / "REPRODUCING.md"
WORDS = ("happy", "bed", "cat", "stop", "yes", "right")
BESIDE = ("baseline-stream", "brook-stream", "brook-stream-qat4", "brook-stream-mixed-qat4")
WHOLE = "speech_commands_part-happy-speaker/grain-70ms-kd-qat4-seed0.kws"
SPHINX = (1e-3, 1e-8, 1e-15, 1e-25)  # its thresholds
FUZZ_MINUTES = os.environ.get("KWS_FUZZ_MINUTES", "10")
# What ATEN_CPU_CAPABILITY can be set to, and which of numpy's kernels to leave out beside.
LEVELS = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR"},
    "no AVX": {"ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR X86_V3"},
}


def written(name: str, found: dict) -> None:
    sys.path.insert(0, str(ROOT))
    from kwslib import paths
    from kwslib.results import provenance

    code = provenance.of_run()
    machine = {key: code[key] for key in ("commit", "cpu", "cpu_features", "cores", "memory_gb", "torch", "system")}
    paths.write_json(PROOFS / f"{name}.json", {**found, "machine": machine})


def shell(*command: str, check: bool = True, **environment: str) -> str:
    variables = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


def kills() -> None:
    found = {}
    for kind, options in (("small study", ["--kills", "50"]), ("make reproduce", ["--kills", "10", "--make"])):
        found[kind] = json.loads(shell(sys.executable, "tests/kills.py", *options))
    written("kills", found)


def faults() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "junit.xml"
        files = ["tests/test_faults.py", "tests/test_hostile.py"]
        options = ["-q", "-m", "", f"--junitxml={out}", "--hypothesis-show-statistics"]
        printed = shell(sys.executable, "-m", "pytest", *options, *files, check=False, KWS_FUZZ_MINUTES=FUZZ_MINUTES)
        cases = ElementTree.parse(out).getroot().iter("testcase")
        rows = [
            {
                "test": re.sub(r"\[.*", "", case.get("name")),
                "file": case.get("classname").rpartition(".")[2],
                "outcome": next(
                    (child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"
                ),
            }
            for case in cases
        ]
    examples = [int(n) for n in re.findall(r"- (\d+) passing, 0 failing", printed)]
    written("faults", {"cases": rows, "fuzz_minutes": float(FUZZ_MINUTES), "fuzz_examples": sum(examples)})


def processors() -> None:
    found = {}
    for level, environment in LEVELS.items():
        with tempfile.TemporaryDirectory() as home:
            began = time.monotonic()
            kws = [sys.executable, "-m", "kwslib"]
            environment = {**environment, "KWS_ARITHMETIC": "native"}
            shell(*kws, "reproduce", "--quiet", "--only", "01_split_and_baseline", KWS_HOME=home, **environment)
            verified = shell(*kws, "verify", "--all", "--json", KWS_HOME=home, check=False, **environment)
            records = sorted(Path(home).glob("reports/*/records/*.json"))
            areas = [json.loads(file.read_text())["metrics"]["au_fa_fr"] for file in records]
            found[level] = {**json.loads(verified), "baseline_au_fa_fr": areas, "s": round(time.monotonic() - began)}
    reference = sorted((ROOT / "reports/reference/synthetic-sheila-speaker/records").glob("baseline-seed*.json"))
    published = [json.loads(file.read_text())["metrics"]["au_fa_fr"] for file in reference]
    written("processors", {"levels": found, "published_baseline_au_fa_fr": published})


def small() -> None:
    limit = 4 * 1024**3
    with limited(limit) as join, tempfile.TemporaryDirectory() as home:
        began = time.monotonic()
        kws = f"exec taskset -c 0 {sys.executable} -m kwslib"
        only = "--quiet --only 01_split_and_baseline"
        shell("sh", "-c", f"{join}; {kws} reproduce {only}", KWS_HOME=home)
        verified = shell("sh", "-c", f"{join}; {kws} verify --json", KWS_HOME=home, check=False)
        seconds = round(time.monotonic() - began)
    written("small", {**json.loads(verified), "memory_limit_bytes": limit, "cores_used": 1, "s": seconds})


@contextmanager
def limited(n_bytes: int):
    """A shell line that puts its shell, and all that it starts, into a group with so much memory."""
    for root, file in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / f"kws-{os.getpid()}"
        try:
            group.mkdir()
            (group / file).write_text(str(n_bytes))
        except OSError:
            with suppress(OSError):
                group.rmdir()
            continue
        try:
            yield f"echo $$ > {group}/cgroup.procs"
        finally:
            for _ in range(50):  # until the last process has left it
                with suppress(OSError):
                    group.rmdir()
                    break
                time.sleep(0.2)
        return
    raise SystemExit("memory cannot be limited here: it takes Linux and rights to make a control group")


def published() -> None:
    """In a home without records of one's own, which may be the very ones that were published."""
    with tempfile.TemporaryDirectory() as home:
        verified = shell(sys.executable, "-m", "kwslib", "verify", "--all", "--json", KWS_HOME=home)
    written("published", json.loads(verified))


@contextmanager
def checkout_before():
    """A checkout of the commit that ``KWS_BEFORE`` names, in a folder that is gone afterwards."""
    before = os.environ.get("KWS_BEFORE") or sys.exit("name the commit to compare with: KWS_BEFORE=abc1234")
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "checkout"
        shell("git", "worktree", "add", "--detach", "--quiet", str(old), before)
        try:
            yield before, old
        finally:
            shell("git", "worktree", "remove", "--force", str(old))


def arithmetic() -> None:
    """Without the corpus: files of tones, that no library has a choice in."""
    from conftest import write_tones

    sys.path.insert(0, str(ROOT))
    from kwslib.arithmetic import is_pinned
    from kwslib.results import provenance

    if not is_pinned():
        raise SystemExit("this processor has no AVX2, or KWS_ARITHMETIC is native: its bytes are its own")
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_tones(Path(folder) / "tones")
        shell(sys.executable, "tests/kills.py", "--chain", str(corpus), KWS_HOME=f"{folder}/home")
        content = json.dumps(stable(Path(folder) / "home"), sort_keys=True)
    code = provenance.of_run()
    seen = (read("arithmetic") or {"digests": {}})["digests"]
    seen[f"{code['cpu']} ({_widest()})"] = hashlib.sha256(content.encode()).hexdigest()[:16]
    written("arithmetic", {"digests": seen})


def integers() -> None:
    """Each in a process of its own, for libraries choose when they are loaded."""
    here = "import sys; sys.path[:0] = ['.', 'tests']; import prove; print(prove.hour_in_whole_numbers())"
    found = read("integers") or {"rows": {}}
    from kwslib.results import provenance

    for level, environment in {"": {}, **LEVELS}.items():
        processor = f"{provenance.of_run()['cpu']} ({level or _widest()})"
        found["rows"][processor] = json.loads(shell(sys.executable, "-c", here, KWS_ARITHMETIC="native", **environment))
    written("integers", {"model": WHOLE, "rows": found["rows"]})


def hour_in_whole_numbers() -> str:
    """Digests of a detector's scores of one hour: ``docs/sample.flac`` again and again, in noise, at other levels."""
    import numpy as np
    import soundfile
    import torch

    from kwslib.nets.integer import IntegerNet
    from kwslib.training import checkpoints

    sample, rate = soundfile.read(ROOT / "docs" / "sample.flac", dtype="int16")
    random = np.random.default_rng(0)
    minutes = []
    for _ in range(60):
        loudness = 10 ** random.uniform(-2, 0.5)
        speech = np.resize(sample, 60 * rate) * loudness + random.integers(-300, 301, 60 * rate) * loudness
        minutes.append(speech.round().clip(-32768, 32767).astype(np.int16))
    clips = np.resize(sample, (10, rate))
    net = IntegerNet(checkpoints.load(ROOT / "checkpoints" / "reference" / WHOLE)[0], 4, clips)
    digests = {}
    for library in ("numpy", "torch"):
        digest, state = hashlib.sha256(), None
        for minute in minutes:
            samples = minute.astype(np.int64)[None]
            samples = torch.from_numpy(samples) if library == "torch" else samples
            scores, state = net.step(samples, state or net.initial_state(samples))
            digest.update(np.asarray(scores).astype("<i8").tobytes())
        digests[library] = digest.hexdigest()[:16]
    return json.dumps(digests)


def _widest() -> str:
    flags = Path("/proc/cpuinfo").read_text().split()
    return "AVX512" if "avx512f" in flags else "AVX2"


def like(record: dict) -> str | None:
    """Which of the trainings of ``engine.py`` stands for a run; none for one that trained nothing."""
    recipe, name = record["recipe"], record["experiment"]
    after, losses = ({part["class"] for part in recipe[key]} for key in ("after", "losses"))
    if not record["epochs"]:
        return None
    if "StreamTune" in after:
        kind = "brook-stream-kd" if recipe["teacher"] else "brook-stream"
        return kind if name.startswith("brook") else "baseline-stream"
    if "QAT" in after:
        return "a1-kd-qat4"
    kind = record["model"]["class"]
    if kind != "CRNNConfig":
        return {"TimeNetConfig": "brook"}.get(kind, "rival-kd" if recipe["teacher"] else "rival-separable")
    for loss, stands in (("LayerwiseMSE", "e2-layers"), ("AttentionKL", "b2-attention")):
        if loss in losses:
            return stands
    if record["model"]["hidden_size"] >= 32:
        return "baseline" if recipe["student"] else "baseline-tuned"
    if "Prune" in after:
        return "prune-50-tuned"
    return "a1-kd" if recipe["teacher"] else "a1-labels"


def engine() -> None:
    """Twice each, in turn; weighted by the epochs that the experiments of the published study take."""
    took: dict[str, list[dict]] = {"before": [], "now": []}
    with checkout_before() as (before, old), tempfile.TemporaryDirectory() as home:
        for _ in range(2):
            for which, checkout in (("before", old), ("now", ROOT)):
                where = {"PYTHONPATH": str(checkout), "KWS_HOME": f"{home}/{which}", "OPENBLAS_NUM_THREADS": "1"}
                took[which].append(json.loads(shell(sys.executable, "tests/engine.py", **where).splitlines()[-1]))
    least = {which: {name: min(turn[name] for turn in turns) for name in turns[0]} for which, turns in took.items()}
    weights = {"decision of baseline": 3.0, "decision of brook": 4.0}
    measured = {e.name: e for e in recipes()}
    for file in (ROOT / "reports/reference/synthetic-sheila-speaker/records").glob("*-seed0.json"):
        record = json.loads(file.read_text())
        if stands := like(record):
            recipe = measured[stands]
            training = recipe.training if recipe.student else recipe.after[0].training
            weights[stands] = weights.get(stands, 0.0) + record["epochs"] / max(1, round(SHARE * training.epochs))
    written("engine", {"before": before, "cpu_s": least, "weights": weights})


def same() -> None:
    """Both runs with this environment, each with its own code, notebooks and specifications."""
    with checkout_before() as (before, old), tempfile.TemporaryDirectory() as folder:
        found = {}
        for checkout in (old, ROOT):
            home = Path(folder) / f"home of {checkout.name}"
            variables = {"PYTHONPATH": str(checkout), "KWS_HOME": str(home)}
            command = f"{sys.executable} -m kwslib reproduce --profile smoke --quiet"
            shell("sh", "-c", f"cd {quote(str(checkout))}; {command}", **variables)
            found[checkout] = stable(home)
    first, second = found.values()
    different = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    written("same", {"before": before, "files": len(first), "different": different})


def read(name: str) -> dict | None:
    file = PROOFS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def on(found: dict) -> str:
    machine = found["machine"]
    commit, _, dirty = (machine["commit"] or "none").partition("-")
    processor = f"{machine['cores']} cores of {machine['cpu']} ({machine['cpu_features']})"
    return f"Measured on {processor}, commit {commit[:10]}{', changed' if dirty else ''}."


def say_kills(found: dict) -> str:
    rows = [
        [
            kind,
            r["kills"],
            f"{r['of_the_whole_tree']} / {r['of_one_process']}",
            ", ".join(f"{stage} {n}" for stage, n in sorted(r["stages"].items())),
            r["studies"],
            r["survivors"],
            f"{r['files_compared'] - len(r['different'])} of {r['files_compared']}",
        ]
        for kind, r in found.items()
        if kind != "machine"
    ]
    head = ["what was run", "kills", "all at once / one process", "during", "studies", "helpers left over",
            "records and files as undisturbed"]  # fmt: skip
    return table(head, rows) + "\n\n" + on(found)


def say_faults(found: dict) -> str:
    names: dict[tuple, list[str]] = {}
    for case in found["cases"]:
        names.setdefault((case["file"], case["test"]), []).append(case["outcome"])
    rows = [
        [test.removeprefix("test_").replace("_", " "), f"`{file}`", len(all_), all_.count("passed")]
        for (file, test), all_ in names.items()
    ]
    fuzzed = (
        f"Hostile files were also made by the thousand: {found['fuzz_examples']:,} in {found['fuzz_minutes']:g} "
        "minutes (`KWS_FUZZ_MINUTES`; a bare test run tries some thousand)."
    )
    return table(["what was tried", "test", "cases", "passed"], rows) + f"\n\n{fuzzed} {on(found)}"


def say_processors(found: dict) -> str:
    def areas(values: list[float]) -> str:
        return ", ".join(f"{value * 1e5:.2f}" for value in values)

    own = f"published ({found['machine']['cpu_features']})"
    rows = [[own, areas(found["published_baseline_au_fa_fr"]), "", "", "", ""]]
    for level, r in found["levels"].items():
        compared = {row["what"]: row for row in r["compared"]}
        same = compared["checkpoint"]
        rows.append(
            [
                level,
                areas(r["baseline_au_fa_fr"]),
                "the same" if compared["corpus"]["agree"] == compared["corpus"]["compared"] else "another",
                f"{same['agree']} of {same['compared']}",
                f"{r['exact']} of {r['files']}",
                f"{r['largest_difference']:.1g}",
            ]
        )
    head = ["vector units", "baseline trained: AU-FA-FR ×1e5 of its seeds", "corpus", "checkpoints byte for byte",
            "published files that score exactly as recorded", "largest difference"]  # fmt: skip
    return table(head, rows) + "\n\n" + on(found)


def say_small(found: dict) -> str:
    same = {row["what"]: row for row in found["compared"]}["checkpoint"]
    limit = (
        f"{found['cores_used']} core with a limit of {found['memory_limit_bytes'] / 1024**3:.0f} GiB for all processes"
    )
    return (
        f"The baseline of the default study, {same['compared']} seeds, was made on {limit} together, corpus included, "
        f"in {found['s'] / 60:.0f} minutes: {same['agree']} of {same['compared']} checkpoints are byte for byte the "
        f"published ones. {on(found)}"
    )


def say_published(found: dict) -> str:
    files = f"{found['files']} published files of the default study were scored again"
    return (
        f"On a fresh corpus, in fresh processes, {files}: {found['exact']} exactly as recorded, the largest difference "
        f"was {found['largest_difference']:.1g}. {on(found)}"
    )


def say_same(found: dict) -> str:
    equal = f"{found['files'] - len(found['different'])} of {found['files']}"
    return (
        f"A smoke run of all experiments by commit {found['before'][:10]} and one by the code after it: {equal} "
        f"checkpoints and records are the same byte for byte (records outside their `run` block). {on(found)}"
    )


def say_arithmetic(found: dict) -> str:
    rows = [[processor, f"`{digest}`"] for processor, digest in found["digests"].items()]
    alike = "all the same" if len(set(found["digests"].values())) == 1 else "NOT ALL THE SAME"
    return (
        table(["processor", "SHA-256 of a small study's checkpoints and records"], rows) + f"\n\n{len(rows)}, {alike}."
    )


def say_integers(found: dict) -> str:
    rows = [
        [processor, *(f"`{row[library]}`" for library in ("numpy", "torch"))]
        for processor, row in found["rows"].items()
    ]
    n = len({digest for row in found["rows"].values() for digest in row.values()})
    alike = "all the same" if n == 1 else f"{n} DIFFERENT ONES"
    said = f"Of `{found['model']}`, SHA-256 of its scores: {alike}."
    return f"{table(['processor', 'numpy', 'torch'], rows)}\n\n{said}"


def say_engine(found: dict) -> str:
    before, now, weights = found["cpu_s"]["before"], found["cpu_s"]["now"], found["weights"]
    rows = [[name, f"{before[name]:.2f}", f"{now[name]:.2f}", f"{now[name] / before[name]:.2f}",
             f"{weights.get(name, 0) * before[name] / 60:.1f}"] for name in before]  # fmt: skip
    sums = [sum(weights.get(name, 0) * seconds for name, seconds in took.items()) / 60 for took in (before, now)]
    rows.append(
        ["all, weighted", f"{sums[0]:.0f} min", f"{sums[1]:.0f} min", f"{sums[1] / sums[0]:.2f}", f"{sums[0]:.0f}"]
    )
    head = [
        "a tenth of this training",
        f"CPU s, commit {found['before'][:10]}",
        "CPU s now",
        "ratio",
        "in one seed, min",
    ]
    return table(head, rows) + "\n\n" + on(found)


def named_people() -> str:
    return os.environ.get("KWS_PEOPLE") or sys.exit("name a folder <word>/<speaker>_*.wav: KWS_PEOPLE=path/to/words")


def named_talk() -> str:
    return os.environ.get("KWS_TALK") or sys.exit("name a folder of talk without the keyword: KWS_TALK=folder")


def made(word: str, recordings: str, people: str) -> tuple[Path, dict, dict]:
    """Make a detector that learns from recordings, too: its reports, what people are, and what it misses of them."""
    from kwslib import paths
    from kwslib.lab import detector

    detector.make(word, recordings, people)
    reports = paths.reports(detector.study_of(word, recordings).name)
    counted = json.loads((reports / "people.json").read_bytes())
    mine = counted["runs"][paths.label(detector.MADE, 0)]
    return reports, counted, {key: mine[key] for key in ("miss_at_1pct_fa", "miss_at_0_1pct_fa")}


def words() -> None:
    """In ``KWS_HOME``, where what was made before is not made again."""
    people = named_people()
    sys.path.insert(0, str(ROOT))
    from kwslib.lab import detector

    found: dict = {"words": {}}
    for word in WORDS:
        began = time.monotonic()
        reports, counted, missed = made(word, "", people)
        record = json.loads((reports / "records" / f"{detector.MADE}-seed0.json").read_text())
        ordinary = record["metrics"]["streams"]["points"][0]
        found["words"][word] = {
            "minutes": round((time.monotonic() - began) / 60, 1),
            "compact_bytes": record["cost"]["compact_bytes"],
            **{key: ordinary[key] for key in ("found", "keywords", "false_alarms", "other_hours")},
            **{key: counted[key] for key in ("n_keyword", "n_other", "n_speakers")},
            **missed,
        }
        found["people"] = counted["folder"]
    written("words", found)


def say_words(found: dict) -> str:
    rows = [
        [word, f"{100 * row['found'] / row['keywords']:.1f}", f"{row['false_alarms'] / row['other_hours']:.2f}",
         f"{row['n_keyword']:,}", f"{100 * row['miss_at_1pct_fa']:.1f}", f"{100 * row['miss_at_0_1pct_fa']:.1f}",
         f"{row['compact_bytes'] / 1e3:.1f}"] for word, row in found["words"].items()]  # fmt: skip
    head = ["word", "voices: found on ordinary streams, %", "false alarms per hour", "people: recordings",
            "missed at 1 % FA, %", "missed at 0.1 % FA, %", "kB"]  # fmt: skip
    return f"{table(head, rows)}\n\nPeople: `{found['people']}`, none of them learnt from. {on(found)}"


def recordings() -> None:
    """In ``KWS_HOME``. A person's recordings of other words go with those of the keyword."""
    people = Path(named_people())
    sys.path.insert(0, str(ROOT))
    import numpy as np

    from kwslib.data import speech_commands

    word = WORDS[0]
    files = [file for file in sorted(people.glob("[!_]*/*")) if file.is_file()]
    who = {file: file.name.split("_")[0] for file in files}
    part = {file: speech_commands.subset_of(who[file]) for file in files}
    says = Counter(who[file] for file in files if file.parent.name == word and part[file] == "train")
    names = np.random.default_rng(0).permutation(sorted(says)).tolist()
    found: dict = {"word": word, "people": people.name, "rows": []}
    with tempfile.TemporaryDirectory() as folder:

        def linked(name: str, wanted) -> str:
            for file in filter(wanted, files):
                (Path(folder) / name / file.parent.name).mkdir(parents=True, exist_ok=True)
                (Path(folder) / name / file.parent.name / file.name).symlink_to(file.resolve())
            return str(Path(folder) / name)

        judges = linked("judges", lambda file: part[file] != "train")
        for count in (0, 10, 30, 100, 300, 900):
            chosen: set[str] = set()
            for name in names:  # whole people, until they have said it so often
                if sum(says[other] for other in chosen) + says[name] <= count:
                    chosen.add(name)
            taught = linked(f"{word}-{count}", lambda file, chosen=chosen: who[file] in chosen) if chosen else ""
            _, counted, missed = made(word, taught, judges)
            row = {"recordings": sum(says[name] for name in chosen), "speakers": len(chosen)}
            found["rows"].append(row | {key: counted[key] for key in ("n_keyword", "n_other")} | missed)
            written("recordings", found)


def say_recordings(found: dict) -> str:
    rows = [
        [f"{row['recordings']:,}", f"{row['speakers']:,}", f"{100 * row['miss_at_1pct_fa']:.1f}",
         f"{100 * row['miss_at_0_1pct_fa']:.1f}"] for row in found["rows"]]  # fmt: skip
    head = [f"recordings of {found['word']!r}", "by people", "missed at 1 % FA, %", "missed at 0.1 % FA, %"]
    row = found["rows"][0]
    judges = f"{row['n_keyword']:,} recordings of it and {row['n_other']:,} of other words by other people"
    return f"{table(head, rows)}\n\nCounted on {judges} in `{found['people']}`. {on(found)}"


def streams() -> None:
    """In ``KWS_HOME``, by each model's own decision; one seed."""
    people, talk = named_people(), named_talk()
    sys.path.insert(0, str(ROOT))
    from kwslib import paths
    from kwslib.results import records

    study = ["--corpus", "synthetic", "--keyword", WORDS[0], "--split", "speaker"]
    kws = [sys.executable, "-c", "from kwslib.cli import main; raise SystemExit(main())"]
    shell(*kws, "reproduce", *study, "--seeds", "1", "--quiet", "--only", "01_split_and_baseline", "02_streaming")
    shell(*kws, "people", *study, "--people", people)
    name = paths.study_name("synthetic", WORDS[0], "speaker")
    missed = json.loads((paths.reports(name) / "people.json").read_bytes())
    found: dict = {"word": WORDS[0], "people": missed["folder"], "models": {}}
    for record in records.load(name):
        if "streams" not in record["metrics"]:
            continue
        label = paths.label(record["experiment"], 0)
        evaluate = [*kws, "evaluate", "--json", "--checkpoint", str(paths.checkpoints(name) / f"{label}.pt")]
        row = {"macs_per_second": record["cost"]["macs_per_second"], "compact_bytes": record["cost"]["compact_bytes"]}
        row |= {key: missed["runs"][label][key] for key in ("miss_at_1pct_fa", "miss_at_0_1pct_fa")}
        for kind in ("ordinary", "dense"):
            spec = str(ROOT / "data_splits" / "streams" / f"{kind}.json")
            counted = json.loads(shell(*evaluate, "--corpus", people, "--stream", spec))
            row[kind] = {key: counted[key] for key in ("found", "keywords", "false_alarms", "other_hours")}
        counted = json.loads(shell(*evaluate, "--negatives", talk))
        row["talk"] = {key: counted[key] for key in ("false_alarms", "hours")}
        found["models"][record["experiment"]] = row
    written("streams", found)


def say_streams(found: dict) -> str:
    def on_stream(row: dict) -> list[str]:
        share, rate = row["found"] / row["keywords"], row["false_alarms"] / row["other_hours"]
        return [f"{100 * share:.1f}", f"{rate:.1f}"]

    rows = [
        [name, f"{row['compact_bytes'] / 1e3:.1f}", f"{100 * row['miss_at_1pct_fa']:.1f}", *on_stream(row["ordinary"]),
         *on_stream(row["dense"]), f"{row['talk']['false_alarms'] / row['talk']['hours']:.1f}"]
        for name, row in found["models"].items()]  # fmt: skip
    head = ["model", "kB", "missed at 1 % FA, %", "ordinary: found, %", "false alarms per hour", "dense: found, %",
            "false alarms per hour", "sentences: false alarms per hour"]  # fmt: skip
    hours = next(iter(found["models"].values()))["talk"]["hours"]
    judges = f"Words of `{found['people']}` on both kinds of stream, {hours:.1f} hours of sentences read by people"
    return f"{table(head, rows)}\n\n{judges}; nobody of them was learnt from. {on(found)}"


def beside() -> None:
    """Each by the decision it was made with; of models that learnt from voices those that ``streams`` left."""
    people, talk = named_people(), Path(named_talk())
    sys.path.insert(0, str(ROOT))
    import torch

    from kwslib import audio, paths
    from kwslib.config import profile
    from kwslib.data.features import LogMel, prepared
    from kwslib.lab.study import Study
    from kwslib.streaming import decision, events, tracks
    from kwslib.training import checkpoints

    study = Study(people, WORDS[0], "speaker", profile("standard"), 1)
    streams = {}
    for kind, minutes in (("ordinary", 60), ("dense", 30)):
        spec = replace(tracks.read_spec(paths.stream_spec(kind)), minutes=minutes)
        streams[kind] = list(tracks.render(study.corpus, study.split.test, study.keyword, spec))
    streams["talk"] = [tracks.Track(audio.read(talk / name), []) for name in tracks.long_recordings(talk)]
    learnt = {
        "people": paths.published("checkpoints", study.name),
        "voices": paths.checkpoints(paths.study_name("synthetic", study.keyword, "speaker")),
    }
    front_end = LogMel()
    rows: list[dict] = []
    for kind, rendered in streams.items():
        logmels = [prepared(torch.from_numpy(track.samples)[None], front_end)[0].numpy() for track in rendered]
        heard = tracks.Tracks(logmels, [track.keywords_s for track in rendered], [track.seconds for track in rendered])
        for teachers, folder in learnt.items():
            for file in (file for name in BESIDE for file in sorted(folder.glob(f"{name}-seed?.pt"))):
                model, sidecar = checkpoints.load(file)
                counted = decision.outcome(events.score_tracks(model, heard), decision.read_decision(sidecar))
                rows.append({"detector": f"{sidecar['experiment']}, {teachers}", "stream": kind, **counted})
        theirs = events.sphinx(rendered, study.keyword, SPHINX)
        named = [f"PocketSphinx at {threshold:g}" for threshold in SPHINX]
        rows += theirs.assign(detector=named, stream=kind).to_dict("records")
    kept = ("detector", "stream", "found", "keywords", "false_alarms", "other_hours")
    rows = [{key: round(row[key], 4) if key == "other_hours" else row[key] for key in kept} for row in rows]
    written("beside", {"word": study.keyword, "people": Path(people).name, "rows": rows})


def say_beside(found: dict) -> str:
    def counted(detector: str, kind: str) -> tuple[str, str, float]:
        """Found in per cent and false alarms per hour of a detector, over its seeds, and hours of one."""
        rows = [row for row in found["rows"] if (row["detector"], row["stream"]) == (detector, kind)]
        sums = {key: sum(row[key] for row in rows) for key in ("found", "keywords", "false_alarms", "other_hours")}
        share = f"{100 * sums['found'] / sums['keywords']:.1f}" if sums["keywords"] else "–"
        return share, f"{sums['false_alarms'] / sums['other_hours']:.1f}", rows[0]["other_hours"]

    names = list(dict.fromkeys(row["detector"] for row in found["rows"]))
    on_each = {name: [counted(name, kind) for kind in ("ordinary", "dense", "talk")] for name in names}
    rows = [[name, *ordinary[:2], *dense[:2], talk[1]] for name, (ordinary, dense, talk) in on_each.items()]
    head = ["detector", "ordinary: found, %", "false alarms per hour", "dense: found, %", "false alarms per hour",
            "sentences: false alarms per hour"]  # fmt: skip
    judges = (
        f"Found is `{found['word']}`, said by people of the test part of `{found['people']}`; people read "
        f"{on_each[names[0]][2][2]:.1f} hours of sentences. After the comma: who was learnt from; ours are means of "
        "all seeds."
    )
    return f"{table(head, rows)}\n\n{judges} {on(found)}"


PARTS = {  # how each is measured and said
    "kills": (kills, say_kills),
    "faults": (faults, say_faults),
    "processors": (processors, say_processors),
    "small": (small, say_small),
    "published": (published, say_published),
    "arithmetic": (arithmetic, say_arithmetic),
    "integers": (integers, say_integers),
    "engine": (engine, say_engine),
    "same": (same, say_same),
    "words": (words, say_words),
    "recordings": (recordings, say_recordings),
    "streams": (streams, say_streams),
    "beside": (beside, say_beside),
}


def filled(text: str) -> str:
    """The page with what stands between its ``<!-- proof: NAME -->`` marks made anew from the measured files."""

    def fresh(match: re.Match) -> str:
        found = read(match[2])
        return f"{match[1]}\n\n{PARTS[match[2]][1](found)}\n\n{match[3]}" if found else match[0]

    return re.sub(r"(<!-- proof: (\w+) -->).*?(<!-- end -->)", fresh, text, flags=re.DOTALL)


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - {*PARTS, "text"}
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(PARTS)} and text")
    for part in sys.argv[1:] or set(PARTS) - {"same", "engine", "words", "recordings", "streams", "beside"}:
        if part != "text":
            PARTS[part][0]()
    PAGE.write_text(filled(PAGE.read_text()))
