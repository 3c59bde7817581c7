"""Started on 1 or 2 ranks by test_modes.py: train a few steps in each of several modes, one after another.

Usage: modes_probe.py ROWS.json RESULT.json. ROWS holds [{"train": options of recipe.Train, "model": path of one model
for all rows, "save": where to write the trained model, if at all}, …], the first of them a mode that runs. Rank 0
writes, for each row, {"refused": line} or {"losses": […], "scores": log-likelihoods of the first examples after
training, "peak_mib": peak resident memory of the largest rank, less what was there before the row}.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import grammar_pairs
from resident import forget_peak, resident

from atlantis_ds.cluster.ranks import Ranks, end_rank, start_ranks, stop_ranks
from atlantis_ds.config.schema import Model, Train
from atlantis_ds.data.relation import SEMEVAL_LABELS
from atlantis_ds.errors import InputError
from atlantis_ds.lm.batch import collate
from atlantis_ds.lm.encode import Encoded, Encoder
from atlantis_ds.lm.likelihood import score_pairs
from atlantis_ds.lm.load import load_config, load_tokenizer
from atlantis_ds.train.checkpoint import save_model
from atlantis_ds.train.engine import start_engine
from atlantis_ds.train.step import micro_batch_rows, optimizer_step, step_rows

EXAMPLES, STEPS = 16, 4


def train(row: dict[str, Any], tokenizer: Any, pairs: list[Encoded], ranks: Ranks) -> dict[str, Any]:
    settings = Train.model_validate(
        {"train_batch_size": 8, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"} | row["train"]
    )
    lengths = [len(pair) for pair in pairs]
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    engine = start_engine(settings, Model(model_name_or_path=row["model"]), [STEPS], 1, ranks)
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
    peak = max(ranks.gather((resident("VmHWM") - before) / 2**20))
    if "save" in row:
        save_model(engine, tokenizer, Path(row["save"]), ranks)
    scores = score_pairs(engine, pairs[:3], pairs[0].eos, 4096).sum(1).tolist()
    engine.destroy()
    return {"losses": losses, "scores": scores, "peak_mib": peak}


def main() -> None:
    rows, result = sys.argv[1:3]
    ranks = start_ranks(3)
    found: list[dict[str, Any]] = []
    plan = json.loads(Path(rows).read_text())
    model = Model(model_name_or_path=plan[0]["model"])
    tokenizer = load_tokenizer(model)
    encoder = Encoder(tokenizer, load_config(model), SEMEVAL_LABELS)
    pairs = grammar_pairs(encoder, EXAMPLES, seed=4)
    train(plan[0], tokenizer, pairs, ranks)  # pays for the libraries
    for row in plan:
        try:
            found.append(train(row, tokenizer, pairs, ranks))
        except InputError as error:
            found.append({"refused": str(error)})
        if ranks.is_main:
            print(row["train"], found[-1], flush=True)
    if ranks.is_main:
        Path(result).write_text(json.dumps(found))
    ranks.barrier()
    stop_ranks()
    end_rank()


if __name__ == "__main__":
    main()
