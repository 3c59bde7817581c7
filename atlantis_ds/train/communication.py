"""Measures the time of DeepSpeed's collectives in an optimizer step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from atlantis_ds.cluster.ranks import Ranks

EVERY = 100
"""One step in so many is measured: without overlap, a step takes longer."""
FIRST = 5
"""The first steps of a job allocate memory and open connections."""
COLLECTIVES = {
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
}


class TimedBackend:
    """DeepSpeed's communication backend with a clock: each collective is waited for, so that nothing overlaps it.

    Waiting for a slower rank counts.
    """

    def __init__(self, backend: Any, device: torch.device) -> None:
        self.backend, self.device, self.seconds = backend, device, 0.0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.backend, name)
        if name not in COLLECTIVES:
            return call

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._finish_compute()
            start = time.monotonic()
            work = call(*args, **kwargs)
            if hasattr(work, "wait"):
                work.wait()
            self._finish_compute()
            self.seconds += time.monotonic() - start
            return work

        return timed

    def _finish_compute(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def is_measured(steps_of_job: int, ranks: Ranks) -> bool:
    """Whether the next optimizer step is measured, after this many since the job started; the same on all ranks."""
    return ranks.world_size > 1 and steps_of_job % EVERY == FIRST


@contextmanager
def timed_collectives(ranks: Ranks) -> Iterator[TimedBackend]:
    """Time all collectives inside; ``seconds`` of what it yields is their sum on this rank."""
    import deepspeed.comm.comm as comm

    backend = comm.cdb
    comm.cdb = timed = TimedBackend(backend, ranks.device)
    try:
        yield timed
    finally:
        comm.cdb = backend
