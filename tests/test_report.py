import csv
import io
import json
import random

import matplotlib.image
import pytest
from rich.console import Console

from atlantis_ds import files
from atlantis_ds.data.relation import SEMEVAL_LABELS
from atlantis_ds.errors import InputError
from atlantis_ds.evaluate import report
from atlantis_ds.evaluate.answers import response_metrics
from atlantis_ds.metrics import UNMAPPED, metrics, read_answers

INFO = {"fingerprint": "0123456789abcdef", "arm": "sft", "method": "generate"}


@pytest.fixture
def semeval():
    """Ids, gold labels, and predictions of which a fifth is drawn at random, some of them unmapped."""
    draw = random.Random(0)
    gold = draw.choices(SEMEVAL_LABELS, k=700)
    choices = [*SEMEVAL_LABELS, UNMAPPED]
    predicted = [label if draw.random() < 0.8 else draw.choice(choices) for label in gold]
    return [str(at) for at in range(700)], gold, predicted


def test_what_an_evaluation_writes(tmp_path, semeval):
    ids, gold, predicted = semeval
    folder = tmp_path / "eval" / "sft"
    expected = metrics(SEMEVAL_LABELS, ids, gold, predicted)
    columns = {"id": ids, "gold": gold, "predicted": predicted}
    written = report.write_evaluation(folder, expected, columns, INFO, label_set=True)
    names = ["answers.txt", "confusion.png", "metrics.json", "predictions.parquet"]
    assert sorted(file.name for file in folder.iterdir()) == names

    assert written == {**expected, **INFO} == json.loads((folder / "metrics.json").read_text())
    assert files.finished(folder / "metrics.json", INFO["fingerprint"])
    assert written["unmapped"] == predicted.count(UNMAPPED) > 0

    table, info = files.read_table(folder / "predictions.parquet")
    assert info == INFO
    assert table.to_pydict() == columns
    answers = read_answers(folder / "answers.txt")
    assert answers == {id: label for id, label in zip(ids, predicted, strict=True) if label != UNMAPPED}


def write(folder, gold, predicted, **more):
    ids = [str(number) for number in range(len(gold))]
    columns = {"id": ids, "gold": gold, "predicted": predicted, **more}
    if more:
        figures, of_each = response_metrics(ids, gold, predicted, more["log_likelihood"], more["tokens"], None)
        return report.write_evaluation(folder, figures, columns | of_each, INFO, label_set=False)
    figures = metrics(sorted(set(gold)), ids, gold, predicted)
    return report.write_evaluation(folder, figures, columns, INFO, label_set=True)


def test_metrics_json_is_gone_while_the_other_files_change(tmp_path, monkeypatch):
    write(tmp_path, ["yes", "no"], ["yes", "yes"])
    assert (tmp_path / "metrics.json").exists()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(report, "plot_confusion", full)
    with pytest.raises(OSError):
        write(tmp_path, ["yes", "no"], ["yes", "yes"])
    assert not (tmp_path / "metrics.json").exists()


def test_labels_that_the_scorer_cannot_read_only_leave_out_its_file(tmp_path):
    write(tmp_path, ["yes", "no"], ["yes", "yes"])
    assert (tmp_path / "answers.txt").exists()
    write(tmp_path, ["a\tb", "no"], ["a\tb", "no"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["confusion.png", "metrics.json", "predictions.parquet"]


def test_an_evaluation_of_responses(tmp_path):
    gold, predicted = ["four apples", "five"], ["four pears", "Five!"]
    write(tmp_path, ["yes", "no"], ["yes", "yes"])
    written = write(tmp_path, gold, predicted, log_likelihood=[-2.0, -1.0], tokens=[4, 2])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.json", "predictions.parquet"]
    assert written == json.loads((tmp_path / "metrics.json").read_text())
    assert (written["mean_log_likelihood"], written["exact_match"], written["token_f1"]) == (-0.5, 0.0, 0.75)
    table, _ = files.read_table(tmp_path / "predictions.parquet")
    assert table.to_pydict() == {
        "id": ["0", "1"],
        "gold": gold,
        "predicted": predicted,
        "log_likelihood": [-2.0, -1.0],
        "tokens": [4, 2],
        "exact_match": [0.0, 0.0],
        "token_f1": [0.5, 1.0],
    }


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
    figures = {"macro_f1": 0.81249, "official": 79.456, "accuracy": 0.5, "unmapped": unmapped, "n": 2717}
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
    assert "official" in text and "official" not in printed([row("sft", official=None)])


def test_comparison_of_responses(tmp_path):
    labels_only = dict.fromkeys(["macro_f1", "official", "accuracy", "per_label"])
    sft = {"arm": "sft", **labels_only, "perplexity": 2.71828, "exact_match": 0.25, "token_f1": 0.5, "n": 8}
    text = printed([sft])
    (line,) = (line for line in text.splitlines() if "sft" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == ["sft", "2.718", "0.250", "0.500", "8", "-"]
    assert not any(name in text for name in ("macro_f1", "official", "unmapped"))
    report.write_comparison(tmp_path, [sft])
    (record,) = json.loads((tmp_path / "eval" / "comparison.json").read_text())
    assert tuple(record) == report.RESPONSE_COLUMNS


def test_comparison_files(tmp_path):
    report.write_comparison(tmp_path, [row("sft", train_examples_per_s=12.34), row("atlantis", 3, official=None)])
    records = json.loads((tmp_path / "eval" / "comparison.json").read_text())
    assert [tuple(record) for record in records] == [report.COLUMNS] * 2
    assert records[0] == {
        "arm": "sft",
        "macro_f1": 0.81249,
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


def test_a_table_of_single_runs_says_so():
    assert "One run each" in printed([row("sft"), row("atlantis")])
    assert "One run each" not in printed([row("sft")])
