"""The fine-tuned reference: its folds, its rounds, and what its models are called."""

from __future__ import annotations

from atlantis_ds.config.schema import Model, Recipe
from atlantis_ds.errors import InputError
from atlantis_ds.run_folder import RunFolder


def reference_name(folder: RunFolder, fold: int, folds: int) -> str:
    """Name of a fine-tuned reference among the trained models."""
    name = "reference" if folds == 1 else f"reference-{fold}-of-{folds}"
    return f"{name}-round-{folder.round}" if folder.round else name


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
        path = folder.model(reference_name(folder, fold, reference.folds)) / "last"
        if not path.is_dir():
            raise InputError(f"{path}: no fine-tuned reference there; run `train --arm reference` first")
        start = reference if reference.model_name_or_path else recipe.models.small
        model = Model(model_name_or_path=str(path), trust_remote_code=start.trust_remote_code)
        found.append((fold if reference.folds > 1 else None, model))
    return found
