"""The report with a detector inside."""

import shutil

import nbformat
import pytest

from kwslib import paths
from kwslib.results import page
from kwslib.streaming import player

STUDY = "synthetic-sheila-speaker"
PUBLISHED = paths.ROOT / "reports" / "reference" / STUDY


@pytest.fixture
def folder(tmp_path):
    """A published study with few records."""
    (tmp_path / "records").mkdir()
    for file in sorted((PUBLISHED / "records").glob("b*-seed0.json")):
        shutil.copy(file, tmp_path / "records")
    shutil.copy(PUBLISHED / player.FILE, tmp_path)
    return tmp_path


def test_the_report_holds_its_detector_where_there_is_one(folder):
    listens = page.render(STUDY, folder)
    assert listens.count("kwsPlayer.all();") == 1 and player.kept(folder)["kws"] in listens
    assert ">Try it</h2>" in listens
    assert "not published" not in listens  # that is said of recordings of people
    (folder / player.FILE).write_text('{"name": 1}')
    with pytest.raises(ValueError, match="player.json is damaged: delete it"):
        page.render(STUDY, folder)
    (folder / player.FILE).unlink()
    assert "kwsPlayer" not in page.render(STUDY, folder)


def test_people_are_not_published(folder):
    def html(text):
        return nbformat.v4.new_output("display_data", {"text/html": text})

    shown = [html("<audio src=x>"), *[html('<div class="kws-player">')] * 3, html("<table>")]
    for synthetic, dropped in ((True, 3), (False, 4)):  # the first player of synthetic voices stays
        cell = nbformat.v4.new_code_cell(outputs=[html(output["data"]["text/html"]) for output in shown])
        page._drop_audio(nbformat.v4.new_notebook(cells=[cell]), synthetic)
        assert sum("no audio" in output["data"].get("text/plain", "") for output in cell.outputs) == dropped
