"""Peak memory of one training pass over the length of the targets: logits in chunks beside all of them at once.

Measured on the CPU (a random Qwen2 of two layers with the real vocabulary, fp32, one example of 100 prompt tokens), and
traced by `plan` for a real shape (fake tensors, bf16, LoRA, micro-batch 8, with gradient checkpointing). The last
column is of as many tokens with a target of 8: the hidden states alone.

    python tools/bench/long_targets.py [--config FILE]     # a config.json, say of Qwen2-7B
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from resident import forget_peak, resident

LENGTHS = (500, 1000, 2000, 4000)
PROMPT = 100
GIB = 2**30


def measured(tokens: int, chunked: bool) -> None:
    """Print the peak of one forward and backward pass above what is resident before it, in bytes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from atlantis_ds.lm import likelihood
    from atlantis_ds.lm.batch import collate
    from atlantis_ds.lm.encode import Encoded
    from atlantis_ds.train.step import weighted_loss

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    lm = Qwen2ForCausalLM(config).train()
    lm.get_input_embeddings().requires_grad_(False)  # its gradient would hide what grows with the length
    if not chunked:
        likelihood.CHUNK = 2**62
    pairs = [Encoded([5] * PROMPT, [7] * length, 1) for length in (8, tokens)]
    weighted_loss(lm, collate(pairs[:1], config, 0, [1.0]), 1.0).backward()
    forget_peak()
    before = resident("VmRSS")
    torch.manual_seed(0)
    weighted_loss(lm, collate(pairs[1:], config, 0, [1.0]), 1.0).backward()
    print(resident("VmHWM") - before)


def traced(config: Path, prompt: int, tokens: int, chunked: bool = True) -> float:
    """Peak GiB of the activations of a micro-batch of 8."""
    from atlantis_ds.config.schema import Model, Train
    from atlantis_ds.lm import likelihood
    from atlantis_ds.plan.trace import activations, read_config

    kept = likelihood.CHUNK
    likelihood.CHUNK = kept if chunked else 2**62
    train = Train(mode="lora", dtype="bfloat16", gradient_checkpointing=True)
    try:
        return activations(read_config(Model(model_name_or_path=str(config))), train, prompt, tokens).bytes(8) / GIB
    finally:
        likelihood.CHUNK = kept


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--config", type=Path)
    words.add_argument("--measure", nargs=2, type=int, help=argparse.SUPPRESS)
    options = words.parse_args()
    if options.measure:
        measured(options.measure[0], bool(options.measure[1]))
        return
    print("| target tokens | measured, in chunks (GiB) | at once | plan, in chunks (GiB) | at once | hidden states |")
    print("|---|---|---|---|---|---|")
    for tokens in LENGTHS:
        row = []
        for chunked in (True, False):
            line = [sys.executable, __file__, "--measure", str(tokens), str(int(chunked))]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            row.append(f"{int(done.stdout) / GIB:.2f}")
        if options.config:
            row += [f"{traced(options.config, PROMPT, tokens, chunked):.2f}" for chunked in (True, False)]
            row.append(f"{traced(options.config, PROMPT + tokens - 8, 8):.2f}")
        print(f"| {tokens} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
