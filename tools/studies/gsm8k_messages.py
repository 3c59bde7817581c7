"""GSM8K as chats: python tools/studies/gsm8k_messages.py FOLDER OUT, with train.jsonl and test.jsonl in FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        with (source / f"{split}.jsonl").open(encoding="utf-8") as rows, (target / f"{split}.jsonl").open("w") as out:
            for row in map(json.loads, rows):
                turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
                out.write(json.dumps({"messages": turns}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
