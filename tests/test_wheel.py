"""The package as a user gets it: a wheel, no checkout, any working directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV, ROOT

from atlantis_ds.bundled import Kind, bundled, bundled_files, find
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.errors import InputError
from atlantis_ds.train.deepspeed_config import deepspeed_config

pytestmark = pytest.mark.ranks

KINDS: tuple[Kind, ...] = ("ds_configs", "slurm", "recipes")
PACKED = ("atlantis_ds", "setup.py", "pyproject.toml", "README.md", "LICENSE", *KINDS)


def run(command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, built from a copy of the tree; build isolation would need the network."""
    tree, wheels, target = (tmp_path_factory.mktemp(name) for name in ("tree", "wheels", "target"))
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = {name: value for name, value in ENV.items() if name != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"}
    for command in (
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), "."],
        [*pip, "install", "--no-deps", "--target", str(target), "--find-links", str(wheels), "atlantis_ds"],
    ):
        done = run(command, tree, offline)
        assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture()
def wheel(installed: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """An empty working directory, and an environment in which only the wheel is on the path."""
    return tmp_path, ENV | {"PYTHONPATH": str(installed)}


def test_commands_run_from_a_wheel_in_an_empty_folder(wheel: tuple[Path, dict[str, str]]) -> None:
    cwd, env = wheel
    for words in (["check", "demo.yaml"], ["submit", "demo.yaml", "--dry-run"]):
        done = run([sys.executable, "-m", "atlantis_ds", *words], cwd, env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "demo" in done.stdout
    for job in ("prepare", "reference", "score", "merge", "train-sft", "train-atlantis", "evaluate"):
        assert f"/{job}.sbatch <==\n#!/bin/bash" in done.stdout
    assert not any(cwd.iterdir())


def test_wheel_carries_every_file_of_the_three_folders(wheel: tuple[Path, dict[str, str]], installed: Path) -> None:
    cwd, env = wheel
    ask = f"""
from atlantis_ds.bundled import bundled_files
for kind in {KINDS}:
    for path in bundled_files(kind).values():
        print(path)
"""
    done = run([sys.executable, "-c", ask], cwd, env)
    assert done.returncode == 0, done.stderr
    carried = {Path(line).relative_to(installed / "atlantis_ds"): Path(line) for line in done.stdout.splitlines()}
    here = {path.relative_to(ROOT): path for kind in KINDS for path in (ROOT / kind).rglob("*") if path.is_file()}
    assert carried.keys() == here.keys() and len(here) > 25
    assert all(carried[name].read_bytes() == here[name].read_bytes() for name in here)


def test_wheel_carries_the_pages(installed: Path) -> None:
    here, there = (
        {path.name: path.read_bytes() for path in (root / "atlantis_ds" / "pages").iterdir() if path.is_file()}
        for root in (ROOT, installed)
    )
    assert here == there and {"base.html", "style.css", "sort.js"} < here.keys()


def test_every_file_has_a_name_of_its_own() -> None:
    for kind in KINDS:
        files = [path for path in (ROOT / kind).rglob("*") if path.is_file()]
        assert sorted(bundled_files(kind).values()) == sorted(files), "two of one name hide each other"
        assert all(bundled(kind, path.name) == path for path in files)


def test_name_means_the_bundled_file_and_a_path_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for own in ("zero3.json", "demo.yaml", "mine.yaml"):
        Path(own).write_text("{}")
    assert find("ds_configs", "zero3.json", "train.deepspeed") == ROOT / "ds_configs" / "zero3.json"
    assert find("ds_configs", "./zero3.json", "train.deepspeed").resolve() == tmp_path / "zero3.json"
    assert find("ds_configs", "ds_configs/zero3.json", "train.deepspeed") == Path("ds_configs/zero3.json")
    with pytest.raises(InputError, match=r"^train\.deepspeed: zero9\.json: .*zero0\.json, .*own .*\./zero9\.json$"):
        find("ds_configs", "zero9.json", "train.deepspeed")
    # Of recipes a file in the working directory goes first.
    assert find("recipes", "demo.yaml", "RECIPE") == Path("demo.yaml")
    assert find("recipes", "mine.yaml", "RECIPE") == Path("mine.yaml")
    os.remove("demo.yaml")
    assert find("recipes", Path("demo.yaml"), "RECIPE") == ROOT / "recipes" / "demo.yaml"
    assert find("recipes", "conll04_gold.yaml", "RECIPE") == ROOT / "recipes" / "studies" / "conll04_gold.yaml"
    with pytest.raises(InputError, match=r"^RECIPE: yours\.yaml: .*demo\.yaml"):
        find("recipes", "yours.yaml", "RECIPE")


@pytest.mark.parametrize("name", bundled_files("recipes"))
def test_recipes_of_the_project_find_their_deepspeed_config(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    deepspeed_config(load_recipe(bundled("recipes", name)).train, world_size=2)
