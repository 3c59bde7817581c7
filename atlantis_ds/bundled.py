"""The files that travel with the package: DeepSpeed configs, Slurm job files, recipes.

They lie at the top level of the repository; setup.py puts them inside the package in the wheel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from atlantis_ds.errors import InputError

Kind = Literal["ds_configs", "slurm", "recipes"]
PACKAGE = Path(__file__).parent


def bundled_files(kind: Kind) -> dict[str, Path]:
    """Name → path of every bundled file of a kind, sorted by name. A recipe of a study goes by its bare name, too."""
    wheel, checkout = PACKAGE / kind, PACKAGE.parent / kind
    paths = (wheel if wheel.is_dir() else checkout).rglob("*.*")
    return {path.name: path for path in sorted(paths, key=lambda path: path.name)}


def bundled(kind: Kind, name: str) -> Path:
    """The bundled file of this name; KeyError where there is none."""
    return bundled_files(kind)[name]


def find(kind: Kind, text: str | Path, key: str) -> Path:
    """The file that a recipe or a command line means: a name without a folder is a bundled file, a path the user's own.

    A path is relative to the working directory, and is not looked at here. Of recipes, and only of them, a file in
    the working directory goes before the bundled one of its name: people run `atlantis-ds run my.yaml`.

    Args:
        key: where the text stands, for the message: a key of the recipe, or an argument.

    Raises:
        InputError: a name without a folder that no file has; the message names those that are bundled.
    """
    name, files = str(text), bundled_files(kind)
    if Path(name).name != name or (kind == "recipes" and Path(name).exists()):
        return Path(name)
    if name in files:
        return files[name]
    known = f"among the bundled ones: {', '.join(files)}"
    if kind == "recipes":
        raise InputError(f"{key}: {name}: no such recipe file in this folder, nor {known}")
    raise InputError(f"{key}: {name}: not {known}; for a file of your own give its folder, too: ./{name}")
