"""The table, splits, folds and noise."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlantis_ds.config.schema import Noise
from atlantis_ds.data.formats import parse_marked, read_semeval
from atlantis_ds.data.noise import add_noise
from atlantis_ds.data.splits import assign_splits, fold_of, subset
from atlantis_ds.data.table import Example, from_table, sentence_key, to_table
from atlantis_ds.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SEMEVAL = SHARED / "semeval2010_task8"


def example(id: str, sentence: str = "a <e1>cat</e1> in a <e2>box</e2>", label: str = "x", **more) -> Example:
    text, e1, e2 = parse_marked(sentence)
    return Example(
        **{"id": id, "sentence": text, "e1": e1, "e2": e2, "label": label, "gold": None, "split": "train"} | more
    )


# --- table


def test_table_round_trip():
    examples = [example("1", gold="y"), example("é", "<e2>日本</e2> und <e1>Öl</e1>", split="test")]
    table = to_table(examples)
    assert table.column_names == [
        "id",
        "sentence",
        "e1_start",
        "e1_end",
        "e2_start",
        "e2_end",
        "label",
        "gold",
        "split",
    ]
    assert from_table(table) == examples and from_table(to_table([])) == []


@pytest.mark.parametrize(
    "other", ["The cat , it sat .", "the  CAT, it sat.", " The cat,it sat. ", "The\tcat, it sat ."]
)
def test_sentence_key_ignores_case_and_spacing(other):
    assert sentence_key(other) == sentence_key("The cat, it sat.")


@pytest.mark.parametrize("other", ["The cat it sat.", "Thecat, it sat.", "The cat, it sat!", "The cat, it sat"])
def test_sentence_key_keeps_words_and_marks(other):
    assert sentence_key(other) != sentence_key("The cat, it sat.")


# --- splits and folds

groups = st.lists(st.tuples(st.sampled_from("abcdefghijklmnop"), st.booleans()), max_size=40)


def rows(split: str, drawn) -> list[Example]:
    """Rows with sentences out of a small set, so that many are shared; upper case must not make them new."""
    return [
        example(f"{split}{i}", f"<e1>{name.upper() if up else name}</e1> <e2>z</e2>", split=split)
        for i, (name, up) in enumerate(drawn)
    ]


@settings(deadline=None, max_examples=200)
@given(groups, st.none() | groups, groups, st.integers(0, 12), st.integers(0, 3))
def test_no_sentence_crosses_splits(train, dev, test, dev_size, seed):
    train, test = rows("train", train), rows("test", test)
    dev = None if dev is None else rows("dev", dev)
    try:
        new_train, new_dev, dropped = assign_splits(train, dev, test, dev_size, seed)
    except InputError as error:
        assert dev is None and dev_size and "data.dev_size" in str(error)
        return
    keys = [{sentence_key(e.sentence) for e in part} for part in (new_train, new_dev, test)]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    assert all(e.split == "train" for e in new_train) and all(e.split == "dev" for e in new_dev)
    assert len(new_train) + len(new_dev) + sum(dropped.values()) == len(train) + len(dev or [])
    if dev is None:
        assert len(new_dev) <= dev_size
    assert assign_splits(train, dev, test, dev_size, seed) == (new_train, new_dev, dropped)


def test_semeval_shared_sentences_are_dropped():
    if not SEMEVAL.exists():
        pytest.skip("real data is not on this machine: semeval2010_task8")
    train, test = (
        read_semeval(SEMEVAL / "TRAIN_FILE.TXT", "train"),
        read_semeval(SEMEVAL / "TEST_FILE_FULL.TXT", "test"),
    )
    assert len(train) - len({e.sentence for e in train}) == 25
    shared = {e.sentence for e in train} & {e.sentence for e in test}
    assert len(shared) == 15
    kept, dev, dropped = assign_splits(train, None, test, 800, seed=0)
    # 16 rows have these 15 sentences; one more differs from a test sentence in the case of one letter.
    assert dropped == {"train_in_test": 17, "dev_in_test": 0, "train_in_dev": 0}
    assert not shared & {e.sentence for e in kept + dev}
    assert (len(kept), len(dev)) == (8000 - 17 - 800, 800)
    assert dev != assign_splits(train, None, test, 800, seed=1)[1]


def test_subset_is_seeded_nested_and_in_order():
    examples = [example(str(i)) for i in range(100)]
    small, large = subset(examples, 20, 0, "train_size"), subset(examples, 50, 0, "train_size")
    assert len(small) == 20 and set(small) < set(large) and large == sorted(large, key=lambda e: int(e.id))
    assert subset(examples, 20, 1, "train_size") != small and subset(examples, None, 0, "train_size") == examples
    with pytest.raises(InputError, match=r"data\.train_size: 101 .* 100"):
        subset(examples, 101, 0, "train_size")


def test_folds():
    examples = [example(str(i), f"<e1>a{i}</e1> , <e2>b</e2>") for i in range(600)]
    folds = [fold_of(e, 3, seed=0) for e in examples]
    assert set(folds) == {0, 1, 2} and min(Counter(folds).values()) > 150
    assert [fold_of(e, 3, seed=0) for e in examples] == folds != [fold_of(e, 3, seed=1) for e in examples]
    assert folds == [fold_of(dataclasses.replace(e, sentence=e.sentence.upper()), 3, seed=0) for e in examples]
    assert {fold_of(e, 1, seed=0) for e in examples} == {0}
    assert [fold_of(e, 5, seed=7) for e in examples[:8]] == [4, 3, 0, 0, 1, 2, 0, 0]  # on any machine


# --- noise

LABELS = ["a", "b", "c", "d"]


def labelled(count: int) -> list[Example]:
    return [example(str(i), label=LABELS[i % 4]) for i in range(count)]


@pytest.mark.parametrize("rate, count", [(0.2, 20), (0.5, 50), (1.0, 101), (0.004, 0)])
def test_uniform_noise_is_exact_and_keeps_gold(rate, count):
    clean = labelled(101)
    noisy = add_noise(clean, Noise(rate=rate), LABELS, seed=0)
    assert sum(e.label != e.gold for e in noisy) == count == round(rate * 101)
    assert [e.gold for e in noisy] == [e.label for e in clean] and [e.id for e in noisy] == [e.id for e in clean]
    assert all(e.label in LABELS for e in noisy)


def test_noise_is_seeded_nested_and_covers_all_wrong_labels():
    clean = labelled(400)
    low, high = (add_noise(clean, Noise(rate=rate), LABELS, 0) for rate in (0.1, 0.3))
    wrong = [{e.id for e in noisy if e.label != e.gold} for noisy in (low, high)]
    assert wrong[0] < wrong[1]
    assert add_noise(clean, Noise(rate=0.1), LABELS, 1) != low == add_noise(clean, Noise(rate=0.1), LABELS, 0)
    pairs = Counter((e.gold, e.label) for e in high if e.gold != e.label)
    assert len(pairs) == 12 and max(pairs.values()) < 30  # 120 wrong labels over 12 pairs


def test_noise_rate_0_leaves_unknown_gold_unknown():
    assert add_noise(labelled(5), Noise(), LABELS, 0) == labelled(5)


def test_noise_counts_on_top_of_wrong_weak_labels():
    weak = [dataclasses.replace(e, gold="a") for e in labelled(100)]  # 75 of them are wrong already
    noisy = add_noise(weak, Noise(rate=0.2), LABELS, 0)
    assert sum(e.label != e.gold for e in noisy) == 75 + 20 and all(e.gold == "a" for e in noisy)
    with pytest.raises(InputError, match=r"data\.noise\.rate: 30 labels of 100 .* only 25"):
        add_noise(weak, Noise(rate=0.3), LABELS, 0)


def test_confusion_noise_follows_its_table():
    table = {"a": {"a": 0.9, "b": 0.3, "c": 0.1}, "b": {"a": 1.0}, "c": {"c": 1.0}}
    noisy = add_noise(labelled(4000), Noise(kind="confusion", rate=0.3, table=table), LABELS, 0)
    pairs = Counter((e.gold, e.label) for e in noisy if e.gold != e.label)
    assert sum(pairs.values()) == 1200 and set(pairs) == {("a", "b"), ("a", "c"), ("b", "a")}
    assert 0.7 < pairs["a", "b"] / (pairs["a", "b"] + pairs["a", "c"]) < 0.8


@pytest.mark.parametrize(
    "table, key", [({"z": {"a": 1.0}}, "z"), ({"a": {"z": 1.0}}, "a.z"), ({"a": {"b": -1.0}}, "a.b")]
)
def test_confusion_table_with_unknown_label_is_refused(table, key):
    with pytest.raises(InputError, match=rf"^data\.noise\.table\.{key}: "):
        add_noise(labelled(8), Noise(kind="confusion", rate=0.1, table=table), LABELS, 0)


def test_draws_are_the_same_in_another_process():
    code = (
        "from tests.test_data_splits import *\n"
        "from atlantis_ds.demo.grammar import grammar_corpus\n"
        "n = add_noise(labelled(50), Noise(rate=0.4), LABELS, 3)\n"
        "t, d, _ = assign_splits([example(str(i), f'<e1>{i}</e1> <e2>b</e2>') for i in range(30)], None, [], 9, 3)\n"
        "print(json.dumps([[e.label for e in n], [e.id for e in d], [e.sentence for e in grammar_corpus(5, 0, 5, 3)]]))"
    )
    root = str(Path(__file__).resolve().parents[1])
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": root},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and len(json.loads(runs[0])[0]) == 50
