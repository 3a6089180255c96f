"""Rules of the repository, tested so that they do not depend on anybody's hooks."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib

import nbformat
import papermill
import prove
import pytest
import recipes
from house import CODE, PICTURE, PLACE, ROOMS, docstring, drawn, imports, modules, room_of

from kwslib import OFFERED, paths
from kwslib.cli import _parser
from kwslib.results import page, records

ROOT = paths.ROOT
PAGES = [ROOT / "README.md", ROOT / "REPRODUCING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
APPENDICES = [ROOT / "notebooks" / "appendix" / f"{name}.ipynb" for name in page.APPENDICES]
WITHOUT_TORCH = [module for module in modules() if room_of(module) in ("ground", "results")]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.splitlines() or pytest.skip("not a git checkout")


def test_every_file_is_listed_in_its_room():
    assert set(modules()) == set(PLACE)
    assert len(ROOMS) == 8 and all(ROOMS.values())


@pytest.mark.parametrize("module", modules())
def test_files_import_only_from_rooms_before_theirs(module):
    for other in imports(modules()[module]):
        assert PLACE[other] < PLACE[module], f"{module} imports {other}"


def test_rooms_stay_small():
    sizes = {file.relative_to(CODE): len(file.read_text().splitlines()) for file in CODE.rglob("*.py")}
    assert {str(file): size for file, size in sizes.items() if size > 400} == {}
    assert sorted(sizes.values())[len(sizes) // 2] < 200
    for folder in {file.parent for file in CODE.rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) <= 8, folder
        assert len(docstring(folder / "__init__.py").splitlines()) <= (10 if folder != CODE else 30)


def test_the_picture_of_the_house_is_what_the_code_is():
    assert PICTURE.read_text() == drawn(), "python tests/house.py draws it anew"


def test_all_recipes_are_listed():
    assert recipes.PAGE.read_text() == recipes.found(), "python tests/recipes.py writes it anew"


def test_the_page_about_the_house_names_what_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = [row.partition("|")[2] for row in re.findall(r"^\| [A-Z].*\?(.*) \|$", text, flags=re.MULTILINE)]
    assert len(rows) >= 20
    for row in rows:
        file = None
        for name in re.findall(r"`([\w/.]+)`", row):
            if "/" in name or name.endswith(".py"):
                file = next(f for f in (CODE / name, ROOT / name) if f.exists())
            else:
                place = CODE / "data" / "augment.py" if name == "augment.vary" else file
                assert re.search(rf"^(def|class) {name.rpartition('.')[2]}\b", place.read_text(), re.MULTILINE), name


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_ground_and_the_results_know_no_torch(module):
    code = f"import sys, kwslib.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_shell_waits_for_nothing_that_it_does_not_need():
    """Below 0.4 s of processor time and 80 MB; only a command that reads notebooks imports what reads them."""
    code = (
        "import resource, sys; from kwslib.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "assert not {'numpy', 'pandas', 'torch', 'nbformat'} & set(sys.modules)\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e3))"
    )
    # Through a shell: a child of this process would begin with this one's peak of memory.
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    cpu_s, memory_mb = map(float, done.stdout.splitlines()[-1].split())
    assert "reproduce" in done.stdout and cpu_s < 0.4 and memory_mb < 80
    every = "; ".join(f"import kwslib.{module}" for module in modules())
    code = f"import sys; {every}; sys.exit('nbformat' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_what_is_offered_is_there_and_comes_when_it_is_touched():
    import kwslib

    for names in OFFERED.values():
        assert all(hasattr(kwslib, name) and name in dir(kwslib) for name in names.split())
    with pytest.raises(AttributeError, match="kwslib offers no 'experiment': there are .*Experiment"):
        _ = kwslib.experiment
    code = "import sys, kwslib; assert 'torch' not in sys.modules; kwslib.CRNNConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_public_functions_have_docstrings():
    missing = []
    for module, file in modules().items():
        tree = ast.parse(file.read_text())
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{module}.{node.name}")
    assert missing == []


@pytest.mark.parametrize("path", [*NOTEBOOKS, *APPENDICES], ids=lambda p: p.stem)
def test_notebook_is_stored_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in nodes)
    imported = {a.asname or a.name for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    assert not imported & {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*", cell.id) for cell in notebook.cells)
    parameters = ["corpus", "keyword", "split", "profile", "seeds"] + ["other"] * (
        path.stem == "augmentation_and_transfer"
    )
    assert list(papermill.inspect_notebook(str(path))) == parameters
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}


def test_the_six_notebooks_are_there():
    assert tuple(p.stem for p in NOTEBOOKS) == page.NOTEBOOKS


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


def test_nobody_is_told_to_install_a_stranger_s_package():
    """On PyPI the name of our folder is somebody else's project."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] != "kwslib"
    told = re.compile(rb"""pip install\s+(-\S+\s+)*['"\\]*kwslib\b""")
    assert told.search(b"pip install --user 'kwslib[mic]'") and not told.search(b"pip install -e '.[mic]'")
    names = [name for name in tracked() if name != "CHANGELOG.md" and name != "tests/test_repository.py"]
    assert [name for name in names if told.search((ROOT / name).read_bytes())] == []


def test_the_version_is_written_down_once():
    done = subprocess.run([sys.executable, "-m", "kwslib", "--version"], cwd=ROOT, capture_output=True, text=True)
    version = done.stdout.strip().removeprefix("kws ")
    assert version and done.returncode == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]  # taken from the package
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "kwslib.__version__"}
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_make_target_of_the_readme_exists():
    pages = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", pages, flags=re.MULTILINE))
    named = {first or second for first, second in named}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"reproduce", "test", "help"} <= named <= targets


def test_every_command_and_link_of_the_pages_works():
    for file in PAGES:
        text = file.read_text()
        for line in re.findall(r"^\.venv/bin/kws (.+)", text, flags=re.MULTILINE):
            _parser().parse_args(shlex.split(line, comments=True))
        assert not re.search(r"^kws ", text, flags=re.MULTILINE), file  # a shell does not find it
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert link.startswith("https://") or (file.parent / link).exists(), f"{file.name}: {link}"


def test_the_numbers_of_readme_and_results_equal_the_reference_records():
    reference = ROOT / "reports" / "reference"
    readme, results = ((ROOT / name).read_text() for name in page.FILLED)
    assert page.fill_readme(readme, reference) == readme and page.fill_readme(results, reference) == results
    assert re.findall(r"<!-- models: (\S+) -->", readme) == ["speech_commands_part-happy-speaker"]
    assert readme.index("| MACs per clip") < 5000 and len(readme.splitlines()) <= 80  # a screen or two
    found = records.load_folder(ROOT / "reports" / "reference" / "synthetic-sheila-speaker" / "records")
    assert f"{len({record['experiment'] for record in found})} experiments" in readme
    studies = re.findall(r"<!-- results: (\S+) -->", results)
    assert len(studies) == 2
    for study in studies:
        folder = ROOT / "reports" / "reference" / study
        if not folder.exists():  # not published yet: no number may stand there
            assert f"<!-- results: {study} -->\n<!-- end -->" in results
            continue
        table = records.results([records.read(f) for f in sorted((folder / "records").glob("*.json"))])
        assert len(table) == len((folder / "results.csv").read_text().splitlines()) - 1 > 0
        assert all((ROOT / "checkpoints" / "reference" / study / f"{e}-seed{s}.pt").exists()
                   for e, s in zip(table["experiment"], table["seed"], strict=True))  # fmt: skip


@pytest.mark.parametrize("folder", sorted((ROOT / "reports" / "reference").glob("*-*")), ids=lambda p: p.name)
def test_published_pages_are_what_their_records_say(folder):
    assert page.render(folder.name, folder) == (folder / "index.html").read_text()
    fresh = records.results(records.load_folder(folder / "records")).to_csv(index=False)
    assert fresh == (folder / "results.csv").read_text()


def test_the_figures_of_reproducing_are_those_that_were_measured():
    page = (ROOT / "REPRODUCING.md").read_text()
    assert prove.filled(page) == page
    assert set(re.findall(r"<!-- proof: (\w+) -->", page)) == set(prove.PARTS)
    faults = prove.read("faults")
    assert {case["outcome"] for case in faults["cases"]} <= {"passed", "skipped"}
    for case in faults["cases"]:
        assert f"def {case['test']}(" in next((ROOT / "tests").rglob(f"{case['file']}.py")).read_text()


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
        assert path.suffix not in {".wav", ".flac", ".mp3", ".npy", ".npz"} or name == "docs/sample.flac", name
        assert path.stat().st_size < (3_000_000 if path.suffix == ".html" else 2_000_000), name
        if path.suffix in {".json", ".ipynb", ".html", ".md", ".csv", ".svg", ".py", ".toml", ".yml", ".lock"}:
            content = path.read_bytes()
            assert b"data:audio" not in content or name.endswith("test_repository.py"), name
            if "notebooks" in path.parts and "reference" in path.parts and "synthetic" not in name:
                assert b"kws-player" not in content, name  # would play people
            assert not machine.search(content) or name.endswith("test_repository.py"), name


def test_code_is_clean():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
