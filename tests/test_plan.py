"""The plan's memory against real runs; its inputs; its refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from atlantis_ds.recipe import Model, Train
from atlantis_ds.train.memory import training_memory
from atlantis_ds.train.trace import activations, build_model, model_shape, read_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    # Freed blocks go back at once, so that resident memory is what is in use.
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}


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


@pytest.mark.parametrize(("mode", "stage", "ranks"), [("full", 0, 1), ("full", 3, 2), ("lora", 0, 1)])
def test_memory_is_within_15_percent_of_a_real_run(mode: str, stage: int, ranks: int, qwen2: Path) -> None:
    file = ROOT / "ds_configs" / f"zero{stage}.json"
    settings = {"mode": mode, "deepspeed": str(file), "dtype": "float32"}
    settings |= {"train_batch_size": 8 * ranks, "per_device_train_batch_size": 8}
    line = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), str(ROOT / "tests" / "measure_memory.py")]
    line += [str(qwen2), json.dumps(settings), "64"]
    done = subprocess.run(line, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = max(int(peak) for peak in re.findall(r"PEAK (\d+)", done.stdout))

    train, config = Train(**settings), read_config(Model(model_name_or_path=str(qwen2)))
    shape = model_shape(build_model(config, train))
    zero = json.loads(file.read_text())["zero_optimization"]
    memory = training_memory(train, shape, zero, ranks, accumulation=1, cpu=True)
    planned = memory.peak(activations(config, train, 58, 7).bytes(8))
    assert planned == pytest.approx(measured, rel=0.15), (
        f"planned {planned / 2**20:.0f}, real {measured / 2**20:.0f} MiB"
    )


def test_unknown_gpu_and_broken_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    recipe = str(ROOT / "recipes" / "conll04_qwen2_7b_lora.yaml")
    for options, words in (
        (["--gpu", "abacus"], "--gpu abacus: unknown"),
        (["--set", f"models.large.model_name_or_path={tmp_path / 'config.json'}"], "not a transformers config"),
    ):
        line = [sys.executable, "-m", "atlantis_ds", "plan", recipe, *options]
        done = subprocess.run(line, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
