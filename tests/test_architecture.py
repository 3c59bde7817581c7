"""The drawing and the table of docs/architecture.md are the imports that the code really has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "atlantis_ds"
DOCS = ROOT / "docs"
BESIDE = {("data", "demo"), ("demo", "data")}
"""The demo corpus is one of the sources that data/ reads, and is made of its rows."""


def imports() -> dict[tuple[str, str], str]:
    """(part, part it imports) → file and line of one such import; imports inside functions and for types count."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for node in (node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)):
            for other in (module.split(".")[1] for module in _modules(node)):
                if (part := _part(path)) != other and {part, other} <= PARTS:
                    found[part, other] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def _part(path: Path) -> str:
    """A folder or file directly in atlantis_ds/."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules below atlantis_ds that a statement imports from."""
    if isinstance(node, ast.Import):
        names = [name.name for name in node.names]
    elif node.module == "atlantis_ds":
        names = [f"atlantis_ds.{name.name}" for name in node.names]
    else:
        names = [node.module or ""]
    return [name for name in names if name.startswith("atlantis_ds.")]


PARTS = {_part(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
FOLDERS = {part for part in PARTS if (PACKAGE / part).is_dir()}


def rows_drawn() -> dict[str, int]:
    """Part → height in the drawing: larger is further down."""
    drawing = (DOCS / "architecture.svg").read_text(encoding="utf-8")
    return {name: int(y) for y, name in re.findall(r'class="part" x="\d+" y="(\d+)"[^>]*>(\w+)<', drawing)}


def test_every_part_is_drawn_once() -> None:
    drawing = (DOCS / "architecture.svg").read_text(encoding="utf-8")
    names = re.findall(r'class="part"[^>]*>(\w+)<', drawing)
    assert sorted(names) == sorted(PARTS), "docs/architecture.svg: add the new part to its row, or remove the old one"


def test_each_part_imports_from_rows_below_it_alone() -> None:
    row = rows_drawn()
    upwards = [f"{where}: {a} imports {b}" for (a, b), where in imports().items() if row[a] >= row[b]]
    beside = [f"{imports()[pair]}: {pair[0]} imports {pair[1]}" for pair in BESIDE]
    assert sorted(upwards) == sorted(beside)


def test_stages_stand_in_the_order_of_the_one_way_rule() -> None:
    row = rows_drawn()
    order = ["cli", "stages", "evaluate", "train", "weights", "lm", "data", "config"]
    assert order == sorted(order, key=row.__getitem__)


def test_table_names_the_imports_between_folders() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(\w+)/` \|.*\|([^|]*)\|$", page, re.M)
    told = {part: set(re.findall(r"\w+", others)) for part, others in lines}
    found: dict[str, set[str]] = {part: set() for part in FOLDERS}
    for part, other in imports():
        if {part, other} <= FOLDERS:
            found[part].add(other)
    assert told == found, "docs/architecture.md: the last column of the table"
