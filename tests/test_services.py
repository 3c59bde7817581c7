"""The Slurm and ssh that other tests run on: real daemons, brought up and down by the scripts in tools/."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import TOOLS, job, need, run, start_service, stop_service, wait_for

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    need("slurmctld", "slurmd", "munged", "srun")
    env = start_service("slurm_up.sh")
    yield env
    stop_service("slurm_down.sh", env["SLURM_STATE_DIR"])


# A job that notes what happens to it; on USR2 it does what its first argument says.
SIGNALLED_JOB = """#!/bin/bash
#SBATCH --open-mode=append --nodes=1 --cpus-per-task=2
echo "start ${SLURM_RESTART_COUNT:-0}"
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
act() { echo "USR2 after $SECONDS"; case $1 in requeue) scontrol requeue "$SLURM_JOB_ID" ;; exit) exit 75 ;; esac; }
trap "act $1" USR2
sleep 300 &
while kill -0 $! 2>/dev/null; do wait $!; done
"""


def submit_signalled(env: dict[str, str], folder: Path, action: str, *options: str) -> tuple[str, Path]:
    script, log = folder / "job.sh", folder / f"{action}.log"
    script.write_text(SIGNALLED_JOB)
    job_id = run(env, "sbatch", "--parsable", f"--output={log}", *options, str(script), action)
    wait_for(lambda: log.exists() and "start 0" in log.read_text(), 60, lambda: str(job(env, job_id)))
    return job_id, log


def test_install_script_leaves_a_complete_machine_alone() -> None:
    need("slurmctld", "slurmd", "munged", "srun", "sshd", "pdsh")
    done = subprocess.run([TOOLS / "install_test_services.sh"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "test services: all there\n", "")


def test_srun_reaches_both_nodes_and_their_gpus(slurm: dict[str, str]) -> None:
    said = run(slurm, "srun", "-N2", "--gpus-per-node=2", "bash", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES")
    assert sorted(said.splitlines()) == ["node1 0,1", "node2 0,1"]


def test_dependent_job_waits_for_every_array_task(slurm: dict[str, str], tmp_path: Path) -> None:
    # Six one-CPU tasks on four CPUs, so that the array cannot run at once.
    task = f"sleep 1; echo $SLURM_ARRAY_TASK_ID >> {tmp_path}/done"
    array = run(slurm, "sbatch", "--parsable", "--array=0-5", "--output=/dev/null", f"--wrap={task}")
    after = f"--dependency=afterok:{array}"
    copy = f"--wrap=cp {tmp_path}/done {tmp_path}/seen"
    job_id = run(slurm, "sbatch", "--parsable", after, "--output=/dev/null", copy)
    wait_for(lambda: job(slurm, job_id)["JobState"] == "COMPLETED", 60, lambda: run(slurm, "squeue"))
    assert sorted((tmp_path / "seen").read_text().split()) == list("012345")


def test_job_that_requeues_itself_runs_again_within_seconds(slurm: dict[str, str], tmp_path: Path) -> None:
    job_id, log = submit_signalled(slurm, tmp_path, "requeue")
    run(slurm, "scancel", "--batch", "--signal=USR2", job_id)
    wait_for(lambda: job(slurm, job_id)["JobState"] == "COMPLETED", 60, log.read_text)
    assert "start 0\nUSR2" in log.read_text() and log.read_text().endswith("start 1\n")
    assert job(slurm, job_id)["Restarts"] == "1"


def test_urgent_job_preempts_and_the_user_signal_comes_first(slurm: dict[str, str], tmp_path: Path) -> None:
    requeued, requeued_log = submit_signalled(slurm, tmp_path, "requeue", "--signal=B:USR2@60")
    left, left_log = submit_signalled(slurm, tmp_path, "exit", "--signal=B:USR2@60")
    run(slurm, "srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")
    assert "USR2" in requeued_log.read_text() and "USR2" in left_log.read_text()
    wait_for(lambda: job(slurm, requeued)["JobState"] == "COMPLETED", 60, requeued_log.read_text)
    assert requeued_log.read_text().endswith("start 1\n")
    # A job that merely ends when told to make room counts as failed: Slurm does not bring it back.
    assert (job(slurm, left)["JobState"], job(slurm, left)["ExitCode"]) == ("FAILED", "75:0")


@pytest.mark.slow
def test_preempted_job_that_stays_is_requeued_after_its_grace(slurm: dict[str, str], tmp_path: Path) -> None:
    job_id, log = submit_signalled(slurm, tmp_path, "stay", "--signal=B:USR2@60")
    run(slurm, "srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")
    wait_for(lambda: job(slurm, job_id)["JobState"] == "COMPLETED", 120, log.read_text)
    assert "DUE TO PREEMPTION" in log.read_text() and log.read_text().endswith("start 1\n")


@pytest.mark.slow
def test_user_signal_comes_before_the_time_limit(slurm: dict[str, str], tmp_path: Path) -> None:
    job_id, log = submit_signalled(slurm, tmp_path, "requeue", "--time=2", "--signal=B:USR2@30")
    wait_for(lambda: job(slurm, job_id)["JobState"] == "COMPLETED", 150, log.read_text)
    after = int(log.read_text().split("USR2 after ")[1].split()[0])
    assert 25 <= after <= 95  # Slurm looks twice a minute and may be up to 60 s early


def test_two_slurms_at_once_and_none_left_behind(slurm: dict[str, str], tmp_path: Path) -> None:
    # mktemp rather than tmp_path: socket names must stay short
    state = Path(run(dict(os.environ), "mktemp", "-d"))
    second = start_service("slurm_up.sh", str(state))
    assert second["SLURM_CONF"] == f"{state}/slurm.conf" != slurm["SLURM_CONF"]
    orphan = tmp_path / "orphan"
    run(second, "sbatch", f"--output={orphan}", "--wrap=sleep 300 & echo $!")
    run(second, "sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 300")
    wait_for(lambda: run(second, "squeue", "--noheader", "--format=%i %t") == "2 R", 60, lambda: run(second, "squeue"))
    assert run(slurm, "squeue", "--noheader") == ""  # each knows only its own jobs
    assert Path(f"/proc/{orphan.read_text().strip()}").exists()
    stop_service("slurm_down.sh", str(state))
    assert run(slurm, "srun", "-N2", "echo", "still here").count("still here") == 2


def test_scripts_leave_foreign_folders_alone(tmp_path: Path) -> None:
    need("slurmctld", "slurmd", "munged", "srun", "sshd", "ssh")
    mine = tmp_path / "thesis.txt"
    mine.write_text("two years of work")
    for script in ("slurm_up.sh", "slurm_down.sh", "sshd_up.sh", "sshd_down.sh"):
        done = subprocess.run([TOOLS / script, tmp_path], capture_output=True, text=True, timeout=60)
        assert done.returncode != 0 and str(tmp_path) in done.stderr and done.stdout == ""
    assert mine.read_text() == "two years of work" and list(tmp_path.iterdir()) == [mine]


def test_pdsh_reaches_both_addresses_with_the_private_key_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("sshd", "ssh", "pdsh")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tmp_path}")
    env = start_service("sshd_up.sh")
    other = start_service("sshd_up.sh")
    try:
        said = run(env, "pdsh", "-S", "-w", "127.0.0.2,127.0.0.3", "echo $SSH_CONNECTION; echo $PATH")
        for address in ("127.0.0.2", "127.0.0.3"):
            assert f"{address} {env['SSH_PORT']}" in said
        assert said.count(str(tmp_path)) == 2  # the caller's PATH: ninja and the compiler are found there too
        with_the_wrong_key = ["ssh", "-F", other["SSH_CONFIG"], "-p", env["SSH_PORT"], "127.0.0.2", "true"]
        refused = subprocess.run(with_the_wrong_key, capture_output=True, text=True, timeout=60)
        assert refused.returncode == 255 and "Permission denied" in refused.stderr
    finally:
        stop_service("sshd_down.sh", env["SSH_STATE_DIR"])
        stop_service("sshd_down.sh", other["SSH_STATE_DIR"])
