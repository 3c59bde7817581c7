"""Every mode of training on real ranks: what runs, what is refused, and that all of them compute the same.

The models have the real vocabularies (Qwen2 152k, Flan-T5 32k) and tokenizers, and few small layers. With
MODES_TABLE=experiments/modes.md they write what they saw there.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ENV, ROOT, TIMEOUT, grammar_pairs, launch, shared_data
from typer.testing import CliRunner

from atlantis_ds.cli import app
from atlantis_ds.config.schema import Recipe, Train
from atlantis_ds.errors import InputError
from atlantis_ds.train.deepspeed_config import deepspeed_config

pytestmark = pytest.mark.ranks

TESTS = Path(__file__).parent
CONFIGS = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
STORAGE = "qlora, bnb_4bit_quant_storage"
MODES = [(mode, config) for mode in ("full", "lora", "qlora") for config in CONFIGS] + [(STORAGE, "zero3")]
FAMILIES = {"qwen2 tied": "Qwen2-0.5B", "qwen2 untied": "Qwen2-7B", "flan-t5 tied": "", "flan-t5 untied": ""}
NVME = "offload to NVMe needs a GPU: .*; use zero3_offload.json"
REFUSED = {
    ("qlora", "zero3"): "loaded whole on every GPU.*use zero2.json",
    ("qlora", "zero3_offload"): "4-bit weights cannot be offloaded; use zero2_offload.json",
    ("qlora", "zero3_nvme"): "4-bit weights cannot be offloaded; use zero2_offload.json",
    ("full", "zero3_nvme"): NVME,
    ("lora", "zero3_nvme"): NVME,
    (STORAGE, "zero3"): "4-bit weights under ZeRO-3 need a GPU; on CPU ranks use zero2.json",
}
# Freed memory goes back to the system at once, so that the peak is of what was held at one time.
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "262144"}

Outcomes = dict[tuple[str, str], dict[str, Any]]
Launch = Callable[[str, int, tuple[tuple[str, str], ...]], Outcomes]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models with real vocabularies and tokenizers."""
    configs, tokenizers = shared_data("model_configs"), shared_data("tokenizers")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    small_qwen = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["full_attention"] * 2,
    }
    small_t5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    paths = {}
    for name, source in FAMILIES.items():
        qwen = bool(source)
        config = AutoConfig.from_pretrained(configs / f"{source or 'flan-t5-small'}.config.json")
        for key, value in (small_qwen if qwen else {**small_t5, "dropout_rate": 0.0}).items():
            setattr(config, key, value)
        torch.manual_seed(0)
        lm: Any = (AutoModelForCausalLM if qwen else AutoModelForSeq2SeqLM).from_config(config, dtype=torch.float32)
        paths[name] = path = tmp_path_factory.mktemp(name.replace(" ", "-"))
        lm.save_pretrained(path)
        if name == "flan-t5 untied":  # transformers 5 builds it tied
            weights = {key: value.clone() for key, value in lm.state_dict().items() if "embed_tokens" not in key}
            weights["lm_head.weight"] = 0.05 * torch.randn_like(weights["lm_head.weight"])
            save_file(weights, path / "model.safetensors", {"format": "pt"})
        AutoTokenizer.from_pretrained(tokenizers / ("qwen2" if qwen else "flan-t5")).save_pretrained(path)
    return paths


@pytest.fixture(scope="session")
def table() -> Iterator[dict[str, dict[Any, str]]]:
    """Lines for experiments/modes.md: of the ``modes`` and of the ``loads``; written when all tests are done."""
    lines: dict[str, dict[Any, str]] = {"modes": {}, "loads": {}}
    yield lines
    if path := os.environ.get("MODES_TABLE"):
        Path(path).write_text(
            "\n".join([MODES_HEAD, *lines["modes"].values(), LOADS_HEAD, *lines["loads"].values()]) + "\n"
        )


MODES_HEAD = """# Modes

Written by `MODES_TABLE=experiments/modes.md pytest tests/test_modes.py`, on CPU ranks; each row is a test.

Random models with the real vocabularies (Qwen2 tied 151,936, untied 152,064; Flan-T5 32,128) and tokenizers, two
layers of width 64, fp32; 4 optimizer steps of 8 examples. Loss: mean of -log p(label) in nats. Peak: resident memory of
the largest rank above what was there before the row, loading included. QLoRA is bitsandbytes NF4 with double
quantisation; what needs a GPU is refused here with the line that a user sees.

| model | mode | DeepSpeed config | ranks | outcome | first loss | last loss | peak MiB |
|---|---|---|---|---|---|---|---|"""

LOADS_HEAD = """
## Built sharded at load

A Qwen2 of 119 M weights in 12 safetensors files, loaded under ZeRO-3 in fp32. Peak MiB above what was resident before:
`own` is memory of the process itself, `with files` counts the pages of the files that rank 0 maps and reads, too, which
the system may drop at any time. `share` is what a rank keeps. The C library was told to give freed memory back at once
(MALLOC_MMAP_THRESHOLD_); left to itself it keeps freed blocks, and 3 ranks were seen to show up to 691 MiB as resident.

| ranks | rank | whole model | share | own | with files |
|---|---|---|---|---|---|"""


def options(mode: str, config: str) -> dict[str, Any]:
    # AdamW turns the rounding of bf16 gradients near 0 into whole steps: compare modes in fp32.
    train = {"dtype": "float32", "learning_rate": 5e-3, "deepspeed": str(ROOT / "ds_configs" / f"{config}.json")}
    return train | ({"mode": "qlora", "bnb_4bit_quant_storage": "float32"} if mode == STORAGE else {"mode": mode})


@pytest.fixture(scope="session")
def outcomes(families: dict[str, Path], table: Any, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """``outcomes(family, ranks, modes)``: what modes_probe.py found for each mode, all of them in one launch."""

    @functools.cache
    def launch_once(family: str, ranks: int, modes: tuple[tuple[str, str], ...]) -> Outcomes:
        folder = tmp_path_factory.mktemp("modes")
        rows = [{"model": str(families[family]), "train": options(*mode)} for mode in modes]
        rows[modes.index(("full", "zero3"))]["save"] = str(families[family].with_name(f"{family}, trained"))
        (folder / "rows.json").write_text(json.dumps(rows))
        words = [TESTS / "modes_probe.py", folder / "rows.json", folder / "result.json"]
        done = launch("torchrun", ranks, *words, timeout=580, env=FREE_AT_ONCE)
        assert done.code == 0, done.out[-4000:]
        found = dict(zip(modes, json.loads((folder / "result.json").read_text())))
        for (mode, config), outcome in found.items():
            line = ["", family, mode, f"`{config}`", str(ranks)]
            if "refused" in outcome:
                line += [f"refused: {outcome['refused'].split('.json: ', 1)[-1]}", "", "", "", ""]
            else:
                losses = outcome["losses"]
                line += ["ran", f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{outcome['peak_mib']:.0f}", ""]
            table["modes"][family, ranks, mode, config] = " | ".join(line).strip()
        return found

    return launch_once


def check(mode: str, config: str, found: Outcomes) -> None:
    """Refused with the right line; or began as full fine-tuning did, and went the way of its own mode under ZeRO-0."""
    outcome = found[mode, config]
    if refused := outcome.get("refused"):
        import re

        assert re.search(REFUSED.get((mode, config), "nothing"), refused), refused
        return
    assert (mode, config) not in REFUSED
    losses, first = outcome["losses"], found["full", "zero0"]["losses"][0]
    assert all(0 < loss < 2 * first for loss in losses), losses
    if mode == "qlora":
        assert losses[0] == pytest.approx(first, rel=0.05) and losses[0] != first, "4-bit weights round"
    else:
        assert losses[0] == pytest.approx(first, rel=1e-5)
    if (mode, "zero0") in found:
        assert losses == pytest.approx(found[mode, "zero0"]["losses"], rel=0.01)
    if mode == "full":
        assert losses[-1] < 0.9 * first


QUICK = (
    *(("full", config) for config in ("zero0", "zero3", "zero3_offload", "zero3_nvme")),
    ("lora", "zero3"),
    *(("qlora", config) for config in ("zero2", "zero3")),
)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2 untied", "flan-t5 untied"])
def test_modes_on_two_ranks(family: str, outcomes: Launch) -> None:
    found = outcomes(family, 2, QUICK)
    for mode, config in QUICK:
        check(mode, config, found)


@pytest.mark.slow
@pytest.mark.parametrize("mode, config", MODES)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode(family: str, ranks: int, mode: str, config: str, outcomes: Launch) -> None:
    check(mode, config, outcomes(family, ranks, tuple(MODES)))


# Full logits of one pair at a time: nothing of how atlantis_ds batches, gathers or pads.
PLAIN = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM
lm, info = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
saved = load_file(sys.argv[1] + "/model.safetensors")
for name, parameter in {"shared.weight": lm.shared.weight, "lm_head.weight": lm.lm_head.weight}.items():
    assert torch.equal(parameter, saved[name]), name
assert not torch.equal(lm.lm_head.weight, lm.shared.weight)
scores = []
for prompt, label in json.loads(sys.argv[2]):
    logits = lm(input_ids=torch.tensor([prompt]), labels=torch.tensor([label])).logits[0].double()
    scores.append(logits.log_softmax(-1)[range(len(label)), label].sum().item())
assert not any(name.startswith("atlantis_ds") for name in sys.modules)
print(json.dumps(scores))
"""


@pytest.mark.slow
def test_untied_t5_saved_under_zero3_loads_with_plain_transformers(
    families: dict[str, Path], outcomes: Launch, tmp_path: Path
) -> None:
    from atlantis_ds.config.schema import Model
    from atlantis_ds.data.relation import SEMEVAL_LABELS
    from atlantis_ds.lm.encode import Encoder
    from atlantis_ds.lm.load import load_config, load_tokenizer

    trained = outcomes("flan-t5 untied", 2, QUICK)["full", "zero3"]["scores"]
    path = families["flan-t5 untied"].with_name("flan-t5 untied, trained")
    model = Model(model_name_or_path=str(path))
    encoder = Encoder(load_tokenizer(model), load_config(model), SEMEVAL_LABELS)
    pairs = grammar_pairs(encoder, 3, seed=4)
    questions = json.dumps([(pair.prompt, [*pair.label, pair.eos]) for pair in pairs])
    env = {name: value for name, value in ENV.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", PLAIN, str(path), questions]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == pytest.approx(trained, abs=1e-4)


@pytest.fixture(scope="module")
def large_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """476 MiB of random weights in files of 50 MB, no tensor larger than 12 MiB."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 9, "num_attention_heads": 8}
    path = tmp_path_factory.mktemp("large")
    Qwen2ForCausalLM(Qwen2Config(vocab_size=1024, num_key_value_heads=8, **shape)).save_pretrained(
        path, max_shard_size="50MB"
    )
    return path


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_no_rank_holds_the_whole_model_at_load(ranks: int, base_model: Path, large_model: Path, table: Any) -> None:
    done = launch("torchrun", ranks, TESTS / "loading_probe.py", base_model, large_model, env=FREE_AT_ONCE)
    assert done.code == 0, done.out[-4000:]
    lines = sorted(line.split() for line in done.out.splitlines() if line.startswith("LOADED"))
    assert len(lines) == ranks
    for _, rank, *sizes in lines:
        own, total, share, whole = map(int, sizes)
        table["loads"][ranks, rank] = f"| {ranks} | {rank} | {whole} | {share} | {own} | {total} |"
        assert whole > 450 and share == pytest.approx(whole / ranks, rel=0.01)
        assert share <= own < share + 40, "shards, and the tensor that is being cut"


# --- refused before any model is loaded


@pytest.mark.parametrize("mode, config", [mode for mode in REFUSED if mode[0] == "qlora"])
def test_refused_by_check(mode: str, config: str) -> None:
    with pytest.raises(InputError, match=REFUSED[mode, config]):
        deepspeed_config(Train.model_validate(options(mode, config)), 1)


@pytest.mark.parametrize("command", ["check", "run", "submit"])
def test_qlora_without_bitsandbytes_is_refused_before_anything_is_done(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers says so when it loads the model: in the queue, after the reference was to be trained."""
    monkeypatch.setattr(import_module("atlantis_ds.cli.app"), "find_spec", lambda name: None)
    recipe = str(ROOT / "recipes" / "conll04_qwen2_7b_lora.yaml")
    done = CliRunner().invoke(app, [command, recipe, "--set", "train.mode=qlora"])
    assert isinstance(done.exception, InputError) and "pip install bitsandbytes" in str(done.exception)


@pytest.mark.parametrize(
    "zero, reason",
    [
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "only under ZeRO-3.*use zero3_offload.json"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "use zero2_offload.json"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, "only to the CPU; use zero2_offload.json"),
        ({"stage": 4}, "stage 4 does not exist"),
    ],
)
def test_config_that_cannot_work(zero: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(InputError, match=reason):
        deepspeed_config(Train(deepspeed=str(path)), 1)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_is_filled(config: str) -> None:
    assert "auto" not in json.dumps(deepspeed_config(Train.model_validate(options("full", config)), 2))


def test_quant_storage_goes_with_qlora_and_dtype() -> None:
    models = {name: {"model_name_or_path": "x"} for name in ("large", "small")}
    tree = {"name": "x", "data": {"format": "grammar"}, "models": models}
    for train in ({"bnb_4bit_quant_storage": "bfloat16"}, {"mode": "qlora", "bnb_4bit_quant_storage": "float32"}):
        with pytest.raises(ValueError, match="bnb_4bit_quant_storage"):
            Recipe.model_validate(tree | {"train": train})
    deepspeed_config(Train.model_validate(options(STORAGE, "zero3")), 1)
