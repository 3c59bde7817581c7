"""The same formats from a Hugging Face dataset, or a local folder that ``datasets`` can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atlantis_ds.data.formats import conll04_examples, jsonl_example, semeval_row
from atlantis_ds.data.table import Example
from atlantis_ds.errors import InputError

SPLITS = {"train": ["train"], "dev": ["validation", "dev"], "test": ["test"]}


def read_hub(
    hub_id: str, format: str, split: str, negatives: int = 0, seed: int = 0, labels: list[str] | None = None
) -> list[Example] | None:
    """Read one split with ``datasets.load_dataset``.

    Args:
        hub_id: a dataset id, ``id@revision``, or a local folder.
        format: how the rows look: semeval2010_task8 (``sentence`` with marks, ``relation``), conll04 (``tokens``,
            ``entities``, ``relations``), or jsonl.
        split: train, dev (``validation`` or ``dev`` there) or test.

    Returns:
        the examples; None where the dataset has no dev split.

    Raises:
        InputError: the dataset cannot be loaded, lacks the split, or holds a bad row ("hub_id[split] row N", from 0).
    """
    dataset = _load(hub_id)
    name = next((name for name in SPLITS[split] if name in dataset), None)
    if name is None:
        if split == "dev":
            return None
        raise InputError(f"data.hub_id: {hub_id} has no split `{split}`; it has {', '.join(dataset)}")
    rows = dataset[name]
    class_names = getattr(rows.features.get("relation"), "names", None)
    examples: list[Example] = []
    seen: set[str] = set()
    for index, row in enumerate(rows):
        try:
            if format == "semeval2010_task8":
                found = [semeval_row(row, f"semeval-{split}-{index}", split, class_names, labels)]
            elif format == "conll04":
                origin = row.get("orig_id", index)
                found = conll04_examples(row, f"conll04-{split}-{origin}", split, negatives, seed, labels)
            else:
                found = [jsonl_example(row, split, labels)]
            for example in found:
                if example.id in seen:
                    raise ValueError(f"the id {example.id!r} stands twice")
                seen.add(example.id)
        except ValueError as error:
            raise InputError(f"{hub_id}[{name}] row {index}: {error}") from None
        examples += found
    return examples


def _load(hub_id: str) -> Any:
    from datasets import load_dataset

    source, _, revision = (hub_id, "", "") if Path(hub_id).exists() else hub_id.partition("@")
    try:
        return load_dataset(source, revision=revision or None)
    except Exception as error:  # datasets raises many kinds for "not there", "no network", "not readable"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"data.hub_id: {hub_id} cannot be loaded ({reason}); check the id and the connection, or give files"
        ) from None
