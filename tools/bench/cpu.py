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
import statistics
import subprocess
import sys
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
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", default="", help="Names of comparisons that hold this word.")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()

    real = {"model": str(options.model), "tokenizer": str(options.model)}
    shape = {
        "model": str(options.data / "model_configs" / "Qwen2-0.5B.config.json"),
        "tokenizer": str(options.data / "tokenizers" / "qwen2"),
    }
    conll = {"data": str(options.data / "conll04" / "conll04_train.json")}
    semeval = {"data": str(options.data / "semeval2010_task8" / "TRAIN_FILE.TXT")}
    both = {"dtype": options.dtype, "threads": options.threads, "tokens_per_batch": 2048, "batch_size": 8}
    train = {"mode": "lora", "dtype": "float32"}
    # name, measure of ours, measures of the peers, options
    comparisons: list[tuple[str, str, list[str], dict[str, Any]]] = [
        ("scoring, SmolLM2-135M", "score_ours", ["score_lm_eval"], {**real, **conll, "examples": 64}),
        ("scoring, Qwen2-0.5B shape", "score_ours", ["score_lm_eval"], {**shape, **conll, "examples": 16}),
        (
            "ranking 19 labels, SmolLM2-135M",
            "rank_tree",
            ["rank_pairs"],
            {**real, **semeval, "examples": 8, "dtype": "float32"},
        ),
        (
            "training, LoRA, SmolLM2-135M",
            "train_ours",
            ["train_trainer", "train_trl"],
            {**real, **conll, **train, "examples": 24},
        ),
        (
            "training, LoRA, 152k vocabulary, 2 layers",
            "train_ours",
            ["train_trainer", "train_trl"],
            {**shape, **conll, **train, "examples": 24, "layers": 2},
        ),
    ]
    results: dict[str, Any] = {"machine": machine(), "versions": versions(), "comparisons": {}}
    print("| what | peer | examples/s, ours | peer | ratio | min to max | peak memory, ours to peer |")
    print("|---|---|---|---|---|---|---|")
    for name, ours, peers, own in comparisons:
        if options.only not in name:
            continue
        given = {**both, **own}
        if "score_lm_eval" in peers:
            given["batch_size"] = best_batch_size(given)
        runs: dict[str, list[dict[str, Any]]] = {what: [] for what in (ours, *peers)}
        for _ in range(options.pairs):
            for what in runs:
                runs[what].append(measure(what, given))
        results["comparisons"][name] = {"options": given, "runs": runs}
        options.out.write_text(json.dumps(results, indent=1))
        for peer in peers:
            print(line(name, runs[ours], peer, runs[peer]), flush=True)


def measure(what: str, options: dict[str, Any]) -> dict[str, Any]:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options["threads"]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "measure.py"), what, json.dumps(options)],
        env=environment,
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
    few = {**options, "examples": max(8, options["examples"] // 4)}
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
