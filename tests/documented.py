"""The Python code of docs/python.md, by the heading it stands under: what the page shows is what its tests run."""

from __future__ import annotations

import re
from typing import Any

from conftest import ROOT

PAGE = ROOT / "docs" / "python.md"


def blocks(heading: str) -> list[str]:
    """The blocks of Python under one heading, in order."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}
    return re.findall(r"^```python\n(.*?)^```$", sections[heading], flags=re.MULTILINE | re.DOTALL)


def run_blocks(code: list[str], names: dict[str, Any]) -> dict[str, Any]:
    """Run blocks one after another, with these names and those that earlier ones made."""
    for block in code:
        exec(compile(block, str(PAGE), "exec"), names)
    return names
