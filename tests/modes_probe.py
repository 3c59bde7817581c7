"""Started on 1 or 2 ranks by test_modes.py: train a few steps in each of several modes, one after another.

Usage: modes_probe.py ROWS.json RESULT.json. ROWS holds [{"model": path, "train": options of recipe.Train}, …]. Rank 0
writes, for each row, {"refused": line} or {"losses": […], "peak_mib": peak resident memory of the largest rank, less
what was there before the row}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from atlantis_ds.cluster.ranks import Ranks, start_ranks, stop_ranks
from atlantis_ds.data.formats import SEMEVAL_LABELS
from atlantis_ds.data.grammar import grammar_corpus
from atlantis_ds.errors import InputError
from atlantis_ds.lm.batch import collate
from atlantis_ds.lm.encode import Encoder
from atlantis_ds.lm.load import load_config, load_tokenizer
from atlantis_ds.recipe import Model, Prompt, Train
from atlantis_ds.train.engine import start_engine
from atlantis_ds.train.step import micro_batch_rows, optimizer_step, step_rows

EXAMPLES, STEPS = 16, 6


def memory(line: str) -> float:
    """A line of /proc/self/status (VmRSS, VmHWM, RssAnon) in MiB."""
    status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(status[line].split()[0]) / 1024


def forget_peak() -> float:
    """Give free memory back, start VmHWM anew; what is resident now, in MiB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def train(path: str, options: dict[str, Any], ranks: Ranks) -> list[float]:
    settings = Train.model_validate(
        {"train_batch_size": 8, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"} | options
    )
    model = Model(model_name_or_path=path)
    encoder = Encoder(load_tokenizer(model), load_config(model), Prompt(), list(SEMEVAL_LABELS))
    pairs = [encoder(example) for example in grammar_corpus(EXAMPLES, 1, 1, seed=4)[:EXAMPLES]]
    lengths = [len(pair) for pair in pairs]
    engine = start_engine(settings, model, STEPS, 1, ranks)
    losses = []
    for step in range(STEPS):
        rows = step_rows(EXAMPLES, 8, 1, step)
        places = micro_batch_rows(rows, lengths, 8, settings.per_device_train_batch_size, ranks)
        batches = [
            collate([pairs[r] for r, _ in m], engine.module.config, pairs[0].eos, [float(counts) for _, counts in m])
            for m in places
        ]
        torch.manual_seed(step)
        losses.append(optimizer_step(engine, batches, len(rows), ranks).loss)
    engine.destroy()
    return losses


def main() -> None:
    rows, result = sys.argv[1:3]
    ranks = start_ranks(3)
    found = []
    for row in json.loads(Path(rows).read_text()):
        before = forget_peak()
        try:
            outcome: dict[str, Any] = {"losses": train(row["model"], row["train"], ranks)}
            outcome["peak_mib"] = max(ranks.gather(memory("VmHWM") - before))
        except InputError as error:
            outcome = {"refused": str(error)}
        found.append(outcome)
        if ranks.is_main:
            print(row, outcome, flush=True)
    if ranks.is_main:
        Path(result).write_text(json.dumps(found))
    ranks.barrier()
    stop_ranks()


if __name__ == "__main__":
    main()
