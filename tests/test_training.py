"""Training on real DeepSpeed ranks: gradients, invariance, resuming after a kill, and the models that come out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, TIMEOUT, WriteRecipe, events, in_process, launch, refuse, start, succeed

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.train.step import micro_batch_rows

pytestmark = pytest.mark.ranks

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden_losses.json"
STEPS = 60

FULL = {"train.num_train_epochs": 12, "train.save_steps": 7, "train.eval_steps": 10}
LORA = FULL | {"train.mode": "lora", "train.lora_r": 4, "train.lora_dropout": 0.1, "train.learning_rate": 1e-2}

QLORA = LORA | {"train.mode": "qlora", "train.deepspeed": str(ROOT / "ds_configs" / "zero2.json")}

# --- the gradient of a step


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradient_is_that_of_the_whole_batch_in_one_process(
    ranks: int, base_model: Path, encoder_decoder: Path, tmp_path: Path
) -> None:
    result = tmp_path / "errors.json"
    succeed("torchrun", ranks, TESTS / "ranks_probe.py", base_model, encoder_decoder, result)
    found = json.loads(result.read_text())
    assert len(found) == 4 * 4 + 4 + 2 + 6
    for case, errors in found.items():
        if case.startswith("clipping"):
            # Adam turns rounding of a gradient near 0 into a whole step of that weight: few weights, a small norm.
            assert errors["from clipped"] < 0.01 < 0.05 < errors["from free"], (case, errors)
        else:
            # The difference of two gradients carries the rounding of both.
            bound = 5e-5 if case.startswith("doubled") else 1e-5
            assert errors and max(errors.values()) < bound, (case, errors)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("count", [32, 27])
def test_ranks_get_as_many_rows_and_tokens(world_size: int, count: int) -> None:
    lengths = list(range(10, 10 + count))
    ranks = [Ranks(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    dealt = [micro_batch_rows(np.arange(count), lengths, 32, 2, each) for each in ranks]
    assert [[len(micro) for micro in batches] for batches in dealt] == [[2] * (16 // world_size)] * world_size
    assert sorted(row for batches in dealt for micro in batches for row, counts in micro if counts) == [*range(count)]
    tokens = [sum(lengths[row] for micro in batches for row, _ in micro) for batches in dealt]
    assert max(tokens) - min(tokens) <= (0 if count == 32 else 10)


# --- whole trainings through the command line

NewRun = Callable[[dict[str, Any]], tuple[Path, Path]]


@pytest.fixture(scope="module")
def new_run(tiny_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> NewRun:
    """A recipe with these changes and its run folder, which holds examples and weights, but no model yet."""
    template = tiny_recipe(tmp_path_factory.mktemp("scored"))
    in_process(template, "prepare", "score", "merge")

    def make(changes: dict[str, Any]) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("training")
        shutil.copytree(template.parent / "run", folder / "run")
        (folder / "run" / "log.jsonl").unlink()
        return tiny_recipe(folder, changes), folder / "run"

    return make


@pytest.fixture(scope="module")
def undisturbed(new_run: NewRun) -> Path:
    """Run folder of a whole training on 2 ranks, ZeRO-3, all weights."""
    recipe, run = new_run(FULL)
    succeed("torchrun", 2, "train", recipe)
    return run


def numbers(run: Path, key: str, first: int = 1) -> list[float]:
    """One value for each step from ``first`` on; of a step that ran twice, the last."""
    found = {event["step"]: event[key] for event in events(run, "train", "atlantis")}
    assert sorted(found) == list(range(1, STEPS + 1))
    return [found[step] for step in range(first, STEPS + 1)]


@pytest.mark.parametrize("micro", [8, 1])
def test_micro_batch_and_ranks_change_nothing(micro: int, new_run: NewRun, undisturbed: Path) -> None:
    """1 rank x 8 x 1 and 1 rank x 1 x 8 go the way of 2 ranks x 4 x 1."""
    recipe, run = new_run(FULL | {"train.per_device_train_batch_size": micro})
    job = start("local", 1, "train", recipe)
    job.kill_when(lambda: len(events(run, "train")) >= 15 and bool(events(run, "dev")))
    assert f"1 ranks x {8 // micro} micro-batches x {micro}" in job.text()
    for key in ("loss", "grad_norm", "learning_rate"):
        # Later, Adam has blown the rounding up.
        found = [event[key] for event in events(run, "train", "atlantis")[:15]]
        assert found == pytest.approx(numbers(undisturbed, key)[:15], rel=1e-5)
    dev = [event["loss"] for event in events(run, "dev")]
    assert dev[0] == pytest.approx(events(undisturbed, "dev")[0]["loss"], rel=1e-5)


def test_losses_are_the_committed_ones(undisturbed: Path) -> None:
    assert numbers(undisturbed, "loss")[:5] == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)


def test_schedule_and_log(undisturbed: Path) -> None:
    rates = numbers(undisturbed, "learning_rate")
    warm = round(0.2 * STEPS)
    assert rates[warm] == max(rates) == 2e-3
    assert rates[: warm + 1] == sorted(set(rates[: warm + 1])), "warm-up"
    assert rates[warm:] == sorted(set(rates[warm:]), reverse=True) and rates[-1] < 1e-5, "decay"
    losses = numbers(undisturbed, "loss")
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), "nothing was learnt"
    dev = {event["step"]: event["loss"] for event in events(undisturbed, "dev")}
    assert list(dev) == list(range(10, STEPS + 1, 10))
    summary = json.loads((undisturbed / "model" / "atlantis" / "training.json").read_text())
    assert dev[summary["best_step"]] == min(dev.values()) == summary["best_loss"]


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for path in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    logits = model(**tokenizer("A cat sat in the box.", return_tensors="pt")).logits
    assert logits.isfinite().all() and logits.std() > 0
    print(sum(parameter.double().square().sum().item() for parameter in model.parameters()))
assert not any(name.startswith("atlantis_ds") for name in sys.modules)
"""


def test_models_load_with_plain_transformers(undisturbed: Path, base_model: Path, tmp_path: Path) -> None:
    models = [base_model, *(undisturbed / "model" / "atlantis" / name for name in ("best", "last"))]
    env = {name: value for name, value in ENV.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", LOAD, *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(set(done.stdout.split())) >= 2, "the trained models are the base model"


# --- resuming


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def written(run: Path) -> list[Path]:
    """What stands in a run folder, less the claims: the next job takes down that of a killed one."""
    return sorted(path for path in run.rglob("*") if path.parent.name != "claims")


@pytest.mark.parametrize(
    "launcher, changes",
    [
        pytest.param("torchrun", FULL, id="full"),
        pytest.param("deepspeed", LORA, id="lora", marks=pytest.mark.slow),
        pytest.param("torchrun", QLORA, id="qlora", marks=pytest.mark.slow),
    ],
)
def test_killed_training_goes_on(
    launcher: str, changes: dict[str, Any], new_run: NewRun, request: pytest.FixtureRequest
) -> None:
    """kill -9 of all ranks, half-written checkpoints lying about: the losses and the model are the undisturbed ones."""
    if changes is FULL:
        expected = request.getfixturevalue("undisturbed")
    else:
        whole, expected = new_run(changes)
        succeed(launcher, 2, "train", whole)
    recipe, run = new_run(changes)
    start(launcher, 2, "train", recipe).kill_when(lambda: len(events(run, "train")) >= 17)
    assert len(events(run, "train")) < STEPS
    assert not (run / "model" / "atlantis" / "last").exists()

    checkpoints = run / "checkpoints" / "atlantis"
    saved = max(checkpoints.glob("step-*/COMPLETED")).parent
    step = int(saved.name.removeprefix("step-"))
    assert step in (7, 14, 21, 28, 35, 42, 49, 56)
    for name in ("step-00000059", ".step-00000058.tmp"):
        shutil.copytree(saved, checkpoints / name)
        (checkpoints / name / "COMPLETED").unlink()

    if launcher == "torchrun":  # refused before anything is loaded or written
        before = written(run)
        done = launch("local", 1, "train", recipe, "--set", "train.learning_rate=1e-3")
        refuse(done, str(saved), "other data or settings")
        assert written(run) == before
        damaged = max(saved.glob("*rank_1*"))
        whole_file = damaged.read_bytes()
        damaged.write_bytes(whole_file[:-100])
        done = launch(launcher, 2, "train", recipe)
        faults = [line for line in done.out.splitlines() if line.startswith("fault:")]
        assert done.code == 1 and len(faults) == 1 and f"{saved}: {damaged.name} has" in faults[0], done.out[-3000:]
        damaged.write_bytes(whole_file)

    seen = len(events(run, "train"))
    out = succeed(launcher, 2, "train", recipe)
    assert f"resuming from step {step}\n" in out
    assert [event["step"] for event in events(run, "train")[seen:]] == list(range(step + 1, STEPS + 1))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert numbers(run, key) == numbers(expected, key)
    for name in ("last", "best"):
        model = files(run / "model" / "atlantis" / name)
        assert model and model == files(expected / "model" / "atlantis" / name)
    again = succeed("local", 1, "train", recipe)
    assert "already finished" in again and len(events(run, "train")) == seen + STEPS - step


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_gradients_of_many_micro_batches_add_up_in_fp32(stage: int) -> None:
    """Two ranks with 64 examples a step. Added up in bf16, 32 micro-batches are 0.7% off, and 8 are 0.5%."""
    out = succeed("torchrun", 2, TESTS / "accumulation_probe.py", f"zero{stage}.json")
    few, many = sorted({float(off) for off in re.findall(r"OFF (\S+)", out)})
    assert many < 0.0035, (few, many)
