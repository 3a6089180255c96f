"""``notebooks/recipes.md``: every recipe of the studies, where it is written and what it asks.

``python tests/recipes.py`` writes it anew from the published records and the notebooks; a test compares.
"""

import ast
import json
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "notebooks" / "recipes.md"
RECORDS = ROOT / "reports" / "reference" / "synthetic-sheila-speaker" / "records"


def written_in(notebook: Path) -> tuple[set[str], list[re.Pattern]]:
    """Texts of a notebook's code, and patterns of its texts with gaps: recipes are named by one or the other."""
    source = "\n".join(c.source for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code")
    texts, patterns = set(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in node.values]
            patterns.append(re.compile("".join(parts)))
    return texts, patterns


def found() -> str:
    """The page."""
    records = [json.loads(file.read_text()) for file in sorted(RECORDS.glob("*-seed0.json"))]
    books = {file.stem: written_in(file) for file in sorted((ROOT / "notebooks").glob("0*.ipynb"))}
    where = "Each is written in the notebook that asks its question, in the cell that runs it: change it there."
    lines = ["# All recipes", "", f"The {len(records)} experiments of a study. {where}", ""]
    of_book: dict[str, list[dict]] = {book: [] for book in books}
    for record in sorted(records, key=lambda r: r["order"]):
        name = record["experiment"]
        exact = [book for book, (texts, _) in books.items() if name in texts]
        like = [book for book, (_, patterns) in books.items() if any(p.fullmatch(name) for p in patterns)]
        noted = [book for book in like if record["note"] in books[book][0]]  # several notebooks have a "...-labels"
        of_book[(exact or noted or like)[0]].append(record)
    for book, its in of_book.items():
        if its:
            lines += [f"## [{book}]({book}.ipynb): {len(its)}", ""]
            lines += ["| recipe | starts from | teacher | compared with | what |", "|---|---|---|---|---|"]
            for record in its:
                recipe = record["recipe"]
                start = recipe["start"] or recipe["student"]["class"].removesuffix("Config")
                teachers = recipe["teacher"] or ""
                teachers = teachers if isinstance(teachers, str) else " + ".join(teachers)
                row = record["experiment"], start, teachers, record["control"] or "", record["note"]
                lines.append("| " + " | ".join(row) + " |")
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(found())
