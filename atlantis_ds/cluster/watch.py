"""Ends joint work of the ranks when one of them has died, hangs or is behind, and says which one."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from atlantis_ds.cluster.ranks import Ranks, end_rank, open_store

BEAT_SECONDS = 1.0
QUIET_SECONDS = 4 * BEAT_SECONDS
"""A rank whose counter has not changed for this long has died or hangs."""
LATER_SECONDS = QUIET_SECONDS + 4.0
"""The other ranks wait this much longer, so that rank 0 can say what has happened."""


@dataclass(frozen=True)
class Seat:
    """The place where a rank runs."""

    rank: int
    host: str
    local_rank: int
    device: str

    @classmethod
    def here(cls, ranks: Ranks) -> Seat:
        return cls(ranks.rank, socket.gethostname(), int(os.environ["LOCAL_RANK"]), ranks.hardware)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (local rank {self.local_rank})"


class Watch:
    """Ends this rank if a piece of work exceeds its time limit, or if another rank has failed.

    A thread of every rank increases a counter in the store through which the ranks have connected; a dead or frozen
    rank does not. Every rank creates one of these, at the same time.

    Args:
        title: beginning of the line that gives the reason.
        last_words: called on rank 0, with the piece of work and the reason, before it ends.
    """

    def __init__(self, title: str, ranks: Ranks, last_words: Callable[[str, str], None]) -> None:
        self.title, self.ranks, self.last_words = title, ranks, last_words
        self.seats: list[Seat] = ranks.gather(Seat.here(ranks))
        self._store = open_store(timedelta(seconds=30))
        self._work, self._seconds, self._deadline = "", 0.0, float("inf")
        self._ending = threading.Lock()
        self._store.add(f"beat-{ranks.rank}", 1)
        ranks.barrier()
        for loop in (self._beat, self._watch):
            threading.Thread(target=loop, daemon=True).start()

    @contextlib.contextmanager
    def work(self, name: str, seconds: float) -> Iterator[None]:
        """A piece of work that must be done within this many seconds."""
        later = 0.0 if self.ranks.is_main else LATER_SECONDS
        self._work, self._seconds, self._deadline = name, seconds, time.monotonic() + seconds + later
        yield
        self._deadline = float("inf")

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, after this rank has done its own part of the work."""
        self._store.set(f"{self._work}-{self.ranks.rank}", "")
        return self.ranks.gather(value)

    def fail(self, reason: str) -> NoReturn:
        """End all ranks: this one cannot continue, and others wait for it."""
        _within(QUIET_SECONDS, lambda: self._store.set("failed", reason))
        time.sleep(0 if self.ranks.is_main else LATER_SECONDS)
        self._end(reason)

    def lost(self) -> NoReturn:
        """End this rank, because it has lost another one."""
        if not self.ranks.is_main:
            time.sleep(2 * LATER_SECONDS)  # rank 0 finds the cause, and its thread reports it
        self._end(self._who())

    def _beat(self) -> None:
        while True:
            _within(QUIET_SECONDS, lambda: self._store.add(f"beat-{self.ranks.rank}", 1))
            time.sleep(BEAT_SECONDS)

    def _watch(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            reason = _within(QUIET_SECONDS, self._failed)
            if reason:
                time.sleep(0 if self.ranks.is_main else LATER_SECONDS)
                self._end(reason)
            if time.monotonic() > self._deadline:
                self._end(self._who())

    def _failed(self) -> str:
        return str(self._store.get("failed").decode()) if self._store.check(["failed"]) else ""

    def _who(self) -> str:
        """Which ranks have died or are behind, as far as the store knows."""
        keys = [f"beat-{seat.rank}" for seat in self.seats]
        before = _within(QUIET_SECONDS, lambda: self._store.multi_get(keys))
        time.sleep(QUIET_SECONDS)
        after = _within(QUIET_SECONDS, lambda: self._store.multi_get(keys))
        if before is None or after is None:
            return f"{self.seats[0]}, which serves the store, does not answer"
        silent = [seat for seat, count, now in zip(self.seats, before, after) if count == now]
        if silent:
            return f"{name_some(silent)} has died or hangs; check its own output, and the kernel log for lack of memory"
        work, bound = self._work, f"in {self._seconds:.0f} s"
        late = _within(
            QUIET_SECONDS, lambda: [seat for seat in self.seats if not self._store.check([f"{work}-{seat.rank}"])]
        )
        if not late or len(late) == len(self.seats):
            return f"not finished {bound}"
        return f"{name_some(late)} did not finish it {bound}"

    def _end(self, reason: str) -> NoReturn:
        self._ending.acquire()  # taken by the first thread that arrives; the other waits for the end
        if self.ranks.is_main:
            with contextlib.suppress(OSError):
                self.last_words(self._work, reason)
        print(f"fault: {self.title}: {self._work}: {reason}", file=sys.stderr, flush=True)
        if self.ranks.is_main:
            _within(QUIET_SECONDS, lambda: self._store.set("failed", reason))
            time.sleep(2 * BEAT_SECONDS)  # so that the others see it before their store is gone
        end_rank(1)


def name_some(seats: Sequence[Seat]) -> str:
    """The first few of them."""
    more = f" and {len(seats) - 4} more" if len(seats) > 4 else ""
    return ", ".join(map(str, seats[:4])) + more


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """The answer to a request; None if it fails or takes too long, as from a dead host."""
    answers: list[Any] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
