import random
import re

import pytest
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from atlantis_ds import metrics as m
from atlantis_ds.data.relation import SEMEVAL_LABELS
from atlantis_ds.errors import InputError

LABELS = ["Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Message-Topic(e1,e2)", "Entity-Origin(e2,e1)", "Other"]


@pytest.fixture
def cases():
    return shared_data("semeval2010_task8/scorer_cases")


def read_case(cases, number):
    key = m.read_answers(cases / f"answer_key{number}.txt")
    proposed = m.read_answers(cases / f"proposed_answer{number}.txt")
    printed = (cases / f"result_scores{number}.txt").read_text()
    return key, proposed, printed[printed.index("-- OFFICIAL >>>") :]


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_official_score_is_the_last_line_of_the_scorer(cases, number):
    key, proposed, printed = read_case(cases, number)
    (score,) = re.findall(r"macro-averaged F1 = +([\d.]+)% >>>", printed)
    assert f"{m.official(key, proposed):.2f}" == score


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_lines_of_the_individual_relations(cases, number):
    key, proposed, printed = read_case(cases, number)
    pattern = (
        r"^ *(\S+) : +P = +(\d+)/\( *(\d+) \+ +(\d+)\) = +([\d.]+)%"
        r" +R = +\d+/ *(\d+) = +([\d.]+)% +F1 = +([\d.]+)%"
    )
    expected = {}
    for name, correct, right_way, wrong_way, precision, support, recall, f1 in re.findall(pattern, printed, re.M):
        counts = (int(correct), int(right_way) + int(wrong_way), int(support))
        expected[name.removeprefix("_")] = (*counts, precision, recall, f1)
    rows = m.official_by_relation(key, proposed)
    found = {
        name: (
            *(row[count] for count in ("correct", "predicted", "support")),
            *(f"{row[figure]:.2f}" for figure in ("precision", "recall", "f1")),
        )
        for name, row in rows.items()
    }
    assert expected and found == expected


def test_skipped_and_unmapped_are_the_same_to_the_official_score(cases):
    key, proposed, _ = read_case(cases, 1)
    assert len(proposed) == 30
    assert m.official(key, {id: proposed.get(id, m.UNMAPPED) for id in key}) == m.official(key, proposed)


def test_case_4_of_the_scorer_is_the_badly_formed_file(cases):
    with pytest.raises(InputError, match=r"proposed_answer4\.txt:2: unknown label 'Message-Topc\(e1,e2\)'"):
        m.read_answers(cases / "proposed_answer4.txt")


def test_a_key_scores_100_against_itself(tmp_path):
    key = {str(at): label for at, label in enumerate(SEMEVAL_LABELS * 20)}
    result = m.metrics(SEMEVAL_LABELS, list(key), list(key.values()), list(key.values()))
    assert (result["macro_f1"], result["official"], result["accuracy"]) == (1.0, 100.0, 1.0)
    assert (result["n"], result["unmapped"]) == (380, 0)
    m.write_answers(tmp_path / "answers.txt", list(key), list(key.values()))
    assert m.read_answers(tmp_path / "answers.txt") == key


def test_macro_f1_by_hand():
    # Cause-Effect: 2 right of 3 gold, 2 predicted: F1 0.8. Other: 1 of 2, 2 predicted: 0.5. Message-Topic is no gold.
    gold = ["Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Cause-Effect(e1,e2)", "Other", "Other"]
    predicted = ["Cause-Effect(e2,e1)", "Cause-Effect(e2,e1)", "Other", "Other", "Message-Topic(e1,e2)"]
    assert m.macro_f1(gold, predicted) == pytest.approx((0.8 + 0.5) / 2)
    assert m.macro_f1(gold, [*predicted[:-1], m.UNMAPPED]) == pytest.approx((0.8 + 0.5) / 2)
    assert m.macro_f1(gold, [*predicted[:-1], "Other"]) > (0.8 + 0.5) / 2


def test_macro_f1_is_plain_sklearn_macro_f1_where_both_hold_all_labels():
    draw = random.Random(0)
    gold = LABELS + draw.choices(LABELS, k=300)
    predicted = LABELS + draw.choices(LABELS, k=300)
    collapsed = [[re.sub(r"\(.*", "", label) for label in side] for side in (gold, predicted)]
    assert m.macro_f1(gold, predicted) == pytest.approx(f1_score(*collapsed, average="macro"), abs=1e-12)
    undirected = ["Kill", "Live_In", "Work_For", "Kill"], ["Kill", "Work_For", "Work_For", "Live_In"]
    assert m.macro_f1(*undirected) == pytest.approx(f1_score(*undirected, average="macro"), abs=1e-12)


def test_metrics_by_hand():
    gold = ["Cause-Effect(e1,e2)", "Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", "Other"]
    predicted = ["Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)", m.UNMAPPED, "Message-Topic(e1,e2)"]
    result = m.metrics(SEMEVAL_LABELS, ["1", "2", "3", "4"], gold, predicted)
    assert result["macro_f1"] == pytest.approx((2 * 1 * (2 / 3) / (1 + 2 / 3) + 0) / 2)
    # 1 correct, 2 proposed in either direction, 3 in the key
    assert result["official"] == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert (result["accuracy"], result["n"], result["unmapped"]) == (0.25, 4, 1)
    assert list(result["per_label"]) == sorted({*gold, *predicted} - {m.UNMAPPED})
    first = result["per_label"]["Cause-Effect(e1,e2)"]
    assert first == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2, "predicted": 1}
    absent = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0, "predicted": 1}
    assert result["per_label"]["Message-Topic(e1,e2)"] == absent


def test_official_only_where_it_is_defined():
    def score(labels, gold, predicted, negative=None):
        return m.metrics(labels, [str(i) for i in range(len(gold))], gold, predicted, negative)["official"]

    right = ["Cause-Effect(e1,e2)"]
    assert score(["Kill", "Live_In"], ["Kill", "Live_In"], ["Kill", "Kill"]) is None
    assert score(SEMEVAL_LABELS, ["Other"], ["Other"]) is None, "there is no relation to average"
    assert score(SEMEVAL_LABELS, right, right) == 100.0
    assert score(LABELS, right, right) == score(SEMEVAL_LABELS[:-1], right, right) == 100.0, "some of them, or no Other"
    assert score([*LABELS, "Kill"], right, right) is None
    assert score([*LABELS, "Cause-Effect"], right, right) is None, "a relation without its direction"
    assert score(["Other"], ["Other"], ["Other"]) is None
    renamed = [*SEMEVAL_LABELS[:-1], "no_relation"]
    gold, predicted = [*right, *right, "no_relation"], [*right, "no_relation", "no_relation"]
    assert score(renamed, gold, predicted) is None
    assert score(renamed, gold, predicted, "no_relation") == pytest.approx(100 * 2 / 3)


def test_a_label_that_is_no_class_of_its_own():
    # Kill: 1 of 2 right, 2 predicted: 0.5. Live_In: 0 of 1. none: 1 of 2, 2 predicted: 0.5.
    gold, predicted = ["Kill", "Kill", "Live_In", "none", "none"], ["Kill", "none", m.UNMAPPED, "none", "Kill"]
    labels, ids = ["Kill", "Live_In", "none"], list("abcde")
    assert m.metrics(labels, ids, gold, predicted)["macro_f1"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert m.metrics(labels, ids, gold, predicted, "none")["macro_f1"] == pytest.approx((0.5 + 0) / 2)
    better = [*predicted[:-1], "none"]
    assert m.macro_f1(gold, better, "none") > m.macro_f1(gold, predicted, "none"), "it costs the others precision"
    assert m.macro_f1(["none"], ["none"], "none") == 0.0
    # SemEval's `Other` stays a class, named or not; another set's does not.
    gold, predicted = ["Cause-Effect(e1,e2)", "Other"], ["Cause-Effect(e1,e2)", m.UNMAPPED]
    for negative in (None, "Other"):
        assert m.metrics(SEMEVAL_LABELS, ["1", "2"], gold, predicted, negative)["macro_f1"] == 0.5
    assert m.label_apart(["spam", "Other"], "Other") == "Other"
    assert m.label_apart(["spam", "Other"], None) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, m.UNMAPPED])), min_size=1, max_size=25))
def test_unmapped_never_helps_and_the_gold_label_never_harms(pairs):
    gold, predicted = ["Message-Topic(e1,e2)", *(g for g, _ in pairs)], ["Other", *(p for _, p in pairs)]
    ids = [str(i) for i in range(len(gold))]
    figures = ("macro_f1", "official", "accuracy")
    before = m.metrics(SEMEVAL_LABELS, ids, gold, predicted)
    for i in range(len(gold)):
        unmapped = m.metrics(SEMEVAL_LABELS, ids, gold, [*predicted[:i], m.UNMAPPED, *predicted[i + 1 :]])
        right = m.metrics(SEMEVAL_LABELS, ids, gold, [*predicted[:i], gold[i], *predicted[i + 1 :]])
        assert unmapped["accuracy"] <= before["accuracy"]
        assert m.UNMAPPED not in unmapped["per_label"]
        for figure in figures:
            assert unmapped[figure] <= right[figure] + 1e-12
            assert before[figure] <= right[figure] + 1e-12
    assert [m.metrics(SEMEVAL_LABELS, ids, gold, gold)[figure] for figure in figures] == [1.0, 100.0, 1.0]
    nothing = m.metrics(SEMEVAL_LABELS, ids, gold, [m.UNMAPPED] * len(gold))
    assert [nothing[figure] for figure in figures] == [0.0, 0.0, 0.0]


def test_answers_round_trip_leaves_unmapped_out(tmp_path):
    m.write_answers(tmp_path / "answers.txt", ["8001", "8002", "8003"], [LABELS[0], m.UNMAPPED, "Other"])
    assert (tmp_path / "answers.txt").read_bytes() == b"8001\tCause-Effect(e1,e2)\n8003\tOther\n"
    assert m.read_answers(tmp_path / "answers.txt") == {"8001": LABELS[0], "8003": "Other"}
    assert m.can_hold_answers(["8001", LABELS[0], m.UNMAPPED])
    assert not m.can_hold_answers(["1", "a\tb"]) and not m.can_hold_answers(["1", "a\u2028b"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\tOther\n2 Other\n", r":2: not `id TAB label`"),
        ("1\tOther\n\n2\tOther\n", r":2: not `id TAB label`"),
        ("\tOther\n", r":1: not `id TAB label`"),
        ("1\tOther\textra\n", r":1: unknown label"),
        ("1\tCause-Effect(e1, e2)\n", r":1: unknown label"),
        ("1\tCause-Effect\n", r":1: unknown label"),
        ("1\tother\n", r":1: unknown label"),
        ("1\tOther\n2\tOther\n1\tOther\n", r":3: id '1' is a duplicate"),
    ],
)
def test_bad_answer_lines_are_refused_with_file_and_line(tmp_path, text, message):
    (tmp_path / "answers.txt").write_text(text)
    with pytest.raises(InputError, match=r"answers\.txt" + message):
        m.read_answers(tmp_path / "answers.txt")


def test_underscore_other_other_label_sets_and_missing_files(tmp_path):
    (tmp_path / "answers.txt").write_bytes(b"1\t_Other\r\n2\tOther\r\n")
    assert m.read_answers(tmp_path / "answers.txt") == {"1": "Other", "2": "Other"}
    (tmp_path / "kill.txt").write_text("a-1\tKill\n")
    assert m.read_answers(tmp_path / "kill.txt", labels=["Kill"]) == {"a-1": "Kill"}
    with pytest.raises(InputError, match=r"none\.txt"):
        m.read_answers(tmp_path / "none.txt")


def test_bad_lists_are_refused():
    with pytest.raises(InputError, match="2 and 1"):
        m.macro_f1(["Other", "Other"], ["Other"])
    with pytest.raises(InputError, match="no examples"):
        m.metrics(["a", "b"], [], [], [])
    with pytest.raises(InputError, match="'7' occurs more than once"):
        m.metrics(["a", "b"], ["6", "7", "7"], ["a", "a", "b"], ["a", "a", "b"])
    with pytest.raises(InputError, match="empty gold label"):
        m.metrics(["a", "b"], ["1"], [""], [""])
    with pytest.raises(InputError, match="'9'"):
        m.official({"1": LABELS[0]}, {"9": LABELS[0]})
