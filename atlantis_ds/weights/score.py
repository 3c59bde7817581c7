"""Score every training example under the frozen models, shard by shard, sharded over ranks.

Shards are cut by the data, and the batches of a shard depend on that shard alone: any number of ranks gives the same
scores, and a run begun on one world size may finish on another. One base model is in memory at a time; what a shard got
from it is written at once as a *part*, and a shard is whole when all its parts are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from atlantis_ds import __version__
from atlantis_ds.cluster.preemption import leave_if_asked, stop_asked
from atlantis_ds.cluster.ranks import Ranks
from atlantis_ds.config.schema import Model, Recipe, Score
from atlantis_ds.data.prepare import Examples, load_examples
from atlantis_ds.data.splits import fold_of
from atlantis_ds.data.table import Example
from atlantis_ds.errors import InputError
from atlantis_ds.events import append_log
from atlantis_ds.files import fingerprint, finished, read_json, read_table, write_json, write_table
from atlantis_ds.progress import Steps, console
from atlantis_ds.run_folder import RunFolder

if TYPE_CHECKING:
    from atlantis_ds.lm.encode import Encoded, Encoder
    from atlantis_ds.lm.frozen import Frozen
    from atlantis_ds.lm.likelihood import Progress

COLUMNS = ("large", "small", "reference")
LABEL_SET = "label_set_"
"""Begins the names of columns that hold a list: one value for each label of the label set."""


@dataclass(frozen=True)
class Pass:
    """One frozen model over some of the examples: all of them, or the fold that a cross-fitted reference leaves out."""

    column: str
    """large, small or reference."""
    model: Model
    fold: int | None = None
    same_as: str | None = None
    """The pass before it with the same model: what that one reads counts for both."""

    @property
    def name(self) -> str:
        return self.column if self.fold is None else f"{self.column}-{self.fold}"


def reference_name(folder: RunFolder, fold: int, folds: int) -> str:
    """Name of a fine-tuned reference among the trained models."""
    name = "reference" if folds == 1 else f"reference-{fold}-of-{folds}"
    return f"{name}-round-{folder.round}" if folder.round else name


def round_before(recipe: Recipe, folder: RunFolder) -> RunFolder | None:
    """The round whose weights the folder's reference is trained on; None for the first."""
    before = (folder.round or recipe.models.reference.rounds) - 1
    return RunFolder(folder.root, before) if before else None


def scoring_passes(recipe: Recipe, folder: RunFolder) -> list[Pass]:
    """The models to score with, in order."""
    from atlantis_ds.lm.load import model_source

    passes = [Pass(name, model_source(recipe, folder, name)) for name in ("large", "small")]
    reference = recipe.models.reference
    if reference.kind == "checkpoint":
        return [*passes, Pass("reference", model_source(recipe, folder, "reference"))]
    for fold in range(reference.folds):
        path = folder.model(reference_name(folder, fold, reference.folds)) / "last"
        if not path.is_dir():
            raise InputError(f"{path}: no fine-tuned reference there; run `train --arm reference` first")
        trusted = model_source(recipe, folder, "reference").trust_remote_code
        model = Model(model_name_or_path=str(path), trust_remote_code=trusted)
        passes.append(Pass("reference", model, fold if reference.folds > 1 else None))
    return passes


def assign_shards(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Give shards to ranks, dearest first to the least loaded rank: balanced, and the same on every rank.

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


def shard_path(folder: RunFolder, shard: int, of: int) -> Path:
    return folder.scores / f"shard-{shard:05d}-of-{of:05d}.parquet"


def cut_shards(examples: Sequence[Example], shard_size: int) -> list[Sequence[Example]]:
    return [examples[start : start + shard_size] for start in range(0, len(examples), shard_size)]


def scoring_inputs(recipe: Recipe, examples: str, labels: list[str]) -> dict[str, Any]:
    """All that the scores depend on, less the models: what ``merge`` can check without them.

    Args:
        examples: fingerprint of the training examples.
        labels: the label set.
    """
    return {
        "examples": examples,
        "prompt": recipe.prompt.model_dump(),
        "labels": labels,
        "dtype": recipe.score.dtype,
        "tokens_per_batch": recipe.score.tokens_per_batch,
        "shard_size": recipe.score.shard_size,
        "label_set": recipe.score.label_set,
        "chat_template": recipe.models.reference.chat_template,
    }


def score(recipe: Recipe, folder: RunFolder, ranks: Ranks, part: tuple[int, int] = (1, 1)) -> None:
    """Write ``scores/shard-*.parquet`` for all training examples; do only what is missing.

    Args:
        part: (I, N): do the I-th of N parts of the shards, counted from 1, for N jobs that share the work.

    Raises:
        InputError: the scores there were made from other inputs; the one that differs is named.
        Preempted: the job was asked to stop; each rank has finished its shard.
    """
    from atlantis_ds.lm.frozen import Frozen
    from atlantis_ds.lm.load import model_identity

    examples = load_examples(folder)
    passes = scoring_passes(recipe, folder)
    shards = cut_shards(examples.train, recipe.score.shard_size)
    inputs = scoring_inputs(recipe, examples.train_fingerprint, examples.labels)
    models = ranks.broadcast({p.name: model_identity(p.model) for p in passes} if ranks.is_main else None)
    if models["small"] == models["large"]:
        passes[1] = replace(passes[1], same_as="large")
    inputs = {**inputs, **{f"model {name}": identity for name, identity in models.items()}}
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
    if ranks.is_main:
        console.print(f"score: {len(mine) - len(todo)} of {len(mine)} shards are done, {len(todo)} to do")
    frozen = Frozen(recipe.score, ranks)
    for scoring in [scoring for scoring in passes if todo and not scoring.same_as]:
        _score_pass(recipe, folder, ranks, examples, shards, todo, scoring, manifest, frozen)
        leave_if_asked(folder, ranks, f"while scoring with {scoring.name}")
    frozen.free()
    for shard in todo[ranks.rank :: ranks.world_size]:
        _join_parts(folder, passes, shards, shard, manifest)
    ranks.barrier()


def _claim_folder(folder: RunFolder, manifest: dict[str, Any]) -> None:
    path = folder.scores / "scores.json"
    if path.exists():
        old = read_json(path)
        if old["fingerprint"] != manifest["fingerprint"]:
            keys = sorted(set(old["inputs"]) | set(manifest["inputs"]))
            differing = [key for key in keys if old["inputs"].get(key) != manifest["inputs"].get(key)]
            raise InputError(
                f"{folder.scores}: holds scores made from other inputs (differs: {', '.join(differing)}); "
                "choose another `name`, or remove this folder to score again"
            )
        return
    write_json(path, manifest)


def _score_pass(
    recipe: Recipe,
    folder: RunFolder,
    ranks: Ranks,
    examples: Examples,
    shards: list[Sequence[Example]],
    todo: list[int],
    scoring: Pass,
    manifest: dict[str, Any],
    frozen: Frozen,
) -> None:
    from atlantis_ds.lm.encode import Encoder
    from atlantis_ds.lm.load import load_config, load_tokenizer

    folds = recipe.models.reference.folds
    rows = {
        shard: [e for e in shards[shard] if scoring.fold is None or fold_of(e, folds, recipe.seed) == scoring.fold]
        for shard in todo
    }
    missing = ranks.broadcast(
        [s for s in todo if not finished(_part_path(folder, s, len(shards), scoring), manifest["fingerprint"])]
        if ranks.is_main
        else None
    )
    if not missing:
        return
    costs = [sum(len(e.sentence) for e in rows[shard]) for shard in missing]
    assigned = [[missing[i] for i in indices] for indices in assign_shards(costs, ranks.world_size)]
    mine = assigned[ranks.rank]
    sharded = frozen.choose(scoring.model, scoring.name)
    if not mine and not sharded:
        return
    chat = scoring.column == "reference" and recipe.models.reference.chat_template
    encoder = Encoder(load_tokenizer(scoring.model), load_config(scoring.model), recipe.prompt, examples.labels, chat)
    model = frozen.load(scoring.model)
    # A sharded model needs all ranks in every forward: they go shard by shard, one that has none left with a stand-in.
    turns: list[int | None] = [*mine, *[None] * (max(map(len, assigned)) - len(mine) if sharded else 0)]
    total = sum(len(rows[shard]) for shard in mine)
    tokens = 0
    with Steps(f"score {scoring.name}", total, "examples", ranks.is_main, every=max(1, total // 10)) as steps:

        def progress(count: int, batch_tokens: int) -> None:
            nonlocal tokens
            tokens += batch_tokens
            steps.advance(count)

        def agree(forwards: int) -> int:
            return max(ranks.gather(forwards))

        def read(shard: int | None) -> Tokens:
            chosen = rows[shard] if shard is not None else []
            return _encode(encoder, chosen or (examples.train[:1] if sharded else []), recipe.score.label_set)

        for shard, tokens_of_shard in _read_ahead(read, turns):
            chosen = rows[shard] if shard is not None else []
            columns = _score_tokens(
                model, tokens_of_shard, recipe.score, progress if chosen else None, agree if sharded else None
            )
            if shard is not None:
                table = pa.table(columns).slice(0, len(chosen))
                path = _part_path(folder, shard, len(shards), scoring)
                write_table(path, table, {"fingerprint": manifest["fingerprint"]})
            stop = stop_asked(folder, look=True)
            if any(ranks.gather(stop)) if sharded else stop:
                break
    append_log(
        folder.log,
        event="score",
        model=scoring.name,
        rank=ranks.rank,
        sharding="zero3" if sharded else "replica",
        examples=total,
        tokens=tokens,
        examples_per_s=round(steps.rate, 2),
    )


def _part_path(folder: RunFolder, shard: int, of: int, scoring: Pass) -> Path:
    return folder.scores / "parts" / f"shard-{shard:05d}-of-{of:05d}.{scoring.same_as or scoring.name}.parquet"


@dataclass(frozen=True)
class Tokens:
    """The examples of a shard as token ids."""

    ids: list[str]
    pairs: list[Encoded]
    own: list[int]
    """Number of each example's own label in the label set; not filled without ``label_ids``."""
    label_ids: list[list[int]] | None
    """The label set, where all of it is scored."""
    eos: int


def _encode(encoder: Encoder, examples: Sequence[Example], label_set: bool) -> Tokens:
    ids, eos = [example.id for example in examples], encoder.tokenizer.eos_token_id
    if not label_set:
        return Tokens(ids, [encoder(example) for example in examples], [], None, eos)
    labels = [encoder.label_ids(label) for label in encoder.labels]
    longest = encoder.labels[max(range(len(labels)), key=lambda i: len(labels[i]))]
    number = {label: index for index, label in enumerate(encoder.labels)}
    pairs = [encoder(example, longest) for example in examples]  # no label may be too long for the model
    return Tokens(ids, pairs, [number[example.label] for example in examples], labels, eos)


def _read_ahead(
    read: Callable[[int | None], Tokens], shards: Sequence[int | None]
) -> Iterator[tuple[int | None, Tokens]]:
    """Each shard with its tokens, made in a thread while the model is at work on the shard before it."""
    with ThreadPoolExecutor(1) as thread:
        following = [thread.submit(read, shard) for shard in shards[:1]]
        for place, shard in enumerate(shards):
            tokens = following.pop().result()
            following += [thread.submit(read, next_shard) for next_shard in shards[place + 1 : place + 2]]
            yield shard, tokens


def _score_tokens(
    model: Any,
    tokens: Tokens,
    settings: Score,
    progress: Progress | None,
    agree: Callable[[int], int] | None,
) -> dict[str, Any]:
    """Columns of a part: ``id``, ``logp``, ``eos``, ``tokens``; with ``score.label_set`` those of every label, too."""
    from atlantis_ds.lm.likelihood import score_choices, score_pairs

    pairs, labels, budget = tokens.pairs, tokens.label_ids, settings.tokens_per_batch
    columns: dict[str, Any] = {"id": pa.array(tokens.ids, pa.string())}
    if labels is None:
        sums = score_pairs(model, pairs, tokens.eos, budget, progress, agree)
        lengths = [len(pair.label) for pair in pairs]
    else:
        choices = score_choices(model, [pair.prompt for pair in pairs], labels, tokens.eos, budget, progress, agree)
        columns |= {
            f"{LABEL_SET}logp": pa.array(choices[:, :, 0].tolist(), pa.list_(pa.float64())),
            f"{LABEL_SET}eos": pa.array(choices[:, :, 1].tolist(), pa.list_(pa.float64())),
            f"{LABEL_SET}tokens": pa.array([[len(ids) for ids in labels]] * len(pairs), pa.list_(pa.int64())),
        }
        sums = choices[range(len(pairs)), tokens.own]
        lengths = [len(labels[label]) for label in tokens.own]
    return columns | {"logp": sums[:, 0].numpy(), "eos": sums[:, 1].numpy(), "tokens": pa.array(lengths, pa.int64())}


def _join_parts(
    folder: RunFolder, passes: list[Pass], shards: list[Sequence[Example]], shard: int, manifest: dict[str, Any]
) -> None:
    paths = [_part_path(folder, shard, len(shards), scoring) for scoring in passes]
    ids = pa.array([example.id for example in shards[shard]], pa.string())
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
