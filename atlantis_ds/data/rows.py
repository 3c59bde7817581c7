"""What every task reads from one row of a data file, and the errors of rows that cannot be read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from atlantis_ds.errors import InputError

GROUPS = "; "
"""Separator between the names of several groups that made one label."""
SHOWN = 10
"""Number of bad rows that an error shows; it counts the others."""

Problems = Callable[[str, str], None]
"""Called with (place, what is wrong) for each row that cannot be read."""


class BadRow(ValueError):
    """What is wrong with one row; the reader of the file adds the place.

    Args:
        at: the place of the fault, if it is not in the row's own line.
    """

    def __init__(self, what: str, at: str | None = None) -> None:
        super().__init__(what)
        self.at = at


@dataclass(frozen=True, slots=True)
class Found:
    """One example as read by its task, before the prompt is rendered."""

    where: str
    """The file and line, for messages."""
    id: str | int | None
    """None if the rows have no ids: ``number`` is used instead."""
    fields: dict[str, str]
    """The fields that a prompt template can use."""
    key: str | None
    """The text by which two examples are equal for splits and folds, see ``splits.text_key``; None means the fields
    that the prompt uses."""
    target: str | None
    """Label or response to train on; None if a weak labeller abstained."""
    gold: str | None
    group: str | None = None
    number: int = 0
    """Position of its row in the split, from 0."""
    label_at: str | None = None
    """The place of the label, if it is not in the row's own line."""


@dataclass
class BadRows:
    """The rows of one split that cannot be read: the first few, and a count of each kind."""

    drop: bool
    """Leave them out (``data.on_bad_row: drop``)."""
    first: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def __call__(self, where: str, what: str) -> None:
        self.kinds[re.sub(r"'[^']*'|\"[^\"]*\"|\[[^]]*\]|\d+|[;:(].*", "…", what).strip("… ")] += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{where}: {what}")

    @property
    def count(self) -> int:
        return self.kinds.total()

    def refuse(self) -> None:
        """Raise InputError, with the first rows and a count of each kind, if there are bad rows to refuse."""
        if not self.first or self.drop:
            return
        if self.count == 1:
            raise InputError(self.first[0])
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.kinds.most_common(5))
        more = [f"  {line}" for line in self.first[1:]]
        more += [f"  and {self.count - SHOWN} more"] if self.count > SHOWN else []
        raise InputError(
            "\n".join(
                [
                    f"{self.first[0]} ({self.count} rows cannot be read: {kinds}; correct them, or leave them out "
                    "with data.on_bad_row: drop)",
                    *more,
                ]
            )
        )


def whole_text(text: str) -> str:
    """JSON may cut an emoji in half, as in tweets; such a text cannot be written to any file."""
    if half := re.search("[\ud800-\udfff]", text):
        raise BadRow(f"half of a surrogate pair ({ascii(half[0])[1:-1]}) in {text[:40]!a}; correct the text")
    return text


def label_text(value: Any) -> str | None:
    """A label as text: whole numbers and true/false are written out; None for an empty one.

    Raises:
        BadRow: it is neither a text, a whole number nor true/false.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column with gaps, as in Parquet files from pandas
    if not isinstance(value, (str, int)):
        raise BadRow(f"the label is not a text or whole number: {value!r}")
    return whole_text(str(value).strip())
