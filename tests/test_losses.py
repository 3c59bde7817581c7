"""The losses of training against their formulas, on a bare model with full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import grammar_pairs

from atlantis_ds.config.schema import Loss, Model, Train
from atlantis_ds.data.relation import SEMEVAL_LABELS
from atlantis_ds.lm.batch import collate
from atlantis_ds.lm.encode import Encoded, Encoder
from atlantis_ds.lm.load import load_config, load_model, load_tokenizer
from atlantis_ds.train.step import loss_of_step, weighted_loss

WEIGHTS = [0.3, 2.0, 0.0, 1.7]


@pytest.fixture(scope="module")
def setting(base_model: Path) -> tuple[Any, list[Encoded]]:
    model = Model(model_name_or_path=str(base_model))
    encoder = Encoder(load_tokenizer(model), load_config(model), SEMEVAL_LABELS)
    return load_model(model, "float32"), grammar_pairs(encoder, 4, seed=2)


def plain_tokens(lm: Any, pair: Encoded) -> torch.Tensor:
    """log p of the label's tokens and of its end, one example alone, from full logits."""
    ids = torch.tensor([pair.prompt + pair.label])
    logits = lm(input_ids=ids).logits[0, len(pair.prompt) - 1 :].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor([*pair.label, pair.eos])[:, None])[:, 0]


def gradient(lm: Any, loss: torch.Tensor) -> torch.Tensor:
    lm.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in lm.parameters()])


def of_batch(lm: Any, pairs: list[Encoded], loss: Any, q: float) -> torch.Tensor:
    return weighted_loss(lm, collate(pairs, lm.config, 0, WEIGHTS), 4, loss, q)


@pytest.mark.parametrize("q", [0.02, 0.5, 1.0])
def test_gce_is_zhang_and_sabuncus(q: float, setting: tuple[Any, list[Encoded]]) -> None:
    lm, pairs = setting
    sums = [plain_tokens(lm, pair).sum() for pair in pairs]
    expected = sum(w * (1 - p.exp() ** q) / q for w, p in zip(WEIGHTS, sums)) / 4
    assert of_batch(lm, pairs, "gce", q).item() == pytest.approx(expected.item(), rel=1e-6)
    # The gradient is that of the cross-entropy, each example scaled by p^q.
    found = gradient(lm, of_batch(lm, pairs, "gce", q))
    scaled = sum(-w * p.detach().exp() ** q * p for w, p in zip(WEIGHTS, sums)) / 4
    expected = gradient(lm, scaled)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_gce_near_0_is_the_cross_entropy(setting: tuple[Any, list[Encoded]]) -> None:
    lm, pairs = setting
    plain = of_batch(lm, pairs, "cross_entropy", 0.7).item()
    assert of_batch(lm, pairs, "gce", 1e-6).item() == pytest.approx(plain, rel=1e-4)


def test_dft_scales_each_token_by_its_probability(setting: tuple[Any, list[Encoded]]) -> None:
    lm, pairs = setting
    tokens = [plain_tokens(lm, pair) for pair in pairs]
    expected = -sum(w * (t.detach().exp() * t).sum() for w, t in zip(WEIGHTS, tokens)) / 4
    assert of_batch(lm, pairs, "dft", 0.7).item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = gradient(lm, expected)
    found = gradient(lm, of_batch(lm, pairs, "dft", 0.7))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("loss", ["gce", "dft"])
def test_robust_losses_begin_with_the_cross_entropy(loss: Loss) -> None:
    settings = Train(loss=loss)
    assert [loss_of_step(settings, step, 4) for step in range(4)] == ["cross_entropy"] * 2 + [loss] * 2
    assert loss_of_step(Train(loss=loss, loss_warmup_ratio=0), 0, 4) == loss
