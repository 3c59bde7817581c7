"""The benchmark on one GPU, in one process and under 8 minutes: ceilings, scoring, training, beside Trainer.

    python tools/bench/gpu.py --configs ../shared/data/model_configs --out bench_gpu.json
    python tools/bench/gpu.py --tiny        # the same code on tiny shapes, on a CPU or any GPU: a test, no figures

Random weights, bf16, examples of the lengths of SemEval-2010 Task 8. Needs disk for one Qwen2-7B in $TMPDIR. A
measurement that fails becomes a row that says why; what cannot fit the card is left out and says so. Prints each row
when it is found, the most important shape first, and writes it to the JSON, with card, driver and versions: one that
is cut off leaves what it has measured. At the end the rows come again, as a Markdown table.

Shares are of this card's own matmul rate and count only what is needed: 2 operations a weight and token forward, 4
backward, 2 of them where the weights are frozen; recomputation and padding do not count. Attention's products of tokens
with tokens are left out, and so are T5's cross-attention keys (`plan.forward_flops`).
"""

from __future__ import annotations

import argparse
import gc
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_train import EXTRAS, LeftOut, prompt_lengths, some_pairs, train_ours, train_trainer

from atlantis_ds.cluster.ranks import start_ranks, stop_ranks
from atlantis_ds.config.schema import Model, Train
from atlantis_ds.files import write_json
from atlantis_ds.lm.encode import Encoded
from atlantis_ds.lm.frozen import free_bytes, replica_bytes
from atlantis_ds.lm.likelihood import score_choices, score_pairs
from atlantis_ds.lm.load import load_scorer
from atlantis_ds.lm.size import Shape, forward_flops, model_shape
from atlantis_ds.plan.memory import GIB
from atlantis_ds.plan.trace import build_model

ROOT = Path(__file__).resolve().parents[2]
LABELS = 19
TOKENS_PER_BATCH = 16384
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes", "accelerate", "liger-kernel", "flash-attn")

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, default=ROOT.parent / "shared" / "data" / "model_configs")
    parser.add_argument("--tiny", action="store_true", help="Tiny shapes and few examples.")
    parser.add_argument("--minutes", type=float, default=8, help="Start no measurement after this.")
    parser.add_argument("--only", default="", help="Measurements whose name holds this word.")
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"))
    options = parser.parse_args()
    bench = Bench(options)
    bench.row("matmul bf16", bench.matmul)
    bench.row("copy", bench.copy)
    plan: list[tuple[str, list[str], int]] = [  # what people ask for first comes first: a lent card can be cut off
        ("Qwen2-7B", ["score", "rank", "lora", "qlora"], 8),
        ("Qwen2-1.5B", ["score", "rank", "full", *(f"{what}, {extra}" for what, extra in EXTRAS)], 16),
        ("flan-t5-base", ["score", "rank"], 0),
    ]
    for name, measures, micro in plan:
        with tempfile.TemporaryDirectory() as temporary:
            bench.shape(name, Path(temporary), measures, 2 if options.tiny and micro else micro)
    stop_ranks()
    print(bench.table())


class Bench:
    """The rows measured so far, and what every measurement needs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begun = options, time.monotonic()
        self.ranks = start_ranks(10)
        self.device = self.ranks.device
        self.peak = 0.0
        """Measured matmul rate, FLOP/s."""
        self.rows: list[Row] = []

    def row(self, name: str, work: Callable[[], Row]) -> Row:
        """Run one measurement and note what came of it; no failure of its own ends the others."""
        needed_by_others = name == "matmul bf16" or name.endswith(("random weights", "the scorer"))
        if self.options.only not in name and not needed_by_others:
            return {}
        row: Row = {"name": name}
        if time.monotonic() - self.begun > 60 * self.options.minutes:
            row["note"] = "left out: no time"
        else:
            begun = time.monotonic()
            reset_memory(self.device)
            try:
                row |= work()
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
            except LeftOut as reason:
                row["note"] = f"left out: {reason}"
            except Exception as error:
                row["note"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            row |= {"peak_gib": peak_memory(self.device) / GIB, "wall_s": time.monotonic() - begun}
        if "flops" in row and self.peak:
            row["share"] = row["flops"] / self.peak
        self.rows.append(row)
        found = {"machine": machine(self.device), "tiny": self.options.tiny, "rows": self.rows}
        write_json(self.options.out, found)
        print(line(row), flush=True)
        return row

    def matmul(self) -> Row:
        """The fastest of some square and tall products."""
        rates = []
        for tall, wide in ((8192, 8192), (16384, 4096)) if not self.options.tiny else ((256, 256),):
            a = torch.randn(tall, wide, dtype=torch.bfloat16, device=self.device)
            b = torch.randn(wide, wide, dtype=torch.bfloat16, device=self.device)
            rates.append(2 * tall * wide * wide / clocked(lambda a=a, b=b: a @ b, self.device, 20))
        self.peak = max(rates)
        return {"flops": self.peak}

    def copy(self) -> Row:
        a = torch.empty(2**20 if self.options.tiny else 2**30, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        return {"gb_per_s": 2 * a.numel() / clocked(lambda: b.copy_(a), self.device, 20) / 1e9}

    def shape(self, name: str, folder: Path, measures: list[str], micro: int) -> None:
        """All measurements of one model shape; its random weights are written once, for the project to load."""
        wanted = [what for what in measures if self.options.only in f"{name}: {what}"]
        if not wanted:
            return
        config = tiny_config(name) if self.options.tiny else read_shape(self.options.configs, name)
        written = self.row(f"{name}: write random weights", lambda: write_model(config, folder, self.device))
        if "note" in written:
            return
        model = Model(model_name_or_path=str(folder))
        shape = model_shape(build_model(config, Train()))
        if {"score", "rank"} & set(wanted) or any(what.startswith("score,") for what in wanted):
            self.scoring(name, model, config, shape, wanted)
        for what in wanted:
            mode, _, extra = what.partition(", ")
            if mode in ("score", "rank"):
                continue
            given = (mode, model, config, micro, self.ranks)
            ours = self.row(f"{name}: {what}", lambda given=given, extra=extra: train_ours(*given, extra=extra))
            if not extra:
                peer = self.row(f"{name}: {what}, Trainer", lambda given=given: train_trainer(*given))
                if "tokens_per_s" in ours and "tokens_per_s" in peer:
                    ours["times_trainer"] = ours["tokens_per_s"] / peer["tokens_per_s"]

    def scoring(self, name: str, model: Model, config: Any, shape: Shape, wanted: list[str]) -> None:
        """`score_pairs` and `score_choices` on the scorer that the project loads: bf16 body, fp32 head."""
        need, free = replica_bytes(model, "bfloat16"), free_bytes(self.ranks)
        if need > free:
            note = f"left out: a replica takes {need / GIB:.1f} GiB, {free / GIB:.1f} are free"
            self.rows += [{"name": f"{name}: {what}", "note": note} for what in wanted if what in ("score", "rank")]
            return
        loaded: list[Any] = []

        def load() -> Row:
            loaded.append(load_scorer(model, "bfloat16", self.device))
            return {}

        self.row(f"{name}: load the scorer", load)
        pairs = some_pairs(32 if self.options.tiny else 1024, config.vocab_size, prompt_lengths(config))
        labels = [pair.label for pair in pairs[:LABELS]]
        for what in [what for what in wanted if loaded and what.startswith(("score", "rank"))]:
            extra = what.partition(", ")[2]

            def work(what: str = what, extra: str = extra) -> Row:
                if extra:  # on a model of its own
                    loaded[0] = None
                    gc.collect()
                    loaded[0] = load_scorer(model, "bfloat16", self.device)
                    EXTRAS[("score", extra)](loaded[0])
                lm = loaded[0]
                if what == "rank":
                    prompts = [pair.prompt for pair in pairs[: len(pairs) // 4]]
                    return measure_ranking(lm, shape, prompts, labels, pairs[0].eos, self.device)
                return measure_scoring(lm, shape, pairs, self.device)

            self.row(f"{name}: {what}", work)

    def table(self) -> str:
        lines = [f"{key}: {value}" for key, value in machine(self.device).items()]
        lines += ["", "| | tokens/s | examples/s | TFLOP/s | share of matmul | times Trainer | peak, GiB | |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += map(line, self.rows)
        return "\n".join(lines)


def line(row: Row) -> str:
    """A row of the table."""
    rate = row.get("flops", 0) / 1e12
    cells = [
        f"{row['tokens_per_s']:.0f}" if "tokens_per_s" in row else "",
        f"{row['examples_per_s']:.1f}" if "examples_per_s" in row else "",
        f"{rate:.3g}" if rate else "",
        f"{row['share']:.0%}" if "share" in row else "",
        f"{row['times_trainer']:.2f}" if "times_trainer" in row else "",
        f"{row['peak_gib']:.1f}" if "peak_gib" in row else "",
        row.get("note", f"{row['gb_per_s']:.0f} GB/s" if "gb_per_s" in row else ""),
    ]
    return "| " + " | ".join([row["name"], *cells]) + " |"


def measure_scoring(lm: Any, shape: Shape, pairs: list[Encoded], device: torch.device) -> Row:
    score_pairs(lm, pairs[: len(pairs) // 8], pairs[0].eos, TOKENS_PER_BATCH)
    seconds = clocked(lambda: score_pairs(lm, pairs, pairs[0].eos, TOKENS_PER_BATCH), device, 2)
    flops = sum(needed(shape, len(pair.prompt), [len(pair.label)]) for pair in pairs)
    return found(len(pairs), sum(map(len, pairs)), flops, seconds)


def measure_ranking(
    lm: Any, shape: Shape, prompts: list[list[int]], labels: list[list[int]], eos: int, device: torch.device
) -> Row:
    score_choices(lm, prompts[: len(prompts) // 4], labels, eos, TOKENS_PER_BATCH)
    seconds = clocked(lambda: score_choices(lm, prompts, labels, eos, TOKENS_PER_BATCH), device, 2)
    flops = sum(needed(shape, len(prompt), [len(label) for label in labels]) for prompt in prompts)
    return found(len(prompts), sum(len(prompt) + sum(map(len, labels)) for prompt in prompts), flops, seconds)


def needed(shape: Shape, prompt: int, labels: list[int]) -> float:
    """Operations of one forward over a prompt, read once, and labels behind it (end tokens are predicted, not read)."""
    targets = sum(length + 1 for length in labels)
    return forward_flops(shape, prompt if shape.decoder else prompt - len(labels), targets)


def found(examples: int, tokens: int, flops: float, seconds: float) -> Row:
    return {"examples_per_s": examples / seconds, "tokens_per_s": tokens / seconds, "flops": flops / seconds}


def clocked(work: Callable[[], Any], device: torch.device, times: int) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(times + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """Bytes that tensors took on the GPU at most; on a CPU the most that the process ever held."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read_shape(configs: Path, name: str) -> Any:
    from atlantis_ds.plan.trace import read_config

    return read_config(Model(model_name_or_path=str(configs / f"{name}.config.json")))


def tiny_config(name: str) -> Any:
    """The same architecture, tied or untied head included, with hardly any weights."""
    from transformers import Qwen2Config, T5Config

    if "t5" in name:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 512}
        kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
        return T5Config(**sizes, **kind)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    return Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings="1.5B" in name)


def write_model(config: Any, folder: Path, device: torch.device) -> Row:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        lm = loader.from_config(config, dtype=torch.bfloat16)
    lm.save_pretrained(folder)
    return {"weights": lm.num_parameters()}


def machine(device: torch.device) -> dict[str, str]:
    """Card, driver and versions."""
    facts = {"device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
        try:
            said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            said = torch.cuda.get_device_name(device)
        facts = {"device": said, "memory": f"{torch.cuda.get_device_properties(device).total_memory / GIB:.1f} GiB"}
    facts |= {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


if __name__ == "__main__":
    main()
