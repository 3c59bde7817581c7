"""The events of a run, in order: ``log.jsonl``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


def append_log(path: Path, **event: Any) -> None:
    """Append one event to ``log.jsonl``, with the time in seconds since the epoch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")
