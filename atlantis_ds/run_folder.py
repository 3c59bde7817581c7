"""The run folder: the paths of each stage's output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atlantis_ds.errors import InputError


@dataclass(frozen=True)
class RunFolder:
    root: Path
    round: int = 0
    """An earlier round of the reference, from 1; 0 for the last. Each round has its own scores and weights."""

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def fetched(self) -> Path:
        """What ``fetch`` downloaded from the hub for this run."""
        return self.root / "fetched.json"

    @property
    def examples(self) -> Path:
        return self.root / "examples"

    @property
    def examples_info(self) -> Path:
        return self.examples / "examples.json"

    def split(self, name: str) -> Path:
        """The examples of ``train``, ``dev`` or ``test``."""
        return self.examples / f"{name}.arrow"

    @property
    def tokens(self) -> Path:
        return self.root / "tokens"

    @property
    def of_round(self) -> Path:
        return self.root / f"round-{self.round}" if self.round else self.root

    @property
    def scores(self) -> Path:
        return self.of_round / "scores"

    @property
    def weights(self) -> Path:
        return self.of_round / "weights.parquet"

    @property
    def weights_info(self) -> Path:
        return self.of_round / "weights.json"

    @property
    def weights_plot(self) -> Path:
        return self.of_round / "weights.png"

    @property
    def stop(self) -> Path:
        """Creating this file asks the job to save and stop."""
        return self.root / "STOP"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    def base_model(self, name: str) -> Path:
        """The folder of a model built by the run itself (``scratch``)."""
        return self.root / "base" / name

    def checkpoints(self, arm: str) -> Path:
        return self.root / "checkpoints" / arm

    def profile(self, arm: str) -> Path:
        return self.root / "profile" / arm

    def model(self, arm: str) -> Path:
        return self.root / "model" / arm

    def evaluation(self, arm: str) -> Path:
        return self.root / "eval" / arm


def no_run(root: Path) -> InputError:
    """The error of a command that needs a run, but finds none."""
    return InputError(f"{root}: no run here (no recipe.yaml); give the run's folder, e.g. runs/demo")


def missing_folder(path: str | None) -> str | None:
    """The error for a model or data set folder that does not exist; None if it exists, or for a hub id."""
    if path is None or Path(path).expanduser().is_dir():
        return None
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return f"{path}: no such folder"
    return None
