"""Rules of the repository, tested so that they do not depend on anybody's hooks."""

import ast
import re
import subprocess
import sys
import tomllib

import nbformat
import papermill
import prove
import pytest

from kwslib import paths, records, report

ROOT = paths.ROOT
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
APPENDICES = [ROOT / "notebooks" / "appendix" / f"{name}.ipynb" for name in report.APPENDICES]
ROOMS = {
    0: "paths processes provenance config records tracking synthesis plots report published",
    1: "speech_commands corpora splits features augment sequences models architectures losses metrics cost",
    2: "train quantize checkpoints prune",
    3: "stream streams decide sphinx export listen",
    4: "recipe study task verify experiments sweep reproduce",
    5: "cli",
}
FLOOR = {room: floor for floor, rooms in ROOMS.items() for room in rooms.split()}
# Inside a floor some rooms build on others; from left to right.
ORDER = (
    "paths processes provenance config published records synthesis tracking plots report "
    "speech_commands corpora splits features models architectures metrics augment sequences losses cost "
    "train quantize checkpoints prune "
    "stream streams decide sphinx export recipe study task verify experiments sweep reproduce"
)


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.splitlines() or pytest.skip("not a git checkout")


def imports(room: str) -> set[str]:
    tree = ast.parse((ROOT / "kwslib" / f"{room}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "kwslib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kwslib."):
            found.add(node.module.split(".")[1])
    return found


def test_every_room_is_on_a_floor():
    assert set(FLOOR) == {p.stem for p in (ROOT / "kwslib").glob("*.py")} - {"__init__", "__main__"}


@pytest.mark.parametrize("room", FLOOR)
def test_rooms_import_only_from_below(room):
    order = ORDER.split()
    for other in imports(room):
        same_floor = FLOOR[other] == FLOOR[room] and room in order and order.index(other) < order.index(room)
        assert FLOOR[other] < FLOOR[room] or same_floor, f"{room} imports {other}"


@pytest.mark.parametrize("room", ROOMS[0].split())
def test_the_ground_floor_knows_no_torch(room):
    code = f"import sys, kwslib.{room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_public_functions_have_docstrings():
    missing = []
    for room in FLOOR:
        tree = ast.parse((ROOT / "kwslib" / f"{room}.py").read_text())
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{room}.{node.name}")
    assert missing == []


@pytest.mark.parametrize("path", [*NOTEBOOKS, *APPENDICES], ids=lambda p: p.stem)
def test_notebook_is_stored_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in nodes)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*", cell.id) for cell in notebook.cells)
    parameters = ["corpus", "keyword", "split", "profile", "seeds"] + ["other"] * (
        path.stem == "augmentation_and_transfer"
    )
    assert list(papermill.inspect_notebook(str(path))) == parameters
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}


def test_the_six_notebooks_are_there():
    assert tuple(p.stem for p in NOTEBOOKS) == report.NOTEBOOKS


def test_pyproject_environment_and_lock_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["dev"]}
    assert all("==" in pin for pin in wanted)
    lock = (ROOT / "requirements.lock").read_text()
    locked = set(re.findall(r"^([\w.-]+==[^ \n]+)", lock, flags=re.MULTILINE))
    conda = set(re.findall(r"^ +- ([\w.-]+==\S+)", (ROOT / "environment.yml").read_text(), flags=re.MULTILINE))
    assert conda == wanted
    assert {pin.lower() for pin in wanted} <= locked
    assert {"torch==2.11.0", "torchaudio==2.11.0"} <= locked
    assert len(locked) == len(lock.splitlines()) - 1, "every line of the lock is an exact pin"
    assert "://" not in lock


def test_every_make_target_of_the_readme_exists():
    pages = (ROOT / "README.md").read_text() + (ROOT / "REPRODUCING.md").read_text()
    named = set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", pages, flags=re.MULTILINE))
    named = {first or second for first, second in named}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"reproduce", "test", "help"} <= named <= targets


def test_readme_numbers_equal_the_reference_records():
    readme = (ROOT / "README.md").read_text()
    assert report.fill_readme(readme, ROOT / "reports" / "reference") == readme
    found = records.load_folder(ROOT / "reports" / "reference" / "synthetic-sheila-speaker" / "records")
    assert f"{len({record['experiment'] for record in found})} experiments" in readme
    for study in re.findall(r"<!-- results: (\S+) -->", readme):
        folder = ROOT / "reports" / "reference" / study
        table = records.results([records.read(f) for f in sorted((folder / "records").glob("*.json"))])
        assert len(table) == len((folder / "results.csv").read_text().splitlines()) - 1 > 0
        assert all((ROOT / "checkpoints" / "reference" / study / f"{e}-seed{s}.pt").exists()
                   for e, s in zip(table["experiment"], table["seed"], strict=True))  # fmt: skip


@pytest.mark.parametrize("folder", sorted((ROOT / "reports" / "reference").glob("*-*")), ids=lambda p: p.name)
def test_published_pages_are_what_their_records_say(folder):
    assert report.render(folder.name, folder) == (folder / "index.html").read_text()
    fresh = records.results(records.load_folder(folder / "records")).to_csv(index=False)
    assert fresh == (folder / "results.csv").read_text()


def test_the_figures_of_reproducing_are_those_that_were_measured():
    page = (ROOT / "REPRODUCING.md").read_text()
    assert prove.filled(page) == page
    assert set(re.findall(r"<!-- proof: (\w+) -->", page)) == set(prove.PARTS)
    faults = prove.read("faults")
    assert {case["outcome"] for case in faults["cases"]} <= {"passed", "skipped"}
    for case in faults["cases"]:
        assert f"def {case['test']}(" in (ROOT / "tests" / f"{case['file']}.py").read_text()


def test_tracked_files_hold_no_keys_and_addresses():
    secret = re.compile(
        r"(-----BEGIN|\bAKIA[0-9A-Z]{16}|\bgh[pousr]_\w{20}|WANDB_API_KEY\s*[=:]\s*['\"]?\w"
        r"|[\w.]+@(?!pytest)[\w-]+\.(com|org|net|de)\b)"
    )
    address = re.compile(r"\b(?!127\.0\.0\.1\b|0\.0\.0\.0\b)\d{1,3}(\.\d{1,3}){3}\b(?!\.)")
    for name in tracked():
        if name.endswith((".py", ".md", ".toml", ".yml", ".ipynb", ".cff", ".lock")) or name == "Makefile":
            text = (ROOT / name).read_text()
            assert not secret.search(text) or name.endswith("test_repository.py"), name
            assert name.endswith((".lock", ".ipynb")) or not address.search(text), name


def test_tracked_files_hold_no_machine_paths_or_recordings():
    machine = re.compile(rb"/(home|root|Users|work)/[a-z]")
    for name in tracked():
        path = ROOT / name
        assert path.suffix not in {".wav", ".flac", ".mp3", ".npy", ".npz"}, name
        assert path.stat().st_size < 2_000_000, name
        if path.suffix in {".json", ".ipynb", ".html", ".md", ".csv", ".svg", ".py", ".toml", ".yml", ".lock"}:
            content = path.read_bytes()
            assert b"data:audio" not in content or name.endswith("test_repository.py"), name
            assert not machine.search(content) or name.endswith("test_repository.py"), name


def test_code_is_clean():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
