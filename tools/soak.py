#!/usr/bin/env python3
"""Inject faults into real runs; after each fault, a rerun must end as if nothing had happened, or be clearly refused.

    python tools/soak.py [--faults 60] [--seed 1] [--first 1] [--kind NAME ...]

Results are compared with an undisturbed run on two ranks. Each fault gets a copy of that run from before the affected
stage, and happens at a moment drawn from the seed and the number of the fault: `--seed 1 --first 17 --faults 17`
repeats only number 17. "As if nothing had happened" means: score shards and weights, or the trained model, are
byte-identical to the undisturbed ones, and finished work is not repeated. A fault that missed its moment counts as
failed, and so does a traceback. Full disks and read-only folders need root, for mounts. The exit code is 0 if every
fault passed; the folder of a failed one is kept and named.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
ENV = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
LIMIT = 300  # seconds for one command, several times what it needs: anything longer is a hang
SHARDS, STEPS = 40, 50
STAGES = ["score", "merge", "train"]

# When preloaded, it changes the wall clock (and no other) of all ranks, or of $JUMP_RANK, as soon as the file $JUMP_AT
# exists.
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    const char *rank = getenv("JUMP_RANK"), *own = getenv("RANK");
    int other = rank && (!own || strcmp(rank, own));
    if (other || clock != CLOCK_REALTIME) return code;
    if (access(getenv("JUMP_AT"), F_OK) == 0) now->tv_sec += atol(getenv("JUMP_BY"));
    return code;
}
"""
# When preloaded, it hides a part of a shard younger than $LATE_BY seconds, as a network file system may.
LATE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
int stat(const char *path, struct stat *found) {
    static int (*real)(const char *, struct stat *);
    if (!real) real = (int (*)(const char *, struct stat *))dlsym(RTLD_NEXT, "stat");
    int code = real(path, found);
    if (code || !strstr(path, "/parts/shard-") || time(0) - found->st_mtime >= atol(getenv("LATE_BY"))) return code;
    errno = ENOENT;
    return -1;
}
"""


class Failed(Exception):
    """A fault from which the run did not recover as it should."""


def check(good: object, what: str) -> None:
    if not good:
        raise Failed(what)


def write_recipe(folder: Path) -> Path:
    model = {
        "scratch": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 512,
            "pretrain_epochs": 0,
        }
    }
    tree = {
        "name": "run",
        "runs_dir": str(folder),
        "seed": 5,
        "data": {"format": "grammar", "train_size": SHARDS * 10, "dev_size": 6, "test_size": 10},
        "models": {
            "large": model,
            "small": model,
            "reference": {"kind": "checkpoint", "model_name_or_path": str(folder.parent / "reference")},
        },
        "score": {"shard_size": 10, "tokens_per_batch": 256},
        "weights": {"formula": "product", "temper": 0.5},
        "arms": {"atlantis": {}},
        "train": {
            "deepspeed": "zero3.json",
            "dtype": "float32",
            "learning_rate": 2e-3,
            "num_train_epochs": 1,
            "train_batch_size": SHARDS * 10 // STEPS,
            "per_device_train_batch_size": 4,
            "save_steps": 7,
            "save_total_limit": 2,
        },
        "timeout_minutes": 2,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def start(recipe: Path, stage: str, *options: str, env: dict[str, str] = ENV) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "atlantis_ds", stage, str(recipe), *options]
    words += ["--ranks", "2"] if stage in ("score", "train", "preflight") and "WORLD_SIZE" not in env else []
    with (Path(f"{recipe}.{stage}.log")).open("wb") as log:
        return subprocess.Popen(words, env=env, stdout=log, stderr=log)


def said(recipe: Path, stage: str) -> str:
    return Path(f"{recipe}.{stage}.log").read_text(errors="replace")


def end(process: subprocess.Popen[bytes], recipe: Path, stage: str) -> tuple[int, str]:
    """Wait for a command; return its exit code and output. A traceback or a hang is a failure."""
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        raise Failed(f"{stage} hangs:\n{said(recipe, stage)[-2000:]}") from None
    words = said(recipe, stage)
    check("Traceback" not in words, f"{stage} ended with a traceback:\n{words[-3000:]}")
    return code, words


def succeed(recipe: Path, *stages: str) -> None:
    for stage in stages:
        code, words = end(start(recipe, stage), recipe, stage)
        check(code == 0, f"{stage} ended with {code}:\n{words[-2000:]}")


def refuse(recipe: Path, stage: str, *named: str) -> None:
    code, words = end(start(recipe, stage), recipe, stage)
    lines = [line for line in words.splitlines() if line.startswith(("error: ", "fault: "))]
    clear = code in (1, 2) and len(lines) == 1 and all(name in lines[0] for name in named)
    check(clear, f"{stage} ended with {code}, expected one line of refusal that names {named}:\n{words[-2000:]}")


def files_made(run: Path) -> int:
    """Files that scoring has finished, 3 for each shard: parts from two models (the small base is the large one), then
    the shard that replaces them."""
    return sum(1 for _ in (run / "scores").glob("parts/shard-*")) + 3 * sum(1 for _ in run.glob("scores/shard-*"))


def steps_done(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_text().count('"event": "train"') if log.exists() else 0


def outputs(run: Path) -> dict[str, bytes]:
    """The results of scoring, merging and training: file name → content."""
    names = ["weights.parquet", "weights.json", "model/atlantis/last/model.safetensors"]
    found = [*run.glob("scores/shard-*.parquet"), *(run / name for name in names)]
    return {str(path.relative_to(run)): path.read_bytes() for path in found if path.exists()}


@dataclass
class Undisturbed:
    """An undisturbed run: copies of it before each stage, and its results."""

    folder: Path
    expected: dict[str, bytes]
    seconds_to_merge: float

    def before(self, stage: str) -> Path:
        return self.folder / f"before-{stage}"


def undisturbed_run(folder: Path) -> Undisturbed:
    base = folder / "undisturbed"
    base.mkdir()
    recipe, run = write_recipe(base), base / "run"
    seconds = {}
    succeed(recipe, "prepare")
    shutil.copytree(run / "base" / "small", folder / "reference")
    for stage in STAGES:
        shutil.copytree(run, folder / f"before-{stage}")
        begin = time.monotonic()
        succeed(recipe, stage)
        seconds[stage] = time.monotonic() - begin
    for name, source in {"clock": CLOCK, "late": LATE}.items():
        words = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", folder / f"{name}.so", "-ldl"]
        subprocess.run(words, input=source, text=True, check=True)
    measure = Undisturbed(folder, outputs(run), seconds["merge"])
    check(len(measure.expected) == SHARDS + 3, "the undisturbed run lacks files")

    # Two more to break: an interrupted training with two checkpoints; and scores from other inputs.
    case = Case(measure, folder / "stopped", random.Random(0))
    stopped = case.at("train")
    case.interrupt(stopped, "train", lambda: steps_done(case.run) >= 18, lambda _: (case.run / "STOP").touch(), 75)
    (case.run / "STOP").unlink()
    case.run.rename(folder / "before-resume")
    case = Case(measure, folder / "foreign", random.Random(0))
    other = case.at("score")
    other.write_text(other.read_text().replace("tokens_per_batch: 256", "tokens_per_batch: 512"))
    succeed(other, "score")
    return measure


@dataclass
class Case:
    """One fault: its own folder and random numbers."""

    measure: Undisturbed
    folder: Path
    rng: random.Random

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def at(self, stage: str) -> Path:
        """Copy the undisturbed run from before a stage; returns its recipe."""
        self.folder.mkdir(exist_ok=True)
        shutil.copytree(self.measure.before(stage), self.run)
        return write_recipe(self.folder)

    def moment(self, stage: str) -> tuple[str, Callable[[], bool]]:
        """A random moment in a stage: in words, and as a function that tells whether it has come."""
        if stage == "score":
            files = self.rng.randrange(1, 3 * SHARDS - 10)
            return f"after {files} files", lambda: files_made(self.run) >= files
        if stage == "merge":
            due = time.monotonic() + self.rng.uniform(0.2, 1.0) * self.measure.seconds_to_merge
            # The figure and weights.json come after weights.parquet.
            return "on the way", lambda: time.monotonic() > due or (self.run / "weights.parquet").exists()
        if self.rng.random() < 0.3:
            saved = f".step-{7 * self.rng.randrange(1, 7):08d}.tmp"
            checkpoint = self.run / "checkpoints" / "atlantis" / saved
            return f"while {saved} is written", lambda: any(checkpoint.glob("*"))
        step = self.rng.randrange(1, STEPS)
        return f"after step {step}", lambda: steps_done(self.run) >= step

    def interrupt(
        self,
        recipe: Path,
        stage: str,
        moment: Callable[[], bool],
        act: Callable[[subprocess.Popen[bytes]], object],
        code: int,
        env: dict[str, str] = ENV,
    ) -> str:
        """Start a stage, disturb it when the moment has come, and wait for its end with this exit code."""
        process = start(recipe, stage, env=env)
        limit = time.monotonic() + LIMIT
        while not moment():
            check(process.poll() is None, f"{stage} ended too early:\n{said(recipe, stage)[-2000:]}")
            check(time.monotonic() < limit, f"{stage} hangs:\n{said(recipe, stage)[-2000:]}")
            time.sleep(0.001)
        act(process)
        found, words = end(process, recipe, stage)
        check(found == code, f"{stage} ended with {found}, not {code}:\n{words[-2000:]}")
        return words

    def same(self, *stages: str) -> None:
        """Check that the output of these stages is byte-identical to that of the undisturbed run."""
        found = outputs(self.run)
        made_by = {"scores/": "score", "weights.": "merge", "model/": "train"}
        for name, content in self.measure.expected.items():
            if any(stage in stages for start, stage in made_by.items() if name.startswith(start)):
                check(found.get(name) == content, f"{name} differs from the undisturbed run")
        if "train" in stages:
            left = list(self.run.glob("checkpoints/*")) + list(self.run.glob("model/*/.*"))
            check(not left, f"left behind: {left[:1]}")

    def rerun(self, stage: str, broken: Path | None = None) -> None:
        """Run the same command again, and the next ones up to the weights; all results as in the undisturbed run."""
        stages = ["train"] if stage == "train" else ["score", "merge"][["score", "merge"].index(stage) :]
        finished = {path: path.stat().st_mtime_ns for path in self.run.glob("scores/**/shard-*.parquet")}
        finished.pop(broken, None)
        scored = len(_events(self.run, "score"))
        recipe = self.folder / "recipe.yaml"
        succeed(recipe, *stages)
        self.same(*stages)
        again = [path.name for path, when in finished.items() if path.exists() and path.stat().st_mtime_ns != when]
        check(not again, f"finished shards were written again: {again[:3]}")
        # Parts are gone by now; the log shows how many examples each model has scored this time.
        count = Counter()
        for event in _events(self.run, "score")[scored:]:
            count[event["model"]] += event["examples"]
        for model, examples in count.items():
            parts = {path.name.split(".")[0] for path in finished if path.parent.name == "parts" and model in path.name}
            whole = {path.name.split(".")[0] for path in finished if path.parent.name == "scores"}
            todo = 10 * (SHARDS - len(parts | whole))
            check(examples == todo, f"{model} scored {examples} examples again, {todo} were to do")


def _events(run: Path, kind: str) -> list[dict]:
    lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


# --- the faults: each returns a few words about what it did


def killed(case: Case, stage: str) -> str:
    recipe = case.at(stage)
    words, moment = case.moment(stage)
    victim = case.rng.choice(["rank 0", "rank 1", "all processes"]) if stage != "merge" else "the process"

    def kill(process: subprocess.Popen[bytes]) -> None:
        launcher = psutil.Process(process.pid)
        ranks = launcher.children()
        chosen = {"rank 0": ranks[:1], "rank 1": ranks[1:]}.get(victim, [launcher, *ranks])
        for one in chosen:
            one.suspend()  # all at once, like a node failure
        for one in chosen:
            one.kill()

    alone = victim in ("rank 0", "rank 1")
    output = case.interrupt(recipe, stage, moment, kill, 1 if alone else -signal.SIGKILL)
    check(not alone or "fault: " in output, f"nobody says why:\n{output[-2000:]}")
    case.rerun(stage)
    return f"{victim} killed {words}"


def kill_scoring(case: Case) -> str:
    return killed(case, "score")


def kill_merging(case: Case) -> str:
    return killed(case, "merge")


def kill_training(case: Case) -> str:
    return killed(case, "train")


def truncated_shard(case: Case) -> str:
    recipe = case.at("merge")
    shard = case.rng.choice(sorted(case.run.glob("scores/shard-*")))
    size = case.rng.randrange(shard.stat().st_size)
    os.truncate(shard, size)
    refuse(recipe, "merge", shard.name)
    case.rerun("score", broken=shard)  # detects by itself that it is broken
    return f"{shard.name} cut to {size} bytes, merge refused"


def flip(path: Path, rng: random.Random) -> int:
    """Flip one bit of a file; returns the position of its byte."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return place


def flipped_shard(case: Case) -> str:
    recipe = case.at("merge")
    shard = case.rng.choice(sorted(case.run.glob("scores/shard-*")))
    place = flip(shard, case.rng)
    code, words = end(start(recipe, "merge"), recipe, "merge")
    if code == 0:  # if there is no error (such as for a bit in the writer's name), the weights must be right
        case.same("merge")
        return f"byte {place} of {shard.name}: of no effect"
    check(shard.name in words, f"byte {place} flipped: the refusal does not name the shard:\n{words[-2000:]}")
    shard.unlink()
    case.rerun("score")
    return f"byte {place} of {shard.name}, merge refused"


def foreign_shard(case: Case) -> str:
    recipe = case.at("merge")
    shard = case.rng.choice(sorted(case.run.glob("scores/shard-*")))
    what = case.rng.choice(["another shard", "a shard too many", "the shard of another run"])
    if what == "another shard":
        others = [path for path in shard.parent.glob("shard-*") if path != shard]
        shutil.copy(case.rng.choice(sorted(others)), shard)
    elif what == "a shard too many":
        shard = shutil.copy(shard, shard.with_name("shard-00099-of-00100.parquet"))
    else:
        other = case.measure.folder / "foreign" / "run" / "scores" / shard.name
        check(pq.read_table(other).equals(pq.read_table(shard)) is not None, "unreadable")
        shutil.copy(other, shard)
    refuse(recipe, "merge", shard.name)
    shard.unlink()
    case.rerun("score")
    return f"{what} as {shard.name}, merge refused"


def damaged_checkpoint(case: Case) -> str:
    recipe = case.at("resume")
    older, newest = sorted(case.run.glob("checkpoints/atlantis/step-*"))
    file = case.rng.choice(sorted(newest.iterdir()))
    size = case.rng.randrange(file.stat().st_size)
    os.truncate(file, size)
    refuse(recipe, "train", newest.name)
    shutil.rmtree(newest)
    case.rerun("train")
    check(f"resuming from step {int(older.name[5:])}" in said(recipe, "train"), "the older one was not used")
    return f"{newest.name}/{file.name} cut to {size} bytes, refused"


@contextmanager
def mounted(case: Case, size: str) -> Iterator[None]:
    case.folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", case.folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", case.folder], check=True)


def full_disk(case: Case) -> str:
    stage = case.rng.choice(STAGES)
    with mounted(case, "64m"):
        recipe = case.at(stage)
        words, moment = case.moment(stage)
        if stage == "merge":
            words, moment = "from the start", lambda: True
        ballast = case.folder / "ballast"
        logs = {Path(f"{recipe}.{name}.log") for name in STAGES}
        for log in logs:  # the output of the command itself goes elsewhere
            log.symlink_to(case.folder.with_name(f"{case.folder.name}.{log.name}"))

        def fill(_: object) -> None:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass

        output = case.interrupt(recipe, stage, moment, fill, 1)
        check("fault: " in output, f"nobody says why:\n{output[-2000:]}")
        ballast.unlink()
        case.rerun(stage)
        for log in logs:
            log.resolve().unlink(missing_ok=True)
    return f"{stage}: full {words}"


def read_only(case: Case) -> str:
    stage = case.rng.choice(STAGES)
    with mounted(case, "256m"):
        recipe = case.at(stage)
        Path(f"{recipe}.{stage}.log").symlink_to(log := case.folder.with_suffix(".log"))
        subprocess.run(["mount", "-o", "remount,ro", case.folder], check=True)
        refuse(recipe, stage, "Read-only file system", str(case.run))
        subprocess.run(["mount", "-o", "remount,rw", case.folder], check=True)
        case.rerun(stage)
        log.unlink()
    return f"{stage} refused"


def clock_jump(case: Case) -> str:
    """The clock jumps in the middle, and all files, including a STOP file, are from the future or the distant past."""
    stage = case.rng.choice(["score", "train"])
    recipe = case.at(stage)
    years = case.rng.choice([-10, 10])
    (case.run / "STOP").touch()  # from an earlier job: it must not count
    when = time.time() - years * 365 * 86400
    for path in case.run.rglob("*"):
        os.utime(path, (when, when))
    words, moment = case.moment(stage)
    jump = case.folder / "jump"
    env = ENV | {
        "LD_PRELOAD": str(case.measure.folder / "clock.so"),
        "JUMP_AT": str(jump),
        "JUMP_BY": str(years * 365 * 86400),
    }
    case.interrupt(recipe, stage, moment, lambda _: jump.touch(), 0, env)
    times = [event["time"] for event in _events(case.run, stage)]
    check(abs(times[-1] - time.time()) > 9 * 365 * 86400, "the clock has not jumped")
    case.same(stage)
    return f"{stage}: {years:+d} years {words}, files {-years:+d} years"


def stale_claim(case: Case) -> str:
    stage = case.rng.choice(["score", "train"])
    case.at(stage)
    claims = case.run / "claims"
    claims.mkdir(exist_ok=True)
    owner = {"host": "gone", "pid": 1, "machine": "gone", "beat": 3}
    own = {**owner, "machine": f"{os.uname().nodename} {os.readlink('/proc/self/ns/pid')}"}
    texts = {
        "of a dead job elsewhere": json.dumps(owner),
        "whose process number has passed to another program": json.dumps(own),
        "of a dead job here": json.dumps({**own, "pid": 2**22 - 1}),
        "that is empty": "",
        "half written": '{"host": "go',
    }
    what = case.rng.choice(sorted(texts))
    (claims / {"score": "score-1-of-1.json", "train": "train-atlantis.json"}[stage]).write_text(texts[what])
    case.rerun(stage)
    check(not list(claims.iterdir()), "a claim is left")
    return f"{stage}: a claim {what}"


def two_jobs(case: Case) -> str:
    stage = case.rng.choice(STAGES)
    recipe = case.at(stage)
    first = start(recipe, stage)
    words, moment = case.moment(stage)
    if case.rng.random() < 0.5:
        words, moment = "at once", lambda: True
    while not moment():
        check(first.poll() is None, f"{stage} ended too early")
        time.sleep(0.001)
    second_recipe = recipe.with_name("second.yaml")
    shutil.copy(recipe, second_recipe)
    second = start(second_recipe, stage)
    ends = sorted([end(first, recipe, stage), end(second, second_recipe, stage)])
    codes = [code for code, _ in ends]
    late = codes == [0, 0] and (stage == "merge" or "finished" in ends[1][1] + ends[0][1] or "0 to do" in str(ends))
    refused = codes == [0, 2] and "another job is doing this" in ends[1][1]
    check(late or refused, f"two jobs at once ended with {codes}:\n{ends[1][1][-2000:]}")
    case.same(stage)
    return f"{stage}: a second one {words}: {'refused' if refused else 'both well'}"


def staged(recipe: Path, stage: Path) -> None:
    tree = yaml.safe_load(recipe.read_text())
    tree["models"]["stage"] = str(stage)
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))


def kill_staging(case: Case) -> str:
    """All processes are killed when a node's copy of a model begins, or a moment later."""
    recipe, stage = case.at("score"), case.folder / "node"
    staged(recipe, stage)
    delay = case.rng.uniform(0, 0.02)

    def kill(process: subprocess.Popen[bytes]) -> None:
        time.sleep(delay)
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children()]:
            one.kill()

    case.interrupt(recipe, "score", lambda: any(stage.glob("*")), kill, -signal.SIGKILL)
    staged(write_recipe(case.folder), stage)
    succeed(recipe, "score", "merge")
    case.same("score", "merge")
    check(all((copy / "copied.json").exists() for copy in stage.iterdir() if copy.is_dir()), "a copy is half there")
    return f"killed {1000 * delay:.0f} ms after the first copy began"


def full_staging(case: Case) -> str:
    """The node's own disk has no room for the copy, or all of $TMPDIR is full."""
    disk = Case(case.measure, case.folder.with_name(f"{case.folder.name}.disk"), case.rng)
    size = case.rng.randrange(8, 100)
    recipe = case.at("score")
    with mounted(disk, f"{size}k"):
        staged(recipe, disk.folder / "models")
        refuse(recipe, "score", "models.stage", "bytes are needed")
        check(not any(disk.folder.glob("models/*/*")), "a part of a copy is left")
    disk.folder.rmdir()
    write_recipe(case.folder)
    case.rerun("score")
    return f"a disk of {size} KiB, refused"


def late_listing(case: Case) -> str:
    recipe, seconds = case.at("score"), case.rng.randrange(1, 8)
    env = ENV | {"LD_PRELOAD": str(case.measure.folder / "late.so"), "LATE_BY": str(seconds)}
    code, words = end(start(recipe, "score", env=env), recipe, "score")
    check(code == 0, f"score ended with {code}:\n{words[-2000:]}")
    succeed(recipe, "merge")
    case.same("score", "merge")
    return f"parts of shards seen {seconds} s late"


def clock_off(case: Case) -> str:
    """The clock of one rank is ten minutes off: the work is the same, and `preflight` names it."""
    stage, by, rank = case.rng.choice(["score", "train"]), case.rng.choice([-600, 600]), case.rng.choice("01")
    recipe = case.at(stage)
    (jump := case.folder / "jump").touch()
    shim = {"LD_PRELOAD": str(case.measure.folder / "clock.so"), "JUMP_AT": str(jump)}
    env = ENV | shim | {"JUMP_BY": str(by), "JUMP_RANK": rank}
    code, words = end(start(recipe, stage, env=env), recipe, stage)
    check(code == 0, f"{stage} ended with {code}:\n{words[-2000:]}")
    case.same(stage)
    code, words = end(start(recipe, "preflight", env=env), recipe, "preflight")
    check(code == 1 and "clocks: the clock of" in words, f"preflight ended with {code}:\n{words[-2000:]}")
    return f"{stage}: rank {rank} by {by} s"


def missing_node(case: Case) -> str:
    """One of two nodes does not join the preflight, or dies in the middle of it."""
    recipe, rank = case.at("train"), case.rng.choice("01")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    never = rank == "1" and case.rng.random() < 0.5
    ranks = {}
    for number in "0" if never else "01":
        env = ENV | place | {"RANK": number, "LOCAL_RANK": number}
        own = recipe.with_name(f"{number}.yaml")
        shutil.copy(recipe, own)
        ranks[number] = own, start(own, "preflight", "--set", f"timeout_minutes={0.25 if never else 1}", env=env)
    left = "0" if rank == "1" else "1"
    if not never:
        time.sleep(case.rng.uniform(4, 12))
        ranks[rank][1].kill()
    code, words = end(ranks[left][1], ranks[left][0], "preflight")
    early = not never and code == 0  # it had finished before
    check(early or (code == 1 and "fault: " in words), f"preflight ended with {code}:\n{words[-2000:]}")
    check(early or rank == "0" or "rank 1" in words, f"rank 1 is not named:\n{words[-2000:]}")
    for _, process in ranks.values():
        process.wait(LIMIT)
    check(not (case.run / "checkpoints").exists() and not (case.run / "model").exists(), "preflight left a model")
    return f"rank {rank} {'never came' if never else 'was killed'}{', too late' if early else ''}"


def broken_connection(case: Case) -> str:
    """The hub's answer ends in the middle of a file; or the process is killed there, and the command is repeated."""
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_server import hub_on_loopback

    recipe, cache = case.at("score"), case.folder / "cache"
    files = {path.name: path.read_bytes() for path in (case.measure.folder / "reference").iterdir() if path.is_file()}
    tree = yaml.safe_load(recipe.read_text())
    tree["models"]["reference"]["model_name_or_path"] = "me/tiny"
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))
    name, kill = case.rng.choice(sorted(files)), case.rng.random() < 0.5
    with hub_on_loopback() as hub:
        hub.publish("models/me/tiny", files)
        env = ENV | {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": "1",
        }
        hub.stall, hub.break_off = ({name}, set()) if kill else (set(), {name})
        first = start(recipe, "fetch", env=env)
        if kill:
            limit = time.monotonic() + LIMIT
            while name not in hub.read and first.poll() is None and time.monotonic() < limit:
                time.sleep(0.01)
            first.kill()
            first.wait()
        else:
            end(first, recipe, "fetch")  # the client may resume by itself
        hub.stall = set()
        code, words = end(start(recipe, "fetch", env=env), recipe, "fetch")
        check(code == 0, f"fetch ended with {code}:\n{words[-2000:]}")
    env = ENV | {"HF_HUB_CACHE": str(cache)}
    code, words = end(start(recipe, "score", env=env), recipe, "score")
    check(code == 0, f"score without the hub ended with {code}:\n{words[-2000:]}")
    fetched = {path.name: path.read_bytes() for path in cache.glob("models--me--tiny/snapshots/*/*")}
    check(
        all(files[name] == content for name, content in fetched.items())
        and any(name.endswith(".safetensors") for name in fetched),
        "other bytes",
    )
    return f"{name}: {'killed in the middle' if kill else 'broken off'}, fetched again, scored offline"


KINDS: list[Callable[[Case], str]] = [
    kill_scoring,
    kill_merging,
    kill_training,
    truncated_shard,
    flipped_shard,
    foreign_shard,
    damaged_checkpoint,
    full_disk,
    read_only,
    clock_jump,
    stale_claim,
    two_jobs,
    kill_staging,
    full_staging,
    late_listing,
    clock_off,
    missing_node,
    broken_connection,
]
NEED_ROOT = (full_disk, read_only, full_staging)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=60, help="number of the last fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=1, help="number of the first fault")
    parser.add_argument("--kind", action="append", default=[], choices=[kind.__name__ for kind in KINDS])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak."))
    measure = undisturbed_run(folder)
    table = Table("", "fault", "what was done", "s", "", title=f"seed {options.seed}", box=box.SIMPLE)
    failed = skipped = left_out = 0
    for number in range(options.first, options.faults + 1):
        kind = KINDS[(number - 1) % len(KINDS)]
        if options.kind and kind.__name__ not in options.kind:
            left_out += 1
            continue
        if kind in NEED_ROOT and os.geteuid() != 0:
            skipped += 1
            print(f"{number:3d} {kind.__name__}: SKIPPED, needs root", flush=True)
            continue
        case = Case(measure, folder / f"{number:03d}-{kind.__name__}", random.Random(f"{options.seed} {number}"))
        begin = time.monotonic()
        try:
            what, result = kind(case), "passed"
            shutil.rmtree(case.folder)
        except Failed as error:
            what, result = f"{error} (kept in {case.folder})", "FAILED"
            failed += 1
        seconds = f"{time.monotonic() - begin:.0f}"
        print(f"{number:3d} {kind.__name__}: {result}, {seconds} s: {what}", flush=True)
        table.add_row(str(number), kind.__name__, what.splitlines()[0], seconds, result)
    Console(width=160).print(table)
    count = options.faults - options.first + 1 - skipped - left_out
    print(f"soak: {count - failed} of {count} faults passed, {skipped} skipped (seed {options.seed})")
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
