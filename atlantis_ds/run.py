"""One run: its recipe, its folder, and its ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlantis_ds.config.schema import Recipe
from atlantis_ds.events import append_log
from atlantis_ds.progress import console
from atlantis_ds.run_folder import RunFolder, no_run
from atlantis_ds.trackers import tell_trackers

if TYPE_CHECKING:
    from atlantis_ds.cluster.ranks import Ranks


@dataclass(frozen=True)
class Run:
    """The argument of every stage."""

    recipe: Recipe
    folder: RunFolder
    ranks: Ranks

    def say(self, text: str) -> None:
        """Print one line, on rank 0."""
        if self.ranks.is_main:
            console.print(text)

    def log(self, **event: Any) -> None:
        """Write one event to ``log.jsonl``, from the calling rank; on rank 0 also to the recipe's trackers."""
        append_log(self.folder.log, **event)
        if self.recipe.report_to and self.ranks.is_main:
            tell_trackers(self.folder, self.recipe, event)

    def of_round(self, number: int) -> Run:
        """The same run in an earlier round of its reference."""
        return replace(self, folder=RunFolder(self.folder.root, number))


def open_run(root: str | Path, overrides: list[str] | None = None) -> Run:
    """An existing run, for a single rank: for commands that inspect a run and start no process group.

    Args:
        root: the run's folder.
        overrides: overrides of its recipe, as in ``--set``.

    Raises:
        InputError: there is no run, or its recipe is invalid.
    """
    from atlantis_ds.cluster.ranks import Ranks
    from atlantis_ds.config.loading import load_recipe

    folder = RunFolder(Path(root))
    if not folder.recipe.is_file():
        raise no_run(folder.root)
    return Run(load_recipe(folder.recipe, overrides), folder, Ranks.alone())
