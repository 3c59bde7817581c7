"""What tests of real runs share: a tiny base model, a recipe around it, and launchers that start real ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 180

# Tests decide on their own how many ranks there are and of how many threads.
ENV = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
ENV |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # tools/bench has what probes and benchmarks measure alike.
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tools/bench"), os.environ.get("PYTHONPATH")])),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # `deepspeed` itself, and `ninja`
}


def pytest_configure() -> None:
    """A call of ``os._exit`` in the tests' own process would end them early, and as if all had passed."""
    leave, tests = os._exit, os.getpid()

    def leave_in_a_child(code: int) -> NoReturn:
        if os.getpid() == tests:
            raise AssertionError(f"os._exit({code}) in the tests' own process")
        leave(code)

    os._exit = leave_in_a_child


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is soon done comes first: tests without ranks. A file is done by one worker, for its fixtures; and so are
    all files that start Slurm, as two clusters on one host would give their jobs the same ports."""
    items.sort(key=lambda item: item.get_closest_marker("ranks") is not None)
    for item in items:
        name = item.path.name
        slurm = name in ("test_cluster.py", "test_services.py", "test_slurm.py")
        item.add_marker(pytest.mark.xdist_group("slurm" if slurm else name))


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    """stdout and stderr together."""


class Job:
    """A running job of one or more ranks; where its test fails before it ends, it ends with the test."""

    of_this_test: ClassVar[list[Job]] = []

    def __init__(self, command: list[str], env: dict[str, str] | None = None) -> None:
        self.command = command
        # Not a pipe: an orphaned rank would hold its end open.
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENV | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.of_this_test.append(self)

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace")

    def kill(self) -> None:
        """kill -9 to the launcher and to all ranks at once; torchrun starts each rank in a session of its own."""
        try:
            launcher = psutil.Process(self.process.pid)
            family = [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for process in family:
            process.suspend()  # so that no launcher reacts to the death of a rank
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=10)
        self.process.wait(timeout=10)

    def wait(self, timeout: float = TIMEOUT) -> Done:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"not done after {timeout} s: {' '.join(self.command)}\n{self.text()[-3000:]}")
        return Done(code, self.text())

    def until(self, condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
        """Wait until the condition holds; fail where the job ends first, or after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(f"ended, or hung, before what was waited for:\n{self.text()[-3000:]}")
            time.sleep(0.005)

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """Kill all ranks as soon as the condition holds."""
        self.until(condition)
        self.kill()


@pytest.fixture(autouse=True)
def end_jobs() -> Iterator[None]:
    yield
    for job in Job.of_this_test:
        if job.process.poll() is None:
            job.kill()
    Job.of_this_test.clear()


def events(run: Path, kind: str, arm: str | None = None) -> list[dict[str, Any]]:
    """The events of one kind (and arm) in ``log.jsonl`` of a run folder, in order."""
    path = run / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [event for event in found if event["event"] == kind and arm in (None, event.get("arm"))]


def losses(run: Path) -> list[float]:
    """The loss of every step of the only training in a run folder."""
    steps = events(run, "train")
    assert [event["step"] for event in steps] == list(range(1, len(steps) + 1)), "a step was lost, or done twice"
    return [event["loss"] for event in steps]


def stop_when(job: Job, run: Path, event: str, more_than: int, how: str) -> None:
    """Ask the running job to stop as soon as the log holds more than so many events."""
    job.until(lambda: len(events(run, event)) > more_than)
    if how == "STOP":
        (run / "STOP").touch()
    elif how == "one rank":
        ranks = psutil.Process(job.process.pid).children()
        ranks[1].send_signal(signal.SIGUSR2)
    else:
        os.kill(job.process.pid, getattr(signal, how))
    done = job.wait()
    assert done.code == 75, done.out[-3000:]
    assert "preempted: " in done.out and "Traceback" not in done.out, done.out[-3000:]


def refuse(done: Done, *words: str) -> None:
    """Bad input: exit code 2, one line that holds these words, no traceback."""
    assert done.code == 2, done.out[-4000:]
    assert "Traceback" not in done.out, done.out[-4000:]
    lines = [line for line in done.out.splitlines() if line.startswith(("error:", "fault:"))]
    assert len(lines) == 1, done.out[-4000:]
    assert all(word in lines[0] for word in words), lines[0]


def start(kind: str, ranks: int, *arguments: object, env: dict[str, str] | None = None) -> Job:
    """Start ``atlantis_ds ARGUMENTS``, or a script where the first argument ends in .py, on so many ranks.

    Args:
        kind: ``torchrun``, ``deepspeed``, or ``local`` (``atlantis-ds … --ranks N``).
    """
    words = [str(word) for word in arguments]
    script = words[0].endswith(".py")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = {
        "torchrun": ["torchrun", "--nproc-per-node", str(ranks), "--master-port", port],
        "deepspeed": ["deepspeed", "--num_gpus", str(ranks), "--master_port", port],
        "local": [sys.executable],
    }[kind]
    module = {"torchrun": ["-m"], "deepspeed": ["--module"], "local": ["-m"]}[kind]
    command += words if script else [*module, "atlantis_ds", *words]
    if kind == "local" and ranks > 1:
        command += ["--ranks", str(ranks)]
    return Job(command, env)


def launch(
    kind: str, ranks: int, *arguments: object, timeout: float = TIMEOUT, env: dict[str, str] | None = None
) -> Done:
    """As ``start``, to the end. Kills all ranks and fails the test after ``timeout`` seconds."""
    return start(kind, ranks, *arguments, env=env).wait(timeout)


def succeed(kind: str, ranks: int, *arguments: object, timeout: float = TIMEOUT) -> str:
    """As ``launch``, for a job that must end with exit code 0; returns what it printed."""
    done = launch(kind, ranks, *arguments, timeout=timeout)
    assert done.code == 0, done.out[-4000:]
    return done.out


def in_process(recipe: Path, *names: str) -> None:
    """Do these stages (``prepare``, ``reference``, ``score``, ``merge``), or ``run``, on one rank in this process.

    For tests that are not about their commands: starting a Python with torch for each takes longer than the stage.
    """
    from atlantis_ds import stages
    from atlantis_ds.cluster.ranks import start_ranks, stop_ranks
    from atlantis_ds.config.loading import load_recipe
    from atlantis_ds.run import Run
    from atlantis_ds.run_folder import RunFolder

    settings, environ = load_recipe(recipe), dict(os.environ)
    run = Run(settings, RunFolder(Path(settings.runs_dir) / settings.name), start_ranks(settings.timeout_minutes))
    try:
        for name in names:
            {
                "prepare": lambda: stages.prepare(run),
                "reference": lambda: stages.train(run, "reference", force=False),
                "score": lambda: stages.score(run),
                "merge": lambda: stages.merge(run),
                "run": lambda: stages.run(run, force=False),
            }[name]()
    finally:
        stop_ranks()
        os.environ.clear()
        os.environ.update(environ)


def shared_data(name: str) -> Path:
    """A file or folder of real data, tokenizers or model configs beside the repository; skips where it is absent."""
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"real data missing: ../shared/data/{name}")
    return path


def grammar_pairs(encoder: Any, count: int, seed: int) -> list[Any]:
    """The first sentences of the demo grammar behind the relation prompt, each with its label, encoded."""
    from atlantis_ds.config.schema import Prompt
    from atlantis_ds.data.prompts import render_prompt
    from atlantis_ds.data.relation import TEMPLATE
    from atlantis_ds.demo.grammar import grammar_corpus

    rows = [*grammar_corpus(count, 0, 0, seed)]
    prompts = [render_prompt(TEMPLATE, row.fields, Prompt(), None) for row in rows]
    return [*encoder.pairs(prompts, [row.label for row in rows])]


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of 2 layers with its tokenizer, from the project's own builder, not pretrained."""
    from atlantis_ds.config.schema import Recipe
    from atlantis_ds.data.relation import SEMEVAL_LABELS
    from atlantis_ds.demo.scratch import build_scratch_model
    from atlantis_ds.run_folder import RunFolder

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512}
    scratch = {"scratch": {**shape, "pretrain_epochs": 0}}
    recipe = Recipe.model_validate(
        {"name": "base", "seed": 3, "data": {"format": "grammar"}, "models": {"large": scratch, "small": scratch}}
    )
    folder = RunFolder(tmp_path_factory.mktemp("base"))
    build_scratch_model(recipe, folder, "large", list(SEMEVAL_LABELS), show=False)
    return folder.base_model("large")


@pytest.fixture(scope="session")
def encoder_decoder(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of 2 layers with the tokenizer of ``base_model``."""
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_recipe(base_model: Path) -> WriteRecipe:
    """``tiny_recipe(folder, {"train.dtype": "bfloat16"}, …)`` writes folder/recipe.yaml; the run goes to folder/run.

    40 examples of the demo grammar, batches of 8 with the last of an epoch short, fp32, ZeRO-3, and a reference that
    needs no training.
    """

    def write(folder: Path, changes: dict[str, Any] | None = None) -> Path:
        model = {"model_name_or_path": str(base_model)}
        tree: dict[str, Any] = {
            "name": "run",
            "runs_dir": str(folder),
            "seed": 5,
            "data": {"format": "grammar", "train_size": 37, "dev_size": 6, "test_size": 10},
            "models": {"large": model, "small": model, "reference": {"kind": "checkpoint", **model}},
            "score": {"shard_size": 5, "tokens_per_batch": 256},
            "weights": {"formula": "product", "temper": 0.5},
            "train": {
                "deepspeed": str(ROOT / "ds_configs" / "zero3.json"),
                "dtype": "float32",
                "learning_rate": 2e-3,
                "num_train_epochs": 2,
                "warmup_ratio": 0.2,
                "train_batch_size": 8,
                "per_device_train_batch_size": 4,
            },
            "timeout_minutes": 2,
        }
        for key, value in (changes or {}).items():
            *parents, last = key.split(".")
            section = tree
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write
