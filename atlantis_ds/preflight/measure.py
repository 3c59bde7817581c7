"""What each rank measures and checks on its own host."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from atlantis_ds import __version__
from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.cluster.watch import Seat
from atlantis_ds.config.schema import Model
from atlantis_ds.errors import InputError, RunError
from atlantis_ds.files import wait_for_files
from atlantis_ds.hub import Repository, adapter_base, cached
from atlantis_ds.lm.frozen import cgroup_room
from atlantis_ds.lm.load import DTYPES
from atlantis_ds.preflight.judge import Files, Room
from atlantis_ds.run_folder import RunFolder

PACKAGES = ("torch", "transformers", "deepspeed")
SECONDS = 2.0
"""Seconds for all timed matrix products."""
TRIAL_SECONDS = {"cuda": 0.1, "cpu": 0.03}
"""Short on a CPU: others use it, too, and at least one trial should find it idle."""
REPEATS = 5
"""Number of timed all-reduces."""
MARK_SECONDS = 10.0
"""Seconds within which a file created by rank 0 in the run folder must be visible."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that must agree, read without importing them."""
    found = {"python": platform.python_version(), "atlantis_ds": __version__}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def now(device: torch.device) -> float:
    """Seconds, after the GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_rate(device: torch.device, dtype: str) -> float:
    """FLOP/s of square matrix products, at the fastest size.

    On CPUs, the best of many short trials, since ranks and other programs share the cores; on GPUs, the median, since a
    throttled GPU is fast at first.
    """
    sizes = (4096, 8192) if device.type == "cuda" else (512, 1024)
    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        trials = _trials(lambda: torch.mm(left, right), device, SECONDS / len(sizes))  # noqa: B023
        seconds = statistics.median(trials) if device.type == "cuda" else min(trials)
        best = max(best, 2 * size**3 / seconds)
    return best


def _trials(multiply: Callable[[], torch.Tensor], device: torch.device, seconds: float) -> list[float]:
    """Seconds of one product, in each of several trials."""
    multiply()
    once = min(_seconds(multiply, 1, device) for _ in range(5))
    repeats = max(1, round(TRIAL_SECONDS[device.type] / once))
    trials: list[float] = []
    end = time.perf_counter() + seconds
    while not trials or time.perf_counter() < end:
        trials.append(_seconds(multiply, repeats, device) / repeats)
    return trials


def _seconds(multiply: Callable[[], torch.Tensor], repeats: int, device: torch.device) -> float:
    start = now(device)
    for _ in range(repeats):
        multiply()
    return now(device) - start


def all_reduce_size(device: torch.device) -> int:
    """Bytes."""
    return 2**28 if device.type == "cuda" else 2**24


def all_reduce_bandwidth(ranks: Ranks, seats: Sequence[Seat]) -> dict[str, float]:
    """Bus bandwidth in GB/s as defined by nccl-tests, between all ranks, inside each host, and between the hosts.

    Between hosts, the first rank of each takes part. Every rank must call it; all ranks get the same figures.
    """
    hosts = list(dict.fromkeys(seat.host for seat in seats))
    members = {"all ranks": [seat.rank for seat in seats]}
    if len(hosts) > 1:
        for host in hosts:
            members[f"inside {host}"] = [seat.rank for seat in seats if seat.host == host]
        members["between nodes"] = [next(seat.rank for seat in seats if seat.host == host) for host in hosts]
    members = {name: of for name, of in members.items() if len(of) > 1}
    seconds = {}
    for name, of in members.items():
        group = dist.new_group(of)  # all ranks create all groups, in the same order
        if ranks.rank in of:
            seconds[name] = _all_reduce_seconds(ranks, group)
        ranks.barrier()
    longest: dict[str, float] = {}
    for found in ranks.gather(seconds):
        longest |= {name: max(longest.get(name, 0.0), value) for name, value in found.items()}
    size = all_reduce_size(ranks.device)
    return {name: 2 * (len(of) - 1) / len(of) * size / longest[name] / 1e9 for name, of in members.items()}


def _all_reduce_seconds(ranks: Ranks, group: Any) -> float:
    tensor = torch.zeros(all_reduce_size(ranks.device) // 4, device=ranks.device)
    dist.all_reduce(tensor, group=group)
    start = now(ranks.device)
    for _ in range(REPEATS):
        dist.all_reduce(tensor, group=group)
    return (now(ranks.device) - start) / REPEATS


def link_speed(device: torch.device, sys: Path = Path("/sys/class")) -> float:
    """Gbit/s of this host's fastest active network link; 0 if the kernel reports none.

    Ranks on CPUs (Gloo) do not use InfiniBand itself.
    """
    speeds = [0.0]
    for card in sys.glob("net/*"):
        with contextlib.suppress(OSError, ValueError):  # no figure for a card without a link, or for a virtual one
            if (card / "device").exists() and (card / "operstate").read_text().strip() == "up":
                speeds.append(int((card / "speed").read_text()) / 1000)
    for port in sys.glob("infiniband/*/ports/*") if device.type == "cuda" else ():
        with contextlib.suppress(OSError, ValueError):  # "4: ACTIVE", "100 Gb/sec (4X EDR)"
            if "ACTIVE" in (port / "state").read_text():
                speeds.append(float((port / "rate").read_text().split()[0]))
    return max(speeds)


def tmpdir() -> str:
    return os.environ.get("TMPDIR", tempfile.gettempdir())


def room(ranks: Ranks, folder: RunFolder, mark: str) -> Room:
    """Free resources of this rank, and whether it can write to the run folder that rank 0 sees.

    Args:
        mark: a file in it, created by rank 0.
    """
    import psutil  # type: ignore[import-untyped]

    trouble = ""
    try:
        for place in (folder.root, Path(tmpdir())):
            with tempfile.NamedTemporaryFile(dir=place, prefix=".preflight."):
                pass
        wait_for_files([folder.root / mark], MARK_SECONDS)
    except OSError as error:
        trouble = f"cannot write: {error}"
    except RunError:
        trouble = f"{folder.root} is not the folder that rank 0 sees; put the run on a shared file system"
    return Room(
        min(psutil.virtual_memory().available, cgroup_room()),
        torch.cuda.mem_get_info(ranks.device)[0] if ranks.device.type == "cuda" else None,
        _free(folder.root),
        _free(Path(tmpdir())),
        trouble,
    )


def _free(path: Path) -> int:
    path = path.absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def model_files(name: str, model: Model) -> Files:
    """A model as seen by this host: a folder, or the files of an id in the cache or on the hub."""
    path = Path(str(model.model_name_or_path)).expanduser()
    if path.is_dir():
        found = folder_files(path)
        try:
            base = adapter_base(model)
        except (OSError, ValueError, KeyError) as error:
            return Files(found.sizes, [*found.fails, f"{path / 'adapter_config.json'}: not readable: {error}"])
        if base is not None:
            under = model_files(name, base)
            return Files({**found.sizes, **under.sizes}, [*found.fails, *under.fails], [*found.warns, *under.warns])
        return found
    if path.is_absolute() or str(model.model_name_or_path).startswith((".", "~")):
        return Files(fails=[f"models.{name}: {path}: no such folder"])
    return _hub_files(name, model)


def folder_files(folder: Path) -> Files:
    """The files of a model folder; missing, truncated or broken safetensors are named."""

    from safetensors import SafetensorError, safe_open

    sizes, fails = {}, []
    try:
        sizes = {str(path): path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    except OSError as error:
        return Files(fails=[f"{folder}: {error}"])
    weights = [path for path in map(Path, sizes) if path.suffix == ".safetensors"]
    if not weights:
        fails.append(f"{folder}: no safetensors file")
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            fails.append(f"{path}: truncated or broken ({str(error).splitlines()[0]}); copy it again")
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            fails.append(f"{index}: not readable: {error}")
            continue
        fails += [
            f"{folder / file}: no such file, but {index.name} names it"
            for file in sorted(named)
            if str(folder / file) not in sizes
        ]
    return Files(sizes, fails)


def _hub_files(name: str, model: Model) -> Files:
    from huggingface_hub import HfApi

    repository, revision = str(model.model_name_or_path), model.revision or "main"
    try:
        folder = cached(Repository(f"models.{name}", "model", repository, model.revision))
    except InputError as error:
        return Files(fails=[f"models.{name}: {repository}: neither a folder nor a Hugging Face id ({error})"])
    if folder is not None:
        found = folder_files(folder)
        if not found.fails:
            # Only sizes, by name in the repository: each node may have its own cache.
            return Files({f"{repository}/{Path(path).name}": size for path, size in found.sizes.items()})
        missing = "; ".join(found.fails)
    else:
        missing = "not in the cache"
    try:
        HfApi().model_info(repository, revision=revision, timeout=10)
    except Exception as error:  # the errors of the hub's client and its HTTP library have no common base class
        said = (" ".join(str(error).split()) or type(error).__name__)[:200]
        return Files(fails=[f"models.{name}: {repository}: {missing}, and the hub cannot be reached: {said}"])
    return Files(warns=[f"models.{name}: {repository}: {missing}; every node will download it"])
