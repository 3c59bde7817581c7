"""SemEval-2010 Task 8 as JSON lines for the studies: six of its relations, without direction, and their weak labels.

    python tools/studies/semeval_jsonl.py ../shared/data runs/semeval_data

Writes train.jsonl (gold labels), dev.jsonl (every tenth of the 8,000 training rows, kept apart), test.jsonl, and
weak.jsonl: the rows of train.jsonl that one of the hand-written patterns of semeval_weak covers, labelled by it. Rows
of other relations, by gold or by weak label, are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from atlantis_ds.data.formats import read_semeval
from atlantis_ds.data.table import Example
from atlantis_ds.evaluate.metrics import relation_of

RELATIONS = (
    "Cause-Effect",
    "Component-Whole",
    "Content-Container",
    "Entity-Destination",
    "Entity-Origin",
    "Member-Collection",
)
"""Those that the patterns label more than a hundred times each; all ten are too many for a model of 135M parameters."""
DEV_EVERY = 10
"""Not the last rows, which hold hardly any Member-Collection: 9 among 900."""


def main() -> None:
    source, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    rows = read_semeval(source / "semeval2010_task8" / "TRAIN_FILE.TXT", "train")
    test = read_semeval(source / "semeval2010_task8" / "TEST_FILE_FULL.TXT", "test")
    dev = rows[::DEV_EVERY]
    train = [row for at, row in enumerate(rows) if at % DEV_EVERY]
    patterns = map(json.loads, (source / "semeval_weak" / "train.jsonl").read_text(encoding="utf-8").splitlines())
    weak = {str(row["id"]): row["weak"] for row in patterns if row["weak"] is not None}
    write(out / "train.jsonl", ((example, example.label) for example in train))
    write(out / "dev.jsonl", ((example, example.label) for example in dev))
    write(out / "test.jsonl", ((example, example.label) for example in test))
    write(out / "weak.jsonl", ((example, weak[example.id]) for example in train if example.id in weak))


def write(path: Path, rows: Iterable[tuple[Example, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for example, label in rows:
            row = {"label": relation_of(label), "gold": relation_of(example.label)}
            if set(row.values()) <= set(RELATIONS):
                row = {"id": example.id, "sentence": marked(example)} | row
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(path)


def marked(example: Example) -> str:
    """The sentence with the marks of the format, and around them signs for the model to read."""
    text, (a, b), (c, d) = example.sentence, example.e1, example.e2
    # Signs that stay in the sentence (Zhou and Chen 2022, "entity marker (punct)"): 4 tokens in place of 16.
    for (start, end), name, sign in sorted([((a, b), "e1", "@"), ((c, d), "e2", "#")], reverse=True):
        text = f"{text[:start]}{sign} <{name}>{text[start:end]}</{name}> {sign}{text[end:]}"
    return text


if __name__ == "__main__":
    main()
