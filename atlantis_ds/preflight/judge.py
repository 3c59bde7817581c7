"""Evaluates the figures of all ranks: pure functions, one for each check of the report."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from atlantis_ds.cluster.watch import Seat

SLOW = 0.8
"""A rank below this share of the median rate is slow: all others wait for it at every step."""
CLOCKS_APART = 120.0
"""Seconds. Slurm's munge refuses a node whose clock is minutes off, and files from the future are never rebuilt."""
LINK_SHARE = 0.5
"""A network that reaches less than this share of its link's speed is not used properly."""
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    found: str
    """The figures, for people."""
    fails: Sequence[str] = ()
    """Reasons why the job would fail, or run slowly, each with the host."""
    warns: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    """The figures, for programs."""
    tried: bool = True

    @property
    def verdict(self) -> Literal["ok", "warning", "fails", "not tried"]:
        return "fails" if self.fails else "warning" if self.warns else "ok" if self.tried else "not tried"


def judge_places(seats: Sequence[Seat]) -> Check:
    """The ranks that have connected, and their hosts."""
    ranks = Counter(seat.host for seat in seats)
    devices = {seat.host: seat.device for seat in seats}
    told = [f"{host} {count} x {devices[host]}" for host, count in ranks.items()]
    more = f" and {len(told) - 4} more" if len(told) > 4 else ""
    found = f"{len(seats)} on {len(ranks)} host{'s' if len(ranks) > 1 else ''}: {', '.join(told[:4])}{more}"
    return Check("ranks", found, data={"ranks": [vars(seat) for seat in seats]})


def judge_versions(versions: Sequence[Mapping[str, str]], seats: Sequence[Seat]) -> Check:
    """Versions that differ from those of most ranks; different GPUs are reported, but allowed.

    Args:
        versions: the versions of each rank, by package.
    """
    common: dict[str, str] = {}
    fails = []
    for name in versions[0]:
        common[name], odd = _odd([found[name] for found in versions], seats)
        fails += [f"{host} has {name} {value}, the others {common[name]}" for host, value in odd.items()]
    device, odd = _odd([seat.device for seat in seats], seats)
    warns = [f"{host} has {value}, the others {device}" for host, value in odd.items()]
    found = ", ".join(f"{name} {value}" for name, value in common.items())
    return Check("versions", found, fails, warns, {"versions": common})


def _odd(values: Sequence[str], seats: Sequence[Seat]) -> tuple[str, dict[str, str]]:
    """The most common value, and the hosts with a different one."""
    common = Counter(values).most_common(1)[0][0]
    return common, {seat.host: value for seat, value in zip(seats, values, strict=True) if value != common}


def judge_clocks(clocks: Sequence[float], seats: Sequence[Seat]) -> Check:
    """Hosts whose clock differs from the median clock.

    Args:
        clocks: seconds, read by all ranks at about the same time.
    """
    middle = statistics.median_low(clocks)
    other = seats[list(clocks).index(middle)].host
    off: dict[str, float] = {}
    for seat, clock in zip(seats, clocks, strict=True):
        off[seat.host] = max(off.get(seat.host, 0.0), clock - middle, key=abs)
    fails = [
        f"the clock of {host} is {abs(by):.0f} s {'ahead of' if by > 0 else 'behind'} that of {other}; synchronise it "
        "with NTP"
        for host, by in off.items()
        if abs(by) > CLOCKS_APART
    ]
    apart = max(clocks) - min(clocks)
    return Check("clocks", f"{apart:.1f} s apart at most", fails, data={"seconds_off": off})


def judge_rates(rates: Sequence[float], dtype: str, seats: Sequence[Seat], cpu: bool) -> Check:
    """Ranks whose matrix products are slower than those of the others.

    Args:
        rates: FLOP/s of each rank.
        cpu: whether ranks are on CPUs, where other programs may slow a rank for a while, so this is only a warning.
    """
    middle = statistics.median(rates)
    slow = [
        f"{seat} reaches {speed(rate)}, {rate / middle:.0%} of the median of {speed(middle)}"
        for seat, rate in zip(seats, rates, strict=True)
        if is_slow(rate, rates)
    ]
    found = f"{dtype}: median of the ranks {speed(middle)}, lowest {speed(min(rates))}"
    data = {"dtype": dtype, "flops": list(rates)}
    return Check("matmul", found, () if cpu else slow, slow if cpu else (), data)


def is_slow(rate: float, rates: Sequence[float]) -> bool:
    """Whether a rank's rate is far below the median."""
    return rate < SLOW * statistics.median(rates)


def speed(flops: float) -> str:
    """FLOP/s, for people."""
    return f"{flops / 1e12:.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:.0f} GFLOP/s"


def judge_bandwidth(bandwidth: Mapping[str, float], links: Mapping[str, float], size: int) -> Check:
    """A network between nodes that is slower than its links.

    Args:
        bandwidth: GB/s of an all-reduce between ``all ranks``, ``inside HOST`` and ``between nodes``.
        links: Gbit/s of the fastest link of each host; 0 if unknown.
        size: bytes of the all-reduce.
    """
    warns = []
    slowest = min(links, key=lambda host: links[host])
    between, link = bandwidth.get("between nodes"), links[slowest]
    if between is not None and between < LINK_SHARE * link / 8:
        warns.append(
            f"between nodes {between:.2f} GB/s, and {slowest} has a link of {link:g} Gbit/s ({link / 8:.1f} GB/s): "
            "check which network is used, with NCCL_DEBUG=INFO (or GLOO_SOCKET_IFNAME)"
        )
    told = {key: value for key, value in bandwidth.items() if not key.startswith("inside ")}
    inside = {key: value for key, value in bandwidth.items() if key.startswith("inside ")}
    if inside and between is not None:
        worst = min(inside, key=lambda key: inside[key])
        told[f"{worst} (the slowest)" if len(inside) > 1 else worst] = inside[worst]
    found = ", ".join(f"{key} {value:.2f}" for key, value in told.items())
    found = f"{size // 2**20} MiB, bus GB/s: {found}" if told else "one rank, nothing to measure"
    return Check("all-reduce", found, (), warns, {"gb_per_s": dict(bandwidth), "link_gbit_per_s": dict(links)})


@dataclass(frozen=True)
class Room:
    """Free resources of a rank, in bytes."""

    host: int
    """Memory of its host, or of the job on the host."""
    device: int | None
    """Memory of its GPU."""
    run: int
    """Disk of the run folder."""
    temporary: int
    """Disk of $TMPDIR."""
    unreachable: str = ""
    """Why it is not writable, or that the run folder is not the one that rank 0 sees."""


def judge_room(
    rooms: Sequence[Room], needs: Mapping[str, float], tmpdir: str, run: str, seats: Sequence[Seat]
) -> Check:
    """Memory and disks that are too small for the job.

    Args:
        needs: bytes: ``host`` and ``device`` (of a rank), ``run`` and ``temporary`` (of a host).
    """
    fails, warns = [], []
    each = Counter(seat.host for seat in seats)
    of_host = {seat.host: room for seat, room in zip(seats, rooms, strict=True)}
    for host, room in of_host.items():
        if room.unreachable:
            fails.append(f"{host}: {room.unreachable}")
        for what, free, need in (
            ("memory", room.host, needs["host"] * each[host]),
            (f"disk of {run}", room.run, needs["run"]),
            (f"disk of $TMPDIR {tmpdir}", room.temporary, needs["temporary"]),
        ):
            if free < need:
                fails.append(f"{host}: {what}: {size(free)} free, about {size(need)} needed")
    for seat, room in zip(seats, rooms, strict=True):
        if room.device is not None and room.device < needs["device"]:
            warns.append(f"{seat}: GPU memory: {size(room.device)} free, about {size(needs['device'])} needed")
    least = {"memory of a rank": (needs["host"], min(room.host // each[host] for host, room in of_host.items()))}
    if devices := [room.device for room in rooms if room.device is not None]:
        least["GPU"] = needs["device"], min(devices)
    least["run folder"] = needs["run"], min(room.run for room in rooms)
    least["$TMPDIR"] = needs["temporary"], min(room.temporary for room in rooms)
    found = "needs " + "; ".join(f"{what} {size(need)} of {size(free)}" for what, (need, free) in least.items())
    data = {"needs": dict(needs), "free": {host: vars(room) for host, room in of_host.items()}}
    return Check("room", found, fails, warns, data)


def size(count: float) -> str:
    """Bytes, for people."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Files:
    """A model as one host sees it."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each file of its folder, by path."""
    fails: Sequence[str] = ()
    warns: Sequence[str] = ()


def judge_files(found: Mapping[str, Files]) -> Check:
    """Models that a host cannot read, or that are not the same everywhere.

    Args:
        found: by host.
    """
    fails = [f"{host}: {reason}" for host, files in found.items() for reason in files.fails]
    warns = [f"{host}: {reason}" for host, files in found.items() for reason in files.warns]
    paths = sorted({path for files in found.values() for path in files.sizes})
    for path in paths:
        folder = path.rpartition("/")[0]
        # A host without any files of a model reports this itself, or will download it.
        having = [host for host, files in found.items() if any(p.rpartition("/")[0] == folder for p in files.sizes)]
        sizes = {host: found[host].sizes.get(path) for host in having}
        common = Counter(sizes.values()).most_common(1)[0][0]
        for host, own in sizes.items():
            if own != common:
                has, others = (f"{n:,} bytes" if n is not None else "no such file" for n in (own, common))
                fails.append(f"{host}: {path}: {has}, on other nodes {others}")
    every = next(iter(found.values())).sizes
    told = f"{len(every)} files, {size(sum(every.values()))}, on {len(found)} host{'s' if len(found) > 1 else ''}"
    return Check("models", told, fails, warns, {"files": dict(every)})


def judge_step(trial: Mapping[str, Any]) -> Check:
    """The steps that were tried: their speed, and their memory compared with the plan."""
    warns = [] if trial["finite"] else ["the step's loss or gradient is not finite, on random tokens"]
    found = (
        f"{trial['micro_batches']} x {trial['micro_batch']} examples of up to {trial['longest']} tokens per rank: "
        f"{trial['seconds']:.2f} s, {trial['tokens_per_s']:,.0f} tokens/s, peak {size(trial['peak_bytes'])} "
        f"(plan {size(trial['plan_bytes'])}); a whole step about {trial['whole_step_seconds']:.1f} s"
    )
    return Check("train step", found, (), warns, trial)
