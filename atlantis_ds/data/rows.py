"""What every task reads from one row of a data file, and what is wrong with a row that cannot be read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from atlantis_ds.errors import InputError

GROUPS = "; "
"""Between the names of several groups that made one label."""
SHOWN = 10
"""Bad rows that an error shows; it counts the others."""

Problems = Callable[[str, str], None]
"""Called with (place, what is wrong) for each row that cannot be read."""


class BadRow(ValueError):
    """What is wrong with one row; whoever reads the file adds where it stands.

    Args:
        at: the place of the fault, where it is not in the row's own line.
    """

    def __init__(self, what: str, at: str | None = None) -> None:
        super().__init__(what)
        self.at = at


@dataclass(frozen=True, slots=True)
class Found:
    """One example as its task reads it, before the prompt is rendered."""

    where: str
    """The file and line, for messages."""
    id: str | int | None
    """None where the rows have no ids: ``number`` takes its place."""
    fields: dict[str, str]
    """What a prompt template may name."""
    key: str | None
    """The text that makes two examples the same one for splits and folds, see ``splits.text_key``; None for the fields
    that the prompt names."""
    target: str | None
    """Label or response to train on; None where a weak labeller abstained."""
    gold: str | None
    group: str | None = None
    number: int = 0
    """Position of its row in the split, from 0."""
    label_at: str | None = None
    """Where the label stands, where it is not in the row's own line."""


@dataclass
class BadRows:
    """The rows of one split that cannot be read: the first few, and a count of each kind."""

    drop: bool
    """Go on without them (``data.on_bad_row: drop``)."""
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
        """Raises InputError, with the first rows and the count of each kind, where there are bad rows to refuse."""
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
                    f"{self.first[0]} ({self.count} rows cannot be read: {kinds}; mend them, or leave them out with "
                    "data.on_bad_row: drop)",
                    *more,
                ]
            )
        )


def whole_text(text: str) -> str:
    """JSON may cut an emoji in two, as tweets do; such a text can be written nowhere."""
    if half := re.search("[\ud800-\udfff]", text):
        raise BadRow(f"half of a surrogate pair ({ascii(half[0])[1:-1]}) in {text[:40]!a}; mend the text")
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
        value = int(value)  # a column with gaps, as Parquet files from pandas have them
    if not isinstance(value, (str, int)):
        raise BadRow(f"the label is not a text or whole number: {value!r}")
    return whole_text(str(value).strip())
