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
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from atlantis_ds.config.loading import load_recipe
from atlantis_ds.config.schema import Recipe
from atlantis_ds.data.examples import ROWS, SCHEMA, SPLITS, Examples, load_examples, write_arrow
from atlantis_ds.data.prepare import examples_fingerprint
from atlantis_ds.data.relation import SEMEVAL_LABELS
from atlantis_ds.files import write_json, write_table
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.shards import scoring_inputs, shard_path, shard_schema

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
    examples = write_examples(recipe, folder, n)
    of = math.ceil(n / size)
    manifest = {"fingerprint": "made", "shards": of, "rows": n, "inputs": scoring_inputs(recipe, examples)}
    write_json(folder.scores / "scores.json", manifest)
    rng, schema = np.random.default_rng(0), shard_schema(label_set=False)
    for shard in range(of):
        ids = examples.train.ids.slice(shard * size, size).combine_chunks()
        table = pa.table([ids, *some_scores(rng, schema, len(ids))], schema=schema)
        write_table(shard_path(folder, shard, of), table, {"fingerprint": "made", "shard": shard, "of": of})


def some_scores(rng: np.random.Generator, schema: pa.Schema, rows: int) -> list[np.ndarray]:
    """Columns of a shard, but for the ids."""
    return [
        rng.integers(4, 13, rows) if field.type == pa.int64() else -30 * rng.random(rows) for field in list(schema)[1:]
    ]


def write_examples(recipe: Recipe, folder: RunFolder, n: int) -> Examples:
    """The examples of a run as `prepare` writes them, without reading any data."""
    rng, labels = np.random.default_rng(0), pa.array(SEMEVAL_LABELS)
    mark = examples_fingerprint(recipe)

    def batches(rows: int) -> Iterator[pa.RecordBatch]:
        for first in range(0, rows, ROWS):
            count = min(ROWS, rows - first)
            gold = rng.integers(len(labels), size=count)
            given = np.where(rng.random(count) < 0.2, rng.integers(len(labels), size=count), gold)
            ids = pa.array([f"example-{first + row}" for row in range(count)])
            texts, fold = pa.array(["a b c d"] * count), rng.integers(2**64, size=count, dtype=np.uint64)
            names = [labels.take(pa.array(codes)) for codes in (given, gold)]
            yield pa.record_batch([ids, texts, *names, pa.nulls(count, pa.string()), pa.array(fold)], schema=SCHEMA)

    for split in SPLITS:
        write_arrow(folder.split(split), SCHEMA, batches(n if split == "train" else 0), {"fingerprint": mark})
    info = {"fingerprint": mark, "train_fingerprint": "made", "digests": {split: ["made", "made"] for split in SPLITS}}
    info |= {"labels": SEMEVAL_LABELS, "task": "relation", "chat": False, "whole_ids": False}
    write_json(folder.examples_info, info)
    return load_examples(folder)


if __name__ == "__main__":
    main()
