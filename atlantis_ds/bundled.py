"""The files that are part of the package: DeepSpeed configs, Slurm job files, recipes.

They are at the top level of the repository; in the wheel, setup.py puts them inside the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from atlantis_ds.errors import InputError

Kind = Literal["ds_configs", "slurm", "recipes"]
PACKAGE = Path(__file__).parent


def bundled_files(kind: Kind) -> dict[str, Path]:
    """Name → path of every bundled file of a kind, sorted by name. Recipes of studies also have their bare names."""
    wheel, checkout = PACKAGE / kind, PACKAGE.parent / kind
    paths = (wheel if wheel.is_dir() else checkout).rglob("*.*")
    return {path.name: path for path in sorted(paths, key=lambda path: path.name)}


def bundled(kind: Kind, name: str) -> Path:
    """The bundled file with this name; KeyError if there is none."""
    return bundled_files(kind)[name]


def find(kind: Kind, text: str | Path, key: str) -> Path:
    """The file that a recipe or command line names: a name without folder is a bundled file, a path is the user's own.

    A path is relative to the working directory, and is not checked here. For recipes only, a file in the working
    directory takes precedence over a bundled file of the same name, because people run `atlantis-ds run my.yaml`.

    Args:
        key: the source of the text, for the message: a key of the recipe, or an argument.

    Raises:
        InputError: no file has this name; the message lists the bundled files.
    """
    name, files = str(text), bundled_files(kind)
    if Path(name).name != name or (kind == "recipes" and Path(name).exists()):
        return Path(name)
    if name in files:
        return files[name]
    known = f"among the bundled ones: {', '.join(files)}"
    if kind == "recipes":
        raise InputError(f"{key}: {name}: no such recipe file in this folder, nor {known}")
    raise InputError(f"{key}: {name}: not {known}; for your own file, give the folder, too: ./{name}")
