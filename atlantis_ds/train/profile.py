"""Profiles a few optimizer steps with torch's profiler, for ``train.profile_steps``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.files import write_atomic, write_text
from atlantis_ds.progress import console

BEFORE = 3
"""Steps that are not profiled: the first ones allocate memory and choose kernels."""
ROWS = 40


@contextmanager
def profiled(steps: int | None, folder: Path, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Profile this many steps on every rank; yields a function to call after each step.

    Writes ``rank-N.json``, a trace for Perfetto or chrome://tracing, and ``rank-N.txt``, operators sorted by their own
    time.
    """
    if steps is None:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ranks.device.type == "cuda" else [])]

    def write(profiler: Any) -> None:
        write_atomic(folder / f"rank-{ranks.rank}.json", lambda path: profiler.export_chrome_trace(str(path)))
        key = "self_cuda_time_total" if ranks.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=ROWS)
        write_text(folder / f"rank-{ranks.rank}.txt", table)
        if ranks.is_main:
            console.print(f"profile of {steps} steps: {folder}")

    plan = schedule(wait=BEFORE - 1, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
