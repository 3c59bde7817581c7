"""Shared by the commands: arguments, recipes and runs, ranks, the line with the next command."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atlantis_ds.bundled import find
from atlantis_ds.cluster.preemption import remove_stale_stop, watch_signals
from atlantis_ds.errors import InputError
from atlantis_ds.run import Run, open_run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.trackers import refuse_missing_trackers

if TYPE_CHECKING:
    from atlantis_ds.config.schema import Recipe

app = typer.Typer(
    name="atlantis-ds",
    help="Importance-weighted fine-tuning of language models: examples → scores → weights → training → evaluation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the recipe, e.g. --set train.learning_rate=1e-5."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Train even if the effective sample size of the weights is below 10 %.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, e.g. runs/demo, or its recipe.")]
Part = Annotated[str, typer.Option(metavar="I/N", help="Do only part I of N, for N jobs that share the work.")]
NumberOfRanks = Annotated[
    int,
    typer.Option("--ranks", metavar="N", min=1, help="Start N ranks on this machine, unless a launcher already did."),
]


def load(recipe: Path, overrides: list[str]) -> tuple[Recipe, RunFolder]:
    from atlantis_ds.config.loading import load_recipe

    settings = load_recipe(find("recipes", recipe, "RECIPE"), overrides)
    refuse_missing_trackers(settings)
    return settings, RunFolder(Path(settings.runs_dir) / settings.name)


def load_to_run(recipe: Path, overrides: list[str]) -> tuple[Recipe, RunFolder]:
    """The same for commands that run stages or promise that they will run.

    Raises:
        InputError: the recipe needs a package that is not installed.
    """
    settings, folder = load(recipe, overrides)
    if settings.train.mode == "qlora" and find_spec("bitsandbytes") is None:
        raise InputError("train.mode: qlora needs bitsandbytes, which is not installed: pip install bitsandbytes")
    return settings, folder


def folder_of(run: Path) -> RunFolder:
    """The run folder, from its own path or from its recipe."""
    is_recipe = not run.is_dir() and run.suffix in (".yaml", ".yml")
    return load(run, [])[1] if is_recipe else RunFolder(run)


def run_of(run: Path) -> Run:
    """The run of a run folder or a recipe, with the copy of the recipe that is in the run folder."""
    return open_run(folder_of(run).root)


def part_of(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise InputError(f"--part {text}: write it as I/N with 1 <= I <= N")
    return int(number), int(of)


def start_local(ranks: int) -> None:
    from atlantis_ds.cluster.local import run_ranks
    from atlantis_ds.cluster.ranks import launched

    if (ranks > 1 or "PET_NNODES" in os.environ) and not launched(os.environ):
        sys.exit(run_ranks(sys.argv[1:], ranks))


def on_ranks(
    recipe: Path, overrides: list[str], stage: Callable[[Run], None], after: Callable[[Run], Sequence[str]]
) -> None:
    """Do a stage on all ranks; ``after`` returns the next command and its options."""
    from atlantis_ds.cluster.ranks import start_ranks, stop_ranks

    settings, folder = load_to_run(recipe, overrides)
    ranks = start_ranks(settings.timeout_minutes)
    watch_signals()
    if ranks.is_main and remove_stale_stop(folder):
        print(f"{folder.stop}: left from an earlier job, removed")
    run = Run(settings, folder, ranks)
    stage(run)
    if ranks.is_main and (words := after(run)):
        command, *options = words
        if command == "diagnose":  # it takes a run folder, whose recipe has the overrides
            say_next(command, folder.root, *options)
        else:
            say_next(command, recipe, *options, overrides=overrides)
    stop_ranks()


def say_next(command: str, *arguments: str | Path, overrides: Sequence[str] = ()) -> None:
    """Print the next command, except in a Slurm job: there the chain continues by itself."""
    if "SLURM_JOB_ID" not in os.environ:
        options = [part for override in overrides for part in ("--set", override)]
        print(f"next: atlantis-ds {shlex.join([command, *map(str, arguments), *options])}")


def say_next_of(run: Run, command: str, *options: str) -> None:
    """The same for a run by its own recipe, which may name another folder: where the run was before it was moved."""
    named, root = Path(run.recipe.runs_dir) / run.recipe.name, run.folder.root.resolve()
    here = [] if named.resolve() == root else [f"runs_dir={root.parent}", f"name={root.name}"]
    say_next(command, run.folder.recipe, *options, overrides=here)


def after_prepare(settings: Recipe) -> list[str]:
    """The next command after `prepare`, and its options."""
    if not settings.weighted:
        return ["train", "--arm", next(iter(settings.arms))]
    return ["train", "--arm", "reference"] if settings.models.reference.kind == "finetuned" else ["score"]


def after_evaluate(settings: Recipe, folder: RunFolder) -> list[str]:
    """The command for an arm that is not trained yet, or `compare`; nothing without test examples."""
    if left := untrained(settings, folder):
        return ["train", "--arm", left[0]]
    return ["compare"] if settings.tested else []


def untrained(settings: Recipe, folder: RunFolder) -> list[str]:
    """The arms that are not trained yet."""
    return [arm for arm in settings.arms if not (folder.model(arm) / "training.json").exists()]
