"""Who am I: the variables of each launcher, and the real launchers."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import need, start_service, stop_service

from atlantis_ds.cluster.ranks import Place, find_place, first_host, free_port, gpu_of, launched
from atlantis_ds.errors import InputError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "localhost,node[08-11]",
    "SLURM_JOB_NODELIST": "elsewhere[1-9]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.9.9.9",
}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
# Inside a batch script, outside srun.
BATCH = {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_each_launcher_is_understood() -> None:
    assert find_place(TORCHRUN) == Place(3, 4, 1, "10.0.0.1", 29500)
    assert find_place(SRUN) == Place(5, 8, 1, "localhost", 15000 + 31 * 77 + 2)
    assert find_place(SRUN | MASTER) == Place(5, 8, 1, "10.0.0.1", 29500)
    assert find_place(MPIRUN | MASTER) == Place(1, 2, 0, "10.0.0.1", 29500)
    # torchrun on each of two nodes, started by srun: the inner launcher wins.
    two_nodes = SRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    assert find_place(TORCHRUN | two_nodes) == find_place(TORCHRUN)
    # mpirun inside a Slurm job starts its daemons with srun, whose variables are not the ranks'.
    assert find_place(two_nodes | MPIRUN | MASTER).rank == 1
    assert all(launched(environ) for environ in (TORCHRUN, SRUN, MPIRUN))


def test_a_rank_takes_the_only_gpu_it_sees() -> None:
    assert [gpu_of(local, 8) for local in range(8)] == list(range(8))
    assert [gpu_of(local, 1) for local in range(4)] == [0, 0, 0, 0]  # --gpus-per-task=1: each task sees its own
    with pytest.raises(InputError, match=r"local rank 2 on .*, where 2 GPUs are visible: start one rank per GPU"):
        gpu_of(2, 2)


def test_alone_and_in_a_batch_script_there_is_one_rank() -> None:
    for environ in ({}, BATCH, {"MASTER_ADDR": "10.0.0.1"}):
        place = find_place(environ)
        assert (place.rank, place.world_size, place.local_rank, place.master_addr) == (0, 1, 0, "127.0.0.1")
        assert not launched(environ)
    assert not launched(SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"})


def test_node_names_that_do_not_resolve_fall_back_to_the_batch_node() -> None:
    assert find_place(SRUN | {"SLURM_STEP_NODELIST": "no-such-node[1-2]"}).master_addr == "10.9.9.9"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a,b", "a"), ("n[07-09,12],c1", "n07"), ("r[1-2]n[003-4]x,q", "r1n003x"), ("n[5,7-9]", "n5")],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (without(TORCHRUN, "RANK"), ["not RANK"]),
        (without(TORCHRUN, "MASTER_ADDR", "MASTER_PORT"), ["MASTER_ADDR", "MASTER_PORT"]),
        ({"LOCAL_RANK": "0"}, ["RANK", "WORLD_SIZE"]),
        (TORCHRUN | {"RANK": "4"}, ["RANK=4", "WORLD_SIZE=4"]),
        (TORCHRUN | {"RANK": "-1"}, ["RANK=-1"]),
        (TORCHRUN | {"WORLD_SIZE": "four"}, ["WORLD_SIZE='four'"]),
        (TORCHRUN | {"MASTER_PORT": ""}, ["MASTER_PORT=''"]),
        (without(SRUN, "SLURM_NTASKS"), ["not SLURM_NTASKS"]),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), ["SLURM_JOB_NODELIST"]),
        (SRUN | {"MASTER_PORT": "29500"}, ["MASTER_ADDR"]),
        (without(MPIRUN, "OMPI_COMM_WORLD_SIZE"), ["not OMPI_COMM_WORLD_SIZE"]),
        # Exported for another launcher and forgotten: every rank would take itself for the same one.
        (SRUN | TORCHRUN, ["RANK=3", "WORLD_SIZE=4", "SLURM_PROCID=5", "SLURM_NTASKS=8"]),
        (MPIRUN | TORCHRUN | {"WORLD_SIZE": "2", "RANK": "0"}, ["RANK=0", "OMPI_COMM_WORLD_RANK=1"]),
    ],
)
def test_half_set_and_contradictory_environments_are_refused(environ: dict[str, str], named: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        find_place(environ)
    assert all(name in str(refused.value) for name in named), str(refused.value)


MEET = """
import os
from atlantis_ds.cluster.ranks import end_rank, find_place, start_ranks, stop_ranks
ranks = start_ranks(float(os.environ.get("MINUTES", "1")))
line = f"rank {ranks.rank} of {ranks.world_size} sum {ranks.sum(ranks.rank + 1)[0]}"
os.write(1, (line + "\\n").encode())  # in one piece: all ranks write to one pipe
stop_ranks()
end_rank()
"""
ENVIRON = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def meet(*launcher: str, environ: dict[str, str] = ENVIRON, script: Path) -> list[str]:
    script.write_text(MEET)
    done = subprocess.run([*launcher, str(script)], env=environ, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))


@pytest.mark.ranks
def test_torchrun(tmp_path: Path) -> None:
    said = meet(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script=tmp_path / "meet.py")
    assert said == ["rank 0 of 2 sum 3.0", "rank 1 of 2 sum 3.0"]


@pytest.mark.ranks
def test_mpirun(tmp_path: Path) -> None:
    need("mpirun")
    pytest.importorskip("mpi4py", reason="service missing: mpi4py")
    mpirun = ("mpirun", "-np", "2", "--allow-run-as-root", "--oversubscribe", sys.executable)
    assert meet(*mpirun, script=tmp_path / "meet.py") == ["rank 0 of 2 sum 3.0", "rank 1 of 2 sum 3.0"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    need("slurmctld", "slurmd", "munged", "srun")
    env = start_service("slurm_up.sh")
    yield ENVIRON | {name: value for name, value in env.items() if name.startswith("SLURM_")}
    stop_service("slurm_down.sh", env["SLURM_STATE_DIR"])


@pytest.mark.ranks
def test_srun_on_two_nodes(slurm: dict[str, str], tmp_path: Path) -> None:
    srun = ("srun", "--nodes=2", "--ntasks-per-node=1", "--time=2", sys.executable)
    assert meet(*srun, environ=slurm, script=tmp_path / "meet.py") == ["rank 0 of 2 sum 3.0", "rank 1 of 2 sum 3.0"]


DEMO = Path(__file__).parents[1] / "recipes" / "demo.yaml"


def wait_minutes(minutes: float, folder: Path) -> list[str]:
    return ["--set", f"runs_dir={folder}", "--set", f"timeout_minutes={minutes}"]


@pytest.mark.ranks
def test_rank_that_cannot_reach_the_master_says_where_and_all_end(tmp_path: Path) -> None:
    port = str(free_port())
    ports = [port, port, "9"]  # nobody listens at 9, and the two others wait for a third in vain
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "atlantis_ds", "prepare", str(DEMO), *wait_minutes(0.1, tmp_path)],
            env=ENVIRON
            | {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank)}
            | {"MASTER_ADDR": "localhost", "MASTER_PORT": ports[rank]},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1, 1] and time.monotonic() - start < 150
    for rank, text in enumerate(said):
        assert f"rank {rank} of 3" in text and f"localhost:{ports[rank]}" in text and "Traceback" not in text, text
    assert not list(tmp_path.iterdir())


@pytest.mark.ranks
def test_silent_master_is_given_up(tmp_path: Path) -> None:
    """A frozen rank 0, or another program at its port: it takes the connection and says nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1])}
        done = subprocess.run(
            [sys.executable, "-m", "atlantis_ds", "prepare", str(DEMO), *wait_minutes(0.05, tmp_path)],
            env=ENVIRON | place | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"rank 1 of 2 on {socket.gethostname()} could not connect to the others" in done.stderr
    assert f"127.0.0.1:{place['MASTER_PORT']} within 0.05 minutes: it accepted the connection" in done.stderr
