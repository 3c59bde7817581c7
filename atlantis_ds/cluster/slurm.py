"""Submits a recipe's chain of jobs to Slurm, and asks for their state. No torch: this runs on a login node."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from atlantis_ds.bundled import bundled
from atlantis_ds.cluster.chain import ON_CPUS, Job
from atlantis_ds.config.schema import Recipe, SbatchValue, Slurm
from atlantis_ds.errors import InputError
from atlantis_ds.files import read_json, write_json, write_text
from atlantis_ds.run_folder import RunFolder

LONG = "04:00:00"
"""Default time limit of a job with ranks on GPUs."""


@dataclass(frozen=True)
class Resources:
    """The options of the command line."""

    gpus_per_node: int
    """0: request none."""
    tasks_per_node: int
    """Ranks per node: the number of GPUs, unless there are none."""
    cpus_per_task: int
    time: str | None = None
    """Time limit of GPU jobs; ``LONG`` if neither this nor the recipe sets it."""
    partition: str | None = None
    sbatch: tuple[str, ...] = ()
    """KEY=VALUE for all jobs, STAGE.KEY=VALUE for the jobs of one stage, KEY for an option without a value."""
    array_limit: int | None = None
    """Most array elements that run at the same time."""
    prologue: str = ""
    """Shell lines for the top of every job."""


def job_files(recipe: Recipe, folder: RunFolder, jobs: list[Job], resources: Resources) -> dict[str, str]:
    """The files that ``submit`` writes to ``slurm/`` in the run folder, name → text: one filled-in file per job.

    Raises:
        InputError: an option is malformed, or is set by the chain itself; the message names it.
    """
    root = folder.root.absolute() / "slurm"
    settings = yaml.safe_dump(recipe.model_dump(exclude_unset=True), sort_keys=False, allow_unicode=True)
    files = {"recipe.yaml": settings, "ranks.sh": bundled("slurm", "ranks.sh").read_text(encoding="utf-8")}
    asked = _asked(resources.sbatch)
    for job in jobs:
        limit = f"%{resources.array_limit}" if resources.array_limit else ""
        options = _options(recipe, job, resources, asked) | {
            "job-name": f"{recipe.name}-{job.name}",
            "output": str(root / ("%x-%A_%a.log" if job.elements > 1 else "%x-%j.log")),
            "array": f"1-{job.elements}{limit}" if job.elements > 1 else None,
        }
        command = [str(root / "recipe.yaml"), *job.options]
        lines = [
            *resources.prologue.splitlines(),
            f"here={shlex.quote(str(root))}",
            f"script={shlex.quote(str(root / f'{job.name}.sbatch'))}",
            f"parts={job.elements}",
            f"set -- {shlex.join(command)}",
        ]
        text = bundled("slurm", f"{job.stage}.sbatch").read_text(encoding="utf-8")
        files[f"{job.name}.sbatch"] = _fill(text, options, lines)
    return files


def _options(recipe: Recipe, job: Job, resources: Resources, asked: Slurm) -> dict[str, SbatchValue]:
    """sbatch options of a job. The recipe overrides the bundled file, and the command line overrides the recipe."""
    options: dict[str, SbatchValue] = {"cpus-per-task": resources.cpus_per_task}
    if job.stage not in ON_CPUS:
        options |= {
            "nodes": job.nodes,
            "ntasks-per-node": resources.tasks_per_node,
            "gpus-per-node": resources.gpus_per_node or None,
        }
        if job.stage != "preflight":
            options["time"] = LONG
    options |= recipe.slurm.of(job.stage)
    if resources.partition:
        options["partition"] = resources.partition
    if resources.time and job.stage not in (*ON_CPUS, "preflight"):
        options["time"] = resources.time
    options |= asked.of(job.stage)
    time = str(options.get("time") or "0")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise InputError(f"time {time} of {job.stage}: use Slurm's format: minutes, HH:MM:SS or D-HH:MM:SS")
    return options


def _asked(words: tuple[str, ...]) -> Slurm:
    """The options of ``--sbatch``, in the form of a recipe's ``slurm`` section."""
    found: dict[str, dict[str, Any]] = {name: {} for name in Slurm.model_fields}
    for word in words:
        key, is_value, value = word.partition("=")
        stage, dot, name = key.rpartition(".")
        stage = stage if dot else "all"
        if stage not in found:
            raise InputError(f"--sbatch {word}: no such stage; the stages are {', '.join(found)}")
        found[stage][name] = (value or None) if is_value else True
    try:
        return Slurm.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"--sbatch: {first['msg'].removeprefix('Value error, ')}") from None


def _fill(script: str, options: dict[str, SbatchValue], lines: list[str]) -> str:
    """Set the ``#SBATCH --name=value`` lines of a script (None removes one, True writes only the name) and others."""
    kept = [line for line in script.splitlines() if line.removeprefix("#SBATCH --").split("=")[0] not in options]
    kept = [line for line in kept if not re.match(r"(here|parts)=|: \"\$\{1|#   sbatch", line)]
    new = [f"#SBATCH --{key}" + _equals(value) for key, value in options.items() if value is not None]
    first = next(number for number, line in enumerate(kept) if line.startswith("#SBATCH"))
    blank = kept.index("")
    return "\n".join([*kept[:first], *new, *kept[first : blank + 1], *lines, *kept[blank + 1 :]]) + "\n"


def _equals(value: SbatchValue) -> str:
    if value is True:
        return ""
    text = str(value)
    if re.search(r"[\"'\\\n]", text):
        raise InputError(f"{text!r}: Slurm's #SBATCH lines cannot contain quotes, backslashes or line breaks")
    return f'="{text}"' if re.search(r"[\s#]", text) else f"={text}"


def submit(folder: RunFolder, jobs: list[Job], files: dict[str, str]) -> dict[str, str]:
    """Write the files into the run folder's ``slurm/`` and submit the chain.

    Returns:
        name → job id, which is also in ``slurm/jobs.json``.

    Raises:
        InputError: there is no sbatch, jobs of this run are still queued, or Slurm refuses one (its message is quoted).
    """
    if shutil.which("sbatch") is None:
        raise InputError("sbatch: no such command; submit on a login node of the cluster")
    root = folder.root.absolute() / "slurm"
    _refuse_queued(root / "jobs.json")
    for name, text in files.items():
        write_text(root / name, text)
    ids: dict[str, str] = {}
    for job in jobs:
        words = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
        if job.after:
            words.append(f"--dependency=afterok:{':'.join(ids[name] for name in job.after)}")
        done = subprocess.run([*words, str(root / f"{job.name}.sbatch")], capture_output=True, text=True, check=False)
        if done.returncode:
            if ids:  # the chain is incomplete: none of its jobs may run
                subprocess.run(["scancel", *ids.values()], capture_output=True, check=False)
            raise InputError(f"sbatch refused: {' '.join(done.stderr.split())}")
        ids[job.name] = done.stdout.strip().split(";")[0]  # JOB, or JOB;CLUSTER
    write_json(root / "jobs.json", ids)
    return ids


def _refuse_queued(jobs_file: Path) -> None:
    """Raise InputError if jobs of an earlier ``submit`` are queued: two jobs of one run would refuse each other."""
    if not jobs_file.exists():
        return
    ids = {job: name for name, job in read_json(jobs_file).items()}
    words = ["squeue", "--me", "--noheader", "--format=%A %F %T %r"]
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
    if asked.returncode:
        raise InputError(
            f"squeue cannot tell whether jobs of this run are still queued: {' '.join(asked.stderr.split())}"
        )
    found = {}
    for line in asked.stdout.splitlines():
        job, array, state, reason = line.split(maxsplit=3)
        if name := ids.get(job) or ids.get(array):
            found[array] = f"{name} {array} ({state}{'' if reason == 'None' else f', {reason}'})"
    if found:
        raise InputError(
            f"still queued from an earlier submit of this run: {', '.join(found.values())}; wait for them, or "
            f"`scancel {' '.join(found)}` and submit again: finished work is not repeated"
        )


def job_states(jobs_file: Path) -> list[tuple[str, str]]:
    """(job, state) lines for the submitted jobs, from squeue or, when it no longer lists them, from sacct."""
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
