"""The fine-tuned reference: its folds, its rounds, and the names of its models."""

from __future__ import annotations

import numpy as np

from atlantis_ds.config.schema import Model, Recipe, Reference
from atlantis_ds.data.examples import Split
from atlantis_ds.data.splits import group_folds
from atlantis_ds.errors import InputError
from atlantis_ds.run_folder import RunFolder


def reference_name(folder: RunFolder, fold: int, reference: Reference) -> str:
    """The name of a fine-tuned reference among the trained models."""
    name = "reference" if reference.folds == 1 else f"reference-{fold}-of-{reference.folds}"
    name += "-by-group" if reference.folds_by == "group" else ""
    return f"{name}-round-{folder.round}" if folder.round else name


def example_folds(reference: Reference, train: Split) -> np.ndarray:
    """The fold of each training example, int64 [n]: the fold whose reference was not trained on it.

    For an example from several groups, the first group counts.

    Raises:
        InputError: ``folds_by: group`` is set, but no example has a group.
    """
    ordinary = train.folds(reference.folds)
    if reference.folds_by == "text":
        return ordinary
    groups = _first_groups(train)
    if not (groups >= 0).any():
        raise InputError(
            "models.reference.folds_by: group: no example has a group; set the column with data.columns.group"
        )
    return group_folds(train.text_codes, groups, train.codes if train.labels else None, ordinary, reference.folds)


def _first_groups(train: Split) -> np.ndarray:
    """int [n], indices into the group names: the first group of each example, -1 if it has none."""
    rows, groups, _ = train.memberships
    return groups[np.unique(rows, return_index=True)[1]]


def judged_by_others(reference: Reference, train: Split) -> np.ndarray | None:
    """Whether the reference that scores an example has seen no other example of its group.

    bool [m], for ``train.memberships``; None for folds by text. A group whose examples are in several folds was seen by
    all references.
    """
    if reference.folds_by == "text":
        return None
    rows, groups, names = train.memberships
    folds = example_folds(reference, train)[rows]
    first, last = np.full(len(names) + 1, reference.folds), np.full(len(names) + 1, -1)
    np.minimum.at(first, groups, folds)  # -1 (no group) indexes the last entry
    np.maximum.at(last, groups, folds)
    return (groups >= 0) & (first == last)[groups]


def round_before(recipe: Recipe, folder: RunFolder) -> RunFolder | None:
    """The round whose weights the folder's reference is trained with; None for the first."""
    before = (folder.round or recipe.models.reference.rounds) - 1
    return RunFolder(folder.root, before) if before else None


def trained_references(recipe: Recipe, folder: RunFolder) -> list[tuple[int | None, Model]]:
    """The models of the folds, each with the fold that it was not trained on; (None, model) if there is one fold.

    Raises:
        InputError: a model is not trained yet.
    """
    reference = recipe.models.reference
    found: list[tuple[int | None, Model]] = []
    for fold in range(reference.folds):
        path = folder.model(reference_name(folder, fold, reference)) / "last"
        if not path.is_dir():
            raise InputError(f"{path}: the fine-tuned reference is missing; run `train --arm reference` first")
        start = reference if reference.model_name_or_path else recipe.models.small
        model = Model(model_name_or_path=str(path), trust_remote_code=start.trust_remote_code)
        found.append((fold if reference.folds > 1 else None, model))
    return found
