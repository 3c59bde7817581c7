"""What more ranks bring and cost: measured on this machine, and predicted for 8 to 512 GPUs.

    python tools/bench/scaling.py check     # trains at 1, 2 and 4 ranks: predicted against measured
    python tools/bench/scaling.py speedup   # 1, 2 and 4 ranks of one thread each, scoring and training; the plot
    python tools/bench/scaling.py predict   # Qwen2-7B under ZeRO-3 on 8, 64, 512 GPUs; scoring 10 million examples

``check`` and ``speedup`` want an otherwise idle machine. The model of communication is `scaling_model.py`, ranks run
`scaling_rank.py`. Prints Markdown tables; --out has everything as JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scaling_model import Collective, Link, Step, bytes_sent, read_model, traffic

from atlantis_ds.config.schema import Model, Train
from atlantis_ds.plan.memory import training_memory
from atlantis_ds.plan.trace import activations, read_config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ZERO = ROOT / "ds_configs"
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
"""31M weights, Qwen2's architecture."""
PROMPT, LABEL, MICRO = 58, 7, 4
"""Tokens of an example and examples a micro-batch of ``check``."""


def main() -> None:
    from scaling_predict import predict

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "speedup", "predict"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=5, help="check: timed steps of a run; the fastest counts.")
    parser.add_argument("--pairs", type=int, default=5, help="speedup: runs at each number of ranks, taking turns.")
    parser.add_argument("--model", type=Path, help="speedup: a model folder (default: random weights, 31M).")
    parser.add_argument("--zero", default="zero2", help="speedup: file of ds_configs to train with.")
    parser.add_argument("--mode", default="full", choices=["full", "lora"], help="speedup: mode to train with.")
    parser.add_argument("--plot", type=Path, help="speedup: write examples/s against ranks into this PNG.")
    parser.add_argument("--configs", type=Path, default=ROOT.parent / "shared" / "data" / "model_configs")
    parser.add_argument("--merge", type=Path, help="predict: the line that merge.py printed, for its time and memory.")
    parser.add_argument("--out", type=Path, default=Path("scaling.json"))
    options = parser.parse_args()
    found = {"check": check, "speedup": speedup, "predict": predict}[options.what](options)
    options.out.write_text(json.dumps(found, indent=1))


def run_ranks(ranks: int, what: str, options: dict[str, Any]) -> dict[str, Any]:
    """What `scaling_rank.py` measures on so many ranks of one thread each."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # Freed blocks go back at once, so that resident memory is what is in use.
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
    }
    line = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), str(HERE / "scaling_rank.py")]
    done = subprocess.run(
        [*line, what, json.dumps(options)], env=environment, capture_output=True, text=True, check=False
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if done.returncode or not found:
        sys.exit(f"{what} on {ranks} ranks failed: {done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(found[-1].removeprefix("FOUND "))
    return result


def save_model(folder: Path, shape: dict[str, Any]) -> Path:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(folder)
    return folder


def small_window(folder: Path, weights: int) -> Path:
    """ZeRO-3 as a model feels it that is several times larger than what DeepSpeed keeps gathered (1e9 weights)."""
    config = json.loads((ZERO / "zero3.json").read_text())
    window = {"stage3_max_live_parameters": weights // 8, "stage3_max_reuse_distance": weights // 8}
    window |= {"stage3_prefetch_bucket_size": weights // 160, "stage3_param_persistence_threshold": 1000}
    config["zero_optimization"] |= window
    path = folder / "zero3_small_window.json"
    path.write_text(json.dumps(config))
    return path


def settings(file: Path, ranks: int, **others: Any) -> dict[str, Any]:
    sizes = {"train_batch_size": MICRO * ranks, "per_device_train_batch_size": MICRO}
    return {"deepspeed": str(file), "dtype": "float32", **sizes, **others}


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Train a small model at each number of ranks and ZeRO stage; print what was predicted beside what was measured."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_model(Path(temporary) / "model", SHAPE)
        window = small_window(Path(temporary), sum(_traced(folder, False)[0].sizes))
        cases: dict[str, tuple[Path, dict[str, Any]]] = {
            "ZeRO-3": (ZERO / "zero3.json", {}),
            "ZeRO-2": (ZERO / "zero2.json", {}),
            "ZeRO-3, small window": (window, {}),
            "ZeRO-3, small window, checkpointing": (window, {"gradient_checkpointing": True}),
        }
        for name, (file, others) in cases.items():
            for ranks in options.ranks:
                given = {"model": str(folder), "train": settings(file, ranks, **others), "rates": True}
                given |= {"prompt": PROMPT, "label": LABEL, "steps": options.steps}
                measured = run_ranks(ranks, "train", given)
                runs = results.setdefault(name, {})
                told = predicted(folder, Train(**given["train"]), ranks, measured, runs.get("1"))
                runs[str(ranks)] = {"measured": measured, "predicted": told}
                print(f"{name}, {ranks} ranks: measured", file=sys.stderr, flush=True)
                options.out.write_text(json.dumps(results, indent=1))
        _print_check(results)
    return results


def predicted(
    folder: Path, train: Train, ranks: int, measured: dict[str, Any], alone: dict[str, Any] | None
) -> dict[str, Any]:
    """Bytes, seconds and memory of a step.

    Seconds follow from the run of one rank (what passes and update take there) and from what was measured between and
    in these ranks: matmul and copy rates while all of them work, which is where more ranks than cores enter, and
    latency and bandwidth of each kind of collective.
    """
    model, taken = _traced(folder, train.gradient_checkpointing)
    zero = json.loads(Path(train.deepspeed).read_text())["zero_optimization"]
    passes, after = traffic(model, zero, ranks, 1, train)
    memory = training_memory(train, model.shape, zero, ranks, accumulation=1, cpu=True)
    found = {
        "calls": sum(c.calls for c in [*passes, *after]),
        "sent": bytes_sent([*passes, *after], ranks),
        "peak": memory.peak(taken),
    }
    if alone is None:
        return found
    first, rates = alone["measured"], measured["rates"]
    step = Step(
        compute=(first["seconds"] - first["update"]) * first["rates"]["matmul"] / rates["matmul"],
        passes=_seconds(passes, ranks, measured["links"]),
        after=_seconds(after, ranks, measured["links"]),
        update=first["update"] / ranks * first["rates"]["copy"] / rates["copy"],
    )
    return {**found, **step.__dict__, "seconds": step.apart}


@functools.cache
def _traced(folder: Path, checkpointing: bool) -> tuple[Any, float]:
    """The model and the bytes of its activations in one micro-batch of fp32."""
    config = read_config(Model(model_name_or_path=str(folder)))
    train = Train(dtype="float32", gradient_checkpointing=checkpointing)
    return read_model(config, train), activations(config, train, PROMPT, LABEL).bytes(MICRO)


def _seconds(collectives: list[Collective], ranks: int, links: dict[str, dict[str, float]]) -> float:
    def of(kind: str) -> float:
        link = Link(links[kind]["bandwidth"], lambda *_: [(links[kind]["latency"], 1.0)])
        return link.seconds([c for c in collectives if c.kind == kind], ranks)

    return sum(of(kind) for kind in {c.kind for c in collectives})


def _print_check(results: dict[str, Any]) -> None:
    print("| ranks | matmul, GFLOP/s a rank | copy, GB/s | all-gather | reduce-scatter | all-reduce |")
    print("|---|---|---|---|---|---|")
    for ranks, run in next(iter(results.values())).items():
        rates, links = run["measured"]["rates"], run["measured"]["links"]
        line = [ranks, f"{rates['matmul'] / 1e9:.0f}", f"{rates['copy'] / 1e9:.1f}"]
        for kind in ("all_gather", "reduce_scatter", "all_reduce"):
            link = links.get(kind)
            line.append(f"{1e6 * link['latency']:.0f} us, {link['bandwidth'] / 1e9:.2f} GB/s" if link else "")
        print("| " + " | ".join(line) + " |")
    print("\n| | ranks | collectives | MB sent by a rank | step, s | peak, MiB |")
    print("|---|---|---|---|---|---|")
    for name, runs in results.items():
        for ranks, run in runs.items():
            measured, told = run["measured"], run["predicted"]
            entries = measured["collectives"].items()
            calls = sum(calls for _, (calls, _) in entries)
            sent = sum(Collective(kind, whole).sent(int(ranks)) for kind, (_, whole) in entries)
            cells = [
                f"{told['calls']}, {calls}" if int(ranks) > 1 else "",
                against(told["sent"] / 1e6, sent / 1e6, 2) if int(ranks) > 1 else "",
                against(told["seconds"], measured["seconds"], 2) if "seconds" in told else f"{measured['seconds']:.2f}",
                against(told["peak"] / 2**20, measured["peak"] / 2**20, 0),
            ]
            print(f"| {name} | {ranks} | " + " | ".join(cells) + " |", flush=True)


def against(told: float, measured: float, digits: int) -> str:
    """Predicted, measured, and how far the prediction is off."""
    off = f"{100 * (told / measured - 1):+.1f} %" if measured else ""
    return f"{told:.{digits}f}, {measured:.{digits}f} ({off})"


def speedup(options: argparse.Namespace) -> dict[str, Any]:
    """Examples/s of scoring and training on ranks of one thread each; runs take turns, ratios are within a turn."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or save_model(Path(temporary) / "model", SHAPE)
        train = settings(ZERO / f"{options.zero}.json", 4, mode=options.mode)
        given = {"model": str(folder), "train": train, "prompt": 100, "examples": 288, "dtype": "float32"}
        given |= {"shard_size": 8, "tokens_per_batch": 1024}
        turns = [{ranks: run_ranks(ranks, "speed", given) for ranks in options.ranks} for _ in range(options.pairs)]
    print("| | ranks | examples/s (products: GFLOP/s), median | times one rank, median | min to max |")
    print("|---|---|---|---|---|")
    for what in ("score", "train", "products"):
        for ranks in options.ranks:
            rates = [turn[ranks][what] for turn in turns]
            ratios = [turn[ranks][what] / turn[options.ranks[0]][what] for turn in turns]
            cells = [f"{statistics.median(rates):.2f}", f"{statistics.median(ratios):.2f}"]
            print(f"| {what} | {ranks} | " + " | ".join([*cells, f"{min(ratios):.2f} to {max(ratios):.2f}"]) + " |")
    if options.plot:
        plot(turns, options.plot)
    return {"options": {**given, "model": str(options.model or SHAPE)}, "turns": turns}


def plot(turns: list[dict[int, dict[str, float]]], path: Path) -> None:
    """Examples/s of one rank's, against the number of ranks: every run, the medians, and the ideal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ranks = sorted(turns[0])
    figure, axes = plt.subplots(figsize=(4.5, 3.2), dpi=100)
    for what, name, mark in (("score", "scoring", "o"), ("train", "training", "s")):
        runs = {n: [turn[n][what] for turn in turns] for n in ranks}
        medians = [statistics.median(runs[n]) for n in ranks]
        (line,) = axes.plot(ranks, medians, marker=mark, label=name)
        for n in ranks:
            axes.plot([n] * len(turns), runs[n], ".", color=line.get_color(), alpha=0.4)
        axes.plot(ranks, [medians[0] * n for n in ranks], ":", color=line.get_color())
    axes.axvline(os.cpu_count() or 1, color="grey", linewidth=0.8)
    axes.set(xlabel="ranks of one thread (grey line: cores)", ylabel="examples/s (dotted: ideal)", xticks=ranks)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
