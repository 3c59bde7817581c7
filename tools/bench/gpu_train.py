"""Training for `gpu.py`: the project's own engine and step, and transformers' Trainer with a weighted compute_loss."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.schema import Model, Train
from atlantis_ds.lm.batch import collate_to_train
from atlantis_ds.lm.encode import Encoded
from atlantis_ds.lm.size import forward_flops, model_shape
from atlantis_ds.plan.memory import GIB, largest_micro_batch, training_memory, usable
from atlantis_ds.plan.trace import activations, build_model
from atlantis_ds.train.engine import add_lora, compile_layers, four_bits, start_engine
from atlantis_ds.train.step import micro_batch_rows, optimizer_step

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ACCUMULATION, WARM_UP, STEPS = 4, 2, 4
PROMPT, LONGEST_LABEL = (110, 294), 9
"""Tokens of SemEval-2010 Task 8 with Qwen2's tokenizer and the label options in the prompt."""


def prompt_lengths(config: Any) -> tuple[int, int]:
    """Shortest and longest prompt; a tenth of the real ones for the tiny shapes."""
    return (PROMPT[0] // 10, PROMPT[1] // 10) if config.vocab_size < 1000 else PROMPT


class LeftOut(Exception):
    """What the card or the environment has no room for."""


def settings(mode: str, micro: int) -> Train:
    sizes = {"train_batch_size": micro * ACCUMULATION, "per_device_train_batch_size": micro}
    return Train(mode=mode, deepspeed="zero2.json", dtype="bfloat16", learning_rate=1e-5, **sizes)


def fitting(mode: str, config: Any, micro: int, device: torch.device) -> int:
    """``micro``, or the largest micro-batch that `atlantis-ds plan` expects to fit this card.

    Raises:
        LeftOut: not even one example fits.
    """
    if device.type != "cuda":
        return micro
    train = settings(mode, micro)
    traced = train.model_copy(update={"mode": "lora"}) if mode == "qlora" else train
    memory = training_memory(train, model_shape(build_model(config, traced)), {"stage": 2}, 1, ACCUMULATION)
    room = usable(torch.cuda.get_device_properties(device).total_memory)
    fits = largest_micro_batch(memory, activations(config, traced, PROMPT[1], LONGEST_LABEL), room)
    if not fits:
        raise LeftOut(f"plan expects more than {room / GIB:.0f} GiB for one example")
    return min(micro, fits)


def some_pairs(count: int, vocabulary: int, prompt: tuple[int, int]) -> list[Encoded]:
    """Random examples with prompts of these lengths; they have nothing in common, so no prefix is shared."""
    draw = torch.Generator().manual_seed(0)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (1,), generator=draw))
        return torch.randint(10, vocabulary, (length,), generator=draw).tolist()

    return [Encoded(ids(*prompt), ids(3, 8), 1) for _ in range(count)]


def some_examples(config: Any, micro: int) -> list[Encoded]:
    return some_pairs(micro * ACCUMULATION * (WARM_UP + STEPS), config.vocab_size, prompt_lengths(config))


def facts(mode: str, config: Any, pairs: list[Encoded], micro: int, seconds: float) -> dict[str, Any]:
    """Rates over the examples that were timed; operations as in `gpu.py`."""
    timed = pairs[WARM_UP * micro * ACCUMULATION :]
    shape = model_shape(build_model(config, settings("full" if mode == "full" else "lora", micro)))
    forward = sum(forward_flops(shape, len(pair.prompt) - 1, len(pair.label) + 1) for pair in timed)
    return {
        "micro_batch": micro,
        "examples_per_s": len(timed) / seconds,
        "tokens_per_s": sum(map(len, timed)) / seconds,
        "flops": (3 if mode == "full" else 2) * forward / seconds,
    }


def train_ours(mode: str, model: Model, config: Any, micro: int, ranks: Ranks, extra: str = "") -> dict[str, Any]:
    """The project's engine and optimizer step, under ZeRO-2, optionally with an extra of ``EXTRAS``."""
    micro = fitting(mode, config, micro, ranks.device)
    pairs = some_examples(config, micro)
    given = EXTRAS.get((mode, extra), {})
    train = settings(mode, micro).model_copy(update=given if isinstance(given, dict) else {})
    engine = start_engine(train, model, [100], 0, ranks)
    try:
        if callable(given):
            given(engine.module)
        lengths, size = [len(pair) for pair in pairs], micro * ACCUMULATION
        marks = []
        for first in range(0, len(pairs), size):
            rows = np.arange(first, first + size)
            places = micro_batch_rows(rows, lengths, size, micro, ranks)
            batches = [collate_to_train([pairs[row] for row, _ in part], engine.module.config, 1) for part in places]
            optimizer_step(engine, batches, size, ranks)  # its loss comes back to the host: a step that ends has run
            marks.append(_now(ranks.device))
    finally:
        engine.destroy()
    return facts(mode, config, pairs, micro, marks[-1] - marks[WARM_UP - 1])


def train_trainer(mode: str, model: Model, config: Any, micro: int, ranks: Ranks) -> dict[str, Any]:
    """transformers' Trainer, the same examples in the same order, full logits, label positions by -100.

    Full training keeps fp32 weights under bf16 autocast, as exact as the fp32 master weights of DeepSpeed; LoRA and
    QLoRA keep the base in bf16 or NF4.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    micro = fitting(mode, config, micro, ranks.device)
    pairs = some_examples(config, micro)
    rows = [{"ids": [*p.prompt, *p.label, p.eos], "prompt": len(p.prompt), "weight": 1.0} for p in pairs]
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(_now(ranks.device))

    class Weighted(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            labels, weight = inputs.pop("labels")[:, 1:], inputs.pop("weight")
            logits = model(**inputs).logits[:, :-1].float()
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100).sum(1)
            return (weight * losses).mean()

    # As one process, not as a rank of one, for which it would wrap the model in DistributedDataParallel.
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, alone, clear=True):
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=ACCUMULATION,
            num_train_epochs=1,
            learning_rate=1e-5,
            bf16=True,
            optim="paged_adamw_8bit" if mode == "qlora" and ranks.device.type == "cuda" else "adamw_torch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=ranks.device.type == "cpu",
        )
        lm = _peer_model(mode, model, micro, ranks.device)
        trainer = Weighted(lm, arguments, data_collator=_padded, train_dataset=rows, callbacks=[Clock()])
        trainer.train()
    return facts(mode, config, pairs, micro, marks[-1] - marks[WARM_UP - 1])


def _peer_model(mode: str, model: Model, micro: int, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    train = settings(mode, micro)
    dtype = torch.float32 if mode == "full" else torch.bfloat16
    quantised = four_bits(train, device, stage=2) or {}
    lm = AutoModelForCausalLM.from_pretrained(str(model.model_name_or_path), dtype=dtype, **quantised)
    lm.config.use_cache = False
    if mode == "qlora":
        from peft import prepare_model_for_kbit_training

        lm = prepare_model_for_kbit_training(lm, use_gradient_checkpointing=False)
    return lm if mode == "full" else add_lora(lm, train, None)


def _padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["ids"]) for row in rows)
    ids = torch.ones(len(rows), width, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for number, row in enumerate(rows):
        length = len(row["ids"])
        ids[number, :length] = torch.tensor(row["ids"])
        labels[number, row["prompt"] : length] = ids[number, row["prompt"] : length]
        mask[number, :length] = 1
    weight = torch.tensor([row["weight"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "weight": weight}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compiled_layers(lm: Any) -> None:
    """torch.compile of the layers; on a CPU, where this is a test only, without generating code."""
    compile_layers(lm, "inductor" if torch.cuda.is_available() else "eager")


def liger(lm: Any) -> None:
    """Liger's RMSNorm, SwiGLU and rotary embedding; its fused loss would need all positions' labels."""
    from liger_kernel.transformers.monkey_patch import apply_liger_kernel_to_qwen2

    apply_liger_kernel_to_qwen2(cross_entropy=False, fused_linear_cross_entropy=False, model=lm)


def flash_attention(lm: Any) -> None:
    lm.set_attn_implementation("flash_attention_2")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


_OF_A_MODEL = {
    **({"flash-attn": flash_attention} if _installed("flash_attn") else {}),
    **({"Liger": liger} if _installed("liger_kernel") else {}),
    "torch.compile": compiled_layers,
}
_OF_A_TRAINING = {
    **({"flash-attn": {"attn_implementation": "flash_attention_2"}} if _installed("flash_attn") else {}),
    **({"flex attention": {"attn_implementation": "flex_attention"}} if torch.cuda.is_available() else {}),
}
EXTRAS: dict[tuple[str, str], Callable[..., Any] | dict[str, Any]] = {
    **{(what, name): apply for name, apply in _OF_A_MODEL.items() for what in ("score", "full")},
    **{("full", name): settings for name, settings in _OF_A_TRAINING.items()},
}
"""What could be switched on: each a row of its own, on a model of its own."""
