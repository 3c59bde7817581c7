"""Files for the peers in the study of weak labels: what else could 200 gold sentences be used for, beside a reference?

    python tools/studies/weak_and_gold.py runs/semeval_weak_dev200 runs/semeval_data

Writes dev200.jsonl, the dev sentences of that run with their gold labels, and mixed.jsonl, its 900 training sentences
with their weak labels and the dev sentences (`gold-` before their ids) in one file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa

run, data = map(Path, sys.argv[1:])
lines: dict[str, list[dict[str, str]]] = {}
for name, file in (("train", "weak.jsonl"), ("dev", "dev.jsonl")):
    with pa.ipc.open_file(run / "examples" / f"{name}.arrow") as examples:
        ids = set(examples.read_all()["id"].to_pylist())
    with (data / file).open(encoding="utf-8") as text:
        lines[name] = [line for line in map(json.loads, text) if line["id"] in ids]
gold = [line | {"id": f"gold-{line['id']}"} for line in lines["dev"]]
for file, rows in (("dev200.jsonl", lines["dev"]), ("mixed.jsonl", lines["train"] + gold)):
    (data / file).write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
