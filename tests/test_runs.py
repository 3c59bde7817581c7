"""Scoring that is killed and finished elsewhere, whole runs through the command line, and how bad input is refused."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ENV, ROOT, TIMEOUT, WriteRecipe, events, launch, refuse, start, succeed

from atlantis_ds.config.loading import load_recipe
from atlantis_ds.errors import InputError
from atlantis_ds.files import write_table, write_text

# --- scoring


def tables(run: Path) -> dict[str, bytes]:
    """All score shards and the weights."""
    return {path.name: path.read_bytes() for path in [*(run / "scores").glob("*.parquet"), run / "weights.parquet"]}


@pytest.mark.slow
def test_killed_scoring_is_finished_by_other_numbers_of_ranks(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    """On 2 ranks, killed halfway, finished on 1 and on 3: the same bytes as 2 undisturbed ranks.

    All with one thread a rank, as everywhere in these tests: the order of sums within an operation may follow the
    number of threads, it does not follow the number of ranks.
    """
    examples, shard = 600, 10
    changes = {"data.train_size": examples, "score.shard_size": shard, "score.tokens_per_batch": 1024}
    whole = tiny_recipe(tmp_path / "whole", changes)
    said = succeed("local", 1, "prepare", whole)
    assert f"next: atlantis-ds score {whole}" in said
    killed = tiny_recipe(tmp_path / "killed", changes)
    shutil.copytree(tmp_path / "whole" / "run", tmp_path / "killed" / "run")
    assert succeed("torchrun", 2, "score", whole).count(f"next: atlantis-ds merge {whole}") == 1
    assert f"next: atlantis-ds diagnose {whole.parent / 'run'}" in succeed("local", 1, "merge", whole)
    expected = tables(tmp_path / "whole" / "run")
    assert len(expected) == examples // shard + 1

    passes = 2  # the small base is the large one, and is not read again
    parts = tmp_path / "killed" / "run" / "scores" / "parts"
    start("torchrun", 2, "score", killed).kill_when(lambda: len(list(parts.glob("shard*"))) >= 70)
    done = len(list(parts.glob("shard*")))
    assert 70 <= done < passes * examples // shard
    refuse(launch("local", 1, "merge", killed), "missing")
    for ranks in (1, 3):
        folder = tmp_path / f"on {ranks}"
        shutil.copytree(tmp_path / "killed" / "run", folder / "run")
        succeed("local", ranks, "score", tiny_recipe(folder, changes))
        succeed("local", 1, "merge", folder / "recipe.yaml")
        assert tables(folder / "run") == expected
        scored = sum(event["examples"] for event in events(folder / "run", "score"))
        logged_before = sum(event["examples"] for event in events(tmp_path / "killed" / "run", "score"))
        assert scored - logged_before == passes * examples - done * shard, "finished parts were scored again"

    # Whole shards stay as they are; the one that is gone comes back.
    scores = tmp_path / "on 1" / "run" / "scores"
    gone = scores / "shard-00004-of-00060.parquet"
    gone.unlink()
    before = {path: path.stat().st_mtime_ns for path in scores.glob("*.parquet")}
    assert "59 of 60 shards are done" in succeed("local", 1, "score", tmp_path / "on 1" / "recipe.yaml")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert tables(tmp_path / "on 1" / "run") == expected


# --- a whole run

RUN = {
    # Both models are the same one: the weights of `ratio` are all exactly 1, computed by scoring and merging.
    "weights": {"formula": "ratio"},
    "models.reference": {"kind": "finetuned", "folds": 2, "num_train_epochs": 1},
    "train.deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
    "train.dtype": "bfloat16",
}


def outputs(run: Path) -> dict[str, int]:
    """When each output was written. Small summaries may be written again: recipe, model cards, comparison, log."""
    again = ("README.md", "recipe.yaml", "log.jsonl")
    paths = [path for path in run.rglob("*") if path.is_file() and path.name not in again]
    names = {str(path.relative_to(run)): path.stat().st_mtime_ns for path in paths}
    return {name: time for name, time in names.items() if not name.startswith(("eval/comparison", "claims/"))}


def watched_run(recipe: Path, run: Path, folder: Path) -> str:
    """Do all stages on 2 ranks; nothing may be locked in the run folder, nor be made in the common /tmp."""
    watch, log, scratch = folder / "watch.so", folder / "watch.log", folder / "scratch"
    subprocess.run(["cc", "-shared", "-fPIC", ROOT / "tests" / "watch.c", "-o", watch, "-ldl"], check=True)
    scratch.mkdir()
    env = {"LD_PRELOAD": str(watch), "WATCH_LOG": str(log), "TMPDIR": str(scratch)}
    done = launch("local", 2, "run", recipe, env=env | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.code == 0, done.out[-4000:]
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    made = {Path(name) for what, name in lines if what == "make"}
    assert not [name for what, name in lines if what == "lock" and Path(name).is_relative_to(run)], "NFS breaks locks"
    inside = {path.relative_to(run).parts[0] for path in made - {run} if path.is_relative_to(run)}
    assert inside >= {"claims", "scores", "checkpoints", "model", "log.jsonl"}, "the watch is blind"
    assert [path for path in made if path.is_relative_to(scratch)], "nothing needed scratch, so this shows nothing:"
    common = [Path(name) for name in (tempfile.gettempdir(), "/tmp", "/var/tmp", ROOT)]
    assert not [p for p in made if any(map(p.is_relative_to, common)) and not p.is_relative_to(folder)]
    return done.out


@pytest.mark.ranks
def test_whole_run_twice(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, run = tiny_recipe(tmp_path, RUN), tmp_path / "run"
    first = watched_run(recipe, run, tmp_path)
    assert sorted(path.name for path in (run / "model").iterdir()) == [
        "atlantis",
        "reference-0-of-2",
        "reference-1-of-2",
        "sft",
    ]

    weights = pq.read_table(run / "weights.parquet")["weight"].to_pylist()
    assert weights == [1.0] * 37
    for name in ("last", "best"):
        models = [(run / "model" / arm / name / "model.safetensors").read_bytes() for arm in ("sft", "atlantis")]
        assert models[0] == models[1], "weights of 1 are not plain fine-tuning"
    for arm in ("sft", "atlantis"):
        losses = [event["loss"] for event in events(run, "train", arm)]
        dev = [event["loss"] for event in events(run, "dev", arm)]
        assert len(losses) == 10 and len(dev) == 2
        assert sum(losses[-5:]) < sum(losses[:5]), "bf16 did not learn"

    before, cards = outputs(run), {path: path.read_bytes() for path in run.rglob("README.md")}
    assert len(cards) == 8 and "model/sft/last/model.safetensors" in before
    second = succeed("local", 2, "run", recipe)
    assert outputs(run) == before
    assert {path: path.read_bytes() for path in cards} == cards
    assert second.count("already finished") == 6  # 2 references, 2 arms trained, 2 arms evaluated
    assert tail(second) == tail(first) and "macro_f1" in tail(first)

    third = succeed("local", 2, "run", recipe, "--set", "evaluate.method=generate")
    after = outputs(run)
    assert {name for name in before if after[name] != before[name]} >= {"eval/sft/metrics.json"}
    assert all(after[name] == before[name] for name in before if not name.startswith("eval/"))
    assert third.splitlines()[-1] == f"next: atlantis-ds diagnose {run}"  # which takes no --set
    assert tail(third) and third.count("already finished") == 4
    for arm in ("sft", "atlantis"):
        metrics = json.loads((run / "eval" / arm / "metrics.json").read_text())
        assert metrics["n"] == 10 and metrics["settings"]["method"] == "generate"

    # One arm alone: the other stays in the table as long as it was evaluated in the same way.
    table, generate = run / "eval" / "comparison.csv", ["--set", "evaluate.method=generate"]
    joint = table.read_text()
    said = succeed("local", 1, "evaluate", recipe, "--arm", "sft", *generate)
    assert f"next: atlantis-ds compare {recipe} {' '.join(map(str, generate))}" in said
    assert table.read_text() == joint and joint.count("\n") == 3
    succeed("local", 1, "evaluate", recipe, "--arm", "sft")
    assert table.read_text().count("\n") == 2
    refuse(launch("local", 1, "evaluate", recipe, "--arm", "sfd"), "--arm sfd: no such arm", "sft, atlantis")


def tail(out: str) -> str:
    """What is printed after the last evaluation: the table of arms, and what the weights are like."""
    lines = out.splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("evaluate "))
    return "\n".join(lines[last + 1 :])


# --- bad input


@pytest.mark.ranks
def test_bad_recipes_and_flags(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    flag = launch("local", 1, "run", recipe, "--rank", "2")
    assert flag.code == 2 and "--rank" in flag.out and "Traceback" not in flag.out
    for command in ("check", "run"):
        refuse(launch("local", 1, command, tmp_path / "absent.yaml"), "absent.yaml", "no such recipe file")
        done = launch("local", 2 if command == "run" else 1, command, recipe, "--set", "train.learning_rat=1")
        refuse(done, "recipe.yaml", "train.learning_rat", "did you mean `learning_rate`?")
        assert done.out.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("weights.clip=[0,.inf]", "finite"),
        ("weights.power=.nan", "finite"),
        ("weights.clip=[2,3]", "lo <= 1 <= hi"),
        ("train.num_train_epochs=.inf", "finite"),
        ("seed=99999999999999999999999", "less than"),
        ("seeds=[0,1,0]", "contains a duplicate"),
        ("arms.gold={gold: true}", "weights: {formula: uniform}"),
        ("weights={calibrate: label_set}", "score.label_set: true"),
        ("arms.a={weights: {calibrate: label_set}}", "arms.a.weights.calibrate"),
        ("prompt.template={{sentence}}", "quotes"),
        ("name=2024-13-45", "not valid YAML"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    tiny_recipe: WriteRecipe, tmp_path: Path, override: str, words: str
) -> None:
    path = tiny_recipe(tmp_path, {"score": {"label_set": False}})
    with pytest.raises(InputError) as error:
        load_recipe(path, [override])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_arm_set_beside_the_default_ones(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    path = tiny_recipe(tmp_path)
    tree = yaml.safe_load(path.read_text())
    tree.pop("arms", None)
    path.write_text(yaml.safe_dump(tree))
    recipe = load_recipe(path, ["arms.gce={weights: {formula: uniform}, loss: gce}"])
    assert list(recipe.arms) == ["sft", "atlantis", "gce"]
    assert {name: recipe.arms[name] for name in ("sft", "atlantis")} == load_recipe(path).arms


@pytest.mark.ranks
def test_missing_data_on_two_ranks_leaves_nothing(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "absent.jsonl"), "test": str(tmp_path / "absent.jsonl")}
    recipe = tiny_recipe(tmp_path, {"data": data})
    refuse(launch("local", 1, "check", recipe), "data.train", "absent.jsonl", "no such file")
    refuse(launch("local", 2, "run", recipe), "data.train", "absent.jsonl", "no such file")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["recipe.yaml"]


@pytest.mark.slow
def test_arms_that_cannot_be_trained(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, run = tiny_recipe(tmp_path, {"weights": {"formula": "product", "power": 50.0}}), tmp_path / "run"
    refuse(launch("local", 1, "train", recipe), "examples.json", "run `prepare` first")
    succeed("local", 1, "prepare", recipe)
    refuse(launch("local", 2, "train", recipe, "--arm", "nope"), "--arm nope", "sft, atlantis", "reference")
    refuse(launch("local", 1, "train", recipe), "weights.parquet", "run `merge` first")
    succeed("local", 1, "score", recipe)
    out = succeed("local", 1, "merge", recipe)
    assert "ESS" in out or "ffective sample size" in out
    refuse(launch("local", 1, "train", recipe), "effective sample size", "--force")
    assert not (run / "model").exists() and not (run / "checkpoints").exists()
    succeed("local", 1, "train", recipe, "--force")
    assert (run / "model" / "atlantis" / "last" / "model.safetensors").is_file()


CHECK = """
import sys
sys.argv = ["atlantis-ds", "check", sys.argv[1]]
from atlantis_ds.cli import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "deepspeed", "datasets", "matplotlib", "sklearn", "pandas"} & sys.modules.keys()
    print("heavy:", sorted(heavy))
"""


def test_check_is_light_and_writes_nothing(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    command = [sys.executable, "-c", CHECK, str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=TIMEOUT)
    assert done.returncode == 0 and "valid" in done.stdout, done.stderr
    assert done.stdout.endswith("heavy: []\n")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_committed_recipes_are_valid(name: str) -> None:
    from atlantis_ds.config.loading import load_recipe
    from atlantis_ds.train.deepspeed_config import deepspeed_config

    recipe = load_recipe(ROOT / "recipes" / name)
    train = recipe.train
    assert deepspeed_config(train, world_size=4)["zero_optimization"]["stage"] in (0, 1, 2, 3)


@pytest.mark.parametrize(
    "write",
    [lambda path: write_text(path, "x" * 5000), lambda path: write_table(path, pa.table({"x": range(9999)}), {})],
)
def test_a_file_that_does_not_fit_on_the_disk_is_named(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """A limit on the size of files stands for a full disk: both come as an error without a name."""
    signals = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"too large: '{tmp_path}/file'"):
            write(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signals)
    assert not list(tmp_path.iterdir())
