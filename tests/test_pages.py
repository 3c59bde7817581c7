"""The pages of ``diagnose`` and ``compare`` in a real browser, with names and texts that mean harm."""

from __future__ import annotations

import html
import json
import re
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from test_services import need

from atlantis_ds.config.schema import Weights
from atlantis_ds.evaluate.compare import Trained, comparison
from atlantis_ds.evaluate.compare_report import comparison_page, in_words
from atlantis_ds.metrics import macro_f1
from atlantis_ds.weights import page
from atlantis_ds.weights.diagnostics import diagnose
from atlantis_ds.weights.facts import WeightFacts
from atlantis_ds.weights.picture import weights_pictures

pytestmark = pytest.mark.ranks

HOSTILE = [
    "</script><img src=http://outside.invalid/1.png onerror=hacked=1><script>hacked=1</script>",
    "$x_1$ and $\\frac{1}{2$ & <b>bold</b> \"quotes\" 'single' {{ 7 * 7 }}",
    "long" * 100,
    "وسم من اليمين إلى اليسار (1)",
    "]]><svg onload=hacked=1><style>@import url(http://outside.invalid/2.css)</style>",
]
"""Labels and texts; arms are the beginnings of them."""
ARMS = [text[:40] for text in HOSTILE]
OWN = re.compile(r"(google|googleapis|gvt1)\.com\b")
"""What the browser asks for on its own account: updates, the time."""
POLICY = re.compile(r"<meta http-equiv[^>]*>")


@dataclass
class Seen:
    dom: str
    console: list[str]
    requests: list[str]
    """What the browser asked of any network."""

    @property
    def found(self) -> dict[str, Any]:
        """What the script of the test has found."""
        found: dict[str, Any] = json.loads(html.unescape(re.findall(r"<title>result (.*?)</title>", self.dom)[0]))
        return found


class Browser:
    """A headless browser whose only way out is a proxy on loopback, which takes notes and answers nothing."""

    def __init__(self, proxy: tuple[str, int], requests: list[str], folder: Path) -> None:
        self.proxy, self.requests, self.folder = proxy, requests, folder

    def run(self, file: Path, *flags: str, dark: bool = False) -> Seen:
        self.requests.clear()
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        command += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
        command += ["--proxy-server={}:{}".format(*self.proxy), "--proxy-bypass-list=<-loopback>"]
        command += [f"--user-data-dir={self.folder}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        done = subprocess.run([*command, *flags, f"file://{file}"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return Seen(done.stdout, console, [line for line in self.requests if not OWN.search(line)])

    def ask(self, text: str, script: str, **how: Any) -> Seen:
        """Open a page without its content policy, and with a script at its end that returns what it finds."""
        file = self.folder / "asked.html"
        script = f"<script>document.title = 'result ' + JSON.stringify((() => {{ {script} }})())</script>"
        file.write_text(POLICY.sub("", text).replace("</body>", f"{script}</body>"), encoding="utf-8")
        return self.run(file, "--dump-dom", "--window-size=390,2000", **how)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    need("chromium")
    requests: list[str] = []

    class Notes(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            requests.append(self.rfile.readline().decode(errors="replace").strip())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Notes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Browser(server.server_address, requests, tmp_path_factory.mktemp("browser"))
        server.shutdown()


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    """Three seeds of four arms, and one seed of a fifth."""
    rng = np.random.default_rng(0)
    gold = [HOSTILE[at % 5] for at in range(100)]
    runs = []
    for arm, right in zip(ARMS, (0.5, 0.9, 0.52, 0.1, 0.95)):
        for seed in range(3 if arm != ARMS[4] else 1):
            said = [label if rng.random() < right else HOSTILE[int(rng.integers(5))] for label in gold]
            figures = {"macro_f1": macro_f1(gold, said), "official": None, "accuracy": 0.5}
            runs.append(Trained(arm, seed, said, figures, 60.0, "A <100>"))
    found = comparison(gold, runs, ARMS[:1], None)
    data = {"source": HOSTILE[0], "task": "relation", "train": 1234, "dev": 0, "test": 100, "labels": 5, "noise": 0.2}
    about = {"name": HOSTILE[1], "data": data, "versions": {"torch": "<2>"}, "fingerprint": "0123"}
    return {**found, **about, "weights_warnings": [HOSTILE[0]]}


@pytest.fixture(scope="module")
def pages(compared: dict[str, Any]) -> dict[str, str]:
    rng = np.random.default_rng(0)
    n, weights = 200, rng.lognormal(0, 1.5, 200)
    weights /= weights.mean()
    labels, groups = np.arange(n) % 5, np.arange(n) % 4
    facts = WeightFacts(labels=labels, label_names=HOSTILE, groups=groups, group_names=HOSTILE[:4])
    noise = {"labels": HOSTILE, "matrix": (np.eye(5) * 0.8 + 0.04).tolist(), "rate": 0.16, "interval": [0.1, 0.2]}
    noise |= {"found": True, "informed": True, "evidence": 1.0, "evidence_clean": 0.5, "pairs": 0, "meaning": None}
    diagnosis = diagnose(weights, np.log(weights), facts, {**noise, "temperature": 1.0, "share": 0.5})
    diagnosis |= {"options": Weights().model_dump()}
    rows = [
        {"id": at, "prompt": HOSTILE[at % 5], "target": HOSTILE[at % 5], "suggested_label": HOSTILE[0], "p_label": 0.1}
        | {"p_suggested": at / 50, "weight": float(weights[at]), "gold": None if at % 2 else HOSTILE[1], "group": "g"}
        for at in range(50)
    ]
    pictures = weights_pictures(weights, diagnosis)
    assert len(pictures) == 3
    of_groups = dict.fromkeys(HOSTILE[:4], rows[0])
    return {
        "diagnosis": page._page(HOSTILE[0], diagnosis, rows, rows, pictures, of_groups),
        "comparison": comparison_page(compared),
    }


TEXTS = """
    hacked: typeof hacked, scripts: document.scripts.length, images: document.images.length,
    styles: document.styleSheets.length, made: document.querySelectorAll("td b, h1 b, svg style, svg svg").length,
    text: document.body.innerText, ids: [...document.querySelectorAll("[id]")].map((element) => element.id),
    drawn: [...document.querySelectorAll("svg text")].map((text) => text.textContent),
    cut: [...document.querySelectorAll("svg text")].filter((text) => !inside(text, text.closest("svg"))).length,
    wide: document.documentElement.scrollWidth, window: innerWidth,
"""
COLOURS = """
    paper: colour("body", "backgroundColor"), ink: colour("body", "color"), drawn_in: colour("svg text", "fill"),
    note: colour(".note", "color"), warning: colour(".warning", "backgroundColor"),
    lines: [...document.querySelectorAll("svg [style*='var(--weight)'], svg [style*='var(--data)']")]
        .map((line) => getComputedStyle(line).stroke + getComputedStyle(line).fill),
    black: [...document.querySelectorAll("svg path, svg use")]
        .filter((line) => getComputedStyle(line).stroke === "rgb(0, 0, 0)").length,
"""
SORTED = """
    const head = [...document.querySelectorAll("th")].find((head) => /sd over seeds|^weight/.test(head.textContent));
    const table = head.closest("table"), heads = [...head.parentNode.children];
    const column = (at) => [...table.tBodies[0].rows].map((row) => row.cells[at].dataset.sort);
    const click = (at) => {
        heads[at].querySelector("[role=button]").click();
        return {values: column(at), states: heads.map((head) => head.ariaSort)};
    };
    const inside = (text, svg) => {
        const [inner, outer] = [text, svg].map((element) => element.getBoundingClientRect());
        return inner.left > outer.left - 1 && inner.right < outer.right + 1 && inner.bottom < outer.bottom + 1;
    };
    const colour = (what, key) => getComputedStyle(document.querySelector(what))[key];
    const key = (at) => {
        const press = new KeyboardEvent("keydown", {key: "Enter"});
        heads[at].querySelector("[role=button]").dispatchEvent(press);
        return {values: column(at), states: heads.map((head) => head.ariaSort)};
    };
    const at = head.cellIndex, last = heads.length - 1;
"""
LOOK = f"{SORTED} return {{{TEXTS} {COLOURS} at, up: click(at), down: click(at), other: key(last)}};"
NAMES = pytest.mark.parametrize("name", ["diagnosis", "comparison"])


@pytest.fixture(scope="module")
def light(pages: dict[str, str], browser: Browser) -> dict[str, Seen]:
    return {name: browser.ask(text, LOOK) for name, text in pages.items()}


@NAMES
def test_text_of_users_does_no_harm(name: str, light: dict[str, Seen]) -> None:
    """Without the page's policy: what holds here is the escaping alone."""
    seen, found = light[name], light[name].found
    assert (seen.console, seen.requests) == ([], [])
    assert (found["hacked"], found["images"], found["styles"], found["made"]) == ("undefined", 0, 1, 0)
    assert found["scripts"] == 2, "the page's own, and that of this test"
    shown = " ".join(found["text"].split())
    assert all(" ".join(text.split()) in shown for text in (HOSTILE[0], HOSTILE[1], HOSTILE[3]))
    assert any(text in (ARMS[0], f"{HOSTILE[0][:39]}…") for text in found["drawn"])
    assert any("$x_1$ and $" in text for text in found["drawn"]), "no formula, and text as text"
    assert len(set(found["ids"])) == len(found["ids"]) > 20
    assert found["cut"] == 0, "texts of a picture lie inside it"
    assert found["wide"] <= found["window"], "tables scroll, the page does not"


def test_the_page_as_it_is_loads_nothing_and_runs_its_own_script(
    pages: dict[str, str], browser: Browser, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text(pages["comparison"], encoding="utf-8")
    seen = browser.run(file, "--dump-dom")
    assert (seen.console, seen.requests) == ([], [])
    assert seen.dom.count('aria-sort="none"') == len(re.findall("<th[ >]", seen.dom)) > 10
    # What would be seen if there were something: the policy stops it, and without the policy the proxy is asked.
    for bad in ("<script>hacked=1</script>", "<img src=http://outside.invalid/3.png>"):
        file.write_text(pages["comparison"].replace("<main>", f"<main>{bad}"), encoding="utf-8")
        stopped = browser.run(file, "--dump-dom")
        assert len(stopped.console) == 1 and "Content Security Policy" in stopped.console[0]
        assert stopped.requests == []
    bad = pages["comparison"].replace("<main>", f"<main>{bad}")
    assert any("outside.invalid/3.png" in line for line in browser.ask(bad, "return {}").requests)


@NAMES
def test_a_click_sorts_numbers_as_numbers_and_empty_cells_last(name: str, light: dict[str, Seen]) -> None:
    found = light[name].found
    up, down = ([float(value) for value in found[way]["values"] if value] for way in ("up", "down"))
    assert up == sorted(up) and down == up[::-1] and len(up) > 3
    empty = [""] * (name == "comparison")  # an arm with one seed has no spread
    assert found["up"]["values"][len(up) :] == found["down"]["values"][len(up) :] == empty
    none = ["none"] * len(found["up"]["states"])
    for way, at, state in (("up", found["at"], "ascending"), ("down", found["at"], "descending")):
        assert found[way]["states"] == [*none[:at], state, *none[at + 1 :]]
    assert found["other"]["states"] == [*none[1:], "ascending"]


@NAMES
def test_dark_mode_has_other_colours_and_enough_contrast(
    name: str, light: dict[str, Seen], pages: dict[str, str], browser: Browser
) -> None:
    bright, dark = light[name].found, browser.ask(pages[name], LOOK, dark=True).found
    for found in (bright, dark):
        assert min(contrast(found["paper"], found[key]) for key in ("ink", "drawn_in", "note")) > 4.5
        assert contrast(found["warning"], found["ink"]) > 4.5 and found["black"] == 0 and found["lines"]
    assert contrast(bright["paper"], dark["paper"]) > 10
    assert set(bright["lines"]).isdisjoint(dark["lines"])


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two colours ``rgb(…)``: 1 to 21, 4.5 or more for text."""

    def luminance(colour: str) -> float:
        parts = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@NAMES
def test_on_paper_nothing_is_cut_or_dark(name: str, pages: dict[str, str], browser: Browser, tmp_path: Path) -> None:
    need("pdftotext", "pdftoppm")
    file, pdf = tmp_path / "page.html", tmp_path / "page.pdf"
    file.write_text(pages[name], encoding="utf-8")
    browser.run(file, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", dark=True)
    words = subprocess.run(["pdftotext", "-bbox", pdf, "-"], capture_output=True, text=True, check=True).stdout
    width = float(re.findall(r'<page width="([\d.]+)"', words)[0])
    ends = [float(end) for end in re.findall(r'xMax="([\d.]+)"', words)]
    assert max(ends) < width, "every word ends on the paper"
    cells = "".join(re.findall("<t[hd].*?</t[hd]>", pages[name], flags=re.DOTALL))
    text = html.unescape(re.sub("<[^>]*>", "", cells))
    printed = html.unescape("".join(re.findall("<word[^>]*>(.*?)</word>", words)))
    for sign in "<.":
        assert printed.count(sign) >= text.count(sign) > 20, "what is cut is not in the file"
    pages_with_head = sum("probability" in sheet for sheet in words.split("</page>"))
    assert name == "comparison" or pages_with_head > 5, "the head of a long table stands on each of its pages"
    subprocess.run(["pdftoppm", "-r", "20", "-png", "-f", "1", "-l", "1", pdf, tmp_path / "shot"], check=True)
    (shot,) = tmp_path.glob("shot*.png")
    pixels = matplotlib.image.imread(shot)[..., :3]
    assert pixels[0, 0].min() == 1 and np.median(pixels) == 1, "white paper in dark mode, too"


# --- what a supervisor reads first


def result(*arms: tuple[str, float, float, float, int], upper: str | None = None) -> list[str]:
    rows = [
        {"arm": arm, "differences": {"sft": {"mean": mean, "low": low, "high": high, "seeds": seeds}}}
        for arm, mean, low, high, seeds in arms
    ]
    return in_words(
        {"peers": ["sft"], "metric": "macro_f1", "upper": upper, "arms": [{"arm": "sft", "differences": {}}, *rows]}
    )


def test_the_result_in_words() -> None:
    gains, same = ("posterior", 0.047, 0.013, 0.086, 5), ("gce", 0.004, -0.02, 0.03, 5)
    assert result(gains) == ["posterior gains 0.047 [0.013, 0.086] macro-F1 on sft over 5 seeds."]
    assert result(same) == ["gce (+0.004 [-0.020, +0.030]) cannot be distinguished from sft in macro-F1 over 5 seeds."]
    assert result(("a", -0.02, -0.03, -0.01, 3)) == ["a loses 0.020 [0.010, 0.030] macro-F1 against sft over 3 seeds."]
    one = result(("a", 0.02, 0.01, 0.03, 1))
    assert one == [
        "a +0.020 [+0.010, +0.030] macro-F1 compared with sft, with one seed: this says nothing about other seeds."
    ]
    both = result(("gold", 0.1, 0.08, 0.12, 2), gains, same, upper="gold")
    assert both[0].startswith(
        "posterior gains 0.047 [0.013, 0.086] and gold (trained on the gold labels) gains 0.100 ["
    )
    assert both[0].endswith("over 2 to 5 seeds.") and len(both) == 2
    assert "No two arms can be compared" in result()[0]


def test_an_interval_that_touches_0_is_no_gain() -> None:
    assert "cannot be distinguished" in result(("a", 0.02, 0.0, 0.04, 5))[0]


def test_terms_of_macro_f1_are_in_the_table_of_labels(compared: dict[str, Any]) -> None:
    for row in compared["arms"]:
        terms = [label["f1"][row["arm"]] for label in compared["labels"]]
        assert np.mean(terms) == pytest.approx(row["macro_f1"]) and len(terms) == 5
