"""Scoring on real ranks: one model sharded over them, adapters on one base, a reference trained on gold labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, WriteRecipe, events, in_process, succeed

from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.config.schema import Model
from atlantis_ds.data.examples import load_examples
from atlantis_ds.data.prepare import prepare
from atlantis_ds.errors import InputError
from atlantis_ds.lm.load import load_model
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder

pytestmark = pytest.mark.ranks

SCORES = ["logp_large", "logp_small", "logp_reference"]


def scores(run: Path) -> dict[str, np.ndarray]:
    shards = sorted((run / "scores").glob("shard-*.parquet"))
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows) == 37
    return {name: np.array([row[name] for row in rows]) for name in SCORES}


@pytest.fixture(scope="module")
def wide_t5(encoder_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with weights of more than 100,000 numbers each: smaller ones ZeRO-3 gathers once and keeps."""
    import torch
    from transformers import AutoConfig, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("wide") / "t5"
    shutil.copytree(encoder_decoder, folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    config.update({"d_model": 512, "d_kv": 128, "d_ff": 1024})
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora_run(tiny_recipe: WriteRecipe, wide_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5, a Qwen2, and two cross-fitted LoRA references on that Qwen2, scored on 2 ranks."""
    folder = tmp_path_factory.mktemp("lora")
    changes = {
        "models.large": {"model_name_or_path": str(wide_t5)},
        "models.reference": {"kind": "finetuned", "folds": 2},
        "train.mode": "lora",
        "train.deepspeed": str(ROOT / "ds_configs" / "zero0.json"),
        "train.learning_rate": 0.05,
        "score.shard_size": 15,  # 3 shards, unequal in length
    }
    recipe = tiny_recipe(folder, changes)
    prepare(load_recipe(recipe), RunFolder(folder / "run"))
    succeed("local", 1, "train", recipe, "--arm", "reference")
    out = succeed("torchrun", 2, "score", recipe)
    # Said once for each base: the references are adapters on the small model.
    assert [line.split(":")[0] for line in out.splitlines() if "a replica on each rank (it needs 0.0" in line] == [
        "score large",
        "score small",
    ]
    return folder


def test_adapters_on_one_base_score_as_separate_models(lora_run: Path, base_model: Path) -> None:
    import torch

    from atlantis_ds.lm.encode import Encoder
    from atlantis_ds.lm.likelihood import score_pairs
    from atlantis_ds.lm.load import load_config, load_scorer, load_tokenizer

    run = RunFolder(lora_run / "run")
    examples = load_examples(run)
    alone = []
    for path in (base_model, *(run.model(f"reference-{fold}-of-2") / "last" for fold in (0, 1))):
        model = Model(model_name_or_path=str(path))
        encoder = Encoder(load_tokenizer(model), load_config(model), examples.labels)
        lm = load_scorer(model, "float32", torch.device("cpu"))  # merges the adapter
        pairs = list(encoder.pairs(examples.train.prompts.to_pylist(), examples.train.targets.to_pylist()))
        alone.append(score_pairs(lm, pairs, encoder.tokenizer.eos_token_id, 256)[:, 0].numpy())
    base, *folds = alone
    of = examples.train.folds(2)
    assert np.abs(folds[0] - folds[1]).mean() > 0.1 and np.abs(folds[0] - base).mean() > 0.1
    found = scores(run.root)
    np.testing.assert_allclose(found["logp_small"], base, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["logp_reference"], np.where(of == 0, *folds), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_sharded_scores_equal_those_of_replicas(dtype: str, lora_run: Path, tmp_path: Path) -> None:
    """3 shards on 2 ranks: a rank short of a forward would hang the other one."""
    recipe, found = lora_run / "recipe.yaml", {}
    for how in ("replica", "zero3"):
        run = tmp_path / how / "run"
        shutil.copytree(lora_run / "run", run)
        if (how, dtype) != ("replica", "float32"):
            shutil.rmtree(run / "scores")
            before = len(events(run, "score"))
            choice = [f"score.sharding={how}", f"score.dtype={dtype}", f"runs_dir={tmp_path / how}"]
            succeed("torchrun", 2, "score", recipe, *(word for key in choice for word in ("--set", key)))
            new = events(run, "score")[before:]
            assert len(new) == 8 and {event["sharding"] for event in new} == {how}
        found[how] = scores(run)
    for name, values in found["replica"].items():
        assert values.std() > 1
        # In bf16 the replica too differs by this much with the batch that an example is in.
        np.testing.assert_allclose(found["zero3"][name], values, atol=1e-4 if dtype == "float32" else 0.1, rtol=0)


CHOOSE = """
import sys
from atlantis_ds.cluster.ranks import end_rank, start_ranks, stop_ranks
from atlantis_ds.lm.frozen import Frozen
from atlantis_ds.config.schema import Model, Score
ranks = start_ranks(1)
frozen = Frozen(Score(), ranks)
small, huge = (Model(model_name_or_path=path) for path in sys.argv[1:])
chosen = [frozen.choose(small, "small"), frozen.choose(huge, "huge")]
sys.stdout.write(f"chosen: {chosen}\\n")
stop_ranks()
end_rank()
"""


def test_auto_shards_what_does_not_fit(base_model: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.mkdir()
    shape = json.loads((base_model / "config.json").read_text())
    (huge / "config.json").write_text(json.dumps({**shape, "vocab_size": 10**11}))
    script = tmp_path / "choose.py"
    script.write_text(CHOOSE)
    out = succeed("torchrun", 2, script, base_model, huge)
    assert "score small: a replica on each rank (it needs 0.00 GiB, " in out
    assert "score huge: sharded over the ranks by ZeRO-3 (it needs 14901.16 GiB, " in out  # 1.25 x 10^11 x 32 x 4 bytes
    assert out.count("chosen: [False, True]") == 2


def test_a_model_file_that_was_cut_off_is_refused(base_model: Path, tmp_path: Path) -> None:
    shutil.copytree(base_model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"model {tmp_path / 'cut'}: cannot be loaded"):
        load_model(Model(model_name_or_path=str(tmp_path / "cut")), "float32")


def test_reference_on_the_gold_split(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    from atlantis_ds.train.jobs import reference_jobs

    # As people write it: on, yes and no are booleans to YAML 1.1.
    on_dev = "models.reference={kind: finetuned, on: dev, folds: 1}"
    recipe, folder = load_recipe(tiny_recipe(tmp_path), [on_dev]), RunFolder(tmp_path / "run")
    examples = prepare(recipe, folder)
    (job,) = reference_jobs(Run(recipe, folder, Ranks.alone()), examples)
    (part,) = job.parts
    assert (part.split, part.column) == ("dev", "gold") and part.rows.tolist() == list(range(len(examples.dev)))
    for wrong, said in (
        ({"on": "dev", "folds": 2}, "`on: dev` needs `folds: 1`"),
        ({"folds": 1, "rounds": 2}, "`rounds` needs kind: finetuned and `folds` of 2 or more"),
        ({"chat_template": True}, "`chat_template` is only for kind: checkpoint"),
        ({"kind": "checkpoint", "model_name_or_path": "x", "on": "dev"}, "`on` is only for kind: finetuned"),
    ):
        with pytest.raises(InputError, match=said):
            load_recipe(tiny_recipe(tmp_path / "wrong", {"models.reference": wrong}))


def test_folds_by_group_leave_whole_groups_out(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    from atlantis_ds.config.schema import Reference
    from atlantis_ds.reference import judged_by_others
    from atlantis_ds.train.jobs import reference_jobs

    rows = [
        {"text": f"sentence {at}", "label": ("a", "b")[at // 8 % 2], "rule": f"rule {at // 8}" if at < 64 else None}
        for at in range(80)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"task": "classification", "train": str(tmp_path / "train.jsonl"), "columns": {"group": "rule"}}
    by_group = {"kind": "finetuned", "folds": 4, "folds_by": "group"}
    recipe = load_recipe(tiny_recipe(tmp_path, {"data": data, "models.reference": by_group}))
    folder = RunFolder(tmp_path / "run")
    examples = prepare(recipe, folder)
    jobs = reference_jobs(Run(recipe, folder, Ranks.alone()), examples)
    assert [job.name for job in jobs] == [f"reference-{fold}-of-4-by-group" for fold in range(4)]
    groups = np.array([group or "" for group in examples.train.groups.to_pylist()])
    left_out = [np.setdiff1d(np.arange(80), job.parts[0].rows) for job in jobs]
    assert sorted(np.concatenate(left_out).tolist()) == list(range(80))
    for job, rows_of_fold in zip(jobs, left_out):
        assert not ({*groups[job.parts[0].rows]} & {*groups[rows_of_fold]}) - {""}
        assert len({*groups[rows_of_fold]} - {""}) == 2
    judged = judged_by_others(recipe.models.reference, examples.train)
    assert judged is not None and judged.tolist() == [group != "" for group in groups]
    assert judged_by_others(Reference(folds=4), examples.train) is None
    # A rule that is also the second of other rows was seen by their references.
    both = pa.array([f"{group}; rule 7" if group == "rule 0" else group or None for group in groups])
    train = replace(examples.train, table=examples.train.table.set_column(4, "group", both))
    rows, numbers, names = train.memberships
    shared = judged_by_others(recipe.models.reference, train)
    assert shared is not None and not shared[numbers == names.index("rule 7")].any()
    assert shared[numbers == names.index("rule 3")].all() and len(rows) == 88
    without = data | {"columns": {}}
    recipe = load_recipe(
        tiny_recipe(tmp_path / "b", {"data": without, "models.reference": by_group, "prompt.template": "{text}"})
    )
    with pytest.raises(InputError, match=r"no example has a group; set the column with data\.columns\.group"):
        reference_jobs(
            Run(recipe, RunFolder(tmp_path / "b" / "run"), Ranks.alone()),
            prepare(recipe, RunFolder(tmp_path / "b" / "run")),
        )


def test_a_reference_that_was_trained_on_other_folds_scores_nothing(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Groups do not change the training examples, so `prepare` accepts new ones: the folds of old references are not
    those of the examples any more."""
    rows, file = [{"text": f"sentence {at}", "label": "ab"[at % 2]} for at in range(16)], tmp_path / "train.jsonl"

    def write(rule: Callable[[int], int]) -> None:
        file.write_text("\n".join(json.dumps({**row, "group": f"rule {rule(at)}"}) for at, row in enumerate(rows)))

    changes = {
        "data": {"task": "classification", "train": str(file)},
        "models.reference": {"kind": "finetuned", "folds": 2, "folds_by": "group", "num_train_epochs": 1},
    }
    recipe = tiny_recipe(tmp_path, changes)
    write(lambda at: at % 4)
    in_process(recipe, "prepare", "reference")
    write(lambda at: at // 4)
    in_process(recipe, "prepare")
    with pytest.raises(InputError, match=r"reference-0-of-2-by-group: trained with other data or settings than this"):
        in_process(recipe, "score")
    write(lambda at: at % 4)
    in_process(recipe, "prepare", "score")
    changes["models.reference"] = {**changes["models.reference"], "num_train_epochs": 2}
    with pytest.raises(InputError, match=r"reference-0-of-2-by-group: trained with other data or settings than this"):
        in_process(tiny_recipe(tmp_path, changes), "score")


@pytest.mark.slow
def test_second_round_trains_on_the_weights_of_the_first(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    from atlantis_ds.train.jobs import reference_jobs

    reference = {"kind": "finetuned", "folds": 2, "num_train_epochs": 3, "learning_rate": 0.01}
    weights = {"formula": "reference", "scope": "per_label", "power": 2, "clip": [0, 1.6]}
    one = tiny_recipe(tmp_path / "one", {"models.reference": reference, "weights": weights})
    two = tiny_recipe(tmp_path / "two", {"models.reference": reference | {"rounds": 2}})
    for recipe in (one, two):
        prepare(load_recipe(recipe), RunFolder(recipe.parent / "run"))
    for stage in ("train", "score", "merge"):
        succeed("torchrun", 2, stage, one, *(["--arm", "reference"] if stage == "train" else []))
    out = succeed("torchrun", 2, "train", two, "--arm", "reference")
    run, earlier = RunFolder(tmp_path / "two" / "run"), RunFolder(tmp_path / "two" / "run", round=1)
    names = [f"reference-{fold}-of-2{which}" for fold in (0, 1) for which in ("", "-round-1")]
    assert sorted(path.name for path in (run.root / "model").iterdir()) == names
    assert not run.weights.exists() and not run.scores.exists()

    table, alone = (pq.read_table(path) for path in (earlier.weights, RunFolder(tmp_path / "one" / "run").weights))
    assert table.equals(alone), "the first round is a run of one round"
    weight = dict(zip(*table.select(["id", "weight"]).to_pydict().values()))
    this, examples = Run(load_recipe(two), run, Ranks.alone()), load_examples(run)
    for fold, job in enumerate(reference_jobs(this, examples)):
        seen = np.flatnonzero(examples.train.folds(2) != fold)
        expected = np.array([weight[examples.train.ids[row].as_py()] for row in seen.tolist()])
        assert expected.std() > 0.1 and job.parts[0].rows.tolist() == seen.tolist()
        np.testing.assert_array_equal(job.weights, expected / expected.mean())
        done = json.loads((run.model(job.name) / "training.json").read_text())
        assert done["fingerprint"] == job.fingerprint(this, examples), "trained on other weights"
        assert done["weights"]["options"]["clip"] == [0, 1.6]

    again = succeed("torchrun", 2, "train", two, "--arm", "reference")
    assert again.count("already finished") == 4 and "already finished" not in out
    succeed("torchrun", 2, "score", two)
    assert not np.allclose(scores(run.root)["logp_reference"], scores(earlier.of_round)["logp_reference"], atol=0.01)
