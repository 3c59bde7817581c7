#!/usr/bin/env python3
"""Inject faults into real runs; after each, a rerun must end as if nothing had happened, or be refused clearly.

    python tools/soak.py [--faults 44] [--seed 1] [--only KIND]

An undisturbed run on two ranks is the measure. Each fault then meets a copy of that run taken back to some stage, at a
seeded random moment: kill -9 of a rank while scoring, merging or training; a full disk and a read-only folder (needs
root, for mounts); a truncated, bit-flipped or foreign shard; a truncated checkpoint; a clock jump; a stale claim of a
dead job; two jobs at once. "As if nothing had happened" means: weights and trained model byte-identical, and no
finished shard written again. Ends with 0 when every fault passed; the folder of a failed one is kept and named.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
ENV = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
LIMIT = 600  # seconds for one command: more is a hang
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512, "pretrain_epochs": 0}


class Failed(Exception):
    """A fault that was not survived as it should be."""


def write_recipe(folder: Path) -> Path:
    model = {"scratch": SHAPE}
    tree = {
        "name": "run",
        "runs_dir": str(folder),
        "seed": 5,
        "data": {"format": "grammar", "train_size": 400, "dev_size": 6, "test_size": 10},
        "models": {"large": model, "small": model, "reference": {"kind": "checkpoint", "model_name_or_path": ""}},
        "score": {"shard_size": 10, "tokens_per_batch": 256},
        "weights": {"formula": "product", "temper": 0.5},
        "arms": {"atlantis": {}},
        "train": {
            "deepspeed": str(ROOT / "ds_configs" / "zero3.json"),
            "dtype": "float32",
            "learning_rate": 2e-3,
            "num_train_epochs": 1,
            "train_batch_size": 8,
            "per_device_train_batch_size": 4,
            "save_steps": 7,
            "save_total_limit": 2,
        },
        "timeout_minutes": 2,
    }
    tree["models"]["reference"]["model_name_or_path"] = str(folder.parent / "reference")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def command(recipe: Path, stage: str, ranks: int = 2) -> list[str]:
    words = [sys.executable, "-m", "atlantis_ds", stage, str(recipe)]
    return words + (["--ranks", str(ranks)] if stage in ("score", "train") and ranks > 1 else [])


def finish(recipe: Path, stage: str) -> tuple[int, str]:
    """Run a stage to its end; its exit code and what it said. A traceback is no way to end."""
    done = subprocess.run(command(recipe, stage), env=ENV, capture_output=True, text=True, timeout=LIMIT)
    said = done.stdout + done.stderr
    if "Traceback" in said:
        raise Failed(f"{stage} ended with a traceback:\n{said[-2000:]}")
    return done.returncode, said


def must_succeed(recipe: Path, *stages: str) -> None:
    for stage in stages:
        code, said = finish(recipe, stage)
        if code:
            raise Failed(f"{stage} ended with {code}:\n{said[-2000:]}")


def must_refuse(recipe: Path, stage: str, *named: str) -> None:
    code, said = finish(recipe, stage)
    if code not in (1, 2) or not all(name in said for name in named):
        raise Failed(f"{stage} ended with {code}, expected a refusal that names {named}:\n{said[-2000:]}")


def outputs(run: Path) -> dict[str, bytes]:
    found = sorted((run / "scores").glob("shard-*.parquet"))
    found += [run / "weights.parquet", run / "model" / "atlantis" / "last" / "model.safetensors"]
    return {path.name: path.read_bytes() for path in found}


def family(process: subprocess.Popen[bytes]) -> list[int]:
    """The ranks of ``--ranks 2`` (children of the process), or the process itself."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()] or [process.pid]


class Soak:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        base = folder / "undisturbed"
        base.mkdir()
        recipe = write_recipe(base)
        must_succeed(recipe, "prepare")
        shutil.copytree(base / "run" / "base" / "small", folder / "reference")
        self.seconds = {}
        for stage in ("score", "merge", "train"):
            start = time.monotonic()
            must_succeed(recipe, stage)
            self.seconds[stage] = time.monotonic() - start
        self.base, self.expected = base / "run", outputs(base / "run")

    def copy(self, folder: Path, before: str) -> Path:
        """A copy of the undisturbed run, taken back to before a stage; its recipe."""
        folder.mkdir(exist_ok=True)
        shutil.copytree(self.base, folder / "run", dirs_exist_ok=True)
        run = folder / "run"
        for stage, made in (("train", "model"), ("merge", "weights.parquet"), ("merge", "weights.json")):
            if (stage, before) != ("merge", "train"):
                path = run / made
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if before == "score":
            shutil.rmtree(run / "scores")
        return write_recipe(folder)

    def compare(self, folder: Path) -> None:
        found = outputs(folder / "run")
        if different := [name for name in self.expected if found.get(name) != self.expected[name]]:
            raise Failed(f"differs from the undisturbed run: {', '.join(different[:5])}")
        left = [p for p in (folder / "run").rglob(".*") if p.name.endswith((".tmp", ".old", ".universal"))]
        if left and any(path.is_dir() for path in left):
            raise Failed(f"left behind: {left[0]}")

    def interrupt(self, recipe: Path, stage: str, signals: Callable[[subprocess.Popen[bytes]], None]) -> None:
        """Start a stage, do something to it at a random moment, wait for its end."""
        process = subprocess.Popen(
            command(recipe, stage), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(self.rng.uniform(0.3, 1.0) * self.seconds[stage])
        if process.poll() is None:
            signals(process)
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed(f"{stage}: the other ranks hang after one was killed") from None

    # --- the faults; each gets an empty folder

    def kill_scoring(self, folder: Path) -> None:
        recipe = self.copy(folder, "score")
        self.interrupt(recipe, "score", self._kill_one)
        done = {p: p.stat().st_mtime_ns for p in (folder / "run" / "scores").glob("shard-*.parquet")}
        must_succeed(recipe, "score", "merge", "train")
        if again := [path.name for path, when in done.items() if path.stat().st_mtime_ns != when]:
            raise Failed(f"finished shards were written again: {again[:3]}")
        self.compare(folder)

    def kill_merging(self, folder: Path) -> None:
        recipe = self.copy(folder, "merge")
        self.interrupt(recipe, "merge", self._kill_one)
        must_succeed(recipe, "merge", "train")
        self.compare(folder)

    def kill_training(self, folder: Path) -> None:
        recipe = self.copy(folder, "train")
        self.interrupt(recipe, "train", self._kill_one)
        must_succeed(recipe, "train")
        self.compare(folder)

    def _kill_one(self, process: subprocess.Popen[bytes]) -> None:
        os.kill(self.rng.choice(family(process)), signal.SIGKILL)

    def _shard(self, folder: Path) -> tuple[Path, Path]:
        recipe = self.copy(folder, "merge")
        return recipe, self.rng.choice(sorted((folder / "run" / "scores").glob("shard-*.parquet")))

    def truncated_shard(self, folder: Path) -> None:
        recipe, shard = self._shard(folder)
        os.truncate(shard, self.rng.randrange(shard.stat().st_size))
        must_refuse(recipe, "merge", shard.name)
        must_succeed(recipe, "score", "merge", "train")  # scoring sees by itself that it is broken
        self.compare(folder)

    def flipped_shard(self, folder: Path) -> None:
        recipe, shard = self._shard(folder)
        data = bytearray(shard.read_bytes())
        place = self.rng.randrange(len(data))
        data[place] ^= 1 << self.rng.randrange(8)
        shard.write_bytes(data)
        code, said = finish(recipe, "merge")
        if code:  # where the flip is of no effect (say, in a statistic), the weights must be right
            if shard.name not in said and "scores" not in said:
                raise Failed(f"byte {place} flipped: the refusal does not name the shard:\n{said[-2000:]}")
            shard.unlink()
            must_succeed(recipe, "score", "merge")
        else:
            shard.write_bytes(self.expected[shard.name])
        must_succeed(recipe, "train")
        self.compare(folder)

    def foreign_shard(self, folder: Path) -> None:
        recipe, shard = self._shard(folder)
        others = sorted(shard.parent.glob("shard-*.parquet"))
        others.remove(shard)
        if self.rng.random() < 0.5:  # another shard's content under this name, or one shard too many
            shutil.copy(self.rng.choice(others), shard)
            bad = shard
        else:
            bad = shard.with_name("shard-00099-of-00100.parquet")
            shutil.copy(shard, bad)
        must_refuse(recipe, "merge", bad.name)
        bad.unlink()
        must_succeed(recipe, "score", "merge", "train")
        self.compare(folder)

    def truncated_checkpoint(self, folder: Path) -> None:
        recipe = self.copy(folder, "train")
        self.interrupt(recipe, "train", lambda process: process.terminate())  # asked to stop: it saves
        saved = sorted((folder / "run" / "checkpoints" / "atlantis").glob("step-*"))
        if saved:
            file = self.rng.choice(sorted(saved[-1].glob("*.pt")))
            os.truncate(file, self.rng.randrange(file.stat().st_size))
            must_refuse(recipe, "train", saved[-1].name)
            shutil.rmtree(saved[-1])
        must_succeed(recipe, "train")
        self.compare(folder)

    def full_disk(self, folder: Path) -> None:
        stage = self.rng.choice(["score", "train"])
        folder.mkdir()
        self._mount("tmpfs", folder, "size=64m")
        try:
            recipe = self.copy(folder, stage)
            free = shutil.disk_usage(folder).free
            ballast = folder / "ballast"
            ballast.write_bytes(bytes(max(0, free - self.rng.randrange(1, 40) * 4096)))
            code, said = finish(recipe, stage)
            if code not in (0, 1) or (code and "fault: " not in said):
                raise Failed(f"{stage} on a full disk ended with {code}:\n{said[-2000:]}")
            ballast.unlink()
            must_succeed(recipe, *(["score", "merge"] if stage == "score" else []), "train")
            self.compare(folder)
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)

    def read_only(self, folder: Path) -> None:
        stage = self.rng.choice(["score", "merge", "train"])
        folder.mkdir()
        self._mount("tmpfs", folder, "size=256m")
        try:
            recipe = self.copy(folder, stage)
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            must_refuse(recipe, stage, "Read-only file system")
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
            must_succeed(recipe, *["score", "merge", "train"][["score", "merge", "train"].index(stage) :])
            self.compare(folder)
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)

    def _mount(self, kind: str, folder: Path, options: str) -> None:
        subprocess.run(["mount", "-t", kind, "-o", options, kind, str(folder)], check=True)

    def clock_jump(self, folder: Path) -> None:
        """Half of the shards, and a checkpoint, come from ten years ahead or behind."""
        recipe = self.copy(folder, "score")
        self.interrupt(recipe, "score", lambda process: process.terminate())
        jump = time.time() + self.rng.choice([-1, 1]) * 10 * 365 * 86400
        for path in (folder / "run").rglob("*"):
            os.utime(path, (jump, jump))
        must_succeed(recipe, "score", "merge")
        self.interrupt(recipe, "train", lambda process: process.terminate())
        for path in (folder / "run").rglob("*"):
            os.utime(path, (-jump + 2 * time.time(),) * 2)
        must_succeed(recipe, "train")
        self.compare(folder)

    def stale_claim(self, folder: Path) -> None:
        recipe = self.copy(folder, "train")
        claims = folder / "run" / "claims"
        claims.mkdir(exist_ok=True)
        owner = {"host": "gone", "pid": 1, "machine": "gone", "beat": 3}
        text = self.rng.choice([json.dumps(owner), "", '{"host": "go'])
        (claims / "train-atlantis.json").write_text(text)
        must_succeed(recipe, "train")
        self.compare(folder)

    def two_jobs(self, folder: Path) -> None:
        stage = self.rng.choice(["score", "train"])
        recipe = self.copy(folder, stage)
        first = subprocess.Popen(command(recipe, stage), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(self.rng.uniform(0.0, 0.5) * self.seconds[stage])
        code, said = finish(recipe, stage)
        if first.wait(LIMIT) not in (0, 2) or code not in (0, 2):
            raise Failed(f"two jobs at once: {first.returncode} and {code}:\n{said[-2000:]}")
        must_succeed(recipe, *(["score", "merge"] if stage == "score" else []), "train")
        self.compare(folder)


KINDS = [
    "kill_scoring",
    "kill_merging",
    "kill_training",
    "truncated_shard",
    "flipped_shard",
    "foreign_shard",
    "truncated_checkpoint",
    "full_disk",
    "read_only",
    "clock_jump",
    "stale_claim",
    "two_jobs",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=KINDS)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak."))
    soak = Soak(folder, options.seed)
    kinds = [options.only] if options.only else KINDS
    failed = 0
    for number, kind in zip(range(1, options.faults + 1), itertools.cycle(kinds)):
        place = folder / f"{number:03d}-{kind}"
        start = time.monotonic()
        try:
            getattr(soak, kind)(place)
            shutil.rmtree(place)
            print(f"{number:3d} {kind}: passed, {time.monotonic() - start:.0f} s", flush=True)
        except (Failed, subprocess.TimeoutExpired) as error:
            failed += 1
            print(f"{number:3d} {kind}: FAILED, kept in {place}: {error}", flush=True)
    print(f"soak: {options.faults - failed} of {options.faults} faults passed (seed {options.seed})")
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
