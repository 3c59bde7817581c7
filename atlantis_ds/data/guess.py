"""For a first recipe: guesses the columns of a data file from its rows, and asks if the rows are not clear."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from atlantis_ds.config.schema import Task
from atlantis_ds.data.prompts import TEXTS, refuse_odd_names
from atlantis_ds.data.reading import ABSTAIN, RESPONSES
from atlantis_ds.data.rows import BadRow, label_text
from atlantis_ds.data.sources import read_rows
from atlantis_ds.errors import InputError

ROWS = 5000
"""Number of rows to inspect."""
LABELS = (
    "label",
    "labels",
    "weak",
    "weak_label",
    "noisy_label",
    "relation",
    "class",
    "category",
    "intent",
    "sentiment",
)
GOLDS = ("gold", "gold_label", "true_label", "truth")
GROUPS = ("group", "rule", "rules", "source", "annotator", "worker")
IDS = ("id", "idx", "uid", "guid")
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question", "context"), ("text_a", "text_b"))
MOST_LABELS = 200
LONGEST_LABEL = 60
"""Mean number of characters; longer values are texts."""

Ask = Callable[[str, str, list[str]], str]
"""Called with an option, a question and the possible answers; returns one of the answers."""


@dataclass(frozen=True)
class Column:
    """What the first rows contain in one column."""

    name: str
    filled: int
    """Rows in which it is not empty."""
    distinct: int
    is_text: bool
    can_be_label: bool
    length: float
    """Mean number of characters."""


@dataclass
class Guess:
    """What a data file contains, for a recipe."""

    task: Task
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    """The values for ``data.columns``: label, gold, response, messages, group, id."""
    template: str | None = None
    notes: list[str] = field(default_factory=list)
    """What was guessed, as sentences."""


def guess(path: Path, task: Task | None, given: dict[str, str], texts: list[str], ask: Ask) -> Guess:
    """What the rows of a data file contain, for its recipe.

    Args:
        path: JSON Lines, JSON, CSV, TSV, Parquet, Arrow; the official SemEval file, or SpERT's JSON.
        task: if known.
        given: known columns: label, gold, response, messages, group, id.
        texts: the columns of the prompt, if known.
        ask: called if the rows are not clear.

    Raises:
        InputError: the file cannot be read, has no rows, or lacks a given column.
    """
    if path.suffix.lower() == ".txt" and re.match(r'\d+\t"', _first_line(path)):
        return Guess("relation", "semeval2010_task8", notes=["the official format of SemEval-2010 Task 8"])
    rows = _first_rows(path)
    if {"tokens", "entities", "relations"} <= rows[0].keys():
        return Guess("relation", "spert", notes=["SpERT's format: tokens, entities, relations"])
    columns = _columns(rows)
    for key, name in [*given.items(), *(("text", name) for name in texts)]:
        if name not in columns:
            raise InputError(f"--{key} {name}: {path} has no such column; it has {', '.join(columns)}")
    _refuse_two_meanings(given, texts)
    found = Guess(task or _task(rows, columns, given))
    if (other := "label" if found.task == "response" else "response") in given:
        raise InputError(f"--{other} {given[other]}: not for task {found.task}; leave it out, or give another --task")
    if not task:
        found.notes.append(f"task: {found.task}")
    _name_usual(found, columns, given, {"id": IDS, "gold": GOLDS, "group": GROUPS})
    if found.task == "response":
        _response(found, rows, columns, given, ask)
    else:
        _label(found, columns, given, ask)
        _tell_abstentions(found, rows)
    _template(path, found, columns, texts, ask)
    return found


def _refuse_two_meanings(given: dict[str, str], texts: list[str]) -> None:
    seen: dict[str, str] = {}
    for key, name in [*given.items(), *(("text", name) for name in texts)]:
        if name in seen:
            raise InputError(f"--{key} {name}: given as --{seen[name]}, too; a column has one meaning")
        seen[name] = key


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.readline()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _first_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")

    def refuse(where: str, what: str) -> None:
        raise InputError(f"{where}: {what}; correct the row, or remove it")

    rows = [row.values for row in islice(read_rows([path], refuse), ROWS)]
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def _columns(rows: list[dict[str, Any]]) -> dict[str, Column]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _column(name, [row[name] for row in rows if row.get(name) not in (None, "")]) for name in names}


def _column(name: str, values: list[Any]) -> Column:
    try:
        labels = [label_text(value) for value in values]
    except BadRow:
        labels = []
    texts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values]
    distinct = len(set(texts))
    length = sum(map(len, texts)) / max(len(texts), 1)
    few = 2 <= distinct <= min(MOST_LABELS, len(values) / 2) and length <= LONGEST_LABEL
    is_text = bool(values) and all(isinstance(value, str) for value in values)
    return Column(name, len(values), distinct, is_text, bool(labels) and few, length)


def _task(rows: list[dict[str, Any]], columns: dict[str, Column], given: dict[str, str]) -> Task:
    if given.keys() & {"response", "messages"} or ("label" not in given and isinstance(rows[0].get("messages"), list)):
        return "response"
    if {"e1", "e2"} <= columns.keys() or {"h", "t"} <= columns.keys():
        return "relation"
    if any("<e1>" in str(rows[0].get(name, "")) for name in ("sentence", "text")):
        return "relation"
    named = any(name in columns for name in LABELS)
    if "label" not in given and not named and any(_free(columns.get(name)) for name in RESPONSES):
        return "response"
    return "classification"


def _free(column: Column | None) -> bool:
    """Whether a column contains free text rather than labels."""
    return column is not None and column.is_text and not column.can_be_label


def _name_usual(
    found: Guess, columns: dict[str, Column], given: dict[str, str], usual: dict[str, tuple[str, ...]]
) -> None:
    for key, names in usual.items():
        name = given.get(key) or next((name for name in names if name in columns), None)
        if name is None or (name in given.values() and given.get(key) != name):
            continue
        if key == "id" and columns[name].distinct < columns[name].filled:
            continue
        found.columns[key] = name
        if key not in given:
            found.notes.append(f"column `{name}`: {key}")


def _label(found: Guess, columns: dict[str, Column], given: dict[str, str], ask: Ask) -> None:
    name = given.get("label")
    if name is None:
        taken = set(found.columns.values()) | set(given.values())
        known = [label for label in LABELS if label in columns and label not in taken]
        likely = known or [c.name for c in columns.values() if c.can_be_label and c.name not in taken]
        name = likely[0] if len(likely) == 1 or known else None
        name = name or ask("label", "Which column contains the label to train on?", likely or list(columns))
        found.notes.append(f"column `{name}`: label, {columns[name].distinct} different values")
    found.columns["label"] = name
    if columns[name].distinct < 2 and columns[name].filled < ROWS:  # a large file may be sorted by label
        found_in_rows = "no label" if not columns[name].filled else "one label alone"
        raise InputError(f"--label {name}: {found_in_rows} in the first rows; name another column, or give more rows")
    if columns[name].distinct > MOST_LABELS:
        raise InputError(
            f"--label {name}: {columns[name].distinct} different values in {columns[name].filled} rows are not a "
            "label set; name another column, or use --task response"
        )


def _tell_abstentions(found: Guess, rows: list[dict[str, Any]]) -> None:
    """In weak labels, -1 is no label; in others, such as -1, 0, 1, it is a class."""
    name = found.columns["label"]
    if count := sum(row.get(name) in (-1, ABSTAIN) for row in rows):
        found.notes.append(
            f"column `{name}`: -1, in {count} of {len(rows)} rows, counts as no label; if it is a class, list all "
            "labels in data.labels, such as ['-1', '0', '1']"
        )


def _response(
    found: Guess, rows: list[dict[str, Any]], columns: dict[str, Column], given: dict[str, str], ask: Ask
) -> None:
    if "messages" in given or ("response" not in given and isinstance(rows[0].get("messages"), list)):
        found.columns["messages"] = given.get("messages", "messages")
        return
    name = given.get("response") or next((name for name in RESPONSES if name in columns), None)
    if name is None:
        free = [column.name for column in columns.values() if _free(column)]
        name = ask("response", "Which column contains the response to learn?", free or list(columns))
    found.columns["response"] = name
    if "response" not in given:
        found.notes.append(f"column `{name}`: response")


def _template(path: Path, found: Guess, columns: dict[str, Column], texts: list[str], ask: Ask) -> None:
    """The prompt, written out so that it can be edited; relations and chats keep their own."""
    if found.task == "relation" or "messages" in found.columns:
        return
    if not texts:
        texts = _texts(found, columns, ask)
        found.notes.append(f"prompt: {', '.join(f'`{name}`' for name in texts)}")
    try:
        refuse_odd_names(texts)
    except BadRow as problem:
        raise InputError(f"{path}: {problem}; is its first line a header?") from None
    if found.task == "response":
        found.template = "\n".join(f"{{{name}}}" for name in texts)
        return
    several = len(texts) > 1
    body = "\n".join(f"{name}: {{{name}}}" if several else f"{{{name}}}" for name in texts)
    found.template = f"Which label fits: {{options}}?\n{body}"


def _texts(found: Guess, columns: dict[str, Column], ask: Ask) -> list[str]:
    """The columns of the prompt: those with a usual name, or the only one with free text."""
    left = [column for column in columns.values() if column.name not in found.columns.values()]
    free = [column.name for column in left if _free(column)]
    if found.task == "response" and "instruction" in free:
        return ["instruction", *(["input"] if "input" in columns else [])]
    for pair in PAIRS:
        if set(pair) <= set(free):
            return list(pair)
    usual = [name for name in TEXTS if name in free]
    if usual or len(free) == 1:
        return [(usual or free)[0]]
    return [ask("text", "Which column contains the text?", free or [column.name for column in left])]
