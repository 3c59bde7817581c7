"""`train.lora_layers`: adapters on the last layers, the layers below them read once an example."""

from pathlib import Path

import pytest
from conftest import ROOT, WriteRecipe, events, launch, refuse, succeed
from safetensors import safe_open

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = {"train.mode": "lora", "train.deepspeed": str(ROOT / "ds_configs" / "zero2.json")}


def losses(recipe: Path, kind: str) -> list[float]:
    return [event["loss"] for event in events(recipe.parent / "run", kind, "sft")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_trains_as_with_the_same_adapters_behind_all_layers(
    ranks: int, tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """The same adapters by their names, where every step reads all layers."""
    upper = [f"model.layers.1.{part}.{name}" for part in ("self_attn", "mlp") for name in NAMES]
    changes = {
        "whole": {"train.lora_target_modules": upper},
        "lower layers once": {"train.lora_layers": 1},
    }
    recipes = {name: tiny_recipe(tmp_path / name, LORA | change) for name, change in changes.items()}
    for recipe in recipes.values():
        succeed("local", 1, "prepare", recipe)
        succeed("local", ranks, "train", recipe, "--arm", "sft")
    for kind in ("train", "dev"):
        expected, found = (losses(recipe, kind) for recipe in recipes.values())
        assert len(expected) == (10 if kind == "train" else 2)
        assert found == pytest.approx(expected, rel=1e-5) and expected[-1] < expected[0]
    adapters = [recipe.parent / "run/model/sft/last/adapter_model.safetensors" for recipe in recipes.values()]
    names = [sorted(safe_open(file, framework="pt").keys()) for file in adapters]
    assert names[0] == names[1] and len(names[0]) == 2 * len(NAMES) and all("layers.1." in name for name in names[0])
    out = succeed("local", 1, "evaluate", recipes["lower layers once"], "--arm", "sft")
    assert "macro10" in out


def test_refusals(tiny_recipe: WriteRecipe, encoder_decoder: Path, tmp_path: Path) -> None:
    t5 = {"models.large.model_name_or_path": str(encoder_decoder)}
    cases = (
        ({"train.lora_layers": 1}, ("lora_layers", "mode: lora")),
        ({"train.mode": "lora", "train.lora_layers": 1}, ("zero3.json", "train.lora_layers", "zero2.json")),
        ({**LORA, "train.lora_layers": 3}, ("train.lora_layers: 3", "2 layers")),
        ({**LORA, "train.lora_layers": 1, "train.lora_target_modules": ["query"]}, ("query", "no such modules")),
        ({**LORA, "train.lora_layers": 1, **t5}, ("train.lora_layers", "encoder")),
    )
    for number, (changes, words) in enumerate(cases):
        recipe = tiny_recipe(tmp_path / str(number), changes)
        done = launch("local", 1, "prepare", recipe)
        if done.code == 0:
            done = launch("local", 1, "train", recipe, "--arm", "sft")
        refuse(done, *words)
        assert not (tmp_path / str(number) / "run" / "model").exists()
