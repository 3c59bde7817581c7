"""The command line: the only file that reads one. Heavy imports stand inside the commands that need them."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, cast

import typer

from atlantis_ds import __version__
from atlantis_ds.bundled import find
from atlantis_ds.cluster.preemption import remove_stale_stop, watch_signals
from atlantis_ds.cluster.ranks import Ranks, end_rank
from atlantis_ds.errors import InputError, Preempted, RunError
from atlantis_ds.run import Run, open_run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.trackers import close_trackers, refuse_missing_trackers

if TYPE_CHECKING:
    from atlantis_ds.config.schema import Recipe, Task

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
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. --set train.learning_rate=1e-5."),
]
Force = Annotated[bool, typer.Option("--force", help="Train on weights whose effective sample size is below 10 %.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, e.g. runs/demo, or its recipe.")]
Part = Annotated[str, typer.Option(metavar="I/N", help="Do the I-th of N parts, for N jobs that share the work.")]
NumberOfRanks = Annotated[
    int, typer.Option("--ranks", metavar="N", min=1, help="Start N ranks on this machine, unless a launcher did.")
]


@app.command()
def init(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="File with the training examples.", show_default=False)],
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="The label to train on.")] = None,
    response: Annotated[str | None, typer.Option(metavar="COLUMN", help="The response to learn.")] = None,
    gold: Annotated[str | None, typer.Option(metavar="COLUMN", help="The true label or response, if known.")] = None,
    group: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="What made the label: a rule, an annotator, a source.")
    ] = None,
    text: Annotated[list[str], typer.Option(metavar="COLUMN", help="A column of the prompt; may be repeated.")] = [],  # noqa: B006
    task: Annotated[str | None, typer.Option(help="classification, relation or response.")] = None,
    test: Annotated[Path | None, typer.Option(metavar="FILE", help="File with the test examples.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Model to fine-tune: a folder or a Hugging Face id.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Recipe to write; without it DATA's name.")] = None,
) -> None:
    """Write a first recipe for a data file.

    Reads the first rows of DATA and guesses what its columns are. Asks what they do not tell, in a terminal; elsewhere
    it wants the flag. Writes a commented recipe that `check` accepts.

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
    _next("check", out)


def _ask(flag: str, question: str, answers: list[str]) -> str:
    """One of the answers: asked for in a terminal, else an error that names the flag."""
    if not sys.stdin.isatty():
        raise InputError(f"--{flag} is needed: {question[0].lower()}{question[1:]} There are {', '.join(answers)}")
    from rich.prompt import Prompt

    return Prompt.ask(question, choices=answers)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="A page to read instead: docs/recipe.md.")] = False,
) -> None:
    """Print what may stand in a recipe, as a JSON schema.

    Reads and writes nothing. Editors complete and check a recipe whose first line names the schema:
    # yaml-language-server: $schema=recipe.schema.json

    Example: atlantis-ds schema > recipe.schema.json
    """
    import json

    from atlantis_ds.config.describe import json_schema, reference_page

    print(reference_page() if markdown else json.dumps(json_schema(), indent=1, ensure_ascii=False))


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Validate a recipe on a login node.

    Reads the recipe and its DeepSpeed config, looks whether the files and model folders it names are there, and reads
    the first rows of each data file. Says which models and data sets of the hub are not in its cache; with
    HF_HUB_OFFLINE=1 that is an error. Loads no model, imports no torch, uses no network, writes nothing.

    Example: atlantis-ds check recipes/demo.yaml --set train.learning_rate=1e-5
    """
    from atlantis_ds.data.ingest import look_at_data
    from atlantis_ds.run_folder import missing_folder
    from atlantis_ds.train.deepspeed_config import deepspeed_config

    settings, folder = _load(recipe, overrides)
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
    _next("fetch" if missing else "run", recipe, overrides=overrides)


def _say_what_is_missing(recipe: Path, settings: Recipe, folder: RunFolder) -> bool:
    """A line for each model and data set of the hub that is not in its cache; offline that is an error."""
    from atlantis_ds import hub

    missing = [r for r in hub.repositories(settings) if hub.cached(hub.at_fetched_commit(folder, r)) is None]
    for repository in missing:
        print(f"{repository.key}: {repository} is not in the hub's cache; `atlantis-ds fetch {recipe}` brings it")
    if missing and hub.offline():
        raise InputError(
            f"{recipe}: HF_HUB_OFFLINE is set, but {', '.join(map(str, missing))} cannot be read without the hub; run "
            f"`atlantis-ds fetch {recipe}` where there is internet"
        )
    return bool(missing)


ASSUMED_PROMPT = 512
"""Tokens of the longest prompt, where nothing is tokenised yet."""


def _say_what_scoring_takes(settings: Recipe) -> None:
    """For each model whose folder is at hand; `plan` knows the real lengths."""
    from atlantis_ds.data.ingest import known_labels
    from atlantis_ds.plan.scoring import CHARACTERS_A_TOKEN, scoring_memory, sizes_of_folder

    labels = known_labels(settings.data) if settings.score.label_set and settings.task != "response" else None
    tokens = round(sum(map(len, labels)) / CHARACTERS_A_TOKEN) if labels else None
    for key in ("large", "small", "reference"):
        path = getattr(settings.models, key).model_name_or_path
        if path and (sizes := sizes_of_folder(Path(path).expanduser())):
            needs = scoring_memory(sizes, settings.score, ASSUMED_PROMPT, tokens)
            print(f"score {key}: about {needs}, with prompts of up to {ASSUMED_PROMPT} tokens")


@app.command()
def fetch(
    recipe: RecipeFile,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Use this folder as the hub's cache instead.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Bring models and data sets of the Hugging Face hub, for nodes without internet.

    Reads the recipe. Writes what it takes from the hub into its cache (HF_HUB_CACHE, or hub/ in HF_HOME): safetensors,
    configs and tokenizers, each file checked by its hash; and fetched.json in the run folder, with commits, sizes and
    hashes. What is there and whole is not fetched again. With HF_HUB_OFFLINE=1 jobs then load just this.

    Example: atlantis-ds fetch recipes/semeval_qwen2_7b_zero3.yaml --out /shared/hub
    """
    from atlantis_ds import hub

    settings, folder = _load(recipe, overrides)
    cache = out.expanduser().absolute() if out else None
    hub.fetch(settings, folder, cache)
    if cache:
        print(f"jobs need: export HF_HUB_CACHE={shlex.quote(str(cache))}")
    _next("run", recipe, overrides=overrides)


@app.command()
def preflight(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
) -> None:
    """Find on the nodes of a job, in minutes, what would make it fail or crawl.

    Reads the recipe, its models and, where `prepare` has run, the lengths of its examples. Compares versions, clocks
    and speed of all ranks, the network between them, memory, disks and model files, and tries an optimizer step of the
    real shape. Prints a table, writes preflight.json into the run folder, and ends with exit code 1 where a check
    fails.

    Example: srun atlantis-ds preflight recipes/semeval_qwen2_7b_zero3.yaml
    """
    settings, folder = _load(recipe, overrides)
    _start_local(ranks)
    from atlantis_ds.cluster.ranks import start_ranks, stop_ranks
    from atlantis_ds.preflight.preflight import MEETING_MINUTES
    from atlantis_ds.preflight.preflight import preflight as check_nodes

    # Signals are not watched, as other commands do: there is nothing to save.
    started = start_ranks(min(settings.timeout_minutes, MEETING_MINUTES))
    check_nodes(Run(settings, folder, started))
    if started.is_main:
        _next("run", recipe, overrides=overrides)
    stop_ranks()


@app.command()
def prepare(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
) -> None:
    """Write the examples and their tokens.

    Reads the data files (or hub dataset) of the recipe, and the models' tokenizers where they are at hand. Writes
    examples/ and tokens/ in the run folder, and base/ where the recipe builds its own demo models.

    Example: atlantis-ds prepare recipes/demo.yaml --ranks 2
    """
    _start_local(ranks)
    from atlantis_ds import stages

    _on_ranks(recipe, overrides, stages.prepare, lambda run: _after_prepare(run.recipe))


@app.command()
def score(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
    part: Part = "1/1",
) -> None:
    """Score all training examples under the frozen models.

    Reads examples/ and the models (model/reference* where the reference is fine-tuned). Writes scores/, one Parquet
    file a shard; a rerun does only the shards that are missing.

    Example: torchrun --nproc-per-node 8 -m atlantis_ds score recipes/semeval_qwen2_1.5b.yaml
    """
    numbers = _part(part)
    _start_local(ranks)
    from atlantis_ds import stages

    _on_ranks(recipe, overrides, lambda run: stages.score(run, numbers), lambda run: ["merge"])


@app.command()
def merge(recipe: RecipeFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Merge the score shards into one weight per example.

    Reads examples/ and scores/. Writes weights.parquet, weights.json (diagnostics) and weights.png.

    Example: atlantis-ds merge recipes/demo.yaml --set weights.temper=0.5
    """
    from atlantis_ds.progress import console
    from atlantis_ds.weights.diagnostics import diagnosis_table
    from atlantis_ds.weights.merge import merge

    settings, folder = _load(recipe, overrides)
    console.print(diagnosis_table(merge(Run(settings, folder, Ranks.alone()))))
    print(f"weights: {folder.weights_plot}")
    _next("diagnose", folder.root)


@app.command()
def diagnose(run: RunPath) -> None:
    """Say whether the weights of a run can be trusted, and which labels look wrong.

    Reads examples/, scores/ and the weights. Writes diagnosis/: diagnosis.html (one page with everything in it),
    diagnosis.json, weights.png, and label_errors.csv, the training examples with the lowest weights first, each with
    the label that the reference model would give and an empty column for the right one (see `relabel`).

    Example: atlantis-ds diagnose runs/demo
    """
    from atlantis_ds.progress import console
    from atlantis_ds.weights.diagnostics import diagnosis_table
    from atlantis_ds.weights.page import write_diagnosis

    opened = _run_of(run)
    console.print(diagnosis_table(write_diagnosis(opened)))
    written = opened.folder.root / "diagnosis"
    print(f"page: {written / 'diagnosis.html'}\nlikely label errors: {written / 'label_errors.csv'}")
    command, *options = _after_evaluate(opened.recipe, opened.folder)
    _next(command, opened.folder.recipe, *options)


@app.command()
def relabel(
    run: RunPath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="label_errors.csv, its column `corrected` filled in.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write here, not to diagnosis/train_corrected.*.")
    ] = None,
) -> None:
    """Write the training data of a run again, with the labels that people have corrected.

    Reads the recipe and examples/ of the run, its training files and FILE. Writes a file for `data.train` of a new run;
    your own files stay as they are. See docs/your-data.md.

    Example: atlantis-ds relabel runs/demo my_corrections.csv --out train_corrected.jsonl
    """
    import json

    from atlantis_ds.weights.corrections import relabel

    opened = _run_of(run)
    recipe, folder = opened.recipe, opened.folder
    done = relabel(opened, file, out)
    print(f"relabel: {done.changed} changed, {done.dropped} dropped, {done.kept} kept as they were")
    settings = [f"name={recipe.name}-corrected", *(["data.hub_id=null"] if recipe.data.hub_id else [])]
    for split, path in done.files.items():
        print(f"{split}: {path}")
        settings.append(f"data.{split}={path}")
    if done.labels:
        settings.append(f"data.labels={json.dumps(done.labels, ensure_ascii=False)}")
    changes = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
    print(f"next, all stages in a run folder of their own: atlantis-ds run {shlex.quote(str(folder.recipe))} {changes}")


@app.command()
def weights(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .jsonl, .parquet or .csv.")],
    messages: Annotated[
        bool, typer.Option("--messages", help="Write prompt and target as one chat, a list of messages.")
    ] = False,
) -> None:
    """Write the training examples with their weights, for other trainers.

    Reads examples/ and the weights. Writes OUT, an example a line or row: id, prompt, target and weight (mean 1), or
    id, messages and weight. docs/python.md shows what other trainers do with it.

    Example: atlantis-ds weights runs/demo weighted.jsonl
    """
    from atlantis_ds.files import refuse_unknown_format, write_rows
    from atlantis_ds.weights.joined import weighted_table

    refuse_unknown_format(out)
    table = weighted_table(_run_of(run).folder, messages)
    write_rows(out, table)
    print(f"{len(table)} weighted examples: {out}")


@app.command()
def train(
    recipe: RecipeFile,
    arm: Annotated[str, typer.Option(help="Arm of the recipe, or `reference`.")] = "atlantis",
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Of a reference: train the I-th of N parts of its folds, and no more.")
    ] = "1/1",
    of_round: Annotated[
        int | None,
        typer.Option("--round", metavar="R", min=1, help="Of a reference: this round alone, and the weights it gives."),
    ] = None,
    force: Force = False,
) -> None:
    """Train one arm with DeepSpeed; resume where a checkpoint is.

    Reads examples/, weights.parquet and the large model. Writes checkpoints/ARM while it runs and model/ARM/last (and
    model/ARM/best where there is a dev split) as safetensors. `--arm reference` trains the reference instead, in all
    its rounds, and scores and merges between them.

    Example: deepspeed --num_gpus 8 --module atlantis_ds train recipes/semeval_qwen2_7b_zero3.yaml --arm sft
    """
    numbers = _part(part)
    if arm != "reference" and (numbers[1] > 1 or of_round):
        raise InputError(f"--part and --round are for --arm reference, not for {arm}")
    _start_local(ranks)
    from atlantis_ds import stages

    after = ["score"] if arm == "reference" else ["evaluate", "--arm", arm]
    _on_ranks(recipe, overrides, lambda run: stages.train(run, arm, force, numbers, of_round), lambda run: after)


@app.command()
def evaluate(
    recipe: RecipeFile,
    arm: Annotated[list[str] | None, typer.Option(help="Arm to evaluate; without it all arms.")] = None,
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
) -> None:
    """Predict the test examples and compute the metrics.

    Reads examples/ and model/ARM. Writes eval/ARM/ (metrics.json, predictions.parquet, answers.txt for the official
    scorer, confusion.png) and eval/comparison.csv.

    Example: atlantis-ds evaluate recipes/demo.yaml --arm sft --arm atlantis --ranks 2
    """
    _start_local(ranks)
    from atlantis_ds import stages

    _on_ranks(
        recipe,
        overrides,
        lambda run: stages.evaluate(run, arm or list(run.recipe.arms)),
        lambda run: _after_evaluate(run.recipe, run.folder),
    )


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
    force: Force = False,
) -> None:
    """Do all stages; skip what is finished and valid.

    Reads what the recipe names. Writes the whole run folder runs/NAME, and ends with a table of the arms.

    Example: atlantis-ds run recipes/demo.yaml --ranks 2
    """
    _load(recipe, overrides)  # a bad recipe ends here, before any rank starts
    _start_local(ranks)
    from atlantis_ds import stages

    _on_ranks(
        recipe,
        overrides,
        lambda run: stages.run(run, force),
        lambda run: ["diagnose"] if run.recipe.weighted else ["compare"],
    )


@app.command()
def compare(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    ranks: NumberOfRanks = 1,
    part: Part = "1/1",
    force: Force = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the trainings, with time and memory; do none.")
    ] = False,
    gpus: Annotated[int, typer.Option(min=1, help="For --dry-run: number of GPUs.")] = 1,
    gpu: Annotated[str, typer.Option(help="For --dry-run: A100, H100, H200, L4 or 4090.")] = "H100",
) -> None:
    """Train and evaluate every arm with every seed; give differences with intervals.

    Reads what the recipe names; does the stages before training where they are missing, and skips what is finished.
    With --dry-run it does nothing, and says what it would train, and for how long.
    Writes model/ARM-seedS and eval/ARM-seedS, and compare/ (comparison.html, .json, .csv and .png, runs.csv).

    Example: atlantis-ds compare recipes/studies/conll04_uniform_noise.yaml --ranks 2
    """
    loaded = _load(recipe, overrides)
    if dry_run:
        from atlantis_ds.plan.trainings import show_trainings

        show_trainings(*loaded, gpus, gpu)
        return _next("compare", recipe, overrides=overrides)
    numbers = _part(part)
    _start_local(ranks)
    from atlantis_ds import stages

    _on_ranks(recipe, overrides, lambda run: stages.compare(run, numbers, force), lambda run: ["diagnose"])


@app.command()
def predict(
    run: RunPath,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Rows to predict; they need no label.")],
    arm: Annotated[
        str, typer.Option(help="Arm whose model predicts; of `compare` with its seed: sft-seed0.")
    ] = "atlantis",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write: .jsonl, .csv or .parquet.", show_default=False)
    ] = None,
    ranks: NumberOfRanks = 1,
) -> None:
    """Label new rows with a trained arm, or answer them.

    Reads model/ARM of the run, and the rows of FILE, which have the columns of the training data. Writes these rows
    with the likeliest label (`predicted`), its probability, and that of every label; or with the response. Without
    --out the file is FILE's name with .ARM.jsonl.

    Example: atlantis-ds predict runs/demo new.jsonl --arm atlantis --out labelled.csv
    """
    opened = _run_of(run)
    target = out or Path(f"{Path(file).name.split('.')[0]}.{arm}.jsonl")
    _start_local(ranks)
    from atlantis_ds.cluster.ranks import start_ranks, stop_ranks
    from atlantis_ds.evaluate.new_rows import predict_file

    started = start_ranks(opened.recipe.timeout_minutes)
    predict_file(replace(opened, ranks=started), arm, file, target)
    if started.is_main:
        print(f"predictions: {target}")
    stop_ranks()


@app.command()
def export(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    arm: Annotated[str, typer.Option(help="Arm whose model to export.")] = "atlantis",
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Take the newest checkpoint of a training that has not ended.")
    ] = False,
    push_to: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload OUT to this repository of the Hugging Face hub, too."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Write a trained model as one folder for plain transformers.

    Reads model/ARM (the checkpoint that `evaluate` takes). Merges an adapter into its base model, in host memory;
    copies a full model. Writes OUT: safetensors, tokenizer, configs, model card.
    With --unfinished it reads checkpoints/ARM instead, and writes no card.
    With --push-to it makes the repository where it is not there (private), and uploads OUT as one commit, as the user
    of `hf auth login` or HF_TOKEN. The card holds the recipe, with its paths.

    Example: atlantis-ds export recipes/conll04_qwen2_7b_lora.yaml --arm atlantis merged/
    """
    from atlantis_ds.train.export import export, export_unfinished

    settings, folder = _load(recipe, overrides)
    if push_to and unfinished:
        raise InputError("--push-to: not with --unfinished: a model that is still in training has no card")
    if unfinished:
        export_unfinished(settings, folder, arm, out)
        address = None
    else:
        address = export(settings, folder, arm, out, push_to)
    print(f"model: {out}")
    if address:
        print(f"pushed: {address}")


@app.command()
def submit(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    nodes: Annotated[int, typer.Option(min=1, help="Nodes for training; as many array elements for scoring.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs a node, one rank each; 0: none.")] = 1,
    tasks_per_node: Annotated[int, typer.Option(min=1, help="Ranks a node where there are no GPUs.")] = 1,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="CPU cores a rank.")] = 8,
    time: Annotated[
        str | None,
        typer.Option(
            help="Time limit of a job on GPUs, 04:00:00 if not set; longer work is requeued.", show_default=False
        ),
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition; without it the cluster's default.")] = None,
    sbatch: Annotated[
        list[str],
        typer.Option(
            metavar="[STAGE.]KEY[=VALUE]",
            help="Option of sbatch for all jobs, or those of a stage: account=abc, prepare.partition=cpu, exclusive.",
        ),
    ] = [],  # noqa: B006
    prologue: Annotated[
        Path | None, typer.Option(help="File of shell lines for the top of every job: modules, conda, a container.")
    ] = None,
    array_limit: Annotated[int | None, typer.Option(min=1, help="Elements of an array that run at one time.")] = None,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Look at the nodes of the training first; where that fails, all ends.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the job files; write and submit nothing.")] = False,
) -> None:
    """Submit all stages to Slurm as a chain of jobs.

    Reads the recipe (its `slurm` section holds what your site wants of every job) and the sbatch files of slurm/.
    Writes them filled in, and the recipe as it is now, to slurm/ in the run folder, where the logs go too; prints the
    job ids. While jobs of the run are queued, it submits nothing and says which.

    Example: atlantis-ds submit recipes/semeval_qwen2_7b_zero3.yaml --nodes 4 --gpus-per-node 8 --sbatch account=abc
    """
    from atlantis_ds.cluster import slurm
    from atlantis_ds.cluster.chain import chain

    settings, folder = _load(recipe, overrides)
    jobs = chain(settings, nodes, preflight)
    resources = slurm.Resources(
        gpus_per_node,
        gpus_per_node or tasks_per_node,
        cpus_per_task,
        time,
        partition,
        tuple(sbatch),
        array_limit,
        _text_of(prologue, "--prologue") if prologue else "",
    )
    files = slurm.job_files(settings, folder, jobs, resources)
    if dry_run:
        for name, text in files.items():
            print(f"==> {folder.root / 'slurm' / name} <==\n{text}")
        return
    for name, job in slurm.submit(folder, jobs, files).items():
        print(f"{name} {job}")
    _next("status", folder.root)


@app.command()
def kubeflow(
    recipe: RecipeFile,
    image: Annotated[str, typer.Option(help="Container image with this package in it.")],
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim with data and models, which gets the run folder.")],
    mount: Annotated[str, typer.Option(help="Where it is mounted: the recipe's paths are relative to it.")] = "/work",
    nodes: Annotated[int, typer.Option(min=1, help="Pods.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs a pod, one rank each; 0: none.")] = 1,
    tasks_per_node: Annotated[int, typer.Option(min=1, help="Ranks a pod where there are no GPUs.")] = 1,
    grace: Annotated[int, typer.Option(min=1, help="Seconds that a pod may take to save when it is stopped.")] = 180,
    comparison: Annotated[bool, typer.Option("--compare", help="Run `compare`, not `run`.")] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Print a job for Kubernetes: a TrainJob of the Kubeflow Trainer.

    Reads the recipe; writes nothing. The job runs all stages, on all its nodes; when it is stopped, or loses a node, it
    is made again and goes on.

    Example: atlantis-ds kubeflow RECIPE --image IMAGE --claim data --nodes 2 --gpus-per-node 8 | kubectl apply -f -
    """
    import yaml

    from atlantis_ds.cluster.kubeflow import Pods, kubeflow_job

    settings, _ = _load(recipe, overrides)
    pods = Pods(image, claim, mount, nodes, gpus_per_node, gpus_per_node or tasks_per_node, grace)
    job = kubeflow_job(settings, "compare" if comparison else "run", pods)
    print(yaml.safe_dump_all(job, sort_keys=False, allow_unicode=True), end="")


@app.command()
def status(
    run: RunPath,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every two seconds, until Ctrl-C.")] = False,
) -> None:
    """Show how far a run is.

    Reads the run folder, and asks Slurm for the jobs that `submit` started. Writes nothing.

    Example: atlantis-ds status runs/demo --watch
    """
    from atlantis_ds.status import status, watch_status

    folder = _folder_of(run)
    if watch:
        return watch_status(folder.root)
    for what, state in status(folder.root):
        print(f"{what:20} {state}")
    if folder.recipe.is_file() and not (folder.root / "slurm" / "jobs.json").exists():
        arms = open_run(folder.root).recipe.arms
        unfinished = any(not (folder.model(arm) / "training.json").exists() for arm in arms)
        _next("run" if unfinished else "compare", folder.recipe)


@app.command()
def plan(
    recipe: RecipeFile,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: A100, H100, H200, L4 or 4090.")] = "H100",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file, too.")] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Estimate memory, micro-batch and hours of every mode.

    Reads the recipe, its data and the configs of its models: a folder with config.json, or a config file, is enough.
    Needs no GPU and no weights; writes nothing but the file of --json.

    Example: atlantis-ds plan recipes/semeval_qwen2_7b_zero3.yaml --gpus 8 --gpu A100
    """
    from atlantis_ds.plan.plan import plan

    plan(*_load(recipe, overrides), gpus, gpu, json_file)
    _next("run", recipe, overrides=overrides)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run a command; errors become one line and an exit code: 2 bad input, 1 a fault in the run, 75 preempted."""
    arguments = sys.argv[1:]
    # The `deepspeed` launcher puts this in front of every program's own arguments.
    sys.argv[1:] = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    try:
        try:
            app()
        finally:
            close_trackers()
    except InputError as error:
        _end(f"error: {error}", 2)
    except RunError as error:
        _end(f"fault: {error}", 1)
    except Preempted as error:
        _end(f"preempted: {error}", 75)
    except OSError as error:
        _end(f"fault: {error}", 1)  # a full disk, a read-only folder: what was finished stays finished
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except RuntimeError as error:
        from atlantis_ds.cluster.ranks import lost_a_rank

        if not lost_a_rank(error):
            raise
        _end(f"fault: another rank has gone ({str(error).splitlines()[0][:200]}); its own message says why", 1)
    except SystemExit as ended:  # the command line ends so, also when all is well
        if "RANK" not in os.environ or not isinstance(ended.code, int):
            raise
        end_rank(ended.code)


def _end(line: str, code: int) -> NoReturn:
    main_rank = os.environ.get("RANK", "0") == "0"
    if code == 75 and not main_rank:
        end_rank(code)  # all ranks have agreed and saved; one of them says so
    if not main_rank:
        # Mostly all ranks meet the same error: leave rank 0 the time to say it, and the launcher to end the rest.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(5)
    print(line, file=sys.stderr)
    end_rank(code)


def _load(recipe: Path, overrides: list[str]) -> tuple[Recipe, RunFolder]:
    from atlantis_ds.config.loading import load_recipe

    settings = load_recipe(find("recipes", recipe, "RECIPE"), overrides)
    refuse_missing_trackers(settings)
    return settings, RunFolder(Path(settings.runs_dir) / settings.name)


def _next(command: str, *arguments: str | Path, overrides: Sequence[str] = ()) -> None:
    """Say the command that goes on from here. In a Slurm job the chain goes on by itself."""
    if "SLURM_JOB_ID" not in os.environ:
        options = [part for override in overrides for part in ("--set", override)]
        print(f"next: atlantis-ds {shlex.join([command, *map(str, arguments), *options])}")


def _after_prepare(settings: Recipe) -> list[str]:
    """The command that goes on after `prepare`, and its options."""
    if not settings.weighted:
        return ["train", "--arm", next(iter(settings.arms))]
    return ["train", "--arm", "reference"] if settings.models.reference.kind == "finetuned" else ["score"]


def _after_evaluate(settings: Recipe, folder: RunFolder) -> list[str]:
    """An arm that is not trained yet, or the comparison."""
    left = [arm for arm in settings.arms if not (folder.model(arm) / "training.json").exists()]
    return ["train", "--arm", left[0]] if left else ["compare"]


def _folder_of(run: Path) -> RunFolder:
    """A run folder, given as itself or by its recipe."""
    is_recipe = not run.is_dir() and run.suffix in (".yaml", ".yml")
    return _load(run, [])[1] if is_recipe else RunFolder(run)


def _run_of(run: Path) -> Run:
    """A run by its folder or by its recipe, with the recipe as the run has kept it."""
    return open_run(_folder_of(run).root)


def _text_of(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{key} {path}: cannot be read: {error}") from None


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise InputError(f"--part {text}: write it as I/N with 1 <= I <= N")
    return int(number), int(of)


def _start_local(ranks: int) -> None:
    from atlantis_ds.cluster.local import run_ranks
    from atlantis_ds.cluster.ranks import launched

    if (ranks > 1 or "PET_NNODES" in os.environ) and not launched(os.environ):
        sys.exit(run_ranks(sys.argv[1:], ranks))


def _on_ranks(
    recipe: Path, overrides: list[str], stage: Callable[[Run], None], after: Callable[[Run], Sequence[str]]
) -> None:
    """Do a stage on all ranks; ``after`` gives the command that goes on, and its options."""
    from atlantis_ds.cluster.ranks import start_ranks, stop_ranks

    settings, folder = _load(recipe, overrides)
    ranks = start_ranks(settings.timeout_minutes)
    watch_signals()
    if ranks.is_main and remove_stale_stop(folder):
        print(f"{folder.stop}: from before this job, removed")
    run = Run(settings, folder, ranks)
    stage(run)
    if ranks.is_main:
        command, *options = after(run)
        _next(command, folder.root if command == "diagnose" else recipe, *options, overrides=overrides)
    stop_ranks()
