"""Optimizer steps of the real shape, on an engine that is discarded; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.schema import Model, Train
from atlantis_ds.lm.batch import Batch, collate_to_train
from atlantis_ds.lm.check import SAMPLES, check_packed
from atlantis_ds.lm.encode import Encoded
from atlantis_ds.lm.load import give_memory_back, load_config, start_deepspeed
from atlantis_ds.lm.size import peak_gib
from atlantis_ds.preflight.judge import GIB
from atlantis_ds.preflight.measure import now
from atlantis_ds.train.deepspeed_config import accumulation_steps
from atlantis_ds.train.engine import start_engine
from atlantis_ds.train.step import optimizer_step

END = 1
"""Used as end token and for padding: the choice of token does not change any size."""
STEPS = 2
"""The first step creates the optimizer states; the last one is timed."""
MOST_MICRO_BATCHES = 2
"""Micro-batches per step: from the second on, gradients are accumulated, and memory does not grow."""


def try_step(
    train: Train, model: Model, examples: Sequence[tuple[int, int]], ranks: Ranks, copy: Path | None = None
) -> dict[str, Any]:
    """Train on a micro-batch of random tokens.

    Args:
        examples: tokens of prompt and label (with end token) of each example in the micro-batch.
        copy: this node's copy of the weights; see ``node_copy``.

    Returns:
        seconds and tokens/s of a step, peak bytes of this rank, and the sizes of the step.
    """
    start_deepspeed()  # imported before memory is measured
    before = _reset_peak(ranks.device)
    engine = start_engine(train, model, [STEPS], 0, ranks, copy)
    config = load_config(model)
    pairs = random_pairs(examples, config.get_text_config().vocab_size)
    accumulation = accumulation_steps(train.train_batch_size, len(pairs), ranks.world_size)
    count = min(MOST_MICRO_BATCHES, accumulation)
    batch = _batch(engine, pairs)
    denominator = count * len(pairs) * ranks.world_size
    finite = True
    for _ in range(STEPS):
        start = now(ranks.device)
        finite &= not optimizer_step(engine, [batch] * count, denominator, ranks).skipped
        seconds = now(ranks.device) - start
    engine.destroy()
    peak = peak_gib(ranks.device) * GIB - before
    del engine
    give_memory_back(ranks.device)
    return {
        "micro_batches": count,
        "micro_batch": len(pairs),
        "longest": max(map(len, pairs)),
        "seconds": seconds,
        "tokens_per_s": count * sum(map(len, pairs)) * ranks.world_size / seconds,
        "whole_step_seconds": seconds * accumulation / count,
        "peak_bytes": peak,
        "finite": finite,
    }


def random_pairs(examples: Sequence[tuple[int, int]], vocabulary: int) -> list[Encoded]:
    """Examples with these lengths, without a common prefix."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        found: list[int] = torch.randint(END + 1, vocabulary, (count,), generator=draw).tolist()
        return found

    return [Encoded(ids(prompt), ids(max(1, label - 1)), END) for prompt, label in examples]


def _batch(engine: Any, pairs: list[Encoded]) -> Batch:
    """A batch as the trainer makes it: in one row if that is correct for the model."""
    engine.eval()
    ways = check_packed(engine, pairs[:SAMPLES], END)
    engine.train()
    batch = collate_to_train(pairs, engine.module.config, END, None, "less" if ways.packed else "never")
    return replace(batch, chunked=ways.chunked)


def _reset_peak(device: torch.device) -> float:
    """Bytes that this rank uses now, which its peak also includes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    return float(psutil.Process().memory_info().rss)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the host ran out of memory."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in words
