"""Files for the peers in the study of weak labels: what else could 200 gold sentences be used for, beside a reference?

    python tools/studies/weak_and_gold.py runs/semeval_weak_dev200 runs/semeval_data

Writes dev200.jsonl, the dev sentences of that run with their gold labels, and mixed.jsonl, its 900 training sentences
with their weak labels and the dev sentences in one file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq

run, data = map(Path, sys.argv[1:])
split = {
    (row["split"], row["id"])
    for row in pq.read_table(run / "examples" / "examples.parquet", columns=["id", "split"]).to_pylist()
}
lines: dict[str, list[str]] = {}
for name, file in (("train", "weak.jsonl"), ("dev", "dev.jsonl")):
    with (data / file).open(encoding="utf-8") as rows:
        lines[name] = [line for line in rows if (name, json.loads(line)["id"]) in split]
(data / "dev200.jsonl").write_text("".join(lines["dev"]), encoding="utf-8")
(data / "mixed.jsonl").write_text("".join(lines["train"] + lines["dev"]), encoding="utf-8")
