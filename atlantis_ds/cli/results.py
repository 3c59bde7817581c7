"""The commands that inspect a run, or use its results."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from atlantis_ds.cli.app import (
    NumberOfRanks,
    Overrides,
    RecipeFile,
    RunPath,
    after_evaluate,
    app,
    folder_of,
    load,
    run_of,
    say_next_of,
    start_local,
    untrained,
)
from atlantis_ds.errors import InputError
from atlantis_ds.run import open_run

PANEL = "Results of a run"


@app.command(rich_help_panel=PANEL)
def status(
    run: RunPath,
    watch: Annotated[bool, typer.Option("--watch", help="Update every two seconds, until Ctrl-C.")] = False,
) -> None:
    """Show the progress of a run.

    Reads the run folder, and asks Slurm about the jobs that `submit` started. Writes nothing.

    Example: atlantis-ds status runs/demo --watch
    """
    from atlantis_ds.status import status, watch_status

    folder = folder_of(run)
    if watch:
        return watch_status(folder.root)
    for what, state in status(folder.root):
        print(f"{what:20} {state}")
    if folder.recipe.is_file() and not (folder.root / "slurm" / "jobs.json").exists():
        opened = open_run(folder.root)
        if words := ["run"] if untrained(opened.recipe, folder) else after_evaluate(opened.recipe, folder):
            say_next_of(opened, *words)


@app.command(rich_help_panel=PANEL)
def diagnose(run: RunPath) -> None:
    """Say whether the weights of a run can be trusted, and which labels look wrong.

    Reads examples/, scores/ and the weights. Writes diagnosis/: diagnosis.html (a self-contained page), diagnosis.json,
    weights.png and label_errors.csv. That file lists the training examples, those with the lowest weights first, each
    with the label that the reference model would give and an empty column for the right label (see `relabel`).

    Example: atlantis-ds diagnose runs/demo
    """
    from atlantis_ds.progress import console
    from atlantis_ds.weights.diagnostics import diagnosis_table
    from atlantis_ds.weights.page import write_diagnosis

    opened = run_of(run)
    console.print(diagnosis_table(write_diagnosis(opened)))
    written = opened.folder.root / "diagnosis"
    print(f"page: {written / 'diagnosis.html'}\nlikely label errors: {written / 'label_errors.csv'}")
    if words := after_evaluate(opened.recipe, opened.folder):
        say_next_of(opened, *words)


@app.command(rich_help_panel=PANEL)
def relabel(
    run: RunPath,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="label_errors.csv with its column `corrected` filled in.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Output file, instead of diagnosis/train_corrected.*.")
    ] = None,
) -> None:
    """Write the training data of a run again, with labels that people have corrected.

    Reads the recipe and examples/ of the run, its training files and FILE. Writes a file for `data.train` of a new run;
    your own files are not changed. See docs/your-data.md.

    Example: atlantis-ds relabel runs/demo my_corrections.csv --out train_corrected.jsonl
    """
    import json

    from atlantis_ds.weights.corrections import relabel

    opened = run_of(run)
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
    print(f"next, all stages in a new run folder: atlantis-ds run {shlex.quote(str(folder.recipe))} {changes}")


@app.command(rich_help_panel=PANEL)
def weights(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .jsonl, .parquet or .csv.")],
    messages: Annotated[
        bool, typer.Option("--messages", help="Write prompt and target as one chat, a list of messages.")
    ] = False,
) -> None:
    """Write the training examples with their weights, for other trainers.

    Reads examples/ and the weights. Writes OUT, one example per line or row: id, prompt, target and weight (mean 1), or
    id, messages and weight. docs/python.md shows how to use it in other trainers.

    Example: atlantis-ds weights runs/demo weighted.jsonl
    """
    from atlantis_ds.files import refuse_unknown_format, write_rows
    from atlantis_ds.weights.joined import weighted_table

    refuse_unknown_format(out)
    table = weighted_table(run_of(run).folder, messages)
    write_rows(out, table)
    print(f"{len(table)} weighted examples: {out}")


@app.command(rich_help_panel=PANEL)
def predict(
    run: RunPath,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Rows to predict; they need no label.")],
    arm: Annotated[
        str, typer.Option(help="Arm whose model predicts; for a model from `compare`, with its seed: sft-seed0.")
    ] = "atlantis",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write: .jsonl, .csv or .parquet.", show_default=False)
    ] = None,
    ranks: NumberOfRanks = 1,
) -> None:
    """Label new rows, or generate responses, with a trained arm.

    Reads model/ARM of the run and the rows of FILE, which has the columns of the training data. Writes these rows with
    the most likely label (`predicted`), its probability, and the probability of every label; or with the response.
    Without --out, the file is FILE's name with .ARM.jsonl.

    Example: atlantis-ds predict runs/demo new.jsonl --arm atlantis --out labelled.csv
    """
    opened = run_of(run)
    target = out or Path(f"{Path(file).name.split('.')[0]}.{arm}.jsonl")
    if target.resolve() == Path(file).resolve():
        raise InputError(f"--out: {target} is the file to read; choose another name")
    start_local(ranks)
    from atlantis_ds.cluster.ranks import start_ranks, stop_ranks
    from atlantis_ds.evaluate.new_rows import predict_file

    started = start_ranks(opened.recipe.timeout_minutes)
    predict_file(replace(opened, ranks=started), arm, file, target)
    if started.is_main:
        print(f"predictions: {target}")
    stop_ranks()


@app.command(rich_help_panel=PANEL)
def export(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    arm: Annotated[str, typer.Option(help="Arm whose model to export.")] = "atlantis",
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Use the newest checkpoint of a training run that has not finished.")
    ] = False,
    push_to: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also upload OUT to this repository on the Hugging Face hub."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Write a trained model as one folder for plain transformers.

    Reads model/ARM (the checkpoint that `evaluate` uses). Merges an adapter into its base model, in host memory; copies
    a full model. Writes OUT: safetensors, tokenizer, configs, model card. With --unfinished it reads checkpoints/ARM
    instead, and writes no card. With --push-to it creates the repository (private) if it does not exist, and uploads
    OUT as one commit, as the user of `hf auth login` or HF_TOKEN. The card contains the recipe with its paths.

    Example: atlantis-ds export recipes/conll04_qwen2_7b_lora.yaml --arm atlantis merged/
    """
    from atlantis_ds.train.export import export, export_unfinished

    settings, folder = load(recipe, overrides)
    if push_to and unfinished:
        raise InputError("--push-to cannot be used with --unfinished: a model that is still in training has no card")
    if unfinished:
        export_unfinished(settings, folder, arm, out)
        address = None
    else:
        address = export(settings, folder, arm, out, push_to)
    print(f"model: {out}")
    if address:
        print(f"pushed: {address}")
