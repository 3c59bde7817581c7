"""Shows progress: a bar with rate and ETA in a terminal, occasional log lines in a batch job."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)


def since_process_start() -> float:
    """Seconds since the operating system started this program, including imports and loading."""
    import psutil  # type: ignore[import-untyped]

    return time.time() - float(psutil.Process().create_time())


class Steps:
    """Progress of one loop, shown by rank 0.

    Args:
        title: the name of the work.
        total: the number of units to do.
        unit: the name of a unit.
        show: False on all ranks but the first.
        every: without a terminal, print a line after every this many units.
    """

    def __init__(self, title: str, total: int, unit: str, show: bool, every: int) -> None:
        self.title, self.total, self.unit, self.show, self.every = title, total, unit, show, every
        self.done = 0
        self.start = time.monotonic()
        self._first = 0
        self._bar: Progress | None = None

    def __enter__(self) -> Steps:
        if self.show and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(f"{self.unit}  {{task.fields[rate]}}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._bar.start()
            self._bar.add_task(self.title, total=self.total, rate="", note="")
        return self

    def resume(self, done: int) -> None:
        """Begin at ``done``: the work of an earlier run does not count for the rate."""
        self.done = self._first = done

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._first) / max(time.monotonic() - self.start, 1e-9)

    def advance(self, amount: int = 1, note: str = "") -> None:
        before, self.done = self.done, self.done + amount
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.done, rate=f"{self.rate:.1f}/s", note=note)
        elif self.show and (before // self.every != self.done // self.every or self.done == self.total):
            left = (self.total - self.done) / self.rate
            console.print(
                f"{self.title}: {self.done}/{self.total} {self.unit}, {self.rate:.1f}/s, "
                f"{left:.0f} s left{', ' + note if note else ''}"
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
