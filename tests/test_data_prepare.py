"""Prompts, the demo grammar and the prepare stage."""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import succeed

from atlantis_ds.config.schema import Prompt, Recipe
from atlantis_ds.data.formats import SEMEVAL_LABELS, parse_marked
from atlantis_ds.data.prepare import examples_fingerprint, load_examples, prepare
from atlantis_ds.data.prompts import render_prompt
from atlantis_ds.data.table import Example, sentence_key, to_table
from atlantis_ds.demo.grammar import grammar_corpus, unlabelled_text
from atlantis_ds.errors import InputError
from atlantis_ds.files import read_json, write_json, write_table
from atlantis_ds.run_folder import RunFolder


def example(sentence: str) -> Example:
    text, e1, e2 = parse_marked(sentence)
    return Example("1", text, e1, e2, "x", None, "train")


def recipe(data: dict, seed: int = 0) -> Recipe:
    model = {"model_name_or_path": "some/model"}
    return Recipe.model_validate({"name": "r", "seed": seed, "data": data, "models": {"large": model, "small": model}})


# --- prompts


@pytest.mark.parametrize(
    "sentence, marked",
    [
        ("the <e1>cat</e1> in <e2>boxes</e2>.", "the [E1] cat [/E1] in [E2] boxes [/E2]."),
        ("<e2>Box</e2> (<e1>big cat</e1>)", "[E2] Box [/E2] ([E1] big cat [/E1])"),
        ("<e1> student </e1> <e2>club</e2>", "[E1] student [/E1]  [E2] club [/E2]"),
        (
            "a <e1>{e2} {0}</e1> and {sentence} <e2>\\1 %s</e2>",
            "a [E1] {e2} {0} [/E1] and {sentence} [E2] \\1 %s [/E2]",
        ),
        ("<e1>a</e1><e2>b</e2>", "[E1] a [/E1][E2] b [/E2]"),
        ("<e1>New <e2>York</e2></e1> is", "[E1] New [E2] York [/E2] [/E1] is"),
        ("<e1><e2>New</e2> York</e1> is", "[E1] [E2] New [/E2] York [/E1] is"),
    ],
)
def test_marked_sentence(sentence, marked):
    e = example(sentence)
    assert " ".join(render_prompt(e, Prompt(template="{marked_sentence}"), []).split()) == " ".join(marked.split())


def test_prompt_fields_and_options():
    e = example("the {e1} <e1>cat</e1> in a <e2>{e2} box</e2>")
    template = "{e1}/{e2}: {sentence} | {marked_sentence} {not a field}\n"
    text = "cat/{e2} box: the {e1} cat in a {e2} box | the {e1} [E1] cat [/E1] in a [E2] {e2} box [/E2] {not a field}"
    assert render_prompt(e, Prompt(template=template), ["a", "b"]) == text
    first = Prompt(template="One of {options}.\n{sentence}")
    assert render_prompt(e, first, ["a", "b(e1,e2)"]) == f"One of a, b(e1,e2).\n{e.sentence}"
    with pytest.raises(ValueError, match="drop one"):
        Prompt(template="{options} {sentence}", label_options=True)
    with_options = render_prompt(e, Prompt(template=template, label_options=True), ["a", "b(e1,e2)"])
    assert with_options == text + "\nOptions: a, b(e1,e2)"


# --- grammar


@pytest.fixture(scope="module")
def corpus() -> list[Example]:
    return grammar_corpus(2400, 200, 600, 0)


def test_grammar_corpus_is_distinct_and_complete(corpus):
    assert len({sentence_key(e.sentence) for e in corpus}) == len({e.id for e in corpus}) == len(corpus) == 3200
    for split, count in (("train", 2400), ("dev", 200), ("test", 600)):
        part = [e for e in corpus if e.split == split]
        assert len(part) == count and {e.label for e in part} == set(SEMEVAL_LABELS)
    assert min(Counter(e.label for e in corpus if e.split == "train").values()) > 50
    assert max(len(e.sentence.split()) for e in corpus) <= 25
    for e in corpus:
        assert e.gold == e.label and e.e1[1] < e.e2[0]
        assert e.sentence[slice(*e.e1)].isalpha() and e.sentence[slice(*e.e2)].isalpha()
        assert e.sentence[e.e1[0] - 1] == e.sentence[e.e2[0] - 1] == " "
    assert grammar_corpus(2400, 200, 600, 0) == corpus != grammar_corpus(2400, 200, 600, 1)


def test_grammar_direction_follows_the_roles(corpus):
    for e in corpus:
        between = e.sentence[e.e1[1] : e.e2[0]]
        if " was caused by " in between:
            assert e.label == "Cause-Effect(e2,e1)"
        if " was full of " in between:
            assert e.label == "Content-Container(e2,e1)"
        if " joined " in between:
            assert e.label == "Member-Collection(e1,e2)"


def test_grammar_is_learnable_but_not_trivial(corpus):
    """A linear model on the words is neither lost nor perfect."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline

    train, test = ([e for e in corpus if e.split == split] for split in ("train", "test"))
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=200))
    model.fit([e.sentence for e in train], [e.label for e in train])
    f1 = f1_score([e.label for e in test], model.predict([e.sentence for e in test]), average="macro")
    assert 0.6 < f1 < 0.97


def test_unlabelled_text_is_another_stream(corpus):
    text = unlabelled_text(2000, 0)
    assert unlabelled_text(2000, 0) == text
    assert len({sentence_key(s) for s in unlabelled_text(30_000, 0)}) == 30_000
    assert len(set(text) & {e.sentence for e in corpus}) < 20


# --- prepare


def test_prepare_writes_once_then_loads(tmp_path):
    r, folder = (
        recipe({"format": "grammar", "train_size": 300, "test_size": 80, "dev_size": 40, "noise": {"rate": 0.25}}),
        RunFolder(tmp_path / "r"),
    )
    made = prepare(r, folder)
    info = read_json(folder.examples_info)
    assert (len(made.train), len(made.dev), len(made.test)) == (300, 40, 80) and made.task == "grammar"
    assert info["counts"] == {"train": 300, "dev": 40, "test": 80} and info["labels"] == made.labels == SEMEVAL_LABELS
    assert info["noise"] == {"kind": "uniform", "rate": 0.25, "rows_changed": 75}
    assert sum(e.label != e.gold for e in made.train) == 75 and all(e.label == e.gold for e in made.dev + made.test)
    assert sum(info["label_counts"]["train"].values()) == 300
    assert info["fingerprint"] == made.fingerprint == examples_fingerprint(r)
    stamp = folder.examples.stat().st_mtime_ns, folder.examples_info.stat().st_mtime_ns
    assert prepare(r, folder) == made == load_examples(folder)
    assert stamp == (folder.examples.stat().st_mtime_ns, folder.examples_info.stat().st_mtime_ns)


def test_prepare_finishes_what_was_cut_off(tmp_path):
    r, folder = recipe({"format": "grammar", "train_size": 60, "test_size": 20}), RunFolder(tmp_path / "r")
    made = prepare(r, folder)
    folder.examples_info.unlink()  # killed between the two files
    assert prepare(r, folder) == made
    folder.examples.write_bytes(b"PAR1 broken")
    with pytest.raises(InputError, match="broken Parquet"):
        load_examples(folder)
    assert prepare(r, folder) == made == load_examples(folder)


@pytest.mark.parametrize("change", [{"seed": 1}, {"data": {"format": "grammar", "train_size": 61, "test_size": 20}}])
def test_prepare_refuses_a_folder_with_other_examples(tmp_path, change):
    data = {"format": "grammar", "train_size": 60, "test_size": 20}
    folder = RunFolder(tmp_path / "r")
    prepare(recipe(data), folder)
    before = folder.examples.read_bytes()
    with pytest.raises(InputError, match="other data or another seed"):
        prepare(recipe(**({"data": data} | change)), folder)
    assert folder.examples.read_bytes() == before


def test_prepare_exchanges_the_test_split(tmp_path):
    """Dev, then test: nothing that was scored or trained depends on it. Nor may it change what is trained on."""
    rows = [(f"train-{i}", f"sentence {i}", "A" if i % 2 else "B") for i in range(20)]
    data = {
        "format": "jsonl",
        "train": jsonl(tmp_path / "train.jsonl", rows),
        "test": jsonl(tmp_path / "test.jsonl", [(f"test-{i}", f"question {i}", "A") for i in range(4)]),
        "noise": {"rate": 0.2},
    }
    folder = RunFolder(tmp_path / "r")
    first = prepare(recipe(data), folder)
    other = jsonl(tmp_path / "other.jsonl", [(f"other-{i}", f"inquiry {i}", "B") for i in range(3)])
    second = prepare(recipe({**data, "test": other}), folder)
    assert [e.id for e in second.test] == ["other-0", "other-1", "other-2"] and second == load_examples(folder)
    assert (second.train, second.train_fingerprint) == (first.train, first.train_fingerprint)
    assert second.fingerprint != first.fingerprint, "the evaluation has to be done again"
    with pytest.raises(InputError, match="training or dev examples of other data"):
        prepare(recipe({**data, "test": jsonl(tmp_path / "known.jsonl", [("known", *rows[3][1:])])}), folder)
    assert load_examples(folder) == second


def test_load_refuses_what_does_not_belong_together(tmp_path):
    folder = RunFolder(tmp_path / "r")
    with pytest.raises(InputError, match="no such file"):
        load_examples(folder)
    made = prepare(recipe({"format": "grammar", "train_size": 60, "test_size": 20}), folder)
    rows = made.train + made.dev + made.test
    write_table(folder.examples, to_table([*rows, rows[0]]), {"fingerprint": made.fingerprint})
    with pytest.raises(InputError, match="'grammar-train-00000' stands in train and in train"):
        load_examples(folder)
    write_table(folder.examples, to_table(rows), {"fingerprint": "0" * 16})
    with pytest.raises(InputError, match="does not belong to"):
        load_examples(folder)
    write_json(folder.examples_info, {"labels": []})
    with pytest.raises(InputError, match="not written by this version"):
        load_examples(folder)


def jsonl(path: Path, rows: list[tuple]) -> str:
    path.write_text(
        "".join(
            json.dumps({"id": id, "sentence": f"{name} <e1>a</e1> <e2>b</e2>", "label": label}) + "\n"
            for id, name, label in rows
        )
    )
    return str(path)


def jsonl_data(tmp_path: Path, train=None, test=None, **more) -> dict:
    train = train or [(f"t{i}", f"s{i}", "xy"[i % 2]) for i in range(10)]
    test = test or [(f"e{i}", f"u{i}", "x") for i in range(4)]
    return {
        "format": "jsonl",
        "train": jsonl(tmp_path / "train.jsonl", train),
        "test": jsonl(tmp_path / "test.jsonl", test),
        **more,
    }


def test_prepare_jsonl_with_own_dev_and_label_set(tmp_path):
    dev = jsonl(tmp_path / "dev.jsonl", [("d0", "U1", "x"), ("d1", "s3", "y"), ("d2", "v", "y"), ("d3", "w", "y")])
    made = prepare(recipe(jsonl_data(tmp_path, dev=dev, dev_size=2)), RunFolder(tmp_path / "r"))
    assert made.labels == ["x", "y"] and len(made.dev) == 2 and len(made.test) == 4
    assert "t3" not in {e.id for e in made.train} and len(made.train) == 9
    assert made.dropped == {"train_in_test": 0, "dev_in_test": 1, "train_in_dev": 1}
    assert load_examples(RunFolder(tmp_path / "r")) == made
    with pytest.raises(InputError, match=r"train_size: 10 .* there are 9 \(1 more have a sentence .* another split"):
        prepare(recipe({**jsonl_data(tmp_path, dev=dev), "train_size": 10}), RunFolder(tmp_path / "r2"))
    assert all(e.gold is None for e in made.train)


def test_prepare_says_what_it_left_out(tmp_path):
    data = jsonl_data(tmp_path, test=[("e0", "S3", "x"), ("e1", "s5", "x"), ("e2", "u", "y")])
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**recipe(data).model_dump(exclude_unset=True), "runs_dir": str(tmp_path)}))
    said = succeed("local", 1, "prepare", path)
    assert "8 train, 0 dev, 3 test" in said
    assert "left out 2 rows of train whose sentence stands in test, too" in said and said.count("left out") == 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train_size": 11}, "data.train_size: 11 examples asked for, but there are 10"),
        ({"test_size": 5}, "data.test_size: 5 examples asked for, but there are 4"),
        ({"dev_size": 10}, "data.dev_size: 10"),
        ({"dev_size": 6, "train_size": 5}, "data.train_size: 5 examples asked for, but there are 4"),
        ({"labels": ["x", "z"]}, "train.jsonl:2: unknown label 'y'"),
        ({"labels": ["x", "y", "x"]}, "data.labels: "),
        ({"test": [("e0", "u0", "x"), ("e1", "u1", "new")]}, "test.jsonl:2: unknown label 'new'"),
        ({"test": [("t0", "u0", "x")]}, "the id 't0' stands in train and in test"),
        ({"train": [("t0", "U0", "x")]}, "data.train: no example is left in train"),
        ({"noise": {"kind": "confusion", "rate": 0.5, "table": {"q": {"x": 1.0}}}}, "data.noise.table.q: "),
    ],
)
def test_prepare_refuses_bad_data_and_writes_nothing(tmp_path, change, words):
    folder = RunFolder(tmp_path / "r")
    with pytest.raises(InputError) as error:
        prepare(recipe(jsonl_data(tmp_path, **change)), folder)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not folder.root.exists()


def test_prepare_names_missing_and_empty_files(tmp_path):
    data = jsonl_data(tmp_path)
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(InputError, match=r"data\.test: .*test\.jsonl: holds no example"):
        prepare(recipe(data), RunFolder(tmp_path / "r"))
    (tmp_path / "none.jsonl").write_text("\n")
    empty = recipe({**data, "labels": None, "train": str(tmp_path / "none.jsonl")})
    with pytest.raises(InputError, match=r"data\.train: .*none\.jsonl: holds no example"):
        prepare(empty, RunFolder(tmp_path / "r"))
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r"data\.test: .*test\.jsonl: no such file"):
        prepare(recipe(data), RunFolder(tmp_path / "r"))


def test_fingerprint_follows_the_content_not_the_place(tmp_path):
    (tmp_path / "moved").mkdir()
    first, moved = examples_fingerprint(recipe(jsonl_data(tmp_path))), jsonl_data(tmp_path / "moved")
    assert examples_fingerprint(recipe(moved)) == first != examples_fingerprint(recipe(moved, seed=1))
    assert examples_fingerprint(recipe({**moved, "noise": {"rate": 0.1}})) != first
    with Path(moved["train"]).open("a") as file:
        file.write("\n")
    assert examples_fingerprint(recipe(moved)) != first


def test_prepare_from_a_hub_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, count in (("train", 12), ("test", 3)):
        items = [
            {
                "sentence": f'"{split}{i} <e1>a</e1> <e2>b</e2>."',
                "relation": "Other" if i % 2 else "Cause-Effect(e1,e2)",
            }
            for i in range(count)
        ]
        datasets.Dataset.from_list(items).to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    data = {"format": "semeval2010_task8", "hub_id": str(tmp_path / "hub"), "dev_size": 2, "train_size": 8}
    made = prepare(recipe(data), RunFolder(tmp_path / "r"))
    assert (len(made.train), len(made.dev), len(made.test)) == (8, 2, 3) and made.labels == SEMEVAL_LABELS
    assert prepare(recipe(data), RunFolder(tmp_path / "r")) == made
