"""The house as the code is: its rooms in their order, who imports whom, and a picture of it.

``python tests/house.py`` draws ``docs/architecture.svg`` anew; a test compares.
"""

import ast
import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ROOT / "kwslib"
PICTURE = ROOT / "docs" / "architecture.svg"


def listed(docstring: str) -> list[str]:
    """The names at the beginning of a docstring's lines: what a package holds, in reading order."""
    return re.findall(r"^``(\w+)``  ", docstring, flags=re.MULTILINE)


def docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text()))


ROOMS = {"ground": listed(docstring(CODE / "__init__.py").partition("above it")[0])}
ROOMS |= {room: listed(docstring(CODE / room / "__init__.py"))
          for room in [*listed(docstring(CODE / "__init__.py").partition("above it")[2]), "cli"]}  # fmt: skip
PLACE = {("" if room == "ground" else f"{room}.") + name: (floor, i)
         for floor, (room, names) in enumerate(ROOMS.items()) for i, name in enumerate(names)}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its name in it, ``training.loop`` for example; packages themselves left out."""
    files = [file for file in sorted(CODE.rglob("*.py")) if not file.name.startswith("__")]
    return {".".join(file.relative_to(CODE).with_suffix("").parts): file for file in files}


def imports(file: Path) -> set[str]:
    """The modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kwslib":
            package = node.module.partition(".")[2]
            names = {f"{package}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name if name in PLACE else package for name in names}
    return found - {"", "cli"}  # offered by an ``__init__``


def room_of(module: str) -> str:
    return module.partition(".")[0] if "." in module else "ground"


def drawn() -> str:
    """The picture: a floor for each room, the ground below, its files from left to right, and what it builds on."""
    said = {"ground": "sizes, places, metrics, recordings, processes", "cli": "the same in a shell"}
    lines = docstring(CODE / "__init__.py").splitlines()
    said |= {m[1]: m[2] for m in (re.match(r"``(\w+)``\s+(.+)", line) for line in lines) if m and m[1] in ROOMS}
    width, high, rows = 980, 74, []
    for floor, (room, names) in enumerate(ROOMS.items()):
        y = 10 + (len(ROOMS) - 1 - floor) * (high + 8)
        own = [file for module, file in modules().items() if room_of(module) == room]
        below = {room_of(other) for file in own for other in imports(file)} - {room}
        on = ", ".join(name for name in ROOMS if name in below) or "nothing"
        rows.append(
            f'<rect x="10" y="{y}" width="{width - 20}" height="{high}" rx="6" fill="#f4f1ea" stroke="#b9b2a3"/>'
        )
        rows.append(f'<text x="22" y="{y + 20}" font-weight="bold">{room}</text>')
        rows.append(f'<text x="110" y="{y + 20}" fill="#555">{escape(said[room])}</text>')
        rows.append(f'<text x="{width - 22}" y="{y + 20}" fill="#777" text-anchor="end">builds on {on}</text>')
        for i, name in enumerate(names):
            x = 22 + i * 134
            rows.append(f'<rect x="{x}" y="{y + 32}" width="126" height="30" rx="4" fill="#fff" stroke="#7d8fa3"/>')
            rows.append(f'<text x="{x + 63}" y="{y + 52}" text-anchor="middle">{name}</text>')
    height = 12 + len(ROOMS) * (high + 8)
    look = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13"'
    paper = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {look}>', paper, *rows, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(drawn())
