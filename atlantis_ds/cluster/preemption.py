"""Stops a job on request: SIGTERM, SIGUSR2, or a file ``STOP`` in the run folder.

Training then finishes its step and writes a checkpoint; scoring finishes its shard (on a signal only its batch: the
shard is computed again). The job ends with exit code 75 (EX_TEMPFAIL), and the same command resumes it. Signals apply
to the whole process, so the flag here is global.
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
    """From now on, SIGTERM and SIGUSR2 ask this process to stop instead of ending it."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global _signalled
    _signalled = True


def stop_asked(folder: RunFolder, look: bool) -> bool:
    """Whether a signal asks this rank to stop, or the ``STOP`` file, if this rank should ``look`` for it."""
    return _signalled or (look and folder.stop.exists())


def leave_if_asked(folder: RunFolder, ranks: Ranks, where: str) -> None:
    """Between two pieces of work that are saved: end the job if any rank was asked to stop.

    Raises:
        Preempted: on all ranks.
    """
    if ranks.sum(float(stop_asked(folder, ranks.is_main)))[0]:
        raise Preempted(f"stopped {where}; the same command resumes from here")


def remove_stale_stop(folder: RunFolder) -> bool:
    """Remove a ``STOP`` file that is older than this process; return whether there was one."""
    with contextlib.suppress(FileNotFoundError):
        # File times come from the file server, so a new file is used to read its clock instead of this machine's.
        made = folder.stop.stat().st_mtime
        with tempfile.NamedTemporaryFile(dir=folder.root, prefix=".clock.") as probe:
            now = os.stat(probe.name).st_mtime
        if now - (time.monotonic() - _started) <= made <= now:
            return False
        folder.stop.unlink()
        return True
    return False
