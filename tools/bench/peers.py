"""What people use instead, on the same model in memory, examples, precision and threads as ours; see `measure.py`."""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import torch
from setting import Setting, clocked, peak_gib
from torch.nn import functional as F

from atlantis_ds.cluster.ranks import free_port
from atlantis_ds.lm.encode import Encoded

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def score_lm_eval(setting: Setting) -> dict[str, Any]:
    """lm-eval's Hugging Face model; given the ids, both sides score the very same tokens."""
    texts = [prompt for prompt, _ in setting.texts()]
    return _lm_eval(setting, texts, setting.pairs(), len(setting.prompts))


def rank_lm_eval(setting: Setting) -> dict[str, Any]:
    """A multiple-choice task in lm-eval: the log-likelihood of each (prompt, label) pair."""
    texts = [prompt for prompt, _ in setting.texts() for _ in setting.labels]
    return _lm_eval(setting, texts, setting.every_pair(), len(setting.prompts))


def _lm_eval(setting: Setting, texts: list[str], pairs: list[Encoded], examples: int) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=setting.lm.eval(),
        tokenizer=setting.tokenizer,
        backend="causal",
        device="cpu",
        batch_size=setting.options["batch_size"],
    )
    requests = [(text, pair.prompt, pair.label) for text, pair in zip(texts, pairs)]
    lm._loglikelihood_tokens(requests[:4], disable_tqdm=True)  # what its `loglikelihood` calls after tokenising
    found, results = clocked(
        lambda: lm._loglikelihood_tokens(requests, disable_tqdm=True), examples, sum(map(len, pairs))
    )
    return {**found, "values": [value for value, _ in results]}


def _model(setting: Setting) -> Any:
    from peft import LoraConfig, get_peft_model

    setting.lm.config.use_cache = False
    return get_peft_model(setting.lm, LoraConfig(**LORA)) if setting.options["mode"] == "lora" else setting.lm


def _arguments(setting: Setting, kind: Any, deepspeed: bool = False, **others: Any) -> Any:
    import accelerate  # noqa: F401  (before DeepSpeed, which it patches)

    size = setting.options["batch_size"]
    zero = {"train_micro_batch_size_per_gpu": size, "zero_optimization": {"stage": 2}} if deepspeed else None
    if zero:
        zero |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(free_port())
    given = {"per_device_train_batch_size": size} | others
    return kind(
        output_dir=tempfile.gettempdir(),
        num_train_epochs=1,
        learning_rate=2e-5,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        deepspeed=zero,
        **given,
    )


def _clock_steps(trainer: Any) -> dict[str, Any]:
    """From the end of the first optimizer step to the end of training; the examples that the steps really had."""
    from transformers import TrainerCallback

    marks: list[float] = []
    examples: list[int] = []
    training_step = trainer.training_step

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not marks:
                peak_gib(reset=True)
            marks.append(time.monotonic())

    def counted(model: Any, inputs: Any, *others: Any, **options: Any) -> Any:
        learnt = inputs["labels"] != -100  # every example has one span of these, packed or not
        examples.append(int((learnt[:, 1:] & ~learnt[:, :-1]).sum()))
        return training_step(model, inputs, *others, **options)

    trainer.training_step = counted
    trainer.add_callback(Clock())
    trainer.train()
    seconds = marks[-1] - marks[0]
    return {
        "seconds": seconds,
        "examples_per_s": sum(examples[1:]) / seconds,
        "peak_gib": peak_gib(),
        "examples": examples,
    }


def train_trainer(setting: Setting, deepspeed: bool = False) -> dict[str, Any]:
    """transformers' Trainer with the usual weighted `compute_loss`: full logits, label positions by -100."""
    from transformers import Trainer, TrainingArguments

    pairs = setting.pairs()

    def collate_padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["ids"]) for row in rows)

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([[*row[key], *[value] * (width - len(row[key]))] for row in rows])

        mask = torch.tensor([[1] * len(row["ids"]) + [0] * (width - len(row["ids"])) for row in rows])
        return {
            "input_ids": padded("ids", 0),
            "attention_mask": mask,
            "labels": padded("labels", -100),
            "weight": torch.tensor([row["weight"] for row in rows]),
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
    arguments = _arguments(setting, TrainingArguments, deepspeed, remove_unused_columns=False)
    return _clock_steps(Weighted(_model(setting), arguments, data_collator=collate_padded, train_dataset=rows))


def train_trl(setting: Setting, packing: bool = False) -> dict[str, Any]:
    """TRL's SFTTrainer on prompt and completion; it has no weights an example.

    With packing, a step reads as many rows of 256 tokens as hold about ``batch_size`` examples.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"prompt": prompt, "completion": label} for prompt, label in setting.texts()])
    tokens = sum(map(len, setting.pairs())) / len(setting.prompts)
    size = round(setting.options["batch_size"] * tokens / 256) if packing else setting.options["batch_size"]
    arguments = _arguments(setting, SFTConfig, packing=packing, max_length=256, per_device_train_batch_size=size)
    trainer = SFTTrainer(_model(setting), args=arguments, train_dataset=rows, processing_class=setting.tokenizer)
    return _clock_steps(trainer)
