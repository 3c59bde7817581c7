"""Preflight: what it makes of figures, and real ranks of which one is sick."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Job, WriteRecipe, in_process, launch

from atlantis_ds.cluster.ranks import free_port
from atlantis_ds.cluster.watch import Seat
from atlantis_ds.config.schema import Model
from atlantis_ds.preflight.judge import (
    Check,
    Files,
    Room,
    judge_bandwidth,
    judge_clocks,
    judge_files,
    judge_places,
    judge_rates,
    judge_room,
    judge_versions,
)
from atlantis_ds.preflight.measure import folder_files, link_speed, model_files
from atlantis_ds.preflight.preflight import smaller

SEATS = [Seat(rank, f"node{rank // 2}", rank % 2, "H100") for rank in range(6)]
CHECKS = ["ranks", "versions", "clocks", "matmul", "all-reduce", "models", "room", "train step"]


def only(check: Check, *words: str) -> None:
    """It fails for one reason, which holds these words."""
    assert check.verdict == "fails" and len(check.fails) == 1, check
    assert all(word in check.fails[0] for word in words), check.fails[0]


def test_places_are_counted_by_host() -> None:
    assert judge_places(SEATS).found == "6 on 3 hosts: node0 2 x H100, node1 2 x H100, node2 2 x H100"


def test_another_version_is_named_and_another_gpu_told() -> None:
    same = [{"torch": "2.13.0", "python": "3.11.7"}] * 6
    assert judge_versions(same, SEATS).verdict == "ok"
    only(judge_versions([*same[:5], {"torch": "2.12.0", "python": "3.11.7"}], SEATS), "node2", "torch 2.12.0", "2.13.0")
    mixed = judge_versions(same, [*SEATS[:5], Seat(5, "node2", 1, "L4")])
    assert mixed.verdict == "warning" and mixed.warns == ["node2 has L4, the others H100"]


def test_a_clock_ten_minutes_off_is_named() -> None:
    clocks = [1e9, 1e9 + 1, 1e9 + 90, 1e9 + 90, 1e9, 1e9]
    assert judge_clocks(clocks, SEATS).verdict == "ok"
    only(judge_clocks([*clocks[:4], 1e9 - 600, 1e9 - 600], SEATS), "node2", "600 s behind that of node0")
    only(judge_clocks([1e9, 1e9 + 600], [SEATS[0], SEATS[2]]), "node1", "600 s ahead of that of node0")
    for clocks in ([1e9, 1e9 + 600], [1e9 + 600, 1e9]):  # of one host, the clock that is further off
        assert judge_clocks(clocks, [SEATS[0]] * 2).verdict == "fails"


def test_a_slow_rank_is_named_beside_the_median() -> None:
    rates = [6e14, 6e14, 6e14, 4.5e14, 6e14, 6e14]
    assert judge_rates([*rates[:3], 5e14, *rates[4:]], "bfloat16", SEATS, cpu=False).verdict == "ok"
    slow = judge_rates(rates, "bfloat16", SEATS, cpu=False)
    only(slow, "rank 3 on node1 (local rank 1)", "450 TFLOP/s", "75%", "600 TFLOP/s")
    shared = judge_rates(rates, "bfloat16", SEATS, cpu=True)
    assert shared.verdict == "warning" and shared.warns == slow.fails


def test_a_network_below_half_its_link_is_a_warning() -> None:
    links = {"node0": 100.0, "node1": 200.0}
    assert judge_bandwidth({"all ranks": 5.0, "between nodes": 7.0}, links, 2**28).verdict == "ok"
    slow = judge_bandwidth({"all ranks": 5.0, "inside node0": 300.0, "between nodes": 1.1}, links, 2**28)
    assert slow.verdict == "warning" and "node0 has a link of 100 Gbit/s (12.5 GB/s)" in slow.warns[0]
    unknown = judge_bandwidth({"all ranks": 0.1, "between nodes": 0.1}, {"node0": 0.0, "node1": 200.0}, 2**28)
    assert unknown.verdict == "ok"
    assert judge_bandwidth({}, {"node0": 0.0}, 2**28).found == "one rank, nothing to measure"


def test_links_are_read_where_they_are_up(tmp_path: Path) -> None:
    import torch

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    assert link_speed(torch.device("cpu"), tmp_path) == 0
    write(net__eth0__operstate="up\n", net__eth0__speed="25000\n", net__eth0__device="")
    write(net__eth1__operstate="down\n", net__eth1__speed="100000\n", net__eth1__device="")
    write(net__veth0__operstate="up\n", net__veth0__speed="400000\n")
    write(infiniband__mlx5__ports__1__state="4: ACTIVE\n", infiniband__mlx5__ports__1__rate="200 Gb/sec (4X HDR)\n")
    assert link_speed(torch.device("cpu"), tmp_path) == 25
    assert link_speed(torch.device("cuda"), tmp_path) == 200


def test_what_does_not_fit_is_named_with_its_host() -> None:
    needs = {"host": 2.0e9, "device": 40e9, "run": 100e9, "temporary": 1e6}
    good = Room(8 * 10**9, 70 * 10**9, 10**12, 10**9)
    full = Room(8 * 10**9, 70 * 10**9, 10**10, 10**9)
    crowded = Room(3 * 10**9, 30 * 10**9, 10**12, 10**9)

    def judged(last: Room) -> Check:
        return judge_room([good] * 4 + [last] * 2, needs, "/tmp", "runs/x", SEATS)

    assert judged(good).verdict == "ok"
    only(judged(full), "node2", "disk of runs/x", "9.3 GiB free", "93.1 GiB needed")
    only(judged(crowded), "node2", "memory", "2.8 GiB free", "3.7 GiB needed")  # of two ranks
    assert judged(crowded).warns[0].startswith("rank 4 on node2 (local rank 0): GPU memory")
    only(judged(Room(8 * 10**9, None, 10**12, 10**9, "cannot write")), "node2: cannot")


def test_files_that_differ_between_hosts_are_named() -> None:
    whole = Files({"/m/a.safetensors": 10, "/m/config.json": 2})
    assert judge_files({"node0": whole, "node1": whole}).verdict == "ok"
    short = Files({"/m/a.safetensors": 4, "/m/config.json": 2})
    only(judge_files({"node0": whole, "node1": whole, "node2": short}), "node2: /m/a.safetensors: 4 bytes", "10 bytes")
    lacks = Files({"/m/config.json": 2})
    only(judge_files({"node0": whole, "node1": whole, "node2": lacks}), "node2: /m/a.safetensors: no such file")
    downloads = judge_files({"node0": whole, "node1": whole, "node2": Files(warns=["not in the cache"])})
    assert downloads.verdict == "warning" and downloads.warns == ["node2: not in the cache"]


def test_a_model_folder_that_is_not_whole_is_named(base_model: Path, tmp_path: Path) -> None:
    assert not folder_files(base_model).fails
    assert folder_files(tmp_path).fails == [f"{tmp_path}: no safetensors file"]
    broken = tmp_path / "broken"
    shutil.copytree(base_model, broken)
    os.truncate(broken / "model.safetensors", 1000)
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-2-of-2.safetensors"}}')
    cut, missing = folder_files(broken).fails
    assert str(broken / "model.safetensors") in cut and "truncated or broken" in cut
    assert str(broken / "model-2-of-2.safetensors") in missing and "no such file" in missing
    assert "no such folder" in model_files("large", Model(model_name_or_path=str(tmp_path / "gone"))).fails[0]


def test_a_hub_id_is_in_the_cache_or_within_reach(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    class OneModel(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            known = self.path.startswith("/api/models/me/tiny/revision/main")
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(b'{"id": "me/tiny"}')

    server = HTTPServer(("127.0.0.1", 0), OneModel)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    tiny, other = Model(model_name_or_path="me/tiny"), Model(model_name_or_path="me/other")
    assert model_files("large", tiny).warns == ["models.large: me/tiny: not in the cache; every node will download it"]
    assert model_files("large", other).fails[0].startswith("models.large: me/other: not in the cache, and the hub")
    server.shutdown()
    server.server_close()
    assert "cannot be reached" in model_files("large", tiny).fails[0]
    cached = tmp_path / "models--me--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(base_model, cached / "snapshots" / ("0" * 40))
    found = model_files("large", tiny)
    assert not found.fails and found.sizes["me/tiny/model.safetensors"] > 10_000


def test_a_smaller_micro_batch_is_proposed() -> None:
    assert "per_device_train_batch_size: 4 " in smaller(8, 6) and "per_device_train_batch_size: 2 " in smaller(8, 2)
    assert "per_device_train_batch_size: 1 " in smaller(2, 0) and "gradient_checkpointing" in smaller(1, 0)


def report(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "run" / "preflight.json").read_text())
    return {**found, "checks": {check["name"]: check for check in found["checks"]}}


@pytest.mark.ranks
def test_healthy_ranks_pass(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    in_process(recipe, "prepare")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    done = launch("torchrun", 2, "preflight", recipe)
    found = report(tmp_path)
    assert done.code == 0, done.out[-4000:]
    assert list(found["checks"]) == CHECKS
    # Other programs may slow a rank on this machine.
    assert all(check["verdict"] == "ok" for name, check in found["checks"].items() if name != "matmul"), found
    assert [rank["local_rank"] for rank in found["checks"]["ranks"]["data"]["ranks"]] == [0, 1]
    assert found["checks"]["all-reduce"]["data"]["gb_per_s"].keys() == {"all ranks"}
    step = found["checks"]["train step"]["data"]
    assert step["micro_batch"] == 4 and step["seconds"] > 0 and step["plan_bytes"] > 0 and step["finite"]
    # Of the examples, not of the assumed length; `tiny_recipe` has short sentences.
    assert "with the lengths of the longest in the run" in done.out and step["longest"] < 200
    left = sorted(str(path) for path in tmp_path.rglob("*"))
    assert left == sorted([*before, str(tmp_path / "run" / "preflight.json")])


RANK = """
import os, select, signal, sys, time
from types import SimpleNamespace
from atlantis_ds.cli import main
sys.argv[1:] = {arguments}
if {sick!r}:
    import torch
    from atlantis_ds.preflight import preflight
    def stop(*_): os.kill(os.getpid(), signal.SIGSTOP)
    def die(*_): os.kill(os.getpid(), signal.SIGKILL)
    def sleep(*_): time.sleep(1000)
    def oom(*_): raise torch.OutOfMemoryError("CUDA out of memory.")
    clock = SimpleNamespace(time=lambda: time.time() + 600, monotonic=time.monotonic)
    matmul_rate = preflight.matmul_rate
    def throttle(process, over):
        os.nice(-20)  # it must not be late itself
        while not select.select([over], [], [], 0.005)[0]:
            os.kill(process, signal.SIGSTOP)
            time.sleep(0.05)
            os.kill(process, signal.SIGCONT)
        os._exit(0)
    def throttled(*given):
        over, end = os.pipe()
        process = os.getpid()
        child = os.fork()
        if not child:
            os.close(end)
            throttle(process, over)
        try: return matmul_rate(*given)
        finally: os.close(end), os.waitpid(child, 0)
    if {sick!r} == "node": preflight.matmul_rate = throttled
    what, new = {{"stop": ("matmul_rate", stop), "die": ("matmul_rate", die), "sleep": ("link_speed", sleep),
                  "oom": ("try_step", oom), "node": ("time", clock)}}[{sick!r}]
    setattr(preflight, what, new)
main()
"""
"""A rank; of the sick one a part is replaced. No launcher, which would end the others at once."""


def start_pair(
    recipe: Path, sick: str = "", before: str = "", *arguments: str, env: dict[str, str] | None = None
) -> list[Job]:
    """Rank 0, and a rank 1 that may be sick.

    Args:
        before: shell commands that make another node for rank 1, in namespaces of its own.
    """
    port = str(free_port())
    jobs = []
    for rank in (0, 1):
        script = RANK.format(arguments=["preflight", str(recipe), *arguments], sick=sick if rank else "")
        command = [sys.executable, "-c", script]
        if rank and before:
            command = ["unshare", "--mount", "--uts", "sh", "-ec", f'{before}; exec "$@"', "rank", *command]
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        jobs.append(Job(command, place | (env or {})))
    return jobs


@pytest.mark.ranks
def test_a_sick_node_is_named(tiny_recipe: WriteRecipe, base_model: Path, tmp_path: Path) -> None:
    """Rank 1 on a node of its own: slow, its clock off, its copy of the model cut off, its $TMPDIR full.

    What throttles it runs for a tenth of the time, as a card does that is too hot.
    """
    trial = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, text=True)
    if os.geteuid() or trial.returncode:
        pytest.skip(f"no namespaces of one's own here ({trial.stderr.strip() or 'not root'})")
    short, small = tmp_path / "short", tmp_path / "small"
    small.mkdir()
    weights = base_model / "model.safetensors"
    short.write_bytes(weights.read_bytes()[:-100])
    before = f"hostname node2; mount --bind {short} {weights}; mount -t tmpfs -o size=1m none {small}"
    jobs = start_pair(tiny_recipe(tmp_path), "node", before, env={"TMPDIR": str(small)})
    first = jobs[0].wait()
    assert first.code == 1 and jobs[1].wait().code == 1, first.out[-4000:]
    found = report(tmp_path)["checks"]
    assert found["ranks"]["found"].startswith("2 on 2 hosts")
    assert "between nodes" in found["all-reduce"]["data"]["gb_per_s"]
    (clock,) = found["clocks"]["fails"]
    assert "node2 is 60" in clock and "ahead" in clock
    (slow,) = found["matmul"]["warnings"]
    assert slow.startswith("rank 1 on node2 (local rank 1) reaches ")
    assert any(reason.startswith(f"node2: {weights}: truncated") for reason in found["models"]["fails"])
    assert any(reason.startswith(f"node2: {weights}: 1") and "bytes" in reason for reason in found["models"]["fails"])
    (full,) = found["room"]["fails"]
    assert full.startswith(f"node2: disk of $TMPDIR {small}: 1.0 MiB free, about 64.0 MiB needed")
    assert found["train step"]["verdict"] == "not tried"
    (line,) = [line for line in first.out.splitlines() if line.startswith("fault:")]
    assert "clock of node2" in line and "Traceback" not in first.out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preflight.json"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("sick", "check", "words"),
    [
        ("die", "matmul", "has died or hangs"),
        pytest.param(
            "oom",
            "train step",
            "batch_size: 4 and examples of 512 tokens; set train.per_device_train_batch_size: 2 ",
            marks=pytest.mark.slow,
        ),
        pytest.param("stop", "matmul", "has died or hangs", marks=pytest.mark.slow),
        pytest.param("sleep", "all-reduce", "did not finish it in 15 s", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_falls_out_ends_all_and_is_named(
    sick: str, check: str, words: str, tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    minutes = 2 if sick == "oom" else 0.25
    jobs = start_pair(tiny_recipe(tmp_path, {"timeout_minutes": minutes}), sick)
    first = jobs[0].wait(90)
    (line,) = [line for line in first.out.splitlines() if line.startswith("fault:")]
    assert first.code == 1 and line.startswith(f"fault: preflight: {check}: rank 1 on "), first.out[-4000:]
    assert words in line and "Traceback" not in first.out
    assert report(tmp_path)["checks"][check]["fails"] and report(tmp_path)["verdict"] == "fails"
    if sick in ("oom", "sleep"):
        assert jobs[1].wait(60).code == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preflight.json"]


@pytest.mark.ranks
def test_a_rank_that_does_not_come_is_named(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, {"timeout_minutes": 0.05})
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    done = Job(
        [sys.executable, "-m", "atlantis_ds", "preflight", str(recipe)], place | {"MASTER_PORT": str(free_port())}
    ).wait(60)
    assert done.code == 1 and "within 0.05 minutes: ranks 1, 2 did not connect" in done.out, done.out
    assert "Traceback" not in done.out and not (tmp_path / "run").exists()
