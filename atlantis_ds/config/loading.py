"""Reads a recipe file (YAML) and `--set` overrides into a typed recipe; errors name the file and the key."""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from atlantis_ds.config.schema import DEFAULT_ARMS, Evaluate, Recipe, Weights
from atlantis_ds.errors import InputError


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: the YAML file.
        overrides: ``dotted.key=value`` strings, the value in YAML; later ones take precedence.

    Raises:
        InputError: one line that names the file and the key, with a suggestion for a misspelt key.
    """
    tree = _read_yaml(Path(path))
    if "arms" not in tree and any(override.startswith("arms.") for override in overrides or []):
        # An override of one arm keeps the other arms, even if they are the default arms.
        tree["arms"] = {name: arm.model_dump(exclude_unset=True) for name, arm in DEFAULT_ARMS.items()}
    for override in overrides or []:
        _set(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{path}: {_problems(error)}") from None


def weights_section(options: dict[str, Any]) -> Weights:
    """The recipe's ``weights`` section with these keys; the other keys have their defaults.

    Raises:
        InputError: one line that names the key.
    """
    try:
        return Weights.model_validate(options)
    except ValidationError as error:
        raise InputError(_problems(error, "weights")) from None


def refuse_bad_answer(answer: str) -> None:
    """Raise InputError if the recipe's ``evaluate`` section would refuse this ``answer``."""
    try:
        Evaluate.model_validate({"answer": answer})
    except ValidationError as error:
        raise InputError(_problems(error, "evaluate")) from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and, like YAML 1.2, reads 1e-5 as a number and ``on``, ``no`` as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                what = "a key must be text: put it in quotes, or the value in front of it that begins with { or ["
                raise yaml.constructor.ConstructorError(None, None, what, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key `{key}`", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
for _first in "yYnNoO":
    _Loader.yaml_implicit_resolvers[_first] = [
        (tag, pattern) for tag, pattern in _Loader.yaml_implicit_resolvers[_first] if tag != "tag:yaml.org,2002:bool"
    ]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; give a recipe file, of a run its {path / 'recipe.yaml'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(f"{where}: not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a recipe must be a mapping of keys to values")
    return tree


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: write it as dotted.key=value")
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {override}: `{parent}` is a value, not a section")
        tree = child
    try:
        tree[last] = yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--set {override}: not valid YAML: {_yaml_problem(error)}") from None


def _yaml_problem(error: Exception) -> str:
    return " ".join(str(getattr(error, "problem", error)).split())


def _problems(error: ValidationError, *section: str) -> str:
    """The errors that pydantic found in a recipe or a section, on one line."""
    problems = [_explain((*section, *item["loc"]), item) for item in error.errors()]
    more = f" (and {len(problems) - 1} more: {'; '.join(problems[1:])})" if len(problems) > 1 else ""
    return f"{problems[0]}{more}"


def _explain(location: tuple[Any, ...], error: Any) -> str:
    kind = error["type"]
    key = ".".join(str(part) for part in location) or "recipe"
    if kind == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        return f"{key}: unknown key; " + (f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}")
    if kind == "missing":
        return f"{key}: this key is required"
    if kind == "value_error":
        return f"{key}: {error['ctx']['error']}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    section: Any = Recipe
    for part in location:
        if isinstance(section, type) and issubclass(section, BaseModel):
            section = section.model_fields[part].annotation
            if isinstance(section, types.UnionType):
                section = next(arg for arg in typing.get_args(section) if arg is not types.NoneType)
        else:  # dict[str, Section]
            section = typing.get_args(section)[1]
    return list(section.model_fields)
