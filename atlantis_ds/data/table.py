"""One example, the table of examples, and what "the same sentence" means."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import pyarrow as pa

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("sentence", pa.string(), nullable=False),
        pa.field("e1_start", pa.int32(), nullable=False),
        pa.field("e1_end", pa.int32(), nullable=False),
        pa.field("e2_start", pa.int32(), nullable=False),
        pa.field("e2_end", pa.int32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("gold", pa.string(), nullable=True),
        pa.field("split", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Example:
    """One sentence with two entities and a label.

    ``e1`` and ``e2`` are character spans in ``sentence``, end exclusive. ``label`` is what training sees and may be
    noisy or weak; ``gold`` is the true label where it is known. ``split`` is train, dev or test.
    """

    id: str
    sentence: str
    e1: tuple[int, int]
    e2: tuple[int, int]
    label: str
    gold: str | None
    split: str


def to_table(examples: list[Example]) -> pa.Table:
    """Examples as an Arrow table with ``SCHEMA``, one row each, in order."""
    rows = [(e.id, e.sentence, *e.e1, *e.e2, e.label, e.gold, e.split) for e in examples]
    columns = list(zip(*rows)) if rows else [()] * len(SCHEMA)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA)], schema=SCHEMA)


def from_table(table: pa.Table) -> list[Example]:
    """The examples of a table written by ``to_table``, in order."""
    columns = [table.column(name).to_pylist() for name in SCHEMA.names]
    return [
        Example(id, sentence, (e1_start, e1_end), (e2_start, e2_end), label, gold, split)
        for id, sentence, e1_start, e1_end, e2_start, e2_end, label, gold, split in zip(*columns)
    ]


def sentence_key(sentence: str) -> str:
    """A text that is equal for sentences that differ only in case, white space or spacing around punctuation.

    It says what "the same sentence" means for splits and folds: tokenised and plain forms of one sentence agree.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", sentence).casefold())
    return re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.split()))
