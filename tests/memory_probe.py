"""Started on 2 ranks by test_memory.py: jobs one after another in one program, and the tensors that stay.

Usage: memory_probe.py RECIPE… Each rank prints for each recipe the bytes of all live tensors: before, after a scoring
pass, after each of two trainings and after the evaluation of the last.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from atlantis_ds import stages
from atlantis_ds.cluster.ranks import end_rank, start_ranks, stop_ranks
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.data.examples import load_examples
from atlantis_ds.evaluate.predict import evaluate
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.train.jobs import arm_job
from atlantis_ds.train.trainer import fit


def live_bytes() -> int:
    """Of all storages that a tensor of this program lies in; nothing is collected first."""
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


ranks = start_ranks(3)
for path in sys.argv[1:]:
    recipe = load_recipe(Path(path))
    run = Run(recipe, RunFolder(Path(recipe.runs_dir) / recipe.name), ranks)
    stages.prepare(run)
    found = [live_bytes()]
    stages.score(run)
    found.append(live_bytes())
    examples = load_examples(run.folder)
    for seed in (1, 2):
        job = arm_job(run, examples, "sft", force=False, seed=seed)
        fit(run, examples, job)
        found.append(live_bytes())
    evaluate(run, job.name)
    found.append(live_bytes())
    print(f"LIVE {ranks.rank} {found}\n", end="", flush=True)
stop_ranks()
end_rank()
