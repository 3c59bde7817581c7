"""Examples into token ids. Prompt and label are tokenised apart, so that a label has the same ids everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atlantis_ds.config.schema import Prompt
from atlantis_ds.data.prompts import render_prompt
from atlantis_ds.data.table import Example
from atlantis_ds.errors import InputError


@dataclass(frozen=True, slots=True)
class Encoded:
    """One (prompt, label) pair as token ids.

    ``prompt`` goes before the label (causal) or into the encoder (encoder-decoder). ``label`` holds the label's own
    tokens; ``eos`` is the end-of-sequence token that follows them.
    """

    prompt: list[int]
    label: list[int]
    eos: int

    def __len__(self) -> int:
        """Tokens that the model reads for this pair."""
        return len(self.prompt) + len(self.label)


class Encoder:
    """Encodes examples for one tokenizer and model family.

    Args:
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        config: the model's config; decides between causal and encoder-decoder and gives the longest input.
        prompt: template and options.
        labels: the label set, for prompts that list it.
        chat_template: write the prompt as a user's turn in the tokenizer's chat template, the answer's turn begun.

    Raises:
        InputError: the tokenizer has no end-of-sequence token, or no chat template where one is asked for.
    """

    def __init__(
        self, tokenizer: Any, config: Any, prompt: Prompt, labels: list[str], chat_template: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.labels = labels
        self.is_encoder_decoder = bool(config.is_encoder_decoder)
        # T5 has relative positions and no limit of its own.
        self.max_tokens = None if self.is_encoder_decoder else getattr(config, "max_position_embeddings", None)
        if tokenizer.eos_token_id is None:
            raise InputError(f"tokenizer of {tokenizer.name_or_path}: it has no end-of-sequence token")
        if chat_template and not tokenizer.chat_template:
            raise InputError(f"models.reference.chat_template: {tokenizer.name_or_path}: no chat template there")
        self.chat_template = chat_template
        self._label_ids: dict[str, list[int]] = {}

    def __call__(self, example: Example, label: str | None = None) -> Encoded:
        """Encode an example with its own label, or with another one.

        Raises:
            InputError: the label has no tokens, or the example is longer than the model can read.
        """
        label = example.label if label is None else label
        pair = Encoded(self.prompt_ids(example), self.label_ids(label), self.tokenizer.eos_token_id)
        if self.max_tokens is not None and len(pair) > self.max_tokens:
            raise InputError(f"example {example.id}: {len(pair)} tokens, but the model reads at most {self.max_tokens}")
        return pair

    def prompt_ids(self, example: Example) -> list[int]:
        text = render_prompt(example, self.prompt, self.labels)
        if self.chat_template:
            turn = [{"role": "user", "content": text}]
            ids: list[int] = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            return ids
        # The line end is part of a causal prompt: it keeps prompt and label from merging into one token.
        return self.tokenizer(text if self.is_encoder_decoder else text + "\n")["input_ids"]

    def label_ids(self, label: str) -> list[int]:
        if label not in self._label_ids:
            ids = self.tokenizer(label, add_special_tokens=False)["input_ids"]
            if not ids:
                raise InputError(f"label {label!r}: it has no tokens")
            self._label_ids[label] = ids
        return self._label_ids[label]
