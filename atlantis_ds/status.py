"""The progress of a run, from its files and from Slurm. No torch: this runs on a login node."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from atlantis_ds.cluster.slurm import job_states
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.errors import InputError
from atlantis_ds.files import read_json
from atlantis_ds.progress import console
from atlantis_ds.run_folder import RunFolder, no_run

AGAIN = 2
"""Seconds between updates of `watch_status`."""


def status(root: Path) -> list[tuple[str, str]]:
    """The progress of a run: (stage, state) lines, from the files of its folder and from Slurm.

    Raises:
        InputError: there is no run in this folder.
    """
    folder = RunFolder(root)
    source = folder.recipe if folder.recipe.is_file() else root / "slurm" / "recipe.yaml"
    if not source.is_file():
        raise no_run(root)
    recipe = load_recipe(source)
    events = _events(folder)
    lines = [("examples", "prepared" if folder.examples_info.exists() else "not yet")]
    begun = {event["arm"] for event in events if event["event"] == "start"}
    references = sorted(name for name in begun if name.startswith("reference"))
    seeds = sorted(name for name in begun if name not in {*references, *recipe.arms})  # from `compare`: arm and seed
    lines += [(f"train {name}", _training(folder, name, events)) for name in references]
    if (folder.scores / "scores.json").exists():
        lines.append(("score", _scoring(folder)))
    if folder.weights_info.exists():
        lines.append(("merge", f"effective sample size {read_json(folder.weights_info)['ess_fraction']:.1%}"))
    for arm in [*(arm for arm in recipe.arms if arm in begun or not seeds), *seeds]:
        lines.append((f"train {arm}", _training(folder, arm, events)))
        metrics = folder.evaluation(arm) / "metrics.json"
        if metrics.exists():
            lines.append((f"evaluate {arm}", _evaluation(read_json(metrics))))
    return lines + job_states(root / "slurm" / "jobs.json")


def watch_status(root: Path) -> None:
    """Show `status` as a table that is updated every ``AGAIN`` seconds, until Ctrl-C.

    Raises:
        InputError: there is no run in this folder, or no terminal to show it in.
    """
    from rich.live import Live
    from rich.table import Table

    if not console.is_terminal:
        raise InputError("--watch: needs a terminal; without --watch the state is printed once")

    def table() -> Table:
        made = Table("stage", "state", title=f"{root}, {datetime.now():%H:%M:%S}", title_justify="left")
        for line in status(root):
            made.add_row(*line)
        return made

    with contextlib.suppress(KeyboardInterrupt), Live(table(), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(AGAIN)
            live.update(table(), refresh=True)


def _events(folder: RunFolder) -> list[dict[str, Any]]:
    """The log's events; an incomplete last line is left out."""
    events = []
    for line in folder.log.read_text(encoding="utf-8").splitlines() if folder.log.exists() else []:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def _scoring(folder: RunFolder) -> str:
    manifest = read_json(folder.scores / "scores.json")
    whole, parts = (len(list(folder.scores.glob(names))) for names in ("shard-*.parquet", "parts/shard-*.parquet"))
    # The models score one after another, and a shard is complete after the last one: until then, count the parts.
    left = (manifest["shards"] - whole) * _passes(manifest["inputs"])
    rest = f", for the others {parts} of {left} parts" if parts else ""
    return f"{whole} of {manifest['shards']} shards done{rest}"


def _passes(inputs: dict[str, Any]) -> int:
    """Number of models that score: the same model on the same prompts scores once."""
    from atlantis_ds.weights.shards import scored_by

    models = {key.removeprefix("model "): model for key, model in inputs.items() if key.startswith("model ")}
    return len(set(scored_by(models, bool(inputs.get("chat_template"))).values()))


def _training(folder: RunFolder, name: str, events: list[dict[str, Any]]) -> str:
    if (folder.model(name) / "training.json").exists():
        summary = read_json(folder.model(name) / "training.json")
        return f"finished, {summary['step']} steps" + (f", {n} skipped" if (n := summary.get("skipped")) else "")
    total, last = 0, None
    recent: list[dict[str, Any]] = []
    for event in (event for event in events if event.get("arm") == name):
        if event["event"] == "start":
            total, recent = event["steps"], []  # the wait before a job resumes says nothing about its speed
        elif event["event"] == "train":
            last, recent = event, [*recent[-19:], event]
    if last is None:
        return "not yet"
    text = f"step {last['step']} of {total}, loss {last['loss']}"
    if len(recent) > 1:
        left = (total - last["step"]) * (last["time"] - recent[0]["time"]) / (len(recent) - 1)
        text += f", {timedelta(seconds=round(left))} left"
    return text


def _evaluation(metrics: dict[str, Any]) -> str:
    """The figures from ``metrics.json``: responses have no labels, so no macro-F1."""
    if metrics["macro_f1"] is None:
        return f"exact_match {metrics['exact_match']:.4f}, perplexity {metrics['perplexity']:.4f}"
    return f"macro_f1 {metrics['macro_f1']:.4f}"
