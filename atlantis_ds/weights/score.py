"""Scores every training example under the frozen models, shard by shard, distributed over ranks.

Shards depend only on the data, and the batches of a shard only on that shard: any number of ranks gives the same
scores, and a run can finish with another world size. One base model is in memory at a time. Its scores for a shard are
written at once as a *part*, and a shard is complete when all its parts are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds import __version__
from atlantis_ds.cluster.preemption import leave_if_asked, stop_asked
from atlantis_ds.config.schema import Model, Recipe, Score
from atlantis_ds.data.examples import Examples, load_examples
from atlantis_ds.errors import InputError
from atlantis_ds.files import fingerprint, finished, read_json, read_table, wait_for_files, write_json, write_table
from atlantis_ds.lm.tokens import encode_split
from atlantis_ds.progress import Steps
from atlantis_ds.reference import example_folds, trained_references
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.weights.shards import COLUMNS, LABEL_SET, scored_by, scoring_inputs, shard_path

if TYPE_CHECKING:
    from atlantis_ds.lm.encode import Encoded
    from atlantis_ds.lm.frozen import Frozen
    from atlantis_ds.lm.likelihood import Progress
    from atlantis_ds.lm.ways import Ways


@dataclass(frozen=True)
class Pass:
    """One frozen model and the examples that it scores: all, or the fold that a cross-fitted reference leaves out."""

    column: str
    """large, small or reference."""
    model: Model
    fold: int | None = None
    same_as: str | None = None
    """The earlier pass with the same model, whose results count for both."""

    @property
    def name(self) -> str:
        return self.column if self.fold is None else f"{self.column}-{self.fold}"


def scoring_passes(recipe: Recipe, folder: RunFolder) -> list[Pass]:
    """The models to score with, in order."""
    from atlantis_ds.lm.load import model_source

    passes = [Pass(name, model_source(recipe, folder, name)) for name in ("large", "small")]
    reference = recipe.models.reference
    if reference.kind == "checkpoint":
        return [*passes, Pass("reference", model_source(recipe, folder, "reference"))]
    return passes + [Pass("reference", model, fold) for fold, model in trained_references(recipe, folder)]


def assign_shards(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Assign shards to ranks, most expensive first, to the least loaded rank: balanced, and the same on every rank.

    Returns:
        for each rank, the indices of its shards in ascending order.
    """
    load = [0.0] * world_size
    shards: list[list[int]] = [[] for _ in range(world_size)]
    for shard in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(world_size), key=lambda r: (load[r], r))
        load[rank] += costs[shard]
        shards[rank].append(shard)
    return [sorted(mine) for mine in shards]


def score(run: Run, part: tuple[int, int] = (1, 1)) -> None:
    """Write ``scores/shard-*.parquet`` for all training examples; do only what is missing.

    Args:
        part: (I, N): do part I of N of the shards, counted from 1, for N jobs that share the work.

    Raises:
        InputError: the existing scores were computed from other inputs; the message names the input that differs.
        Preempted: the job was asked to stop; complete shards are kept, the interrupted one is computed again.
    """
    from atlantis_ds.lm.frozen import Frozen
    from atlantis_ds.lm.load import model_identity
    from atlantis_ds.lm.staging import node_copy

    recipe, folder, ranks = run.recipe, run.folder, run.ranks
    examples = load_examples(folder)
    passes = scoring_passes(recipe, folder)
    settings = recipe.score.model_copy(update={"dtype": ranks.broadcast(_dtype(run))})
    inputs = {**scoring_inputs(recipe, examples), "dtype": settings.dtype}
    models = ranks.broadcast({p.name: model_identity(p.model) for p in passes} if ranks.is_main else None)
    by = scored_by(models, recipe.models.reference.chat_template)
    passes = [replace(each, same_as=by[each.name] if by[each.name] != each.name else None) for each in passes]
    inputs = {**inputs, **{f"model {name}": identity for name, identity in models.items()}}
    shards = Shards(examples, recipe.score.shard_size)
    manifest: dict[str, Any] = {
        "fingerprint": fingerprint(inputs),
        "shards": len(shards),
        "rows": len(examples.train),
        "inputs": inputs,
        "atlantis_ds": __version__,
    }
    if ranks.is_main:
        _claim_folder(folder, manifest)
    mine = range(len(shards))[part[0] - 1 :: part[1]]
    todo = ranks.broadcast(
        [i for i in mine if not finished(shard_path(folder, i, len(shards)), manifest["fingerprint"])]
        if ranks.is_main
        else None
    )
    run.say(f"score: {len(mine) - len(todo)} of {len(mine)} shards are done, {len(todo)} to do")
    frozen = Frozen(settings, ranks, partial(node_copy, run))
    for scoring in [scoring for scoring in passes if todo and not scoring.same_as]:
        _score_pass(run, shards, todo, scoring, manifest, frozen)
        leave_if_asked(folder, ranks, f"while scoring with {scoring.name}")
    frozen.free()
    for shard in todo[ranks.rank :: ranks.world_size]:
        _join_parts(folder, passes, shards, shard, manifest)
    ranks.barrier()


@dataclass(frozen=True)
class Shards:
    """The training examples divided into shards, in their order."""

    examples: Examples
    size: int

    def __len__(self) -> int:
        return -(-len(self.examples.train) // self.size)

    def rows(self, shard: int) -> np.ndarray:
        """Row numbers of a shard's examples, int64."""
        return np.arange(shard * self.size, min((shard + 1) * self.size, len(self.examples.train)))

    def ids(self, shard: int) -> pa.Array:
        return self.examples.train.ids.slice(shard * self.size, self.size).combine_chunks()


def _dtype(run: Run) -> str:
    """Precision of the model bodies. With ``auto``, that of existing shards, if any: a run has one precision."""
    from atlantis_ds.lm.load import dtype_on

    manifest = run.folder.scores / "scores.json"
    if run.recipe.score.dtype == "auto" and manifest.exists():
        return str(read_json(manifest)["inputs"]["dtype"])
    return dtype_on(run.recipe.score.dtype, run.ranks.device)


def _claim_folder(folder: RunFolder, manifest: dict[str, Any]) -> None:
    path = folder.scores / "scores.json"
    if path.exists():
        old = read_json(path)
        if old["fingerprint"] != manifest["fingerprint"]:
            keys = sorted(set(old["inputs"]) | set(manifest["inputs"]))
            differing = [key for key in keys if old["inputs"].get(key) != manifest["inputs"].get(key)]
            raise InputError(
                f"{folder.scores}: contains scores computed from other inputs (different: {', '.join(differing)}); "
                "choose another `name`, or remove this folder to score again"
            )
        return
    write_json(path, manifest)


def _score_pass(
    run: Run, shards: Shards, todo: list[int], scoring: Pass, manifest: dict[str, Any], frozen: Frozen
) -> None:
    from atlantis_ds.lm.check import check_scoring, sample_rows

    recipe, folder, ranks, examples = run.recipe, run.folder, run.ranks, shards.examples
    missing = ranks.broadcast(
        [s for s in todo if not finished(_part_path(folder, s, len(shards), scoring), manifest["fingerprint"])]
        if ranks.is_main
        else None
    )
    if not missing:
        return
    chat = scoring.column == "reference" and recipe.models.reference.chat_template
    encoded = encode_split(run, examples, "train", scoring.model, as_turn=chat)
    folds = None if scoring.fold is None else example_folds(recipe.models.reference, examples.train)
    rows = {shard: _of_fold(shards.rows(shard), folds, scoring.fold) for shard in missing}
    costs = [float(encoded.lengths[rows[shard]].sum()) for shard in missing]
    assigned = [[missing[i] for i in indices] for indices in assign_shards(costs, ranks.world_size)]
    mine = assigned[ranks.rank]
    sharded = frozen.choose(scoring.model, scoring.name)
    if not mine and not sharded:
        return
    labels = _label_ids(scoring.model, examples.labels) if recipe.score.label_set else None
    model = frozen.load(scoring.model)
    samples = [encoded[row] for row in sample_rows(encoded.lengths)]
    ways = check_scoring(model, samples, labels, samples[0].eos, prefix=not sharded)
    run.say(f"score {scoring.name}: {ways}")
    # A sharded model needs all ranks in every forward pass; a rank without shards left runs dummy passes.
    turns: list[int | None] = [*mine, *[None] * (max(map(len, assigned)) - len(mine) if sharded else 0)]
    total = sum(len(rows[shard]) for shard in mine)
    tokens = 0
    with Steps(f"score {scoring.name}", total, "examples", ranks.is_main, every=max(1, total // 10)) as steps:

        def progress(count: int, batch_tokens: int) -> None:
            nonlocal tokens
            tokens += batch_tokens
            steps.advance(count)
            if not sharded and stop_asked(folder, look=False):
                raise _StopAsked  # a shard with thousands of labels takes longer than a queue waits

        def agree(forwards: int) -> int:
            return max(ranks.gather(forwards))

        for shard in turns:
            chosen = rows[shard] if shard is not None else np.empty(0, dtype=np.int64)
            # A sharded model also runs without examples of this fold: all ranks take part in every forward pass.
            read = chosen if len(chosen) or not sharded else np.zeros(1, dtype=np.int64)
            try:
                columns = _score_rows(
                    model,
                    [encoded[row] for row in read.tolist()],
                    examples.train.codes[read],
                    labels,
                    recipe.score,
                    progress if len(chosen) else None,
                    agree if sharded else None,
                    ways,
                )
            except _StopAsked:
                break
            if shard is not None:
                ids = shards.ids(shard).take(pa.array(chosen - shard * shards.size))
                table = pa.table({"id": ids, **{name: values[: len(chosen)] for name, values in columns.items()}})
                path = _part_path(folder, shard, len(shards), scoring)
                write_table(path, table, {"fingerprint": manifest["fingerprint"]})
            stop = stop_asked(folder, look=True)
            if any(ranks.gather(stop)) if sharded else stop:
                break
    run.log(
        event="score",
        model=scoring.name,
        rank=ranks.rank,
        sharding="zero3" if sharded else "replica",
        examples=total,
        tokens=tokens,
        examples_per_s=round(steps.rate, 2),
    )


class _StopAsked(Exception):
    """Raised to leave a shard before it is complete."""


def _of_fold(rows: np.ndarray, folds: np.ndarray | None, fold: int | None) -> np.ndarray:
    return rows if folds is None else rows[folds[rows] == fold]


def _part_path(folder: RunFolder, shard: int, of: int, scoring: Pass) -> Path:
    return folder.scores / "parts" / f"shard-{shard:05d}-of-{of:05d}.{scoring.same_as or scoring.name}.parquet"


def _label_ids(model: Model, labels: list[str] | None) -> list[list[int]] | None:
    from atlantis_ds.lm.encode import Encoder
    from atlantis_ds.lm.load import load_config, load_tokenizer

    return Encoder(load_tokenizer(model), load_config(model), labels).label_set


def _score_rows(
    model: Any,
    pairs: list[Encoded],
    own: np.ndarray,
    labels: list[list[int]] | None,
    settings: Score,
    progress: Progress | None,
    agree: Callable[[int], int] | None,
    ways: Ways,
) -> dict[str, Any]:
    """Columns of a part: ``logp``, ``eos``, ``tokens``; with ``labels`` (token ids of the set) also those of every
    label.

    Args:
        own: int32 [n], the index of each example's own label in the label set.
    """
    from atlantis_ds.lm.likelihood import score_choices, score_pairs

    budget = settings.tokens_per_batch
    columns: dict[str, Any] = {}
    end = pairs[0].eos if pairs else 0
    if labels is None:
        sums = score_pairs(model, pairs, end, budget, progress, agree, ways)
        lengths = [pair.tokens for pair in pairs]
    else:
        choices = score_choices(model, [pair.prompt for pair in pairs], labels, end, budget, progress, agree, ways)
        columns |= {
            f"{LABEL_SET}logp": pa.array(choices[:, :, 0].tolist(), pa.list_(pa.float64())),
            f"{LABEL_SET}eos": pa.array(choices[:, :, 1].tolist(), pa.list_(pa.float64())),
            f"{LABEL_SET}tokens": pa.array([[len(ids) for ids in labels]] * len(pairs), pa.list_(pa.int64())),
        }
        sums = choices[range(len(pairs)), own.tolist()]
        lengths = [len(labels[label]) for label in own.tolist()]
    return columns | {
        "logp": pa.array(sums[:, 0].numpy()),
        "eos": pa.array(sums[:, 1].numpy()),
        "tokens": pa.array(lengths, pa.int64()),
    }


def _join_parts(folder: RunFolder, passes: list[Pass], shards: Shards, shard: int, manifest: dict[str, Any]) -> None:
    paths = [_part_path(folder, shard, len(shards), scoring) for scoring in passes]
    wait_for_files(paths)
    ids = shards.ids(shard)
    columns: dict[str, Any] = {"id": ids}
    for column in COLUMNS:
        parts = [read_table(path)[0] for scoring, path in zip(passes, paths) if scoring.column == column]
        whole = pa.concat_tables(parts)
        whole = whole.take(pc.index_in(ids, whole["id"]))
        columns |= {f"{name}_{column}": whole[name] for name in whole.column_names if name != "id"}
    write_table(
        shard_path(folder, shard, len(shards)),
        pa.table(columns),
        {"fingerprint": manifest["fingerprint"], "shard": shard, "of": len(shards)},
    )
    for path in set(paths):
        path.unlink()
