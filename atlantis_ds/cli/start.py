"""The commands before a run: write a recipe, and check whether it will work."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from atlantis_ds.cli.app import NumberOfRanks, Overrides, RecipeFile, app, load, load_to_run, say_next, start_local
from atlantis_ds.errors import InputError
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder

if TYPE_CHECKING:
    from atlantis_ds.config.schema import Recipe, Task

PANEL = "Before a run"


@app.command(rich_help_panel=PANEL)
def init(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="File with the training examples.", show_default=False)],
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="The label to train on.")] = None,
    response: Annotated[str | None, typer.Option(metavar="COLUMN", help="The response to learn.")] = None,
    gold: Annotated[str | None, typer.Option(metavar="COLUMN", help="The true label or response, if known.")] = None,
    group: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="What made the label: a rule, an annotator, a source.")
    ] = None,
    text: Annotated[list[str], typer.Option(metavar="COLUMN", help="A column for the prompt; may be repeated.")] = [],  # noqa: B006
    task: Annotated[str | None, typer.Option(help="classification, relation or response.")] = None,
    test: Annotated[Path | None, typer.Option(metavar="FILE", help="File with the test examples.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Model to fine-tune: a folder or a Hugging Face id.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Recipe to write; if not set, DATA's name with .yaml.")
    ] = None,
) -> None:
    """Write a first recipe for a data file.

    Reads the first rows of DATA and guesses what its columns mean. If they are not clear, it asks in a terminal;
    elsewhere you must give the option. Writes a commented recipe that `check` accepts.

    Example: atlantis-ds init train.csv --label weak_label --test test.csv
    """
    from rich.prompt import Prompt

    from atlantis_ds.data.first_recipe import MODEL, write_first_recipe
    from atlantis_ds.data.guess import guess

    if task not in (None, "classification", "relation", "response"):
        raise InputError(f"--task {task}: take classification, relation or response")
    named = {"label": label, "response": response, "gold": gold, "group": group}
    given = {key: column for key, column in named.items() if column is not None}
    found = guess(data, cast("Task | None", task), given, text, _ask)
    out = out or Path(f"{data.name.split('.')[0]}.yaml")
    if model is None:
        model = Prompt.ask("Model to fine-tune", default=MODEL) if sys.stdin.isatty() else MODEL
    write_first_recipe(out, data, test, model, found)
    for note in found.notes:
        print(f"guessed: {note}")
    print(f"recipe: {out}")
    say_next("check", out)


def _ask(flag: str, question: str, answers: list[str]) -> str:
    """One of the answers: ask in a terminal, else raise an error that names the option."""
    if not sys.stdin.isatty():
        raise InputError(f"--{flag} is needed: {question[0].lower()}{question[1:]} Choose from {', '.join(answers)}")
    from rich.prompt import Prompt

    return Prompt.ask(question, choices=answers)


@app.command(rich_help_panel=PANEL)
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the documentation page instead (docs/recipe.md).")
    ] = False,
) -> None:
    """Print the JSON schema of a recipe.

    Reads and writes nothing. Editors complete and check a recipe if its first line names the schema:
    # yaml-language-server: $schema=recipe.schema.json

    Example: atlantis-ds schema > recipe.schema.json
    """
    import json

    from atlantis_ds.config.describe import json_schema, reference_page

    print(reference_page() if markdown else json.dumps(json_schema(), indent=1, ensure_ascii=False))


@app.command(rich_help_panel=PANEL)
def check(recipe: RecipeFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Validate a recipe on a login node.

    Reads the recipe and its DeepSpeed config, checks that the files and model folders exist, and reads the first rows
    of each data file. Lists models and data sets that are not in the hub's cache; with HF_HUB_OFFLINE=1 this is an
    error. Loads no model, does not import torch, uses no network, writes nothing.

    Example: atlantis-ds check recipes/demo.yaml --set train.learning_rate=1e-5
    """
    from atlantis_ds.data.ingest import look_at_data
    from atlantis_ds.run_folder import missing_folder
    from atlantis_ds.train.deepspeed_config import deepspeed_config

    settings, folder = load_to_run(recipe, overrides)
    deepspeed_config(settings.train, world_size=1)
    try:
        look_at_data(settings)
    except InputError as error:
        raise InputError(f"{recipe}: {error}") from None
    for key in ("large", "small", "reference"):
        if problem := missing_folder(getattr(settings.models, key).model_name_or_path):
            raise InputError(f"{recipe}: models.{key}.model_name_or_path: {problem}")
    for name, arm in settings.arms.items():
        if arm.drop_ids is not None and not Path(arm.drop_ids).is_file():
            raise InputError(f"{recipe}: arms.{name}.drop_ids: {arm.drop_ids}: no such file")
    missing = _say_what_is_missing(recipe, settings, folder)
    print(f"{recipe}: valid. Run folder {folder.root}; arms {', '.join(settings.arms)}")
    _say_what_scoring_takes(settings)
    say_next("fetch" if missing else "run", recipe, overrides=overrides)


def _say_what_is_missing(recipe: Path, settings: Recipe, folder: RunFolder) -> bool:
    """Print a line for each model and data set that is not in the hub's cache; offline, raise an error instead."""
    from atlantis_ds import hub

    missing = [r for r in hub.repositories(settings) if hub.cached(hub.at_fetched_commit(folder, r)) is None]
    fetch = f"atlantis-ds fetch {shlex.quote(str(recipe))}"
    for repository in missing:
        print(f"{repository.key}: {repository} is not in the hub's cache; `{fetch}` downloads it")
    if missing and hub.offline():
        raise InputError(
            f"{recipe}: HF_HUB_OFFLINE is set, but {', '.join(map(str, missing))} cannot be read without the hub; run "
            f"`{fetch}` on a machine with internet access"
        )
    return bool(missing)


ASSUMED_PROMPT = 512
"""Tokens of the longest prompt, if nothing is tokenised yet."""


def _say_what_scoring_takes(settings: Recipe) -> None:
    """For each model whose folder exists; `plan` uses the real lengths."""
    from atlantis_ds.data.ingest import known_labels
    from atlantis_ds.plan.scoring import CHARACTERS_A_TOKEN, scoring_memory, sizes_of_folder

    labels = known_labels(settings.data) if settings.score.label_set and settings.task != "response" else None
    tokens = round(sum(map(len, labels)) / CHARACTERS_A_TOKEN) if labels else None
    for key in ("large", "small", "reference"):
        path = getattr(settings.models, key).model_name_or_path
        if path and (sizes := sizes_of_folder(Path(path).expanduser())):
            needs = scoring_memory(sizes, settings.score, ASSUMED_PROMPT, tokens)
            print(f"score {key}: about {needs}, with prompts of up to {ASSUMED_PROMPT} tokens")


@app.command(rich_help_panel=PANEL)
def fetch(
    recipe: RecipeFile,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Use this folder as the hub's cache instead.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Download models and data sets from the Hugging Face hub, for nodes without internet.

    Reads the recipe. Writes the files that it needs to the hub's cache (HF_HUB_CACHE, or hub/ in HF_HOME): safetensors,
    configs and tokenizers, each checked by its hash. Writes fetched.json in the run folder, with commits, sizes and
    hashes. Complete files are not downloaded again. With HF_HUB_OFFLINE=1, jobs then load exactly these files.

    Example: atlantis-ds fetch recipes/semeval_qwen2_7b_zero3.yaml --out /shared/hub
    """
    from atlantis_ds import hub

    settings, folder = load(recipe, overrides)
    cache = out.expanduser().absolute() if out else None
    hub.fetch(settings, folder, cache)
    if cache:
        print(f"jobs need: export HF_HUB_CACHE={shlex.quote(str(cache))}")
    say_next("run", recipe, overrides=overrides)


@app.command(rich_help_panel=PANEL)
def plan(
    recipe: RecipeFile,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: A100, H100, H200, L4 or 4090.")] = "H100",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the plan to this file.")] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Estimate memory, micro-batch and hours of every mode.

    Reads the recipe, its data and the configs of its models: a folder with config.json, or a config file, is enough.
    Needs no GPU and no model weights; writes only the file given with --json.

    Example: atlantis-ds plan recipes/semeval_qwen2_7b_zero3.yaml --gpus 8 --gpu A100
    """
    from atlantis_ds.plan.plan import plan

    plan(*load(recipe, overrides), gpus, gpu, json_file)
    say_next("run", recipe, overrides=overrides)


@app.command(rich_help_panel=PANEL)
def preflight(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
) -> None:
    """Test the nodes of a job, in minutes, for anything that would make it fail or run slowly.

    Reads the recipe, its models and, if `prepare` has run, the lengths of its examples. Checks versions, clocks and
    speed of all ranks, the network between them, memory, disks and model files, and runs an optimizer step of the real
    shape. Prints a table, writes preflight.json to the run folder, and ends with exit code 1 if a check fails.

    Example: srun atlantis-ds preflight recipes/semeval_qwen2_7b_zero3.yaml
    """
    settings, folder = load(recipe, overrides)
    start_local(ranks)
    from atlantis_ds.cluster.ranks import start_ranks, stop_ranks
    from atlantis_ds.preflight.preflight import MEETING_MINUTES
    from atlantis_ds.preflight.preflight import preflight as check_nodes

    # Unlike in other commands, signals are not watched: there is nothing to save.
    started = start_ranks(min(settings.timeout_minutes, MEETING_MINUTES))
    check_nodes(Run(settings, folder, started))
    if started.is_main:
        say_next("run", recipe, overrides=overrides)
    stop_ranks()
