"""The benchmark on a CPU: each figure a ratio to a named peer, over pairs of runs that take turns.

    make bench
    python tools/bench/cpu.py --data ../shared/data --model models/SmolLM2-135M-Instruct --out bench.json

Runs in the environment of tools/bench/requirements.txt with this checkout on PYTHONPATH, so that both sides use the
same torch and transformers. Prints a table for docs/benchmarks.md; BENCH.json has every single run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16" if has_bfloat16() else "float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, default=2, help="Rounds in which each side runs once.")
    parser.add_argument("--examples", type=int, default=64, help="Examples of the first two comparisons; all are 1283.")
    parser.add_argument("--only", default="", help="Names of comparisons that hold this word.")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv" / "bin" / "python", help="For start-up times.")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()

    run = Bench(options)
    run.compare_all()
    run.memory_by_vocabulary()
    run.start_up()
    run.write()


class Bench:
    """The measurements of one call; every single one of them ends up in the JSON file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results: dict[str, Any] = {"machine": machine(), "versions": versions(), "comparisons": {}}
        self.both = {"threads": options.threads, "dtype": options.dtype, "tokens_per_batch": 2048, "batch_size": 8}
        self.real = {"model": str(options.model), "tokenizer": str(options.model)}
        self.shape = {
            "model": str(options.data / "model_configs" / "Qwen2-0.5B.config.json"),
            "tokenizer": str(options.data / "tokenizers" / "qwen2"),
        }
        self.conll = {"data": str(options.data / "conll04" / "conll04_train.json")}
        self.semeval = {"data": str(options.data / "semeval2010_task8" / "TRAIN_FILE.TXT")}
        self.lora = {"mode": "lora", "dtype": "float32"}

    def compare_all(self) -> None:
        print(
            "| what | beside | examples/s, ours | theirs | ratio | smallest to largest | peak memory, ours to theirs |"
        )
        print("|---|---|---|---|---|---|---|")
        two_layers = {**self.shape, **self.conll, **self.lora, "examples": 24, "layers": 2}
        trainers = ["train_trainer", "train_trl", "train_trl_packing"]
        scoring = {**self.real, **self.conll, "examples": self.options.examples}
        self.compare("scoring, SmolLM2-135M", "score_ours", ["score_lm_eval"], **scoring)
        explained = {**scoring, "meanings": True}
        self.compare("scoring, SmolLM2-135M, labels explained", "score_ours", ["score_lm_eval"], **explained)
        few_shot = {**self.real, **self.conll, "examples": 12, "shots": 5}
        self.compare("scoring, SmolLM2-135M, 5-shot", "score_ours", ["score_lm_eval"], **few_shot)
        shape = {**self.shape, **self.conll, "examples": 16, "meanings": True}
        self.compare("scoring, Qwen2-0.5B shape, labels explained", "score_ours", ["score_lm_eval"], **shape)
        ranking = {**self.real, **self.semeval, "examples": 8, "dtype": "float32"}
        self.compare("ranking 19 labels, SmolLM2-135M", "rank_tree", ["rank_pairs"], **ranking)
        each = {**ranking, "examples": 2, "batch_size": 4}  # lm-eval's best of 1, 4, 16 on these lengths
        self.compare("ranking 19 labels, each pair by itself", "rank_tree", ["rank_lm_eval"], **each)
        real = {**self.real, **self.conll, **self.lora, "examples": 16}
        self.compare("LoRA training, SmolLM2-135M", "train_ours", trainers, **real)
        if self.options.dtype == "bfloat16":
            narrow = {**real, "dtype": "bfloat16", "batch_size": 4}
            self.compare("LoRA training in bfloat16, SmolLM2-135M", "train_ours", trainers[:1], **narrow)
        self.compare(
            "LoRA training, 152k vocabulary, 2 layers",
            "train_ours",
            ["train_trainer", "train_trl_packing", "train_trainer_deepspeed"],
            once=["train_ours_padded", "train_ours_full_logits"],
            **two_layers,
        )

    def compare(self, name: str, ours: str, peers: list[str], once: Sequence[str] = (), **own: Any) -> None:
        """``pairs`` rounds in which every side runs once, those of ``once`` in the first alone; a line a peer."""
        if self.options.only not in name:
            return
        given = {**self.both, **own}
        if "score_lm_eval" in peers:
            given["batch_size"] = best_batch_size(given)
        rate = ["matmul"] if "score_lm_eval" in peers else []
        runs: dict[str, list[dict[str, Any]]] = {what: [] for what in (ours, *peers, *once, *rate)}
        for round_ in range(self.options.pairs):
            for what in runs:
                if round_ == 0 or what not in once:
                    runs[what].append(measure(what, given))
        self.results["comparisons"][name] = {"options": given, "runs": runs}
        for peer in [*peers, *once]:
            print(line(name, runs[ours], peer, runs[peer]), flush=True)
        if rate:
            rates = statistics.median(run["flops"] for run in runs["matmul"])
            shares = [run["flops"] / alone["flops"] for run, alone in zip(runs[ours], runs["matmul"])]
            print(
                f"| {name} | matrix products alone, {rates / 1e9:.0f} GFLOP/s | | | {spread(shares)} | | |", flush=True
            )
        if "parts" in runs[ours][0]:
            parts = runs[ours][0]["parts"]
            said = ", ".join(f"{part} {share:.1%}" for part, share in parts.items())
            print(f"| {name} | where the time goes: {said} | | | | | |", flush=True)

    def memory_by_vocabulary(self) -> None:
        """Peak memory while it trains, over the size of the vocabulary, all else alike."""
        if self.options.only not in "memory":
            return
        found: dict[str, list[tuple[int, float]]] = {"train_ours": [], "train_trainer": []}
        for size in (8_000, 32_000, 64_000, 151_936):
            given = {**self.both, **self.shape, **self.conll, **self.lora, "examples": 16, "layers": 2}
            for what, points in found.items():
                points.append((size, measure(what, {**given, "vocab_size": size})["peak_gib"]))
        self.results["memory_by_vocabulary"] = found

    def start_up(self) -> None:
        """Seconds to ``--help``; and from the command to the first batch, beside importing and loading alone."""
        if self.options.only not in "start-up":
            return
        helps, firsts, loads = [], [], []
        python = str(self.options.python)
        words = [python, "-m", "atlantis_ds"]
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "recipe.yaml"
            recipe.write_text(json.dumps(self.start_up_recipe(folder)))
            clock([*words, "prepare", str(recipe)])
            for _ in range(self.options.pairs):
                helps.append(clock([*words, "--help"]))
                log = Path(folder) / "run" / "log.jsonl"
                log.unlink(missing_ok=True)
                shutil.rmtree(Path(folder) / "run" / "model", ignore_errors=True)
                clock([*words, "train", str(recipe), "--arm", "sft"])
                events = map(json.loads, log.read_text().splitlines())
                firsts += [event["since_process_start"] for event in events if event["event"] == "start"]
                loads.append(clock([python, "-c", IMPORT_AND_LOAD, str(self.options.model)]))
        self.results["start_up"] = {"help": helps, "first_batch": firsts, "import_and_load": loads}
        ratios = [first / load for first, load in zip(firsts, loads)]
        print(f"\n--help: {spread(helps)} s")
        print(f"to the first batch: {spread(firsts)} s; importing and loading alone: {spread(loads)} s")
        print(f"ratio: {spread(ratios)}")

    def start_up_recipe(self, folder: str) -> dict[str, Any]:
        return {
            "name": "run",
            "runs_dir": folder,
            "data": {
                "format": "spert",
                "train": self.conll["data"],
                "test": self.conll["data"].replace("train.json", "test.json"),
                "train_size": 8,
                "test_size": 8,
            },
            "models": {name: {"model_name_or_path": str(self.options.model)} for name in ("large", "small")},
            "train": {
                "mode": "lora",
                "deepspeed": "zero2.json",
                "dtype": "float32",
                "num_train_epochs": 1,
                "train_batch_size": 8,
            },
            "arms": {"sft": {"weights": {"formula": "uniform"}}},
        }

    def write(self) -> None:
        self.options.out.write_text(json.dumps(self.results, indent=1))
        if "memory_by_vocabulary" in self.results:
            plot_memory(self.results["memory_by_vocabulary"], self.options.out.with_suffix(".memory.png"))


# What no training can do without: the libraries, the tokenizer, the model and its adapters in memory.
IMPORT_AND_LOAD = """
import sys
import torch, transformers, peft, deepspeed
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
lm = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
peft.get_peft_model(lm, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
"""


def clock(words: list[str]) -> float:
    start = time.monotonic()
    subprocess.run(
        words, check=True, env=environment(os.cpu_count() or 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.monotonic() - start


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def plot_memory(found: dict[str, list[tuple[int, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for what, label in (("train_trainer", "transformers Trainer"), ("train_ours", "atlantis_ds")):
        axes.plot(*zip(*found[what]), "o-", label=label)
    axes.set(xlabel="vocabulary", ylabel="peak memory while it trains, GiB", ylim=(0, None))
    axes.set_title("LoRA training, Qwen2 shape of 2 layers, micro-batch 8, fp32", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def environment(threads: int) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }


def measure(what: str, options: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "measure.py"), what, json.dumps(options)],
        env=environment(options["threads"]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{what} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def best_batch_size(options: dict[str, Any]) -> int:
    """The peer's best of a few, on a quarter of the examples."""
    few = {**options, "examples": max(16, options["examples"] // 4)}
    rates = {size: measure("score_lm_eval", {**few, "batch_size": size})["examples_per_s"] for size in (1, 4, 16)}
    return max(rates, key=lambda size: rates[size])


def line(name: str, ours: list[dict[str, Any]], peer: str, theirs: list[dict[str, Any]]) -> str:
    ratios = [a["examples_per_s"] / b["examples_per_s"] for a, b in zip(ours, theirs)]
    rates = [statistics.median(run["examples_per_s"] for run in runs) for runs in (ours, theirs)]
    memory = statistics.median(a["peak_gib"] / b["peak_gib"] for a, b in zip(ours, theirs))
    if "values" in ours[0]:
        apart = max(abs(a - b) for a, b in zip(ours[0]["values"], theirs[0]["values"]))
        name += f" (values differ by at most {apart:.1e})"
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    cells = [name, peer, f"{rates[0]:.2f}", f"{rates[1]:.2f}", f"{statistics.median(ratios):.2f}", spread]
    return "| " + " | ".join([*cells, f"{memory:.2f}"]) + " |"


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; where not, it is several times slower than float32."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "bfloat16": has_bfloat16(), "system": platform.platform()}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "deepspeed", "peft", "lm-eval", "trl")}


if __name__ == "__main__":
    main()
