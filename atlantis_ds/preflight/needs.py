"""The memory and disk that the job will need, in bytes, from the recipe and the configs of its models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atlantis_ds.config.schema import Model, Train
from atlantis_ds.data.examples import load_examples
from atlantis_ds.errors import InputError
from atlantis_ds.lm.load import load_config, model_source
from atlantis_ds.lm.size import Shape, model_shape
from atlantis_ds.lm.tokens import prepared_tokens
from atlantis_ds.plan.memory import HOST_OF_A_RANK, OPTIMIZER_STATES, largest_micro_batch, training_memory
from atlantis_ds.plan.trace import activations, build_model, read_config
from atlantis_ds.run import Run
from atlantis_ds.train.deepspeed_config import accumulation_steps, deepspeed_config, offload_device

ASSUMED_PROMPT, ASSUMED_LABEL = 504, 8
"""Tokens of an example and its label, if `prepare` has not run."""
TEMPORARY = 64 * 2**20
"""Assumed: files of libraries in $TMPDIR, and small files of the run."""


@dataclass(frozen=True)
class Needs:
    """Needs of the training of the large model, in bytes."""

    peak: float
    """On the device of a rank: its GPU, or its host's memory if it has none."""
    host: float
    """Host memory of a rank, in addition to the running process."""
    run: float
    """Checkpoints and models that are still to be written."""
    temporary: float
    """On each host, below $TMPDIR."""
    fitting: int
    """The largest micro-batch that the plan expects to fit."""

    def of_device(self, cpu: bool) -> dict[str, float]:
        return {"host": self.host, "device": 0.0 if cpu else self.peak, "run": self.run, "temporary": self.temporary}


def longest_examples(run: Run, model: Model) -> tuple[str, list[tuple[int, int]]]:
    """The longest examples of a micro-batch, as tokens of prompt and label (with end token), and their source."""
    micro = run.recipe.train.per_device_train_batch_size
    tokens = None
    if run.folder.examples_info.exists():
        tokens = prepared_tokens(run, load_examples(run.folder), "train", model)
    if tokens is None or not len(tokens):
        most = getattr(load_config(model), "max_position_embeddings", None) or ASSUMED_PROMPT + ASSUMED_LABEL
        prompt = min(ASSUMED_PROMPT, most - ASSUMED_LABEL)
        return "of an assumed length, because `prepare` has not run", [(prompt, ASSUMED_LABEL)] * micro
    rows = np.argsort(-tokens.lengths, kind="stable")[:micro].tolist()
    pairs = [tokens[row] for row in rows]
    found = [(len(pair.prompt), len(pair.label) + 1) for pair in pairs]
    return "with the lengths of the longest in the run", found + found[:1] * (micro - len(found))


def estimate(run: Run, model: Model, examples: Sequence[tuple[int, int]], free: float, ranks_a_host: int) -> Needs:
    """What the plan expects for the training.

    Args:
        examples: from ``longest_examples``.
        free: free bytes for a rank on its device.
        ranks_a_host: largest number of ranks on a host.

    Raises:
        InputError: the config of a model or of DeepSpeed cannot be read.
    """
    train, world, cpu = run.recipe.train, run.ranks.world_size, run.ranks.device.type == "cpu"
    config = read_config(model)
    traced = _on_meta(train)
    shape = model_shape(build_model(config, traced))
    zero = deepspeed_config(train, world)
    accumulation = accumulation_steps(train.train_batch_size, train.per_device_train_batch_size, world)
    memory = training_memory(train, shape, zero.get("zero_optimization", {}), world, accumulation, cpu)
    taken = activations(config, traced, max(p for p, _ in examples), max(n for _, n in examples))
    peak = memory.peak(taken.bytes(train.per_device_train_batch_size))
    own = memory.host / min(world, 8) - HOST_OF_A_RANK
    swapped = any(offload_device(zero, part) == "nvme" for part in ("optimizer", "param"))
    states = (OPTIMIZER_STATES + 4) * shape.trainable * ranks_a_host / world
    return Needs(
        peak=peak,
        host=max(0.0, own) + (peak if cpu else 0.0),
        run=TEMPORARY + _disk_of_run(run, shape),
        temporary=TEMPORARY + (states if swapped else 0.0),
        fitting=largest_micro_batch(memory, taken, free),
    )


def _disk_of_run(run: Run, shape: Shape) -> float:
    """Checkpoints of one training (removed when it ends), and `last` and `best` of every model still to be trained."""
    recipe, folder = run.recipe, run.folder
    train, width = recipe.train, 4 if recipe.train.dtype == "float32" else 2
    saved = width * _saved(train, shape)
    checkpoint = saved + (OPTIMIZER_STATES + 4) * shape.trainable
    models = sum(not (folder.model(arm) / "training.json").exists() for arm in recipe.arms) * saved
    reference = recipe.models.reference
    if reference.kind == "finetuned":
        done = len(list((folder.root / "model").glob("reference*/training.json")))
        try:
            base = model_shape(build_model(read_config(model_source(recipe, folder, "reference")), _on_meta(train)))
        except InputError:
            base = shape  # not available yet: no larger than the model that is trained
        models += max(0, reference.folds * reference.rounds - done) * width * _saved(train, base)
    # A new checkpoint is written before old ones are removed; if all models exist, nothing is written.
    return (train.save_total_limit + 1) * checkpoint + 2 * models if models else 0.0


def _on_meta(train: Train) -> Train:
    """The recipe's training section for a model on the meta device: QLoRA has the same adapters as LoRA."""
    mode = "full" if train.mode == "full" else "lora"
    return train.model_copy(update={"mode": mode, "bnb_4bit_quant_storage": None})


def _saved(train: Train, shape: Shape) -> int:
    """Number of weights in a model's files."""
    return shape.parameters if train.mode == "full" else shape.trainable
