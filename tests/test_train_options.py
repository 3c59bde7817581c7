"""Early stopping and the profiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import WriteRecipe, events, succeed

from atlantis_ds import stages
from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.data.prepare import prepare
from atlantis_ds.errors import InputError
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.train.jobs import arm_job

UNIFORM = {"arms": {"sft": {"weights": {"formula": "uniform"}}}}


def test_a_training_ends_when_the_dev_loss_rises_and_is_profiled(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    changes = {
        **UNIFORM,
        "train.learning_rate": 0.05,
        "train.num_train_epochs": 40,
        "train.eval_steps": 2,
        "train.early_stopping_patience": 3,
        "train.profile_steps": 2,
    }
    recipe = tiny_recipe(tmp_path, changes)
    out = succeed("local", 1, "run", recipe)
    run = tmp_path / "run"
    losses = [(event["step"], event["loss"]) for event in events(run, "dev", "sft")]
    best = min(losses, key=lambda each: each[1])[0]
    summary = json.loads((run / "model" / "sft" / "training.json").read_text())
    assert summary["step"] == losses[-1][0] == best + 3 * 2 < 200
    assert f"ended after step {best + 6} of 200: lowest dev loss at {best}" in out
    trace = json.loads((run / "profile" / "sft" / "rank-0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"ProfilerStep#3", "ProfilerStep#4", "aten::mm"} <= names and "ProfilerStep#2" not in names
    assert "aten::mm" in (run / "profile" / "sft" / "rank-0.txt").read_text()
    # Finished, it is not trained again.
    assert "already finished" in succeed("local", 1, "train", recipe, "--arm", "sft")


def test_early_stopping_needs_dev_examples(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    rows = [{"text": f"sentence {at}", "label": "ab"[at % 2]} for at in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"task": "classification", "train": str(tmp_path / "train.jsonl")}
    recipe = load_recipe(tiny_recipe(tmp_path, {**UNIFORM, "data": data, "train.early_stopping_patience": 3}))
    run = Run(recipe, RunFolder(tmp_path / "run"), Ranks.alone())
    with pytest.raises(InputError, match=r"train\.early_stopping_patience: there are no dev examples"):
        stages._refuse_bad_arms(run, prepare(recipe, run.folder), force=False)


@pytest.mark.parametrize("patience", [None, 3])
def test_how_often_is_evaluated_counts_where_it_can_end_a_training(
    tiny_recipe: WriteRecipe, tmp_path: Path, patience: int | None
) -> None:
    marks = []
    for steps in (2, 3):
        train = {"train.early_stopping_patience": patience, "train.eval_steps": steps}
        recipe = load_recipe(tiny_recipe(tmp_path, {**UNIFORM, **train}))
        run = Run(recipe, RunFolder(tmp_path / "run"), Ranks.alone())
        examples = prepare(recipe, run.folder)
        marks.append(arm_job(run, examples, "sft", force=False).fingerprint(run, examples))
    assert (marks[0] == marks[1]) == (patience is None)
