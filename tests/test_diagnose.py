"""``atlantis-ds diagnose`` on a real run: the page, the list of likely label errors, and what it refuses."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import WriteRecipe, launch, refuse, succeed


@pytest.fixture(scope="module")
def run(tiny_recipe: WriteRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnose")
    recipe = tiny_recipe(folder, {"data.noise": {"kind": "uniform", "rate": 0.3}})
    for stage in ("prepare", "score", "merge"):
        succeed("local", 1, stage, recipe)
    succeed("local", 1, "diagnose", folder / "run")
    return folder / "run"


class Page(HTMLParser):
    """Every element closed, no file or address outside the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_holds_everything(run: Path) -> None:
    page = Page((run / "diagnosis" / "diagnosis.html").read_text(encoding="utf-8"))
    assert not page.open
    (picture,) = page.sources
    assert picture.startswith("data:image/png;base64,") and len(picture) > 10_000
    diagnosis = json.loads((run / "diagnosis" / "diagnosis.json").read_text())
    assert diagnosis == json.loads((run / "weights.json").read_text())
    said = [f"{diagnosis['ess_fraction']:.1%}", f"{diagnosis['gold']['auroc_correct']:.3f}", *diagnosis["warnings"]]
    said += [row["label"] for row in diagnosis["classes"]]
    assert diagnosis["warnings"] and all(words in page.text for words in said)
    lengths = diagnosis["label_lengths"]
    assert sum(row["weight_share"] for row in lengths) == pytest.approx(1) and len(lengths) > 2
    assert [int(row["label"]) for row in lengths] == sorted(int(row["label"]) for row in lengths)


def test_list_of_likely_label_errors(run: Path) -> None:
    with (run / "diagnosis" / "label_errors.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    weights = pq.read_table(run / "weights.parquet").to_pydict()
    weight = dict(zip(weights["id"], weights["weight"]))
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
        assert float(row["p_label"]) == pytest.approx(chances[labels.index(row["label"])])
        assert "[E1]" in row["sentence"] and row["gold"] in labels
    assert any(row["label"] != row["gold"] for row in rows)


def test_what_it_refuses(run: Path, tmp_path: Path) -> None:
    refuse(launch("local", 1, "diagnose", tmp_path / "nothing"), "nothing: no run here", "no recipe.yaml")
    (run / "weights.json").rename(tmp_path / "weights.json")
    try:
        refuse(launch("local", 1, "diagnose", run), "weights.json", "run the stage that writes it")
    finally:
        (tmp_path / "weights.json").rename(run / "weights.json")


def test_text_of_the_data_is_never_markup() -> None:
    from atlantis_ds.weights.page import _page

    row = {"id": "<1>", "sentence": "<script>alert(1)</script>", "label": "a&b", "gold": None, "weight": 0.1}
    row |= {"suggested_label": "<b>", "p_label": 0.1, "p_suggested": 0.5}
    share = {"label": "<i>", "data_share": 1.0, "weight_share": 1.0, "ratio": 1.0}
    numbers = {"n": 1, "ess": 1.0, "ess_fraction": 1.0, "pareto_k": None, "pareto_k_final": None, "gold": None}
    numbers |= {"pareto_k_threshold": 0.7, "max": 1.0, "top_percent_share": 1.0, "quantiles": {"0.5": 1.0}}
    diagnosis = {**numbers, "warnings": [], "classes": [share], "label_lengths": None, "options": {"formula": "ratio"}}
    text = _page("<x>", diagnosis, [row], Path(__file__))
    assert "<script>" not in text and "<b>" not in text and "<i>" not in text and "<x>" not in text
    assert "&lt;script&gt;" in text and Page(text).open == []
