"""Start ranks on this machine when no launcher did: ``run --ranks N``; on each pod of a Kubeflow job, too."""

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

    torchrun would do, but it turns every exit code into 1: here the first rank that fails decides the exit code,
    the others are ended, and signals are passed on. Where the Kubeflow Trainer has told this pod its place (PET_NNODES
    and what belongs to it), the N ranks are those of this pod.

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
        # DeepSpeed compiles the ops it needs (CPU Adam) with the `ninja` that it finds on PATH.
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
    """(pods, this pod, address and port of the master): of a Kubeflow job, else this machine alone.

    Raises:
        InputError: PET_NNODES is set, and not all that belongs to it is.
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
            # A rank that fails of itself (code > 0) tells more than one that a signal ended.
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
