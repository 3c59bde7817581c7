"""The prompt of one example, rendered once, in ``prepare``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from atlantis_ds.config.schema import Prompt, Task
from atlantis_ds.data.relation import TEMPLATE as RELATION_TEMPLATE
from atlantis_ds.data.rows import BadRow

TEXTS = ("text", "sentence", "prompt", "question")
"""Usual names of columns with the text of an example."""


def refuse_odd_names(names: Iterable[str]) -> None:
    """Raises BadRow: a template cannot name a column that is called so."""
    if odd := [name for name in names if name == "options" or not re.fullmatch(r"\w+", name)]:
        raise BadRow(
            f"a prompt cannot name the column {odd[0]!r:.60}: rename it, with letters, digits and _ alone (and not "
            "`options`)"
        )


def template_for(task: Task, prompt: Prompt, fields: Mapping[str, str]) -> str:
    """The recipe's template, or the task's default template.

    Args:
        fields: the columns of the first example.

    Raises:
        BadRow: the template names a column that does not exist, or no default can be chosen.
    """
    if prompt.template is not None:
        own = {"options"} if task != "response" else set()
        refuse_odd_names(name for name in fields if f"{{{name}}}" in prompt.template and name not in own)
        known = {*fields, *own} - {"messages"}
        if unknown := sorted(set(re.findall(r"\{(\w+)\}", prompt.template)) - known):
            raise BadRow(f"prompt.template has an unknown field {{{unknown[0]}}}; known: {', '.join(sorted(known))}")
        return prompt.template
    if task == "relation":
        return RELATION_TEMPLATE
    if task == "response" and "instruction" in fields:
        return "{instruction}\n{input}" if "input" in fields else "{instruction}"
    text = next((name for name in TEXTS if name in fields), None) or (next(iter(fields)) if len(fields) == 1 else None)
    if text is None:
        raise BadRow(f"prompt.template is needed: which of the columns {', '.join(fields)} belong in the prompt?")
    return f"{{{text}}}" if task == "response" else f"Which label fits: {{options}}?\n{{{text}}}"


def render_prompt(template: str, fields: Mapping[str, str], prompt: Prompt, labels: list[str] | None) -> str:
    """Fill the template for one example.

    Args:
        labels: the label set, in order; used only with {options} and ``label_options``.

    Returns:
        the prompt without a trailing newline (the encoder adds one if the model needs it).
    """
    options = ", ".join(labels or [])
    values = {**fields, "options": options}
    # One pass over the template, so that braces in the user's text are never read as fields.
    text = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], ""), template).rstrip("\r\n")
    return f"{text}\nOptions: {options}" if prompt.label_options else text
