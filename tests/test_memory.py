"""Memory is given back: after each job of a program nothing of it stays, whatever the ZeRO stage."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, WriteRecipe, succeed

TESTS = Path(__file__).parent
SETTINGS = [(stage, mode) for stage in (0, 2, 3) for mode in ("full", "lora")]


@pytest.fixture(scope="module")
def live(tiny_recipe: WriteRecipe, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Live bytes of rank 0 before and after each job, by stage and mode; all in one program of 2 ranks."""
    folder = tmp_path_factory.mktemp("memory")
    recipes = [
        tiny_recipe(
            folder / f"{stage}-{mode}",
            {
                "train.deepspeed": str(ROOT / "ds_configs" / f"zero{stage}.json"),
                "train.mode": mode,
                "train.num_train_epochs": 1,
            },
        )
        for stage, mode in SETTINGS
    ]
    out = succeed("torchrun", 2, TESTS / "memory_probe.py", *recipes, timeout=280)
    found = [json.loads(line) for line in re.findall(r"LIVE 0 (\[.*\])", out)]
    assert len(found) == len(SETTINGS)
    return dict(zip((f"zero{stage} {mode}" for stage, mode in SETTINGS), found))


@pytest.mark.parametrize("name", [f"zero{stage} {mode}" for stage, mode in SETTINGS])
def test_nothing_stays_after_a_job(name: str, live: dict[str, list[int]], base_model: Path) -> None:
    before, *after = live[name]
    model = (base_model / "model.safetensors").stat().st_size
    # A training holds its model four to eight times (weights, gradients, moments, master weights).
    assert max(after) - before < model / 4, (live[name], model)
