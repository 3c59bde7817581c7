"""Scoring, ranking, losses and generation on tensors that claim to be on a GPU: one left on the CPU is found here.

The tensors are torch's fake ones: shapes, types and devices without values. The CPU build of torch knows no CUDA
device, so a guard that does nothing is compiled for it (two seconds of g++). What this cannot see is in
docs/multinode.md: values, backward passes, memory, NCCL, and kernels that exist on GPUs alone.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from transformers import AutoModelForCausalLM, Qwen2Config, T5Config, T5ForConditionalGeneration

from atlantis_ds.config.schema import Train
from atlantis_ds.evaluate.generate import generate_greedy
from atlantis_ds.lm import likelihood
from atlantis_ds.lm.batch import collate_to_train
from atlantis_ds.lm.encode import Encoded
from atlantis_ds.lm.likelihood import score_choices, score_pairs
from atlantis_ds.lm.load import wide_head
from atlantis_ds.train.engine import add_lora
from atlantis_ds.train.step import weighted_loss

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>); }
"""
CUDA = torch.device("cuda:0")
PROMPTS = [[*range(10, 30), *[40 + row] * (row + 1)] for row in range(4)]  # twenty tokens in common
LABELS = [[5, 6], [5, 7, 8], [9]]
PAIRS = [Encoded(prompt, LABELS[row % 3], 2) for row, prompt in enumerate(PROMPTS)]
QWEN2 = Qwen2Config(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=64,
    vocab_size=512,
)
T5 = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=512, decoder_start_token_id=0)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand: the GPU tests see more")
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    place, home = tmp_path_factory.mktemp("guard"), Path(torch.__file__).parent
    (place / "guard.cpp").write_text(GUARD)
    include = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    command = ["g++", "-shared", "-fPIC", "-O0", "-std=c++20", *include, "guard.cpp", "-o", "guard.so"]
    subprocess.run([*command, f"-L{home / 'lib'}", "-lc10"], cwd=place, check=True)
    torch.ops.load_library(str(place / "guard.so"))


@pytest.fixture
def fake(guard: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors, with answers where code asks for a value, which they have not."""
    real, asked = torch.tensor, iter(range(10**9))

    def tensor(data: Any, *, dtype: Any = None, device: Any = None) -> torch.Tensor:
        made = real(data, dtype=dtype)
        made.constant = None  # else moving it would really move it
        return made if device is None else made.to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(likelihood, "ahead", map)  # fake tensors are made on this thread alone
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    # Generation asks whether all have ended: every fourth time it hears yes.
    monkeypatch.setattr(FakeTensor, "__bool__", lambda self: next(asked) % 4 == 3, raising=False)
    monkeypatch.setattr(FakeTensor, "item", lambda self: 0, raising=False)
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [[0] * self.shape[-1]] * self.shape[0], raising=False)
    with FakeTensorMode():
        yield


def model(kind: str) -> Any:
    """A tiny model on the fake GPU, as ``load_scorer`` and ``start_engine`` leave it."""
    with unset_fake_temporarily():
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        lm = T5ForConditionalGeneration(T5) if kind == "t5" else AutoModelForCausalLM.from_config(QWEN2, dtype=dtype)
        if kind == "bf16":
            lm.set_output_embeddings(wide_head(lm.get_output_embeddings(), CUDA))
        if kind == "lora":
            lm = add_lora(lm, Train(mode="lora"), None)
    for module in lm.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
                known = module._parameters if name in module._parameters else module._buffers
                known[name] = torch.nn.Parameter(moved, tensor.requires_grad) if known is module._parameters else moved
    return lm.eval()


KINDS = pytest.mark.parametrize("kind", ["qwen2", "bf16", "lora", "t5"])


@KINDS
def test_fake_cuda_scores_and_ranks(fake: None, kind: str) -> None:
    lm = model(kind)
    assert next(lm.parameters()).device == CUDA
    pairs, choices = score_pairs(lm, PAIRS, 2, 200), score_choices(lm, PROMPTS, LABELS, 2, 400)
    assert pairs.shape == (4, 2) and choices.shape == (4, 3, 2)
    assert pairs.device.type == choices.device.type == "cpu" and pairs.dtype == choices.dtype == torch.float64


@KINDS
@pytest.mark.parametrize("packed", ["never", "always"])
@pytest.mark.parametrize("loss", ["cross_entropy", "gce", "dft"])
def test_fake_cuda_losses(fake: None, kind: str, packed: Any, loss: Any) -> None:
    lm = model(kind)
    batch = collate_to_train(PAIRS, lm.config, 2, [1.0, 2.0, 0.5, 0.5], packed).to(CUDA)
    value = weighted_loss(lm, batch, 4, loss)
    assert value.device == CUDA and value.dtype == torch.float64 and value.shape == ()


@pytest.mark.parametrize("kind", ["qwen2", "bf16", "t5"])
def test_fake_cuda_generates(fake: None, kind: str) -> None:
    seen: list[int] = []
    found = generate_greedy(model(kind), PROMPTS, [2], 2, 300, 4, seen.append)
    assert len(found) == 4 and sum(seen) == 4


def _left_on_the_cpu(batch: Any, device: torch.device) -> Any:
    return batch


def _sums_on_the_cpu(tokens: torch.Tensor, batch: Any) -> torch.Tensor:
    sums = torch.zeros(2 * batch.size, dtype=torch.float64)
    return sums.index_add(0, 2 * batch.example + batch.is_eos, tokens).view(-1, 2)


@pytest.mark.parametrize(
    "place,name,wrong",
    [(likelihood.Batch, "to", _left_on_the_cpu), (likelihood, "sum_over_labels", _sums_on_the_cpu)],
)
def test_fake_cuda_sees_a_tensor_on_the_wrong_device(
    fake: None, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, wrong: Callable[..., Any]
) -> None:
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(RuntimeError, match=r"same device|two devices"):
        score_pairs(model("qwen2"), PAIRS, 2, 200)
