"""Jobs for the Kubeflow Trainer: checked by its own models, and run here as its pods would run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ENV, WriteRecipe, events, succeed
from kubeflow_trainer_api import models
from services import wait_for

from atlantis_ds.cluster.ranks import free_port

pytestmark = pytest.mark.ranks

NEEDED = ("--image", "registry.example/atlantis:1", "--claim", "data")


def job_of(recipe: Path, *words: object) -> list[dict[str, object]]:
    return list(yaml.safe_load_all(succeed("local", 1, "kubeflow", recipe, *NEEDED, *words)))


def test_the_job_is_one_of_the_kubeflow_api(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, {"name": "My.run_2"})
    recipe_map, runtime, job = job_of(recipe, "--nodes", 4, "--gpus-per-node", 8, "--set", "seed=9", "--compare")
    for model, made in (
        (models.TrainerV1alpha1TrainingRuntime, runtime),
        (models.TrainerV1alpha1TrainJob, job),
        (models.JobsetV1alpha2JobSetSpec, runtime["spec"]["template"]["spec"]),  # type: ignore[index]
    ):
        # What the API does not know, or knows by another type, does not come back.
        assert model.from_dict(made).to_dict() == made
    assert {made["metadata"]["name"] for made in (recipe_map, runtime, job)} == {"my-run-2"}  # type: ignore[index]
    assert yaml.safe_load(recipe_map["data"]["recipe.yaml"])["seed"] == 9  # type: ignore[index]
    text = json.dumps(runtime)
    assert '"compare", "/recipe/recipe.yaml", "--ranks", "8"' in text and '"numNodes": 4' in text
    assert '"nvidia.com/gpu": "8"' in text and '"values": [75]' in text
    assert "nvidia" not in json.dumps(job_of(recipe, "--gpus-per-node", 0))


def pods(recipe: Path, ranks: int) -> list[subprocess.Popen[bytes]]:
    """Two pods of one job, as the Trainer starts them."""
    place = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    words = [sys.executable, "-m", "atlantis_ds", "run", str(recipe), "--ranks", str(ranks)]
    with recipe.with_suffix(".log").open("ab") as log:
        return [
            subprocess.Popen(words, env={**ENV, **place, "PET_NODE_RANK": str(pod)}, stdout=log, stderr=log)
            for pod in range(2)
        ]


def test_pods_meet_and_a_stopped_job_goes_on(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    changes = {"arms": {"sft": {"weights": {"formula": "uniform"}}}, "train.num_train_epochs": 12}
    recipe, run = tiny_recipe(tmp_path, changes), tmp_path / "run"
    codes = []
    for attempt in range(2):
        started = pods(recipe, 1)
        try:
            if attempt == 0:
                wait_for(
                    lambda: len(events(run, "train", "sft")) > 3, 120, lambda: recipe.with_suffix(".log").read_text()
                )
                for pod in started:  # as Kubernetes takes a pod from its node
                    os.kill(pod.pid, signal.SIGTERM)
            codes.append([pod.wait(120) for pod in started])
        finally:
            for pod in started:
                pod.kill()
    log = recipe.with_suffix(".log").read_text()
    assert codes == [[75, 75], [0, 0]], log[-4000:]
    assert "(2 ranks x 1 micro-batches x 4)" in log and "resuming from step" in log
    steps = [event["step"] for event in events(run, "train", "sft")]
    assert sorted(steps) == list(range(1, 61))
    assert (run / "eval" / "sft" / "metrics.json").is_file()


@pytest.mark.parametrize(
    "place,said",
    [
        ({"PET_NNODES": "2"}, "PET_NNODES is set, but not PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT"),
        (
            {"PET_NNODES": "1:4", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "1"},
            "PET_NNODES and PET_NODE_RANK must be whole numbers",
        ),
    ],
)
def test_a_place_that_is_half_told_is_refused(
    tiny_recipe: WriteRecipe, tmp_path: Path, place: dict[str, str], said: str
) -> None:
    words = [sys.executable, "-m", "atlantis_ds", "prepare", str(tiny_recipe(tmp_path))]
    done = subprocess.run(words, env={**ENV, **place}, capture_output=True, text=True, timeout=180)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
