"""The rank of this process in the job, and how the ranks connect."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from atlantis_ds.errors import InputError, RunError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """The place of one rank in the job, as given by the launcher."""

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

    @classmethod
    def alone(cls) -> Ranks:
        """The only rank of a command that starts no process group, such as ``merge``; it does not communicate."""
        return cls(0, 1, None)  # type: ignore[arg-type]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def hardware(self) -> str:
        """The hardware: the name of the GPU, or the widest CPU instructions that matrix products can use.

        Other hardware rounds differently, so the same recipe and seed lead to other model weights there. All ranks are
        assumed to have the same hardware.
        """
        import torch

        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        can = torch.cpu.get_capabilities()
        kinds = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")
        return f"{can['architecture']} CPU, {next((kind for kind in kinds if can.get(kind)), 'no vector instructions')}"

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


_NAMED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
"""Variables of MPICH and Intel MPI (Hydra)."""
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


def launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of several ranks."""
    outer = _mpi_or_slurm(environ)
    return any(name in environ for name in _NAMED) or (outer is not None and environ.get(outer[1]) != "1")


def find_place(environ: Mapping[str, str]) -> Place:
    """Find this rank's place under torchrun, ``deepspeed``, ``mpirun`` or ``srun``; without a launcher, rank 0 of 1.

    torchrun and ``deepspeed`` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which take precedence,
    because these launchers may run under srun themselves. Under mpirun, the ranks agree on the master through mpi4py.
    Under srun, the master is the first host of the step's node list, and the port is computed from job and step. If
    both MASTER_ADDR and MASTER_PORT are set, they are always used.

    Raises:
        InputError: variables are missing or contradict each other; the message names them.
    """
    outer = _mpi_or_slurm(environ)
    master = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ]
    if any(name in environ for name in _NAMED):
        if len(master) < 2 or any(name not in environ for name in _NAMED):
            all_of = (*_NAMED, "MASTER_ADDR", "MASTER_PORT")
            unset = ", ".join(name for name in all_of if name not in environ)
            raise InputError(f"of {', '.join(all_of)}, some are set, but not {unset}; a launcher sets all or none")
        rank, size, local = _numbers(environ, _NAMED)
        if outer:
            outer_rank, outer_size, _ = _numbers(environ, outer)
            if size < outer_size or (size == outer_size and rank != outer_rank):
                raise InputError(
                    f"RANK={rank} of WORLD_SIZE={size} contradicts {outer[0]}={outer_rank} of {outer[1]}={outer_size}; "
                    f"unset {', '.join(_NAMED)}"
                )
    elif outer:
        rank, size, local = _numbers(environ, outer)
    elif "PMIX_RANK" in environ:
        raise InputError("PMIX_RANK is set, but by an unknown launcher; start with srun, mpirun or torchrun")
    else:
        return Place(0, 1, 0, "127.0.0.1", free_port())
    if len(master) == 1:
        raise InputError(f"only {master[0]} is set: set both MASTER_ADDR and MASTER_PORT, or neither")
    if master:
        address, port = environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")
    else:
        if outer == _PMI:
            raise InputError(
                "mpirun of MPICH or Intel MPI (PMI_RANK is set): set MASTER_ADDR to the first host and MASTER_PORT to "
                "a free port there, for all ranks"
            )
        address, port = _agree_by_mpi(environ) if outer == _MPI else _slurm_master(environ)
    return Place(rank, size, local, address, port)


def _mpi_or_slurm(environ: Mapping[str, str]) -> tuple[str, str, str] | None:
    if any(name in environ for name in _MPI):
        return _MPI
    # A batch script outside srun also has SLURM_PROCID and SLURM_NTASKS, although only one process runs.
    if "SLURM_STEP_ID" in environ:
        return _SLURM
    return _PMI if "PMI_RANK" in environ else None


def _numbers(environ: Mapping[str, str], names: tuple[str, str, str]) -> tuple[int, int, int]:
    if unset := [name for name in names if name not in environ]:
        raise InputError(f"of {', '.join(names)}, some are set, but not {', '.join(unset)}; start with srun or mpirun")
    rank, size, local = (_number(environ, name) for name in names)
    if not 0 <= rank < size:
        raise InputError(f"{names[0]}={rank} does not fit {names[1]}={size}")
    return rank, size, local


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ.get(name, ""))
    except ValueError:
        raise InputError(f"{name}={environ.get(name, '')!r} is not a whole number") from None


def _slurm_master(environ: Mapping[str, str]) -> tuple[str, int]:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise InputError("SLURM_STEP_ID is set, but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST")
    host = first_host(nodes)
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        # Node names need not resolve; the batch script, which starts srun, runs on the first node.
        host = environ.get("SLURM_LAUNCH_NODE_IPADDR", host)
    # Below the range of outgoing connections; it depends on the step, so that two steps of one job use different ports.
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    return host, 15000 + (31 * job + step) % 15000


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: ``gpu[07-09,12],cpu1`` gives ``gpu07``."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).split(",")[0]


def _agree_by_mpi(environ: Mapping[str, str]) -> tuple[str, int]:
    """Rank 0's address (as DeepSpeed's own discovery finds it) and a free port there, sent to all ranks through MPI."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise InputError("mpirun: mpi4py is missing; install it, or set MASTER_ADDR and MASTER_PORT") from None
    place: tuple[str, int] | None = None
    if MPI.COMM_WORLD.Get_rank() == 0:
        address = "127.0.0.1"
        if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") != environ["OMPI_COMM_WORLD_SIZE"]:
            address = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
        place = address, free_port()
    agreed: tuple[str, int] = MPI.COMM_WORLD.bcast(place, root=0)
    return agreed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def gpu_of(local_rank: int, visible: int) -> int:
    """The GPU that a rank uses; the only visible one if each task sees only its own (--gpus-per-task).

    Raises:
        InputError: more ranks on this node than GPUs.
    """
    if visible > 1 and local_rank >= visible:
        raise InputError(
            f"local rank {local_rank} on {socket.gethostname()}, where {visible} GPUs are visible: start one rank per "
            "GPU"
        )
    return local_rank if visible > 1 else 0


def start_ranks(timeout_minutes: float) -> Ranks:
    """Join the process group (NCCL on GPUs, Gloo on CPUs).

    Args:
        timeout_minutes: how long a rank waits for the master, and a collective waits for the slowest rank.

    Raises:
        InputError: some of the launcher's variables are missing or contradict each other; or more ranks than GPUs.
        RunError: the ranks did not connect in time; the message names host and port of the master.
    """
    place = find_place(os.environ)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.master_addr,
        MASTER_PORT=str(place.master_port),
    )
    hush_libraries()
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        device = torch.device("cuda", gpu_of(place.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        # DeepSpeed uses the GPU with this number.
        os.environ["LOCAL_RANK"] = str(device.index)
        if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed requires that the two are equal
            os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(device.index)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    failures: list[Exception] = []

    def join() -> None:
        try:
            timeout = timedelta(minutes=timeout_minutes)
            store = open_store(timeout, serve=place.rank == 0)
            _call_roll(store, place, timeout)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=place.rank,
                world_size=place.world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        except Exception as error:
            failures.append(error)

    # In another thread, because torch waits forever for a master that accepts the connection and then does not answer:
    # a frozen one, or another program at that port. The extra seconds let torch report its own error first.
    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    joining.join(60 * timeout_minutes + 5)
    if joining.is_alive():
        failures.append(RuntimeError("it accepted the connection, but does not answer"))
    for error in failures:
        if not isinstance(error, RuntimeError):
            raise error
        master = f"{place.master_addr}:{place.master_port}"
        raise RunError(
            f"rank {place.rank} of {place.world_size} on {socket.gethostname()} could not connect to the others at "
            "the master "
            f"{master} within {timeout_minutes:g} minutes: {str(error).splitlines()[0]}"
        )
    return Ranks(place.rank, place.world_size, device)


def open_store(timeout: timedelta, serve: bool = False) -> Any:
    """The key-value store at the master, through which the ranks connect.

    Args:
        timeout: time limit of one request.
        serve: whether this process serves the store, unless torchrun does.
    """
    import torch.distributed as dist

    serve = serve and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=serve, timeout=timeout, wait_for_workers=False)
    # Ranks that torchrun has restarted must not see the entries of the previous ranks.
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _call_roll(store: Any, place: Place, timeout: timedelta) -> None:
    """Wait until all ranks are connected; RuntimeError names those that are missing."""
    store.set(f"here-{place.rank}", "")
    keys = [f"here-{rank}" for rank in range(place.world_size)]
    try:
        if place.rank == 0:
            store.wait(keys, timeout)
            store.set("all-here", "")
        else:
            store.wait(["all-here"], timeout)
    except RuntimeError:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        if not missing:
            raise
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise RuntimeError(
            f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing[:8])}{more} did not connect"
        ) from None


def hush_libraries() -> None:
    """Keep the libraries' loading bars and deprecation notes out of the log."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed|transformers")
    # On import it suggests a kernel from the hub, even without 4-bit weights.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


def stop_ranks() -> None:
    """Leave the process group, and MPI if the ranks connected through it; then the process may ``end_rank``."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    if "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].Finalize()


def end_rank(code: int = 0) -> NoReturn:
    """Flush the output and end this process without Python's own teardown.

    During teardown, a remaining torch thread can abort a rank whose work is done (seen once on a busy machine:
    "terminate called without an active exception"), and a rank that others wait for must not hang.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended or was too late."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)
