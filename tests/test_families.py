"""Every family of models: scores, gradients of packed training, ranking and generation, against one plain forward each.

Writes what it finds to the table of docs/models.md where ATLANTIS_MODELS_TABLE names a file.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny

from atlantis_ds.errors import InputError
from atlantis_ds.evaluate.generate import generate_greedy
from atlantis_ds.lm.batch import Batch, collate, collate_to_train
from atlantis_ds.lm.check import check_generation, check_packed, check_scoring
from atlantis_ds.lm.encode import Encoded
from atlantis_ds.lm.likelihood import label_log_likelihoods, score_choices, score_pairs
from atlantis_ds.lm.ways import FAST, Ways

EOS = 1
LABELS = [[5], [6, 7], [6, 8, 9]]
DRAW = random.Random(1)
PREFIX = [DRAW.randrange(3, 96) for _ in range(12)]
PAIRS = [
    Encoded([*PREFIX, *(DRAW.randrange(3, 96) for _ in range(own))], LABELS[at % 3], EOS)
    for at, own in enumerate((8, 40, 20, 31, 9, 15))
]
"""Prompts of 8 to 40 words behind a common beginning; beyond a window of 16."""
PROMPTS = [pair.prompt for pair in PAIRS]


def plain(model: Any, prompt: list[int], label: list[int]) -> float:
    """log p of a label and the end token by one forward of transformers, without any code of the project's."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *label]])).logits[
                0
            ]
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *label]])).logits[0, len(prompt) - 1 :]
    return float(logits.log_softmax(dim=-1)[range(len(label) + 1), [*label, EOS]].sum())


def gradient(model: Any, batches: list[Batch]) -> torch.Tensor:
    model.zero_grad()
    for batch in batches:
        (-label_log_likelihoods(model, batch).sum() / len(PAIRS)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def table() -> Any:
    rows: dict[str, list[str]] = {}
    yield rows
    if path := os.environ.get("ATLANTIS_MODELS_TABLE"):
        head = ["| family | scores | packed gradient | ranking | generation |", "|---|---|---|---|---|"]
        Path(path).write_text(
            "\n".join([*head, *(f"| {name} | {' | '.join(row)} |" for name, row in rows.items())]) + "\n"
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, table: dict[str, list[str]]) -> None:
    model = tiny(name)
    chosen = check_generation(model, PROMPTS[:3], EOS, check_scoring(model, PAIRS[:3], LABELS, EOS, prefix=True))
    packs = check_packed(model, PAIRS[:3], EOS)
    expected = torch.tensor([plain(model, pair.prompt, pair.label) for pair in PAIRS])
    every = torch.tensor([[plain(model, prompt, label) for label in LABELS] for prompt in PROMPTS])

    scores = score_pairs(model, PAIRS, EOS, 4096, ways=chosen).sum(dim=1)
    torch.testing.assert_close(scores.float(), expected, rtol=1e-4, atol=1e-3)
    ranked = score_choices(model, PROMPTS, LABELS, EOS, 4096, ways=chosen).sum(dim=2)
    torch.testing.assert_close(ranked.float(), every, rtol=1e-4, atol=1e-3)

    packed = "less" if packs.packed else "never"
    alone = gradient(model, [collate([pair], model.config, EOS) for pair in PAIRS])
    together = gradient(model, [collate_to_train(PAIRS, model.config, EOS, packed=packed)])
    off = float((together - alone).norm() / alone.norm())
    assert off < 1e-4, off

    model.eval()
    batched = generate_greedy(model, PROMPTS, {EOS}, EOS, 4096, 6, lambda _: None, chosen)
    single = [generate_greedy(model, [prompt], {EOS}, EOS, 4096, 6, lambda _: None)[0] for prompt in PROMPTS]
    assert batched == single
    differences = [float((scores.float() - expected).abs().max()), off, float((ranked.float() - every).abs().max())]
    table[name] = [
        f"{_way(chosen, 'prefix')}, {differences[0]:.0e}",
        f"{_way(packs, 'packed')}, {differences[1]:.0e}",
        f"{_way(chosen, 'tree')}, {differences[2]:.0e}",
        f"{_way(chosen, 'padded')}, equal",
    ]


def _way(ways: Ways, name: str) -> str:
    if name not in ways.differences:
        return "exact"
    return "exact" if getattr(ways, name) else f"plain way ({ways.differences[name]})"


@pytest.mark.parametrize("name", ["gemma2", "mistral, window of 16", "bloom", "mpt", "lfm2 (hybrid)"])
def test_what_the_check_keeps_away(name: str) -> None:
    """Without the check the fast ways are wrong, or end in an error: a check that always says yes would be seen."""
    model = tiny(name)
    every = torch.tensor([[plain(model, prompt, label) for label in LABELS] for prompt in PROMPTS])
    try:
        ranked = score_choices(model, PROMPTS, LABELS, EOS, 4096, ways=FAST).sum(dim=2).float()
    except Exception:
        return
    assert (ranked - every).abs().max() > 1e-3


def test_a_model_that_mixes_its_examples_is_refused() -> None:
    """Batch statistics, say: no way of running it gives an example the same score twice."""
    model = tiny("llama")
    forward = model.model.layers[1].forward

    def mixed(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(hidden - hidden.mean(dim=0, keepdim=True) * (len(hidden) > 1), *args, **kwargs)

    model.model.layers[1].forward = mixed
    with pytest.raises(InputError, match="other examples in its batch"):
        check_scoring(model, PAIRS[:3], LABELS, EOS, prefix=True)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "t5", "bart"])
def test_long_targets_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of many logits, a chunk of positions at a time, are those of all at once."""
    from atlantis_ds.lm import likelihood

    model = tiny(name)
    pairs = [Encoded(PREFIX, [3 + at % 90 for at in range(length)], EOS) for length in (50, 33)]
    batch = collate(pairs, model.config, EOS)
    whole, gradients = label_log_likelihoods(model, batch).detach(), gradient(model, [batch])
    monkeypatch.setattr(likelihood, "CHUNK", 7 * 96)
    if not check_packed(model, pairs, EOS).chunked:
        assert name == "bart"  # it adds a bias behind its head
        return
    chunks = label_log_likelihoods(model, batch).detach()
    torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(model, [batch]), gradients, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        ranked = score_choices(model, PROMPTS, LABELS, EOS, 4096)
        monkeypatch.setattr(likelihood, "CHUNK", 2**26)
        torch.testing.assert_close(ranked, score_choices(model, PROMPTS, LABELS, EOS, 4096), rtol=1e-5, atol=1e-5)


class Engine(torch.nn.Module):
    """What ``mean_loss`` needs of a DeepSpeed engine."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


class Pairs(list[Encoded]):
    """What it needs of the tokens of a split."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(pair) for pair in self])


def test_dev_loss_of_a_model_that_changes_its_logits_behind_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from atlantis_ds.lm import likelihood
    from atlantis_ds.train.dev import mean_loss

    model = tiny("bart")
    ways = check_packed(model, PAIRS[:3], EOS)
    assert not ways.chunked
    expected = -sum(plain(model, pair.prompt, pair.label) for pair in PAIRS) / len(PAIRS)
    monkeypatch.setattr(likelihood, "CHUNK", 2 * 96)
    ranks: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), sum=lambda *values: list(values))
    tokens: Any = Pairs(PAIRS)
    assert mean_loss(Engine(model), tokens, EOS, 256, ways, ranks) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_check_sees_the_same_in_bf16(name: str) -> None:
    """Rounding is a thousand times larger there; a fault must not pass for it, nor rounding for a fault."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(name).to(dtype)
        scoring = check_scoring(model, PAIRS[:3], LABELS, EOS, prefix=True)
        found.append((check_packed(model, PAIRS[:3], EOS).packed, scoring.tree, scoring.prefix))
    assert found[0] == found[1]


@pytest.mark.parametrize("name, taken", [("llama", True), ("gemma2", False)])
def test_long_targets_in_bf16_are_no_fault(name: str, taken: bool) -> None:
    """Rounding errors of a target's tokens add up: a bound for a short label refuses every model on long responses."""
    model = tiny(name).bfloat16()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(16)  # as far apart as a pretrained model's logits
    long = [
        Encoded([DRAW.randrange(3, 96) for _ in range(20)], [DRAW.randrange(3, 96) for _ in range(length)], EOS)
        for length in (200, 120, 80)
    ]
    ways = check_packed(model, long, EOS)
    off = float(ways.differences["packed"].split()[2])
    assert off > 0.3
    assert ways.packed is taken, ways
