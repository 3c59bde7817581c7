"""The real sbatch files on a real Slurm of two nodes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ENV, ROOT, WriteRecipe, events, in_process, launch, losses, succeed
from services import job, need, run, start_service, stop_service, wait_for

from atlantis_ds.errors import InputError
from atlantis_ds.status import status

pytestmark = pytest.mark.ranks

SMALL = ("--gpus-per-node=0", "--cpus-per-task=1", "--ntasks-per-node=1")
"""The files ask for GPU nodes; what stands on sbatch's command line wins."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    need("slurmctld", "slurmd", "munged", "srun")
    env = start_service("slurm_up.sh")
    yield {k: v for k, v in ENV.items() if not k.startswith("SLURM_")} | {
        name: value for name, value in env.items() if name.startswith("SLURM_")
    }
    stop_service("slurm_down.sh", env["SLURM_STATE_DIR"])


def sbatch(slurm: dict[str, str], log: Path, *words: object) -> str:
    script = next(i for i, word in enumerate(words) if str(word).endswith(".sbatch"))
    options, arguments = words[:script], words[script + 1 :]
    file = str(ROOT / "slurm" / str(words[script]))
    return run(slurm, "sbatch", "--parsable", f"--output={log}", *SMALL, *map(str, options), file, *map(str, arguments))


def state(slurm: dict[str, str], job_id: str) -> str:
    return job(slurm, job_id)["JobState"]


def text(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def ended(slurm: dict[str, str], job_id: str, log: Path, seconds: float = 180) -> str:
    over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
    wait_for(lambda: state(slurm, job_id) in over, seconds, lambda: str(job(slurm, job_id)) + text(log))
    return state(slurm, job_id)


def cli(slurm: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "atlantis_ds", *map(str, words)]
    return subprocess.run(command, env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_dry_run_shows_the_files_and_writes_nothing(tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "a folder", {"name": "x1"})
    options = ("--nodes", 4, "--gpus-per-node", 8, "--time", "1-12:00:00", "--partition", "gpu", "--dry-run")
    done = cli(ENV, "submit", recipe, *options)
    assert done.returncode == 0, done.stderr
    files = dict(part.split(" <==\n", 1) for part in done.stdout.split("==> ")[1:])
    files = {Path(name).name: body for name, body in files.items()}
    assert {"recipe.yaml", "ranks.sh", "score.sbatch", "train-sft.sbatch", "train-atlantis.sbatch"} <= files.keys()
    for line in ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "time=1-12:00:00", "partition=gpu"):
        assert files["train-sft.sbatch"].count(f"#SBATCH --{line}\n") == 1, line
    assert f'--output="{tmp_path}/a folder/x1/slurm/%x-%j.log"' in files["train-sft.sbatch"]
    assert f"set -- '{tmp_path}/a folder/x1/slurm/recipe.yaml' --arm sft\n" in files["train-sft.sbatch"]
    assert "--array=1-4" in files["score.sbatch"] and "\nparts=4" in files["score.sbatch"]
    assert "array" not in files["train-sft.sbatch"].split("\n\n")[0].split("#SBATCH", 1)[1]
    assert "gpus" not in files["merge.sbatch"] and "--nodes=1\n" in files["score.sbatch"]
    assert not (tmp_path / "a folder" / "x1").exists()
    for bad in ("soon", "4h", "1:2:3:4", "60; rm x"):
        done = cli(ENV, "submit", recipe, "--time", bad, "--dry-run")
        assert done.returncode == 2 and f"time {bad} of score" in done.stderr, done.stderr


def options_of(recipe: Path, *words: object) -> dict[str, dict[str, str]]:
    """For each job file of ``submit --dry-run`` its #SBATCH options; those without a value are empty."""
    done = cli(ENV, "submit", recipe, "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    files = dict(part.split(" <==\n", 1) for part in done.stdout.split("==> ")[1:])
    found = {}
    for name, body in files.items():
        lines = re.findall(r"(?m)^#SBATCH --([^=\n]+)=?(.*)$", body)
        assert len(dict(lines)) == len(lines), f"{name}: an option stands twice"
        found[Path(name).stem] = dict(lines)
    return found


def test_what_a_site_wants_goes_into_every_job(tiny_recipe: WriteRecipe, base_model: Path, tmp_path: Path) -> None:
    section = {"all": {"account": "lab7", "exclusive": True}, "train": {"qos": "long", "gpus-per-node": None}}
    reference = {"kind": "finetuned", "model_name_or_path": str(base_model), "folds": 3, "rounds": 2}
    recipe = tiny_recipe(tmp_path, {"slurm": section, "models.reference": reference})
    found = options_of(recipe, "--sbatch", "qos=short", "--sbatch", "merge.partition=cpu", "--sbatch", "merge.time=9")
    jobs = ["prepare", "reference-1", "reference-1-weights", "reference", "score", "merge", "train-sft"]
    assert {name for name in found if name not in ("recipe", "ranks")} == {*jobs, "train-atlantis", "evaluate"}
    for name in jobs:
        assert (found[name]["account"], found[name]["exclusive"], found[name]["qos"]) == ("lab7", "", "short")
    assert found["merge"]["partition"] == "cpu" and found["merge"]["time"] == "9" and "partition" not in found["score"]
    assert "gpus-per-node" not in found["train-sft"] and found["score"]["gpus-per-node"] == "1"
    assert found["reference"]["array"] == found["reference-1"]["array"] == "1-3"
    assert "array" not in found["reference-1-weights"]
    assert options_of(recipe, "--array-limit", 2)["reference"]["array"] == "1-3%2"
    # Without weights to make, nothing is scored.
    found = options_of(recipe, "--set", "arms={sft: {weights: {formula: uniform}}}", "--preflight")
    assert set(found) == {"recipe", "ranks", "prepare", "preflight", "train-sft", "evaluate"}
    # The command line goes before the recipe, --sbatch before the other flags, a stage before all.
    words = ("--sbatch", "train.qos=", "--time", 5, "--sbatch", "train.time=6", "--sbatch", "time=7")
    found = options_of(recipe, *words)
    assert "qos" not in found["train-sft"]
    assert (found["train-sft"]["time"], found["score"]["time"], found["prepare"]["time"]) == ("6", "7", "7")
    for bad, said in (
        ("dependency=1", "`dependency` is set by the chain of jobs"),
        ("--qos=x", "'--qos' is not a long option of sbatch"),
        ("trian.qos=x", "--sbatch trian.qos=x: no such stage; the stages are all, prepare, "),
        ("comment=it's", "cannot contain quotes"),
    ):
        done = cli(ENV, "submit", recipe, "--dry-run", "--sbatch", bad)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = cli(ENV, "submit", recipe, "--dry-run", "--prologue", tmp_path / "none.sh")
    assert done.returncode == 2 and "none.sh: cannot be read" in done.stderr


def test_status_of_a_run(tmp_path: Path) -> None:
    """Each line from the files that a run leaves; of responses, which have no labels, no macro-F1."""
    model = {"model_name_or_path": "m"}
    recipe = {"name": "r", "data": {"format": "grammar"}, "models": {"large": model, "small": model}}
    events = [
        {"event": "start", "arm": "sft", "steps": 9, "time": 0.0},
        *({"event": "train", "arm": "sft", "step": n, "loss": 1.5, "time": 10.0 * n} for n in (1, 2, 3)),
    ]
    responses = {"macro_f1": None, "exact_match": 0.25, "perplexity": 3.5}
    files = {
        "recipe.yaml": recipe,
        "model/atlantis/training.json": {"step": 9, "skipped": 1},
        "eval/sft/metrics.json": responses,
        "eval/atlantis/metrics.json": {"macro_f1": 0.5, "accuracy": 0.75},
        "weights.json": {"ess_fraction": 0.5},
        "scores/scores.json": {"shards": 8, "inputs": {"model large": 1, "model small": 2, "model reference": 3}},
        "scores/shard-00000-of-00008.parquet": {},
        "scores/parts/shard-00001-of-00008.large.parquet": {},
    }
    for name, tree in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(tree))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "tr')
    assert status(tmp_path) == [
        ("examples", "not yet"),
        ("score", "1 of 8 shards done, for the others 1 of 21 parts"),
        ("merge", "effective sample size 50.0%"),
        ("train sft", "step 3 of 9, loss 1.5, 0:01:00 left"),
        ("evaluate sft", "exact_match 0.2500, perplexity 3.5000"),
        ("train atlantis", "finished, 9 steps, 1 skipped"),
        ("evaluate atlantis", "macro_f1 0.5000"),
    ]
    with pytest.raises(InputError, match="no run here"):
        status(tmp_path / "elsewhere")


def test_chain_from_examples_to_the_table(
    slurm: dict[str, str], tiny_recipe: WriteRecipe, base_model: Path, tmp_path: Path
) -> None:
    """With an account, an environment that jobs do not inherit, and a prologue that sets it up."""
    reference = {"kind": "finetuned", "model_name_or_path": str(base_model), "folds": 2}
    recipe = tiny_recipe(tmp_path / "with a blank", {"models.reference": reference})
    where = tmp_path / "with a blank" / "run"
    sized = ("--nodes", 2, "--gpus-per-node", 0, "--cpus-per-task", 1, "--time", 10)
    prologue = tmp_path / "prologue.sh"
    needed = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "SLURM_CONF")
    lines = [f"export {name}={shlex.quote(slurm[name])}" for name in needed if name in slurm]
    prologue.write_text("\n".join([*lines, f"python='env PROLOGUE=read {sys.executable}'"]))
    site = ("--sbatch", "account=lab7", "--sbatch", "export=NONE", "--prologue", prologue)
    done = cli(slurm, "submit", recipe, *sized, *site)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last.startswith("next: atlantis-ds status ")
    jobs = dict(line.split() for line in lines)
    assert list(jobs) == ["prepare", "reference", "score", "merge", "train-sft", "train-atlantis", "evaluate"]
    assert {job(slurm, number.split("_")[0])["Account"] for number in jobs.values()} == {"lab7"}
    assert "PENDING" in cli(slurm, "status", where).stdout
    again = cli(slurm, "submit", recipe, *sized, *site)
    assert again.returncode == 2 and f"evaluate {jobs['evaluate']} (PENDING, Dependency)" in again.stderr, again.stderr
    assert len(run(slurm, "squeue", "--noheader", "--format=%F").split()) <= len(jobs)

    def logs() -> str:
        return "".join(f"\n== {log}\n{log.read_text()[-1500:]}" for log in (where / "slurm").glob("*.log"))

    wait_for(lambda: state(slurm, jobs["evaluate"]) not in ("PENDING", "RUNNING", "COMPLETING"), 400, logs)
    assert {state(slurm, number) for number in jobs.values()} == {"COMPLETED"}, logs()
    table = (where / "slurm" / f"run-evaluate-{jobs['evaluate']}.log").read_text()
    assert "macro_f1" in table and "│ sft " in table and "│ atlantis " in table
    said = cli(slurm, "status", where).stdout
    for line in ("8 of 8 shards done", "finished, 10 steps", "effective sample size 50.0%", "macro_f1 0."):
        assert line in said, said
    assert said.count("COMPLETED") == len(jobs) + 2  # two arrays have two elements
    folds = [text(where / "slurm" / f"run-reference-{jobs['reference']}_{element}.log") for element in (1, 2)]
    for element, log in enumerate(folds):
        assert re.findall(r"train (reference-\d-of-2): \d+ examples", log) == [f"reference-{element}-of-2"], log


TAKEN = """
import os
from atlantis_ds.cluster.ranks import find_place, gpu_of
seen = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
print(len(seen), seen[gpu_of(find_place(os.environ).local_rank, len(seen))])
"""


def test_each_rank_takes_a_gpu_of_its_own_however_many_it_sees(slurm: dict[str, str]) -> None:
    """With make-believe GPUs; a task that sees one alone has local rank 1 all the same."""
    for option, visible in (("--gpus-per-task=1", 1), ("--gpus-per-node=2", 2)):
        out = run(slurm, "srun", "--nodes=1", "--ntasks=2", "--cpus-per-task=1", option, sys.executable, "-c", TAKEN)
        assert sorted(out.splitlines()) == [f"{visible} 0", f"{visible} 1"], out


def test_refused_submission_leaves_no_job(slurm: dict[str, str], tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    done = cli(slurm, "submit", recipe, "--partition", "nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: sbatch refused: "), done.stderr
    assert run(slurm, "squeue", "--noheader", "--states=PENDING,RUNNING") == ""


@pytest.mark.slow
def test_cancelled_element_of_the_array_is_done_later(
    slurm: dict[str, str], tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path)
    scores = tmp_path / "run" / "scores"
    in_process(recipe, "prepare")
    array = sbatch(slurm, tmp_path / "%a.log", "--array=1-4", "--time=10", "score.sbatch", recipe)
    wait_for(lambda: state(slurm, f"{array}_3") == "RUNNING", 60, lambda: run(slurm, "squeue"))
    run(slurm, "scancel", f"{array}_3")
    for element in (1, 2, 4):
        assert ended(slurm, f"{array}_{element}", tmp_path / f"{element}.log") == "COMPLETED", text(
            tmp_path / f"{element}.log"
        )
    assert ended(slurm, f"{array}_3", tmp_path / "3.log") == "CANCELLED"
    done = {path.name: path.stat().st_mtime_ns for path in scores.glob("shard-*.parquet")}
    assert len(done) == 6 and "shard-00002-of-00008.parquet" not in done
    refused = launch("local", 1, "merge", recipe)
    assert refused.code == 2 and "shard-00002-of-00008.parquet: missing (2 of 8 shards are)" in refused.out
    # On two nodes this time: an element may have any number of ranks.
    again = sbatch(slurm, tmp_path / "again.log", "--array=3", "--nodes=2", "--time=10", "score.sbatch", recipe)
    assert ended(slurm, f"{again}_3", tmp_path / "again.log") == "COMPLETED", text(tmp_path / "again.log")
    last = events(tmp_path / "run", "score")[-4:]
    assert sorted(event["rank"] for event in last) == [0, 0, 1, 1], "two models on each of two ranks"
    merged = sbatch(slurm, tmp_path / "merge.log", "merge.sbatch", recipe)
    assert ended(slurm, merged, tmp_path / "merge.log") == "COMPLETED", text(tmp_path / "merge.log")
    assert pq.read_metadata(tmp_path / "run" / "weights.parquet").num_rows == 37
    assert all((scores / name).stat().st_mtime_ns == when for name, when in done.items())


@pytest.mark.slow
def test_array_trains_every_arm_with_every_seed(
    slurm: dict[str, str], tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, {"seeds": [1, 2], "train.num_train_epochs": 1})
    where = tmp_path / "run"
    in_process(recipe, "prepare", "score", "merge")
    array = sbatch(slurm, tmp_path / "%a.log", "--array=1-4", "--time=10", "compare.sbatch", recipe)
    for element in (1, 2, 3, 4):
        log = tmp_path / f"{element}.log"
        assert ended(slurm, f"{array}_{element}", log) == "COMPLETED", text(log)
        assert f"compare: part {element} of 4 is done" in text(log)
    trained = {path: path.stat().st_mtime_ns for path in where.glob("model/*/training.json")}
    names = ["atlantis-seed1", "atlantis-seed2", "sft-seed1", "sft-seed2"]
    assert sorted(path.parent.name for path in trained) == names
    said = cli(slurm, "status", where).stdout
    assert all(f"train {name}" in said for name in names) and said.count("finished, 5 steps") == 4, said
    done = cli(slurm, "compare", recipe)
    assert done.returncode == 0 and "macro_f1" in done.stdout, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    rows = (where / "compare" / "runs.csv").read_text().splitlines()[1:]
    assert sorted(row.split(",")[:2] for row in rows) == [[arm, seed] for arm in ("atlantis", "sft") for seed in "12"]


@pytest.mark.slow
def test_lora_on_one_gpu(slurm: dict[str, str], tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, log = tiny_recipe(tmp_path, {"train.num_train_epochs": 1}), tmp_path / "lora.log"
    in_process(recipe, "prepare")
    number = sbatch(slurm, log, "--time=10", "train_single_gpu_lora.sbatch", recipe, "--arm", "sft")
    assert ended(slurm, number, log) == "COMPLETED", text(log)
    assert "1 ranks x 2 micro-batches x 4), lora, " in text(log)
    assert (tmp_path / "run" / "model" / "sft" / "last" / "adapter_model.safetensors").is_file()


@pytest.mark.slow  # Slurm lets a requeued job wait for two minutes
def test_preempted_training_requeues_and_loses_nothing(
    slurm: dict[str, str], tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    changes = {"train.num_train_epochs": 100, "train.save_steps": 10000, "train.eval_steps": 10000}
    recipe, undisturbed = tiny_recipe(tmp_path / "a", changes), tiny_recipe(tmp_path / "b", changes)
    where, log = tmp_path / "a" / "run", tmp_path / "train.log"
    for path in (recipe, undisturbed):
        in_process(path, "prepare")
    number = sbatch(slurm, log, "--nodes=2", "--time=10", "train.sbatch", recipe, "--arm", "sft")
    for preempt in (
        ("srun", "--partition=urgent", "--nodes=2", "--exclusive", "--time=1", "true"),
        ("scancel", "--batch", "--signal=USR2", number),
    ):
        before = len(events(where, "train"))
        wait_for(lambda: len(events(where, "train")) > before + 3, 240, lambda: text(log))  # noqa: B023
        run(slurm, *preempt)
        said = cli(slurm, "status", where).stdout
        assert re.search(r"train sft +step \d+ of 500, loss \d+\.\d+, \d:\d\d:\d\d left", said), said
    assert ended(slurm, number, log, 240) == "COMPLETED", text(log)
    assert job(slurm, number)["Restarts"] == "2"
    assert text(log).count("preempted: train sft: stopped after step") == 2
    succeed("local", 2, "train", undisturbed, "--arm", "sft")
    assert len(losses(where)) == 500
    assert losses(where) == losses(tmp_path / "b" / "run")


@pytest.mark.slow
def test_time_limit_requeues_and_cancelling_does_not(
    slurm: dict[str, str], tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    changes = {"train.num_train_epochs": 20000, "train.save_steps": 10**6, "train.eval_steps": 10**6}
    recipe, log = tiny_recipe(tmp_path, changes), tmp_path / "train.log"
    in_process(recipe, "prepare")
    options = ("--nodes=2", "--time=2", "--signal=B:USR2@30")
    number = sbatch(slurm, log, *options, "train.sbatch", recipe, "--arm", "sft")
    wait_for(lambda: text(log).count("resuming from step") == 1, 240, lambda: text(log))
    assert job(slurm, number)["Restarts"] == "1" and "TIME LIMIT" not in text(log)
    before = len(losses(tmp_path / "run"))
    wait_for(lambda: len(events(tmp_path / "run", "train")) > before + 3, 60, lambda: text(log))
    run(slurm, "scancel", number)
    assert ended(slurm, number, log) == "CANCELLED"
    saved = [path.name for path in (tmp_path / "run" / "checkpoints" / "sft").glob("step-*")]
    assert saved == [f"step-{len(losses(tmp_path / 'run')):08d}"], text(log)


@pytest.mark.slow
def test_a_site_that_requeues_nothing_holds_the_chain(
    slurm: dict[str, str], tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """The line in the log goes on: with the training from its checkpoint, and with the job that waits for both arms."""
    changes = {"train.num_train_epochs": 20000, "train.save_steps": 10**6, "train.eval_steps": 10**6}
    recipe, where = tiny_recipe(tmp_path, changes), tmp_path / "run"
    sized = ("--nodes", 1, "--gpus-per-node", 0, "--cpus-per-task", 1, "--time", 20)
    never = ("--sbatch", "train.requeue=", "--sbatch", "train.no-requeue")
    done = cli(slurm, "submit", recipe, *sized, *never, "--preflight")
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last.startswith("next: atlantis-ds status ")
    jobs = dict(line.split() for line in lines)
    assert list(jobs)[:3] == ["prepare", "preflight", "score"]
    sft, other, last = (jobs[name] for name in ("train-sft", "train-atlantis", "evaluate"))
    log = where / "slurm" / f"run-train-sft-{sft}.log"
    wait_for(lambda: len(events(where, "train", "sft")) > 3, 240, lambda: text(log) + str(job(slurm, sft)))
    assert json.loads((where / "preflight.json").read_text())["verdict"] in ("ok", "warning")
    run(slurm, "scancel", "--batch", "--signal=USR2", sft)
    assert ended(slurm, sft, log) == "FAILED", text(log)
    assert "Slurm does not requeue this job." in text(log), text(log)
    waiting = job(slurm, last)
    assert (waiting["JobState"], waiting["Reason"]) == ("PENDING", "JobHeldUser")
    assert waiting["Dependency"].startswith(f"afterok:{other}(") and "," not in waiting["Dependency"], waiting
    (command,) = [line for line in text(log).splitlines() if line.startswith("  job=$(sbatch")]
    new = run(slurm, "bash", "-c", f"{command} && echo $job").split()[-1]
    waiting = job(slurm, last)
    assert waiting["Reason"] in ("None", "Dependency") and f"afterok:{new}(" in waiting["Dependency"], waiting
    log = where / "slurm" / f"run-train-sft-{new}.log"
    wait_for(lambda: "resuming from step" in text(log), 120, lambda: text(log) + str(job(slurm, new)))
    run(slurm, "scancel", new, other, last)
