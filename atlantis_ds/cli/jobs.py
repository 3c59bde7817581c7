"""The commands that submit a run to a scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atlantis_ds.cli.app import Overrides, RecipeFile, app, load, load_to_run, say_next
from atlantis_ds.errors import InputError

PANEL = "Jobs"


@app.command(rich_help_panel=PANEL)
def submit(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    nodes: Annotated[int, typer.Option(min=1, help="Nodes for training, and array elements for scoring.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs per node, one rank each; 0: none.")] = 1,
    tasks_per_node: Annotated[int, typer.Option(min=1, help="Ranks per node, if there are no GPUs.")] = 1,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="CPU cores per rank.")] = 8,
    time: Annotated[
        str | None,
        typer.Option(help="Time limit of a GPU job, 04:00:00 if not set; longer work is requeued.", show_default=False),
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition; the cluster's default if not set.")] = None,
    sbatch: Annotated[
        list[str],
        typer.Option(
            metavar="[STAGE.]KEY[=VALUE]",
            help="Option of sbatch for all jobs or for one stage: account=abc, prepare.partition=cpu, exclusive.",
        ),
    ] = [],  # noqa: B006
    prologue: Annotated[
        Path | None, typer.Option(help="File with shell lines for the top of every job: modules, conda, a container.")
    ] = None,
    array_limit: Annotated[
        int | None, typer.Option(min=1, help="Most array elements that run at the same time.")
    ] = None,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Test the nodes for training first; if a test fails, stop the chain.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the job files; write and submit nothing.")] = False,
) -> None:
    """Submit all stages to Slurm as a chain of jobs.

    Reads the recipe (its `slurm` section has the options that your site requires) and the sbatch files in slurm/.
    Writes the filled-in files and a copy of the recipe to slurm/ in the run folder, where the logs go, too. Prints the
    job ids. While jobs of the run are queued, it submits nothing and names them.

    Example: atlantis-ds submit recipes/semeval_qwen2_7b_zero3.yaml --nodes 4 --gpus-per-node 8 --sbatch account=abc
    """
    from atlantis_ds.cluster import slurm
    from atlantis_ds.cluster.chain import chain

    settings, folder = load_to_run(recipe, overrides)
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
    say_next("status", folder.root)


def _text_of(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{key} {path}: cannot be read: {error}") from None


@app.command(rich_help_panel=PANEL)
def kubeflow(
    recipe: RecipeFile,
    image: Annotated[str, typer.Option(help="Container image that contains this package.")],
    claim: Annotated[
        str, typer.Option(help="PersistentVolumeClaim with the data and models; the run folder is written to it.")
    ],
    mount: Annotated[
        str, typer.Option(help="Mount point of the claim; the recipe's paths are relative to it.")
    ] = "/work",
    nodes: Annotated[int, typer.Option(min=1, help="Number of pods.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs per pod, one rank each; 0: none.")] = 1,
    tasks_per_node: Annotated[int, typer.Option(min=1, help="Ranks per pod, if there are no GPUs.")] = 1,
    grace: Annotated[int, typer.Option(min=1, help="Seconds that a pod has to save when it is stopped.")] = 180,
    comparison: Annotated[bool, typer.Option("--compare", help="Run `compare` instead of `run`.")] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Print a job for Kubernetes: a TrainJob of the Kubeflow Trainer.

    Reads the recipe; writes nothing. The job runs all stages on all its nodes. If it is stopped, or loses a node, it is
    created again and resumes.

    Example: atlantis-ds kubeflow RECIPE --image IMAGE --claim data --nodes 2 --gpus-per-node 8 | kubectl apply -f -
    """
    import yaml

    from atlantis_ds.cluster.kubeflow import Pods, kubeflow_job

    settings, _ = load(recipe, overrides)
    pods = Pods(image, claim, mount, nodes, gpus_per_node, gpus_per_node or tasks_per_node, grace)
    job = kubeflow_job(settings, "compare" if comparison else "run", pods)
    print(yaml.safe_dump_all(job, sort_keys=False, allow_unicode=True), end="")
