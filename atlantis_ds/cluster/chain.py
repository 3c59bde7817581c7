"""A recipe as a chain of jobs: command, number of nodes and dependencies of each job, for any scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atlantis_ds.config.schema import Recipe

Stage = Literal["prepare", "preflight", "train", "score", "merge", "evaluate"]
ON_CPUS: tuple[Stage, ...] = ("prepare", "merge")
"""Stages that need no GPU."""


@dataclass(frozen=True)
class Job:
    name: str
    stage: Stage
    """The `atlantis-ds` command that it runs on the recipe."""
    options: tuple[str, ...] = ()
    """Options of that command."""
    after: tuple[str, ...] = ()
    """Names of the jobs that must have succeeded."""
    nodes: int = 1
    elements: int = 1
    """Elements of a job array, each on its own nodes; if there are several, element I of N gets ``--part I/N``."""


def chain(recipe: Recipe, nodes: int, preflight: bool = False) -> list[Job]:
    """All stages of a recipe, each job after the jobs that it waits for.

    Args:
        nodes: nodes for each training job; scoring has the same number of elements, with one node each.
        preflight: test the nodes before the first long job.
    """
    jobs = [Job("prepare", "prepare")]
    if preflight:
        jobs.append(Job("preflight", "preflight", (), ("prepare",), nodes))
    if recipe.weighted:
        for name, options, elements in _reference_jobs(recipe):
            jobs.append(Job(name, "train", ("--arm", "reference", *options), (jobs[-1].name,), nodes, elements))
        jobs.append(Job("score", "score", (), (jobs[-1].name,), 1, nodes))
        jobs.append(Job("merge", "merge", (), ("score",)))
    arms = [Job(f"train-{arm}", "train", ("--arm", arm), (jobs[-1].name,), nodes) for arm in recipe.arms]
    every = tuple(word for arm in recipe.arms for word in ("--arm", arm))
    return [*jobs, *arms, Job("evaluate", "evaluate", every, tuple(job.name for job in arms))]


def _reference_jobs(recipe: Recipe) -> list[tuple[str, tuple[str, ...], int]]:
    """(name, options, elements): the folds of each round as an array, and between rounds the jobs for the weights."""
    reference = recipe.models.reference
    if reference.kind == "checkpoint":
        return []
    jobs: list[tuple[str, tuple[str, ...], int]] = []
    for earlier in range(1, reference.rounds):
        this = ("--round", str(earlier))
        jobs += [(f"reference-{earlier}", this, reference.folds), (f"reference-{earlier}-weights", this, 1)]
    last = ("--round", str(reference.rounds)) if reference.rounds > 1 else ()
    return [*jobs, ("reference", last, reference.folds)]
