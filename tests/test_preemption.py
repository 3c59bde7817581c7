"""Jobs that are asked to stop in the middle, and steps that must not count."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest
from conftest import WriteRecipe, events, in_process, launch, losses, start, stop_when, succeed

pytestmark = pytest.mark.ranks


@pytest.mark.slow
def test_training_preempted_five_times_has_the_same_losses(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    changes = {"train.num_train_epochs": 60, "train.save_steps": 10000, "train.eval_steps": 50}
    recipe = tiny_recipe(tmp_path / "a", changes)
    undisturbed = tiny_recipe(tmp_path / "b", changes)
    run = tmp_path / "a" / "run"
    for path in (recipe, undisturbed):
        in_process(path, "prepare")
    succeed("local", 2, "train", undisturbed, "--arm", "sft")
    expected = losses(tmp_path / "b" / "run")
    assert len(expected) == 300
    (run / "STOP").touch()  # left by an earlier job: it must not count
    for how in ("SIGTERM", "SIGUSR2", "STOP", "one rank", "SIGTERM"):
        before = len(events(run, "train"))
        stop_when(start("local", 2, "train", recipe, "--arm", "sft"), run, "train", before + 7, how)
        assert before + 7 < len(losses(run)) < 300
        assert [p.name for p in (run / "checkpoints" / "sft").glob("*step*")] == [f"step-{len(losses(run)):08d}"]
    succeed("local", 2, "train", recipe, "--arm", "sft")
    assert losses(run) == expected
    weights = ["model/sft/last/model.safetensors", "model/sft/best/model.safetensors"]
    assert all((run / w).read_bytes() == (tmp_path / "b" / "run" / w).read_bytes() for w in weights)


def test_scoring_leaves_a_long_shard_half_way(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    """One with thousands of labels or examples takes longer than a queue waits."""
    recipe = tiny_recipe(tmp_path, {"data.train_size": 1200, "score.shard_size": 1200})
    in_process(recipe, "prepare")
    job = start("local", 1, "score", recipe)
    job.until(lambda: "score large: all fast ways" in job.text())
    job.process.send_signal(signal.SIGTERM)
    assert job.wait().code == 75
    assert not list((tmp_path / "run" / "scores").rglob("*.parquet"))


def test_scoring_keeps_its_shards_and_goes_on(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    changes = {"data.train_size": 600, "score.shard_size": 20}
    recipe = tiny_recipe(tmp_path, changes)
    run = tmp_path / "run"
    in_process(recipe, "prepare")
    job = start("local", 2, "score", recipe)
    parts = run / "scores" / "parts"
    job.until(lambda: len(list(parts.glob("shard*"))) >= 4)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait().code == 75
    done = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert 4 <= len(done) < 30 and not [path for path in done if path.suffix != ".parquet"]
    assert f"0 of 30 shards done, for the others {len(done)} of 30 parts" in succeed("local", 1, "status", run)
    job = start("local", 2, "score", recipe)
    job.until((parts / "shard-00029-of-00030.large.parquet").exists)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items() if path.exists())
    assert job.wait().code == 0
    assert len(list((run / "scores").glob("shard-*.parquet"))) == 30
    in_process(recipe, "merge")


@pytest.mark.slow
def test_parts_of_the_shards_make_the_whole(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    in_process(recipe, "prepare")
    names = []
    for part in ("1/3", "3/3", "2/3"):
        out = succeed("local", 1, "score", recipe, "--part", part)
        names.append(len(list((tmp_path / "run" / "scores").glob("shard-*.parquet"))))
        assert "0 of 3 shards are done, 3 to do" in out or "0 of 2 shards are done, 2 to do" in out
    assert names == [3, 5, 8]
    in_process(recipe, "merge")


@pytest.mark.slow
def test_suspended_job_leaves_the_work_to_the_one_that_took_it_over(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, {"train.num_train_epochs": 2000, "train.eval_steps": 10**6, "train.save_steps": 20})
    run = tmp_path / "run"
    in_process(recipe, "prepare")
    first = start("local", 1, "train", recipe, "--arm", "sft")
    first.until(lambda: len(events(run, "train")) >= 30)
    first.process.send_signal(signal.SIGSTOP)
    second = start("local", 1, "train", recipe, "--arm", "sft")
    before = len(events(run, "train"))
    second.until(lambda: len(events(run, "train")) >= before + 5)
    first.process.send_signal(signal.SIGCONT)
    done = first.wait()
    assert done.code == 1 and f"another job took over its work (host {socket.gethostname()}, process " in done.out
    assert "Traceback" not in done.out, done.out[-3000:]
    assert str(second.process.pid) in (run / "claims" / "train-sft.json").read_text()
    stop_when(second, run, "train", len(events(run, "train")) + 5, "STOP")
    assert not list((run / "claims").iterdir())


@pytest.mark.slow
def test_second_job_is_refused_and_a_dead_one_is_taken_over(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    often = {"train.save_steps": 2, "train.save_total_limit": 3}
    recipe = tiny_recipe(tmp_path, {"train.num_train_epochs": 2000, "train.eval_steps": 10**6, **often})
    run = tmp_path / "run"
    in_process(recipe, "prepare")
    first = start("local", 1, "train", recipe, "--arm", "sft")
    first.until(lambda: len(events(run, "train")) >= 9)
    second = launch("local", 2, "train", recipe, "--arm", "sft")
    assert second.code == 2 and f"process {first.process.pid})" in second.out, second.out[-3000:]
    claim = run / "claims" / "train-sft.json"
    assert str(first.process.pid) in claim.read_text()
    first.kill()
    assert claim.exists()
    stop_when(start("local", 1, "train", recipe, "--arm", "sft"), run, "train", len(events(run, "train")) + 2, "STOP")
    assert not claim.exists()
    last = events(run, "train")[-1]["step"]
    kept = sorted({*range(2, last + 1, 2), last})[-3:]
    found = (run / "checkpoints" / "sft").glob("*step*")
    assert sorted(path.name for path in found) == [f"step-{n:08d}" for n in kept]
    # From another host no process can be seen: the file is watched, and it does not change.
    claim.write_text('{"host": "gone", "pid": 1, "machine": "gone", "beat": 9}')
    before = time.monotonic()
    stop_when(start("local", 1, "train", recipe, "--arm", "sft"), run, "train", len(events(run, "train")) + 2, "STOP")
    assert time.monotonic() - before > 15
