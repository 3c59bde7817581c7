"""Gradients of transformers' Trainer with the loss of docs/python.md, beside those of ``weighted_loss``, on any ranks.

``measure`` trains with a learning rate of 0, so that all steps start from one model. As a script, on several ranks:
rank 0 prints ``OFF`` and the relative difference of each step's gradient.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from documented import blocks, run_blocks
from transformers import TrainerCallback, TrainingArguments

import atlantis_ds as ds
from atlantis_ds.data.examples import load_examples
from atlantis_ds.lm.batch import collate
from atlantis_ds.lm.load import load_model, model_source
from atlantis_ds.lm.tokens import prepared_tokens
from atlantis_ds.run import open_run
from atlantis_ds.train.step import weighted_loss

RUN = "runs/demo"


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append(flat(model))


def flat(model: Any) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def expected(rows: list[int]) -> torch.Tensor:
    """The gradient of our own weighted step over these examples, from the run's own tokens, in one batch."""
    run = open_run(RUN)
    examples, source = load_examples(run.folder), model_source(run.recipe, run.folder, "large")
    tokens = prepared_tokens(run, examples, "train", source)
    assert tokens is not None
    lm, weights = load_model(source, "float32"), ds.weights_from_scores(RUN)
    batch = collate([tokens[row] for row in rows], lm.config, 0, weights[rows].tolist())
    weighted_loss(lm, batch, len(rows)).backward()
    return flat(lm)


def measure(count: int, trainer: str = "WeightedTrainer", names: dict[str, Any] | None = None) -> list[Any]:
    """Train one epoch on the first ``count`` examples, 2 micro-batches of 2 a step and process.

    Returns:
        for each step the examples that this process read, and its gradient.
    """
    names = names or run_blocks(blocks("transformers Trainer")[:1], {"ds": ds})
    data = ds.weighted_dataset(RUN).select(range(count)).add_column("row", [*range(count)])
    read: list[int] = []

    def collate_and_note(rows: list[dict[str, Any]]) -> Any:
        read.extend(row["row"] for row in rows)
        return names["collate"](rows)

    found = Gradients()
    arguments: Any = names.get("arguments_of", TrainingArguments)(
        output_dir="trained",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    names["model"].train()
    names[trainer](
        names["model"],
        arguments,
        train_dataset=names["tokenised"](data),
        data_collator=collate_and_note,
        callbacks=[found],
    ).train()
    return [(read[4 * step : 4 * step + 4], gradient) for step, gradient in enumerate(found.steps)]


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    os.chdir(Path(sys.argv[1]))
    steps = measure(16)
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, [rows for rows, _ in steps])
    if torch.distributed.get_rank() == 0:
        for step, (_, gradient) in enumerate(steps):
            print("OFF", off(gradient, expected([row for rows in ranks for row in rows[step]])), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
