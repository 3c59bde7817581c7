"""One measurement in a process of its own; `cpu.py` starts these in turn.

    python tools/bench/measure.py WHAT '{"model": ..., "examples": 64, ...}'

Prints one line of JSON. With "shots": K the prompts begin with K solved examples, one a label; with "meanings" they say
what each label of CoNLL04 means. What is timed begins after the model is loaded and one small batch has run. Both sides
of a comparison get the same model in memory, the same examples, precision and threads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peers import rank_lm_eval, score_lm_eval, train_trainer, train_trl
from setting import Setting, clocked
from torch.nn import functional as F

from atlantis_ds.lm.batch import Batch, collate, collate_to_train, common_prefix
from atlantis_ds.lm.likelihood import score_choices, score_pairs


def score_ours(setting: Setting) -> dict[str, Any]:
    pairs = setting.pairs()
    lm, eos = setting.lm.eval(), setting.tokenizer.eos_token_id
    budget = setting.options["tokens_per_batch"]
    score_pairs(lm, pairs[:4], eos, budget)
    found, sums = clocked(lambda: score_pairs(lm, pairs, eos, budget), len(pairs), sum(map(len, pairs)))
    prefix = common_prefix([pair.prompt for pair in pairs])
    read = prefix + sum(len(pair) - prefix for pair in pairs)
    predicted = sum(len(pair.label) + 1 for pair in pairs)
    head = lm.get_output_embeddings().weight.numel()
    # Two for each weight that a token is multiplied with; attention scores are left out.
    body = sum(p.numel() for p in lm.get_decoder().parameters()) - lm.get_input_embeddings().weight.numel()
    needed = 2 * (body * read + head * predicted)
    return {**found, "flops": needed / found["seconds"], "values": sums[:, 0].tolist()}


def rank_tree(setting: Setting) -> dict[str, Any]:
    prompts = setting.encoder.prompt_ids(setting.prompts)
    labels = [setting.encoder.label_ids(label) for label in setting.labels]
    lm, eos, budget = setting.lm.eval(), setting.tokenizer.eos_token_id, setting.options["tokens_per_batch"]
    score_choices(lm, prompts[:2], labels, eos, budget)
    found, sums = clocked(
        lambda: score_choices(lm, prompts, labels, eos, budget), len(prompts), sum(map(len, prompts)) * len(labels)
    )
    return {**found, "values": sums[:, :, 0].flatten().tolist()}


def rank_pairs(setting: Setting) -> dict[str, Any]:
    pairs = setting.every_pair()
    lm, eos, budget = setting.lm.eval(), setting.tokenizer.eos_token_id, setting.options["tokens_per_batch"]
    score_pairs(lm, pairs[:2], eos, budget)
    found, sums = clocked(lambda: score_pairs(lm, pairs, eos, budget), len(setting.prompts), sum(map(len, pairs)))
    return {**found, "values": sums[:, 0].tolist()}


def matmul(setting: Setting) -> dict[str, Any]:
    """The rate that this machine reaches in plain matrix products of the model's own shapes."""
    width = setting.lm.config.hidden_size
    a = torch.randn(2048, width, dtype=setting.lm.dtype)
    b = torch.randn(width, 4 * width, dtype=setting.lm.dtype)
    a @ b
    times = 40
    found, _ = clocked(lambda: [a @ b for _ in range(times)], times, times)
    return {**found, "flops": 2 * 2048 * width * 4 * width * times / found["seconds"]}


def train_ours(setting: Setting) -> dict[str, Any]:
    """The project's own step on its own engine; the model is saved first, since the engine loads it itself.

    For the breakdown, ``padded`` collates with padding, and ``full_logits`` takes the logits of every position.
    """
    import tempfile

    from atlantis_ds.cluster.ranks import start_ranks, stop_ranks
    from atlantis_ds.config.schema import Model, Train
    from atlantis_ds.train import step as weighted_step
    from atlantis_ds.train.engine import start_engine

    pairs = setting.pairs()
    lengths, size, eos = [len(pair) for pair in pairs], setting.options["batch_size"], pairs[0].eos
    train = Train(
        mode=setting.options["mode"],
        deepspeed="zero2.json",
        dtype=setting.options["dtype"],
        train_batch_size=size,
        per_device_train_batch_size=size,
    )
    ranks = start_ranks(10)
    torch.set_num_threads(setting.options["threads"])
    with tempfile.TemporaryDirectory() as folder:
        setting.lm.save_pretrained(folder)
        setting.lm = None
        engine = start_engine(train, Model(model_name_or_path=folder), [100], 0, ranks)
    if setting.options.get("full_logits"):
        weighted_step.token_log_likelihoods = full_logits
    to_batch = collate if setting.options.get("padded") else collate_to_train
    parts: dict[str, float] = {"data": 0.0}
    for name in ("forward", "backward", "step"):
        setattr(engine, name, timed(getattr(engine, name), parts, name))
    to_batch = timed(to_batch, parts, "data")

    def step(rows: list[int]) -> None:
        places = weighted_step.micro_batch_rows(torch.tensor(rows).numpy(), lengths, size, size, ranks)
        batches = [to_batch([pairs[row] for row, _ in micro], engine.module.config, eos) for micro in places]
        weighted_step.optimizer_step(engine, batches, size, ranks)

    def epoch() -> None:
        for first in range(0, len(pairs), size):
            step(list(range(first, first + size)))

    step(list(range(size)))
    parts.update(dict.fromkeys(parts, 0.0))
    found, _ = clocked(epoch, len(pairs), sum(lengths))
    stop_ranks()
    return {**found, "parts": {name: seconds / found["seconds"] for name, seconds in parts.items()}}


def timed(work: Callable[..., Any], parts: dict[str, float], name: str) -> Callable[..., Any]:
    def clocked_work(*args: Any, **options: Any) -> Any:
        start = time.monotonic()
        result = work(*args, **options)
        parts[name] = parts.get(name, 0.0) + time.monotonic() - start
        return result

    return clocked_work


def full_logits(model: Any, batch: Batch) -> torch.Tensor:
    """``token_log_likelihoods`` without its saving: as most trainers do, logits of every position in fp32."""
    logits = model(**batch.inputs, use_cache=False).logits.float().flatten(0, 1)
    every = torch.full((len(logits),), -100)
    every[batch.positions] = batch.targets
    return -F.cross_entropy(logits, every, reduction="none")[batch.positions].double()


MEASURES: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "score_ours": score_ours,
    "score_lm_eval": score_lm_eval,
    "rank_tree": rank_tree,
    "rank_pairs": rank_pairs,
    "rank_lm_eval": rank_lm_eval,
    "matmul": matmul,
    "train_ours": train_ours,
    "train_ours_padded": lambda setting: train_ours(setting.having(padded=True)),
    "train_ours_full_logits": lambda setting: train_ours(setting.having(padded=True, full_logits=True)),
    "train_trainer": train_trainer,
    "train_trainer_deepspeed": lambda setting: train_trainer(setting, deepspeed=True),
    "train_trl": train_trl,
    "train_trl_packing": lambda setting: train_trl(setting, packing=True),
}


def main() -> None:
    what, options = sys.argv[1], json.loads(sys.argv[2])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(json.dumps(MEASURES[what](Setting(options))))


if __name__ == "__main__":
    main()
