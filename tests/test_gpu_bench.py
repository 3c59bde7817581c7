"""`tools/bench/gpu.py` on tiny shapes: all its measurements run, and one that fails does not end the others."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Job

sys.path.insert(0, str(ROOT / "tools" / "bench"))
from gpu import Bench, needed
from gpu_train import LeftOut

from atlantis_ds.lm.size import Shape


def _bench(out: Path) -> Any:
    bench = Bench.__new__(Bench)  # without ranks
    bench.options = argparse.Namespace(only="", minutes=1, tiny=True, out=out)
    bench.begun, bench.device, bench.peak, bench.rows = time.monotonic(), torch.device("cpu"), 100.0, []
    return bench


def test_a_measurement_that_fails_is_a_row_that_says_so(tmp_path: Path) -> None:
    bench = _bench(tmp_path / "bench.json")

    def fail(error: Exception) -> Any:
        raise error

    bench.row("large", lambda: fail(torch.OutOfMemoryError("CUDA out of memory")))
    bench.row("odd", lambda: fail(RuntimeError("no\nkernel")))
    bench.row("small card", lambda: fail(LeftOut("plan expects more than 20 GiB")))
    bench.row("good", lambda: {"flops": 60.0, "tokens_per_s": 5.0})
    bench.options.minutes = 0
    bench.row("late", lambda: fail(AssertionError("it must not run")))
    notes = {row["name"]: row.get("note") for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert notes == {
        "large": "out of memory",
        "odd": "failed: RuntimeError: no kernel",
        "small card": "left out: plan expects more than 20 GiB",
        "good": None,
        "late": "left out: no time",
    }
    assert "| good | 5 |  | 6e-11 | 60% |" in bench.table()


def test_operations_that_are_needed() -> None:
    """Two a weight and token: the prompt once, the labels' own tokens, and every target through the head."""
    sizes = {"parameters": 0, "trainable": 0, "largest": 0, "linear": 0, "largest_linear": 0}
    causal = Shape(body=1000, decoder=0, head=10, **sizes)
    assert needed(causal, 20, [3, 5]) == 2 * (1000 * (20 + 3 + 5) + 10 * (4 + 6))
    both = Shape(body=1000, decoder=100, head=10, **sizes)
    assert needed(both, 20, [3, 5]) == 2 * (1000 * 20 + 110 * (4 + 6))


@pytest.mark.slow
def test_all_measurements_on_tiny_shapes(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, str(ROOT / "tools" / "bench" / "gpu.py"), "--tiny", "--out", str(out)]
    done = Job([*command, "--minutes", "15"]).wait(900)
    assert done.code == 0, done.out[-3000:]
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    for name in (
        *(f"{shape}: {what}" for shape in ("Qwen2-1.5B", "Qwen2-7B", "flan-t5-base") for what in ("score", "rank")),
        *(
            f"{job}{whose}"
            for job in ("Qwen2-1.5B: full", "Qwen2-7B: lora", "Qwen2-7B: qlora")
            for whose in ("", ", Trainer")
        ),
    ):
        assert "note" not in rows[name], rows[name]
        assert rows[name]["tokens_per_s"] > 0 and rows[name]["share"] > 0, rows[name]
    assert rows["Qwen2-7B: qlora"]["times_trainer"] > 0
    assert "| Qwen2-7B: lora, Trainer |" in done.out
