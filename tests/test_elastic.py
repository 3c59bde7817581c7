"""Training goes on with another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, WriteRecipe, start, succeed
from test_preemption import losses, stop_when

pytestmark = pytest.mark.slow

CASES = {
    "2 to 1, ZeRO-3": (2, 1, {}),
    "1 to 2, ZeRO-3": (1, 2, {}),
    "2 to 3, ZeRO-3": (2, 3, {}),
    "2 to 1, ZeRO-2": (2, 1, {"train.deepspeed": str(ROOT / "ds_configs" / "zero2.json")}),
    "2 to 3, ZeRO-1": (2, 3, {"train.deepspeed": str(ROOT / "ds_configs" / "zero1.json")}),
    "1 to 2, ZeRO-0": (1, 2, {"train.deepspeed": str(ROOT / "ds_configs" / "zero0.json")}),
    "2 to 1, LoRA": (2, 1, {"train.mode": "lora"}),
    "2 to 3, bf16": (2, 3, {"train.dtype": "bfloat16"}),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_follow_on_another_number_of_ranks(case: str, tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    before, after, options = CASES[case]
    changes: dict[str, Any] = {"train.num_train_epochs": 8, "train.save_steps": 10**6, **options}
    recipe, undisturbed = tiny_recipe(tmp_path / "a", changes), tiny_recipe(tmp_path / "b", changes)
    run = tmp_path / "a" / "run"
    for path in (recipe, undisturbed):
        succeed("local", 1, "prepare", path)
    succeed("local", before, "train", undisturbed, "--arm", "sft")
    stop_when(start("local", before, "train", recipe, "--arm", "sft"), run, "train", 9, "SIGTERM")
    stopped = len(losses(run))
    out = succeed("local", after, "train", recipe, "--arm", "sft")
    assert f"going on from step {stopped}" in out
    found, expected = losses(run), losses(tmp_path / "b" / "run")
    assert len(found) == len(expected) == 40
    tolerance = 2e-2 if "bf16" in case else 1e-4
    assert found == pytest.approx(expected, rel=tolerance)
    assert found[:stopped] == expected[:stopped]
