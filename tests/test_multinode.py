"""Two "hosts" (127.0.0.2 and 127.0.0.3, an ssh server on each) and MPI: the commands of docs/multinode.md."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import ENV, ROOT, WriteRecipe, in_process, losses, succeed
from services import need, start_service, stop_service

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def recipes(tiny_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same prepared run three times; `local` is trained by --ranks 2."""
    found = {name: tiny_recipe(tmp_path_factory.mktemp(name)) for name in ("local", "deepspeed", "mpirun")}
    for path in found.values():
        in_process(path, "prepare")
    succeed("local", 2, "train", found["local"], "--arm", "sft")
    return found


def check(command: list[str], env: dict[str, str], recipe: Path, recipes: dict[str, Path]) -> str:
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 ranks x 1 micro-batches x 4" in done.stdout
    found, expected = losses(recipe.parent / "run"), losses(recipes["local"].parent / "run")
    assert len(found) == 10 and found == expected
    return done.stdout


def test_deepspeed_hostfile(recipes: dict[str, Path], tmp_path: Path) -> None:
    need("sshd", "ssh", "pdsh")
    env = start_service("sshd_up.sh")
    try:
        train = ["train", str(recipes["deepspeed"]), "--arm", "sft"]
        ssh = ["--ssh_port", env["SSH_PORT"], "--no_ssh_check", "--master_addr", "127.0.0.2"]
        command = ["deepspeed", "--hostfile", env["SSH_HOSTFILE"], *ssh, "--module", "atlantis_ds", *train]
        out = check(command, env | ENV, recipes["deepspeed"], recipes)
        assert "127.0.0.2: " in out and "127.0.0.3: " in out  # pdsh says who said what
    finally:
        stop_service("sshd_down.sh", env["SSH_STATE_DIR"])


def test_mpirun(recipes: dict[str, Path]) -> None:
    need("mpirun")
    pytest.importorskip("mpi4py", reason="service missing: mpi4py")
    mpirun = ["mpirun", "-np", "2", "--allow-run-as-root", "--oversubscribe", "python", "-m", "atlantis_ds"]
    check([*mpirun, "train", str(recipes["mpirun"]), "--arm", "sft"], ENV, recipes["mpirun"], recipes)
