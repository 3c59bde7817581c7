"""The plan's memory against real runs; its inputs; its refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV, ROOT

from atlantis_ds.config.schema import Model, Score, Train
from atlantis_ds.lm.size import model_shape
from atlantis_ds.plan.memory import training_memory
from atlantis_ds.plan.scoring import scoring_memory, sizes_of_folder
from atlantis_ds.plan.trace import activations, build_model, read_config

pytestmark = pytest.mark.slow

# Freed blocks go back at once, so that resident memory is what is in use.
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
MEASURED = ENV | {"DS_ACCELERATOR": "cpu", **FREE_AT_ONCE}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60M weights: Flan-T5's kind of layers and vocabulary; random."""
    from transformers import T5Config, T5ForConditionalGeneration

    path = tmp_path_factory.mktemp("t5")
    config = T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=6,
        num_decoder_layers=6,
        num_heads=8,
        dropout_rate=0.1,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        dtype="float32",
    )
    T5ForConditionalGeneration(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """102M weights with the real vocabulary of Qwen2, tied; random."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("qwen2")
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="float32",
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("family", "mode", "stage", "ranks"),
    [
        ("qwen2", "full", 0, 1),
        ("qwen2", "full", 3, 2),
        ("qwen2", "lora", 0, 1),
        ("t5", "full", 0, 1),
        ("t5", "full", 3, 2),
        ("t5", "lora", 0, 1),
    ],
)
def test_memory_is_within_15_percent_of_a_real_run(
    family: str, mode: str, stage: int, ranks: int, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(family)
    file = ROOT / "ds_configs" / f"zero{stage}.json"
    settings = {"mode": mode, "deepspeed": str(file), "dtype": "float32"}
    settings |= {"train_batch_size": 8 * ranks, "per_device_train_batch_size": 8}
    line = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), str(ROOT / "tests" / "measure_memory.py")]
    line += [str(path), json.dumps(settings), "64"]
    done = subprocess.run(line, env=MEASURED, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = max(int(peak) for peak in re.findall(r"PEAK (\d+)", done.stdout))

    train, config = Train(**settings), read_config(Model(model_name_or_path=str(path)))
    shape = model_shape(build_model(config, train))
    zero = json.loads(file.read_text())["zero_optimization"]
    memory = training_memory(train, shape, zero, ranks, accumulation=1, cpu=True)
    planned = memory.peak(activations(config, train, 58, 7).bytes(8))
    print(f"{family} {mode} zero{stage}, {ranks} ranks: planned {planned / 2**20:.0f}, real {measured / 2**20:.0f} MiB")
    assert planned == pytest.approx(measured, rel=0.15)


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    for recipe, option, words in (
        ("conll04_qwen2_7b_lora", ["--gpu", "abacus"], "--gpu abacus: unknown"),
        (
            "conll04_qwen2_7b_lora",
            ["--set", f"models.large.model_name_or_path={tmp_path / 'config.json'}"],
            "not a transformers config",
        ),
        ("demo", ["--set", "name=not_prepared"], "models.large.scratch is not built yet; run `prepare` first"),
    ):
        line = [sys.executable, "-m", "atlantis_ds", "plan", str(ROOT / "recipes" / f"{recipe}.yaml"), *option]
        done = subprocess.run(line, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("labels", [0, 300])
def test_memory_of_scoring_is_within_a_quarter_of_a_real_run(qwen2: Path, dtype: str, labels: int) -> None:
    score = {"dtype": dtype, "tokens_per_batch": 4096}
    line = [
        sys.executable,
        str(ROOT / "tests" / "measure_scoring.py"),
        str(qwen2),
        json.dumps(score),
        "200",
        str(labels),
    ]
    done = subprocess.run(line, env=MEASURED, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = int(re.findall(r"PEAK (\d+)", done.stdout)[0])
    sizes = sizes_of_folder(qwen2)
    assert sizes is not None
    planned = scoring_memory(sizes, Score(**score), 200, 4 * labels or None)
    print(f"{dtype}, {labels} labels: planned {planned}, real {measured / 2**30:.2f} GiB")
    assert planned.total == pytest.approx(measured, rel=0.25)
