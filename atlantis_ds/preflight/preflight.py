"""``atlantis-ds preflight``: tests the nodes of a job for what would make it fail or run slowly, and reports it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atlantis_ds.cluster.ranks import lost_a_rank
from atlantis_ds.cluster.watch import Watch
from atlantis_ds.config.schema import Model
from atlantis_ds.errors import InputError, RunError
from atlantis_ds.files import write_json
from atlantis_ds.lm.frozen import free_bytes
from atlantis_ds.lm.load import model_source
from atlantis_ds.lm.staging import node_copy
from atlantis_ds.preflight import judge
from atlantis_ds.preflight.judge import Check, Files
from atlantis_ds.preflight.measure import (
    all_reduce_bandwidth,
    all_reduce_size,
    link_speed,
    matmul_rate,
    model_files,
    room,
    tmpdir,
    versions,
)
from atlantis_ds.preflight.needs import Needs, estimate, longest_examples
from atlantis_ds.preflight.step import is_out_of_memory, try_step
from atlantis_ds.progress import console
from atlantis_ds.run import Run

MEETING_MINUTES = 10.0
"""Most minutes that ranks wait for each other, at the start and in a collective."""
SECONDS = {"ranks": 60, "versions": 60, "clocks": 60, "matmul": 60, "all-reduce": 120, "models": 120, "room": 180}
CPU_TRIES = 3
STEP_SECONDS = 600
"""Including loading the model, which takes minutes from a cold file system."""
TOLD = 4
"""Number of reasons in the last line; the report has all of them."""


@dataclass
class Report:
    """The checks so far; rank 0 shows and writes them."""

    run: Run
    checks: list[Check] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        return self.run.folder.root / "preflight.json"

    def last_words(self, work: str, reason: str) -> None:
        """End with a check that did not finish."""
        self.checks.append(Check(work, "not done", [reason]))
        self.write()

    def write(self) -> None:
        """Print the table and write ``preflight.json``. OSError if the disk is full."""
        _show(self.checks)
        rows = [
            {
                "name": check.name,
                "verdict": check.verdict,
                "found": check.found,
                "fails": list(check.fails),
                "warnings": list(check.warns),
                "data": dict(check.data),
            }
            for check in self.checks
        ]
        verdicts = [check.verdict for check in self.checks]
        worst = next(verdict for verdict in ("fails", "warning", "ok") if verdict in verdicts)
        seconds = round(time.monotonic() - self.started, 1)
        write_json(self.path, {"verdict": worst, "seconds": seconds, "checks": rows})
        console.print(f"preflight: {self.path}")


def preflight(run: Run) -> None:
    """Do all checks on all ranks; print the table, and write ``preflight.json`` to the run folder.

    If a rank dies, hangs or runs out of memory, all ranks end with exit code 1.

    Raises:
        RunError: the job would fail or run slowly; the reasons name hosts and ranks.
    """
    report = Report(run)
    try:
        watch = Watch("preflight", run.ranks, report.last_words)
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        raise RunError(f"preflight: another rank died at the start: {str(error).splitlines()[0]}") from None
    try:
        _check_all(run, watch, report)
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        watch.lost()
    fails = [f"{check.name}: {reason}" for check in report.checks for reason in check.fails]
    trouble = None
    if run.ranks.is_main:
        try:
            report.write()
        except OSError as error:
            trouble = f"{report.path}: cannot be written: {error}"
    if trouble := run.ranks.broadcast(trouble):
        fails.append(trouble)
    if fails:
        more = f"; and {len(fails) - TOLD} more, see preflight.json" if len(fails) > TOLD else ""
        raise RunError(f"preflight: {'; '.join(fails[:TOLD])}{more}")


def _check_all(run: Run, watch: Watch, report: Report) -> None:
    """The checks, in order; every rank adds the same ones to the report."""
    ranks, seats, checks = run.ranks, watch.seats, report.checks
    limit = 60 * run.recipe.timeout_minutes
    bounds = {name: min(seconds, limit) for name, seconds in SECONDS.items()}
    checks.append(judge.judge_places(seats))
    with watch.work("versions", bounds["versions"]):
        checks.append(judge.judge_versions(watch.gather(versions()), seats))
    with watch.work("clocks", bounds["clocks"]):
        ranks.barrier()
        checks.append(judge.judge_clocks(watch.gather(time.time()), seats))
    with watch.work("matmul", bounds["matmul"]):
        checks.append(_check_rates(run, watch))
    with watch.work("all-reduce", bounds["all-reduce"]):
        bandwidth = all_reduce_bandwidth(ranks, seats)
        links = {seat.host: link for seat, link in zip(seats, watch.gather(link_speed(ranks.device)))}
        checks.append(judge.judge_bandwidth(bandwidth, links, all_reduce_size(ranks.device)))
    with watch.work("models", bounds["models"]):
        checks.append(_check_models(run, watch))
    with watch.work("room", bounds["room"]):
        planned = _check_room(run, watch, checks)
    if planned is None or any(check.fails for check in checks[-2:]):
        checks.append(Check("train step", "see above", tried=False))
        return
    with watch.work("train step", min(STEP_SECONDS, limit)):
        checks.append(_check_step(run, watch, *planned))


def _check_rates(run: Run, watch: Watch) -> Check:
    """On CPUs, other programs come and go: if a rank was slow, all ranks measure again."""
    device = run.ranks.device
    dtype = run.recipe.train.dtype if device.type == "cpu" else "bfloat16"
    best = [0.0] * run.ranks.world_size
    for _ in range(CPU_TRIES if device.type == "cpu" else 1):
        run.ranks.barrier()
        best = list(map(max, best, watch.gather(matmul_rate(device, dtype))))
        if not any(judge.is_slow(rate, best) for rate in best):
            break
    return judge.judge_rates(best, dtype, watch.seats, device.type == "cpu")


def _sources(run: Run) -> tuple[dict[str, Model], list[str]]:
    """The models of the recipe that should exist by now, and the names of those that `prepare` must still build."""
    sources, unbuilt = {}, []
    for name in ("large", "small", "reference"):
        try:
            sources[name] = model_source(run.recipe, run.folder, name)
        except InputError:
            unbuilt.append(name)
    return sources, unbuilt


def _check_models(run: Run, watch: Watch) -> Check:
    sources, unbuilt = _sources(run)
    seats, mine = watch.seats, watch.seats[run.ranks.rank]
    files = Files(warns=[f"models.{name}: not built yet; run `prepare` first" for name in unbuilt])
    if mine == next(seat for seat in seats if seat.host == mine.host):  # the first rank of a host checks for all
        for found in {model: model_files(name, model) for name, model in sources.items()}.values():
            files = Files({**files.sizes, **found.sizes}, [*files.fails, *found.fails], [*files.warns, *found.warns])
    found_by: dict[str, Files] = {}
    for seat, found in zip(seats, watch.gather(files)):
        found_by.setdefault(seat.host, found)
    return judge.judge_files(found_by)


Planned = tuple[Model, list[tuple[int, int]], Needs]


def _check_room(run: Run, watch: Watch, checks: list[Check]) -> Planned | None:
    """Add the check; return the examples of the step, and its planned needs."""
    ranks, seats = run.ranks, watch.seats
    model = _sources(run)[0].get("large")
    if model is None:
        checks.append(Check("room", "the large model is not built yet", tried=False))
        return None
    free, planned, trouble = free_bytes(ranks), None, None
    if ranks.is_main:
        try:
            where, examples = longest_examples(run, model)
            needs = estimate(run, model, examples, free, max(Counter(seat.host for seat in seats).values()))
            planned = where, examples, needs
        except (InputError, OSError) as error:
            trouble = str(error)
    if trouble := ranks.broadcast(trouble):
        checks.append(Check("room", "not known", [trouble]))
        return None
    where, examples, needs = ranks.broadcast(planned)
    with _mark(run) as mark:
        rooms = watch.gather(room(ranks, run.folder, mark))
    checks.append(
        judge.judge_room(rooms, needs.of_device(ranks.device.type == "cpu"), tmpdir(), str(run.folder.root), seats)
    )
    run.say(f"preflight: a step with {len(examples)} examples per micro-batch, {where}")
    return model, examples, needs


@contextlib.contextmanager
def _mark(run: Run) -> Any:
    """The name of a file that rank 0 keeps in the run folder; all ranks enter and leave."""
    root, ranks = run.folder.root, run.ranks
    with contextlib.ExitStack() as stack:
        name = ""
        with contextlib.suppress(OSError):  # a rank that cannot write reports this itself
            root.mkdir(parents=True, exist_ok=True)
            if ranks.is_main:
                name = Path(stack.enter_context(tempfile.NamedTemporaryFile(dir=root, prefix=".preflight.")).name).name
        yield ranks.broadcast(name)
        ranks.barrier()


def _check_step(run: Run, watch: Watch, model: Model, examples: list[tuple[int, int]], needs: Needs) -> Check:
    train, mine = run.recipe.train, watch.seats[run.ranks.rank]
    try:
        trial = try_step(train, model, examples, run.ranks, node_copy(run, model))
    except (InputError, OSError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            longest = max(prompt + label for prompt, label in examples)
            advice = smaller(train.per_device_train_batch_size, needs.fitting)
            watch.fail(
                f"{mine}: out of memory with train.per_device_train_batch_size: {train.per_device_train_batch_size} "
                f"and examples of {longest} tokens; {advice}"
            )
        if isinstance(error, RuntimeError) and lost_a_rank(error):
            raise
        watch.fail(f"{mine}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    trials = watch.gather(trial)
    slowest = max(trials, key=lambda found: found["seconds"])
    peak = max(found["peak_bytes"] for found in trials)
    finite = all(found["finite"] for found in trials)
    return judge.judge_step({**slowest, "peak_bytes": peak, "finite": finite, "plan_bytes": needs.peak})


def smaller(micro_batch: int, fitting: int) -> str:
    """What to set if a micro-batch was too large.

    Args:
        fitting: the micro-batch that the plan expects to fit.
    """
    if micro_batch == 1:
        return "set train.gradient_checkpointing: true, or use another train.deepspeed config or more ranks"
    take = min(micro_batch // 2, max(1, fitting))
    return f"set train.per_device_train_batch_size: {take} (the global batch stays the same)"


def _show(checks: Sequence[Check]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    wide = Console(width=max(console.width, 118), highlight=False)
    table = Table(box=box.SIMPLE, title="preflight")
    for head in ("check", "verdict", "found"):
        table.add_column(head, no_wrap=head != "found", overflow="fold")
    for check in checks:
        table.add_row(check.name, check.verdict, check.found)
    wide.print(table)
    for check in checks:
        for verdict, reasons in (("fails", check.fails), ("warning", check.warns)):
            for reason in reasons:
                console.print(f"{check.name}: {verdict}: {reason}", markup=False)
