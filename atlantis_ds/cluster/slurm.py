"""Submit a recipe to Slurm as a chain of jobs, and ask how they are. No torch: this runs on a login node."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atlantis_ds.bundled import bundled
from atlantis_ds.config.schema import Recipe
from atlantis_ds.errors import InputError
from atlantis_ds.files import read_json, write_json, write_text
from atlantis_ds.run_folder import RunFolder


@dataclass(frozen=True)
class Resources:
    nodes: int
    """For training; scoring takes as many array elements of one node each, evaluation one node."""
    gpus_per_node: int
    """0: ask for none."""
    tasks_per_node: int
    """Ranks a node: the GPUs, unless there are none."""
    cpus_per_task: int
    time: str
    partition: str | None


def job_files(recipe: Recipe, folder: RunFolder, resources: Resources) -> dict[str, str]:
    """The bundled files of ``slurm/`` filled in for one recipe: name → text. ``prepare`` and ``merge`` take no GPU.

    Raises:
        InputError: the time limit is not in one of Slurm's forms.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", resources.time):
        raise InputError(f"--time {resources.time}: write it as Slurm does: minutes, HH:MM:SS or D-HH:MM:SS")
    logs = folder.root.absolute() / "slurm"
    settings = yaml.safe_dump(recipe.model_dump(exclude_unset=True), sort_keys=False, allow_unicode=True)
    files = {"recipe.yaml": settings, "pipeline.sh": bundled("slurm", "pipeline.sh").read_text(encoding="utf-8")}
    for stage in ("prepare", "score", "merge", "train", "evaluate"):
        options: dict[str, Any] = {
            "job-name": f"{recipe.name}-{stage}",
            "output": logs / ("%x-%A_%a.log" if stage == "score" else "%x-%j.log"),
            "partition": resources.partition,
        }
        if stage in ("prepare", "merge"):
            options["cpus-per-task"] = resources.cpus_per_task
        else:
            options |= {
                "nodes": resources.nodes if stage == "train" else 1,
                "ntasks-per-node": resources.tasks_per_node,
                "gpus-per-node": resources.gpus_per_node or None,
                "cpus-per-task": resources.cpus_per_task,
                "time": resources.time,
            }
        if stage == "score":
            options["array"] = f"1-{resources.nodes}"
        text = _fill(bundled("slurm", f"{stage}.sbatch").read_text(encoding="utf-8"), options)
        files[f"{stage}.sbatch"] = re.sub(r"(?m)^parts=\d+", f"parts={resources.nodes}", text)
    return files


def _fill(script: str, options: dict[str, Any]) -> str:
    """Set the ``#SBATCH --name=value`` lines of a script; None removes one."""
    lines = [line for line in script.splitlines() if line.removeprefix("#SBATCH --").split("=")[0] not in options]
    new = [f"#SBATCH --{name}={_quote(value)}" for name, value in options.items() if value is not None]
    first = next(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    return "\n".join([*lines[:first], *new, *lines[first:]]) + "\n"


def _quote(value: Any) -> str:
    text = str(value)
    if re.search(r"[\"'\\\n]", text):
        raise InputError(f"{text!r}: Slurm's #SBATCH lines cannot hold quotes, backslashes or line ends")
    return f'"{text}"' if re.search(r"[\s#]", text) else text


def submit(recipe: Recipe, folder: RunFolder, files: dict[str, str]) -> dict[str, str]:
    """Write the files into the run folder's ``slurm/`` and submit the chain.

    Returns:
        stage → job id; it also stands in ``slurm/jobs.json``.

    Raises:
        InputError: no sbatch here, or Slurm refuses a job (its own words are quoted).
    """
    if shutil.which("sbatch") is None:
        raise InputError("sbatch: no such command; submit on a login node of the cluster")
    root = folder.root.absolute() / "slurm"
    for name, text in files.items():
        write_text(root / name, text)
    done = subprocess.run(
        ["bash", str(root / "pipeline.sh"), str(root / "recipe.yaml"), *recipe.arms],
        capture_output=True,
        text=True,
        check=False,
    )
    jobs = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    if done.returncode:
        if jobs:  # the chain is broken: nothing of it may run
            subprocess.run(["scancel", *jobs.values()], capture_output=True, check=False)
        raise InputError(f"sbatch refused: {done.stderr.strip()}")
    write_json(root / "jobs.json", jobs)
    return jobs


def job_states(jobs_file: Path) -> list[tuple[str, str]]:
    """(job, state) lines: what squeue says of the submitted jobs, or, once it has forgotten them, sacct."""
    if not jobs_file.exists():
        return []
    lines = []
    for stage, job in read_json(jobs_file).items():
        asked = [
            ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%i %T %M %R"],
            ["sacct", "--noheader", "--allocations", f"--jobs={job}", "--format=JobID%20,State%20,Elapsed"],
        ]
        said = next((text for command in asked if (text := _ask(command))), "unknown to squeue and sacct")
        lines += [(f"job {stage}", " ".join(line.split())) for line in said.splitlines()]
    return lines


def _ask(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
