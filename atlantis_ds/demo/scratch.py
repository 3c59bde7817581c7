"""The demo's own base models: tiny Qwen2 models, built and pretrained in the run folder from the demo grammar."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from atlantis_ds.config.schema import Recipe, Scratch
from atlantis_ds.data.relation import TEMPLATE
from atlantis_ds.demo.grammar import GRAMMAR_VERSION, unlabelled_text
from atlantis_ds.events import append_log
from atlantis_ds.files import fingerprint, finished, write_folder, write_json
from atlantis_ds.progress import Steps
from atlantis_ds.run_folder import RunFolder

SCRATCH_VERSION = 1
"""Raise this with any change to the tokenizer, the architecture or the pretraining."""

SENTENCES = 6000
BATCH_SIZE = 8  # many small steps: with one epoch and batches of 64, the larger model had twice the loss
LEARNING_RATE = 1e-3
END = "<|endoftext|>"


def build_scratch_model(recipe: Recipe, folder: RunFolder, name: str, labels: list[str], show: bool) -> None:
    """Build ``models.<name>.scratch`` in ``folder.base_model(name)``, unless it exists already.

    A tokenizer and a Qwen2 model (float32), pretrained as a plain language model on sentences of the demo grammar,
    without labels and from another random stream than the examples. The same recipe gives the same bytes on the same
    machine and number of threads.

    Args:
        recipe: with ``data.format: grammar``.
        folder: the run folder.
        name: large or small; a model that is not ``scratch`` is left alone.
        labels: the label set; its words are part of the tokenizer's corpus.
        show: whether to show progress (rank 0).
    """
    scratch: Scratch | None = getattr(recipe.models, name).scratch
    if scratch is None:
        return
    made_from = {
        "version": SCRATCH_VERSION,
        "grammar": GRAMMAR_VERSION,
        "scratch": scratch.model_dump(),
        "seed": recipe.seed,
        "labels": labels,
        "prompt": recipe.prompt.model_dump(),
    }
    mark = fingerprint(made_from)
    path = folder.base_model(name)
    if finished(path / "scratch.json", mark):
        return
    text = unlabelled_text(SENTENCES, recipe.seed)
    tokenizer = _train_tokenizer(scratch.vocab_size, [*text, *_prompt_words(recipe, labels)])
    sequences = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(text)["input_ids"]]
    model, loss = _pretrain(scratch, tokenizer, sequences, recipe.seed, f"pretrain {name}", show)

    def write(target: Path) -> None:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        write_json(target / "scratch.json", {"fingerprint": mark, **made_from})

    write_folder(path, write)
    append_log(
        folder.log,
        event="pretrain",
        model=name,
        parameters=model.num_parameters(),
        sentences=len(sequences),
        tokens=sum(map(len, sequences)),
        epochs=scratch.pretrain_epochs,
        loss=loss,
    )


def _prompt_words(recipe: Recipe, labels: list[str]) -> list[str]:
    """Texts that make the labels and the fixed parts of the prompt short in tokens; they contain no examples."""
    fixed = re.sub(r"\{\w*\}", " ", recipe.prompt.template or TEMPLATE)
    # The counts make their words more frequent than the rare nouns of the grammar.
    return [*[f"{fixed} [E1] a [/E1] b [E2] c [/E2] .\nOptions:\n"] * 300, *labels * 100]


def _train_tokenizer(vocab_size: int, texts: list[str]) -> Any:
    """A byte-level BPE tokenizer that splits text into words like Qwen2."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _pretrain(
    scratch: Scratch, tokenizer: Any, sequences: list[list[int]], seed: int, title: str, show: bool
) -> tuple[Any, float | None]:
    """A new model, trained to predict the next token; and the mean loss of the last 20 steps (nats per token)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=scratch.hidden_size,
        intermediate_size=3 * scratch.hidden_size,
        num_hidden_layers=scratch.num_hidden_layers,
        num_attention_heads=scratch.num_attention_heads,
        num_key_value_heads=math.gcd(scratch.num_attention_heads, max(1, scratch.num_attention_heads // 2)),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen2ForCausalLM(config)
    steps_per_epoch = math.ceil(len(sequences) / BATCH_SIZE)
    total = scratch.pretrain_epochs * steps_per_epoch
    warmup = max(1, total // 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / max(1, total)))),
    )
    losses: list[float] = []
    model.train()
    with Steps(title, total, "steps", show, every=max(1, total // 5)) as steps:
        for epoch in range(scratch.pretrain_epochs):
            for ids, targets in _batches(sequences, random.Random(f"{seed}:pretrain:{epoch}")):
                logits = model(input_ids=ids, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                steps.advance(note=f"loss {losses[-1]:.3f}")
    last = losses[-20:]
    return model.eval(), round(sum(last) / len(last), 4) if last else None


def _batches(sequences: list[list[int]], rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled batches of sequences of similar length: input ids and next-token targets, int64 [B, T]; -100 is
    padding."""
    order = list(range(len(sequences)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), 64 * BATCH_SIZE):
        near = sorted(order[start : start + 64 * BATCH_SIZE], key=lambda i: (len(sequences[i]), i))
        batches += [near[i : i + BATCH_SIZE] for i in range(0, len(near), BATCH_SIZE)]
    rng.shuffle(batches)
    for batch in batches:
        rows = [sequences[i] for i in batch]
        width = max(map(len, rows)) - 1
        ids = [row[:-1] + [0] * (width - len(row) + 1) for row in rows]
        targets = [row[1:] + [-100] * (width - len(row) + 1) for row in rows]
        yield torch.tensor(ids), torch.tensor(targets)
