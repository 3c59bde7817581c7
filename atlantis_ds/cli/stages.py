"""The commands that run all stages or one stage. Each works under any launcher."""

from __future__ import annotations

from typing import Annotated

import typer

from atlantis_ds.cli.app import (
    Force,
    NumberOfRanks,
    Overrides,
    Part,
    RecipeFile,
    after_evaluate,
    after_prepare,
    app,
    load,
    load_to_run,
    on_ranks,
    part_of,
    say_next,
    start_local,
)
from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.errors import InputError
from atlantis_ds.run import Run

PANEL = "A run"


@app.command(rich_help_panel=PANEL)
def run(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
    force: Force = False,
) -> None:
    """Do all stages; skip those that are finished and valid.

    Reads the files that the recipe names. Writes the run folder runs/NAME, and prints a table of the arms at the end.

    Example: atlantis-ds run recipes/demo.yaml --ranks 2
    """
    load_to_run(recipe, overrides)  # a bad recipe fails here, before any rank starts
    start_local(ranks)
    from atlantis_ds import stages

    on_ranks(
        recipe,
        overrides,
        lambda run: stages.run(run, force),
        lambda run: ["diagnose"] if run.recipe.weighted else after_evaluate(run.recipe, run.folder),
    )


@app.command(rich_help_panel=PANEL)
def compare(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
    part: Part = "1/1",
    force: Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the training runs, with time and memory; train nothing.")
    ] = False,
    gpus: Annotated[int, typer.Option(min=1, help="For --dry-run: number of GPUs.")] = 1,
    gpu: Annotated[str, typer.Option(help="For --dry-run: A100, H100, H200, L4 or 4090.")] = "H100",
) -> None:
    """Train and evaluate every arm with every seed; give differences with intervals.

    Reads the files that the recipe names. Runs the stages before training if they are missing, and skips what is
    finished. With --dry-run it trains nothing: it lists the training runs and estimates their time. Writes
    model/ARM-seedS and eval/ARM-seedS, and compare/ (comparison.html, .json, .csv and .png, runs.csv).

    Example: atlantis-ds compare recipes/studies/conll04_uniform_noise.yaml --ranks 2
    """
    loaded = load(recipe, overrides)
    if not loaded[0].tested:  # said before the hours of the stages in front of it
        raise InputError(f"{recipe}: data.test: `compare` needs test examples")
    if dry_run:
        from atlantis_ds.plan.trainings import show_trainings

        show_trainings(*loaded, gpus, gpu)
        return say_next("compare", recipe, overrides=overrides)
    numbers = part_of(part)
    start_local(ranks)
    from atlantis_ds import stages

    on_ranks(
        recipe,
        overrides,
        lambda run: stages.compare(run, numbers, force),
        lambda run: ["diagnose"] if run.recipe.weighted else [],
    )


@app.command(rich_help_panel=PANEL)
def prepare(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
) -> None:
    """Write the examples and their tokens.

    Reads the data files (or hub dataset) of the recipe, and the models' tokenizers if they are available. Writes
    examples/ and tokens/ in the run folder, and base/ if the recipe builds its own demo models.

    Example: atlantis-ds prepare recipes/demo.yaml --ranks 2
    """
    start_local(ranks)
    from atlantis_ds import stages

    on_ranks(recipe, overrides, stages.prepare, lambda run: after_prepare(run.recipe))


@app.command(rich_help_panel=PANEL)
def score(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
    part: Part = "1/1",
) -> None:
    """Score all training examples under the frozen models.

    Reads examples/ and the models (model/reference* if the reference is fine-tuned). Writes scores/, one Parquet file
    per shard. If you run it again, it computes only the missing shards.

    Example: torchrun --nproc-per-node 8 -m atlantis_ds score recipes/semeval_qwen2_1.5b.yaml
    """
    numbers = part_of(part)
    start_local(ranks)
    from atlantis_ds import stages

    after = ["merge"] if numbers[1] == 1 else []  # the other parts may still run
    on_ranks(recipe, overrides, lambda run: stages.score(run, numbers), lambda run: after)


@app.command(rich_help_panel=PANEL)
def merge(recipe: RecipeFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Merge the score shards into one weight per example.

    Reads examples/ and scores/. Writes weights.parquet, weights.json (diagnostics) and weights.png.

    Example: atlantis-ds merge recipes/demo.yaml --set weights.temper=0.5
    """
    from atlantis_ds.progress import console
    from atlantis_ds.weights.diagnostics import diagnosis_table
    from atlantis_ds.weights.merge import merge

    settings, folder = load(recipe, overrides)
    console.print(diagnosis_table(merge(Run(settings, folder, Ranks.alone()))))
    print(f"weights: {folder.weights_plot}")
    say_next("diagnose", folder.root)


@app.command(rich_help_panel=PANEL)
def train(
    recipe: RecipeFile,
    arm: Annotated[str, typer.Option(help="Arm of the recipe, or `reference`.")] = "atlantis",
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="For --arm reference: train only part I of N of its folds.")
    ] = "1/1",
    of_round: Annotated[
        int | None,
        typer.Option(
            "--round", metavar="R", min=1, help="For --arm reference: do only this round, and the weights from it."
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Train one arm with DeepSpeed; resume from a checkpoint if there is one.

    Reads examples/, weights.parquet and the large model. Writes checkpoints/ARM during training, and model/ARM/last
    (and model/ARM/best if there is a dev split) as safetensors. `--arm reference` trains the reference instead, in all
    its rounds, and scores and merges between the rounds.

    Example: deepspeed --num_gpus 8 --module atlantis_ds train recipes/semeval_qwen2_7b_zero3.yaml --arm sft
    """
    numbers = part_of(part)
    if arm != "reference" and (numbers[1] > 1 or of_round):
        raise InputError(f"--part and --round are only for --arm reference, not for {arm}")
    start_local(ranks)
    from atlantis_ds import stages

    after = ["evaluate", "--arm", arm]
    if arm == "reference":  # other parts or rounds may still be missing
        after = ["score"] if numbers[1] == 1 and not of_round else []
    on_ranks(recipe, overrides, lambda run: stages.train(run, arm, force, numbers, of_round), lambda run: after)


@app.command(rich_help_panel=PANEL)
def evaluate(
    recipe: RecipeFile,
    arm: Annotated[list[str] | None, typer.Option(help="Arm to evaluate; all arms if not set.")] = None,
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
) -> None:
    """Predict the test examples and compute the metrics.

    Reads examples/ and model/ARM. Writes eval/ARM/ (metrics.json, predictions.parquet, answers.txt for the official
    scorer, confusion.png) and eval/comparison.csv.

    Example: atlantis-ds evaluate recipes/demo.yaml --arm sft --arm atlantis --ranks 2
    """
    start_local(ranks)
    from atlantis_ds import stages

    on_ranks(
        recipe,
        overrides,
        lambda run: stages.evaluate(run, arm or list(run.recipe.arms)),
        lambda run: after_evaluate(run.recipe, run.folder),
    )
