"""Responses: what is compared of them, their figures, and greedy generation in batches."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import BartConfig, GPT2Config, Qwen2Config, T5Config

from atlantis_ds.errors import InputError, RunError
from atlantis_ds.evaluate.answers import captured, exact_match, gold_answers, response_metrics, token_f1
from atlantis_ds.evaluate.generate import generate_greedy
from atlantis_ds.lm.load import wide_head


@pytest.mark.parametrize(
    ("text", "pattern", "found"),
    [
        ("2 + 2 = 4\n#### 4\nno:\n####  5 \n", "#### (.*)", "5"),
        ("2 + 2 = 4", "#### (.*)", None),
        ("#### ", "#### (.*)", None),
        ("yes", "(no)|yes", None),
        ("a: 1 b: 2", r"(\w): (\d)", "b"),
        (" all of it\n", None, "all of it"),
    ],
)
def test_captured(text: str, pattern: str | None, found: str | None) -> None:
    assert captured(text, pattern) == found


def test_nothing_captured_equals_nothing() -> None:
    assert exact_match("4", "4") == 1.0
    assert exact_match("4", None) == exact_match(None, "4") == exact_match(None, None) == exact_match("a", "A") == 0.0
    assert token_f1("4", None) == token_f1(None, None) == 0.0


@pytest.mark.parametrize(
    ("gold", "predicted", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("in the year 1912", "1912", 0.5),  # 1 of 3 words; the article is none
        ("to be or not to be", "to be to be to be", 2 * 4 / 12),
        ("theatre", "the atre", 0.0),
        ("Paris", "", 0.0),
        ("a", "the", 1.0),
    ],
)
def test_token_f1(gold: str, predicted: str, f1: float) -> None:
    assert token_f1(gold, predicted) == token_f1(predicted, gold) == pytest.approx(f1)


def test_response_metrics_by_hand() -> None:
    gold = ["3 and 4.\n#### 7", "#### 10"]
    predicted = ["#### 6, no:\n#### 7", "it is 10"]
    figures, of_each = response_metrics(["a", "b"], gold, predicted, [-3.0, -1.0], [6, 2], "#### (.*)")
    assert of_each["exact_match"].tolist() == of_each["token_f1"].tolist() == [1.0, 0.0]
    assert figures == {
        "macro_f1": None,
        "accuracy": None,
        "official": None,
        "per_label": None,
        "mean_log_likelihood": -0.5,
        "perplexity": pytest.approx(math.exp(0.5)),
        "exact_match": 0.5,
        "token_f1": 0.5,
        "n": 2,
    }
    whole, _ = response_metrics(["a", "b"], gold, ["3 and 4.\n#### 7\n", "10"], [-3.0, -1.0], [6, 2], None)
    assert (whole["exact_match"], whole["token_f1"]) == (0.5, 1.0), "#### is punctuation"
    lost, _ = response_metrics(["a"], ["x"], ["x"], [-4000.0], [4], None)
    assert lost["mean_log_likelihood"] == -1000 and lost["perplexity"] is None


def test_bad_responses_are_refused() -> None:
    with pytest.raises(InputError, match=r"evaluate\.answer: '#### \(\.\*\)' captures nothing .* 'b' \(1 such\)"):
        gold_answers(["a", "b"], ["#### 1", "none"], "#### (.*)")
    assert gold_answers(["a", "b"], ["x ", ""], None) == ["x", ""]
    with pytest.raises(InputError, match="no examples"):
        response_metrics([], [], [], [], [], None)
    with pytest.raises(InputError, match="'a' occurs more than once"):
        response_metrics(["a", "a"], ["x", "y"], ["x", "y"], [-1, -1], [1, 1], None)
    with pytest.raises(RunError, match="'b': its log-likelihood is nan"):
        response_metrics(["a", "b"], ["x", "y"], ["x", "y"], [-1, math.nan], [1, 1], None)


# --- generation

WORDS, PAD, START = 40, 39, 38
"""Size of the vocabulary, and ids that prompts do not hold."""


def qwen2() -> Any:
    config = Qwen2Config(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2ForCausalLM(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=24))


def t5() -> Any:
    config = T5Config(
        vocab_size=WORDS,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
        decoder_start_token_id=START,
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = BartConfig(
        vocab_size=WORDS,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=PAD,
        decoder_start_token_id=START,
        forced_eos_token_id=None,
    )
    return transformers.BartForConditionalGeneration(config)


Build = Callable[[], Any]
BUILD: list[Build] = [qwen2, gpt2, t5, bart]


def random_model(build: Build) -> Any:
    """With weights ten times as large as at the start of a training, so that what it reads decides what it says."""
    torch.manual_seed(1)
    lm = build().eval()
    with torch.no_grad():
        for weights in lm.parameters():
            if weights.dim() > 1:
                weights.normal_(std=0.3)
    return lm


def some_prompts(n: int = 12) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(START) for _ in range(draw.randrange(1, 13))] for _ in range(n)]


def generate(lm: Any, prompts: list[list[int]], end: set[int], budget: int, new: int = 10) -> list[list[int]]:
    done: list[int] = []
    found = generate_greedy(lm, prompts, end, PAD, budget, new, done.append)
    assert sum(done) == len(prompts)
    return found


@torch.inference_mode()
def by_hand(lm: Any, prompt: list[int], end: set[int], new: int) -> list[int]:
    """One token after the other, everything read again for each."""
    found: list[int] = []
    for _ in range(new):
        if lm.config.is_encoder_decoder:
            inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[START, *found]])}
        else:
            inputs = {"input_ids": torch.tensor([[*prompt, *found]])}
        token = int(lm(**inputs).logits[0, -1].argmax())
        if token in end:
            break
        found.append(token)
    return found


@pytest.mark.parametrize("build", BUILD)
def test_batches_say_what_each_prompt_alone_does(build: Build) -> None:
    lm, prompts = random_model(build), some_prompts()
    free = [by_hand(lm, prompt, set(), 10) for prompt in prompts]
    assert len({tuple(tokens) for tokens in free}) > 6, "the prompts decide"
    end = {max(range(WORDS), key=lambda word: len({(*tokens, word).index(word) for tokens in free}))}
    alone = [by_hand(lm, prompt, end, 10) for prompt in prompts]
    lengths = {len(tokens) for tokens in alone}
    assert 10 in lengths and len(lengths) > 2, "some end by themselves, here and there, some do not"
    assert generate(lm, prompts, end, 10_000) == alone, "one batch"
    assert generate(lm, prompts, end, 60) == alone, "some"
    assert generate(lm, prompts, end, 1) == alone, "one a prompt"
    assert generate(lm, prompts, set(), 60) == free, "no end token"


@pytest.mark.parametrize("build", BUILD)
def test_the_generation_config_of_a_checkpoint_changes_nothing(build: Build, recwarn: pytest.WarningsRecorder) -> None:
    lm, prompts = random_model(build), some_prompts()
    plain = generate(lm, prompts, {7}, 60)
    own = lm.generation_config
    own.update(
        num_beams=4,
        min_length=9,
        forced_bos_token_id=3,
        forced_eos_token_id=4,
        no_repeat_ngram_size=1,
        repetition_penalty=5.0,
        suppress_tokens=list(range(10, 20)),
        bad_words_ids=[[5]],
        do_sample=True,
        temperature=0.1,
        top_p=0.5,
        top_k=3,
        decoder_start_token_id=2,
        eos_token_id=11,
        max_length=3,
        num_return_sequences=2,
        cache_implementation="static",
        use_cache=False,
        return_dict_in_generate=True,
    )
    before = own.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(lm, prompts, {7}, 60) == plain
    assert lm.generation_config is own and own.to_dict() == before


def test_a_head_in_fp32_behind_a_body_in_bf16() -> None:
    lm = random_model(qwen2).bfloat16()
    lm.set_output_embeddings(wide_head(lm.get_output_embeddings(), torch.device("cpu")))
    prompts = some_prompts(3)
    assert generate(lm, prompts, set(), 1) == generate(lm, prompts, set(), 1)
    assert all(len(tokens) == 10 for tokens in generate(lm, prompts, set(), 60))
    assert not lm.get_output_embeddings()._forward_pre_hooks


def test_a_model_stops_at_the_end_of_its_positions() -> None:
    lm, prompts = random_model(gpt2), some_prompts(5)
    prompts += [[1] * 20, [2] * 22, [3] * 24, [4] * 20]
    found = generate(lm, prompts, set(), 10_000)
    assert [len(tokens) for tokens in found] == [10] * 5 + [4, 2, 0, 4]
    assert found == [by_hand(lm, prompt, set(), len(tokens)) for prompt, tokens in zip(prompts, found)]


def test_no_prompts() -> None:
    assert generate(random_model(qwen2), [], {1}, 100) == []


def test_peft_wrapped() -> None:
    import peft

    lm, prompts = random_model(qwen2), some_prompts(4)
    wrapped = peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.eval()
    wrapped.generation_config.update(num_beams=4, min_length=9)
    alone = [by_hand(wrapped, prompt, {7}, 10) for prompt in prompts]
    assert generate(wrapped, prompts, {7}, 100) == alone
