"""Loads tokenizers and models, and identifies exactly which model it was."""

from __future__ import annotations

import functools
import gc
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from atlantis_ds.config.schema import Model, Recipe
from atlantis_ds.errors import InputError
from atlantis_ds.files import file_hash, fingerprint
from atlantis_ds.hub import Repository, adapter_base, at_fetched_commit, cached, offline
from atlantis_ds.run_folder import RunFolder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model_source(recipe: Recipe, folder: RunFolder, name: str) -> Model:
    """The path or id of the ``large`` or ``small`` model, or of the model that the ``reference`` is or starts from.

    For an id that ``fetch`` downloaded for this run, the fetched commit is used.

    Raises:
        InputError: a model that ``prepare`` builds is not built yet.
    """
    reference = recipe.models.reference
    if name == "reference" and reference.model_name_or_path is not None:
        model = Model(
            model_name_or_path=reference.model_name_or_path,
            revision=reference.revision,
            trust_remote_code=reference.trust_remote_code,
        )
        return _as_fetched(folder, model)
    name = "small" if name == "reference" else name
    model = getattr(recipe.models, name)
    if not model.scratch:
        return _as_fetched(folder, model)
    built = folder.base_model(name)
    if not built.is_dir():
        raise InputError(f"{built}: models.{name}.scratch is not built yet; run `prepare` first")
    return Model(model_name_or_path=str(built))


def _as_fetched(folder: RunFolder, model: Model) -> Model:
    if Path(str(model.model_name_or_path)).expanduser().is_dir():
        return model
    fetched = at_fetched_commit(folder, Repository("", "model", str(model.model_name_or_path), model.revision))
    return model.model_copy(update={"revision": fetched.revision})


def _from_pretrained(loader: Any, model: Model, **options: Any) -> Any:
    path = str(model.model_name_or_path)
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise InputError(f"{path}: no such model folder")
    try:
        return loader.from_pretrained(
            str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path,
            revision=model.revision or "main",
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if "tiktoken" in reason:  # the last format that transformers tries
            reason = "its tokenizer has no tokenizer.json, and its other files cannot be converted to one"
        if not Path(path).expanduser().is_dir():
            path += " (there is no folder of this name, so it is treated as a Hugging Face id)"
            if (
                offline()
                and cached(Repository("model", "model", str(model.model_name_or_path), model.revision)) is None
            ):
                reason = "HF_HUB_OFFLINE is set, and `atlantis-ds fetch` has not downloaded it"
        raise InputError(f"model {path}: cannot be loaded: {reason[:300]}") from None


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of a model.

    Raises:
        InputError: it cannot be loaded, or has no fast (Rust) version, which fingerprints and batches need.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, model)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(
            f"model {model.model_name_or_path}: its tokenizer ({type(tokenizer).__name__}) has no fast version "
            "(tokenizer.json); use a model that has one"
        )
    return tokenizer


def load_config(model: Model) -> Any:
    """The transformers config of a model, or of an adapter's base model.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, adapter_base(model) or model)


def load_model(
    model: Model,
    dtype: str,
    quantised: dict[str, Any] | None = None,
    attention: str = "auto",
    copy: Path | None = None,
) -> Any:
    """Load a causal or encoder-decoder LM from safetensors, on the CPU (or in shards, within ``sharded_at_load``).

    For a folder with a LoRA adapter, the whole base model is loaded in ``dtype``, with the adapter merged into it.

    Args:
        quantised: for a 4-bit base, ``quantization_config`` and ``device_map`` for ``from_pretrained``.
        attention: ``attn_implementation`` for ``from_pretrained``; ``auto`` leaves the choice to transformers.
        copy: read the weights (of an adapter's base) from this folder, which has the same weights; see ``node_copy``.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if base := adapter_base(model):
        from peft import PeftModel

        lm = load_model(base, dtype, attention=attention, copy=copy)
        return PeftModel.from_pretrained(lm, model.model_name_or_path).merge_and_unload()
    if copy:
        there = Model(model_name_or_path=str(copy), trust_remote_code=model.trust_remote_code)
        lm = load_model(there, dtype, quantised, attention)
        # Adapters and configs that are saved later must name the model, not this node's copy.
        lm.name_or_path = lm.config.name_or_path = str(model.model_name_or_path)
        return lm
    config = load_config(model)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options = {"dtype": DTYPES[dtype], "use_safetensors": True, **(quantised or {})}
    if attention != "auto":
        options["attn_implementation"] = attention
    if not getattr(config, "scale_decoder_outputs", True) and "lm_head.weight" in _tensor_names(model):
        return _load_untied_t5(loader, model, config, options)
    return _from_pretrained(loader, model, **options)


def _load_untied_t5(loader: Any, model: Model, config: Any, options: dict[str, Any]) -> Any:
    """A T5 with its own head, such as Flan-T5 (in terms of the config: one that does not scale its outputs).

    transformers 5 treats every T5 as tied, and keeps the head separate only if its values differ from the embedding's.
    Under ZeRO-3 it compares empty shards, and silently replaces the head by the embedding.
    """
    kind = loader._model_mapping[type(config)]
    declared = kind._tied_weights_keys
    kind._tied_weights_keys = {key: to for key, to in declared.items() if key != "lm_head.weight"}
    try:
        lm = _from_pretrained(loader, model, **options)
        lm._tied_weights_keys = kind._tied_weights_keys  # an attribute of its own, for a later tie_weights()
    finally:
        kind._tied_weights_keys = declared
    return lm


def _tensor_names(model: Model) -> set[str]:
    """Names of the tensors in a model's safetensors files, read without loading them; empty if there are none."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    path = str(Path(str(model.model_name_or_path)).expanduser())
    path = path if Path(path).is_dir() else str(model.model_name_or_path)
    for name in ("model.safetensors.index.json", "model.safetensors"):
        file = cached_file(path, name, revision=model.revision or "main", _raise_exceptions_for_missing_entries=False)
        if file and name.endswith(".json"):
            return set(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"])
        if file:
            with safe_open(file, framework="pt") as tensors:
                return set(tensors.keys())
    return set()


def dtype_on(dtype: str, device: torch.device) -> str:
    """The dtype that ``auto`` means for a frozen model on a device; any other dtype is returned unchanged."""
    return dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"


def load_scorer(model: Model, dtype: str, device: torch.device, copy: Path | None = None) -> Any:
    """Load a frozen model for scoring on one device, with fp32 logits whatever the dtype of its body.

    bf16 logits have a spacing of 0.125 near 20, too coarse for a log-likelihood.
    """
    lm = load_model(model, dtype, copy=copy).eval().requires_grad_(False)
    head = lm.get_output_embeddings()
    if head.weight.dtype != torch.float32:
        lm.set_output_embeddings(wide_head(head, device))
    return lm.to(device)


def wide_head(head: Any, device: torch.device) -> torch.nn.Linear:
    """A frozen copy of a bf16 LM head whose logits are fp32.

    On GPUs it multiplies bf16 by bf16 on the matrix units and accumulates in fp32; elsewhere torch cannot do this, and
    the copy is in fp32. Products of two bf16 numbers are exact in fp32: only the order of the sums differs.
    """
    kind, dtype = (_Fp32Logits, torch.bfloat16) if device.type == "cuda" else (torch.nn.Linear, torch.float32)
    wide = kind(head.in_features, head.out_features, bias=head.bias is not None, device=head.weight.device, dtype=dtype)
    wide.load_state_dict({name: tensor.to(dtype) for name, tensor in head.state_dict().items()})
    return wide.requires_grad_(False)


class _Fp32Logits(torch.nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.flatten(0, -2)
        logits = torch.mm(rows, self.weight.t(), out_dtype=torch.float32).unflatten(0, hidden.shape[:-1])
        return logits if self.bias is None else logits + self.bias.float()


@contextmanager
def takes_hidden_states_of_any_type(lm: Any) -> Iterator[None]:
    """Makes a scorer with an fp32 head on a bf16 body usable for plain forward passes as well."""
    head = lm.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda head, args: (args[0].to(head.weight.dtype),))
    try:
        yield
    finally:
        handle.remove()


def start_deepspeed() -> Any:
    """Initialise DeepSpeed on the existing process group: sharding during loading needs the world size."""
    import deepspeed

    # DeepSpeed asks this only for one op, which only inference uses. On CPUs it would compile the op: this takes half a
    # minute, and a rank that is killed meanwhile leaves a lock on which every later run waits forever. To answer, it
    # also runs the compiler for each of its ops: seconds at every start.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return deepspeed


def give_memory_back(device: torch.device) -> None:
    """Free the memory of models and engines that are no longer referenced.

    DeepSpeed's engines contain reference cycles, and two of its globals keep the modules and shards of every earlier
    ZeRO-3 engine (seen with 0.19.8: `destroy` and garbage collection alone freed nothing).
    """
    if "deepspeed.runtime.zero.parameter_offload" in sys.modules:
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        parameter_offload.FWD_MODULE_STACK.clear()
        release = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
        inspect.getclosurevars(release).nonlocals["func"].cache_clear()  # inside a decorator that wraps the cache
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def sharded_at_load(config: dict[str, Any]) -> Iterator[None]:
    """Makes ``load_model`` shard over the ranks, if the DeepSpeed config has ZeRO stage 3."""
    from transformers.integrations import HfDeepSpeedConfig

    sharding = HfDeepSpeedConfig(config)  # transformers keeps a weak reference to it
    try:
        yield
    finally:
        del sharding


def hash_files(model: Model) -> dict[str, str]:
    """SHA-256 of a model folder's weights and config, by name; empty for a Hugging Face id."""
    path = Path(str(model.model_name_or_path)).expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return {file.name: file_hash(file) for file in [*files, path / "config.json"] if file.is_file()}


def tokenizer_hash(model: Model) -> str:
    """Hash of everything that determines the tokens of a text. An unchanged tokenizer is hashed only once."""
    folder = Path(str(model.model_name_or_path)).expanduser()
    files = sorted(path for path in folder.glob("*") if path.suffix != ".safetensors") if folder.is_dir() else []
    return _tokenizer_hash(model, *((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@functools.lru_cache
def _tokenizer_hash(model: Model, *state: tuple[str, int, int]) -> str:
    tokenizer = load_tokenizer(model)
    return fingerprint(
        [
            sorted(tokenizer.get_vocab().items()),
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            tokenizer.eos_token_id,
        ]
    )


def model_identity(model: Model) -> dict[str, str]:
    """A model in a fingerprint: its id and commit, or the hash of its files; and its tokenizer's hash."""
    tokens = tokenizer_hash(model)
    path = Path(str(model.model_name_or_path)).expanduser()
    if not path.is_dir():
        commit = getattr(load_config(model), "_commit_hash", None) or model.revision or "main"
        return {"model": str(model.model_name_or_path), "revision": commit, "tokenizer": tokens}
    hashes = hash_files(model)
    if base := adapter_base(model):
        hashes["base"] = fingerprint(model_identity(base))
    return {"weights": fingerprint(hashes), "tokenizer": tokens}
