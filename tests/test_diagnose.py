"""``atlantis-ds diagnose``: the page and the list of likely label errors, on a real run and on made-up columns."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WriteRecipe, in_process, launch, refuse, succeed

from atlantis_ds.config.schema import Weights
from atlantis_ds.weights import page
from atlantis_ds.weights.agreement import joined, suggestion
from atlantis_ds.weights.diagnostics import diagnose
from atlantis_ds.weights.facts import WeightFacts
from atlantis_ds.weights.formulas import Scores
from atlantis_ds.weights.picture import weights_pictures


@pytest.fixture(scope="module")
def run(tiny_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnose")
    recipe = tiny_recipe(folder, {"data.noise": {"kind": "uniform", "rate": 0.3}})
    in_process(recipe, "prepare", "score", "merge")
    succeed("local", 1, "diagnose", folder / "run")
    return folder / "run"


class Page(HTMLParser):
    """Every element closed, no file or address outside the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.sources: list[str] = []
        self.pictures = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        self.pictures += tag == "svg"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.ranks
def test_page_holds_everything(run: Path) -> None:
    found = Page((run / "diagnosis" / "diagnosis.html").read_text(encoding="utf-8"))
    assert not found.open
    assert not found.sources and found.pictures == 3
    diagnosis = json.loads((run / "diagnosis" / "diagnosis.json").read_text())
    assert diagnosis == json.loads((run / "weights.json").read_text())
    said = [f"{diagnosis['ess_fraction']:.1%}", f"{diagnosis['gold']['auroc_correct']:.3f}", *diagnosis["warnings"]]
    said += [row["label"] for row in diagnosis["classes"]]
    assert diagnosis["warnings"] and all(words in found.text for words in said)
    lengths = diagnosis["label_lengths"]
    assert sum(row["weight_share"] for row in lengths) == pytest.approx(1) and len(lengths) > 2
    assert [int(row["label"]) for row in lengths] == sorted(int(row["label"]) for row in lengths)


@pytest.mark.ranks
def test_list_of_likely_label_errors(run: Path) -> None:
    with (run / "diagnosis" / "label_errors.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    weights = pq.read_table(run / "weights.parquet").to_pydict()
    weight = dict(zip(map(str, weights["id"]), weights["weight"]))
    found = [float(row["weight"]) for row in rows]
    assert found == sorted(weight.values()) and all(weight[row["id"]] == float(row["weight"]) for row in rows)
    labels = json.loads((run / "examples" / "examples.json").read_text())["labels"]
    shards = [pq.read_table(path) for path in sorted((run / "scores").glob("shard-*.parquet"))]
    scores = {row["id"]: row for shard in shards for row in shard.to_pylist()}
    for row in rows:
        score = scores[row["id"]]
        every = np.add(score["label_set_logp_reference"], score["label_set_eos_reference"])
        chances = np.exp(every) / np.exp(every).sum()
        assert row["suggested_label"] == labels[int(every.argmax())]
        assert float(row["p_suggested"]) == pytest.approx(chances.max())
        assert float(row["p_label"]) == pytest.approx(chances[labels.index(row["target"])])
        assert "[/E1]" in row["prompt"] and row["gold"] in labels and row["group"] == row["corrected"] == ""
    assert any(row["target"] != row["gold"] for row in rows)


@pytest.mark.ranks
def test_what_it_refuses(run: Path, tmp_path: Path) -> None:
    refuse(launch("local", 1, "diagnose", tmp_path / "nothing"), "nothing: no run here", "no recipe.yaml")
    listed = run / "diagnosis" / "label_errors.csv"
    text = listed.read_text(encoding="utf-8")
    listed.write_text(text.removesuffix(",\n") + ",DROP\n", encoding="utf-8")
    refuse(launch("local", 1, "diagnose", run), "label_errors.csv: contains corrections", "under another name")
    listed.write_text(text, encoding="utf-8")
    refuse(launch("local", 1, "relabel", run, listed), "data.noise: its wrong labels are only in the run")
    refuse(launch("local", 1, "relabel", tmp_path / "nothing", listed), "nothing: no run here")
    (run / "weights.json").rename(tmp_path / "weights.json")
    try:
        refuse(launch("local", 1, "diagnose", run), "weights.json", "run `merge` first")
    finally:
        (tmp_path / "weights.json").rename(run / "weights.json")


@dataclass
class Columns:
    """The text columns of a split, in chunks of three rows."""

    ids: pa.ChunkedArray
    prompts: pa.ChunkedArray
    targets: pa.ChunkedArray
    golds: pa.ChunkedArray
    groups: pa.ChunkedArray


@dataclass
class MadeUp:
    """What a listing reads of the examples of a run."""

    train: Columns
    labels: list[str] | None
    chat: bool = False


def column(texts: list[str | None], size: int = 3) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(texts[at : at + size], pa.string()) for at in range(0, len(texts), size)])


def made_up(
    prompts: list[str], targets: list[str], golds: Any = None, groups: Any = None, labels: Any = None, **more: Any
) -> Any:
    nothing = [None] * len(prompts)
    columns = ([f"x{row}" for row in range(len(prompts))], prompts, targets, golds or nothing, groups or nothing)
    return MadeUp(Columns(*map(column, columns)), labels, **more)


def label_scores(reference: np.ndarray, labels: list[int]) -> Scores:
    """Scores whose reference model gives the labels of the set these log-likelihoods, [n, K]; all else is zero."""
    names = [f"{kind}{model}" for kind in ("", "tokens_", "eos_") for model in ("large", "small", "reference")]
    zero = dict.fromkeys(names, np.zeros(reference.shape))
    every = Scores(**zero | {"reference": reference}, labels=np.arange(reference.shape[1]))
    return Scores(**{name: values[:, 0] for name, values in zero.items()}, labels=np.array(labels), label_set=every)


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [
        (["Say: a b?\nOptions: x, y", "Say: c?\nOptions: x, y"], ["a b?", "c?"]),
        (["one same", "one other", "one thing"], ["same", "other", "thing"]),  # words are not cut
        (["alike", "alike"], ["alike", "alike"]),
        (["only one prompt"], ["only one prompt"]),
        (["a b", "a b b", "a c b"], ["b", "b b", "c b"]),  # begin and end must not meet
        (["", "some text"], ["", "some text"]),
        (["Q: é ü A:", "Q: ü\u0308 A:", "Q: 😀😀 A:"], ["é ü", "ü\u0308", "😀😀"]),
        ([f"Tell me: {'ab' * at} now please" for at in range(1, 12)], ["ab" * at for at in range(1, 12)]),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_what_all_prompts_share_is_not_shown(prompts: list[str], shown: list[str], size: int) -> None:
    show = page.prompt_view(column(prompts, size), chat=False)
    assert [show(prompt) for prompt in prompts] == shown


def test_shared_turns_of_a_chat_are_not_shown() -> None:
    def chat(*turns: str) -> str:
        roles = ["system", "user", "assistant", "user"]
        return json.dumps([{"role": role, "content": turn} for role, turn in zip(roles, turns)], ensure_ascii=False)

    chats = [chat("Be kind.", "Hi, all", "Hello", "Why?"), chat("Be kind.", "Hi, you"), chat("Be kind.", "Hi,")]
    show = page.prompt_view(column(chats, 2), chat=True)
    assert [show(text) for text in chats] == [
        "user: Hi, all\nassistant: Hello\nuser: Why?",
        "user: Hi, you",
        "user: Hi,",
    ]
    alike = [chat("Be kind.", "Hi"), chat("Be kind.", "Hi")]
    assert page.prompt_view(column(alike), chat=True)(alike[0]) == "user: Hi"
    longer = [chat("Be kind.", "Hi"), chat("Be kind.", "Hi", "Hello", "Why?")]
    assert [page.prompt_view(column(longer), chat=True)(text)[:8] for text in longer] == ["user: Hi"] * 2


def test_rows_come_in_the_order_asked_for() -> None:
    examples = made_up([f"p{row}" for row in range(20)], list("abcdefghijklmnopqrst"), groups=["g", None] * 10)
    order = np.random.default_rng(0).permutation(20)
    ids, prompts, targets, golds, groups = page.taken(examples.train, order)
    assert ids == [f"x{row}" for row in order] and prompts == [f"p{row}" for row in order]
    assert targets == ["abcdefghijklmnopqrst"[row] for row in order] and golds == [None] * 20
    assert groups == ["g" if row % 2 == 0 else None for row in order]


def test_the_list_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "ROWS_AT_ONCE", 3)
    labels, n = ["yes", "no", 'a,"b"'], 10
    rng = np.random.default_rng(0)
    codes, weights, reference = rng.integers(0, 3, n), rng.random(n), rng.normal(size=(n, 3))
    prompts = [f"Is it?\nrow {row}\nAnswer:" for row in range(n)]
    examples = made_up(prompts, [labels[code] for code in codes], golds=["yes", None] * 5, labels=labels)
    parts = [label_scores(reference[:4], codes[:4].tolist()), label_scores(reference[4:], codes[4:].tolist())]
    listing = page.Listing(examples, weights, joined([suggestion(part) for part in parts]))
    order = np.argsort(weights)
    page.write_csv(tmp_path / "label_errors.csv", [*page.COLUMNS, page.CORRECTED], listing.entries(order))
    with (tmp_path / "label_errors.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [*page.COLUMNS, "corrected"] and len(found) == n
    chances = np.exp(reference) / np.exp(reference).sum(axis=1, keepdims=True)
    for row, entry in zip(order.tolist(), found):
        assert entry["id"] == f"x{row}" and entry["prompt"] == f"{row}" and entry["group"] == ""
        assert float(entry["weight"]) == weights[row] and entry["target"] == labels[codes[row]]
        assert entry["gold"] == ("yes" if row % 2 == 0 else "")
        assert entry["suggested_label"] == labels[reference[row].argmax()]
        assert float(entry["p_label"]) == pytest.approx(chances[row, codes[row]])
        assert float(entry["p_suggested"]) == pytest.approx(chances[row].max())


def test_a_list_without_suggestions_leaves_them_empty() -> None:
    turns = [json.dumps([{"role": "user", "content": text}]) for text in ("a", "b")]
    said = [json.dumps([{"role": "assistant", "content": text}]) for text in ("A\nAA", "B")]
    listing = page.Listing(made_up(turns, said, golds=[None, said[0]], chat=True), np.ones(2), None)
    first, second = listing.entries(np.arange(2))
    assert first["suggested_label"] is first["p_label"] is first["p_suggested"] is first["gold"] is None
    assert (first["prompt"], first["target"]) == ("user: a", "assistant: A\nAA")
    assert second["gold"] == "assistant: A\nAA"


def test_page_of_responses() -> None:
    rng = np.random.default_rng(0)
    n, weights = 200, rng.lognormal(0, 0.4, 200)
    weights /= weights.mean()
    golds = [None if row % 2 else f"gold {row}" for row in range(n)]
    examples = made_up(
        [f"Answer this: {row}" for row in range(n)],
        [f"long {row} " + "x" * 400 for row in range(n)],
        golds,
        [["web", "<book>"][row % 2] for row in range(n)],
    )
    facts = WeightFacts(groups=np.arange(n) % 2, group_names=["web", "<book>"], tokens=rng.integers(1, 90, n))
    diagnosis = diagnose(weights, np.log(weights), facts) | {"options": Weights().model_dump()}
    order, listing = np.argsort(weights), page.Listing(examples, weights, None)
    lists = [list(listing.entries(rows)) for rows in (order[:50], order[::-1][:50])]
    first = {"web": lists[0][0]}
    text = page._page("x", diagnosis, *lists, weights_pictures(weights, diagnosis), first)
    found = Page(text)
    assert not found.open and "<book>" in found.text
    assert "x" * 200 + "…" in found.text and "x" * 300 not in found.text and "Answer this" not in found.text
    for words in ("Groups", "Tokens of the response", "likely wrong responses", f"gold {order[order % 2 == 0][0]}"):
        assert words in found.text
    assert "Labels" not in found.text and "reference would say" not in found.text
    assert all(row["label"] in found.text for row in diagnosis["target_lengths"])


def test_text_of_the_data_is_never_markup() -> None:
    row = {"id": "<1>", "prompt": "<script>alert(1)</script>", "target": "a&b", "gold": None, "weight": 0.1}
    row |= {"suggested_label": "<b>", "p_label": 0.1, "p_suggested": 0.5, "group": "<u>"}
    share = {"label": "<i>", "examples": 1, "data_share": 1.0, "weight_share": 1.0, "ratio": 1.0}
    facts = WeightFacts(labels=np.zeros(1, int), label_names=["<i>"], groups=np.zeros(1, int), group_names=["<u>"])
    diagnosis = diagnose(np.ones(1), np.zeros(1), facts) | {"options": {"formula": "ratio"}}
    assert diagnosis["classes"] == [share]
    for classes in ([share], None):
        text = page._page("<x>", diagnosis | {"classes": classes}, [row], [row], [], {"<u>": row})
        assert not any(tag in text for tag in ("<script>alert", "<b>", "<i>", "<u>", "<x>"))
        assert "&lt;script&gt;" in text and Page(text).open == []
