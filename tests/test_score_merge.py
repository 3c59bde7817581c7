"""Scoring and merging in one process, on tiny random models: resuming, refusing, weights."""

import json
import os
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlantis_ds import stages
from atlantis_ds.cluster.claim import claimed
from atlantis_ds.cluster.ranks import Ranks, start_ranks, stop_ranks
from atlantis_ds.config.schema import Model, Recipe
from atlantis_ds.data.examples import load_examples
from atlantis_ds.data.prepare import prepare
from atlantis_ds.data.relation import SEMEVAL_LABELS
from atlantis_ds.demo.scratch import build_scratch_model
from atlantis_ds.errors import InputError, RunError
from atlantis_ds.files import read_json, read_table, table_info, wait_for_files, write_table
from atlantis_ds.lm.encode import Encoded, Encoder
from atlantis_ds.lm.likelihood import score_pairs
from atlantis_ds.lm.load import dtype_on, load_config, load_model, load_tokenizer
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.status import _passes
from atlantis_ds.weights import arms, shards
from atlantis_ds.weights import merge as merge_module
from atlantis_ds.weights import score as score_module
from atlantis_ds.weights.score import assign_shards

pytestmark = pytest.mark.ranks

TRAIN, SHARD = 44, 10
SHARDS = [f"shard-{i:05d}-of-00005.parquet" for i in range(5)]


def score(recipe, folder, ranks):
    score_module.score(Run(recipe, folder, ranks))


def merge(recipe, folder):
    return merge_module.merge(Run(recipe, folder, Ranks.alone()))


def load_scores(recipe, folder):
    return shards.load_scores(Run(recipe, folder, Ranks.alone()), load_examples(folder))


def arm_weights(recipe, folder, arm):
    return arms.arm_weights(Run(recipe, folder, Ranks.alone()), load_examples(folder), arm)


def tiny_recipe(models, **changes):
    tree = {
        "name": "r",
        "data": {"format": "grammar", "train_size": TRAIN, "dev_size": 2, "test_size": 2, "noise": {"rate": 0.2}},
        "models": models,
        "score": {"shard_size": SHARD, "tokens_per_batch": 256},
        "arms": {
            "sft": {"weights": {"formula": "uniform"}},
            "atlantis": {},
            "ratio": {"weights": {"formula": "ratio"}},
        },
    }
    return Recipe.model_validate({**tree, **changes})


@pytest.fixture(scope="module")
def ranks():
    before = dict(os.environ)
    yield start_ranks(1.0)
    stop_ranks()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of other shapes, not trained, with weights wide enough that they disagree."""
    root = tmp_path_factory.mktemp("models")
    shapes = {"large": (32, 2), "small": (16, 1), "reference": (24, 2)}
    named = {}
    for name, (hidden, layers) in shapes.items():
        shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 2, "pretrain_epochs": 0}
        recipe = tiny_recipe({"large": {"scratch": shape}, "small": {"scratch": shape}})
        folder = RunFolder(root / name)
        build_scratch_model(recipe, folder, "large", list(SEMEVAL_LABELS), False)
        path = str(folder.base_model("large"))
        model = load_model(Model(model_name_or_path=path), "float32")
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(10)
        model.save_pretrained(path)
        named[name] = {"model_name_or_path": path}
    return {**named, "reference": {"kind": "checkpoint", **named["reference"]}}


@pytest.fixture(scope="module")
def scored(models, ranks, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    recipe = tiny_recipe(models)
    prepare(recipe, folder)
    score(recipe, folder, ranks)
    return recipe, folder


@pytest.fixture
def run(scored, tmp_path):
    """A copy of a run with all its scores."""
    recipe, folder = scored
    shutil.copytree(folder.root, tmp_path / "run")
    return recipe, RunFolder(tmp_path / "run")


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.scores.glob("*.parquet")}


def passes_run(folder, since):
    """(model, examples) of each pass that the log tells of after its first ``since`` lines."""
    events = [json.loads(line) for line in folder.log.read_text().splitlines()[since:]]
    return [(event["model"], event["examples"]) for event in events if event["event"] == "score"]


def log_lines(folder):
    return len(folder.log.read_text().splitlines())


def change(path, edit):
    """Rewrite a shard with another content under its own fingerprint."""
    table, info = read_table(path)
    write_table(path, edit(table), info)


def set_value(table, column, row, value):
    values = table[column].to_pylist()
    values[row] = value
    return table.set_column(table.column_names.index(column), column, pa.array(values, table[column].type))


# --- scores


def test_shards_hold_the_log_likelihoods_of_each_model(scored, models):
    folder = scored[1]
    examples = load_examples(folder)
    assert sorted(times(folder)) == SHARDS
    assert not list((folder.scores / "parts").iterdir())
    assert sorted(path.name for path in folder.scores.iterdir()) == ["parts", "scores.json", *SHARDS]
    table = pa.concat_tables([pq.read_table(folder.scores / name) for name in SHARDS])
    train = examples.train
    assert table["id"].to_pylist() == train.ids.to_pylist()
    for name in ("large", "small", "reference"):
        source = Model(model_name_or_path=models[name]["model_name_or_path"])
        encoder = Encoder(load_tokenizer(source), load_config(source), examples.labels)
        pairs = list(encoder.pairs(train.prompts.to_pylist(), train.targets.to_pylist()))
        alone = score_pairs(load_model(source, "float32").eval(), pairs, 0, 1).numpy()
        assert table[f"logp_{name}"].type == table[f"eos_{name}"].type == pa.float64()
        np.testing.assert_allclose(table[f"logp_{name}"].to_numpy(), alone[:, 0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(table[f"eos_{name}"].to_numpy(), alone[:, 1], rtol=0, atol=1e-4)
        assert table[f"tokens_{name}"].to_pylist() == [len(pair.label) for pair in pairs]
        # All labels of the set, in its order, the third of them checked against plain pairs.
        every = np.array(table[f"label_set_logp_{name}"].to_pylist())
        assert every.shape == (TRAIN, len(examples.labels))
        own = [examples.labels.index(label) for label in train.targets.to_pylist()]
        assert (every[range(TRAIN), own] == table[f"logp_{name}"].to_numpy()).all()
        third = list(encoder.pairs(train.prompts.to_pylist(), [examples.labels[2]] * TRAIN))
        expected = score_pairs(load_model(source, "float32").eval(), third, 0, 1)[:, 0].numpy()
        np.testing.assert_allclose(every[:, 2], expected, rtol=0, atol=1e-4)
        assert table[f"label_set_tokens_{name}"][5].as_py()[2] == len(third[5].label)
        assert alone[:, 0].std() > 1  # else one example's score could stand for another's


def test_nothing_is_scored_twice(run, ranks):
    recipe, folder = run
    before, lines = times(folder), log_lines(folder)
    score(recipe, folder, ranks)
    assert times(folder) == before
    assert passes_run(folder, lines) == []


def test_only_missing_and_broken_shards_are_scored(run, ranks):
    recipe, folder = run
    before, lines = times(folder), log_lines(folder)
    kept = {name: read_table(folder.scores / name)[0] for name in SHARDS}
    (folder.scores / SHARDS[1]).unlink()
    cut = folder.scores / SHARDS[4]  # the last shard: 4 examples
    cut.write_bytes(cut.read_bytes()[:-100])
    score(recipe, folder, ranks)
    after = times(folder)
    assert {name for name in SHARDS if before[name] != after[name]} == {SHARDS[1], SHARDS[4]}
    assert passes_run(folder, lines) == [("large", 14), ("small", 14), ("reference", 14)]
    assert all(read_table(folder.scores / name)[0].equals(kept[name]) for name in SHARDS)


def test_killed_between_models_goes_on_with_what_is_missing(scored, ranks, tmp_path, monkeypatch):
    recipe, whole = scored
    folder = RunFolder(tmp_path)
    prepare(recipe, folder)
    go = score_module._score_pass

    def killed(*args):
        scoring = next(arg for arg in args if isinstance(arg, score_module.Pass))
        if scoring.name == "reference":
            raise KeyboardInterrupt
        return go(*args)

    monkeypatch.setattr(score_module, "_score_pass", killed)
    with pytest.raises(KeyboardInterrupt):
        score(recipe, folder, ranks)
    monkeypatch.undo()
    parts = folder.scores / "parts"
    assert len(list(parts.iterdir())) == 10 and not times(folder)
    with pytest.raises(InputError, match=r"shard-00000-of-00005.parquet: missing \(5 of 5"):
        merge(recipe, folder)
    (parts / "shard-00003-of-00005.small.parquet").unlink()
    broken = parts / "shard-00004-of-00005.large.parquet"
    broken.write_bytes(broken.read_bytes()[:200])
    lines = log_lines(folder)
    score(recipe, folder, ranks)
    assert passes_run(folder, lines) == [("large", 4), ("small", 10), ("reference", TRAIN)]
    assert not list(parts.iterdir())
    for name in SHARDS:
        assert read_table(folder.scores / name)[0].equals(read_table(whole.scores / name)[0])
        assert table_info(folder.scores / name) == table_info(whole.scores / name)


def test_parts_of_other_nodes_may_be_seen_late(scored, ranks, tmp_path, monkeypatch):
    """As over NFS, where a node shows a folder as it was up to a minute ago."""
    recipe, whole = scored
    folder = RunFolder(tmp_path)
    prepare(recipe, folder)
    join, late = score_module._join_parts, []

    def join_late(folder, passes, shards, shard, manifest):
        if shard == 1:
            part = folder.scores / "parts" / "shard-00001-of-00005.small.parquet"
            part.rename(tmp_path / "unseen")
            late.append(threading.Timer(1.5, (tmp_path / "unseen").rename, [part]))
            late[0].start()
        join(folder, passes, shards, shard, manifest)

    monkeypatch.setattr(score_module, "_join_parts", join_late)
    score(recipe, folder, ranks)
    assert late and [read_table(folder.scores / name)[0] for name in SHARDS] == [
        read_table(whole.scores / name)[0] for name in SHARDS
    ]
    with pytest.raises(RunError, match="not visible here after"):
        wait_for_files([folder.scores / "parts" / "never.parquet"], 0.5)
    assert not list((folder.scores / "parts").iterdir()), "looking again leaves nothing"


def test_two_jobs_do_not_prepare_one_run_at_once(models, ranks, tmp_path):
    """The second would remove what the first has read so far."""
    this = Run(tiny_recipe(models), RunFolder(tmp_path / "run"), ranks)
    with claimed(this.folder, "prepare", ranks):
        with pytest.raises(InputError, match=r"prepare\.json: another job is doing this work \(host "):
            stages.prepare(this)
        assert not this.folder.examples.exists()
    bad = Run(tiny_recipe(models, data={"format": "spert", "train": "none.json"}), RunFolder(tmp_path / "bad"), ranks)
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        stages.prepare(bad)
    assert not bad.folder.root.exists(), "bad input leaves no folder behind"


def passes_told(folder):
    """As `status` counts them."""
    return _passes(read_json(folder.scores / "scores.json")["inputs"])


def test_a_model_named_twice_reads_the_examples_once(models, scored, ranks, tmp_path):
    recipe, folder = tiny_recipe({**models, "small": models["large"]}), RunFolder(tmp_path)
    prepare(recipe, folder)
    score(recipe, folder, ranks)
    assert passes_run(folder, 0) == [("large", TRAIN), ("reference", TRAIN)]
    assert passes_told(folder) == 2 and passes_told(scored[1]) == 3
    assert not list((folder.scores / "parts").iterdir())
    for name in SHARDS:
        table, other = read_table(folder.scores / name)[0], read_table(scored[1].scores / name)[0]
        assert table.column_names == other.column_names
        for column in ("logp", "eos", "tokens", "label_set_logp"):
            assert table[f"{column}_small"].equals(other[f"{column}_large"])
    merge(recipe, folder)
    # Beside it, a reference that was never trained is the small base.
    untrained = {"kind": "checkpoint", **models["small"]}
    recipe, folder = tiny_recipe({**models, "reference": untrained}), RunFolder(tmp_path / "untrained")
    prepare(recipe, folder)
    score(recipe, folder, ranks)
    assert passes_run(folder, 0) == [("large", TRAIN), ("small", TRAIN)]
    assert passes_told(folder) == 2
    scores = load_scores(recipe, folder)
    np.testing.assert_array_equal(scores.reference, scores.small)


def test_scores_of_other_inputs_are_not_mixed(run, models, ranks):
    folder = run[1]
    (folder.scores / SHARDS[0]).unlink()
    other = tiny_recipe(models, score={"shard_size": SHARD, "tokens_per_batch": 128})
    with pytest.raises(InputError, match=r"different: tokens_per_batch\)"):
        score(other, folder, ranks)
    swapped = tiny_recipe({**models, "small": models["large"]})
    with pytest.raises(InputError, match=r"different: model small\)"):
        score(swapped, folder, ranks)
    assert sorted(times(folder)) == SHARDS[1:]


def test_one_run_has_one_precision(run, models, ranks):
    """`auto` takes what shards are there have, and else what the device is best at."""
    recipe, folder = run
    assert recipe.score.dtype == "auto" and read_json(folder.scores / "scores.json")["inputs"]["dtype"] == "float32"
    narrow = tiny_recipe(models, score={"shard_size": SHARD, "tokens_per_batch": 256, "dtype": "bfloat16"})
    with pytest.raises(InputError, match=r"different: dtype\)"):
        score(narrow, folder, ranks)
    shutil.rmtree(folder.scores)
    score(narrow, folder, ranks)
    whole = {name: read_table(folder.scores / name)[0] for name in SHARDS}
    (folder.scores / SHARDS[2]).unlink()
    score(recipe, folder, ranks)
    assert {name: read_table(folder.scores / name)[0] for name in SHARDS} == whole
    merge(recipe, folder)
    assert [dtype_on(dtype, torch.device("cuda")) for dtype in ("auto", "float32")] == ["bfloat16", "float32"]


def test_chat_template_of_the_reference(models, ranks, tmp_path):
    small = models["small"]["model_name_or_path"]
    chat = tmp_path / "chat"
    shutil.copytree(small, chat)
    template = "<{{ messages[0].role }}>{{ messages[0].content }}{% if add_generation_prompt %}<answer>{% endif %}"
    (chat / "chat_template.jinja").write_text(template)
    reference = {"kind": "checkpoint", "model_name_or_path": str(chat), "chat_template": True}
    recipe, folder = tiny_recipe({**models, "reference": reference}), RunFolder(tmp_path / "run")
    examples = prepare(recipe, folder)
    score(recipe, folder, ranks)
    scores = load_scores(recipe, folder)

    source = Model(model_name_or_path=str(chat))
    tokenizer, config = load_tokenizer(source), load_config(source)
    pairs = []
    for prompt, label in zip(examples.train.prompts.to_pylist(), examples.train.targets.to_pylist()):
        ids = tokenizer(f"<user>{prompt}<answer>")["input_ids"]
        pairs.append(Encoded(ids, tokenizer(label)["input_ids"], tokenizer.eos_token_id))
    expected = score_pairs(load_model(source, "float32").eval(), pairs, 0, 256)[:, 0].numpy()
    np.testing.assert_allclose(scores.reference, expected, rtol=0, atol=1e-4)
    assert np.abs(scores.reference - scores.small).mean() > 0.01  # the same weights behind another prompt

    plain = tiny_recipe({**models, "reference": {**reference, "chat_template": False}})
    with pytest.raises(InputError, match=r"different: chat_template\)"):
        score(plain, folder, ranks)
    bare = Model(model_name_or_path=small)
    with pytest.raises(InputError, match=f"models.reference.chat_template: the tokenizer of {small} has no chat"):
        Encoder(load_tokenizer(bare), config, examples.labels, as_turn=True)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e4), max_size=40), st.integers(1, 9))
def test_shards_are_shared_out_once_and_evenly(costs, world_size):
    given_out = assign_shards(costs, world_size)
    assert len(given_out) == world_size
    assert sorted(shard for mine in given_out for shard in mine) == list(range(len(costs)))
    loads = [sum(costs[shard] for shard in mine) for mine in given_out]
    assert max(loads) - min(loads) <= max(costs, default=0) * (1 + 1e-9)


# --- merge refuses


def refused(run, message):
    recipe, folder = run
    with pytest.raises(InputError, match=message):
        merge(recipe, folder)
    assert not folder.weights.exists() and not folder.weights_info.exists()


def test_missing_shard_is_refused(run):
    (run[1].scores / SHARDS[3]).unlink()
    refused(run, r"shard-00003-of-00005.parquet: missing \(1 of 5")


def test_doubled_example_is_refused(run):
    path = run[1].scores / SHARDS[2]
    first = read_table(path)[0]["id"][0].as_py()
    change(path, lambda table: set_value(table, "id", 4, first))
    refused(run, f"{SHARDS[2]}: example {first} is scored twice")
    of_another_shard = read_table(run[1].scores / SHARDS[0])[0]["id"][0].as_py()
    change(path, lambda table: set_value(table, "id", 4, of_another_shard))
    refused(run, f"{SHARDS[2]}: example {of_another_shard} does not belong to this shard")


def test_lost_and_strange_examples_are_refused(run):
    path = run[1].scores / SHARDS[2]
    gone = read_table(path)[0]["id"][9].as_py()
    change(path, lambda table: set_value(table, "id", 9, "nobody"))
    refused(run, "example nobody does not belong to this shard")
    change(path, lambda table: table.slice(0, 9))
    refused(run, f"{gone} has no score")


@pytest.mark.parametrize("column", ["logp_large", "logp_reference", "eos_small"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None])
def test_score_that_is_not_finite_is_refused(run, column, value):
    path = run[1].scores / SHARDS[1]
    example = read_table(path)[0]["id"][7].as_py()
    change(path, lambda table: set_value(table, column, 7, value))
    refused(run, f"{column} of example {example} is not finite")


@pytest.mark.parametrize("value", [[], None, [0.0] * 18, [0.0] * 18 + [float("nan")]])
def test_label_set_that_is_not_whole_is_refused(run, value):
    path = run[1].scores / SHARDS[1]
    example = read_table(path)[0]["id"][7].as_py()
    change(path, lambda table: set_value(table, "label_set_logp_small", 7, value))
    refused(run, f"label_set_logp_small of example {example} is not finite, or incomplete")


def test_foreign_shard_is_refused(run):
    shutil.copy(run[1].scores / SHARDS[0], run[1].scores / "shard-00000-of-00007.parquet")
    refused(run, "shard-00000-of-00007.parquet: not a shard of this run")


def test_shard_under_another_number_is_refused(run):
    shutil.copy(run[1].scores / SHARDS[0], run[1].scores / SHARDS[1])
    refused(run, "shard-00001-of-00005.parquet: computed from other inputs")


def test_shard_of_another_run_is_refused(run, models, ranks, tmp_path):
    other = RunFolder(tmp_path / "other")
    recipe = tiny_recipe(models, seed=1)
    prepare(recipe, other)
    score(recipe, other, ranks)
    shutil.copy(other.scores / SHARDS[2], run[1].scores / SHARDS[2])
    refused(run, "shard-00002-of-00005.parquet: computed from other inputs")


def test_file_not_written_here_is_refused(run):
    path = run[1].scores / SHARDS[0]
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    refused(run, "shard-00000-of-00005.parquet: not written by atlantis_ds")


@pytest.mark.parametrize("keep", [0, 3, 500, -1])
def test_truncated_shard_is_refused(run, keep):
    path = run[1].scores / SHARDS[0]
    path.write_bytes(path.read_bytes()[:keep])
    refused(run, "shard-00000-of-00005.parquet: broken Parquet file")


def test_no_flipped_bit_passes_into_the_scores(run):
    recipe, folder = run
    before = load_scores(recipe, folder)
    path = folder.scores / SHARDS[1]
    whole = path.read_bytes()
    caught = 0
    for place in range(0, len(whole), 23):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        try:
            after = load_scores(recipe, folder)
        except InputError:
            caught += 1
        else:  # a bit that means nothing, as a statistic of a column
            for name in ("large", "small", "reference", "eos_large", "tokens_small"):
                assert np.array_equal(getattr(before, name), getattr(after, name)), (place, name)
    assert caught > len(whole) / 23 / 3


def test_other_prompt_than_the_recipes_is_refused(run, models):
    other = tiny_recipe(models, prompt={"template": "{sentence}"})
    refused((other, run[1]), "another `data` or `prompt` section")


# --- weights


def test_weights_have_mean_one_and_arms_read_them(run):
    recipe, folder = run
    info = merge(recipe, folder)
    table, _ = read_table(folder.weights)
    weight = table["weight"].to_numpy()
    assert table["id"].to_pylist() == load_examples(folder).train.ids.to_pylist()
    assert weight.mean() == pytest.approx(1, abs=1e-12) and weight.std() > 0.01
    scores = load_scores(recipe, folder)
    np.testing.assert_allclose(table["log_weight"].to_numpy(), scores.large - scores.small + scores.reference)
    assert info == read_json(folder.weights_info)
    assert folder.weights_plot.stat().st_size > 0
    assert np.array_equal(arm_weights(recipe, folder, "atlantis"), weight)


def test_uniform_weights_are_exactly_one_and_need_no_scores(run):
    recipe, folder = run
    shutil.rmtree(folder.scores)
    weights = arm_weights(recipe, folder, "sft")
    assert weights.dtype == np.float64 and weights.tolist() == [1.0] * TRAIN


def test_other_weights_need_no_scoring(run, models, ranks):
    recipe, folder = run
    merge(recipe, folder)
    before, lines = times(folder), log_lines(folder)
    own = arm_weights(recipe, folder, "ratio")  # an arm's own formula, from the same scores
    assert own.mean() == pytest.approx(1, abs=1e-12)

    other = tiny_recipe(models, weights={"formula": "ratio"})
    with pytest.raises(InputError, match=r"merged with other options.*run `merge` again"):
        arm_weights(other, folder, "atlantis")
    score(other, folder, ranks)
    merge(other, folder)
    assert times(folder) == before and passes_run(folder, lines) == []
    assert np.array_equal(arm_weights(other, folder, "atlantis"), own)
    assert not np.array_equal(own, arm_weights(recipe, folder, "sft"))


def test_weights_of_older_scores_are_refused(run):
    recipe, folder = run
    merge(recipe, folder)
    manifest = folder.scores / "scores.json"
    manifest.write_text(manifest.read_text().replace(read_json(manifest)["fingerprint"], "of newer scores"))
    with pytest.raises(InputError, match=r"weights.parquet: merged from other scores.*run `merge` again"):
        arm_weights(recipe, folder, "atlantis")


def test_other_data_without_prepare_is_refused(run, models, ranks):
    recipe, folder = run
    changed = tiny_recipe(models, data={**recipe.model_dump(exclude_unset=True)["data"], "noise": {"rate": 0.5}})
    this = Run(changed, folder, ranks)
    prompt = Run(tiny_recipe(models, prompt={"template": "{sentence}"}), folder, ranks)
    for stage in (
        lambda: stages.merge(this),
        lambda: stages.score(this),
        lambda: stages.score(prompt),
        lambda: stages.train(this, "sft", False),
        lambda: stages.evaluate(this, ["sft"]),
    ):
        with pytest.raises(InputError, match=r"examples.json: made from other data files.*run `prepare`"):
            stage()
    assert not folder.weights.exists() and not (folder.root / "model").exists()


def test_hard_selection_decides_between_equal_weights_by_what_they_were(run, models):
    _, folder = run
    bound = {"formula": "product", "clip": [0.9, 1.1]}
    arms = {
        "hard": {"drop_lowest": 0.25},
        "level": {"drop_lowest": 0.25, "weights": {"formula": "ratio", "power": 1e-300}},
    }
    recipe = tiny_recipe(models, weights=bound, arms=arms)
    merge(recipe, folder)
    table, _ = read_table(folder.weights)
    weight, log_weight = (table[name].to_numpy() for name in ("weight", "log_weight"))
    assert (weight == weight.min()).sum() > 11, "more than a quarter lie at the lower bound"
    dropped = np.flatnonzero(arm_weights(recipe, folder, "hard") == 0)
    assert sorted(dropped) == sorted(np.argsort(log_weight)[:11])
    with pytest.raises(InputError, match="arm level: all its weights are equal"):
        arm_weights(recipe, folder, "level")


def test_merge_writes_once(run):
    recipe, folder = run
    first = merge(recipe, folder)
    before = folder.weights.stat().st_mtime_ns
    assert merge(recipe, folder) == first
    assert folder.weights.stat().st_mtime_ns == before
    folder.weights_plot.unlink()
    assert merge(recipe, folder) == first and folder.weights_plot.exists()
