"""A few gold labels beside many others: the dev split in training (mixed in, at the end, alone), and in a reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import WriteRecipe, events, succeed

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.data.prepare import prepare
from atlantis_ds.errors import InputError
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.train.jobs import arm_job, reference_jobs
from atlantis_ds.train.step import Schedule, step_rows

UNIFORM = {"weights": {"formula": "uniform"}}
ARMS = {"mixed": {**UNIFORM, "dev": "mixed"}, "last": {**UNIFORM, "dev": "last"}, "alone": {"dev": "alone"}}


def test_a_schedule_ends_one_phase_before_it_begins_the_next() -> None:
    schedule = Schedule((10, 3), epochs=2, batch_size=4, seed=7)
    assert schedule.steps == (6, 2)
    rows = [schedule.rows(step) for step in range(8)]
    assert sorted(np.concatenate(rows[:3]).tolist()) == sorted(np.concatenate(rows[3:6]).tolist()) == list(range(10))
    assert sorted(rows[6].tolist()) == sorted(rows[7].tolist()) == [10, 11, 12]
    assert all((one == step_rows(10, 4, 7, step)).all() for step, one in enumerate(rows[:6]))
    assert [schedule.examples_seen(steps) for steps in (0, 3, 6, 7, 8)] == [0, 10, 20, 23, 26]


def test_arms_train_on_the_dev_split(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe_file = tiny_recipe(tmp_path, {"arms": {"sft": UNIFORM, **ARMS}, "data.noise": {"rate": 0.3}})
    recipe, folder = load_recipe(recipe_file), RunFolder(tmp_path / "run")
    run, examples = Run(recipe, folder, Ranks.alone()), prepare(recipe, folder)
    jobs = {arm: arm_job(run, examples, arm, force=False) for arm in recipe.arms}
    assert {arm: job.phases for arm, job in jobs.items()} == {
        "sft": (37,),
        "mixed": (43,),
        "last": (37, 6),
        "alone": (6,),
    }
    assert {arm: [(part.split, part.column) for part in job.parts] for arm, job in jobs.items()} == {
        "sft": [("train", "target")],
        "mixed": [("train", "target"), ("dev", "gold")],
        "last": [("train", "target"), ("dev", "gold")],
        "alone": [("dev", "gold")],
    }
    assert all(job.weights.tolist() == [1.0] * len(job) for job in jobs.values())
    assert len({job.fingerprint(run, examples) for job in jobs.values()}) == 4
    dev_ids = examples.dev.ids.to_pylist()
    assert jobs["mixed"].ids(examples, np.array([37, 42, 0])) == [dev_ids[0], dev_ids[5], examples.train.ids[0].as_py()]


@pytest.mark.ranks
def test_training_on_the_dev_split(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    """`last` is SFT to the last bit until the dev examples come, with a learning rate that begins anew; `alone` is the
    training of a reference on dev."""
    changes = {
        "arms": {"sft": UNIFORM, "last": ARMS["last"], "alone": ARMS["alone"], "weighted": {"dev": "mixed"}},
        "data.noise": {"rate": 0.3},
        "models.reference": {"kind": "finetuned", "on": "dev", "folds": 1},
    }
    succeed("local", 1, "run", tiny_recipe(tmp_path, changes))
    run = tmp_path / "run"
    sft, last, alone, reference = ([*events(run, "train", arm)] for arm in ("sft", "last", "alone", "reference"))
    assert (len(sft), len(last), len(alone)) == (10, 12, 2)
    assert [step["loss"] for step in last[:10]] == [step["loss"] for step in sft]
    assert last[10]["learning_rate"] == 2e-3 and last[9]["learning_rate"] < 1e-3
    assert [step["loss"] for step in alone] == [step["loss"] for step in reference]
    names = ("sft", "reference", "last", "alone", "weighted")
    assert [bool(events(run, "dev", arm)) for arm in names] == [True] + 4 * [False]  # none on rows that were trained on
    summary = json.loads((run / "model" / "weighted" / "training.json").read_text())
    assert summary["examples"] == 43 and summary["weights"]["ess_fraction"] > 0.45
    assert json.loads((run / "model" / "alone" / "training.json").read_text())["weights"] is None


def test_a_reference_on_both_has_the_dev_examples_in_every_fold(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    both = {"kind": "finetuned", "on": "both", "folds": 2}
    recipe = load_recipe(tiny_recipe(tmp_path, {"models.reference": both, "data.noise": {"rate": 0.3}}))
    folder = RunFolder(tmp_path / "run")
    examples = prepare(recipe, folder)
    jobs = reference_jobs(Run(recipe, folder, Ranks.alone()), examples)
    assert all([part.split for part in job.parts] == ["train", "dev"] for job in jobs)
    assert all(job.parts[1].rows.tolist() == list(range(6)) and len(job.weights) == len(job) for job in jobs)
    assert sum(len(job.parts[0].rows) for job in jobs) == 37


def rows_of(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize(
    "dev,said",
    [
        (None, "takes dev from train, where no gold label is known; set data.dev to a file with gold labels"),
        ([{"gold": "a"}, {}], "dev example 1 has no gold label, and 1 others have one"),
        ([{}, {}], ""),
        ([{"gold": "a"}, {"gold": "b"}], ""),
    ],
)
def test_dev_rows_must_have_gold_labels(
    tiny_recipe: WriteRecipe, tmp_path: Path, dev: list[dict[str, str]] | None, said: str
) -> None:
    train = [{"text": f"sentence {at}", "label": "ab"[at % 2]} for at in range(20)]
    data = {"task": "classification", "train": rows_of(tmp_path / "train.jsonl", train)}
    if dev:
        named = [{"id": str(at), "text": f"other {at}", "label": "b", **row} for at, row in enumerate(dev)]
        data["dev"] = rows_of(tmp_path / "dev.jsonl", named)
    changes = {
        "data": data if dev else {**data, "dev_size": 4},
        "models.reference": {"kind": "finetuned", "on": "dev", "folds": 1},
        "arms": {"a": ARMS["alone"]},
    }
    recipe, folder = load_recipe(tiny_recipe(tmp_path, changes)), RunFolder(tmp_path / "run")
    run, examples = Run(recipe, folder, Ranks.alone()), prepare(recipe, folder)
    for key, jobs in (
        ("models.reference.on: dev", lambda: reference_jobs(run, examples)),
        ("arms.a.dev", lambda: [arm_job(run, examples, "a", False)]),
    ):
        if said:
            with pytest.raises(InputError, match=f"{key}: .*{said}"):
                jobs()
        else:
            (part,) = jobs()[0].parts
            assert part.column == ("gold" if dev and "gold" in dev[0] else "target")
