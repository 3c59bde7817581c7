"""Label log-likelihoods against plain full logits, one example at a time; batches; encoding; the fp32 head."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, T5Config, T5ForConditionalGeneration

from atlantis_ds.cluster.ranks import free_port
from atlantis_ds.config.schema import Model, Prompt
from atlantis_ds.data.examples import write_arrow
from atlantis_ds.data.prompts import render_prompt
from atlantis_ds.data.relation import SEMEVAL_LABELS, TEMPLATE, read_semeval
from atlantis_ds.data.rows import BadRows
from atlantis_ds.errors import InputError
from atlantis_ds.lm.batch import ROW_MULTIPLE, ahead, collate, collate_to_train, token_budget_batches
from atlantis_ds.lm.encode import Encoded, Encoder
from atlantis_ds.lm.likelihood import label_log_likelihoods, score_choices, score_pairs
from atlantis_ds.lm.load import load_model, load_scorer
from atlantis_ds.lm.tokens import _Task, write_part
from atlantis_ds.train.engine import FEW, short_attention_in_fp32

FAMILIES = ["qwen2-tied", "qwen2-untied", "t5-tied", "t5-untied"]


@functools.cache
def examples():
    path = shared_data("semeval2010_task8/TRAIN_FILE.TXT")
    rows = [*itertools.islice(read_semeval(path, BadRows(drop=False)), 200)]
    rows = sorted(rows, key=lambda row: len(row.fields["sentence"]))
    return [*rows[:3], *rows[60:140:10], *rows[-3:]]  # 14 sentences, from the shortest to the longest


def prompts_of(rows, template=TEMPLATE, labels=None):
    return [render_prompt(template, row.fields, Prompt(), labels) for row in rows]


def encode(encoder, rows, template=TEMPLATE, labels=None):
    """Each row's prompt with its own label."""
    return [*encoder.pairs(prompts_of(rows, template, labels), [row.target for row in rows])]


@functools.cache
def tokenizer_of(family):
    name = "qwen2" if family.startswith("qwen2") else "flan-t5"
    return AutoTokenizer.from_pretrained(shared_data(f"tokenizers/{name}"))


def random_model(family):
    """The real vocabulary and architecture, few and narrow layers, weights wide enough for log-likelihoods to vary."""
    torch.manual_seed(0)
    tied = family.endswith("-tied")
    if family.startswith("qwen2"):
        config = Qwen2Config(
            vocab_size=151936,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.25,
            tie_word_embeddings=tied,
            bos_token_id=151643,
            eos_token_id=151643,
        )
        return Qwen2ForCausalLM(config).eval()
    config = T5Config(
        vocab_size=32128,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=tied,  # says only whether to scale the outputs; see below
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config).eval()
    if not tied:  # transformers ties every T5 that it builds; a checkpoint as Flan-T5's has a head of its own
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.all_tied_weights_keys = {}
    return model


def plain_log_likelihood(model, pair):
    """(label tokens, end-of-sequence token) of one example alone, from the full logits."""
    wanted = torch.tensor([*pair.label, pair.eos])
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[model.config.decoder_start_token_id, *pair.label]])
        logits = model(input_ids=torch.tensor([pair.prompt]), decoder_input_ids=decoder).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*pair.prompt, *pair.label, pair.eos]])).logits[0]
        logits = logits[len(pair.prompt) - 1 : -1]
    each = torch.log_softmax(logits, -1)[range(len(wanted)), wanted]
    return torch.stack([each[:-1].sum(), each[-1]])


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request):
    model = random_model(request.param)
    encoder = Encoder(tokenizer_of(request.param), model.config, SEMEVAL_LABELS)
    pairs = encode(encoder, examples())
    with torch.no_grad():
        plain = torch.stack([plain_log_likelihood(model, pair) for pair in pairs])
    assert plain.std(0).min() > 0.5  # else a score put in another's place would go unseen
    return model, pairs, plain


# --- log-likelihoods


@pytest.mark.parametrize("budget", [1, 64, 200, 4096])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_equal_plain_ones_in_any_order_and_batch(lm, budget, seed):
    model, pairs, plain = lm
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    scores = score_pairs(model, [pairs[i] for i in order], 0, budget)
    assert scores.dtype == torch.float64 and scores.shape == (len(pairs), 2)
    torch.testing.assert_close(scores, plain[order].double(), rtol=0, atol=1e-4)


def test_other_labels_equal_plain_ones(lm):
    """As ranking uses it: every label after one and the same prompt."""
    model, pairs, _ = lm
    labels = {tuple(pair.label): pair.label for pair in pairs}
    ranked = [dataclasses.replace(pairs[5], label=label) for label in labels.values()]
    with torch.no_grad():
        plain = torch.stack([plain_log_likelihood(model, pair) for pair in ranked])
    torch.testing.assert_close(score_pairs(model, ranked, 0, 300), plain.double(), rtol=0, atol=1e-4)


def test_progress_counts_examples_and_tokens(lm):
    model, pairs, _ = lm
    seen = []
    score_pairs(model, pairs, 0, 200, lambda *counts: seen.append(counts))
    assert len(seen) > 1
    assert [sum(column) for column in zip(*seen)] == [len(pairs), sum(map(len, pairs))]


def test_padding_content_changes_nothing(lm):
    model, pairs, _ = lm
    scores = [score_pairs(model, pairs, pad, 4096) for pad in (0, pairs[0].eos, 777)]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_gradient_equals_the_plain_one(lm):
    model, pairs, _ = lm
    pairs = pairs[2:6]
    weight = torch.tensor([[0.3, 1.0], [2.0, 0.5], [0.0, 0.1], [1.7, 1.0]])
    gradients = []
    for scores in (
        label_log_likelihoods(model, collate(pairs, model.config, 0)),
        torch.stack([plain_log_likelihood(model, pair) for pair in pairs]),
    ):
        model.zero_grad()
        (scores * weight).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    ours, plain = gradients
    for name in plain:
        scale = plain[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(ours[name], plain[name], rtol=0, atol=1e-4 * scale, msg=name)


def test_only_label_positions_reach_the_head(lm):
    model, pairs, _ = lm
    shapes = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, out: shapes.append(out.shape))
    score_pairs(model, pairs, 0, 200)
    handle.remove()
    assert len(shapes) > 1
    assert sum(shape[0] for shape in shapes) == sum(len(pair.label) + 1 for pair in pairs)
    assert {shape[1:] for shape in shapes} == {(model.config.vocab_size,)}


def test_hook_leaves_the_model_as_it_was(lm):
    model, pairs, plain = lm
    score_pairs(model, pairs[:2], 0, 4096)
    broken = collate(pairs[:2], model.config, 0)
    broken.inputs["input_ids"] = broken.inputs["input_ids"] + 10**7
    with pytest.raises(IndexError):
        label_log_likelihoods(model, broken)
    with torch.no_grad():
        assert torch.equal(plain_log_likelihood(model, pairs[0]), plain[0])


# --- the scorer's head


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_scorer_has_an_fp32_head(family, tmp_path):
    original = random_model(family)
    original.save_pretrained(tmp_path)
    source = Model(model_name_or_path=str(tmp_path))
    full = load_scorer(source, "float32", torch.device("cpu"))
    half = load_scorer(source, "bfloat16", torch.device("cpu"))
    head, embedding = half.get_output_embeddings(), half.get_input_embeddings()
    assert head.weight.dtype == torch.float32
    assert embedding.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in half.parameters()) and not half.training
    dtypes = {name: p.dtype for name, p in half.named_parameters() if p is not head.weight}
    assert torch.float32 not in {d for name, d in dtypes.items() if ".wo." not in name}  # T5 keeps wo in fp32
    if family.endswith("-tied"):
        assert full.get_output_embeddings().weight is full.get_input_embeddings().weight
        assert torch.equal(head.weight, embedding.weight.float())
    else:
        assert not torch.equal(head.weight, embedding.weight.float())

    encoder = Encoder(tokenizer_of(family), full.config, SEMEVAL_LABELS)
    pairs = encode(encoder, examples())
    logits = []
    handle = head.register_forward_hook(lambda _, args, out: logits.append(out))
    half_scores = score_pairs(half, pairs, 0, 4096)
    handle.remove()
    assert logits[0].dtype == torch.float32
    assert not torch.equal(logits[0], logits[0].bfloat16().float())  # and not rounded before
    full_scores = score_pairs(full, pairs, 0, 4096)
    per_token = (half_scores - full_scores).abs() / torch.tensor([[len(p.label), 1] for p in pairs])
    torch.testing.assert_close(full_scores, score_pairs(original, pairs, 0, 4096), rtol=0, atol=1e-4)
    assert per_token.mean() < 0.1 and per_token.max() < 0.5
    assert (half_scores - full_scores).abs().max() > 0  # else the body was not in bf16


ZERO3 = """
import sys, torch, deepspeed
from transformers.integrations import HfDeepSpeedConfig
from atlantis_ds.lm.load import load_model
from atlantis_ds.config.schema import Model

source = Model(model_name_or_path=sys.argv[1])
whole = load_model(source, "float32")
assert whole.lm_head.weight is not whole.shared.weight
deepspeed.init_distributed("gloo")
sharding = HfDeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 3}})
sharded = load_model(source, "float32")
assert sharded.lm_head.weight.numel() == 0  # it is sharded
for name in ("lm_head", "shared"):
    parameter = getattr(sharded, name).weight
    with deepspeed.zero.GatheredParameters([parameter]):
        assert torch.equal(parameter, getattr(whole, name).weight), name
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_untied_t5_keeps_its_head_when_sharded_at_load(tmp_path):
    random_model("t5-untied").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("scale_decoder_outputs") is False
    config["tie_word_embeddings"] = False  # now as Flan-T5's published one
    (tmp_path / "config.json").write_text(json.dumps(config))
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environ = {**os.environ, **place, "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", ZERO3, tmp_path], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_t5_saved_without_a_head_loads_tied(tmp_path):
    """transformers 5 builds a T5 with tie_word_embeddings: false tied, and saves one matrix: no random head then."""
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=100, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2, tie_word_embeddings=False)
    )
    model.save_pretrained(tmp_path)
    loaded = load_model(Model(model_name_or_path=str(tmp_path)), "float32")
    assert torch.equal(loaded.lm_head.weight, model.shared.weight)


# --- batches


@settings(deadline=None)
@given(st.lists(st.integers(11, 300), max_size=60), st.integers(1, 1000), st.integers(0, 10))
def test_token_budget_batches(lengths, budget, prefix):
    batches = token_budget_batches(lengths, budget, prefix)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    in_order = [lengths[index] for index in flat]
    assert in_order == sorted(in_order, reverse=True)
    for batch, following in zip(batches, [*batches[1:], []]):
        width = max(lengths[index] for index in batch)
        assert width * len(batch) <= budget or len(batch) == 1
        if following and width * (len(batch) + 1) <= budget:  # cut short: to have less padding
            assert lengths[following[0]] - prefix < 0.9 * (width - prefix)
            assert width * len(batch) >= budget / 4


def test_weights_travel_in_the_batch():
    model = random_model("qwen2-tied")
    pairs = encode(Encoder(tokenizer_of("qwen2"), model.config, []), examples()[:3])
    batch = collate(pairs, model.config, 0, [0.5, 0.0, 2.5]).to(torch.device("cpu"))
    assert batch.weight.tolist() == [0.5, 0.0, 2.5] and batch.weight.dtype == torch.float64
    assert collate(pairs, model.config, 0).weight.tolist() == [1, 1, 1]


# --- encoding


@pytest.mark.parametrize("family", ["qwen2", "t5"])
def test_label_tokens_are_the_same_everywhere(family):
    tokenizer = tokenizer_of(family)
    encoder = Encoder(tokenizer, random_model(f"{family}-tied").config, SEMEVAL_LABELS)
    ends = set()
    for label in SEMEVAL_LABELS:
        encoded = [*encoder.pairs(prompts_of(examples()), [label] * len(examples()))]
        assert len({tuple(pair.label) for pair in encoded}) == 1
        assert tokenizer.decode(encoded[0].label).strip() == label
        assert {pair.eos for pair in encoded} == {tokenizer.eos_token_id}
        assert encoded[0].eos not in encoded[0].label
        assert encoded[0].label == encoder.label_ids(label)
        ends |= {tokenizer.decode(pair.prompt[-1:]) for pair in encoded}
    # A causal prompt ends with the line end, alone or in one token with the mark before it; T5's with </s>.
    assert all(end.endswith("\n") for end in ends) if family == "qwen2" else ends == {"</s>"}
    own = examples()[4]
    (alone,) = encode(encoder, [own])
    assert alone == encode(encoder, examples())[4]
    assert alone.label == encoder.label_ids(own.target) and [alone.prompt] == encoder.prompt_ids(prompts_of([own]))


def test_prompt_and_label_read_as_one_text():
    """Tokenised apart, they still are the text that the model is meant to read, with no space or mark between."""
    tokenizer = tokenizer_of("qwen2")
    encoder = Encoder(tokenizer, random_model("qwen2-tied").config, [])
    example = examples()[0]
    (pair,) = encode(encoder, [example], "{sentence}")
    assert tokenizer.decode(pair.prompt + pair.label) == f"{example.fields['sentence']}\n{example.target}"


def test_entity_marks_are_known_to_t5():
    tokenizer = tokenizer_of("t5")
    encoder = Encoder(tokenizer, random_model("t5-tied").config, [])
    (pair,) = encode(encoder, examples()[:1], "{marked_sentence}")
    assert tokenizer.unk_token_id not in pair.prompt


@pytest.mark.parametrize("family", ["qwen2", "t5"])
def test_empty_label_is_refused(family):
    encoder = Encoder(tokenizer_of(family), random_model(f"{family}-tied").config, [])
    with pytest.raises(InputError, match="label ''"):
        [*encoder.pairs(prompts_of(examples()[:1]), [""])]


def test_too_long_example_is_told_by_its_id(tmp_path):
    """Of a split, the one that is longer by a token than the model reads; nothing of it is written then."""
    config, tokenizer = random_model("qwen2-tied").config, tokenizer_of("qwen2")
    rows = examples()
    (longest,) = encode(Encoder(tokenizer, config, []), rows[-1:])
    columns = [[row.id for row in rows], prompts_of(rows), [row.target for row in rows]]
    batch = pa.record_batch(list(map(pa.array, columns)), names=["id", "prompt", "target"])
    write_arrow(tmp_path / "train.arrow", batch.schema, iter([batch]), {})
    for reads in (len(longest), len(longest) - 1):
        model, tokens = tmp_path / f"reads {reads}", tmp_path / f"{reads}.arrow"
        config.max_position_embeddings = reads
        assert [Encoder(tokenizer, config, []).excess(longest)] == [len(longest) - reads]
        config.save_pretrained(model)
        tokenizer.save_pretrained(model)
        task = _Task(
            tmp_path / "train.arrow", "target", Model(model_name_or_path=str(model)), [], False, False, "refuse"
        )
        said = f"example {rows[-1].id}: {len(longest)} tokens, but the model reads at most {reads}"
        assert write_part(task, (0, tokens)) == ([said] if reads < len(longest) else [])
        assert tokens.exists() == (reads == len(longest))


@pytest.mark.parametrize("family", ["causal", "encoder-decoder"])
@pytest.mark.parametrize("budget", [1, 300, 4096])
def test_all_labels_behind_one_prompt_equal_the_single_pairs(family: str, budget: int) -> None:
    """Ranking reads a causal prompt once for all labels: the same values as each (prompt, label) pair alone."""
    torch.manual_seed(0)
    if family == "causal":
        shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=300, num_hidden_layers=2, **shape)).eval()
    else:
        config = T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        config.decoder_start_token_id = 0
        model = T5ForConditionalGeneration(config).eval()
    prompts = [[5 + i for i in range(n)] for n in (12, 3, 25, 12)]
    check_choices(model, prompts, budget)
    # What they all begin with is read once; with nothing in common, with all but a token, and alone.
    for common in (0, 9, 24):
        check_choices(model, [[*range(30, 30 + common), 5 + row, *range(row)] for row in range(4)], budget)
    check_choices(model, prompts[2:3], budget)


def check_choices(model, prompts, budget):
    labels = [[7], [8, 9, 10], [7, 11], [8, 9, 14, 15]]  # some begin alike, one begins another
    pairs = [Encoded(prompt, label, 2) for prompt in prompts for label in labels]
    with torch.inference_mode():
        alone = [label_log_likelihoods(model, collate([pair], model.config, 2)) for pair in pairs]
    expected = torch.cat(alone).view(len(prompts), 4, 2)
    result = score_choices(model, prompts, labels, 2, budget)
    assert (result - expected).abs().max() < 1e-4
    assert (score_pairs(model, pairs, 2, budget).view(len(prompts), 4, 2) - expected).abs().max() < 1e-4
    assert expected.std() > 1e-3


@pytest.mark.parametrize("template", ["{options}: {marked_sentence}", "{marked_sentence} {options}"])
def test_micro_batch_in_one_row_has_the_same_values_and_gradients(template):
    """With a prompt that begins alike for all examples, and with one that does not."""
    tokenizer, model = tokenizer_of("qwen2-tied"), random_model("qwen2-tied")
    encoder = Encoder(tokenizer, model.config, SEMEVAL_LABELS)
    pairs = encode(encoder, examples()[::3], template, SEMEVAL_LABELS)
    weights = [0.0, 0.5, 1.5, 3.0, 0.2]
    padded, packed = (f(pairs, model.config, 0, weights) for f in (collate, collate_to_train))
    prompts = [pair.prompt for pair in pairs]
    shared = prompts[0][: next(at for at, ids in enumerate(zip(*prompts)) if len(set(ids)) > 1)]
    assert (len(shared) > 8) == template.startswith("{options}")
    tokens = sum(map(len, pairs)) - len(shared) * (len(pairs) - 1)
    assert tokens % ROW_MULTIPLE, "the row must be filled up here"
    assert packed.inputs["input_ids"].shape == (1, math.ceil(tokens / ROW_MULTIPLE) * ROW_MULTIPLE)
    found = []
    for batch in (padded, packed):
        model.zero_grad()
        values = label_log_likelihoods(model, batch)
        (values.sum(dim=1) * batch.weight).sum().backward()
        found.append((values.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (values, gradient), (packed_values, packed_gradient) = found
    torch.testing.assert_close(packed_values, values, rtol=0, atol=1e-4)
    assert (packed_gradient - gradient).norm() < 1e-5 * gradient.norm()
    # Another sentence changes its own value alone.
    other = [dataclasses.replace(pairs[0], prompt=[*shared, *pairs[1].prompt[len(shared) :]]), *pairs[1:]]
    changed = label_log_likelihoods(model, collate_to_train(other, model.config, 0))
    torch.testing.assert_close(changed[1:], values[1:], rtol=0, atol=1e-4)
    assert abs(changed[0] - values[0]).max() > 1e-2


def test_short_rows_attend_in_fp32_and_long_ones_as_before():
    """In bf16: nearer to the fp32 model with its gradient, or bit for bit the same."""
    shape = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=300, num_hidden_layers=2, initializer_range=0.25, **shape)).eval()
    model.bfloat16()
    exact = copy.deepcopy(model).float()

    def gradient(lm, batch):
        lm.zero_grad()
        label_log_likelihoods(lm, batch).sum().backward()
        return torch.cat([p.grad.flatten().float() for p in lm.model.layers.parameters()])

    kinds = {"sdpa": model, "short": copy.deepcopy(model)}
    short_attention_in_fp32(kinds["short"])
    assert kinds["short"].config._attn_implementation != model.config._attn_implementation == "sdpa"
    draw = random.Random(0)
    for tokens in (FEW // 8, FEW):  # of each of three examples, packed into one row
        pairs = [Encoded([draw.randrange(300) for _ in range(tokens + row)], [9, 8], 1) for row in range(3)]
        batch = collate_to_train(pairs, model.config, 0, packed="always")
        found = {name: gradient(lm, batch) for name, lm in kinds.items()}
        if tokens == FEW:
            assert torch.equal(found["short"], found["sdpa"])
            continue
        off = {name: (found[name] - gradient(exact, batch)).norm() for name in found}
        assert 0 < off["short"] < off["sdpa"]
    # T5 adds its positions to the scores.
    t5 = random_model("t5-tied").bfloat16()
    exact_t5 = copy.deepcopy(t5).float()
    short_attention_in_fp32(t5)
    batch = collate([Encoded([5, 6, 7, 8], [9, 8], 1), Encoded([5, 6], [9], 1)], t5.config, 0)
    values = [label_log_likelihoods(lm, batch) for lm in (t5, exact_t5)]
    values[0].sum().backward()
    torch.testing.assert_close(*values, rtol=0, atol=0.5)
    # Padded rows have no mask of ours: what a position sees is left to transformers.
    padded = collate([*pairs[:1], Encoded([5, 6], [9], 1)], model.config, 0)
    short = collate([Encoded([5, 6], [9], 1), Encoded([5, 6, 7, 8, 9], [9], 1)], model.config, 0)
    for batch in (padded, short):
        with torch.no_grad():
            values = [label_log_likelihoods(lm, batch) for lm in (kinds["short"], exact)]
        torch.testing.assert_close(*values, rtol=0, atol=0.5)


def test_micro_batch_of_equal_lengths_stays_padded():
    pairs = [Encoded([5 + row, 6, 7, 8], [9], 1) for row in range(4)]
    config = random_model("qwen2-tied").config
    assert collate_to_train(pairs, config, 0).inputs["input_ids"].shape == (4, 5)
    assert "decoder_input_ids" in collate_to_train(pairs, random_model("t5-tied").config, 0).inputs


def test_flash_attention_is_told_where_each_example_of_a_row_begins(monkeypatch):
    """Its kernel needs a GPU; one that attends to each stretch of the row alone stands in for it here."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    told = []

    def stretches(module, query, key, value, mask, cu_seq_lens_q=None, max_length_q=None, scaling=None, **_):
        assert mask is None and (cu_seq_lens_q.diff().max() == max_length_q)
        told.append(cu_seq_lens_q.tolist())
        cuts = cu_seq_lens_q.diff().tolist()
        parts = zip(*(tensor.split(cuts, dim=2) for tensor in (query, key, value)), strict=True)
        options = dict(is_causal=True, scale=scaling, enable_gqa=True)
        return torch.cat([attend(*part, **options) for part in parts], dim=2).transpose(1, 2), None

    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", stretches)
    model = random_model("qwen2-tied")
    pairs = [Encoded([*range(5, 25), *range(30, 30 + 9 * row)], [9, 8], 1) for row in range(4)]  # they begin alike
    padded = collate(pairs, model.config, 0)

    def gradient(batch):
        model.zero_grad()
        label_log_likelihoods(model, batch).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradient(padded)
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    packed = collate_to_train(pairs, model.config, 0)
    assert packed.inputs["input_ids"].shape == (1, sum(map(len, pairs)))
    assert (gradient(packed) - expected).norm() < 1e-5 * expected.norm()
    assert told[0] == [0, 22, 53, 93, 142]


def test_flex_attention_gets_a_block_mask():
    model = random_model("qwen2-tied").eval()
    pairs = [Encoded([*range(5, 25), *range(30, 30 + 9 * row)], [9, 8], 1) for row in range(4)]
    expected = label_log_likelihoods(model, collate(pairs, model.config, 0)).detach()
    packed = collate_to_train(pairs, model.config, 0)
    model.set_attn_implementation("flex_attention")
    torch.compiler.reset()  # a second shape in one process makes code that does not compile on CPUs (torch 2.13)
    with torch.no_grad():  # nor has it a backward pass there
        torch.testing.assert_close(label_log_likelihoods(model, packed), expected, rtol=0, atol=1e-4)


def test_batches_are_made_ahead_in_their_order():
    made = []

    def make(item):
        if item == 5:
            raise ValueError("the sixth")
        made.append((item, threading.get_ident()))
        return -item

    coming = ahead(make, range(9))
    assert [next(coming) for _ in range(4)] == [0, -1, -2, -3]
    coming.close()
    assert [item for item, _ in made] in ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert threading.get_ident() not in {thread for _, thread in made}
    with pytest.raises(ValueError, match="the sixth"):
        list(ahead(make, range(9)))
    assert list(ahead(make, [])) == []
