"""What comes out of a run loads with plain transformers and peft, and predicts what evaluation predicted."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ENV, ROOT, in_process
from hub_server import TOKEN, hub_on_loopback
from safetensors import safe_open

from atlantis_ds.data.examples import load_examples
from atlantis_ds.run_folder import RunFolder

pytestmark = pytest.mark.ranks

TEMPLATE = "{sentence}: {e2}"

# One prompt and label at a time, full logits: nothing of how atlantis_ds batches, gathers or pads.
PLAIN = """
import json, sys
sys.modules["atlantis_ds"] = None  # importing it now fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path, kind, questions = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
if kind == "adapter":
    from peft import AutoPeftModelForCausalLM as Auto
else:
    Auto = AutoModelForCausalLM
lm, tokenizer = Auto.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
end = lm.generation_config.eos_token_id
assert end == tokenizer.eos_token_id, end
answers = []
for prompt in questions["prompts"]:
    prompt_ids, scores = tokenizer(prompt + "\\n")["input_ids"], []
    for label in questions["labels"]:
        label_ids = [*tokenizer(label, add_special_tokens=False)["input_ids"], end]
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([[*prompt_ids, *label_ids]])).logits[0, len(prompt_ids) - 1 : -1]
        scores.append(logits.double().log_softmax(-1)[range(len(label_ids)), label_ids].sum().item())
    answers.append(questions["labels"][max(range(len(scores)), key=scores.__getitem__)])
json.dump(answers, open(sys.argv[4], "w"))
"""


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "atlantis_ds", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=ENV | environment, capture_output=True, text=True, timeout=240)


WORDS = {"apple": "fruit", "pear": "fruit", "oak": "tree", "elm": "tree", "cow": "animal", "dog": "animal"}
SWAPPED = {"fruit": "tree", "tree": "fruit", "animal": "animal"}


def write_rows(path: Path, size: int, seed: int, label_of: dict[str, str]) -> None:
    """Sentences whose second entity decides the label: a few steps are enough to predict more than one label."""
    draw = random.Random(seed)
    rows = []
    for number in range(size):
        first, second = draw.choice(["red", "old", "big", "wet", "shy"]), draw.choice(list(WORDS))
        sentence = f"<e1>{first}</e1> <e2>{second}</e2> number {seed} {number}"
        rows.append({"id": f"{seed}-{number}", "sentence": sentence, "label": label_of[second]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(place: Path, mode: str, base: Path, label_of: dict[str, str]) -> Path:
    """A recipe in this folder; its run goes to runs/tiny beside it."""
    for seed, (split, size) in enumerate({"train": 64, "dev": 12, "test": 24}.items()):
        write_rows(place / f"{split}.jsonl", size, seed, label_of)
    model = {"model_name_or_path": str(base)}
    recipe: dict[str, Any] = {
        "name": "tiny",
        "runs_dir": str(place / "runs"),
        "data": {"task": "relation", **{split: str(place / f"{split}.jsonl") for split in ("train", "dev", "test")}},
        "prompt": {"template": TEMPLATE},
        "models": {"large": model, "small": model, "reference": {"kind": "checkpoint", **model}},
        "weights": {"formula": "product", "temper": 0.5},
        "train": {
            "mode": mode,
            "deepspeed": str(ROOT / "ds_configs" / "zero3.json"),
            "dtype": "float32",
            "learning_rate": 1e-2,
            "num_train_epochs": 14,
            "eval_steps": 40,  # so that `best` and `last` differ
            "train_batch_size": 8,
            "per_device_train_batch_size": 4,
        },
        "arms": {"atlantis": {}, "ratio": {"weights": {"formula": "ratio", "temper": 0.6}}},
        "evaluate": {"checkpoint": "best"},
    }
    path = place / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train_on_two_ranks(place: Path, mode: str, base: Path, label_of: dict[str, str]) -> tuple[Path, RunFolder, str]:
    """Run a recipe through on 2 ranks under ZeRO-3: its file, its run folder and its mode."""
    path = write_recipe(place, mode, base, label_of)
    done = command("run", path, "--ranks", 2, "--force")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return path, RunFolder(place / "runs" / "tiny"), mode


@pytest.fixture(scope="module")
def full(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunFolder, str]:
    return train_on_two_ranks(tmp_path_factory.mktemp("full"), "full", base_model, WORDS)


@pytest.fixture(scope="module")
def lora(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunFolder, str]:
    """Adapters on a trained model, with two labels swapped: a lost adapter would show in the predictions."""
    recipe = write_recipe(tmp_path_factory.mktemp("base of lora"), "full", base_model, WORDS)
    in_process(recipe, "prepare")
    done = command("train", recipe, "--arm", "gold", "--set", "arms.gold={weights: {formula: uniform}}")
    assert done.returncode == 0, done.stderr[-3000:]
    label_of = {word: SWAPPED[label] for word, label in WORDS.items()}
    base = recipe.parent / "runs" / "tiny" / "model" / "gold" / "last"
    return train_on_two_ranks(tmp_path_factory.mktemp("lora"), "lora", base, label_of)


@pytest.fixture(params=[pytest.param("full", marks=pytest.mark.slow), "lora"])
def trained(request: pytest.FixtureRequest) -> tuple[Path, RunFolder, str]:
    run: tuple[Path, RunFolder, str] = request.getfixturevalue(request.param)
    return run


def plain_predictions(folder: RunFolder, model: Path, kind: str, place: Path) -> list[str]:
    """What a process without atlantis_ds predicts for the test split, from the saved model alone."""
    examples = load_examples(folder)
    prompts = examples.test.prompts.to_pylist()
    (place / "questions.json").write_text(json.dumps({"prompts": prompts, "labels": examples.labels}))
    environment = {name: value for name, value in ENV.items() if name != "PYTHONPATH"}
    script = [sys.executable, "-c", PLAIN, model, kind, place / "questions.json", place / "answers.json"]
    done = subprocess.run(list(map(str, script)), env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((place / "answers.json").read_text())


def evaluated(folder: RunFolder, arm: str) -> list[str]:
    return pq.read_table(folder.evaluation(arm) / "predictions.parquet")["predicted"].to_pylist()


def test_plain_libraries_predict_what_evaluation_did(trained: tuple[Path, RunFolder, str], tmp_path: Path) -> None:
    _, folder, mode = trained
    model = folder.model("atlantis") / "best"
    predicted = plain_predictions(folder, model, "adapter" if mode == "lora" else "model", tmp_path)
    assert predicted == evaluated(folder, "atlantis")
    gold = load_examples(folder).test.targets.to_pylist()
    # A model that always says the same, or an adapter that was lost, would prove nothing.
    assert sum(map(str.__eq__, predicted, gold)) > 0.7 * len(gold)


def test_export_predicts_what_evaluation_did(trained: tuple[Path, RunFolder, str], tmp_path: Path) -> None:
    recipe, folder, mode = trained
    out = tmp_path / "made" / "on the way"
    done = command("export", recipe, out, "--arm", "atlantis")
    assert done.returncode == 0, done.stderr
    assert not (out / "adapter_config.json").exists()
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in out.iterdir()
    }
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1, "who may read a model may read all of it"
    card = (out / "README.md").read_text()
    assert ("merged into its base model" in card) == (mode == "lora")
    assert "library_name: transformers" in card and "| macro-F1 |" in card
    assert plain_predictions(folder, out, "model", tmp_path) == evaluated(folder, "atlantis")
    assert [path.name for path in out.parent.iterdir()] == ["on the way"], "nothing is left beside it"

    before = sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir())
    again = command("export", recipe, out, "--arm", "atlantis")
    assert again.returncode == 2 and "exists already" in again.stderr
    assert sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir()) == before
    unknown = command("export", recipe, tmp_path / "other", "--arm", "nobody")
    assert unknown.returncode == 2 and "train --arm nobody" in unknown.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.slow  # the client waits half a minute before it gives an upload up
def test_export_is_pushed_to_a_hub(lora: tuple[Path, RunFolder, str], tmp_path: Path) -> None:
    recipe, out = lora[0], tmp_path / "merged"
    with hub_on_loopback() as hub:
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        for name, token, said in (("me/tiny", "hf_wrong", "Invalid username"), ("other/tiny", TOKEN, "rights to")):
            refused = command("export", recipe, out, "--push-to", name, **online | {"HF_TOKEN": token})
            assert refused.returncode == 2 and refused.stderr.startswith(f"error: --push-to {name}: the hub says: ")
            assert said in refused.stderr and len(refused.stderr.splitlines()) == 1, refused.stderr
            assert not out.exists() and not hub.repositories
        unknown = command("export", recipe, out, "--arm", "nobody", "--push-to", "me/tiny", **online)
        existing = command("export", recipe, tmp_path, "--push-to", "me/tiny", **online)
        for refused in (unknown, existing):
            assert refused.returncode == 2 and not hub.repositories, "no empty repository for a slip of the pen"
        done = command("export", recipe, out, "--push-to", "me/tiny", **online)
        assert done.returncode == 0, done.stderr
        assert f"pushed: {hub.address}/me/tiny" in done.stdout
        assert hub.repositories["me/tiny"] == {file.name: file.read_bytes() for file in out.iterdir()}
        assert hub.private["me/tiny"] and len(hub.commits) == 1 and len(hub.large) == 1
        # A fault on the way loses nothing: the folder is there, and the line says how to send it.
        hub.refuse_uploads, hub.large = True, {}
        failed = command("export", recipe, tmp_path / "again", "--arm", "ratio", "--push-to", "me/tiny", **online)
        assert failed.returncode == 1 and f"hf upload me/tiny {tmp_path / 'again'}" in failed.stderr, failed.stderr
        assert (tmp_path / "again" / "model.safetensors").is_file() and len(hub.commits) == 1
    gone = command("export", recipe, tmp_path / "off", "--push-to", "me/tiny", **online)
    assert gone.returncode == 2 and gone.stderr.startswith("error: --push-to me/tiny: the hub says: "), gone.stderr
    offline = command("export", recipe, tmp_path / "off", "--push-to", "me/tiny")
    assert offline.returncode == 2 and "offline" in offline.stderr.lower() and not (tmp_path / "off").exists()


def test_no_saved_tensor_is_empty(trained: tuple[Path, RunFolder, str]) -> None:
    _, folder, mode = trained
    for checkpoint in ("last", "best"):
        (file,) = (folder.model("ratio") / checkpoint).glob("*.safetensors")
        assert file.name == ("adapter_model.safetensors" if mode == "lora" else "model.safetensors")
        with safe_open(file, framework="pt") as tensors:
            shapes = {name: tensors.get_tensor(name).shape for name in tensors.keys()}  # noqa: SIM118
        assert shapes and all(shape.numel() for shape in shapes.values())
        if mode == "lora":
            # Both halves for each of the 7 linear layers in each of the 2 blocks, and nothing of the base model.
            assert len(shapes) == 2 * 7 * 2 and all(".lora_" in name for name in shapes)


def test_card_states_what_the_model_is(trained: tuple[Path, RunFolder, str]) -> None:
    _, folder, mode = trained
    weights = json.loads(folder.weights_info.read_text())
    for arm in ("atlantis", "ratio"):
        training = json.loads((folder.model(arm) / "training.json").read_text())
        metrics = json.loads((folder.evaluation(arm) / "metrics.json").read_text())
        best, last = ((folder.model(arm) / name / "README.md").read_text() for name in ("best", "last"))
        for card in (best, last):
            assert f"library_name: {'peft' if mode == 'lora' else 'transformers'}" in card
            assert load_examples(folder).train_fingerprint in card and training["fingerprint"] in card
            assert f"| formula | `{'product' if arm == 'atlantis' else 'ratio'}` |" in card
            assert f"`temper: {0.5 if arm == 'atlantis' else 0.6}`" in card
            assert yaml.safe_load(card.split("```yaml")[1].split("```")[0])["train"]["mode"] == mode
            assert f"transformers {training['versions']['transformers']}" in card
        assert f"| macro-F1 | {metrics['macro_f1']:.4f} |" in best
        assert "official" not in best.split("## Scores")[1].split("## Use")[0], "this task has no official score"
        assert "Not evaluated." in last and "macro-F1" not in last, "the scores are those of another checkpoint"
        assert f"| dev loss | {training['best_loss']:.4f} (" in best
        assert f"| dev loss | {training['dev_loss']:.4f} (" in last
    ess = f"| effective sample size | {weights['ess']:.1f} ("
    assert ess in (folder.model("atlantis") / "last" / "README.md").read_text()
    assert ess not in (folder.model("ratio") / "last" / "README.md").read_text()
