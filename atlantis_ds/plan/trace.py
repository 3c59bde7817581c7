"""Measures the memory of a forward and backward pass without using it: runs the real code on fake tensors.

Fake tensors have shapes, dtypes and storages, but no data. The weighted loss of ``train.step`` runs on them as on real
ones, and every allocation is counted: activations, logits, tensors kept for the backward pass, and each weight's
gradient while autograd holds it.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from atlantis_ds.config.schema import Model, Train
from atlantis_ds.errors import InputError
from atlantis_ds.lm.batch import collate
from atlantis_ds.lm.encode import Encoded
from atlantis_ds.lm.load import DTYPES, load_config
from atlantis_ds.lm.ways import CHUNK
from atlantis_ds.train.step import weighted_loss

LAYERS = (1, 2)
"""Models are traced at these depths, because the memory of a pass is linear in the depth."""
BATCHES = (48, 96)
"""And with these micro-batches: above a few examples it is linear in them, as long as all logits are computed at
once."""


@dataclass(frozen=True)
class Activations:
    """Peak bytes of a forward and backward pass, without weights and persistent gradients."""

    least: float
    """For one example: with a large vocabulary, the gradients of embedding and head while autograd adds them."""
    whole: tuple[float, float]
    """Constant, and slope per example of the micro-batch, if all logits are computed at once."""
    chunked: tuple[float, float]
    """The same if they are computed in chunks."""
    most_whole: int
    """The largest micro-batch whose logits are computed at once."""

    def bytes(self, micro_batch: int) -> float:
        constant, slope = self.whole if micro_batch <= self.most_whole else self.chunked
        return max(self.least, constant + slope * micro_batch)


def read_config(model: Model) -> Any:
    """The config of a model: from a Hugging Face id, a folder (config.json is enough), or a config file itself.

    Raises:
        InputError: it cannot be read.
    """
    path = Path(str(model.model_name_or_path)).expanduser()
    if not path.is_file():
        return load_config(model)
    from transformers import AutoConfig

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a transformers config: {' '.join(str(error).split())[:200]}") from None


def build_model(config: Any, train: Train, layers: int | None = None) -> Any:
    """The model of a config on the meta device, in the recipe's dtype, with adapters if the mode has them.

    Args:
        layers: reduce the model to this depth (both stacks of an encoder-decoder).
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if layers is not None:
        values = {**config.to_dict(), "num_hidden_layers": layers, "num_layers": layers, "num_decoder_layers": layers}
        values.pop("layer_types", None)
        config = AutoConfig.for_model(**values)
    loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        lm = loader.from_config(config, dtype=DTYPES[train.dtype])
        if train.mode != "full":
            from peft import LoraConfig, get_peft_model

            adapters = LoraConfig(
                task_type="SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM",
                r=train.lora_r,
                target_modules=train.lora_target_modules,
                lora_dropout=train.lora_dropout,
            )
            lm = get_peft_model(lm, adapters, autocast_adapter_dtype=False)
    lm.config.use_cache = False
    return lm.train()


def activations(config: Any, train: Train, prompt_tokens: int, label_tokens: int) -> Activations:
    """Trace training passes of a model at small depths and micro-batches, and extrapolate to its real depth.

    Args:
        train: for mode, dtype, adapters and gradient_checkpointing.
        prompt_tokens, label_tokens: of every example of the batch.
    """
    depth = config.num_hidden_layers
    few, more = LAYERS if depth > LAYERS[1] else (depth, depth)

    def at_depth(batch: int, chunked: bool) -> float:
        shallow = _peak(config, train, few, batch, prompt_tokens, label_tokens, chunked)
        if few == more:
            return shallow
        a_layer = (_peak(config, train, more, batch, prompt_tokens, label_tokens, chunked) - shallow) / (more - few)
        return shallow + a_layer * (depth - few)

    def line(some: int, many: int, chunked: bool) -> tuple[float, float]:
        low, high = at_depth(some, chunked), at_depth(many, chunked)
        slope = (high - low) / (many - some)
        return low - slope * some, slope

    most_whole = CHUNK // (label_tokens * config.get_text_config().vocab_size)
    first = max(BATCHES[0], most_whole + 1)
    return Activations(
        at_depth(1, chunked=True), line(*BATCHES, chunked=False), line(first, 2 * first, chunked=True), most_whole
    )


def _peak(
    config: Any, train: Train, layers: int, batch_size: int, prompt_tokens: int, label_tokens: int, chunked: bool
) -> int:
    lm = build_model(config, train, layers)
    with FakeTensorMode():
        _fake(lm)
        if train.gradient_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if train.mode != "full":
                lm.enable_input_require_grads()
        batch = collate([Encoded([1] * prompt_tokens, [1] * (label_tokens - 1), 1)] * batch_size, lm.config, 0)
        batch = replace(batch, chunked=chunked)
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_forget_gradient)
        live = _LiveBytes(lm)
        with live:
            weighted_loss(lm, batch, 1.0).backward()
    return live.peak


def _fake(lm: Any) -> None:
    """Replace the meta tensors of a model by fake tensors that look like CPU tensors; call it inside a FakeTensorMode.

    On the meta device itself, attention would use a path that keeps whole score matrices.
    """
    known: dict[int, torch.nn.Parameter] = {}
    for module in lm.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) not in known:
                new = torch.empty(old.shape, dtype=old.dtype)
                known[id(old)] = torch.nn.Parameter(new, requires_grad=old.requires_grad)
            if old is not None:
                module._parameters[name] = known[id(old)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _forget_gradient(parameter: torch.Tensor) -> None:
    # The plan counts persistent gradients; here only what autograd itself holds is counted.
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, from creation until they are freed."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in [*lm.parameters(), *lm.buffers()]:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size
