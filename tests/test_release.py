"""``make release`` on a copy of the tree: what it builds and checks, and what it refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ENV, ROOT

from atlantis_ds import __version__

PACKED = ("atlantis_ds", "ds_configs", "slurm", "recipes", "tools/release.sh", "setup.py", "pyproject.toml")
PACKED += ("MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt", ".gitignore")
GIT = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(tree: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(tree), *words], env=ENV | GIT, check=True, capture_output=True)


@pytest.fixture()
def tree(tmp_path: Path) -> Path:
    """A repository of one commit."""
    if shutil.which("git") is None:
        pytest.skip("no git here")
    for name in PACKED:
        here, there = ROOT / name, tmp_path / "tree" / name
        there.parent.mkdir(parents=True, exist_ok=True)
        if here.is_dir():
            shutil.copytree(here, there, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(here, there)
    git(tmp_path / "tree", "init", "-q")
    git(tmp_path / "tree", "add", "-A")
    git(tmp_path / "tree", "commit", "-qm", "all")
    return tmp_path / "tree"


def release(tree: Path) -> tuple[int, str]:
    env = {name: value for name, value in ENV.items() if name != "PYTHONPATH"}
    env |= {"PIP_NO_INDEX": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([tree / "tools" / "release.sh"], env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.slow  # two environments
def test_both_files_are_whole_and_the_tag_is_named(tree: Path) -> None:
    (tree / "dist").mkdir()
    (tree / "dist" / "of an earlier version").touch()
    (tree / "build" / "lib" / "atlantis_ds").mkdir(parents=True)
    (tree / "build" / "lib" / "atlantis_ds" / "stale.py").touch()  # an earlier build; git ignores it
    code, out = release(tree)
    assert code == 0, out
    wheel, sdist = sorted((tree / "dist").iterdir(), reverse=True, key=lambda path: path.suffix)
    assert (wheel.name, sdist.name) == (
        f"atlantis_ds-{__version__}-py3-none-any.whl",
        f"atlantis_ds-{__version__}.tar.gz",
    )
    for file in (wheel, sdist):
        assert f"{file.name}: installed; --version, check demo.yaml and pip check are right" in out
    assert f"git tag -a v{__version__} " in out
    with zipfile.ZipFile(wheel) as one, tarfile.open(sdist) as other:
        carried, packed = set(one.namelist()), {"/".join(name.split("/")[1:]) for name in other.getnames()}
    modules = {
        str(path.relative_to(tree)) for path in (tree / "atlantis_ds").rglob("*") if path.suffix in (".py", ".html")
    }
    assert {name for name in carried if name.endswith((".py", ".html"))} == modules
    assert {f"atlantis_ds/{path.relative_to(tree)}" for path in (tree / "recipes").rglob("*.yaml")} <= carried
    assert modules | {"constraints.txt", "CHANGELOG.md", "recipes/demo.yaml"} <= packed
    assert not any(name.startswith("tests") for name in packed | carried)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: (tree / "note").touch(), "the working tree has changes"),
        (lambda tree: replace(tree / "CHANGELOG.md", f"[{__version__}]", "[0.0.0]"), "CHANGELOG.md: no section"),
        (
            lambda tree: replace(tree / "CITATION.cff", f"version: {__version__}", "version: 9"),
            "CITATION.cff: its version",
        ),
        (lambda tree: git(tree, "tag", f"v{__version__}"), f"the tag v{__version__} is on another commit"),
    ],
    ids=["changes", "changelog", "citation", "tag"],
)
def test_what_is_not_ready_is_refused(tree: Path, change: Callable[[Path], object], said: str) -> None:
    change(tree)
    if said != "the working tree has changes":
        git(tree, "commit", "-qam", "more", "--allow-empty")
    code, out = release(tree)
    assert code == 1 and said in out and len(out.splitlines()) == 1, out
    assert not (tree / "dist").exists()


def test_citation_and_changelog_name_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"(?m)^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text())
