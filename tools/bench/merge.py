"""Time and memory of `merge` on generated score shards: 10 million examples by default.

    python tools/bench/merge.py [EXAMPLES [SHARD_SIZE]]

Writes examples and shards of a run with the label set of SemEval-2010 Task 8 into a temporary folder ($TMPDIR), then
runs `atlantis-ds merge` on it as a user would, and prints one line of JSON.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from atlantis_ds.config.loading import load_recipe
from atlantis_ds.data.formats import SEMEVAL_LABELS
from atlantis_ds.data.table import SCHEMA
from atlantis_ds.files import write_json, write_table
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.merge import shard_schema
from atlantis_ds.weights.score import scoring_inputs, shard_path

RECIPE = {
    "name": "run",
    "data": {"format": "grammar"},
    "models": {"large": {"model_name_or_path": "large"}, "small": {"model_name_or_path": "small"}},
    "score": {"label_set": False},
    "weights": {"formula": "product", "scope": "per_label", "temper": 0.5},
}


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 16384
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        path = root / "recipe.yaml"
        path.write_text(
            yaml.safe_dump({**RECIPE, "runs_dir": temporary, "score": {"label_set": False, "shard_size": size}})
        )
        folder = RunFolder(root / "run")
        generate(path, folder, n, size)
        start = time.monotonic()
        words = [sys.executable, "-m", "atlantis_ds", "merge", str(path)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        found = {"examples": n, "shards": math.ceil(n / size), "seconds": round(seconds, 1), "peak_gib": round(peak, 2)}
        print(json.dumps(found))


def generate(path: Path, folder: RunFolder, n: int, size: int) -> None:
    """Examples, and scores between -30 and 0 for labels of 4 to 12 tokens; a fifth of the labels is wrong."""
    recipe = load_recipe(path)
    rng = np.random.default_rng(0)
    labels = np.array(SEMEVAL_LABELS)
    ids = pa.array(np.char.add("example-", np.arange(n).astype("U8")), pa.string())
    gold = rng.integers(len(labels), size=n)
    given = np.where(rng.random(n) < 0.2, rng.integers(len(labels), size=n), gold)
    spans = [pa.array(np.full(n, value), pa.int32()) for value in (0, 1, 2, 3)]
    names = pa.array(labels)
    columns = [ids, pa.array(["a b c d"] * n), *spans, names.take(pa.array(given)), names.take(pa.array(gold))]
    info = {"fingerprint": "generated", "labels": labels.tolist(), "task": "grammar"}
    write_table(folder.examples, pa.table([*columns, pa.array(["train"] * n)], schema=SCHEMA), info)
    write_json(folder.examples_info, info)

    of = math.ceil(n / size)
    inputs = scoring_inputs(recipe, "generated", labels.tolist())
    write_json(folder.scores / "scores.json", {"fingerprint": "made", "shards": of, "rows": n, "inputs": inputs})
    schema = shard_schema(label_set=False)
    for shard in range(of):
        part = ids.slice(shard * size, size)
        rows = len(part)
        drawn = [rng.integers(4, 13, rows) if field.type == pa.int64() else -30 * rng.random(rows) for field in schema]
        table = pa.table([part, *drawn[1:]], schema=schema)
        write_table(shard_path(folder, shard, of), table, {"fingerprint": "made", "shard": shard, "of": of})


if __name__ == "__main__":
    main()
