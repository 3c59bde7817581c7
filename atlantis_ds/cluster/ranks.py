"""Who am I among the ranks of this job, and how the ranks meet."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from atlantis_ds.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """One rank's place in the job, as its launcher told it."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        import torch.distributed as dist

        dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in rank order."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, *values: float) -> list[float]:
        """Sums of float64 values over the ranks."""
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()


def launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return "WORLD_SIZE" in environ or "RANK" in environ


def find_place(environ: Mapping[str, str]) -> Place:
    """Find this rank's place under torchrun or ``deepspeed``; alone, rank 0 of 1.

    Raises:
        InputError: the environment is half set or contradicts itself; the variables are named.
    """
    if not launched(environ):
        return Place(0, 1, 0, "127.0.0.1", free_port())
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in environ]:
        raise InputError(f"the launcher set some of {', '.join(names)} but not {', '.join(missing)}")
    try:
        rank, world_size, local_rank, port = (int(environ[n]) for n in (*names[:3], names[4]))
    except ValueError:
        values = ", ".join(f"{name}={environ[name]!r}" for name in names)
        raise InputError(f"the launcher's variables are not numbers: {values}") from None
    if not 0 <= rank < world_size:
        raise InputError(f"RANK={rank} does not fit WORLD_SIZE={world_size}")
    return Place(rank, world_size, local_rank, environ["MASTER_ADDR"], port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(timeout_minutes: float) -> Ranks:
    """Join the process group (NCCL on GPUs, Gloo on CPUs).

    Args:
        timeout_minutes: how long a collective may wait for the slowest rank.
    """
    place = find_place(os.environ)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.master_addr,
        MASTER_PORT=str(place.master_port),
    )
    _hush()
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(minutes=timeout_minutes),
    )
    return Ranks(place.rank, place.world_size, device)


def _hush() -> None:
    """Keep the libraries' loading bars and deprecation notes out of the log."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def stop_ranks() -> None:
    """Leave the process group; a rank that exits without it can die in teardown."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
