"""One rank of `scaling.py`, started by torchrun: trains or scores with the project's own functions and measures it.

    torchrun --nproc-per-node 2 tools/bench/scaling_rank.py train|speed '{"model": FOLDER, ...}'

Rank 0 prints one line of JSON; a list of options gives a list of results (whose peaks then mean nothing).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import deepspeed
import numpy as np
import peft  # noqa: F401
import torch
import torch.distributed as dist
import transformers  # noqa: F401
from resident import forget_peak, resident
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atlantis_ds.cluster.ranks import Ranks, end_rank, start_ranks, stop_ranks
from atlantis_ds.config.schema import Model, Train
from atlantis_ds.lm.batch import Batch, collate, collate_to_train
from atlantis_ds.lm.encode import Encoded
from atlantis_ds.lm.likelihood import score_pairs
from atlantis_ds.lm.load import load_scorer
from atlantis_ds.train.engine import start_engine
from atlantis_ds.train.step import micro_batch_rows, optimizer_step
from atlantis_ds.weights.score import assign_shards

# All libraries are imported above: a rank's memory is counted from after them.
KINDS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}
WARM_UP = 3
"""Steps before a clock runs: ZeRO-3 records the order of modules in its first one and works by it from the next."""


class Collectives(TorchDispatchMode):
    """Counts the collectives that pass through PyTorch's dispatcher: {kind: [calls, bytes of the whole tensors]}."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            entry = self.found.setdefault(KINDS.get(name, name), [0, 0])
            entry[0] += 1
            entry[1] += max((t.numel() * t.element_size() for t in tensors), default=0)
        return func(*args, **(kwargs or {}))


def best(work: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest of some runs, that all ranks begin together."""
    seconds = []
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def rates(ranks: Ranks, width: int) -> dict[str, float]:
    """Matmul FLOP/s and copied bytes/s of one rank while all ranks do the same: fp32, matrices [1024, width]."""
    a, b = torch.randn(1024, width), torch.randn(width, 4 * width)
    x, y, product = torch.randn(2**24), torch.empty(2**24), torch.empty(1024, 4 * width)
    # Many in one clock: the fastest of single ones has a core to itself, also where ranks share it.
    matmul = best(lambda: [torch.mm(a, b, out=product) for _ in range(60)], 1) / 60
    copy = best(lambda: [y.copy_(x) for _ in range(60)], 1) / 60
    found = [ranks.gather(value) for value in (2 * a.numel() * 4 * width / matmul, 2 * 4 * x.numel() / copy)]
    return {"matmul": float(np.mean(found[0])), "copy": float(np.mean(found[1]))}


def links(ranks: Ranks) -> dict[str, dict[str, float]]:
    """For each kind of collective: seconds of a tiny one, and bytes/s that a rank sends in large ones (ring count)."""
    n = ranks.world_size
    if n == 1:
        return {}
    large = torch.zeros(2**22 // n * n)

    def run(kind: str, whole: torch.Tensor) -> None:
        part = whole[: len(whole) // n].clone()
        if kind == "all_gather":
            dist.all_gather_into_tensor(whole, part)
        elif kind == "reduce_scatter":
            dist.reduce_scatter_tensor(part, whole)
        else:
            dist.all_reduce(whole)

    found = {}
    for kind, passed in (("all_gather", 1), ("reduce_scatter", 1), ("all_reduce", 2)):
        latency = max(ranks.gather(best(lambda kind=kind: run(kind, large[:n]), 50)))
        seconds = max(ranks.gather(best(lambda kind=kind: run(kind, large), 8)))
        sent = passed * (n - 1) / n * 4 * len(large)
        found[kind] = {"latency": latency, "bandwidth": sent / (seconds - latency)}
    return found


def some_pairs(count: int, prompt: int, label: int) -> list[Encoded]:
    return [Encoded([100 + i] * prompt, [7] * (label - 1), 0) for i in range(count)]


def train(ranks: Ranks, options: dict[str, Any]) -> dict[str, Any]:
    """Optimizer steps over equal examples: what is sent, seconds of a step and of its update, peak memory."""
    settings = Train(**options["train"])
    before = resident("VmRSS")
    engine = start_engine(settings, Model(model_name_or_path=options["model"]), [100], 0, ranks)
    forget_peak()  # of loading
    micro, size = settings.per_device_train_batch_size, settings.train_batch_size
    batch = collate(some_pairs(micro, options["prompt"], options["label"]), engine.module.config, 0, [1.0] * micro)
    batches = [batch] * (size // (micro * ranks.world_size))
    update = _clock_update(engine)

    def step() -> None:
        optimizer_step(engine, batches, size, ranks)

    for _ in range(WARM_UP):
        step()
    counter = Collectives()
    with counter:
        step()
    peak = resident("VmHWM") - before
    update.clear()
    seconds = best(step, options["steps"])
    found = {
        "collectives": counter.found,
        "seconds": max(ranks.gather(seconds)),
        "update": max(ranks.gather(min(update))),
        "peak": max(ranks.gather(peak)),
    }
    if options.get("rates"):
        found |= {"rates": rates(ranks, engine.module.config.hidden_size), "links": links(ranks)}
    engine.destroy()
    return found


def _clock_update(engine: Any) -> list[float]:
    """Fills the returned list with the seconds of each ``engine.step()``."""
    seconds: list[float] = []
    step = engine.step

    def clocked() -> None:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)

    engine.step = clocked
    return seconds


def speed(ranks: Ranks, options: dict[str, Any]) -> dict[str, float]:
    """Over all ranks: examples/s of scoring and of training, on examples of unequal length, the same on any ranks; and
    GFLOP/s of plain matrix products."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(options["prompt"] // 2, 3 * options["prompt"] // 2, options["examples"])
    pairs = [some_pairs(1, int(n), int(rng.integers(2, 9)))[0] for n in lengths]
    found = {"score": _score(ranks, options, pairs), "train": _train(ranks, options, pairs)}
    # What the machine itself gives: matrix products that share nothing.
    products = rates(ranks, 384)["matmul"] * ranks.world_size / 1e9
    return {what: len(pairs) / max(ranks.gather(seconds)) for what, seconds in found.items()} | {"products": products}


def _score(ranks: Ranks, options: dict[str, Any], pairs: list[Encoded]) -> float:
    """Shards of the examples dealt to the ranks as `score` deals them, each scored by a replica."""
    lm = load_scorer(Model(model_name_or_path=options["model"]), options["dtype"], ranks.device)
    cut = options["shard_size"]
    shards = [pairs[start : start + cut] for start in range(0, len(pairs), cut)]
    mine = assign_shards([sum(map(len, shard)) for shard in shards], ranks.world_size)[ranks.rank]
    score_pairs(lm, pairs[:2], 0, options["tokens_per_batch"])
    return best(lambda: [score_pairs(lm, shards[i], 0, options["tokens_per_batch"]) for i in mine], 1)


def _train(ranks: Ranks, options: dict[str, Any], pairs: list[Encoded]) -> float:
    """One epoch, after two steps to warm up: global batches and micro-batches as `train` makes them."""
    settings = Train(**options["train"])
    engine = start_engine(settings, Model(model_name_or_path=options["model"]), [100], 0, ranks)
    lengths, size = [len(pair) for pair in pairs], settings.train_batch_size

    def step(first: int) -> None:
        rows = np.arange(first, first + size)
        places = micro_batch_rows(rows, lengths, size, settings.per_device_train_batch_size, ranks)
        batches: list[Batch] = [
            collate_to_train([pairs[r] for r, _ in micro], engine.module.config, 0) for micro in places
        ]
        optimizer_step(engine, batches, size, ranks)

    for _ in range(2):
        step(0)
    seconds = best(lambda: [step(first) for first in range(0, len(pairs), size)], 1)
    engine.destroy()
    return seconds


def main() -> None:
    what, options = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    ranks = start_ranks(30)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    ranks.sum(1.0)
    work = {"train": train, "speed": speed}[what]
    found = [work(ranks, each) for each in options] if isinstance(options, list) else work(ranks, options)
    if ranks.is_main:
        print("FOUND " + json.dumps(found), flush=True)
    ranks.barrier()
    stop_ranks()
    end_rank()


if __name__ == "__main__":
    main()
