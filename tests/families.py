"""Tiny random models of many families, for tests of what must be right on each."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 96
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GPT = {"vocab_size": VOCABULARY, "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", SMALL),
    "qwen2, window of 16": (
        "qwen2",
        {**SMALL, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", SMALL),
    "llama": ("llama", SMALL),
    "mistral, window of 16": ("mistral", {**SMALL, "sliding_window": 16}),
    "gemma2": ("gemma2", {**SMALL, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**SMALL, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", SMALL),
    "gpt2": ("gpt2", {**GPT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "opt": (
        "opt",
        {**GPT, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": 256, "word_embed_proj_dim": 32},
    ),
    "gpt_neo": (
        "gpt_neo",
        {**GPT, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
         "window_size": 16, "max_position_embeddings": 256},
    ),
    "gptj": ("gptj", {**GPT, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "rotary_dim": 4}),
    "mpt": ("mpt", {**GPT, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 256}),
    "bloom": ("bloom", {**GPT, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "falcon, alibi": (
        "falcon",
        {**GPT, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": True},
    ),
    "gpt_oss": ("gpt_oss", {**SMALL, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral (experts)": (
        "mixtral",
        {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "lfm2 (hybrid)": (
        "lfm2",
        {**SMALL, "layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_multiple_of": 8},
    ),
    "mamba2 (recurrent)": (
        "mamba2",
        {**GPT, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8,
         "n_groups": 1, "chunk_size": 8},
    ),
}  # fmt: skip
TO_DECODE = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "vocab_size": VOCABULARY}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 256, **TO_DECODE,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, **TO_DECODE}
ENCODER_DECODER: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "mt5": ("mt5", T5),
    "bart": ("bart", {**BART, "bos_token_id": 2, "forced_eos_token_id": 1}),
    "pegasus": ("pegasus", BART),
}
FAMILIES = CAUSAL | ENCODER_DECODER


def tiny(name: str, seed: int = 0) -> Any:
    """A random model of a family, fp32, in eval mode; its weights are large enough that a wrong mask shows."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind, values = FAMILIES[name]
    config = AutoConfig.for_model(kind, **values)
    torch.manual_seed(seed)
    loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = loader.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        if isinstance(bias := getattr(model, "final_logits_bias", None), torch.Tensor):
            bias.normal_()
    return model
