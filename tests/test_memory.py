"""Memory is given back: after each job of a program nothing of it stays, whatever the ZeRO stage."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ENV, ROOT, WriteRecipe, succeed

pytestmark = pytest.mark.ranks

TESTS = Path(__file__).parent
SETTINGS = ["zero0 full", "zero2 lora", "zero3 full", "zero3 lora"]
SLOW = ["zero0 lora", "zero2 full"]

Live = Callable[[list[str]], dict[str, list[int]]]


@pytest.fixture(scope="module")
def live(tiny_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> Live:
    """Live bytes of rank 0 before and after each job, for these settings; all in one program of 2 ranks."""
    folder = tmp_path_factory.mktemp("memory")
    known: dict[str, list[int]] = {}

    def measure(names: list[str]) -> dict[str, list[int]]:
        if not known.keys() >= set(names):
            recipes = [
                tiny_recipe(
                    folder / name,
                    {
                        "train.deepspeed": str(ROOT / "ds_configs" / f"{name.split()[0]}.json"),
                        "train.mode": name.split()[1],
                        "train.num_train_epochs": 1,
                    },
                )
                for name in names
            ]
            out = succeed("torchrun", 2, TESTS / "memory_probe.py", *recipes, timeout=280)
            found = [json.loads(line) for line in re.findall(r"LIVE 0 (\[.*\])", out)]
            known.update(zip(names, found, strict=True))
        return known

    return measure


@pytest.mark.parametrize("name", [*SETTINGS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_nothing_stays_after_a_job(name: str, live: Live, base_model: Path) -> None:
    before, *after = live(SLOW if name in SLOW else SETTINGS)[name]
    model = (base_model / "model.safetensors").stat().st_size
    # A training holds its model four to eight times (weights, gradients, moments, master weights).
    assert max(after) - before < model / 4, (before, after, model)


@pytest.fixture(scope="module")
def larger(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 27 million weights: its training takes four times 107 MB."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("larger")
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_four_seeds_take_the_memory_of_one(stage: int, larger: Path, tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    model = {"model_name_or_path": str(larger)}
    peaks = []
    for seeds in ([1], [1, 2, 3, 4]):
        changes = {
            "models": {"large": model, "small": model, "reference": {"kind": "checkpoint", **model}},
            "train.deepspeed": str(ROOT / "ds_configs" / f"zero{stage}.json"),
            "train.num_train_epochs": 1,
            "seeds": seeds,
        }
        recipe = tiny_recipe(tmp_path / str(len(seeds)), changes)
        command = [sys.executable, "-m", "atlantis_ds", "compare", str(recipe)]
        env = ENV | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # freed memory goes back at once
        running = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, code, usage = os.wait4(running.pid, 0)
        assert code == 0
        peaks.append(usage.ru_maxrss / 1024)
    print(f"zero{stage}: one seed {peaks[0]:.0f} MiB, four seeds {peaks[1]:.0f} MiB")
    assert peaks[1] < 1.1 * peaks[0]
