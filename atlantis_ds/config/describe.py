"""The keys of a recipe, as a JSON schema for editors and as a documentation page (docs/recipe.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atlantis_ds.config.schema import Recipe

Schema = dict[str, Any]
SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")
"""The output of `atlantis-ds schema`, for editors; it is part of the package."""

HEAD = """# The recipe

One YAML file describes a whole experiment. `atlantis-ds schema --markdown` generates this page from the code.
`atlantis-ds init DATA` writes a first recipe for a data file; `atlantis-ds check RECIPE` finds errors in a recipe.
Any key can be set on the command line: `--set train.learning_rate=1e-5`. A key that is not on this page is an error.

Editors complete and check a recipe if its first line names the schema:

    # yaml-language-server: $schema=recipe.schema.json

`atlantis-ds schema > recipe.schema.json` writes that file. Recipes written by `init` already name a schema.
"""


def json_schema() -> Schema:
    """The JSON schema of a recipe (draft 2020-12). Only `check` finds keys that exclude each other."""
    schema = Recipe.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        section.pop("title", None)
        for field in section["properties"].values():
            field.pop("title", None)
            if "description" in field:
                field["description"] = " ".join(field["description"].split())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "atlantis_ds recipe", **schema}


def reference_page() -> str:
    """All keys of a recipe as Markdown: one table per section, with values, default and meaning."""
    schema = json_schema()
    return "\n".join([HEAD, *_section(schema, "", schema["$defs"], {})])


def _section(section: Schema, path: str, known: dict[str, Schema], shown: dict[str, str]) -> list[str]:
    """The lines of a section and of the sections inside it.

    Args:
        path: its key, with dots; empty for the recipe itself.
        known: the sections by name.
        shown: name → path of the sections that have been written; this section and those inside it are added.
    """
    lines = [f"{'#' * (2 + path.count('.'))} {f'`{path}`' if path else 'Top level'}", ""]
    if path and "description" in section:
        lines += [" ".join(section["description"].split()), ""]
    lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
    inside: list[str] = []
    for key, field in section["properties"].items():
        meaning = field.get("description", "").replace("|", "\\|")
        name = _name_of_section(field)
        if name is None:
            default = "needed" if key in section.get("required", ()) else _value(field.get("default"))
            lines.append(f"| `{key}` | {_values(field)} | {default} | {meaning} |")
            continue
        if name not in shown:
            shown[name] = f"{path}.{key}".lstrip(".") + (".NAME" if "additionalProperties" in field else "")
            inside.append(name)
        link = f"[`{shown[name]}`](#{shown[name].lower().replace('.', '')})"
        lines.append(f"| `{key}` | a section | | {meaning} See {link}. |")
    lines.append("")
    return lines + [line for name in inside for line in _section(known[name], shown[name], known, shown)]


def _name_of_section(field: Schema) -> str | None:
    """The section that is the value of a key, or of each entry of a mapping; None for a plain value."""
    for item in (field, *field.get("anyOf", ()), field.get("additionalProperties")):
        if isinstance(item, dict) and "$ref" in item:
            return str(item["$ref"].rsplit("/", 1)[1])
    return None


BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": ""}


def _values(field: Schema) -> str:
    """The possible values of a plain key, in words."""
    if "anyOf" in field:
        return " or ".join(filter(None, map(_values, field["anyOf"])))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_values(field['items'])}"
    if field.get("type") == "object":
        inner = field.get("additionalProperties")
        return f"mapping to {_values(inner)}" if isinstance(inner, dict) else "mapping"
    bounds = " and ".join(f"{sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field and field[key] < 1e9)
    return " ".join(filter(None, [KINDS[field["type"]], bounds]))


def _value(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value) if not isinstance(value, str) else value}`"
