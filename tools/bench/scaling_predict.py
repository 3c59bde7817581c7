"""``scaling.py predict``: Qwen2-7B under ZeRO-3 on 8, 64 and 512 H100s, and scoring 10 million examples.

Nothing of this was run on GPUs. Each table says what of it was counted, measured on this machine, or assumed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from data_scale import anonymous
from merge import RECIPE, some_scores, write_examples
from scaling_model import Link, Step, bytes_sent, nccl_latency, read_model, traffic

from atlantis_ds.config.schema import Model, Recipe, Train
from atlantis_ds.data.examples import load_examples
from atlantis_ds.files import write_table
from atlantis_ds.lm.frozen import replica_bytes
from atlantis_ds.lm.size import PEAKS, forward_flops, model_shape
from atlantis_ds.plan.memory import GIB, training_memory, usable
from atlantis_ds.plan.plan import SIZES, UTILISATION
from atlantis_ds.plan.trace import activations, build_model, read_config
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.shards import shard_schema

ROOT = Path(__file__).resolve().parents[2]
NODE = 8
NVLINK = 360e9
"""Assumed: bytes/s that nccl-tests shows within an H100 node; "exactly what we'd expect" (NVIDIA/nccl-tests#326)."""
ADAPTER = 47e9
"""Assumed: of one 400 Gb/s InfiniBand adapter; "46-48 GB/s" (NVIDIA/nccl-tests#290)."""
NETWORKS = {"8 adapters a node": 8, "1 adapter a node": 1}
HBM = 0.9 * 3.35e12
"""Assumed: bytes/s of an H100's memory, 90 % of the data sheet."""
UPDATE = 92
"""Bytes read and written a trained weight by the update: counted over the operations of AdamW's foreach path (72) and
DeepSpeed's copies (bf16 gradient to fp32, unscaling, fp32 weight to bf16)."""
TOKENS = (198, 8)
"""Mean prompt and label of SemEval-2010 Task 8 with the label options in the prompt (docs/memory-and-hours.md)."""
EXAMPLES = 10_000_000
LOADED = 2e9
"""Assumed: bytes/s at which weights come from the file system."""


def predict(options: argparse.Namespace) -> dict[str, Any]:
    """Print and return both predictions."""
    training = [row for micro in (8, 64) for row in predict_training(options.configs, micro)]
    print(
        "| GPUs | examples a GPU | sent by a rank, GB | collectives | peak, GiB | network | passes, s | talk, s ",
        end="",
    )
    print("| step, s | share of the passes | examples/s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in training:
        cells = [row["gpus"], row["micro"], f"{row['sent'] / 1e9:.1f}", row["calls"], f"{row['peak'] / GIB:.1f}"]
        cells += [row["network"], f"{row['compute']:.2f}", f"{row['passes'] + row['after']:.2f}"]
        cells += [f"{row['overlapped']:.2f} to {row['apart']:.2f}"]
        cells += [f"{row['compute'] / row['overlapped']:.0%} to {row['compute'] / row['apart']:.0%}"]
        cells += [f"{row['examples_per_s'][0]:.0f} to {row['examples_per_s'][1]:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    scoring = predict_scoring(options)
    print(f"\n{json.dumps({key: value for key, value in scoring.items() if key != 'arrays'})}\n")
    print("| tasks of one GPU | shard size | shards (= files) | most shards a task | start-up, h | hours | GPU-hours |")
    print("|---|---|---|---|---|---|---|")
    for row in scoring["arrays"]:
        print("| " + " | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row) + " |")
    return {"training": training, "scoring": scoring}


def predict_training(configs: Path, micro: int) -> list[dict[str, Any]]:
    """One optimizer step of Qwen2-7B, all weights, ZeRO-3, bf16, gradient checkpointing; ``micro`` examples a GPU."""
    file = ROOT / "ds_configs" / "zero3.json"
    zero = json.loads(file.read_text())["zero_optimization"]
    train = Train(gradient_checkpointing=True, per_device_train_batch_size=micro, train_batch_size=micro)
    config = read_config(Model(model_name_or_path=str(configs / "Qwen2-7B.config.json")))
    model = read_model(config, train)
    taken = activations(config, train, *TOKENS).bytes(micro)
    # Forward 2ND, backward 4ND, recomputation 2ND.
    compute = 4 * micro * forward_flops(model.shape, *TOKENS) / (PEAKS["H100"] * UTILISATION)
    rows = []
    for gpus in (8, 64, 512):
        passes, after = traffic(model, zero, gpus, 1, train)
        peak = training_memory(train, model.shape, zero, gpus, 1).peak(taken)
        for network, adapters in NETWORKS.items():
            link = Link(NVLINK if gpus <= NODE else min(NVLINK, adapters * ADAPTER), nccl_latency)
            update = UPDATE * model.shape.trainable / gpus / HBM
            step = Step(compute, link.seconds(passes, gpus), link.seconds(after, gpus), update)
            rows.append(
                {"gpus": gpus, "micro": micro, "network": network if gpus > NODE else "NVLink", "peak": peak}
                | {"sent": bytes_sent([*passes, *after], gpus), "calls": sum(c.calls for c in [*passes, *after])}
                | {**step.__dict__, "apart": step.apart, "overlapped": step.overlapped}
                | {"examples_per_s": [gpus * micro / step.apart, gpus * micro / step.overlapped]}
            )
            if gpus <= NODE:
                break
    return rows


def predict_scoring(options: argparse.Namespace) -> dict[str, Any]:
    """Slurm arrays of one-GPU tasks that score 10 million examples under Qwen2-7B, Qwen2-1.5B and a 1.5B reference."""
    small = "Qwen2-1.5B.config.json"
    flops, weights = 0.0, []
    for name in ("Qwen2-7B.config.json", small, small):
        shape = model_shape(build_model(read_config(Model(model_name_or_path=str(options.configs / name))), Train()))
        flops += forward_flops(shape, *TOKENS)
        weights.append(2 * shape.parameters)
    with tempfile.TemporaryDirectory() as temporary:
        seconds, held = measure_loading(Path(temporary))
        row = shard_bytes(Path(temporary))
        # What a task asks for before it loads a replica: the project's own estimate.
        folder = Path(temporary) / "7B"
        folder.mkdir()
        (folder / "config.json").write_text((options.configs / "Qwen2-7B.config.json").read_text())
        replica = replica_bytes(Model(model_name_or_path=str(folder)), "bfloat16")
    start = (EXAMPLES * seconds + sum(weights) / LOADED) / 3600
    an_example = flops / (PEAKS["H100"] * UTILISATION)
    arrays = []
    for tasks in (8, 64, 512):
        for size in (16384, 2048):
            shards = math.ceil(EXAMPLES / size)
            most = math.ceil(shards / tasks)
            hours = start + most * size * an_example / 3600
            arrays.append([tasks, size, shards, most, start, hours, tasks * hours])
    found = {
        "gpu_gib": round(replica / GIB, 1),
        "fits_80_gb": replica < usable(SIZES[80]),
        "host_gib_a_task": round(EXAMPLES * held / GIB, 1),
        "loading_s": round(EXAMPLES * seconds),
        "shards_mb": round(EXAMPLES * row / 1e6),
        "arrays": arrays,
    }
    if options.merge:
        merged = json.loads(options.merge.read_text().splitlines()[-1])
        found["merge_s"] = round(merged["seconds"] * EXAMPLES / merged["examples"])
        found["merge_gib"], found["merge_measured_at"] = merged["peak_gib"], merged["examples"]
    return found


def measure_loading(place: Path, n: int = 100_000) -> tuple[float, float]:
    """Seconds and bytes an example of what every task does over all examples, here on one core: it maps their files,
    numbers their labels, and keeps two numbers of the tokens of each."""
    recipe = Recipe.model_validate({**RECIPE, "runs_dir": str(place)})
    folder = RunFolder(place / recipe.name)
    write_examples(recipe, folder, n)
    before = anonymous(os.getpid())
    start = time.perf_counter()
    train = load_examples(folder).train
    kept = train.codes.nbytes + 2 * 4 * n
    seconds = time.perf_counter() - start
    return seconds / n, max(kept, anonymous(os.getpid()) - before) / n


def shard_bytes(place: Path, rows: int = 16384) -> float:
    """Bytes an example of a score shard, as written."""
    schema = shard_schema(label_set=False)
    ids = pa.array([f"example-{i}" for i in range(rows)], pa.string())
    table = pa.table([ids, *some_scores(np.random.default_rng(0), schema, rows)], schema=schema)
    write_table(place / "shard.parquet", table, {})
    return (place / "shard.parquet").stat().st_size / rows
