"""Keep what a study has trained so far, and compare all of it: a study may take several machines and nights.

    python tools/studies/gather.py runs/conll04_uniform_noise experiments/conll04_uniform_noise.csv

Adds the finished trainings of the run folder to the CSV: one line an arm and seed, with predictions as numbers of the
relations in the label set (-1 for none of them), and one with the gold labels. Prints the comparison of all its lines
as a Markdown table, and draws it into a PNG beside the CSV: what the pages of experiments/ show. With `-` for a folder
that is gone it reads the CSV alone. All arms of one seed should come from one set of scores.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console

from atlantis_ds.evaluate.compare import Trained, comparison
from atlantis_ds.evaluate.compare_report import comparison_table, plot_comparison
from atlantis_ds.files import read_json, read_table, write_atomic
from atlantis_ds.metrics import macro_f1, relation_of
from atlantis_ds.run_folder import RunFolder
from atlantis_ds.train.jobs import training_summary

FIELDS = ("arm", "seed", "seconds", "hardware", "labels")
GOLD = "(gold labels)"
PEERS = ("sft", "gce", "cleanlab", "sft_mixed")
"""Arms that the others are compared with, where a study has them."""


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python tools/studies/gather.py RUN|- FILE.csv")
    source, path = sys.argv[1], Path(sys.argv[2])
    lines: dict[tuple[str, str], dict[str, str]] = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            lines = {(line["arm"], line["seed"]): line for line in csv.DictReader(file)}
    if source != "-":
        if not Path(source).is_dir():
            sys.exit(f"{source}: no such run folder")
        new = finished_trainings(RunFolder(Path(source)))
        if not new:
            sys.exit(f"{source}: no training is finished there")
        key = (GOLD, "")
        if key in lines and lines[key]["labels"] != new[key]["labels"]:
            sys.exit(f"{path}: holds predictions of another test set than {source}")
        lines |= new
        write_atomic(path, lambda temporary: write(temporary, lines.values()))
    if not lines:
        sys.exit(f"{path}: no such file, or nothing in it")
    gold = lines.pop((GOLD, ""))["labels"].split()
    trained = []
    for line in lines.values():
        predicted = line["labels"].split()
        right = sum(a == b for a, b in zip(gold, predicted))
        metrics = {"macro_f1": macro_f1(gold, predicted), "accuracy": right / len(gold), "official": None}
        seconds, hardware = float(line["seconds"]), line.get("hardware", "")
        trained.append(Trained(line["arm"], int(line["seed"]), predicted, metrics, seconds, hardware))
    arms = {run.arm for run in trained}
    found = comparison(gold, trained, [peer for peer in PEERS if peer in arms], "gold" if "sft" in arms else None)
    found["arms"].sort(key=lambda row: row["macro_f1"], reverse=True)
    plot_comparison(path.with_suffix(".png"), found)
    table = comparison_table(found)
    table.box = box.MARKDOWN
    Console(width=240).print(table)


def write(path: Path, lines: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def finished_trainings(folder: RunFolder) -> dict[tuple[str, str], dict[str, str]]:
    labels = read_json(folder.examples_info)["labels"]
    if labels is None:
        sys.exit(f"{folder.root}: its examples have responses, and predictions are kept here as numbers of labels")
    relations = list(dict.fromkeys(relation_of(label) for label in labels))
    number = {relation: str(index) for index, relation in enumerate(relations)}
    found: dict[tuple[str, str], dict[str, str]] = {}
    for metrics in sorted(folder.root.glob("eval/*-seed*/metrics.json")):
        name = metrics.parent.name
        arm, _, seed = name.rpartition("-seed")
        table = read_table(metrics.parent / "predictions.parquet")[0]
        gold, predicted = (
            " ".join(number.get(relation_of(label), "-1") for label in table[column].to_pylist())
            for column in ("gold", "predicted")
        )
        found[GOLD, ""] = {"arm": GOLD, "labels": gold}
        summary = training_summary(folder, name)
        found[arm, seed] = {
            "arm": arm,
            "seed": seed,
            "seconds": f"{summary['seconds']:.0f}",
            "hardware": summary.get("hardware", ""),
            "labels": predicted,
        }
    return found


if __name__ == "__main__":
    main()
