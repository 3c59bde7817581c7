"""The scaling model against what DeepSpeed really sends in a step on two ranks, collective by collective."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, succeed

from atlantis_ds.config.schema import Model, Train
from atlantis_ds.plan.trace import read_config

sys.path.insert(0, str(ROOT / "tools" / "bench"))
from scaling_model import Collective, nccl_latency, read_model, traffic

pytestmark = pytest.mark.ranks

RANKS = 2
# Smaller than the model, as DeepSpeed's own window is smaller than a large model: weights come and go.
WINDOW = {
    "stage3_max_live_parameters": 12000,
    "stage3_max_reuse_distance": 12000,
    "stage3_prefetch_bucket_size": 2500,
    "stage3_param_persistence_threshold": 100,
}
CASES: dict[str, tuple[int, dict[str, Any], int, bool]] = {
    "ZeRO-0": (0, {}, 2, False),
    "ZeRO-1": (1, {}, 2, False),
    "ZeRO-2": (2, {}, 2, False),
    "ZeRO-3": (3, {}, 2, False),
    "ZeRO-3, small window": (3, WINDOW, 1, False),
    "ZeRO-3, small window, accumulation": (3, WINDOW, 2, False),
    "ZeRO-3, small window, checkpointing": (3, WINDOW, 1, True),
}


@pytest.fixture(scope="module")
def counted(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Train, dict[str, Any]]]:
    """For each case its settings, and [calls, bytes] of each kind of collective in one step of two real ranks."""
    given, trains = [], []
    for number, (stage, window, accumulation, checkpointing) in enumerate(CASES.values()):
        config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        config["zero_optimization"] |= window
        file = tmp_path_factory.mktemp("ds") / f"{number}.json"
        file.write_text(json.dumps(config))
        settings = {"deepspeed": str(file), "dtype": "float32", "gradient_checkpointing": checkpointing}
        settings |= {"train_batch_size": 2 * RANKS * accumulation, "per_device_train_batch_size": 2}
        trains.append(Train(**settings))
        given.append({"model": str(base_model), "train": settings, "prompt": 6, "label": 3, "steps": 1})
    out = succeed(
        "torchrun", RANKS, str(ROOT / "tools" / "bench" / "scaling_rank.py"), "train", json.dumps(given), timeout=400
    )
    line = next(line for line in out.splitlines() if line.startswith("FOUND "))
    found = json.loads(line.removeprefix("FOUND "))
    return {name: (train, run["collectives"]) for name, train, run in zip(CASES, trains, found)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_collectives_and_bytes_are_those_of_a_real_step(case: str, counted: Any, base_model: Path) -> None:
    train, real = counted[case]
    model = read_model(read_config(Model(model_name_or_path=str(base_model))), train)
    zero = json.loads(Path(train.deepspeed).read_text())["zero_optimization"]
    passes, after = traffic(model, zero, RANKS, CASES[case][2], train)
    calls: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for collective in [*passes, *after]:
        calls[collective.kind] += collective.calls
        sizes[collective.kind] += round(collective.calls * collective.bytes)
    assert dict(calls) == {kind: count for kind, (count, _) in real.items()}
    # Flags and norms are a few bytes; all else must agree to the last one.
    assert {kind: pytest.approx(size, abs=16 if kind == "all_reduce" else 0) for kind, size in sizes.items()} == {
        kind: size for kind, (_, size) in real.items()
    }


def test_rings() -> None:
    assert Collective("all_gather", 800).sent(8) == 700
    assert Collective("all_reduce", 800, calls=2).sent(8) == 2 * 2 * 700
    assert Collective("reduce_scatter", 800).sent(1) == 0
    # A ring over 64 nodes of 8: 448 hops within nodes and 63 between them.
    simple, _ = nccl_latency("all_gather", 512)[2]
    assert simple == pytest.approx((8.4 + 448 * 3.4 + 63 * 9.6) * 1e-6)
