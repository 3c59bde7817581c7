"""The figures of a run in trackers: read back from what TensorBoard and MLflow keep on disk."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRecipe, events, launch, refuse, succeed

from atlantis_ds import trackers
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.config.schema import Recipe
from atlantis_ds.run_folder import RunFolder

UNIFORM = {"weights": {"formula": "uniform"}}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder of event files: (step, value) of each tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    tags = found.Tags()
    assert "recipe/text_summary" in tags["tensors"]
    values = {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in tags["scalars"]}
    return values | {f"picture {tag}": [] for tag in tags["images"]}


@pytest.mark.ranks
def test_a_run_stands_in_tensorboard_and_mlflow_as_in_the_log(
    tiny_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    changes = {"report_to": ["tensorboard", "mlflow"], "arms": {"sft": UNIFORM, "atlantis": {}}}
    store = f"file:{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    done = launch(
        "local",
        1,
        "run",
        tiny_recipe(tmp_path, changes),
        env={"MLFLOW_TRACKING_URI": store, "MLFLOW_ALLOW_FILE_STORE": "true"},
    )
    assert done.code == 0 and "report_to" not in done.out, done.out[-3000:]
    run, client = tmp_path / "run", MlflowClient(store)
    experiment = client.get_experiment_by_name("run")
    assert experiment is not None
    kept = {one.info.run_name: one for one in client.search_runs([experiment.experiment_id])}
    assert set(kept) == {"sft", "atlantis", "weights"} == {path.name for path in (run / "tensorboard").iterdir()}
    for arm in ("sft", "atlantis"):
        losses = [(event["step"], event["loss"]) for event in events(run, "train", arm)]
        shown, client_id = scalars(run / "tensorboard" / arm), kept[arm].info.run_id
        assert shown["train/loss"] == [(step, pytest.approx(loss)) for step, loss in losses] and len(losses) == 10
        assert [(one.step, one.value) for one in client.get_metric_history(client_id, "train/loss")] == losses
        metrics = json.loads((run / "eval" / arm / "metrics.json").read_text())
        assert kept[arm].data.metrics["evaluation/macro_f1"] == metrics["macro_f1"]
        assert kept[arm].data.params["train.learning_rate"] == "0.002"
        assert "picture evaluation" in shown and len(shown["dev/loss"]) == 2
    weights = json.loads((run / "weights.json").read_text())
    assert kept["weights"].data.metrics["weights/ess_fraction"] == weights["ess_fraction"]
    assert [file.path for file in client.list_artifacts(kept["weights"].info.run_id)] == ["weights.png"]


@pytest.fixture
def recipe(tiny_recipe: WriteRecipe, tmp_path: Path) -> Recipe:
    return load_recipe(tiny_recipe(tmp_path, {"report_to": ["tensorboard"]}))


def tell(folder: RunFolder, recipe: Recipe, first: int, last: int, **more: Any) -> None:
    """What a training says that begins, or goes on, after step ``first``."""
    trackers.tell_trackers(folder, recipe, {"event": "start", "arm": "sft", "step": first})
    for step in range(first + 1, last + 1):
        trackers.tell_trackers(folder, recipe, {"event": "train", "arm": "sft", "step": step, "loss": 1 / step, **more})
    trackers.close_trackers()


def test_a_job_that_goes_on_adds_to_the_same_run(recipe: Recipe, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    tell(folder, recipe, 0, 8)
    first = (folder.root / "trackers.json").read_text()
    tell(folder, recipe, 5, 10)  # the last checkpoint was of step 5: steps 6 to 8 are done again
    assert (folder.root / "trackers.json").read_text() == first
    shown = scalars(folder.root / "tensorboard" / "sft")
    assert shown["train/loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 11)]


class Broken:
    def __init__(self, *_: Any) -> None:
        self.told = 0

    def figures(self, step: int | None, values: dict[str, float]) -> None:
        self.told += 1
        if self.told > 2:
            raise ConnectionError("the server is gone")

    def picture(self, name: str, path: Path) -> None:
        pass

    def close(self) -> None:
        pass


class Stuck(Broken):
    def figures(self, step: int | None, values: dict[str, float]) -> None:
        import time

        time.sleep(3600)


@pytest.mark.parametrize("kind", [Broken, Stuck])
def test_a_tracker_that_fails_or_hangs_holds_nothing_up(
    kind: type, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers._TRACKERS, "tensorboard", kind)
    monkeypatch.setattr(trackers, "WAIT", 0.2)
    monkeypatch.setattr(trackers, "BEHIND", 50)
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    tell(folder, recipe, 0, 200)
    said = capsys.readouterr().out
    assert ("tensorboard failed and gets no more figures (ConnectionError: the server is gone)" in said) == (
        kind is Broken
    )


@pytest.mark.ranks
def test_a_tracker_that_is_not_installed_is_refused_at_once(
    tiny_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, {"report_to": ["trackio"]})
    refuse(launch("local", 1, "check", recipe), "report_to: trackio is not installed: pip install trackio")
    succeed("local", 1, "check", tiny_recipe(tmp_path, {"report_to": []}))


def test_jobs_that_begin_at_one_time_have_one_id(tmp_path: Path) -> None:
    folder, start = RunFolder(tmp_path), threading.Barrier(8)

    def begin(_: int) -> str:
        start.wait()
        return trackers._run_id(folder)

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(begin, range(8)))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["trackers.json"]
