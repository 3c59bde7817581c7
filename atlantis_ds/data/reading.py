"""Turns rows of any source into examples of the recipe's task: the only module that knows all formats.

To add a format or task, write a reader that yields ``Found``, and call it here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from atlantis_ds.config.schema import Columns, Data, Recipe
from atlantis_ds.data.relation import read_semeval, read_spert, row_fields, semeval_row, spert_examples
from atlantis_ds.data.rows import GROUPS, BadRow, Found, Problems, label_text, whole_text
from atlantis_ds.data.sources import Row, expand, read_hub_rows, read_rows
from atlantis_ds.demo.grammar import DEV_SIZE, TEST_SIZE, TRAIN_SIZE, grammar_corpus
from atlantis_ds.errors import InputError

RESPONSES = ("response", "completion", "output", "answer")
"""Usual names of a response column, if the recipe names none."""
ABSTAIN = "-1"
"""Values that weak labellers write for "no label"."""


def read_split(recipe: Recipe, split: str, problems: Problems) -> Iterator[Found] | None:
    """The examples of one split, as in the source; None if the recipe names no such split.

    Raises:
        InputError: a file is missing or cannot be read at all; a column that the recipe names does not exist.
    """
    data = recipe.data
    if data.format == "grammar":
        return _grammar(recipe, split)
    if data.hub_id:
        rows = read_hub_rows(data.hub_id, split, problems)
        return None if rows is None else _of_rows(recipe, split, rows, problems)
    paths = getattr(data, split)
    if paths is None:
        return None
    files = expand(paths, f"data.{split}")
    if data.format == "semeval2010_task8":
        return (found for file in files for found in read_semeval(file, problems))
    if data.format == "spert":
        return (f for file in files for f in read_spert(file, split, data.negatives, recipe.seed, problems))
    return _of_rows(recipe, split, read_rows(files, problems), problems)


def first_examples(recipe: Recipe, split: str, count: int = 3) -> list[Found]:
    """The first few examples of a split, for ``check``; empty if there is no such split.

    Raises:
        InputError: as in ``read_split``, or one of them cannot be read and such rows should not be dropped.
    """

    def refuse(where: str, what: str) -> None:
        if recipe.data.on_bad_row == "refuse":
            raise InputError(f"{where}: {what}")

    return list(islice(read_split(recipe, split, refuse) or (), count))


def read_new_rows(recipe: Recipe, paths: str) -> Iterator[tuple[Row, Found]]:
    """Rows to predict, which need no label or response, each with its example; for relations, rows with marked
    entities.

    Raises:
        InputError: a file is missing, or a row cannot be read.
    """

    def refuse(where: str, what: str) -> None:
        raise InputError(f"{where}: {what}")

    for row in read_rows(expand(paths, "FILE"), refuse):
        try:
            yield row, _labelled(recipe, row) if recipe.task != "response" else _asked(recipe.data, row)
        except BadRow as problem:
            refuse(row.where, str(problem))


def _asked(data: Data, row: Row) -> Found:
    """A prompt without a response: all columns, or a chat whose last turn is not the assistant's."""
    columns, values = data.columns, row.values
    id = row_id(columns, values)
    messages, response = response_columns(columns, values)
    if messages:
        turns = whole_turns(values.get(messages))
        if not turns or turns[-1]["role"] == "assistant":
            raise BadRow("the chat is empty or ends with an assistant turn: there is nothing to answer")
        prompt = json.dumps(turns, ensure_ascii=False)
        return Found(row.where, id, {"messages": prompt}, prompt, None, None, number=row.number)
    fields = _text_fields(columns, values, skip=(response,) if response else ())
    return Found(row.where, id, fields, None, None, None, number=row.number)


def _grammar(recipe: Recipe, split: str) -> Iterator[Found]:
    data = recipe.data
    sizes = data.train_size or TRAIN_SIZE, data.dev_size or DEV_SIZE, data.test_size or TEST_SIZE
    for row in grammar_corpus(*sizes, recipe.seed):
        if row.split == split:
            yield Found(f"grammar {row.id}", row.id, row.fields, row.sentence, row.label, row.label)


def _of_rows(recipe: Recipe, split: str, rows: Iterator[Row], problems: Problems) -> Iterator[Found]:
    data, first = recipe.data, True
    for row in rows:
        if first and data.format is None:
            _refuse_missing_columns(recipe, row, split)
        first = False
        try:
            if data.format == "spert":
                id = f"conll04-{split}-{row.values.get('orig_id', row.number)}"
                yield from spert_examples(row.values, row.where, id, data.negatives, recipe.seed)
            elif data.format == "semeval2010_task8":
                fields, sentence, label = semeval_row(row.values)
                yield Found(row.where, f"semeval-{split}-{row.number}", fields, sentence, label, label)
            elif recipe.task == "response":
                yield _response(data, row)
            else:
                yield _labelled(recipe, row)
        except BadRow as problem:
            problems(row.where, str(problem))


def _refuse_missing_columns(recipe: Recipe, row: Row, split: str) -> None:
    """Check that the columns named by the recipe exist, and at least one label or response column.

    A split may lack columns that another split has: often only test rows have gold labels, and only train rows have a
    group. Rows outside train need no weak label or response if they have a gold one.
    """
    columns, there = recipe.data.columns, row.values
    gold = split != "train" and columns.gold in there
    for key in sorted(columns.model_fields_set):
        needed = key not in ("gold", "group", "label") or (key != "gold" and split == "train")
        if needed and not (gold and key == "response") and getattr(columns, key) not in there:
            raise _no_column(row, key, getattr(columns, key))
    if "gold" in columns.model_fields_set and split == "test" and columns.gold not in there:
        raise _no_column(row, "gold", columns.gold)
    if recipe.task == "response":
        if response_columns(columns, there) == (None, None) and not gold:
            raise InputError(
                f"{row.where}: no column for the response; set it with data.columns.response (the row has "
                f"{', '.join(there)})"
            )
        return
    labels = {columns.label} | ({"relation"} if recipe.task == "relation" else set())
    if not gold and not labels & there.keys():
        raise _no_column(row, "label", columns.label)


def _no_column(row: Row, key: str, column: str) -> InputError:
    known = ", ".join(row.values)
    return InputError(f"{row.where}: data.columns.{key}: no column {column!r}; the row has {known}")


def _labelled(recipe: Recipe, row: Row) -> Found:
    """A row of a relation or classification task."""
    columns, values = recipe.data.columns, row.values
    key: str | None
    if recipe.task == "relation":
        fields, key = row_fields(values)
        fields = {**_text_fields(columns, values, skip=("tokens", "token", "e1", "e2", "h", "t")), **fields}
    else:
        fields, key = _text_fields(columns, values), None
    known = recipe.data.labels or []
    target, gold = (
        None if label == ABSTAIN and ABSTAIN not in known else label
        for label in (label_text(values.get(label_column(recipe, values))), label_text(values.get(columns.gold)))
    )
    return Found(row.where, row_id(columns, values), fields, key, target, gold, _group(columns, values), row.number)


def label_column(recipe: Recipe, values: dict[str, Any]) -> str:
    """The column with the label; for relations also ``relation``, if there is no other."""
    label = recipe.data.columns.label
    return "relation" if recipe.task == "relation" and label not in values and "relation" in values else label


def _response(data: Data, row: Row) -> Found:
    columns, values = data.columns, row.values
    id, group = row_id(columns, values), _group(columns, values)
    messages, response = response_columns(columns, values)
    if messages:
        prompt, target = split_turns(values.get(messages), data.train_on)
        fields, key = {"messages": prompt}, prompt
        gold = values.get(columns.gold)
        if gold is not None:
            turn = {"role": "assistant", "content": _some_text(gold, columns.gold)}
            gold = json.dumps([*json.loads(target)[:-1], turn], ensure_ascii=False)
        return Found(row.where, id, fields, key, target, gold, group, row.number)
    fields = _text_fields(columns, values, skip=(response,) if response else ())
    said, true = (
        _some_text(values[name], name) if name and values.get(name) is not None else None
        for name in (response, columns.gold)
    )
    return Found(row.where, id, fields, None, said, true, group, row.number)


def response_columns(columns: Columns, values: dict[str, Any]) -> tuple[str | None, str | None]:
    """The column with a chat, and the column with the response: at most one of them."""
    if messages := columns.messages or ("messages" if "messages" in values and not columns.response else None):
        return messages, None
    return None, columns.response or next((name for name in RESPONSES if name in values), None)


def split_turns(messages: Any, train_on: str) -> tuple[str, str]:
    """A chat in two parts: the context and what is learned, as JSON lists of turns.

    ``last``: learns the last assistant turn. ``all``: learns from the first assistant turn on; the turns of others in
    between are context. Turns after the last assistant turn are left out.

    Raises:
        BadRow: it is not a list of {role, content} turns, has no assistant turn, or has nothing before it.
    """
    turns = whole_turns(messages)
    spoken = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not spoken:
        raise BadRow("no assistant turn to learn")
    cut = spoken[-1] if train_on == "last" else spoken[0]
    if not cut:
        raise BadRow("the chat begins with an assistant turn: there is no context before it")
    if any(not turns[at]["content"].strip() for at in spoken if at >= cut):
        raise BadRow("an assistant turn is empty")
    before, learned = turns[:cut], turns[cut : spoken[-1] + 1]
    return json.dumps(before, ensure_ascii=False), json.dumps(learned, ensure_ascii=False)


def whole_turns(messages: Any) -> list[dict[str, str]]:
    """The turns of a chat, only role and content. Raises BadRow: it is not a list of such turns."""
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        raise BadRow("the messages are not a list of {role, content} turns with text")
    return [{"role": turn["role"], "content": whole_text(turn["content"])} for turn in messages]


def _text_fields(columns: Columns, values: dict[str, Any], skip: tuple[str, ...] = ()) -> dict[str, str]:
    """Every column without a special meaning, as text; an empty cell is the empty string."""
    taken = {columns.id, columns.label, columns.gold, columns.group, columns.response, columns.messages, *skip}
    return {
        name: whole_text(value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str))
        for name, value in values.items()
        if name not in taken
    }


def _some_text(value: Any, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"`{column}` is empty or not a text")
    return whole_text(value)


def row_id(columns: Columns, values: dict[str, Any]) -> str | int | None:
    """The id of a row; None if the rows have none. Raises BadRow: it is empty, or neither text nor whole number."""
    id = values.get(columns.id)
    if id is None and columns.id not in values:
        return None
    if type(id) not in (int, str) or not str(id).strip():
        raise BadRow(f"`{columns.id}` is missing or not a text or whole number")
    return whole_text(id) if isinstance(id, str) else id


def _group(columns: Columns, values: dict[str, Any]) -> str | None:
    """The names of the groups that made a label, each once; a list may be padded with null."""
    group = values.get(columns.group)
    given = group.split(GROUPS) if isinstance(group, str) else group if isinstance(group, list) else [group]
    names = dict.fromkeys(str(name).strip() for name in given if name is not None and name == name)  # or NaN
    return whole_text(GROUPS.join(filter(None, names))) or None
