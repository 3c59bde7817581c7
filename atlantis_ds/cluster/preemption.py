"""Ending early on demand: SIGTERM, SIGUSR2, or a file ``STOP`` in the run folder.

Training then finishes its step and writes a checkpoint, scoring its shard (on a signal its batch: the shard is done
again), and the job ends with exit code 75 (EX_TEMPFAIL). The same command goes on from there. Signals belong to the
whole process, and so does the flag here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from types import FrameType

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.errors import Preempted
from atlantis_ds.run_folder import RunFolder

_started = time.monotonic()
_signalled = False


def watch_signals() -> None:
    """From now on SIGTERM and SIGUSR2 ask this process to stop instead of ending it."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global _signalled
    _signalled = True


def stop_asked(folder: RunFolder, look: bool) -> bool:
    """Whether a signal asks this rank to stop, or the ``STOP`` file does, where this rank is to ``look`` for it."""
    return _signalled or (look and folder.stop.exists())


def leave_if_asked(folder: RunFolder, ranks: Ranks, where: str) -> None:
    """Between two pieces of work, each of them saved: end the job if any rank was asked to stop.

    Raises:
        Preempted: on all ranks alike.
    """
    if ranks.sum(float(stop_asked(folder, ranks.is_main)))[0]:
        raise Preempted(f"stopped {where}; the same command goes on from here")


def remove_stale_stop(folder: RunFolder) -> bool:
    """Remove a ``STOP`` file from before this process started; whether there was one."""
    with contextlib.suppress(FileNotFoundError):
        # File times come from the file server: its clock, asked by a file made now, counts, and not this machine's.
        made = folder.stop.stat().st_mtime
        with tempfile.NamedTemporaryFile(dir=folder.root, prefix=".clock.") as probe:
            now = os.stat(probe.name).st_mtime
        if now - (time.monotonic() - _started) <= made <= now:
            return False
        folder.stop.unlink()
        return True
    return False
