"""Chats as token ids: exactly the assistant's words and what ends the turn are learned, and nothing is doubled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_templates import CHATML, LLAMA, THINKING
from conftest import shared_data

from atlantis_ds.errors import InputError
from atlantis_ds.lm.batch import collate, collate_to_train
from atlantis_ds.lm.encode import DAY, Encoded, Encoder, last_turn

CONFIG = SimpleNamespace(is_encoder_decoder=False, max_position_embeddings=512)
CHAT = [
    {"role": "user", "content": "What is the big bad wolf?"},
    {"role": "assistant", "content": "A wolf."},
    {"role": "user", "content": "And the storm?"},
    {"role": "assistant", "content": "The storm caused damage."},
]


@pytest.fixture(scope="module")
def tokenizer(base_model: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    specials = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|eot|>", "<s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": specials[:4], "bos_token": "<s>"})
    return tokenizer


def encode(tokenizer: Any, template: str, before: int, turns: list[dict[str, str]] = CHAT) -> Encoded:
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, CONFIG, None, chat=True)
    return next(encoder.pairs([json.dumps(turns[:before])], [json.dumps(turns[before:])]))


def learned(tokenizer: Any, pair: Encoded) -> list[str]:
    target = [*pair.label, pair.eos]
    return [tokenizer.decode(target[start:end]) for start, end in pair.turns]


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA, "<|eot|>")], ids=["as Qwen2", "as Llama"]
)
def test_the_assistant_and_its_end_are_learned(tokenizer: Any, template: str, end: str) -> None:
    last, every = encode(tokenizer, template, before=3), encode(tokenizer, template, before=1)
    assert learned(tokenizer, last) == [f"The storm caused damage.{end}"]
    assert learned(tokenizer, every) == [f"A wolf.{end}", f"The storm caused damage.{end}"]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False).rstrip("\n")
    whole = re.sub("Today: [0-9]+", f"Today: {DAY.year}", whole)  # the same on every day
    for pair in (last, every):
        assert tokenizer.decode([*pair.prompt, *pair.label, pair.eos]) == whole  # BOS, system prompt and date once
        assert pair.tokens == sum(end - start for start, end in pair.turns) - len(pair.turns)
    bos = [*every.prompt, *every.label].count(tokenizer.bos_token_id)
    assert bos == (1 if template == LLAMA else 0)


def test_qwen2s_own_template(shared_qwen2: Any) -> None:
    pair = next(Encoder(shared_qwen2, CONFIG, None, chat=True).pairs([json.dumps(CHAT[:1])], [json.dumps(CHAT[1:])]))
    assert learned(shared_qwen2, pair) == ["A wolf.<|im_end|>", "The storm caused damage.<|im_end|>"]
    text = shared_qwen2.decode([*pair.prompt, *pair.label, pair.eos])
    assert text == shared_qwen2.apply_chat_template(CHAT, tokenize=False).rstrip("\n")
    assert text.count("You are a helpful assistant") == 1


@pytest.fixture
def shared_qwen2() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data("tokenizers/qwen2"))


def test_all_turns_carry_loss_and_nothing_between(tokenizer: Any) -> None:
    """The batch's targets are the learned tokens, each predicted from the position before it, padded and packed."""
    pairs = [encode(tokenizer, CHATML, before=1), encode(tokenizer, CHATML, before=3)]
    for build in (collate, collate_to_train):
        batch = build(pairs, CONFIG, tokenizer.eos_token_id)
        for row, pair in enumerate(pairs):
            mine = batch.example == row
            ids = [*pair.prompt, *pair.label, pair.eos]
            expected = [ids[len(pair.prompt) + at] for start, end in pair.turns for at in range(start, end)]
            assert batch.targets[mine].tolist() == expected
            assert int(batch.is_eos[mine].sum()) == len(pair.turns)
            before = batch.inputs["input_ids"].flatten()[batch.positions[mine]].tolist()
            assert before == [ids[len(pair.prompt) + at - 1] for start, end in pair.turns for at in range(start, end)]


def test_all_turns_at_once_are_the_turns_one_by_one(tokenizer: Any, base_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from atlantis_ds.lm.likelihood import label_log_likelihoods

    lm = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
    lm.resize_token_embeddings(len(tokenizer))
    every = encode(tokenizer, CHATML, before=1)
    single = [encode(tokenizer, CHATML, 1, CHAT[:2]), encode(tokenizer, CHATML, 3)]
    with torch.no_grad():
        together = label_log_likelihoods(lm, collate([every], lm.config, 0)).sum(dim=0)
        apart = label_log_likelihoods(lm, collate(single, lm.config, 0)).sum(dim=0)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_a_template_that_rewrites_earlier_turns(tokenizer: Any) -> None:
    assert learned(tokenizer, encode(tokenizer, THINKING, before=3)) == [
        "<think></think>The storm caused damage.<|im_end|>"
    ]
    with pytest.raises(InputError, match="train_on: last"):
        encode(tokenizer, THINKING, before=1)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "no token ends an assistant turn"),
        ("{{ raise_exception('System role needed') }}", "System role needed"),
        ("{% for m in messages %}{{ m['role'] }}<|eot|>{% endfor %}", "leaves out text of an assistant turn"),
    ],
)
def test_templates_that_cannot_serve(tokenizer: Any, template: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        encode(tokenizer, template, before=3)


def test_a_tokenizer_without_a_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        Encoder(tokenizer, CONFIG, None, chat=True)


def test_the_last_prompt_is_the_chat_up_to_the_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    encoder = Encoder(tokenizer, CONFIG, None, chat=True)
    ids = encoder.last_prompt(json.dumps(CHAT[:1]), json.dumps(CHAT[1:]))
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True, tokenize=False)
    assert last_turn(json.dumps(CHAT[1:])) == "The storm caused damage."


def test_long_prompts_lose_their_beginning(tokenizer: Any) -> None:
    limit = SimpleNamespace(is_encoder_decoder=False, max_position_embeddings=12)
    words = "the storm caused damage and the wolf ate the apple in the house"
    plain = Encoder(tokenizer, limit)
    cut = Encoder(tokenizer, limit, truncate=True)
    long, short = (next(encoder.pairs([words], ["the end"])) for encoder in (plain, cut))
    assert plain.excess(long) == len(long) - 12 > 0
    assert cut.excess(short) == 0 and len(short) == 12
    assert short.prompt == long.prompt[len(long) - 12 :] and short.label == long.label
