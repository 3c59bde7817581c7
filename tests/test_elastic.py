"""Training goes on with another number of ranks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, WriteRecipe, events, in_process, launch, losses, refuse, start, stop_when, succeed

pytestmark = pytest.mark.slow

STOP_AFTER, STEPS = 9, 40


def config(name: str) -> dict[str, str]:
    return {"train.deepspeed": str(ROOT / "ds_configs" / f"{name}.json")}


MODES: dict[str, dict[str, Any]] = {
    "ZeRO-0": config("zero0"),
    "ZeRO-1": config("zero1"),
    "ZeRO-2": config("zero2"),
    "ZeRO-3": config("zero3"),
    "LoRA, ZeRO-2": {"train.mode": "lora", **config("zero2")},
    "LoRA, ZeRO-3": {"train.mode": "lora", **config("zero3")},
    "bf16, ZeRO-0": {"train.dtype": "bfloat16", **config("zero0")},
    "bf16, ZeRO-2": {"train.dtype": "bfloat16", **config("zero2")},
    "bf16, ZeRO-3": {"train.dtype": "bfloat16", **config("zero3")},
    "QLoRA, ZeRO-2": {"train.mode": "qlora", **config("zero2")},
    "offload, ZeRO-2": config("zero2_offload"),
    "offload, ZeRO-3": config("zero3_offload"),
}


def recipe_of(mode: str, tiny_recipe: WriteRecipe, folder: Path, **more: Any) -> Path:
    return tiny_recipe(folder, {"train.num_train_epochs": 8, "train.save_steps": 10**6, **MODES[mode], **more})


def stopped_run(recipe: Path, ranks: int) -> int:
    """Prepare, train on so many ranks and stop on the way; the number of steps done."""
    in_process(recipe, "prepare")
    run = recipe.parent / "run"
    stop_when(start("local", ranks, "train", recipe, "--arm", "sft"), run, "train", STOP_AFTER, "SIGTERM")
    return len(losses(run))


SLOW = ("ZeRO-1", "LoRA, ZeRO-2", "bf16, ZeRO-0", "bf16, ZeRO-2", "offload, ZeRO-2")
"""Near to one that is not."""


@pytest.mark.parametrize("mode", [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in MODES])
def test_losses_follow_on_another_number_of_ranks(mode: str, tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    undisturbed = recipe_of(mode, tiny_recipe, tmp_path / "undisturbed")
    in_process(undisturbed, "prepare")
    succeed("local", 2, "train", undisturbed, "--arm", "sft")
    expected = losses(tmp_path / "undisturbed" / "run")
    for before, afters in ((2, (1, 3)), (1, (2,))):
        stopped = tmp_path / f"stopped-{before}"
        step = stopped_run(recipe_of(mode, tiny_recipe, stopped), before)
        for after in afters:
            recipe = recipe_of(mode, tiny_recipe, tmp_path / f"{before}-to-{after}")
            run = recipe.parent / "run"
            shutil.copytree(stopped / "run", run)
            (run / "checkpoints" / "sft" / ".step-00000001.universal").mkdir()  # left by a job that died
            out = succeed("local", after, "train", recipe, "--arm", "sft")
            assert f"resuming from step {step}" in out
            found = losses(run)
            assert len(found) == len(expected) == STEPS
            assert found == pytest.approx(expected, rel=2e-2 if "bf16" in mode else 1e-4), (before, after)
            assert not (run / "checkpoints" / "sft").exists()


def change_adam_states(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the optimizer state of each rank (and parameter group) in a checkpoint, as if it was saved like that."""
    info = json.loads((checkpoint / "COMPLETED").read_text())
    for file in checkpoint.glob("*optim_states.pt"):
        saved = torch.load(file, weights_only=False)
        base = saved["optimizer_state_dict"]
        base = base.get("optimizer_state_dict") or base["base_optimizer_state"]
        for state in base["state"].values():
            change(state)
        torch.save(saved, file)
        info["files"][file.name] = file.stat().st_size
    (checkpoint / "COMPLETED").write_text(json.dumps(info))


def test_moments_that_do_not_come_back_are_noticed(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    """As in DeepSpeed#6691: everything loads, but the optimizer starts from nothing."""
    recipe = recipe_of("ZeRO-3", tiny_recipe, tmp_path)
    step = stopped_run(recipe, 2)
    checkpoint = tmp_path / "run" / "checkpoints" / "sft" / f"step-{step:08d}"
    shutil.copytree(checkpoint, tmp_path / "good")
    for moment in ("exp_avg", "exp_avg_sq"):
        shutil.rmtree(checkpoint)
        shutil.copytree(tmp_path / "good", checkpoint)
        change_adam_states(checkpoint, lambda state: state[moment].zero_())  # noqa: B023
        done = launch("local", 1, "train", recipe, "--arm", "sft")
        assert done.code == 1 and "DeepSpeed did not load all of it" in done.out, done.out[-3000:]
    assert len(losses(tmp_path / "run")) == step


@pytest.mark.parametrize("mode", ["ZeRO-3", "LoRA, ZeRO-2"])
def test_what_cannot_be_converted_is_refused_and_its_weights_start_again(
    mode: str, tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = recipe_of(mode, tiny_recipe, tmp_path, **{"train.eval_steps": 1})
    step = stopped_run(recipe, 2)
    run = tmp_path / "run"

    def as_8_bit(state: dict[str, Any]) -> None:  # the names of bitsandbytes' 8-bit AdamW
        state["state1"], state["state2"] = state.pop("exp_avg"), state.pop("exp_avg_sq")

    change_adam_states(run / "checkpoints" / "sft" / f"step-{step:08d}", as_8_bit)
    refused = launch("local", 1, "train", recipe, "--arm", "sft")
    refuse(refused, "saved by 2 ranks, this job has 1", "start the job with 2 ranks")
    assert [path.name for path in (run / "checkpoints" / "sft").glob("*step*")] == [f"step-{step:08d}"]

    offered = re.findall(r"`([^`]+)`", refused.out)
    assert len(offered) == 4, offered
    export, remove, _, change = (words.replace("OUT", str(tmp_path / "out")).split() for words in offered)
    succeed("local", 1, *[recipe if word == "RECIPE" else word for word in export[1:]])
    subprocess.run(remove, check=True)
    succeed("local", 1, "train", recipe, "--arm", "sft", *change)
    dev = [event["loss"] for event in events(run, "dev")]
    assert len(dev) == step + STEPS
    # The learning rate of the first step is 0, so it shows the weights that were exported.
    assert dev[step] == pytest.approx(dev[step - 1], rel=1e-5) and dev[step - 1] < dev[0] - 0.1 and dev[-1] < dev[step]
