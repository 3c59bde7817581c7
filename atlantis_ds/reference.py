"""The fine-tuned reference: its folds, its rounds, and what its models are called."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from atlantis_ds.config.schema import Model, Recipe, Reference
from atlantis_ds.data.examples import Split
from atlantis_ds.data.rows import GROUPS
from atlantis_ds.data.splits import group_folds
from atlantis_ds.errors import InputError
from atlantis_ds.run_folder import RunFolder


def reference_name(folder: RunFolder, fold: int, reference: Reference) -> str:
    """Name of a fine-tuned reference among the trained models."""
    name = "reference" if reference.folds == 1 else f"reference-{fold}-of-{reference.folds}"
    name += "-by-group" if reference.folds_by == "group" else ""
    return f"{name}-round-{folder.round}" if folder.round else name


def example_folds(reference: Reference, train: Split) -> np.ndarray:
    """The fold of each training example, int64 [n]: the one whose reference has not seen it.

    Of an example that several groups made the first counts.

    Raises:
        InputError: ``folds_by: group``, and no example has a group.
    """
    ordinary = train.folds(reference.folds)
    if reference.folds_by == "text":
        return ordinary
    groups = _first_groups(train)
    if not (groups >= 0).any():
        raise InputError(
            "models.reference.folds_by: group: no example has a group; name the column: data.columns.group"
        )
    return group_folds(train.text_codes, groups, train.codes if train.labels else None, ordinary, reference.folds)


def _first_groups(train: Split) -> np.ndarray:
    """int [n]: a number for the first group of each example, -1 where it has none."""
    first = pc.list_element(pc.split_pattern(train.groups.combine_chunks(), GROUPS), 0)
    return np.asarray(pc.fill_null(first.dictionary_encode().indices, -1).to_numpy())


def judged_by_others(reference: Reference, train: Split) -> np.ndarray | None:
    """bool [n]: whether no other example of its group trained the reference that scores it; None for folds by text."""
    if reference.folds_by == "text":
        return None
    folds, groups = example_folds(reference, train), _first_groups(train) + 1
    first, last = np.full(groups.max() + 1, reference.folds), np.full(groups.max() + 1, -1)
    np.minimum.at(first, groups, folds)
    np.maximum.at(last, groups, folds)
    return (groups > 0) & (first == last)[groups]


def round_before(recipe: Recipe, folder: RunFolder) -> RunFolder | None:
    """The round whose weights the folder's reference is trained on; None for the first."""
    before = (folder.round or recipe.models.reference.rounds) - 1
    return RunFolder(folder.root, before) if before else None


def trained_references(recipe: Recipe, folder: RunFolder) -> list[tuple[int | None, Model]]:
    """The models of the folds, each with the fold that it did not train on; (None, model) where there is one fold.

    Raises:
        InputError: one is not trained yet.
    """
    reference = recipe.models.reference
    found: list[tuple[int | None, Model]] = []
    for fold in range(reference.folds):
        path = folder.model(reference_name(folder, fold, reference)) / "last"
        if not path.is_dir():
            raise InputError(f"{path}: no fine-tuned reference there; run `train --arm reference` first")
        start = reference if reference.model_name_or_path else recipe.models.small
        model = Model(model_name_or_path=str(path), trust_remote_code=start.trust_remote_code)
        found.append((fold if reference.folds > 1 else None, model))
    return found
