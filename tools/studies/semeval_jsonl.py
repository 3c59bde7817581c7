"""SemEval-2010 Task 8 as JSON lines for the studies: six of its relations, without direction, and their weak labels.

    python tools/studies/semeval_jsonl.py ../shared/data runs/semeval_data

Writes train.jsonl (gold labels), dev.jsonl (every tenth of the 8,000 training rows, kept apart), test.jsonl, and
weak.jsonl: the rows of train.jsonl that one of the hand-written patterns of semeval_weak covers, labelled by it, with
the patterns that fired as `group`. Rows of other relations, by gold or by weak label, are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from atlantis_ds.metrics import relation_of

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
    rows = read(source / "semeval2010_task8" / "TRAIN_FILE.TXT")
    test = read(source / "semeval2010_task8" / "TEST_FILE_FULL.TXT")
    dev = rows[::DEV_EVERY]
    train = [row for at, row in enumerate(rows) if at % DEV_EVERY]
    patterns = map(json.loads, (source / "semeval_weak" / "train.jsonl").read_text(encoding="utf-8").splitlines())
    weak = {str(row["id"]): (row["weak"], row["rules"]) for row in patterns if row["weak"] is not None}
    write(out / "train.jsonl", ((row, row["label"]) for row in train))
    write(out / "dev.jsonl", ((row, row["label"]) for row in dev))
    write(out / "test.jsonl", ((row, row["label"]) for row in test))
    write(out / "weak.jsonl", ((row, *weak[row["id"]]) for row in train if row["id"] in weak))


def read(path: Path) -> list[dict[str, str]]:
    """The records of an official file: id, label, and the sentence with signs around the marks of its entities."""
    records = (record.splitlines() for record in path.read_text(encoding="utf-8").split("\n\n") if record.strip())
    return [{"id": first.split("\t")[0], "sentence": signed(first), "label": label} for first, label, *_ in records]


def signed(line: str) -> str:
    """The sentence with the marks of the format, and around them signs for the model to read."""
    sentence = line.split("\t")[1].strip()[1:-1].strip()  # without its quote marks
    # Signs that stay in the sentence (Zhou and Chen 2022, "entity marker (punct)"): 4 tokens in place of 16.
    for name, sign in (("e1", "@"), ("e2", "#")):
        sentence = sentence.replace(f"<{name}>", f"{sign} <{name}>").replace(f"</{name}>", f"</{name}> {sign}")
    return sentence


def write(path: Path, rows: Iterable[tuple[Any, ...]]) -> None:
    """Each row with its label and, where it has them, the patterns that gave it."""
    with path.open("w", encoding="utf-8") as file:
        for row, label, *patterns in rows:
            labels = {"label": relation_of(label), "gold": relation_of(row["label"])}
            if set(labels.values()) <= set(RELATIONS):
                written = {"id": row["id"], "sentence": row["sentence"]} | labels
                written |= {"group": patterns[0]} if patterns else {}
                file.write(json.dumps(written, ensure_ascii=False) + "\n")
    print(path)


if __name__ == "__main__":
    main()
