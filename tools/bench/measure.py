"""One measurement in a process of its own; `cpu.py` starts these in turn.

    python tools/bench/measure.py WHAT '{"model": ..., "examples": 64, ...}'

Prints one line of JSON. What is timed begins after the model is loaded and one small batch has run. Both sides of a
comparison get the same model in memory, the same examples, precision and threads.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atlantis_ds.data.formats import read_conll04, read_semeval
from atlantis_ds.data.prompts import render_prompt
from atlantis_ds.lm.encode import Encoder
from atlantis_ds.lm.likelihood import score_choices, score_pairs
from atlantis_ds.recipe import Prompt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Setting:
    """The model, its tokenizer, and the examples: read once, before any clock runs."""

    def __init__(self, options: dict[str, Any]) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(options["threads"])
        torch.manual_seed(0)
        self.options = options
        path, dtype = Path(options["model"]), DTYPES[options["dtype"]]
        self.tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
        if path.is_dir():
            self.lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        else:  # a config file: the real shape with random weights
            config = AutoConfig.from_pretrained(path)
            config.num_hidden_layers = options.get("layers", config.num_hidden_layers)
            config.layer_types = None
            self.lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
        read = read_semeval if options["data"].endswith(".TXT") else read_conll04
        examples = read(options["data"], "train")
        self.labels = sorted({example.label for example in examples})
        self.examples = sorted(examples, key=lambda e: e.id)[: options["examples"]]
        self.prompt = Prompt(label_options=True)
        self.encoder = Encoder(self.tokenizer, self.lm.config, self.prompt, self.labels)

    def texts(self) -> list[tuple[str, str]]:
        return [(render_prompt(e, self.prompt, self.labels) + "\n", e.label) for e in self.examples]


def clocked(work: Callable[[], Any], examples: int, tokens: int) -> tuple[dict[str, float], Any]:
    start = time.monotonic()
    result = work()
    seconds = time.monotonic() - start
    return {
        "seconds": seconds,
        "examples_per_s": examples / seconds,
        "tokens_per_s": tokens / seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }, result


def score_ours(setting: Setting) -> dict[str, Any]:
    pairs = [setting.encoder(example) for example in setting.examples]
    lm, eos = setting.lm.eval(), setting.tokenizer.eos_token_id
    budget = setting.options["tokens_per_batch"]
    score_pairs(lm, pairs[:4], eos, budget)
    found, sums = clocked(lambda: score_pairs(lm, pairs, eos, budget), len(pairs), sum(map(len, pairs)))
    return {**found, "values": sums[:, 0].tolist()}


def score_lm_eval(setting: Setting) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=setting.lm.eval(),
        tokenizer=setting.tokenizer,
        backend="causal",
        device="cpu",
        batch_size=setting.options["batch_size"],
    )

    # What its `loglikelihood` calls after tokenising; given the ids, both sides score the very same tokens.
    pairs = [setting.encoder(example) for example in setting.examples]
    requests = [(text, pair.prompt, pair.label) for text, pair in zip(setting.texts(), pairs)]
    lm._loglikelihood_tokens(requests[:4], disable_tqdm=True)
    found, results = clocked(
        lambda: lm._loglikelihood_tokens(requests, disable_tqdm=True), len(pairs), sum(map(len, pairs))
    )
    return {**found, "values": [value for value, _ in results]}


def rank_tree(setting: Setting) -> dict[str, Any]:
    prompts = [setting.encoder.prompt_ids(example) for example in setting.examples]
    labels = [setting.encoder.label_ids(label) for label in setting.labels]
    lm, eos, budget = setting.lm.eval(), setting.tokenizer.eos_token_id, setting.options["tokens_per_batch"]
    score_choices(lm, prompts[:2], labels, eos, budget)
    found, sums = clocked(
        lambda: score_choices(lm, prompts, labels, eos, budget), len(prompts), sum(map(len, prompts)) * len(labels)
    )
    return {**found, "values": sums.flatten().tolist()}


def rank_pairs(setting: Setting) -> dict[str, Any]:
    pairs = [setting.encoder(example, label) for example in setting.examples for label in setting.labels]
    lm, eos, budget = setting.lm.eval(), setting.tokenizer.eos_token_id, setting.options["tokens_per_batch"]
    score_pairs(lm, pairs[:2], eos, budget)
    found, sums = clocked(lambda: score_pairs(lm, pairs, eos, budget), len(setting.examples), sum(map(len, pairs)))
    return {**found, "values": sums.flatten().tolist()}


def matmul(setting: Setting) -> dict[str, Any]:
    """The rate that this machine reaches in plain matrix products of the model's own shapes."""
    width = setting.lm.config.hidden_size
    a = torch.randn(2048, width, dtype=setting.lm.dtype)
    b = torch.randn(width, 4 * width, dtype=setting.lm.dtype)
    a @ b
    times = 40
    found, _ = clocked(lambda: [a @ b for _ in range(times)], times, times)
    return {**found, "flops": 2 * 2048 * width * 4 * width * times / found["seconds"]}


LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def train_ours(setting: Setting) -> dict[str, Any]:
    """The project's own step on its own engine; the model is saved first, since the engine loads it itself."""
    import tempfile

    from atlantis_ds.cluster.ranks import start_ranks, stop_ranks
    from atlantis_ds.lm.batch import collate
    from atlantis_ds.recipe import Model, Train
    from atlantis_ds.train.engine import start_engine
    from atlantis_ds.train.step import micro_batch_rows, optimizer_step

    pairs = [setting.encoder(example) for example in setting.examples]
    lengths, size, eos = [len(pair) for pair in pairs], setting.options["batch_size"], setting.tokenizer.eos_token_id
    config = Path(__file__).resolve().parents[2] / "ds_configs" / "zero2.json"
    train = Train(
        mode=setting.options["mode"],
        deepspeed=str(config),
        dtype=setting.options["dtype"],
        train_batch_size=size,
        per_device_train_batch_size=size,
    )
    ranks = start_ranks(10)
    torch.set_num_threads(setting.options["threads"])
    with tempfile.TemporaryDirectory() as folder:
        setting.lm.save_pretrained(folder)
        setting.lm = None
        engine = start_engine(train, Model(model_name_or_path=folder), 100, 0, ranks)

    def step(rows: list[int]) -> None:
        places = micro_batch_rows(torch.tensor(rows).numpy(), lengths, size, size, ranks)
        batches = [collate([pairs[row] for row, _ in micro], engine.module.config, eos) for micro in places]
        optimizer_step(engine, batches, size, ranks)

    def epoch() -> None:
        for first in range(0, len(pairs), size):
            step(list(range(first, first + size)))

    step(list(range(size)))
    found, _ = clocked(epoch, len(pairs), sum(lengths))
    stop_ranks()
    return found


def _peer_model(setting: Setting) -> Any:
    from peft import LoraConfig, get_peft_model

    setting.lm.config.use_cache = False
    return get_peft_model(setting.lm, LoraConfig(**LORA)) if setting.options["mode"] == "lora" else setting.lm


def _peer_arguments(setting: Setting, kind: Any, **others: Any) -> Any:
    size = setting.options["batch_size"]
    return kind(
        output_dir="/tmp/unused",
        per_device_train_batch_size=size,
        num_train_epochs=1,
        learning_rate=2e-5,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **others,
    )


def _clock_steps(setting: Setting, trainer: Any, tokens: int) -> dict[str, Any]:
    """From the end of the first optimizer step to the end of training."""
    from transformers import TrainerCallback

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.monotonic())

    trainer.add_callback(Clock())
    trainer.train()
    seconds, size = marks[-1] - marks[0], setting.options["batch_size"]
    share = (len(marks) - 1) / len(marks)
    return {
        "seconds": seconds,
        "examples_per_s": len(setting.examples) * share / seconds,
        "tokens_per_s": tokens * share / seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "steps": len(marks) - 1,
        "batch_size": size,
    }


def train_trainer(setting: Setting) -> dict[str, Any]:
    """transformers' Trainer with the usual weighted `compute_loss`: full logits, label positions by -100."""
    from torch.nn import functional as F
    from transformers import Trainer, TrainingArguments

    pairs = [setting.encoder(example) for example in setting.examples]

    def collate_padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["ids"]) for row in rows)

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([[*row[key], *[value] * (width - len(row[key]))] for row in rows])

        weight = torch.tensor([row["weight"] for row in rows])
        mask = torch.tensor([[1] * len(row["ids"]) + [0] * (width - len(row["ids"])) for row in rows])
        return {
            "input_ids": padded("ids", 0),
            "attention_mask": mask,
            "labels": padded("labels", -100),
            "weight": weight,
        }

    class Weighted(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            labels, weight = inputs.pop("labels")[:, 1:], inputs.pop("weight")
            logits = model(**inputs).logits[:, :-1].float()
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100).sum(1)
            return (weight * losses).mean()

    rows = [
        {
            "ids": [*pair.prompt, *pair.label, pair.eos],
            "labels": [*[-100] * len(pair.prompt), *pair.label, pair.eos],
            "weight": 1.0,
        }
        for pair in pairs
    ]
    arguments = _peer_arguments(setting, TrainingArguments, remove_unused_columns=False)
    trainer = Weighted(_peer_model(setting), arguments, data_collator=collate_padded, train_dataset=rows)
    return _clock_steps(setting, trainer, sum(map(len, pairs)))


def train_trl(setting: Setting, packing: bool = False) -> dict[str, Any]:
    """TRL's SFTTrainer on prompt and completion; it has no weights an example."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"prompt": prompt, "completion": label} for prompt, label in setting.texts()])
    arguments = _peer_arguments(setting, SFTConfig, packing=packing, max_length=256)
    trainer = SFTTrainer(_peer_model(setting), args=arguments, train_dataset=rows, processing_class=setting.tokenizer)
    tokens = sum(len(setting.encoder(example)) for example in setting.examples)
    return _clock_steps(setting, trainer, tokens)


MEASURES: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "score_ours": score_ours,
    "score_lm_eval": score_lm_eval,
    "rank_tree": rank_tree,
    "rank_pairs": rank_pairs,
    "matmul": matmul,
    "train_ours": train_ours,
    "train_trainer": train_trainer,
    "train_trl": train_trl,
    "train_trl_packing": lambda setting: train_trl(setting, packing=True),
}


def main() -> None:
    what, options = sys.argv[1], json.loads(sys.argv[2])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(json.dumps(MEASURES[what](Setting(options))))


if __name__ == "__main__":
    main()
