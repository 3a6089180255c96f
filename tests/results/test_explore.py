"""The plot to explore: its JavaScript in an engine against Python, the page in a browser if there is one."""

import json
import math
import re

import browser
import pytest

from kwslib import paths
from kwslib.results import page, plots, records, tables

py_mini_racer = pytest.importorskip("py_mini_racer")
STUDY = "speech_commands_part-happy-speaker"
FOLDER = paths.ROOT / "reports" / "reference" / STUDY
CODE = (paths.ROOT / "kwslib" / "results" / "explore.js").read_text()
TECHNIQUES = ["distilled", "fewer bits", "other net", "plain", "pruned", "stream"]


@pytest.fixture(scope="module")
def study():
    found = records.load_folder(FOLDER / "records")
    return found, records.summary(found), records.stream_points(found)


@pytest.fixture(scope="module")
def engine(study):
    context = py_mini_racer.MiniRacer()
    data = json.dumps(tables.explored(*study, "home"), allow_nan=False)
    context.eval(f"{CODE}\nvar data = {data}, all = kwsExplore.rows(data);")
    return context


def ask(engine, script: str):
    return json.loads(engine.eval(f"JSON.stringify({script})"))


def test_the_front_is_that_of_python(study, engine):
    _, summary, _ = study
    clips = summary[summary["technique"] != "stream"]
    for cost, *_ in tables.COSTS:
        front = ask(
            engine,
            f"kwsExplore.pareto(kwsExplore.shown(all, {TECHNIQUES}, '{cost}', 'au_fa_fr'), '{cost}', 'au_fa_fr')",
        )
        assert front == records.pareto(clips, cost), cost
    few = [{"name": "a", "c": 1, "q": 5}, {"name": "b", "c": 2, "q": 6}, {"name": "d", "c": 3, "q": 1}]
    few += [{"name": "e", "c": 3, "q": 1}, {"name": "f", "c": 1, "q": 7}]
    assert ask(engine, f"kwsExplore.pareto({few}, 'c', 'q')") == ["a", "d"]


def test_what_is_shown_is_what_was_asked_for(study, engine):
    _, summary, points = study

    def shown(techniques, quality):
        rows = ask(engine, f"kwsExplore.shown(all, {techniques}, 'macs_per_clip', '{quality}')")
        return {row["name"] for row in rows}

    streams = set(points["experiment"])
    assert shown(TECHNIQUES, "au_fa_fr") == set(summary.index) - streams  # they are judged on streams alone
    assert shown(TECHNIQUES, "stream_miss") == shown(["stream"], "stream_miss") == streams
    assert shown(["pruned"], "au_fa_fr") == set(summary.index[summary["technique"] == "pruned"])
    assert shown([], "au_fa_fr") == shown(TECHNIQUES, "people_miss") == set()


def test_of_a_report_what_its_notes_name_is_shown(study, engine):
    _, summary, points = study
    asked = f"kwsExplore.shown(all, {TECHNIQUES}, 'macs_per_clip', 'au_fa_fr', 'C').map(row => row.name)"
    clips = summary.drop(index=set(points["experiment"]))
    assert set(ask(engine, asked)) == {name for name, note in clips["note"].items() if re.search("reports? C", note)}
    assert {"c1-kd", "c2-kd", "c1-prune-30", "baseline-int8"} <= set(ask(engine, asked))


def test_a_search_finds_words_wherever_they_stand(study, engine):
    def found(text):
        return set(ask(engine, f"all.filter(row => kwsExplore.matches(row, {text!r})).map(row => row.name)"))

    assert found("REPORT C6") == {"c1-prune-30", "c1-prune-30-int8"} and found("int8 C6") == {"c1-prune-30-int8"}
    assert found("act8 distilled") == set() != found("act8 bits")
    assert len(found("")) == len(found(" ")) == len(study[1]) and found("nothing like it") == set()


def test_ticks_are_round_and_inside(engine):
    assert ask(engine, "kwsExplore.ticks(4.2e4, 1.1e5)") == [5e4, 1e5]
    assert ask(engine, "kwsExplore.ticks(0.7, 1200)") == [1, 3, 10, 30, 100, 300, 1000]
    assert ask(engine, "kwsExplore.ticks(0.001, 1000)") == [10**n if n >= 0 else float(f"1e{n}") for n in range(-3, 4)]


def test_facts_are_those_of_the_summary(study, engine):
    _, summary, _ = study
    facts, of_stream = (
        dict(ask(engine, f"kwsExplore.facts(all.find(row => row.name === '{name}'), data)"))
        for name in ("a1-kd", "brook-stream")
    )
    row = summary.loc["a1-kd"]
    number = f"{1e5 * row['au_fa_fr']:.3g}"
    assert facts["AU-FA-FR of test clips, ×1e-5"].startswith(f"{number} (")
    assert facts["MACs per clip"] == f"{row['macs_per_clip']:,}"
    assert facts["AU-FA-FR gained over a1-labels, ×1e-5"].endswith("no clear difference")
    assert "missed in test streams, %" in of_stream and not any("gained" in label for label in of_stream)


def test_a_learning_curve_is_that_of_the_records_and_stands_at_its_places(study, engine):
    found, _, _ = study
    epochs, low, mean, high = ask(engine, "all.find(row => row.name === 'a1-kd').learned")
    histories = [r["history"]["val_au_fa_fr"] for r in found if r["experiment"] == "a1-kd"]
    assert len(histories) == 3 and (epochs[0], epochs[-1]) == (1, len(histories[0])) and len(epochs) == 20
    for i, epoch in enumerate(epochs):
        there = [1e5 * history[epoch - 1] for history in histories]
        assert (low[i], mean[i], high[i]) == pytest.approx((min(there), sum(there) / 3, max(there)), abs=0.0051)
    assert ask(engine, "all.find(row => row.name === 'a1-kd-int8').learned") is None  # nothing was trained

    drawn = engine.eval("kwsExplore.learning([[1, 11], [1, 0], [10, 1], [100, 1]])")
    (line,) = re.findall(r'd="M([^"Z]*)" fill="none"', drawn)
    (x, y), (to_x, to_y) = ([float(value) for value in point.split()] for point in line.split("L"))
    assert (x, to_x) == (40, 350)
    decades = math.log10(100 * 1.2 / (0.01 / 1.2))
    assert to_y - y == pytest.approx(120 / decades, abs=0.1)  # a tenth is one decade down; a 0 is a hundredth
    assert ">11<" in drawn and ">epoch<" in drawn and "NaN" not in drawn
    assert "NaN" not in engine.eval("kwsExplore.learning([[1], [0], [0], [0]])")


def test_looks_are_those_of_the_figures(engine):
    assert ask(engine, "kwsExplore.LOOKS") == {name: list(look) for name, look in plots.LOOKS.items()}


def test_the_page_holds_valid_data_once_and_stays_small(study):
    html = (FOLDER / "index.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="explored">(.*?)</script>', html, flags=re.DOTALL)
    given = json.loads(data)
    names = [row[0] for row in given["rows"]]
    assert len(set(names)) == len(names) == len(study[1]) and all(
        len(row) == len(given["columns"]) for row in given["rows"]
    )
    for row in given["rows"]:
        for file in row[-1]:
            assert (FOLDER / given["home"] / file).exists(), file
            assert (FOLDER / "records" / f"{file.rpartition('.')[0]}.json").exists()
    assert len(data) < 150_000 and len(CODE.encode()) <= 14_000 and len(html) < 3_000_000


def test_text_of_records_cannot_leave_its_place(study):
    found, summary, points = study
    text = "</script><script>alert(1)</script>"
    summary = summary.assign(note=text, control=text)
    from jinja2 import Environment

    written = Environment().from_string("{{ data | tojson }}").render(data=tables.explored(found, summary, points, "x"))
    assert "<" not in written and json.loads(written)["rows"][0][1] == text


def test_a_notebook_holds_the_same_plot_and_asks_for_nothing(study, monkeypatch):
    monkeypatch.setenv("KWS_HOME", str(paths.ROOT))
    shown = page.explorer(f"reference/{STUDY}").data
    (data,) = re.findall(r'<script type="application/json" id="explored">(.*?)</script>', shown, flags=re.DOTALL)
    assert json.loads(data) == json.loads(json.dumps(tables.explored(*study, "", "../records/")))
    assert CODE in shown and "http" not in shown and "src=" not in shown and len(shown) < 150_000


PRESSED = "new KeyboardEvent('keydown', {{ key: '{}', bubbles: true }})"
CHANGED = "s.dispatchEvent(new Event('input', { bubbles: true }))"
POINT = "document.querySelector('#explore g[data-name=\"{}\"]')"


def see(opened, script: str):
    """Do something in the page, and leave it a moment."""
    opened.run(f"void ({script})")


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_points_speak_and_open(study, tmp_path, width):
    technique = study[1]["technique"]
    clips, pruned = (technique != "stream").sum(), (technique == "pruned").sum()
    count = "document.querySelectorAll('#explore g').length"
    with browser.Page(FOLDER / "index.html", tmp_path / "profile", width=width) as opened:
        opened.until(f"{count} === {clips}")
        assert opened.run("document.documentElement.scrollWidth") <= width
        assert not opened.run("document.getElementById('drawn').open")  # the figures are for readers without this
        point = POINT.format("a1-kd")
        see(opened, f"{point}.dispatchEvent(new MouseEvent('mouseover', {{ bubbles: true }}))")
        opened.until("document.querySelector('#explore .tip').textContent.startsWith('a1-kd report A1AU-FA-FR')")
        assert opened.run(f"{point}.getAttribute('aria-label')").startswith("a1-kd; float32; AU-FA-FR of test clips")
        see(opened, "document.querySelector('#explore g[tabindex=\"0\"]').focus()")
        before = opened.run("document.activeElement.dataset.name")
        for key in ("ArrowLeft", "Enter"):
            see(opened, f"document.activeElement.dispatchEvent({PRESSED.format(key)})")
        opened.until("!document.querySelector('#explore .panel').hidden")
        title = "document.querySelector('#explore .panel h3').textContent"
        assert opened.run("document.querySelectorAll('#explore .panel svg.learned path').length") > 3
        assert before == "baseline" and opened.run(f"location.hash === '#experiment-' + {title}")
        see(opened, "document.querySelector('#explore .panel button').click()")
        opened.until("document.activeElement.matches('#explore g')")
        see(opened, "document.querySelector('td a[href=\"#experiment-baseline\"]').click()")  # of a table
        opened.until(f"{title} === 'baseline'")
        assert (
            opened.run("document.querySelectorAll('#explore .panel li a').length") == 6
        )  # three seeds, record and file
        see(
            opened,
            "document.querySelectorAll('#explore [type=checkbox]').forEach(b => b.value === 'pruned' || b.click())",
        )
        opened.until(f"{count} === {pruned}")
        see(opened, f"(s => {{ s.value = 'random'; {CHANGED} }})(document.querySelector('#explore [type=search]'))")
        opened.until("document.querySelectorAll('#explore g.dim').length > 5")
        assert opened.run("document.querySelector('#explore [role=status]').textContent").startswith(
            f"{pruned} of {len(technique)}"
        )
        for axis in ("report", "x", "y"):
            for i in range(opened.run(f"document.querySelector('[name={axis}]').options.length")):
                select = f"document.querySelector('[name={axis}]')"
                see(opened, f"(s => {{ s.selectedIndex = {i}; {CHANGED} }})({select})")
                assert not opened.run("document.querySelector('#explore svg').innerHTML.includes('NaN')")
        assert opened.errors == []


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_an_exported_notebook_it_works_without_a_kernel(study, tmp_path, width):
    clips = (study[1]["technique"] != "stream").sum()
    with browser.Page(FOLDER / "notebooks" / "06_plots.html", tmp_path / "profile", width=width) as opened:
        opened.until(f"document.querySelectorAll('#explore g').length === {clips}")
        see(opened, f"{POINT.format('a1-kd')}.dispatchEvent(new MouseEvent('click', {{ bubbles: true }}))")
        opened.until("document.querySelectorAll('#explore .panel svg.learned').length === 1")
        records_of = opened.run("[...document.querySelectorAll('#explore .panel li a')].map(a => a.href)")
        assert records_of == [(FOLDER / "records" / f"a1-kd-seed{seed}.json").as_uri() for seed in range(3)]
        assert opened.run("document.documentElement.scrollWidth") <= width
        mine = [error for error in opened.errors if "cdnjs" not in error and "Failed to load" not in error]
        assert mine == []  # nbconvert asks for MathJax


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_nobody_is_kept_out_of_the_page(tmp_path, width):
    """Of the rules of axe-core, which come of WCAG 2, none is broken, with an experiment open."""
    with browser.Page(FOLDER / "index.html", tmp_path / "profile", width=width) as opened:
        see(opened, "document.querySelector('td a[href=\"#experiment-baseline\"]').click()")
        opened.until("!document.querySelector('#explore .panel').hidden")
        assert opened.faults() == []
