"""Prompts and targets to token ids. They are tokenised separately, so that a label has the same ids everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from atlantis_ds.errors import InputError

Span = tuple[int, int]
DAY = datetime(2024, 7, 26)
"""The date for chat templates that write today's date, so that tokens and scores never change. Llama's own default."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One (prompt, target) pair as token ids.

    ``prompt`` goes before the target (causal) or into the encoder (encoder-decoder). ``label`` holds the target's own
    tokens; ``eos`` is the token that ends it.
    """

    prompt: list[int]
    label: list[int]
    eos: int
    spans: tuple[Span, ...] = ()
    """In a chat with several assistant turns to learn: the span of each in ``[*label, eos]``, with its end token last.
    The rest is context. Empty: all of it is one target."""

    def __len__(self) -> int:
        """Tokens that the model reads for this pair."""
        return len(self.prompt) + len(self.label)

    @property
    def turns(self) -> tuple[Span, ...]:
        """``spans``, defined for any pair."""
        return self.spans or ((0, len(self.label) + 1),)

    @property
    def tokens(self) -> int:
        """Number of target tokens, without those that end it."""
        return sum(end - start - 1 for start, end in self.turns)


class Encoder:
    """Encodes examples for one tokenizer and model family.

    Args:
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        config: the model's config; decides between causal and encoder-decoder, and gives the maximum input length.
        labels: the label set; space is reserved for its longest label. None for responses.
        chat: prompts and targets are JSON lists of turns, for the tokenizer's own chat template.
        as_turn: write a text prompt as a user turn in the chat template, followed by the start of the assistant turn.
        truncate: cut the beginning of prompts that are too long.

    Raises:
        InputError: the tokenizer has no end-of-sequence token, or no chat template although one is needed.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: Any,
        labels: Sequence[str] | None = None,
        chat: bool = False,
        as_turn: bool = False,
        truncate: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.is_encoder_decoder = bool(config.is_encoder_decoder)
        # T5 has relative positions and no limit.
        self.max_tokens: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size: int | None = getattr(config, "vocab_size", None)
        if tokenizer.eos_token_id is None:
            raise InputError(f"tokenizer of {tokenizer.name_or_path}: it has no end-of-sequence token")
        if self.is_encoder_decoder and config.decoder_start_token_id is None:
            raise InputError(
                f"model of {tokenizer.name_or_path}: its config has no decoder_start_token_id; set it in config.json"
            )
        if (chat or as_turn) and not tokenizer.chat_template:
            key = "models.reference.chat_template" if as_turn else "data"
            raise InputError(f"{key}: the tokenizer of {tokenizer.name_or_path} has no chat template")
        self.chat, self.as_turn, self.truncate = chat, as_turn, truncate
        self._label_ids: dict[str, list[int]] = {}
        self.label_set = None if labels is None else [self.label_ids(label) for label in labels]
        self._refuse_equal_labels(labels or [])
        self._longest = max(map(len, self.label_set), default=0) if self.label_set is not None else 0
        self._ends = {tokenizer.eos_token_id, *tokenizer.all_special_ids}
        self._ends |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}

    def pairs(self, prompts: Sequence[str], targets: Sequence[str]) -> Iterator[Encoded]:
        """Encode examples, in order; what is too long (see ``excess``) is shortened with ``truncate``.

        Raises:
            InputError: a label has no tokens, or the chat template cannot write the turns.
        """
        if self.chat:
            for prompt, target in zip(prompts, targets):
                yield self._shortened(self._chat_pair(json.loads(prompt), json.loads(target)))
            return
        end = self.tokenizer.eos_token_id
        known = self.label_set is not None
        labels = [self.label_ids(t) for t in targets] if known else self._responses(targets)
        for ids, label in zip(self.prompt_ids(prompts), labels):
            yield self._shortened(Encoded(ids, label, end))

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of text prompts."""
        if self.as_turn:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            return [self._ids(self._render(turn, begin=True)) for turn in turns]
        # The newline is part of a causal prompt, so that prompt and label cannot merge into one token.
        texts = [prompt if self.is_encoder_decoder else prompt + "\n" for prompt in prompts]
        ids: list[list[int]] = self.tokenizer(texts)["input_ids"]
        if self.is_encoder_decoder:
            return ids
        # Some tokenizers end every text with an end token, which would be between prompt and target.
        return [prompt[:-1] if prompt[-1] == self.tokenizer.eos_token_id else prompt for prompt in ids]

    def last_prompt(self, prompt: str, target: str) -> list[int]:
        """Token ids of a chat up to its last turn, with the start of that turn, for the model to answer."""
        turns = [*json.loads(prompt), *json.loads(target)[:-1]]
        return self._ids(self._render(turns, begin=True))

    def label_ids(self, label: str) -> list[int]:
        if label not in self._label_ids:
            ids = self.tokenizer(label, add_special_tokens=False)["input_ids"]
            if not ids:
                raise InputError(f"label {label!r}: it has no tokens")
            self._label_ids[label] = ids
        return self._label_ids[label]

    def refuse_foreign_tokens(self, pair: Encoded, id: str) -> None:
        """Raise InputError if a token of the pair has no row in the model's embedding."""
        largest = max(max(pair.prompt), max(pair.label, default=0), pair.eos)
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise InputError(
                f"example {id}: token {largest} of the tokenizer of {self.tokenizer.name_or_path} is beyond the "
                f"model's {self.vocab_size} embeddings; the two do not belong together"
            )

    def _refuse_equal_labels(self, labels: Sequence[str]) -> None:
        """Refuse two labels with the same token ids: the model could never distinguish them."""
        first: dict[tuple[int, ...], str] = {}
        for label in labels:
            other = first.setdefault(tuple(self.label_ids(label)), label)
            if other != label:
                raise InputError(
                    f"labels {other!r} and {label!r} have the same tokens in the tokenizer of "
                    f"{self.tokenizer.name_or_path}, so the model cannot distinguish them; rename one"
                )

    def excess(self, pair: Encoded) -> int:
        """By how many tokens a pair, or its prompt with the longest label, exceeds the model's context; at least 0.

        An encoder-decoder reads prompt and target separately; its limit, if any, applies to the prompt.
        """
        if self.max_tokens is None:
            return 0
        behind = 0 if self.is_encoder_decoder else max(len(pair.label), self._longest)
        return max(0, len(pair.prompt) + behind - self.max_tokens)

    def _shortened(self, pair: Encoded) -> Encoded:
        excess = self.excess(pair) if self.truncate else 0
        if not excess or excess >= len(pair.prompt):
            return pair
        keeps = 1 if pair.prompt[0] == getattr(self.tokenizer, "bos_token_id", None) else 0
        return Encoded([*pair.prompt[:keeps], *pair.prompt[keeps + excess :]], pair.label, pair.eos, pair.spans)

    def _responses(self, targets: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(targets), add_special_tokens=False)["input_ids"]
        if empty := next((target for target, tokens in zip(targets, ids) if not tokens), None):
            raise InputError(f"response {empty!r:.60}: it has no tokens")
        return ids

    def _chat_pair(self, before: list[dict[str, str]], learned: list[dict[str, str]]) -> Encoded:
        """A chat as formatted by the template: each assistant turn, with the token that ends it, is a target.

        The text of a turn is what the template adds to the text before it, which must not change.
        """
        turns = [*before, *learned]
        written = self._render(turns[: len(before)], begin=True)
        prompt, ids, spans = self._ids(written), [], []
        for at in range(len(before), len(turns)):
            if turns[at]["role"] != "assistant":
                continue
            begun = self._render(turns[:at], begin=True)
            ids += self._ids(self._added(written, begun))
            written = self._render(turns[: at + 1], begin=False)
            added = self._added(begun, written)
            content = turns[at]["content"].strip()
            stop = added.find(content) + len(content)
            if stop < len(content):
                raise InputError(
                    f"chat template of {self.tokenizer.name_or_path}: it leaves out text of an assistant turn"
                )
            own, tail = self._ids(added[:stop]), self._ids(added[stop:])
            end = next((place for place, id in enumerate(tail) if id in self._ends), None)
            if end is None:
                raise InputError(f"chat template of {self.tokenizer.name_or_path}: no token ends an assistant turn")
            spans.append((len(ids), len(ids) + len(own) + end + 1))
            ids += own + tail
        last = spans[-1][1]
        return Encoded(prompt, ids[: last - 1], ids[last - 1], tuple(spans) if len(spans) > 1 else ())

    def _render(self, turns: list[dict[str, str]], begin: bool) -> str:
        import jinja2
        from transformers.utils import chat_template_utils

        try:
            with patch.object(chat_template_utils, "datetime", SimpleNamespace(now=lambda: DAY)):
                text: str = self.tokenizer.apply_chat_template(turns, add_generation_prompt=begin, tokenize=False)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"chat template of {self.tokenizer.name_or_path}: it rejects the turns: {reason}"
            ) from None
        return text

    def _added(self, written: str, more: str) -> str:
        if not more.startswith(written):
            raise InputError(
                f"chat template of {self.tokenizer.name_or_path}: it changes earlier turns when a later one follows; "
                "use data.train_on: last"
            )
        return more[len(written) :]

    def _ids(self, text: str) -> list[int]:
        # The template already writes the tokens that begin and end a sequence; they must not occur twice.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def last_turn(target: str) -> str:
    """The text of the last turn of a chat's target."""
    words: str = json.loads(target)[-1]["content"]
    return words
