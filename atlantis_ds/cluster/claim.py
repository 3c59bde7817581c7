"""Ensures that only one job at a time does a piece of work in a run folder.

The claim is a small file that its owner rewrites every few seconds. There are no file locks (they are unreliable on NFS
and Lustre), and no clocks are compared: another job watches whether the file changes, and takes over the claim of a
dead job. If a job was only suspended (by the queue, or by a file server that did not answer), it finds the other job's
claim when it continues, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from atlantis_ds.cluster.ranks import Ranks, end_rank
from atlantis_ds.errors import InputError
from atlantis_ds.run_folder import RunFolder

BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 3 * BEAT_SECONDS


@contextlib.contextmanager
def claimed(folder: RunFolder, work: str, ranks: Ranks) -> Iterator[None]:
    """Hold the claim on ``work``, a word such as ``train-sft``, for this job; rank 0 does this for all ranks.

    Raises:
        InputError: another running job holds it; the message names its host and process.
    """
    path = folder.root / "claims" / f"{work}.json"
    other = _take(path) if ranks.is_main else None
    if other := ranks.broadcast(other):
        raise InputError(f"{path}: another job is doing this work ({other}); wait for it, or choose another `name`")
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    if ranks.is_main:
        beat.start()
    try:
        yield
    finally:
        stop.set()
        if ranks.is_main:
            beat.join()
            _end_if_lost(path)
            path.unlink(missing_ok=True)


def _take(path: Path) -> str | None:
    """Take the claim, if necessary from a dead owner; or return the name of the living owner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(FileExistsError):  # O_EXCL is also atomic on NFS
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            try:
                os.write(descriptor, _owner(0).encode())
            except OSError:
                path.unlink()  # a full disk: nobody owns this
                raise
            finally:
                os.close(descriptor)
            return None
        if other := _living_owner(path):
            return other
        with contextlib.suppress(FileNotFoundError):  # if several jobs see a dead owner, only one can rename the file
            grave = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
            os.rename(path, grave)
            grave.unlink()


def _living_owner(path: Path) -> str | None:
    seen = _read(path)
    try:
        owner = json.loads(seen)
        if owner["machine"] == _machine():
            os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return None
    except (ValueError, KeyError, TypeError):
        pass  # incomplete: check whether it is still being written
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        time.sleep(BEAT_SECONDS / 10)
        if (now := _read(path)) != seen:
            return _name(now)
    return None


def _name(text: str) -> str | None:
    try:
        owner = json.loads(text)
        return f"host {owner['host']}, process {owner['pid']}"
    except (ValueError, KeyError, TypeError):
        return None  # gone, or being written: the caller tries again


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _machine() -> str:
    """This host and its process namespace: containers on one host number their processes separately."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _owner(beat: int) -> str:
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "beat": beat}
    return json.dumps(owner)


def _beat(path: Path, stop: threading.Event) -> None:
    beat = 0
    while not stop.wait(BEAT_SECONDS):
        _end_if_lost(path)
        beat += 1
        temporary = path.with_name(f".{path.name}.beat")
        with contextlib.suppress(OSError):  # a full disk must not look like a second job
            temporary.write_text(_owner(beat), encoding="utf-8")
            os.replace(temporary, path)


def _end_if_lost(path: Path) -> None:
    """End this process at once if another job has taken over the claim: only the other may write to the run folder."""
    try:
        owner = json.loads(_read(path))
        lost = (owner["machine"], owner["pid"]) != (_machine(), os.getpid())
    except (ValueError, KeyError, TypeError):
        return  # gone, or being written
    if lost:
        other = f"host {owner['host']}, process {owner['pid']}"
        print(f"fault: {path}: while this job was suspended, another job took over its work ({other})", file=sys.stderr)
        end_rank(1)
