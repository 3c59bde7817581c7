import csv
import io
import json
import random
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from atlantis_ds import files
from atlantis_ds.data.formats import SEMEVAL_LABELS
from atlantis_ds.errors import InputError
from atlantis_ds.evaluate import report
from atlantis_ds.evaluate.metrics import UNMAPPED, metrics, read_answers

KEY = Path(__file__).parents[2] / "shared" / "data" / "semeval2010_task8" / "test_answer_key.txt"
INFO = {"fingerprint": "0123456789abcdef", "arm": "sft", "method": "generate"}


@pytest.fixture
def semeval():
    """Ids, gold labels, and predictions of which a fifth is drawn at random, some of them unmapped."""
    if not KEY.is_file():
        pytest.skip(f"the SemEval-2010 Task 8 test key is not at {KEY}")
    key = read_answers(KEY)
    draw = random.Random(0)
    choices = [*SEMEVAL_LABELS, UNMAPPED]
    predicted = [label if draw.random() < 0.8 else draw.choice(choices) for label in key.values()]
    return list(key), list(key.values()), predicted


def test_an_evaluation_on_the_real_test_set(tmp_path, semeval):
    ids, gold, predicted = semeval
    folder = tmp_path / "eval" / "sft"
    written = report.write_evaluation(folder, "semeval2010_task8", ids, gold, predicted, INFO)
    names = ["answers.txt", "confusion.png", "metrics.json", "predictions.parquet"]
    assert sorted(file.name for file in folder.iterdir()) == names

    expected = metrics("semeval2010_task8", ids, gold, predicted)
    assert written == {**expected, **INFO} == json.loads((folder / "metrics.json").read_text())
    assert files.finished(folder / "metrics.json", INFO["fingerprint"])
    assert written["unmapped"] == predicted.count(UNMAPPED) > 0

    table, info = files.read_table(folder / "predictions.parquet")
    assert info == INFO
    assert table.to_pydict() == {"id": ids, "gold": gold, "predicted": predicted}
    answers = read_answers(folder / "answers.txt")
    assert answers == {id: label for id, label in zip(ids, predicted, strict=True) if label != UNMAPPED}


def test_metrics_json_is_gone_while_the_other_files_change(tmp_path):
    arguments = ("jsonl", ["1", "2"], ["yes", "no"], ["yes", "yes"], INFO)
    report.write_evaluation(tmp_path, *arguments)
    (tmp_path / "confusion.png").unlink()
    (tmp_path / "confusion.png").mkdir()  # a fault half way: no file can be put here
    with pytest.raises(OSError):
        report.write_evaluation(tmp_path, *arguments)
    assert not (tmp_path / "metrics.json").exists()


def test_bad_input_leaves_an_older_evaluation_in_place(tmp_path):
    report.write_evaluation(tmp_path, "jsonl", ["1", "2"], ["yes", "no"], ["yes", "yes"], INFO)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match="more than once"):
        report.write_evaluation(tmp_path, "jsonl", ["1", "1"], ["yes", "no"], ["yes", "no"], INFO)
    with pytest.raises(InputError, match="tab or line break"):
        report.write_evaluation(tmp_path, "jsonl", ["1", "2"], ["a\tb", "no"], ["a\tb", "no"], INFO)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("size", [1, 2, 19, 80])
def test_confusion_picture_has_an_unmapped_column_only_when_needed(tmp_path, size):
    labels = [*SEMEVAL_LABELS, *(f"costs ${n} $_" for n in range(80))][:size]
    report.plot_confusion(tmp_path / "without.png", labels * 3, labels * 3, labels)
    report.plot_confusion(tmp_path / "with.png", labels * 3, [*labels * 2, *([UNMAPPED] * size)], labels)
    without, with_column = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("without", "with"))
    assert with_column.shape[1] > without.shape[1]
    # Nothing is cut off: the outermost pixels are white on all four sides.
    for picture in (without, with_column):
        assert min(picture[edge].min() for edge in (0, -1, (slice(None), 0), (slice(None), -1))) == 1.0


def test_confusion_colours_are_shares_of_the_gold_row(tmp_path):
    # Row "a" is all right, row "b" all wrong: whatever the number of examples, one dark cell a row.
    report.plot_confusion(tmp_path / "picture.png", ["a"] * 1000 + ["b"], ["a"] * 1001, ["a", "b"])
    picture = matplotlib.image.imread(tmp_path / "picture.png")
    dark = (abs(picture[..., :3] - [8 / 255, 48 / 255, 107 / 255]) < 0.02).all(axis=-1)  # the end of "Blues"
    cell = 0.8 * 150
    assert dark.sum() == pytest.approx(2 * cell**2, rel=0.1)


def test_confusion_refuses_a_label_outside_its_labels(tmp_path):
    with pytest.raises(InputError, match="'c'"):
        report.plot_confusion(tmp_path / "picture.png", ["a"], ["c"], ["a", "b"])
    assert not list(tmp_path.iterdir())


def row(arm, unmapped=0, **more):
    figures = {"macro10": 0.81249, "official": 79.456, "accuracy": 0.5, "unmapped": unmapped, "n": 2717}
    return {"arm": arm, **figures, "per_label": {}, **more}


def printed(rows):
    console = Console(file=io.StringIO(), width=120)
    console.print(report.comparison_table(rows))
    return console.file.getvalue()


def test_comparison_table():
    text = printed([row("sft", train_examples_per_s=12.34), row("atlantis", official=None)])
    first, second = (line for line in text.splitlines() if "sft" in line or "atlantis" in line)
    assert [cell.strip() for cell in first.strip("│").split("│")] == ["sft", "0.812", "79.46", "0.500", "2717", "12.3"]
    assert [cell.strip() for cell in second.strip("│").split("│")] == ["atlantis", "0.812", "-", "0.500", "2717", "-"]
    assert "unmapped" not in text
    text = printed([row("sft"), row("atlantis", unmapped=31)])
    assert "unmapped" in text and " 31 " in text


def test_comparison_files(tmp_path):
    report.write_comparison(tmp_path, [row("sft", train_examples_per_s=12.34), row("atlantis", 3, official=None)])
    records = json.loads((tmp_path / "eval" / "comparison.json").read_text())
    assert [tuple(record) for record in records] == [report.COLUMNS] * 2
    assert records[0] == {
        "arm": "sft",
        "macro10": 0.81249,
        "official": 79.456,
        "accuracy": 0.5,
        "unmapped": 0,
        "n": 2717,
        "train_examples_per_s": 12.34,
    }
    assert records[1]["official"] is None and records[1]["train_examples_per_s"] is None
    with (tmp_path / "eval" / "comparison.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    as_text = [{key: "" if value is None else str(value) for key, value in record.items()} for record in records]
    assert lines == as_text
