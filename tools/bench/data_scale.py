"""Speed and memory over the number of rows: every stage but `evaluate` must grow with the data slowly, or not at all.

    python tools/bench/data_scale.py --rows 10000 100000 1000000

Writes classification rows of about 60 tokens (6 labels, 10% of them wrong, gold beside) and tiny models (2 layers of
width 32) into a temporary folder ($TMPDIR; 1 KB a row), and runs the stages on them with 2 ranks, as a user would:
`score.label_set: true`, weights `formula: reference`, `scope: per_label`. Scoring is asked to stop after
--score-seconds, since only its memory is looked at; `merge` gets generated shards in place of its own. Training is 130
steps of 16 examples. Rounds take turns over the sizes, and ratios are taken within a round; it wants an otherwise idle
machine of 2 cores or more.

Memory is the anonymous memory of a rank's process: what it alone holds, and what the kernel cannot drop. The pages of
memory-mapped files are left out, because all ranks share them and they go when memory is short. It is `RssAnon` of
/proc/PID/status, equal to `Anonymous` of smaps_rollup but read in 0.03 ms instead of 5, so that looking every 20 ms
costs nothing.

Prints Markdown tables; the last line and the exit code (0 or 1) say whether the bounds held.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from atlantis_ds.cluster.ranks import free_port
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.config.schema import Recipe
from atlantis_ds.data.examples import load_examples
from atlantis_ds.files import read_json, write_table
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
LABELS = ["artefact", "body", "event", "idea", "place", "plant"]
TEST_ROWS = 500
SHARD_SIZE = 4096
STEPS, BATCH = 130, 16
TIMED_STEPS = slice(20, 120)
BOUNDS = {
    "bytes a row": 300,  # growth of a rank's memory, in every stage but `merge`
    "bytes a row, merge": 600,  # all weights at once, several times over: sorts, quantiles, ROC
    "encoding, 2 processes against 1": 1.7,
    "start of train, largest against smallest": 1.5,
    "time of a step, largest against smallest": 1.05,
}
WORDS = (
    "a the one some every no old new red small large quiet bright round cold river stone house garden "
    "letter winter music market window paper engine teacher child doctor farmer sister found made wrote "
    "kept sold broke carried under over behind beside before after without with from into about because "
    "although when where while and but or slowly often never again today"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5, help="Rounds of training, over all sizes.")
    parser.add_argument("--encodings", type=int, default=2, help="Rounds of encoding, over all sizes.")
    parser.add_argument("--score-seconds", type=float, default=60, help="`score` is asked to stop after these.")
    parser.add_argument("--out", type=Path, default=Path("data_scale.json"), help="Every single figure.")
    parser.add_argument("--as-rank", nargs=2, metavar=("WHAT", "RECIPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        rank_main(*options.as_rank)
        return
    sizes = sorted(options.rows)
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as temporary:
        models = build_models(Path(temporary) / "models")
        runs = {rows: Scale(Path(temporary), models, rows) for rows in sizes}
        for rows, run in runs.items():
            run.write_rows()
            say(f"{rows:,} rows are written")
            run.prepare()
            run.score(options.score_seconds)
            run.make_shards()
            run.merge()
        for number in range(options.encodings):
            for run in turns(list(runs.values()), number):
                run.encode()
        for number in range(options.rounds):
            for run in turns(list(runs.values()), number):
                run.train()
        load.append(os.getloadavg()[0])
        found = {rows: run.found for rows, run in runs.items()}
    options.out.write_text(json.dumps({"load": load, "sizes": found}, indent=1))
    print_tables(found)
    broken = check(found)
    load_said = f"load average {load[0]:.1f} before, {load[1]:.1f} after"
    print(f"\n{'; '.join(broken) if broken else 'all bounds held'} ({load_said})")
    sys.exit(bool(broken))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Scale:
    """One number of rows: its run folder, and what was found in it."""

    def __init__(self, folder: Path, models: dict[str, Path], rows: int) -> None:
        self.folder, self.rows = folder / f"{rows}", rows
        self.folder.mkdir()
        self.recipe = self.folder / "recipe.yaml"
        an_epoch = -(-rows // BATCH)
        recipe = {
            "name": "run",
            "runs_dir": str(self.folder),
            "data": {"train": str(self.folder / "train.jsonl"), "test": str(self.folder / "test.jsonl")},
            "prompt": {"template": "What is this text about?\n{text}"},
            "models": {
                "large": {"model_name_or_path": str(models["large"])},
                "small": {"model_name_or_path": str(models["small"])},
                "reference": {"kind": "checkpoint", "model_name_or_path": str(models["reference"])},
            },
            "score": {"shard_size": SHARD_SIZE},
            "weights": {"formula": "reference", "scope": "per_label"},
            "train": {
                "mode": "full",
                "dtype": "float32",
                "deepspeed": "zero2.json",
                "train_batch_size": BATCH,
                "per_device_train_batch_size": BATCH // RANKS,
                "num_train_epochs": (STEPS - 0.5) / an_epoch,
            },
            "arms": {"atlantis": {}},
        }
        self.recipe.write_text(json.dumps(recipe))
        self.run = RunFolder(self.folder / "run")
        self.found: dict[str, Any] = {"peak": {}, "encode": [], "train": []}

    def write_rows(self) -> None:
        rng = np.random.default_rng(self.rows)
        for split, rows in (("train", self.rows), ("test", TEST_ROWS)):
            with (self.folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(lines(rng, split, rows))

    def prepare(self) -> None:
        self.found |= self.stage("prepare", [__file__, "--as-rank", "prepare", str(self.recipe)])
        tokens = pa.concat_arrays(
            pa.ipc.open_file(pa.memory_map(str(path))).read_all()["ids"].combine_chunks().value_lengths()
            for path in self.run.tokens.glob("*/train-*.arrow")
        )
        self.found["tokens"] = round(float(np.mean(tokens.to_numpy())), 1)

    def score(self, seconds: float) -> None:
        self.stage("score", ["-m", "atlantis_ds", "score", str(self.recipe)], end_after=seconds)

    def make_shards(self) -> None:
        """Scores in the format of this run, and under its fingerprint, in the place of those that `score` came to."""
        from atlantis_ds.weights.shards import LABEL_SET, shard_path, shard_schema

        manifest = read_json(self.run.scores / "scores.json")
        shutil.rmtree(self.run.scores / "parts", ignore_errors=True)
        train = load_examples(self.run).train
        rng = np.random.default_rng(0)
        labels, of = len(LABELS), manifest["shards"]
        for shard in range(of):
            rows = slice(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE)
            own, gold = train.codes[rows], train.gold_codes[rows]
            columns: dict[str, Any] = {"id": train.ids.slice(rows.start, SHARD_SIZE).combine_chunks()}
            for model in ("large", "small", "reference"):
                every = -3 - rng.random((len(own), labels))
                every[np.arange(len(own)), gold] += 2
                kinds = {
                    "logp": every,
                    "eos": -rng.random(every.shape),
                    "tokens": np.tile(np.arange(4, 10), (len(own), 1)),
                }
                for kind, values in kinds.items():
                    ends = pa.array(np.arange(len(own) + 1, dtype=np.int32) * labels)
                    columns[f"{LABEL_SET}{kind}_{model}"] = pa.ListArray.from_arrays(ends, pa.array(values.ravel()))
                    columns[f"{kind}_{model}"] = pa.array(values[np.arange(len(own)), own])
            table = pa.table({name: columns[name] for name in shard_schema(True).names}, schema=shard_schema(True))
            info = {"fingerprint": manifest["fingerprint"], "shard": shard, "of": of}
            write_table(shard_path(self.run, shard, of), table, info)

    def merge(self) -> None:
        start = time.monotonic()
        self.stage("merge", ["-m", "atlantis_ds", "merge", str(self.recipe)], ranks=1)
        self.found["merge_seconds"] = time.monotonic() - start

    def encode(self) -> None:
        """All splits anew, by two ranks and by one of a single core."""
        seconds = {}
        for ranks in (RANKS, 1):
            shutil.rmtree(self.run.tokens)
            cores = None if ranks > 1 else {min(os.sched_getaffinity(0))}
            words = [__file__, "--as-rank", "encode", str(self.recipe)]
            seconds[ranks] = run_ranks(words, ranks, cores=cores)["encode_seconds"]
        ratios = {"ratio": seconds[1] / seconds[RANKS], "machine": two_against_one()}
        self.found["encode"].append({"two": seconds[RANKS], "one": seconds[1], **ratios})
        say(f"{self.rows:,} rows: encoding on 2 processes {seconds[1] / seconds[RANKS]:.2f} times 1")

    def train(self) -> None:
        for made in (self.run.model("atlantis"), self.run.checkpoints("atlantis")):
            shutil.rmtree(made, ignore_errors=True)
        self.run.log.unlink(missing_ok=True)
        self.stage("train", ["-m", "atlantis_ds", "train", str(self.recipe), "--arm", "atlantis"])
        events = [json.loads(line) for line in self.run.log.read_text().splitlines()]
        start = next(event["since_process_start"] for event in events if event["event"] == "start")
        steps = [BATCH / event["examples_per_s"] for event in events if event["event"] == "train"]
        assert len(steps) == STEPS
        self.found["train"].append({"start": start, "step": statistics.median(steps[TIMED_STEPS])})

    def stage(
        self, name: str, words: list[str], ranks: int = RANKS, end_after: float | None = None
    ) -> dict[str, float]:
        """Run a stage on ranks of one thread each, and keep the largest memory that each of them had."""
        start = time.monotonic()
        found = run_ranks(words, ranks, end_after)
        peaks = found.pop("peaks")
        old = self.found["peak"].get(name, [0] * ranks)
        self.found["peak"][name] = [max(pair) for pair in zip(old, peaks)]
        said = ", ".join(f"{peak / 2**20:.0f}" for peak in peaks)
        say(f"{self.rows:,} rows: {name} took {time.monotonic() - start:.1f} s, peaks {said} MiB")
        return found


def turns(runs: list[Scale], number: int) -> list[Scale]:
    """There and back, so that a machine that grows slower or faster does not favour a size."""
    return runs[::-1] if number % 2 else runs


def two_against_one() -> float:
    """What two processes do in the time of one on this machine now, with no work in common: at most 2."""
    work = [sys.executable, "-c", "for _ in range(30_000_000): pass"]

    def seconds(count: int) -> float:
        start = time.monotonic()
        for process in [subprocess.Popen(work) for _ in range(count)]:
            process.wait()
        return time.monotonic() - start

    return 2 * seconds(1) / seconds(2)


def lines(rng: np.random.Generator, split: str, rows: int) -> Iterator[str]:
    names, words = np.array(LABELS), np.array(WORDS.split())
    for first in range(0, rows, 8192):
        count = min(8192, rows - first)
        texts, gold = words[rng.integers(len(words), size=(count, 17))], rng.integers(len(names), size=count)
        wrong = rng.random(count) < 0.1
        given = np.where(wrong, (gold + rng.integers(1, len(names), size=count)) % len(names), gold)
        for row in range(count):
            fields = {"id": f"{split}-{first + row}", "text": " ".join(texts[row])}
            yield json.dumps({**fields, "label": str(names[given[row]]), "gold": str(names[gold[row]])}) + "\n"


def build_models(folder: Path) -> dict[str, Path]:
    """Three Qwen2 models of 2 layers with one tokenizer of 512 tokens, not pretrained."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from atlantis_ds.demo.scratch import build_scratch_model

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512}
    scratch = {"scratch": {**shape, "pretrain_epochs": 0}}
    recipe = Recipe.model_validate(
        {"name": "models", "data": {"format": "grammar"}, "models": {"large": scratch, "small": scratch}}
    )
    build_scratch_model(recipe, RunFolder(folder), "large", LABELS, show=False)
    models = {"large": RunFolder(folder).base_model("large")}
    for seed, name in enumerate(("small", "reference"), start=1):
        models[name] = shutil.copytree(models["large"], folder / name)
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models[name])).save_pretrained(models[name])
    return models


def run_ranks(
    words: list[str], ranks: int, end_after: float | None = None, cores: set[int] | None = None
) -> dict[str, Any]:
    """Run ``python WORDS`` on so many ranks of one thread each.

    Args:
        end_after: send SIGTERM after so many seconds; exit code 75 is then right, too.
        cores: pin every rank to these.

    Returns:
        ``peaks``: the largest anonymous memory of each rank, in bytes; and what a line "FOUND {...}" of rank 0 holds.
    """
    common = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} for rank in range(ranks)]
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryFile() as output:
        processes = [
            subprocess.Popen(
                [sys.executable, *words],
                env={**common, **place, **master},
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
            )
            for place in places
        ]
        end = threading.Timer(end_after or 0, lambda: [process.send_signal(signal.SIGTERM) for process in processes])
        if end_after:
            end.start()
        peaks = [0] * ranks
        while any(process.poll() is None for process in processes):
            peaks = [max(peak, anonymous(process.pid)) for peak, process in zip(peaks, processes)]
            time.sleep(0.02)
        end.cancel()
        output.seek(0)
        text = output.read().decode(errors="replace")
    if any(process.returncode not in (0, 75 if end_after else 0) for process in processes):
        sys.exit(f"{' '.join(words)} failed: {text[-3000:]}")
    found = re.findall(r"^FOUND (.*)$", text, re.MULTILINE)
    return {"peaks": peaks, **(json.loads(found[0]) if found else {})}


def anonymous(pid: int) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def rank_main(what: str, path: str) -> None:
    """One rank that prepares, or encodes what is prepared, with clocks around reading and encoding."""
    from atlantis_ds import stages
    from atlantis_ds.cluster.ranks import end_rank, start_ranks, stop_ranks
    from atlantis_ds.lm import tokens
    from atlantis_ds.lm.load import load_config, load_tokenizer, model_source

    recipe = load_recipe(Path(path))
    run = Run(recipe, RunFolder(Path(recipe.runs_dir) / recipe.name), start_ranks(10))
    load_config(model_source(recipe, run.folder, "large"))
    load_tokenizer(model_source(recipe, run.folder, "large"))  # imports what it needs, before any clock
    seconds = {"examples_seconds": 0.0, "encode_seconds": 0.0}

    def timed(work: Callable[..., Any], key: str) -> Callable[..., Any]:
        def clocked(*args: Any, **others: Any) -> Any:
            start = time.monotonic()
            result = work(*args, **others)
            seconds[key] += time.monotonic() - start
            return result

        return clocked

    stages.prepare_examples = timed(stages.prepare_examples, "examples_seconds")
    tokens.encode_split = timed(tokens.encode_split, "encode_seconds")
    run.ranks.barrier()
    if what == "prepare":
        stages.prepare(run)
    else:
        examples = load_examples(run.folder)
        tokens.encode_split(run, examples, "train", model_source(recipe, run.folder, "large"))
    if run.ranks.is_main:
        print(f"FOUND {json.dumps(seconds)}")
    stop_ranks()
    end_rank()


Found = dict[int, dict[str, Any]]


def growth(found: Found, stage: str) -> list[list[float]]:
    """Bytes a row that each rank's peak grew by, from each size to the next."""
    return [
        [(b - a) / (large - small) for a, b in zip(found[small]["peak"][stage], found[large]["peak"][stage])]
        for small, large in pairwise(found)
    ]


def spread(values: list[float], digits: int = 2) -> str:
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def print_tables(found: Found) -> None:
    sizes = list(found)
    print("| rows | " + " | ".join(f"{rows:,}" for rows in sizes) + " | 10 million, extrapolated |")
    print("|---" * (len(sizes) + 2) + "|")

    def line(title: str, cell: Callable[[dict[str, Any]], str], more: str = "") -> None:
        print(f"| {title} | " + " | ".join(cell(found[rows]) for rows in sizes) + f" | {more} |")

    largest, times = found[sizes[-1]], 1e7 / sizes[-1]
    line("tokens a row", lambda f: f"{f['tokens']:.1f}")
    for title, key in (("reading and splitting (`prepare`)", "examples_seconds"), ("encoding", "encode_seconds")):
        rates = {rows: rows / f[key] for rows, f in found.items()}
        cells = " | ".join(f"{rate:,.0f}" for rate in rates.values())
        print(f"| {title}, rows/s | {cells} | {largest[key] * times / 60:.0f} min |")
    line("encoding, 2 processes against 1", lambda f: spread([pair["ratio"] for pair in f["encode"]]))
    line("same of a bare loop: the machine", lambda f: spread([pair["machine"] for pair in f["encode"]]))
    line("`merge`, s", lambda f: f"{f['merge_seconds']:.1f}", f"{largest['merge_seconds'] * times / 60:.0f} min")
    line(
        "start of `train` to its first step, s",
        lambda f: spread([run["start"] for run in f["train"]]),
        more_start(found),
    )
    line("an optimizer step, ms", lambda f: spread([1000 * run["step"] for run in f["train"]], 1))
    for stage in largest["peak"]:
        more = max(0.0, *growth(found, stage)[-1]) if len(found) > 1 else 0.0
        whole = max(largest["peak"][stage]) + more * (1e7 - sizes[-1])
        line(
            f"peak of `{stage}`, MiB a rank",
            lambda f, stage=stage: ", ".join(f"{peak / 2**20:.0f}" for peak in f["peak"][stage]),  # type: ignore[misc]
            f"{whole / 2**30:.1f} GiB",
        )
    for stage in largest["peak"] if len(found) > 1 else ():
        cells = [f"{max(ranks):.0f}" for ranks in growth(found, stage)]
        print(f"| growth of `{stage}`, bytes a row and rank | | " + " | ".join(cells) + " | |")


def more_start(found: Found) -> str:
    """Seconds to the first step at 10 million rows, by a line through the smallest and the largest size."""
    small, large = min(found), max(found)
    first, last = (statistics.median(run["start"] for run in found[rows]["train"]) for rows in (small, large))
    slope = (last - first) / (large - small) if large > small else 0.0
    return f"{last + max(0.0, slope) * (1e7 - large):.0f} s"


def check(found: Found) -> list[str]:
    """Which bounds do not hold; ratios are medians over rounds, growth the largest of all ranks and sizes."""
    small, large = min(found), max(found)
    measured = {"encoding, 2 processes against 1": [pair["ratio"] for pair in found[large]["encode"]]}
    for key, what in (("start", "start of train"), ("step", "time of a step")):
        rounds = zip(found[small]["train"], found[large]["train"])
        measured[f"{what}, largest against smallest"] = [b[key] / a[key] for a, b in rounds]
    for stage in found[large]["peak"] if len(found) > 1 else ():
        grown = max(max(ranks) for ranks in growth(found, stage))
        measured["bytes a row, merge" if stage == "merge" else f"bytes a row, {stage}"] = [grown]
    broken = []
    for what, values in measured.items():
        value, bound = statistics.median(values), BOUNDS.get(what, BOUNDS["bytes a row"])
        at_least = what.startswith("encoding")
        way = "at least" if at_least else "at most"
        holds = value >= bound if at_least else value <= bound
        said = spread(values) if len(values) > 1 else f"{value:.0f}"
        print(f"{'ok' if holds else 'BROKEN'}: {what}: {said}, bound: {way} {bound:g}")
        if not holds:
            broken.append(f"{what} is {value:.2f}, not {way} {bound:g}")
    return broken


if __name__ == "__main__":
    main()
