"""Model, optimizer, schedule and DeepSpeed engine of one training job."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.schema import Model, Train
from atlantis_ds.errors import InputError
from atlantis_ds.lm.load import DTYPES, load_model, sharded_at_load, start_deepspeed
from atlantis_ds.train.deepspeed_config import deepspeed_config, offload_device, zero_stage


def start_engine(
    train: Train, model: Model, steps: Sequence[int], seed: int, ranks: Ranks, copy: Path | None = None
) -> Any:
    """Load a model (sharded while loading under ZeRO-3), add adapters if needed, and pass it to DeepSpeed.

    Args:
        steps: optimizer steps; if there are several numbers, the learning rate schedule restarts after each.
        copy: this node's copy of the weights; see ``node_copy``.

    Returns:
        a DeepSpeed engine; ``engine.module`` is the transformers (or peft) model.
    """
    deepspeed = start_deepspeed()
    config = deepspeed_config(train, ranks.world_size)
    _check_machine(train, config, ranks.device)
    with sharded_at_load(config):
        quantised = four_bits(train, ranks.device, zero_stage(config))
        lm = load_model(model, train.dtype, quantised, train.attn_implementation, copy)
    torch.manual_seed(seed)
    if train.mode != "full":
        lm = add_lora(lm, train, model.revision)
    lm.config.use_cache = False
    if ranks.device.type == "cpu" and train.dtype == "bfloat16":
        short_attention_in_fp32(lm)
    if train.torch_compile:
        compile_layers(lm)
    if train.gradient_checkpointing:
        # LoRA under ZeRO-3 needs the reentrant kind, which in turn needs an input with a gradient.
        reentrant = train.mode != "full" and zero_stage(config) == 3
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            lm.enable_input_require_grads()
    lm.train()
    parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    optimizer = _adamw_class(train, config, ranks.device)(
        parameters, lr=train.learning_rate, weight_decay=train.weight_decay
    )
    scheduler = _learning_rate(train, optimizer, steps)
    engine, *_ = deepspeed.initialize(model=lm, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


def _learning_rate(train: Train, optimizer: torch.optim.Optimizer, steps: Sequence[int]) -> LambdaLR:
    """The recipe's schedule, once for each number in ``steps``."""
    from transformers import get_scheduler

    factors = [
        get_scheduler(train.lr_scheduler_type, optimizer, round(train.warmup_ratio * n), n).lr_lambdas[0] for n in steps
    ]

    def factor(step: int) -> float:
        for of_phase, n in zip(factors[:-1], steps):
            if step < n:
                return float(of_phase(step))
            step -= n
        return float(factors[-1](step))

    return LambdaLR(optimizer, factor)


def _check_machine(train: Train, config: dict[str, Any], device: torch.device) -> None:
    """Refuse settings that this machine cannot run, before a model is loaded.

    Raises:
        InputError: NVMe offload without libaio, or on CPU ranks; 4-bit weights under ZeRO-3 on CPU ranks; attention
            kernels that can train only on GPUs.
    """
    from deepspeed.accelerator import get_accelerator

    if "nvme" in (offload_device(config, "optimizer"), offload_device(config, "param")):
        if device.type == "cpu":
            # Seen with DeepSpeed 0.19.8 on 2 CPU ranks: after the first update the losses differ from those of ZeRO-0.
            raise InputError(
                f"train.deepspeed: {train.deepspeed}: offload to NVMe needs a GPU: on CPU ranks, DeepSpeed computes "
                "wrong weights with it; use zero3_offload.json"
            )
        builder = get_accelerator().create_op_builder("AsyncIOBuilder")
        if builder is None or not builder.is_compatible(verbose=False):
            raise InputError(
                f"train.deepspeed: {train.deepspeed}: offload to NVMe needs libaio with its headers (libaio-dev) on "
                "every node; install it, or use zero3_offload.json"
            )
    if train.mode == "qlora" and device.type == "cpu" and zero_stage(config) == 3:
        raise InputError(
            f"train.deepspeed: {train.deepspeed}: 4-bit weights under ZeRO-3 need a GPU; on CPU ranks use "
            "zero2.json, or train.mode: lora"
        )
    if train.attn_implementation in ("flash_attention_2", "flex_attention") and device.type == "cpu":
        raise InputError(
            f"train.attn_implementation: {train.attn_implementation} has no backward pass on CPUs; use auto"
        )


def compile_layers(lm: Any, backend: str = "inductor") -> None:
    """Let torch compile each layer of a model separately: they are alike, so one compilation serves all of them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in lm.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True, backend=backend)


FEW = 256
"""Positions up to which torch's attention on CPUs is faster in fp32 than in bf16, backward pass included: 3 ms for 8 at
158 tokens of SmolLM2-135M, 28 for 20 at 512 (one core, AMX)."""


def short_attention_in_fp32(lm: Any) -> None:
    """Let a model with torch's attention kernel (``sdpa``) use fp32 if there are few positions."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def in_fp32(given: Any) -> Any:
        return given.float() if isinstance(given, torch.Tensor) and given.is_floating_point() else given

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> tuple[Any, None]:
        if key.shape[2] > FEW:
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        wide = [in_fp32(given) for given in (query, key, value, mask)]
        # T5's positions are passed as an argument, as numbers to add.
        found, _ = sdpa_attention_forward(module, *wide, **{name: in_fp32(given) for name, given in options.items()})
        return found.to(query.dtype), None

    if lm.config._attn_implementation == "sdpa":
        AttentionInterface.register("short_in_fp32", attention)
        AttentionMaskInterface.register("short_in_fp32", sdpa_mask)
        lm.set_attn_implementation("short_in_fp32")


def _adamw_class(train: Train, config: dict[str, Any], device: torch.device) -> Any:
    """AdamW according to where its states are; all compute the same update, the 8-bit one up to rounding."""
    if offload_device(config, "optimizer") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam
    if train.mode == "qlora" and device.type == "cuda":
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit
    return functools.partial(torch.optim.AdamW, fused=True)


def four_bits(train: Train, device: torch.device, stage: int) -> dict[str, Any] | None:
    """What ``from_pretrained`` needs to load a QLoRA base (Dettmers et al. 2023): NF4, double quantisation.

    Under ZeRO-3 transformers refuses a device map, and uses this rank's device by itself.
    """
    if train.mode != "qlora":
        return None
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[train.dtype],
        bnb_4bit_quant_storage=DTYPES[train.bnb_4bit_quant_storage] if train.bnb_4bit_quant_storage else None,
    )
    return {"quantization_config": config} | ({} if stage == 3 else {"device_map": {"": device}})


def _refuse_bad_targets(lm: Any, targets: str | list[str]) -> None:
    """Check the names: peft ignores a name without a match if another one matches, and merges tied modules wrongly."""
    if isinstance(targets, str):
        if targets == "all-linear" or re.search(r"[.*+?|()\[\]\\]", targets):
            return  # a regular expression: peft raises an error if it matches nothing
        targets = [targets]
    modules = [name for name, _ in lm.named_modules()]
    ends = sorted({name.rpartition(".")[2] for name in modules} - {""})
    tied = [lm.get_output_embeddings(), lm.get_input_embeddings()] if lm.config.tie_word_embeddings else []
    for target in targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not found:
            close = difflib.get_close_matches(target, ends, n=3, cutoff=0.4)
            hint = f"; similar: {', '.join(close)}" if close else ""
            raise InputError(f"train.lora_target_modules: the model has no module {target!r}{hint}")
        if any(lm.get_submodule(name) is module for name in found for module in tied):
            raise InputError(
                f"train.lora_target_modules: {target}: head and embedding are tied in this model, so an adapter would "
                "be merged into both; leave it out, or use train.mode: full"
            )


def add_lora(lm: Any, train: Train, revision: str | None) -> Any:
    """The model with adapters on it.

    Raises:
        InputError: a name in ``train.lora_target_modules`` is not a module of the model, or is a tied head or
            embedding.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    _refuse_bad_targets(lm, train.lora_target_modules)
    kind = TaskType.SEQ_2_SEQ_LM if lm.config.is_encoder_decoder else TaskType.CAUSAL_LM
    return get_peft_model(
        lm,
        LoraConfig(
            task_type=kind,
            revision=revision,
            r=train.lora_r,
            lora_alpha=train.lora_alpha,
            lora_dropout=train.lora_dropout,
            target_modules=train.lora_target_modules,
        ),
    )
