"""Prompts, the demo grammar and the prepare stage."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import succeed

from atlantis_ds.config.schema import Prompt, Recipe
from atlantis_ds.data.examples import SCHEMA, SPLITS, Examples, load_examples, map_table, write_arrow
from atlantis_ds.data.ingest import look_at_data
from atlantis_ds.data.prepare import examples_fingerprint, prepare
from atlantis_ds.data.prompts import render_prompt, template_for
from atlantis_ds.data.relation import SEMEVAL_LABELS, parse_marked, relation_fields
from atlantis_ds.data.rows import BadRow
from atlantis_ds.data.splits import text_key
from atlantis_ds.demo.grammar import Row, grammar_corpus, unlabelled_text
from atlantis_ds.errors import InputError
from atlantis_ds.files import read_json, write_json
from atlantis_ds.run_folder import RunFolder


def fields(sentence: str) -> dict[str, str]:
    return relation_fields(*parse_marked(sentence))


def recipe(data: dict, seed: int = 0, prompt: dict | None = None) -> Recipe:
    model = {"model_name_or_path": "some/model"}
    models = {"large": model, "small": model}
    return Recipe.model_validate({"name": "r", "seed": seed, "data": data, "prompt": prompt or {}, "models": models})


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
    text = render_prompt("{marked_sentence}", fields(sentence), Prompt(), [])
    assert " ".join(text.split()) == " ".join(marked.split())


def test_prompt_fields_and_options():
    e = fields("the {e1} <e1>cat</e1> in a <e2>{e2} box</e2>")
    template = "{e1}/{e2}: {sentence} | {marked_sentence} {not a field}\n"
    text = "cat/{e2} box: the {e1} cat in a {e2} box | the {e1} [E1] cat [/E1] in a [E2] {e2} box [/E2] {not a field}"
    assert render_prompt(template, e, Prompt(template=template), ["a", "b"]) == text
    first = Prompt(template="One of {options}.\n{sentence}")
    assert render_prompt(first.template, e, first, ["a", "b(e1,e2)"]) == f"One of a, b(e1,e2).\n{e['sentence']}"
    with pytest.raises(ValueError, match="remove one"):
        Prompt(template="{options} {sentence}", label_options=True)
    with_options = render_prompt(template, e, Prompt(template=template, label_options=True), ["a", "b(e1,e2)"])
    assert with_options == text + "\nOptions: a, b(e1,e2)"


@pytest.mark.parametrize(
    "task, columns, template",
    [
        ("relation", "sentence", None),
        ("classification", "text", "Which label fits: {options}?\n{text}"),
        ("classification", "title sentence", "Which label fits: {options}?\n{sentence}"),
        ("classification", "review", "Which label fits: {options}?\n{review}"),
        ("response", "prompt", "{prompt}"),
        ("response", "topic question", "{question}"),
        ("response", "instruction", "{instruction}"),
        ("response", "instruction input prompt", "{instruction}\n{input}"),
    ],
)
def test_templates_by_default(task, columns, template):
    found = template_for(task, Prompt(), dict.fromkeys(columns.split(), "x"))
    assert found == template if template else "{marked_sentence}" in found
    own = Prompt(template=f"{{{columns.split()[0]}}} is what?")
    assert template_for(task, own, dict.fromkeys(columns.split(), "x")) == own.template


def test_templates_that_do_not_fit_the_columns():
    with pytest.raises(
        BadRow, match=r"prompt.template is needed: which of the columns title, body belong in the prompt\?"
    ):
        template_for("classification", Prompt(), {"title": "", "body": ""})
    with pytest.raises(BadRow, match=r"unknown field {text}; known: body, options"):
        template_for("classification", Prompt(template="{text}"), {"body": ""})


# --- grammar


@pytest.fixture(scope="module")
def corpus() -> list[Row]:
    return list(grammar_corpus(2400, 200, 600, 0))


def test_grammar_corpus_is_distinct_and_complete(corpus):
    assert len({text_key(e.sentence) for e in corpus}) == len({e.id for e in corpus}) == len(corpus) == 3200
    for split, count in (("train", 2400), ("dev", 200), ("test", 600)):
        part = [e for e in corpus if e.split == split]
        assert len(part) == count and {e.label for e in part} == set(SEMEVAL_LABELS)
    assert min(Counter(e.label for e in corpus if e.split == "train").values()) > 50
    assert max(len(e.sentence.split()) for e in corpus) <= 25
    for e in corpus:
        before, first, between, second, after = spans(e)
        assert (first, second) == (e.fields["e1"], e.fields["e2"]) and first.isalpha() and second.isalpha()
        assert before.endswith(" ") and between.endswith(" ")
        assert e.sentence == before + first + between + second + after
    assert list(grammar_corpus(2400, 200, 600, 0)) == corpus != list(grammar_corpus(2400, 200, 600, 1))


def spans(row: Row) -> list[str]:
    """What stands before, in, between and after the two entities, e1 first."""
    marked = row.fields["marked_sentence"]
    before, rest = marked.split("[E1] ")
    first, rest = rest.split(" [/E1]")
    between, rest = rest.split("[E2] ")
    return [before, first, between, *rest.split(" [/E2]")]


def test_grammar_direction_follows_the_roles(corpus):
    for e in corpus:
        between = spans(e)[2]
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
    assert len({text_key(s) for s in unlabelled_text(30_000, 0)}) == 30_000
    assert len(set(text) & {e.sentence for e in corpus}) < 20


# --- prepare


def sizes(made: Examples) -> tuple[int, ...]:
    return tuple(len(getattr(made, split)) for split in SPLITS)


def test_prepare_writes_once_then_loads(tmp_path):
    r, folder = (
        recipe({"format": "grammar", "train_size": 300, "test_size": 80, "dev_size": 40, "noise": {"rate": 0.25}}),
        RunFolder(tmp_path / "r"),
    )
    made = prepare(r, folder)
    info = read_json(folder.examples_info)
    assert sizes(made) == (300, 40, 80) and made.task == "relation" and not made.chat
    assert info["counts"] == {"train": 300, "dev": 40, "test": 80} and info["labels"] == made.labels == SEMEVAL_LABELS
    assert info["noise"] == {"kind": "uniform", "rate": 0.25, "rows_changed": 75}
    assert (made.train.correct == 0).sum() == 75 and (made.train.correct == 1).sum() == 225
    assert (made.dev.correct == 1).all() and (made.test.correct == 1).all()
    assert sum(info["label_counts"]["train"].values()) == 300
    assert info["fingerprint"] == made.fingerprint == examples_fingerprint(r)
    assert sorted(path.name for path in folder.examples.iterdir()) == [
        "dev.arrow",
        "examples.json",
        "test.arrow",
        "train.arrow",
    ]

    def stamps() -> list[int]:
        return [path.stat().st_mtime_ns for path in sorted(folder.examples.iterdir())]

    before = stamps()
    assert prepare(r, folder) == made == load_examples(folder)
    assert stamps() == before


def test_columns_of_a_split(tmp_path):
    data = {"format": "grammar", "train_size": 60, "test_size": 20, "noise": {"rate": 0.5}}
    train = prepare(recipe(data), RunFolder(tmp_path / "r")).train
    rows = [row for row in grammar_corpus(60, 200, 20, 0) if row.split == "train"]
    assert train.ids.to_pylist() == [row.id for row in rows]
    assert train.golds.to_pylist() == [row.label for row in rows]
    assert train.groups.null_count == 60
    for prompt, row in zip(train.prompts.to_pylist(), rows):
        assert row.fields["marked_sentence"] in prompt and not prompt.endswith("\n")
    assert [SEMEVAL_LABELS[code] for code in train.codes] == train.targets.to_pylist()
    assert [SEMEVAL_LABELS[code] for code in train.gold_codes] == train.golds.to_pylist()
    assert train.correct.tolist() == [int(pair[0] == pair[1]) for pair in zip(train.codes, train.gold_codes)]
    assert set(train.folds(3)) == {0, 1, 2} and set(train.folds(1)) == {0}


def test_prepare_finishes_what_was_cut_off(tmp_path):
    r, folder = recipe({"format": "grammar", "train_size": 60, "test_size": 20}), RunFolder(tmp_path / "r")
    made = prepare(r, folder)
    folder.examples_info.unlink()  # killed before the last file
    assert prepare(r, folder) == made
    folder.split("train").write_bytes(b"ARROW1 broken")
    with pytest.raises(InputError, match=r"train\.arrow: broken Arrow file"):
        load_examples(folder)
    assert prepare(r, folder) == made == load_examples(folder)
    folder.split("dev").unlink()
    with pytest.raises(InputError, match=r"dev\.arrow: no such file"):
        load_examples(folder)
    assert prepare(r, folder) == made == load_examples(folder)
    folder.examples_info.write_text("{")
    assert prepare(r, folder) == made == load_examples(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"data": {"format": "grammar", "train_size": 61, "test_size": 20}},
        {"prompt": {"template": "{sentence}"}},
    ],
)
def test_prepare_refuses_a_folder_with_other_examples(tmp_path, change):
    data = {"format": "grammar", "train_size": 60, "test_size": 20}
    folder = RunFolder(tmp_path / "r")
    made = prepare(recipe(data), folder)
    before = {path: path.read_bytes() for path in folder.examples.iterdir()}
    with pytest.raises(InputError, match=r"other data, another prompt or another seed .* choose another `name`"):
        prepare(recipe(**({"data": data} | change)), folder)
    assert {path: path.read_bytes() for path in folder.examples.iterdir()} == before
    assert prepare(recipe(data), folder) == made


def test_prepare_exchanges_the_test_split(tmp_path):
    """Dev, then test: nothing that was scored or trained depends on it. Nor may it change what is trained on."""
    rows = [(f"train-{i}", f"sentence {i}", "A" if i % 2 else "B") for i in range(20)]
    data = {
        "task": "relation",
        "train": jsonl(tmp_path / "train.jsonl", rows),
        "test": jsonl(tmp_path / "test.jsonl", [(f"test-{i}", f"question {i}", "A") for i in range(4)]),
        "noise": {"rate": 0.2},
    }
    folder = RunFolder(tmp_path / "r")
    first = prepare(recipe(data), folder)
    train = first.train.table.to_pylist()  # not the mapped file, which is replaced
    other = jsonl(tmp_path / "other.jsonl", [(f"other-{i}", f"inquiry {i}", "B") for i in range(3)])
    second = prepare(recipe({**data, "test": other}), folder)
    assert second.test.ids.to_pylist() == ["other-0", "other-1", "other-2"] and second == load_examples(folder)
    assert (second.train.table.to_pylist(), second.train_fingerprint) == (train, first.train_fingerprint)
    assert second.fingerprint != first.fingerprint, "the evaluation has to be done again"
    with pytest.raises(InputError, match="training or dev examples from other data"):
        prepare(recipe({**data, "test": jsonl(tmp_path / "known.jsonl", [("known", *rows[3][1:])])}), folder)
    assert load_examples(folder) == second


def test_load_refuses_what_does_not_belong_together(tmp_path):
    folder = RunFolder(tmp_path / "r")
    with pytest.raises(InputError, match="no such file"):
        load_examples(folder)
    prepare(recipe({"format": "grammar", "train_size": 60, "test_size": 20}), folder)
    batches = pa.Table.from_pylist(map_table(folder.split("dev"))[0].to_pylist(), SCHEMA).to_batches()
    write_arrow(folder.split("dev"), SCHEMA, iter(batches), {"fingerprint": "0" * 16})
    with pytest.raises(InputError, match=r"dev\.arrow: does not belong to"):
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
        "task": "relation",
        "train": jsonl(tmp_path / "train.jsonl", train),
        "test": jsonl(tmp_path / "test.jsonl", test),
        **more,
    }


def test_prepare_rows_with_own_dev_and_label_set(tmp_path):
    dev = jsonl(tmp_path / "dev.jsonl", [("d0", "U1", "x"), ("d1", "s3", "y"), ("d2", "v", "y"), ("d3", "w", "y")])
    made = prepare(recipe(jsonl_data(tmp_path, dev=dev, dev_size=2)), RunFolder(tmp_path / "r"))
    assert made.labels == ["x", "y"] and sizes(made) == (9, 2, 4)
    assert "t3" not in made.train.ids.to_pylist()
    assert made.info["dropped"] == {"train_in_test": 0, "dev_in_test": 1, "train_in_dev": 1}
    assert load_examples(RunFolder(tmp_path / "r")) == made
    with pytest.raises(InputError, match=r"train_size: 10 .* there are only 9 \(1 more have a text .* another split"):
        prepare(recipe({**jsonl_data(tmp_path, dev=dev), "train_size": 10}), RunFolder(tmp_path / "r2"))
    assert made.train.golds.null_count == 9 and set(made.train.correct) == {-1}


@pytest.mark.ranks
def test_prepare_says_what_it_left_out(tmp_path):
    data = jsonl_data(tmp_path, test=[("e0", "S3", "x"), ("e1", "s5", "x"), ("e2", "u", "y")])
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**recipe(data).model_dump(exclude_unset=True), "runs_dir": str(tmp_path)}))
    said = succeed("local", 1, "prepare", path)
    assert "8 train, 0 dev, 3 test" in said
    assert "left out 2 rows of train whose text is also in test" in said and said.count("left out") == 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train_size": 11}, "data.train_size: 11 examples requested, but there are only 10"),
        ({"test_size": 5}, "data.test_size: 5 examples requested, but there are only 4"),
        ({"dev_size": 10}, "data.dev_size: 10"),
        ({"dev_size": 6, "train_size": 5}, "data.train_size: 5 examples requested, but there are only 4"),
        ({"labels": ["x", "y", "x"]}, "data.labels: "),
        ({"labels": []}, "data.labels: "),
        ({"labels": ["x", "y", " "]}, "data.labels: "),
        ({"test": [("e0", "u0", "x"), ("e1", "u1", "new")]}, "test.jsonl:2: unknown label 'new'"),
        ({"test": [("e0", "u0", "x"), ("e1", "u1", None)]}, "test.jsonl:2: empty label"),
        ({"test": [("e0", "u0", "x"), ("e0", "u1", "x")]}, "test.jsonl:2: the id 'e0' is a duplicate in test"),
        ({"train": [("t0", "U0", "x")]}, "data.train: no example is left in train"),
        ({"noise": {"kind": "confusion", "rate": 0.5, "table": {"q": {"x": 1.0}}}}, "data.noise.table.q: "),
        ({"negative_label": "none"}, "data.negative_label: 'none' is not a label in train (x, y)"),
    ],
)
def test_prepare_refuses_bad_data_and_writes_nothing(tmp_path, change, words):
    folder = RunFolder(tmp_path / "r")
    with pytest.raises(InputError) as error:
        prepare(recipe(jsonl_data(tmp_path, **change)), folder)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not folder.root.exists()


def test_labels_of_the_recipe_that_train_does_not_keep_to(tmp_path):
    with pytest.raises(InputError) as error:
        prepare(recipe(jsonl_data(tmp_path, labels=["x", "z"])), RunFolder(tmp_path / "r"))
    lines = str(error.value).splitlines()
    assert "train.jsonl:2: unknown label 'y'; the label set is x, z (5 rows cannot be read: 5 x unknown" in lines[0]
    assert len(lines) == 5 and lines[4].startswith(f"  {tmp_path}/train.jsonl:10: unknown label 'y'")
    assert not (tmp_path / "r").exists()
    made = prepare(recipe(jsonl_data(tmp_path, labels=["y", "unused", "x"])), RunFolder(tmp_path / "r"))
    assert made.labels == ["y", "unused", "x"] and made.info["label_counts"]["train"] == {"y": 5, "unused": 0, "x": 5}
    assert made.train.codes.tolist() == [2, 0] * 5


def test_a_bad_recipe_leaves_the_run_folder_alone(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "log.jsonl").write_text("{}\n")
    with pytest.raises(InputError):
        prepare(recipe(jsonl_data(tmp_path, train_size=11)), RunFolder(tmp_path / "r"))
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["log.jsonl"]


def test_prepare_names_missing_and_empty_files(tmp_path):
    data = jsonl_data(tmp_path)
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(InputError, match=r"data\.test: .*test\.jsonl: contains no example"):
        prepare(recipe(data), RunFolder(tmp_path / "r"))
    (tmp_path / "none.jsonl").write_text("\n")
    empty = recipe({**data, "labels": None, "train": str(tmp_path / "none.jsonl")})
    with pytest.raises(InputError, match=r"data\.train: .*none\.jsonl: contains no example"):
        prepare(empty, RunFolder(tmp_path / "r"))
    (tmp_path / "test.jsonl").unlink()
    for look in (look_at_data, lambda recipe: prepare(recipe, RunFolder(tmp_path / "r"))):
        with pytest.raises(InputError, match=r"data\.test: .*test\.jsonl: no such file"):
            look(recipe(data))


def test_fingerprint_follows_the_content_not_the_place(tmp_path):
    (tmp_path / "moved").mkdir()
    first, moved = examples_fingerprint(recipe(jsonl_data(tmp_path))), jsonl_data(tmp_path / "moved")
    assert examples_fingerprint(recipe(moved)) == first != examples_fingerprint(recipe(moved, seed=1))
    assert examples_fingerprint(recipe({**moved, "noise": {"rate": 0.1}})) != first
    assert examples_fingerprint(recipe(moved, prompt={"template": "{sentence}"})) != first
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
    assert sizes(made) == (8, 2, 3) and made.labels == SEMEVAL_LABELS
    assert prepare(recipe(data), RunFolder(tmp_path / "r")) == made
    as_rows = {"task": "relation", "hub_id": str(tmp_path / "hub")}  # the same without a format: rows with marks
    assert prepare(recipe(as_rows), RunFolder(tmp_path / "r2")).labels == ["Cause-Effect(e1,e2)", "Other"]
