"""The prompt that a model reads for one example."""

from __future__ import annotations

import re

from atlantis_ds.config.schema import Prompt
from atlantis_ds.data.table import Example


def render_prompt(example: Example, prompt: Prompt, labels: list[str]) -> str:
    """Fill the template for one example.

    Args:
        example: the sentence and its two entities.
        prompt: the template with fields {sentence}, {marked_sentence}, {e1}, {e2}, {options}, and whether to list the
            labels after it.
        labels: the label set, in order; used with {options} and ``label_options`` only.

    Returns:
        the prompt without a trailing line end (the encoder adds it where the model needs it).
    """
    fields = {
        "sentence": example.sentence,
        "marked_sentence": marked_sentence(example),
        "e1": example.sentence[slice(*example.e1)],
        "e2": example.sentence[slice(*example.e2)],
        "options": ", ".join(labels),
    }
    # One pass over the template: braces in the user's text are never read as fields.
    text = re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], prompt.template).rstrip("\r\n")
    return f"{text}\nOptions: {fields['options']}" if prompt.label_options else text


def marked_sentence(example: Example) -> str:
    """The sentence with its entities as ``[E1] … [/E1]`` and ``[E2] … [/E2]`` (also when one lies in the other)."""
    marks: list[tuple[tuple[int, int, int], str]] = []
    for name, (start, end) in (("E1", example.e1), ("E2", example.e2)):
        # At one position closing marks come first, the inner entity's before the outer's; opening marks outer first.
        marks.append(((start, 1, -end), f"[{name}] "))
        marks.append(((end, 0, -start), f" [/{name}]"))
    pieces, done = [], 0
    for (position, _, _), mark in sorted(marks):
        pieces += [example.sentence[done:position], mark]
        done = position
    return "".join(pieces) + example.sentence[done:]
