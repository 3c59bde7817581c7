"""Sends figures to TensorBoard, Weights & Biases, MLflow or Trackio, as named in ``report_to``.

Each training is a separate run there, and so are the weights. The id of the run is in the run folder, so that a job
that resumes adds to the same run. Each tracker has its own thread: its errors and delays do not affect training. After
it has failed, it gets no more figures.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from atlantis_ds.config.schema import Recipe
from atlantis_ds.errors import InputError
from atlantis_ds.files import read_json, write_json
from atlantis_ds.progress import console
from atlantis_ds.run_folder import RunFolder

TOLD = ("start", "train", "dev", "evaluation", "weights")
"""Events of ``log.jsonl`` that trackers get."""
WAIT = 30
"""Seconds that a tracker has to send the rest when the job ends."""
BEHIND = 10_000
"""Most figures that wait for a tracker; it loses any beyond that. ``log.jsonl`` has all."""


class Tracker(Protocol):
    """One run in one tracker."""

    def figures(self, step: int | None, values: dict[str, float]) -> None:
        """Figures of an optimizer step, or of the whole run."""

    def picture(self, name: str, path: Path) -> None:
        """A PNG."""

    def close(self) -> None:
        """Send the rest."""


def refuse_missing_trackers(recipe: Recipe) -> None:
    """Raises:
    InputError: the recipe reports to a tracker that is not installed.
    """
    for name in recipe.report_to:
        if find_spec(name) is None:
            raise InputError(f"report_to: {name} is not installed: pip install {name}")


def tell_trackers(folder: RunFolder, recipe: Recipe, event: dict[str, Any]) -> None:
    """Send an event of ``log.jsonl`` to the trackers of its arm, which are opened at the first event."""
    if event["event"] not in TOLD:
        return
    name = event.get("arm") or event["event"]
    for tracker in recipe.report_to:
        key = (folder.root, tracker, name)
        if key not in _senders:
            about = (folder, recipe, name, f"{_run_id(folder)}-{name}", event.get("step") or 0)
            _senders[key] = _Sender(tracker, partial(_TRACKERS[tracker], *about))
        _senders[key].send(event)


def close_trackers() -> None:
    """Let all trackers send the rest, for at most ``WAIT`` seconds."""
    for sender in _senders.values():
        sender.send(None)
    end = time.monotonic() + WAIT
    for sender in _senders.values():
        sender.thread.join(max(0.0, end - time.monotonic()))
    _senders.clear()


def _run_id(folder: RunFolder) -> str:
    path = folder.root / "trackers.json"
    if not path.exists():
        mine = uuid.uuid4().hex[:12]
        own = path.with_name(f".trackers.{mine}.json")
        write_json(own, {"id": mine})
        with contextlib.suppress(FileExistsError):  # if several jobs start at the same time, the first one wins
            os.link(own, path)
        own.unlink()
    return str(read_json(path)["id"])


class _Sender:
    """A tracker's thread and its queue."""

    def __init__(self, name: str, opener: Callable[[], Tracker]) -> None:
        self.name = name
        self.waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(BEHIND)
        self.thread = threading.Thread(target=self._work, args=(opener,), daemon=True, name=f"report to {name}")
        self.thread.start()

    def send(self, event: dict[str, Any] | None) -> None:
        if not self.waiting.full():
            self.waiting.put(event)

    def _work(self, opener: Callable[[], Tracker]) -> None:
        try:
            tracker = opener()
            while (event := self.waiting.get()) is not None:
                kind = event["event"]
                if path := event.get("picture"):
                    tracker.picture(kind, Path(path))
                numbers = {f"{kind}/{key}": value for key, value in event.items() if isinstance(value, int | float)}
                numbers.pop(f"{kind}/step", None)
                tracker.figures(event.get("step"), numbers)
            tracker.close()
        except Exception as error:  # whatever a tracker raises, training continues
            console.print(f"report_to: {self.name} failed and gets no more figures ({type(error).__name__}: {error})")


_senders: dict[tuple[Path, str, str], _Sender] = {}


def _flat(recipe: Recipe) -> dict[str, str]:
    """The recipe as ``section.key: value``, for trackers without sections."""

    def walk(tree: Any, path: tuple[str, ...]) -> dict[str, str]:
        if not isinstance(tree, dict):
            return {".".join(path): str(tree)}
        return {key: text for name, value in tree.items() for key, text in walk(value, (*path, name)).items()}

    return walk(recipe.model_dump(mode="json", exclude_unset=True), ())


class TensorBoard:
    """Event files in ``runs/NAME/tensorboard/ARM``."""

    def __init__(self, folder: RunFolder, recipe: Recipe, name: str, run_id: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the checkpoint from which a job resumes are repeated: the earlier records are hidden.
        self.writer = SummaryWriter(str(folder.root / "tensorboard" / name), purge_step=step + 1 if step else None)
        lines = [f"    {key}: {value}" for key, value in _flat(recipe).items()]
        self.writer.add_text("recipe", "\n".join(lines))

    def figures(self, step: int | None, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def picture(self, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class MLflow:
    """A run of the experiment with the recipe's name. ``MLFLOW_TRACKING_URI`` says where it is stored."""

    def __init__(self, folder: RunFolder, recipe: Recipe, name: str, run_id: str, step: int) -> None:
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient()
        found = self.client.get_experiment_by_name(recipe.name)
        experiment = found.experiment_id if found else self.client.create_experiment(recipe.name)
        known = self.client.search_runs([experiment], f"tags.atlantis_run = '{run_id}'")
        tags = {"atlantis_run": run_id, "mlflow.runName": name}
        self.run: str = (known[0] if known else self.client.create_run(experiment, tags=tags)).info.run_id
        if not known:
            for key, value in _flat(recipe).items():
                self.client.log_param(self.run, key, value[:6000])

    def figures(self, step: int | None, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.client.log_metric(self.run, key, value, step=step or 0)

    def picture(self, name: str, path: Path) -> None:
        self.client.log_artifact(self.run, str(path))

    def close(self) -> None:
        self.client.set_terminated(self.run)


class Wandb:
    """A run in the project with the recipe's name; ``WANDB_MODE=offline`` stores it for ``wandb sync``."""

    def __init__(self, folder: RunFolder, recipe: Recipe, name: str, run_id: str, step: int) -> None:
        import wandb

        config = recipe.model_dump(mode="json", exclude_unset=True)
        self.run = wandb.init(
            project=recipe.name,
            name=name,
            id=run_id,
            resume="allow",
            config=config,
            dir=str(folder.root),
            reinit="create_new",
        )
        self.run.define_metric("*", step_metric="step")

    def figures(self, step: int | None, values: dict[str, float]) -> None:
        self.run.log(values if step is None else {**values, "step": step})

    def picture(self, name: str, path: Path) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(path))})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run in the project with the recipe's name, stored on this machine or in the Space ``TRACKIO_SPACE_ID``."""

    def __init__(self, folder: RunFolder, recipe: Recipe, name: str, run_id: str, step: int) -> None:
        import trackio

        self.run = trackio.init(project=recipe.name, name=run_id, resume="allow", config=_flat(recipe), embed=False)

    def figures(self, step: int | None, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, name: str, path: Path) -> None:
        import trackio

        self.run.log({name: trackio.Image(str(path))})

    def close(self) -> None:
        self.run.finish()


_TRACKERS: dict[str, Callable[[RunFolder, Recipe, str, str, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""Each opens a run, given its folder, recipe, name, id, and the step from which it resumes."""
