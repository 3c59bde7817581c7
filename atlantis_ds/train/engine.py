"""Model, optimizer, schedule and DeepSpeed engine of one training job."""

from __future__ import annotations

from typing import Any

import torch

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.lm.load import load_model
from atlantis_ds.recipe import Model, Train
from atlantis_ds.train.deepspeed_config import deepspeed_config


def start_engine(train: Train, model: Model, total_steps: int, seed: int, ranks: Ranks) -> Any:
    """Load a model (sharded at load under ZeRO-3), put adapters on it where asked, and give it to DeepSpeed.

    Returns:
        a DeepSpeed engine; ``engine.module`` is the transformers (or peft) model.
    """
    import deepspeed
    from transformers import get_scheduler
    from transformers.integrations import HfDeepSpeedConfig

    # On CPUs DeepSpeed would compile an op that only inference uses: half a minute, and a rank that is killed meanwhile
    # leaves a lock on which every later run waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Sharding at load needs to know the world size; this takes over the process group that is there.
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    config = deepspeed_config(train, ranks.world_size)
    # from_pretrained shards at load for as long as this object lives.
    sharding = HfDeepSpeedConfig(config)
    lm = load_model(model, train.dtype)
    del sharding
    torch.manual_seed(seed)
    if train.mode == "lora":
        lm = _add_lora(lm, train)
    lm.config.use_cache = False
    if train.gradient_checkpointing:
        # LoRA under ZeRO-3 needs the reentrant kind, which in turn needs an input with a gradient.
        reentrant = train.mode == "lora" and config["zero_optimization"]["stage"] == 3
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            lm.enable_input_require_grads()
    lm.train()
    parameters = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    scheduler = get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(train.warmup_ratio * total_steps),
        num_training_steps=total_steps,
    )
    engine, *_ = deepspeed.initialize(model=lm, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


def _add_lora(lm: Any, train: Train) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    kind = TaskType.SEQ_2_SEQ_LM if lm.config.is_encoder_decoder else TaskType.CAUSAL_LM
    return get_peft_model(
        lm,
        LoraConfig(
            task_type=kind,
            r=train.lora_r,
            lora_alpha=train.lora_alpha,
            lora_dropout=train.lora_dropout,
            target_modules=train.lora_target_modules,
        ),
    )
