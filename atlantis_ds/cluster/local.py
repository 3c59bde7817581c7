"""Starts ranks on this machine if no launcher did: for ``run --ranks N``, and on each pod of a Kubeflow job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from atlantis_ds.cluster.ranks import free_port
from atlantis_ds.errors import InputError


def run_ranks(arguments: list[str], ranks: int) -> int:
    """Run ``python -m atlantis_ds ARGUMENTS`` on N local ranks.

    torchrun would work, but it turns every exit code into 1. Here the first rank that fails decides the exit code, the
    others are ended, and signals are passed on. If the Kubeflow Trainer has set this pod's variables (PET_NNODES and
    those that belong to it), the N ranks are those of this pod.

    Returns:
        0, or the exit code of the first rank that failed.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    pods, pod, address, port = _pod(os.environ)
    common = {
        **os.environ,
        "WORLD_SIZE": str(pods * ranks),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # DeepSpeed compiles the ops that it needs (CPU Adam) with the `ninja` on PATH.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "atlantis_ds", *arguments],
            env={**common, "RANK": str(pod * ranks + rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]

    def forward(number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, forward)
    try:
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _pod(environ: Mapping[str, str]) -> tuple[int, int, str, str]:
    """(pods, this pod, address and port of the master) of a Kubeflow job, or else of this machine alone.

    Raises:
        InputError: PET_NNODES is set, but not all variables that belong to it.
    """
    if "PET_NNODES" not in environ:
        return 1, 0, "127.0.0.1", str(free_port())
    names = ("PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
    if unset := [name for name in names if not environ.get(name)]:
        raise InputError(f"PET_NNODES is set, but not {', '.join(unset)}; unset it, or start with torchrun")
    if not (environ["PET_NNODES"].isdigit() and environ["PET_NODE_RANK"].isdigit()):
        raise InputError("PET_NNODES and PET_NODE_RANK must be whole numbers")
    pods, pod = int(environ["PET_NNODES"]), int(environ["PET_NODE_RANK"])
    return pods, pod, environ["PET_MASTER_ADDR"], environ["PET_MASTER_PORT"]


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed:
            _end(processes)
            # A rank that failed by itself (code > 0) is more informative than one that was ended by a signal.
            if own := [code for code in failed if code > 0]:
                return own[0]
            rank = codes.index(failed[0])
            print(f"fault: rank {rank} was killed ({signal.Signals(-failed[0]).name})", file=sys.stderr, flush=True)
            return 1
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _end(processes: list[subprocess.Popen[bytes]], grace_seconds: float = 3.0) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + grace_seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
