"""What data-parallel ranks say to each other in one optimizer step, and how long it takes. Pure functions.

Weights, FLOPs and memory are those of `atlantis-ds plan` (`train/plan.py`, `memory.py`, `trace.py`); the terms here
follow DeepSpeed 0.19 as it is installed, and `scaling.py check` holds them against what real ranks send.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from atlantis_ds.config.schema import Train
from atlantis_ds.lm.size import Shape, model_shape
from atlantis_ds.plan.trace import _fake, build_model

PASSED = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
"""How often a ring passes the whole tensor on: an all-reduce is a reduce-scatter and an all-gather."""
WINDOW = {
    "stage3_max_reuse_distance": 10**9,
    "stage3_max_live_parameters": 10**9,
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_param_persistence_threshold": 10**5,
}
"""What stage 3 keeps gathered, in weights: DeepSpeed's defaults."""

Events = list[tuple[str, list[int]]]
"""("fetch" or "release", numbers of the module's own weight tensors), in the order of one forward and backward pass."""


@dataclass(frozen=True)
class Collective:
    """``calls`` collectives of one kind over tensors of ``bytes`` each (the whole tensor, padding included)."""

    kind: str
    bytes: float
    calls: int = 1

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends around a ring: (n-1)/n of the tensor for each time that it passes."""
        return self.calls * PASSED[self.kind] * self.bytes * (ranks - 1) / ranks


@dataclass(frozen=True)
class Model:
    shape: Shape
    sizes: list[int]
    """Weights of each tensor, in the order of ``named_parameters``."""
    events: dict[bool, Events]
    """Without and with gradient_checkpointing."""


def read_model(config: Any, train: Train) -> Model:
    """Sizes of a model and the order in which a step visits its modules, from its config alone."""
    lm = build_model(config, train)
    sizes = [parameter.numel() for parameter in lm.parameters()]
    events = {kept: module_events(build_model(config, train), kept) for kept in (False, True)}
    return Model(model_shape(lm), sizes, events)


def module_events(lm: Any, checkpointing: bool) -> Events:
    """Which module's weights are wanted when, in one forward and backward pass of a causal LM: by a forward on fakes.

    The backward pass goes the forward's way back. A checkpointed layer runs forward again as soon as its last weights
    are there, up to the last tensor that its backward pass needs (PyTorch stops the recomputation early).
    """
    seen: list[tuple[str, list[int], bool]] = []
    with FakeTensorMode():
        _fake(lm)
        number = {id(parameter): index for index, parameter in enumerate(lm.parameters())}

        def note(kind: str) -> Callable[..., None]:
            def hook(module: Any, *_: Any) -> None:
                own = [number[id(p)] for p in module._parameters.values() if p is not None]
                seen.append((kind, own, hasattr(module, "gradient_checkpointing") and not hasattr(module, "layers")))

            return hook

        for module in lm.modules():
            module.register_forward_pre_hook(note("fetch"))
            module.register_forward_hook(note("release"))
        lm(input_ids=torch.ones(1, 2, dtype=torch.int64), use_cache=False)

    def turned(events: Sequence[tuple[str, list[int], bool]]) -> list[tuple[str, list[int], bool]]:
        other = {"fetch": "release", "release": "fetch"}
        return [(other[kind], own, layer) for kind, own, layer in reversed(events)]

    back = turned(seen)
    edges = [index for index, (_, _, layer) in enumerate(back) if layer] if checkpointing else []
    for start, end in reversed(list(zip(edges[::2], edges[1::2]))):
        block = back[start : end + 1]
        again = turned(block)[1:]
        while again[-1][0] == "release":
            again.pop()
        first = next(index for index, (_, own, _) in enumerate(block) if own) + 1
        back[start : end + 1] = [*block[:first], *again, *block[first:]]
    return [(kind, own) for kind, own, _ in [*seen, *back]]


def gathers(events: Events, sizes: Sequence[int], zero: dict[str, Any]) -> list[list[int]]:
    """The all-gathers of one micro-batch under ZeRO-3: numbers of the tensors that each of them carries.

    Follows DeepSpeed 0.19 (`partitioned_param_coordinator.py`): weights are fetched for the module that needs them and,
    in the order of the first step, for the next ones up to the prefetch bucket; they are dropped behind a module, but
    for the small ones and for those that come again within the reuse distance.
    """
    window = {name: int(float(zero.get(name, default))) for name, default in WINDOW.items()}
    reuse, live, bucket, small = window.values()
    persistent = {number for number, size in enumerate(sizes) if size <= small}
    modules = [own for kind, own in events if kind == "fetch"]
    queue = deque((number, step) for step, own in enumerate(modules) for number in sorted(set(own)))
    there, fetched_for = set(persistent), defaultdict(lambda: -1)
    found: list[list[int]] = []
    gathered = step = 0
    for kind, own in events:
        if kind == "release":
            drop = {n for n in own if n not in persistent and fetched_for[n] <= step}
            passed = 0
            for later in modules[step:]:
                if passed >= reuse:
                    break
                drop -= set(later)
                passed += sum(sizes[n] for n in later)
            gathered -= sum(sizes[n] for n in drop & there)
            there -= drop
            continue
        now = [n for n in own if n not in there]
        gathered += sum(sizes[n] for n in now)
        expected = {n for n in own if fetched_for[n] < step}
        popped: set[int] = set()
        while queue and len(popped) < len(expected):
            number, fetched_for[number] = queue.popleft()
            popped.add(number)
        ahead: list[int] = []
        room = min(live - gathered, bucket)
        while queue and sum(sizes[n] for n in ahead) < room:
            number, use = queue.popleft()
            fetched_for[number] = max(fetched_for[number], use)
            if number not in there and number not in now and number not in ahead:
                ahead.append(number)
        gathered += sum(sizes[n] for n in ahead)
        there |= {*now, *ahead}
        found += [group for group in (now, ahead) if group]
        step += 1
    return found


def traffic(
    model: Model, zero: dict[str, Any], ranks: int, accumulation: int, train: Train
) -> tuple[list[Collective], list[Collective]]:
    """The collectives of one optimizer step in full training: during the passes, and after them.

    The two of a few bytes (loss and stop flag; the gradient's norm or overflow flag) count 8 bytes each.

    - stage 0, 1: one all-reduce of the gradients at the end of the accumulation; 2: one for each micro-batch (DeepSpeed
      sends ZeRO-2's buckets by all-reduce and keeps its part: twice the bytes of a reduce-scatter);
    - stage 1, 2: one all-gather of the updated weights;
    - stage 3: for each micro-batch the all-gathers of ``gathers`` and a reduce-scatter of the gradients; after the
      update the small weights that stay gathered, one by one.
    """
    if ranks == 1:
        return [], []
    stage, width = int(zero.get("stage", 0)), 4 if train.dtype == "float32" else 2
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    small = [Collective("all_reduce", 8, 2)]
    whole = sum(model.sizes)
    if stage < 3:
        reduced = accumulation if stage == 2 else 1
        buckets = math.ceil(whole / bucket)
        gradients = Collective("all_reduce", width * whole / buckets, buckets * reduced)
        # The flat weights are padded to a multiple of twice the ranks.
        flat = math.ceil(whole / (2 * ranks)) * 2 * ranks
        return [gradients], [*([Collective("all_gather", width * flat)] if stage else []), *small]

    def padded(numbers: Sequence[int]) -> int:
        return sum(math.ceil(model.sizes[n] / ranks) * ranks * width for n in numbers)

    threshold = int(zero.get("stage3_param_persistence_threshold", WINDOW["stage3_param_persistence_threshold"]))
    kept = [n for n, size in enumerate(model.sizes) if size <= threshold]
    groups = gathers(model.events[train.gradient_checkpointing], model.sizes, zero)
    buckets = math.ceil(whole / bucket)
    passes = [
        *(Collective("all_gather", padded(group), accumulation) for group in groups),
        Collective("reduce_scatter", padded(range(len(model.sizes))) / buckets, buckets * accumulation),
    ]
    return passes, [*(Collective("all_gather", padded([n])) for n in kept), *small]


def bytes_sent(collectives: Sequence[Collective], ranks: int) -> float:
    """Bytes that one rank sends in a step, on rings."""
    return sum(collective.sent(ranks) for collective in collectives)


@dataclass(frozen=True)
class Link:
    """Seconds of a collective = fastest protocol of latency + sent bytes / bandwidth (alpha-beta model)."""

    bandwidth: float
    """Bytes/s that a rank sends when all do (the `busbw` of nccl-tests)."""
    latency: Callable[[str, int], list[tuple[float, float]]]
    """(kind, ranks) -> for each protocol (seconds of an empty collective, share of the bandwidth)."""

    def seconds(self, collectives: Sequence[Collective], ranks: int) -> float:
        def one(collective: Collective) -> float:
            sent = collective.sent(ranks) / collective.calls
            return min(start + sent / share / self.bandwidth for start, share in self.latency(collective.kind, ranks))

        return sum(collective.calls * one(collective) for collective in collectives)


def nccl_latency(kind: str, ranks: int, of_a_node: int = 8) -> list[tuple[float, float]]:
    """Start-up of a ring in NCCL's own tuning model (`src/graph/tuning.cc`): (seconds, share of bandwidth).

    For its protocols LL, LL128 and Simple: base latency, and one hop over NVLink or the network for each step.
    """
    nodes = math.ceil(ranks / of_a_node)
    steps, across = PASSED[kind] * (ranks - 1), PASSED[kind] * (nodes - 1)
    protocols = [(3.6, 0.47 * (1.8 if nodes > 1 else 1), 2.7, 0.25), (10.0, 1.9, 4.0, 0.92), (8.4, 3.4, 9.6, 1.0)]
    return [((base + (steps - across) * near + across * far) * 1e-6, share) for base, near, far, share in protocols]


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step on one rank."""

    compute: float
    """Forward and backward passes, recomputation included."""
    passes: float
    """Communication during the passes."""
    after: float
    """Communication after them."""
    update: float
    """The optimizer, on this rank's share of the states."""

    @property
    def apart(self) -> float:
        """Nothing overlaps: so it is on CPU ranks, whose cores carry the bytes themselves."""
        return self.compute + self.passes + self.after + self.update

    @property
    def overlapped(self) -> float:
        """Communication hides behind the passes as far as they last: the best that prefetching can do."""
        return max(self.compute, self.passes) + self.after + self.update
