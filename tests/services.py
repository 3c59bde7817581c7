"""Slurm and ssh for tests: real daemons on loopback, brought up and down by the scripts in tools/."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
SYSTEM_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def need(*commands: str) -> None:
    """Skip the test where one of these programs is not installed."""
    for command in commands:
        if shutil.which(command, path=SYSTEM_PATH) is None:
            # .ci/run looks for the first two words
            pytest.skip(f"service missing: {command}; run tools/install_test_services.sh as root")


def start_service(script: str, *arguments: str) -> dict[str, str]:
    """Run a *_up.sh script; return this environment with its exports added."""
    done = subprocess.run([TOOLS / script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    for line in done.stdout.splitlines():
        word, assignment = shlex.split(line)
        assert word == "export"
        name, value = assignment.split("=", 1)
        env[name] = value
    return env


def stop_service(script: str, state: str) -> None:
    """Run a *_down.sh script; nothing of the service may stay."""
    done = subprocess.run([TOOLS / script, state], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert not Path(state).exists()
    assert processes_naming(state) == []


def processes_naming(text: str) -> list[str]:
    """Command lines and environments of live processes that hold `text`, this one left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid():
                command_line = (folder / "cmdline").read_bytes()
                if text.encode() in command_line + (folder / "environ").read_bytes():
                    found.append(command_line.replace(b"\0", b" ").decode())
        except OSError:  # it ended, or belongs to someone else
            continue
    return found


def run(env: dict[str, str], *command: str) -> str:
    """What a command prints that must end with exit code 0."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
    return done.stdout.strip()


def wait_for(condition: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    """Fail after so many seconds, with what ``what`` says then."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s; now: {what()}"
        time.sleep(0.1)


def job(env: dict[str, str], job_id: str) -> dict[str, str]:
    """What Slurm knows of a job."""
    shown = run(env, "scontrol", "--oneliner", "show", "job", job_id).split("\n")[0]
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)
