"""Steps without a finite loss or gradient are left out, counted, and end the run when there are too many."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import ROOT, WriteRecipe, events, in_process, launch, succeed
from safetensors.torch import load_file

from atlantis_ds.files import read_table, write_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def merged(tiny_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    recipe = tiny_recipe(folder)
    in_process(recipe, "prepare", "score", "merge")
    return folder / "run"


def spoilt(merged: Path, folder: Path, weight: float) -> str:
    """A copy of the run in which one example has such a weight; the id of that example."""
    shutil.copytree(merged, folder / "run")
    table, info = read_table(folder / "run" / "weights.parquet")
    weights = table["weight"].to_pylist()
    weights[7] = weight
    table = table.set_column(table.column_names.index("weight"), "weight", pa.array(weights))
    write_table(folder / "run" / "weights.parquet", table, info)
    return str(table["id"][7].as_py())


@pytest.mark.parametrize(
    ("stage", "dtype", "weight"),
    [
        # 1e300: the loss is finite in float64, the gradient overflows; nan: the loss is not finite, on one rank only.
        (0, "float32", 1e300),
        (1, "float32", float("nan")),
        (2, "float32", 1e300),
        (3, "float32", 1e300),
        (3, "bfloat16", float("nan")),
    ],
)
def test_spoilt_step_is_skipped_and_counted(
    stage: int, dtype: str, weight: float, merged: Path, tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"train.deepspeed": str(ROOT / "ds_configs" / f"zero{stage}.json"), "train.dtype": dtype}
    recipe = tiny_recipe(tmp_path, changes)
    bad = spoilt(merged, tmp_path, weight)
    succeed("local", 2, "train", recipe, "--arm", "atlantis", "--force")
    run = tmp_path / "run"
    skipped = events(run, "skipped")
    assert len(skipped) == 2 and all(bad in event["ids"] for event in skipped)  # once an epoch
    summary = json.loads((run / "model" / "atlantis" / "training.json").read_text())
    assert (summary["step"], summary["skipped"]) == (10, 2)
    others = [e for e in events(run, "train") if e["step"] not in {s["step"] for s in skipped}]
    assert len(others) == 8 and all(0 < e["loss"] < 1e4 and 0 < e["grad_norm"] < 1e6 for e in others)
    assert all(tensor.isfinite().all() for tensor in load_file(run / "model/atlantis/last/model.safetensors").values())


def test_too_many_in_a_row_end_the_run_at_the_last_good_checkpoint(
    merged: Path, tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, {"train.max_skipped_steps": 1, "train.save_steps": 1, "train.save_total_limit": 9})
    bad = spoilt(merged, tmp_path, float("nan"))
    done = launch("local", 2, "train", recipe, "--arm", "atlantis", "--force")
    assert done.code == 1 and "Traceback" not in done.out, done.out[-3000:]
    (skipped,) = events(tmp_path / "run", "skipped")
    assert skipped["step"] > 1, "choose another example: this one is in the first step"
    saved = tmp_path / "run" / "checkpoints" / "atlantis" / f"step-{skipped['step'] - 1:08d}"
    assert (saved / "COMPLETED").exists() and not list(saved.parent.glob(f"step-{skipped['step']:08d}"))
    said = next(line for line in done.out.splitlines() if line.startswith("fault: "))
    assert bad in said and f"last good checkpoint: {saved}" in said and "1 steps in a row" in said
