"""What `fetch` brings from a hub is whole, is all that a run offline needs, and is copied once to each node."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Done, WriteRecipe, launch, refuse, start
from hub_server import Hub, hub_on_loopback

ID, ROWS = "me/tiny", "me/rows"
NOT_FETCHED = {
    "pytorch_model.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "modeling_tiny.py": b"raise SystemExit('code of the model has run')",
    "onnx/model.safetensors": b"for another program",
    "consolidated.safetensors": b"for another program",
    "README.md": b"# a model",
}


def rows(size: int, word: str) -> bytes:
    lines = [{"text": f"{word} number {n}", "label": ("odd", "even")[n % 2]} for n in range(size)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def split(word: str) -> dict[str, bytes]:
    return {
        "README.md": b"---\nlicense: mit\n---\n",
        "train.jsonl": rows(12, word),
        "test.jsonl": rows(5, f"{word} more"),
    }


@pytest.fixture(scope="module")
def model_files(base_model: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in base_model.iterdir() if file.name != "scratch.json"}


@pytest.fixture
def hub(model_files: dict[str, bytes]) -> Iterator[Hub]:
    with hub_on_loopback() as hub:
        hub.publish(f"models/{ID}", model_files | NOT_FETCHED)
        hub.publish(f"datasets/{ROWS}", split("one") | {"loader.py": b"raise SystemExit", "cache.pkl": b"pickle"})
        yield hub


class Site:
    """A recipe on hub ids, and a cache of its own."""

    def __init__(self, folder: Path, hub: Hub, write: WriteRecipe) -> None:
        model = {"model_name_or_path": ID}
        models = {"large": model, "small": model, "reference": {"kind": "checkpoint", **model}}
        data = {"hub_id": ROWS, "labels": ["odd", "even"]}
        self.recipe = write(folder, {"data": data, "models": models})
        self.folder, self.hub, self.run = folder, hub, folder / "run"
        self.cache = folder / "home" / "hub"
        cache = {"HF_HOME": str(folder / "home"), "HF_DATASETS_CACHE": str(folder / "tables")}
        # Offline, an address where nobody listens: whoever asks the network all the same would fail.
        self.offline = {**cache, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
        self.online = {**cache, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}

    def fetch(self, *words: object) -> Done:
        return launch("local", 1, "fetch", self.recipe, *words, env=self.online)

    def snapshot(self, kind: str = "models") -> Path:
        name = {"models": ID, "datasets": ROWS}[kind]
        repository = self.cache / f"{kind}--{name.replace('/', '--')}"
        return repository / "snapshots" / (repository / "refs" / "main").read_text()

    def change(self, **keys: Any) -> None:
        tree = yaml.safe_load(self.recipe.read_text())
        for key, value in keys.items():
            tree["models"][key] = value
        self.recipe.write_text(yaml.safe_dump(tree))


@pytest.fixture
def site(tmp_path: Path, hub: Hub, tiny_recipe: WriteRecipe) -> Site:
    return Site(tmp_path, hub, tiny_recipe)


def fault(done: Done, *words: str) -> None:
    """A fault: exit code 1, one line that holds these words, no traceback."""
    lines = [line for line in done.out.splitlines() if line.startswith(("error:", "fault:"))]
    assert done.code == 1 and len(lines) == 1 and "Traceback" not in done.out, done.out[-3000:]
    assert lines[0].startswith("fault:") and all(word in lines[0] for word in words), lines[0]


def succeeds(site: Site, *words: object, ranks: int = 1) -> str:
    done = launch("local", ranks, *words, env=site.offline)
    assert done.code == 0, done.out[-3000:]
    return done.out


def test_what_is_fetched_runs_offline(site: Site, model_files: dict[str, bytes]) -> None:
    hub = site.hub
    missing = launch("local", 1, "check", site.recipe, env=site.online)
    assert missing.code == 0 and missing.out.count("not in the hub's cache; `atlantis-ds fetch ") == 2, missing.out
    assert not hub.asked, "check asks no network"
    refuse(launch("local", 1, "check", site.recipe, env=site.offline), "HF_HUB_OFFLINE", ID, ROWS, "atlantis-ds fetch")
    refuse(launch("local", 1, "prepare", site.recipe, env=site.offline), ROWS, "HF_HUB_OFFLINE", "atlantis-ds fetch")

    done = site.fetch()
    assert done.code == 0, done.out
    assert {path.name for path in site.snapshot().rglob("*") if path.is_file()} == set(model_files)
    assert {path.name for path in site.snapshot("datasets").iterdir()} == set(split("one"))
    manifest = json.loads((site.run / "fetched.json").read_text())["repositories"]
    assert [(found["kind"], found["id"], found["commit"]) for found in manifest] == [
        ("model", ID, hub.refs[f"models/{ID}", "main"]),
        ("dataset", ROWS, hub.refs[f"datasets/{ROWS}", "main"]),
    ]
    weights = model_files["model.safetensors"]
    said = {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    assert manifest[0]["files"]["model.safetensors"] == said
    before = dict(hub.read)
    assert site.fetch().code == 0 and hub.read == before, "what is there is not read again"

    # The branches move on, and another run brings the newer model into the same cache.
    hub.publish(f"models/{ID}", model_files | {"config.json": b"{}"})
    hub.publish(f"datasets/{ROWS}", split("two"))
    other = launch("local", 1, "fetch", site.recipe, "--set", "name=other", env=site.online)
    assert other.code == 0 and len(list(site.snapshot().parent.iterdir())) == 2, other.out
    (site.cache / f"datasets--{ROWS.replace('/', '--')}" / "refs" / "main").write_text(manifest[1]["commit"])
    out = succeeds(site, "check", site.recipe)
    assert "not in the hub's cache" not in out
    out = succeeds(site, "prepare", site.recipe)
    assert "12 train, 0 dev, 5 test" in out and "left for later" not in out
    succeeds(site, "score", site.recipe)
    inputs = json.loads((site.run / "scores" / "scores.json").read_text())["inputs"]
    assert inputs["model large"]["revision"] == manifest[0]["commit"]


def test_a_revision_of_data_is_that_revision(site: Site) -> None:
    """`datasets` alone takes offline what it has read last, whatever the revision."""
    site.hub.publish(f"datasets/{ROWS}", split("two"), revision="v2")
    script = "import sys; from atlantis_ds.data.sources import read_hub_rows as read\n"
    script += "print([next(read(id, 'train', print)).values['text'] for id in sys.argv[1:]])"
    ids = [f"{ROWS}@v2", ROWS, f"{ROWS}@v2"]
    for id in ids[:2]:
        assert site.fetch("--set", f"data.hub_id={id}").code == 0
    done = subprocess.run(
        [sys.executable, "-c", script, *ids], env=os.environ | site.offline, capture_output=True, text=True, timeout=60
    )
    assert "['two number 0', 'one number 0', 'two number 0']" in done.stdout, done.stderr[-2000:]


def test_a_connection_that_breaks(site: Site, model_files: dict[str, bytes]) -> None:
    hub, large = site.hub, 25 * 2**20
    # In the middle of a file: the client, which writes 10 MiB at a time, asks for what it has not written.
    hub.publish(f"models/{ID}", model_files | {"large.safetensors": bytes(large)})
    hub.break_off = {"large.safetensors"}
    done = site.fetch()
    assert done.code == 0 and "resume" in done.out, done.out
    assert large < hub.read["large.safetensors"] <= large + 10 * 2**20
    hub.publish(f"models/{ID}", model_files)
    # The process dies in the middle of a file: what was whole is not read again.
    shutil.rmtree(site.cache)
    shutil.rmtree(site.run)
    hub.read, hub.stall = {}, {"model.safetensors"}
    job = start("local", 1, "fetch", site.recipe, env=site.online)
    others = set(model_files) - {"model.safetensors"}
    blobs = site.cache / f"models--{ID.replace('/', '--')}" / "snapshots"
    job.kill_when(lambda: "model.safetensors" in hub.read and others <= {path.name for path in blobs.rglob("*")})
    assert not (site.run / "fetched.json").exists()
    hub.stall = set()
    before = {name: hub.read[name] for name in others}
    assert site.fetch().code == 0
    assert {name: hub.read[name] for name in others} == before
    assert (site.snapshot() / "model.safetensors").read_bytes() == model_files["model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_wrong_bytes_are_refused(site: Site, model_files: dict[str, bytes], name: str) -> None:
    site.hub.wrong = {name}
    fault(site.fetch(), ID, name, "hash", "fetch")
    assert not (site.run / "fetched.json").exists()
    commit = site.hub.refs[f"models/{ID}", "main"]
    (snapshot,) = site.cache.glob(f"models--*/snapshots/{commit}")
    assert not (snapshot / name).exists() and (snapshot / "config.json").exists()
    site.hub.wrong = set()
    assert site.fetch().code == 0
    assert (snapshot / name).read_bytes() == model_files[name]


def test_what_cannot_be_fetched(site: Site, model_files: dict[str, bytes]) -> None:
    hub = site.hub
    pickled = {name: content for name, content in model_files.items() if not name.endswith(".safetensors")}
    hub.publish("models/me/pickled", pickled | NOT_FETCHED)
    hub.publish("models/me/gated", model_files)
    hub.gated = {"models/me/gated"}
    large = "models.large.model_name_or_path"
    for id, *words in (("me/none", "the hub says"), ("me/pickled", "*.safetensors"), ("me/gated", "the hub says")):
        refuse(site.fetch("--set", f"{large}={id}"), large, id, *words)
    refuse(site.fetch("--set", "models.large.revision=v9"), large, f"{ID}@v9", "the hub says")
    refuse(launch("local", 1, "fetch", site.recipe, env=site.offline), large, ID, "HF_HUB_OFFLINE")
    assert not (site.run / "fetched.json").exists()
    nowhere = site.online | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    fault(launch("local", 1, "fetch", site.recipe, env=nowhere), ID, "the hub says")


def test_another_cache_and_the_base_of_an_adapter(site: Site, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": ID, "revision": None}))
    local = {"model_name_or_path": str(adapter)}
    site.change(large=local, small=local, reference={"kind": "checkpoint", **local})
    done = site.fetch("--out", tmp_path / "my cache", "--set", "models.large.trust_remote_code=true")
    assert done.code == 0 and f"export HF_HUB_CACHE='{tmp_path}/my cache'" in done.out, done.out
    assert not site.cache.exists()
    (snapshot,) = (tmp_path / "my cache").glob("models--*/snapshots/*")
    assert (snapshot / "model.safetensors").exists() and (snapshot / "modeling_tiny.py").exists()
