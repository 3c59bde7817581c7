"""``atlantis-ds compare --dry-run``: lists the training runs of a comparison, with time and memory."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from atlantis_ds.bundled import bundled, find
from atlantis_ds.config.schema import Recipe
from atlantis_ds.plan.plan import GPUS, UTILISATION, estimate
from atlantis_ds.progress import console
from atlantis_ds.run_folder import RunFolder


def show_trainings(recipe: Recipe, folder: RunFolder, gpus: int, gpu: str) -> None:
    """Print the stages and training runs of `compare`, how many are finished, and the remaining hours.

    Whether a finished run was made with exactly this recipe is checked when `compare` runs.

    Raises:
        InputError: an unknown kind of GPU, or a model without a readable config.
    """
    result = estimate(recipe, folder, gpus, gpu)
    hours = {stage["what"]: stage["hours"] for stage in result["hours"]}
    rows = _rows(recipe, folder, hours)
    table = Table("what", "finished", "left", "hours left")
    for what, finished, left, each in rows:
        table.add_row(what, str(finished), str(left), f"{left * each:.2f}")
    console.print(table)
    total = sum(left * each for _, _, left, each in rows)
    console.print(f"about {total:.2f} hours on {gpus} x {gpu}, at {UTILISATION:.0%} of the bf16 peak (assumed)")
    console.print(_memory(recipe, result))


def _rows(recipe: Recipe, folder: RunFolder, hours: dict[str, float]) -> list[tuple[str, int, int, float]]:
    """Rows: name, number finished, number left, and the hours of one."""
    rows = []
    if recipe.weighted:
        weighed = int(folder.weights_info.exists())
        if recipe.models.reference.kind == "finetuned":
            rows.append(("train reference, all folds and rounds", weighed, 1 - weighed, hours["reference"]))
        rows.append(("score", weighed, 1 - weighed, hours["score"]))
    of_arm = hours["train"] + hours.get("evaluate", 0.0)
    for arm in recipe.arms:
        names = [f"{arm}-seed{seed}" for seed in recipe.seeds]
        finished = sum((folder.evaluation(name) / "metrics.json").exists() for name in names)
        rows.append((f"train and evaluate {arm}, {len(names)} seeds", finished, len(names) - finished, of_arm))
    return rows


def _memory(recipe: Recipe, result: dict[str, Any]) -> str:
    """The plan for the recipe's own mode and DeepSpeed config."""
    train, size = recipe.train, GPUS[result["gpu"]]
    config = find("ds_configs", train.deepspeed, "train.deepspeed").resolve()
    for row in result["modes"]:
        if row["mode"] == train.mode and bundled("ds_configs", row["deepspeed"]).resolve() == config:
            return (
                f"training, {train.mode} with {row['deepspeed']}: {row['total']:.1f} GiB per GPU, which has {size} GB"
            )
    return f"training: {train.deepspeed} is your own config, so its memory is not estimated; see `plan`"
