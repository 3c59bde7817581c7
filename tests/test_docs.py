"""What the docs tell people to type: commands parse, name files that are there, and run, here or in another test."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from conftest import ENV, ROOT, shared_data

from atlantis_ds.bundled import find
from atlantis_ds.cli import app
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.config.schema import Recipe

PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "experiments/README.md"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
RUN_HERE = {"check", "submit", "kubeflow", "status"}
"""In an empty folder, in seconds; `submit` with --dry-run."""
RUN_BY = {
    "compare": "test_compare.py",
    "diagnose": "test_diagnose.py",
    "evaluate": "test_runs.py",
    "export": "test_export.py",
    "fetch": "test_fetch.py",
    "init": "test_init.py",
    "merge": "test_runs.py",
    "plan": "test_plan.py",
    "preflight": "test_preflight.py",
    "predict": "test_tasks.py",
    "prepare": "test_runs.py",
    "run": "test_runs.py",
    "score": "test_runs.py",
    "train": "test_runs.py",
}
"""They need models or minutes: the test file that runs them on small ones."""
NOT_RUN = {
    "cat": "reads a log of Slurm",
    "cp": "of the kept scores; of no interest alone",
    "eval": "of services: test_slurm.py, test_multinode.py",
    "export": "sets variables",
    "git": "takes a clone, or files of the history, which a shallow clone lacks",
    "kubectl": "needs a cluster",
    "make": "minutes; the target is looked up in the Makefile",
    "module": "belongs to a site",
    "pip": "takes packages from elsewhere",
    "pytest": "is a test",
    "python": "a script of a study or benchmark: minutes",
    "sbatch": "test_slurm.py",
    "source": "belongs to a site",
    "squeue": "test_slurm.py",
    "tools/install_test_services.sh": "installs packages",
    "tools/slurm_down.sh": "test_slurm.py",
    "tools/sshd_down.sh": "test_multinode.py",
    "touch": "test_preemption.py makes the file STOP",
}
YOURS = {"my.yaml", "questions.yaml", "RECIPE", "runs/questions"}
"""Recipes and runs of the reader."""


@dataclass(frozen=True)
class Command:
    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Up to a pipe, a redirection or the next command, without a comment and variables in front."""
        words = shlex.split(self.text, comments=True)
        end = next((at for at, word in enumerate(words) if word in ("|", ">", ">>", "&&", "||", ";")), len(words))
        start = next((at for at, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), 0)
        return words[start:end]

    @property
    def ours(self) -> list[str] | None:
        """The arguments of atlantis-ds, under whatever launcher; None where it is another program."""
        for at, word in enumerate(self.words):
            if Path(word).name == "atlantis-ds":
                return self.words[at + 1 :]
            if word in ("-m", "--module") and self.words[at + 1 :][:1] == ["atlantis_ds"]:
                return self.words[at + 2 :]
        return None

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block of a language."""
    return [
        (page.name, text)
        for page in PAGES
        for text in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    ]


COMMANDS = [
    Command(page, re.sub(" +", " ", line.strip()))
    for page, text in blocks("bash")
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
OURS = [command for command in COMMANDS if command.ours is not None]


def parsed(command: Command) -> tuple[str, dict[str, Any]]:
    """Name of the sub-command and its parameters, as typer reads them; fails where it refuses them."""
    group: Any = typer.main.get_command(app)
    name, *arguments = command.ours or []
    assert name in group.commands, f"{command}: no such command"
    try:
        return name, dict(group.commands[name].make_context(name, arguments).params)
    except Exception as error:  # typer has a copy of click's errors of its own
        pytest.fail(f"{command}: {error}")


def own_recipe(params: dict[str, Any]) -> Path | None:
    """The recipe of the repository that a command names; None where it is the reader's own, or there is none."""
    if (recipe := params.get("recipe")) is None or str(recipe) in YOURS:
        return None
    path = ROOT / find("recipes", recipe, "RECIPE")
    assert path.is_file(), f"{recipe}: no such recipe"
    return path


@pytest.mark.parametrize("command", OURS, ids=str)
def test_command_parses_and_its_recipe_takes_the_keys(command: Command) -> None:
    name, params = parsed(command)
    assert name in RUN_HERE or name in RUN_BY, f"{command}: say in RUN_BY which test runs it"
    if recipe := own_recipe(params):
        load_recipe(recipe, params.get("overrides"))


def test_commands_that_other_tests_run_stand_in_them() -> None:
    for name, file in RUN_BY.items():
        assert f'"{name}"' in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file} runs no {name}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.ours is None], ids=str)
def test_other_command_has_a_reason_not_to_be_run(command: Command) -> None:
    head, *words = command.words
    assert Path(head).name in NOT_RUN or head in NOT_RUN, f"{command}: say in NOT_RUN why no test runs it"
    if head == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), command


RUNNABLE = {  # the same command on two pages is one
    " ".join(command.ours or []): command
    for command in OURS
    if RUN_HERE & set(command.ours or []) and not YOURS & set(command.words)
}


@pytest.mark.ranks
@pytest.mark.parametrize("command", RUNNABLE.values(), ids=str)
def test_command_runs_in_a_folder_with_nothing_but_recipes(command: Command, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    arguments = command.ours or []
    if arguments[0] == "status":
        run = tmp_path / arguments[1]
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_bytes((ROOT / "recipes" / f"{run.name}.yaml").read_bytes())
    if arguments[0] == "submit":
        arguments = [*arguments, "--dry-run"]
    done = in_folder(tmp_path, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"recipes", "runs"}


PLANS = list(
    zip(
        (command for command in OURS if command.page == "memory-and-hours.md"),
        (text for page, text in blocks("text") if page == "memory-and-hours.md"),
        strict=True,
    )
)


@pytest.mark.ranks
@pytest.mark.parametrize(("command", "printed"), PLANS, ids=["8 GPUs", "QLoRA", "LoRA"])
def test_plan_prints_what_the_page_shows(command: Command, printed: str, tmp_path: Path) -> None:
    """`…` at the beginning stands for lines that the page leaves out."""
    shared, folder = shared_data("").parent, tmp_path / "checkout"
    model = folder / "shapes" / "Qwen2-7B"
    shutil.copytree(shared / "data" / "tokenizers" / "qwen2", model)
    model.chmod(0o755)  # ../shared may be read-only
    shutil.copyfile(shared / "data" / "model_configs" / "Qwen2-7B.config.json", model / "config.json")
    (tmp_path / "shared").symlink_to(shared)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    done = in_folder(folder, command.ours or [])
    assert done.returncode == 0, done.stdout + done.stderr
    text = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines() if not line.startswith("next: "))
    assert text[-len(printed) + 2 :] == printed[2:] if printed.startswith("…") else text == printed


def test_options_of_commands_inside_sentences_exist() -> None:
    group: Any = typer.main.get_command(app)
    for page in PAGES:
        for span in re.findall(r"`atlantis-ds ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
            name, *words = span.split()
            known = {option for parameter in group.commands[name].params for option in parameter.opts} | {"--help"}
            assert {word for word in words if word.startswith("--")} <= known, f"{page.name}: {span}"


def in_folder(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in ENV.items() if name != "HF_HUB_OFFLINE"}  # `check` uses no network
    command = [sys.executable, "-m", "atlantis_ds", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=[page for page, _ in blocks("yaml")])
def test_yaml_is_a_recipe_or_a_part_of_one(page: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    model = {"model_name_or_path": "hub/model"}
    whole = {"name": "x", "data": {"train": "x.csv"}, "models": {"large": model, "small": model}}
    tree = yaml.safe_load(text)
    if "name" in tree:
        load_recipe(path)
    else:
        overrides = [f"{key}={yaml.safe_dump(value)}" for key, value in flat(tree)]
        path.write_text(yaml.safe_dump(whole))
        assert isinstance(load_recipe(path, overrides), Recipe)


def flat(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    """Keys of the first two levels with their values: a part of a section stays beside the rest of it."""
    found = []
    for key, value in tree.items():
        inside = value.items() if isinstance(value, dict) and key in ("data", "models", "train") else None
        found += [(key, value)] if inside is None else [(f"{key}.{name}", part) for name, part in inside]
    return found


def test_quickstart_recipe_is_valid_beside_its_data(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    recipe = next(text for name, text in blocks("yaml") if name == "quickstart.md" and text.startswith("name:"))
    rows = re.search(r"^text,label\n(?:.+\n)+", page, re.M)
    assert rows, "quickstart.md shows the first rows of its CSV file"
    (tmp_path / "questions.yaml").write_text(recipe)
    for name in ("questions.csv", "questions_test.csv"):
        (tmp_path / name).write_text(rows.group())
    done = in_folder(tmp_path, ["check", "questions.yaml"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "questions.yaml: valid. Run folder runs/questions; arms sft, atlantis" in page
    assert "questions.yaml: valid. Run folder runs/questions; arms sft, atlantis" in done.stdout


TOP = "recipes|tools|tests|slurm|ds_configs|experiments|docs|atlantis_ds"


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "experiments").glob("*.md")], ids=lambda page: page.name)
def test_files_and_links_of_a_page_are_there(page: Path) -> None:
    """The kept scores are in the history, not in the tree.

    Links inside docs/ are looked at by `make docs`, with their anchors. It also refuses a page of its list that is
    not there, so a link to one of these is right."""
    text = page.read_text(encoding="utf-8")
    nav = {f"docs/{name}" for name in re.findall(r"^ +- ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)}
    named = set(re.findall(rf"(?<![\w/.])(?:{TOP})/[\w./-]*\w", text))
    named = {name for name in named - nav if "NAME" not in name and not name.startswith("experiments/scores")}
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    if page.parent != ROOT / "docs":
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
        missing += [link for link in links if link not in nav and not (page.parent / link).exists()]
    assert not missing


def test_index_of_the_journal_has_every_page() -> None:
    index = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "experiments").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\((\w+\.md)\) \|$", index, re.M))
