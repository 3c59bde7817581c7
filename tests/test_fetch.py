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

from atlantis_ds.config.schema import Model
from atlantis_ds.errors import InputError, RunError
from atlantis_ds.lm.staging import _copy

pytestmark = pytest.mark.ranks

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

    # The branches move on, and another run brings the newer model into the same cache.
    hub.publish(f"models/{ID}", model_files | {"config.json": b"{}"})
    hub.publish(f"datasets/{ROWS}", split("two"))
    other = launch("local", 1, "fetch", site.recipe, "--set", "name=other", env=site.online)
    assert other.code == 0 and len(list(site.snapshot().parent.iterdir())) == 2, other.out
    assert hub.read["model.safetensors"] == before["model.safetensors"], "what is there is not read again"
    (site.cache / f"datasets--{ROWS.replace('/', '--')}" / "refs" / "main").write_text(manifest[1]["commit"])
    out = succeeds(site, "check", site.recipe)
    assert "not in the hub's cache" not in out
    out = succeeds(site, "prepare", site.recipe)
    assert "12 train, 0 dev, 5 test" in out and "computed later" not in out
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
    command = [sys.executable, "-c", script]
    env = os.environ | site.offline
    done = subprocess.run([*command, *ids], env=env, capture_output=True, text=True, timeout=60)
    assert "['two number 0', 'one number 0', 'two number 0']" in done.stdout, done.stderr[-2000:]
    done = subprocess.run([*command, f"{ROWS}@v3"], env=env, capture_output=True, text=True, timeout=60)
    assert f"InputError: data.hub_id: {ROWS}@v3 cannot be loaded (HF_HUB_OFFLINE is set, and" in done.stderr


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


COPY = """
import sys
from atlantis_ds.config.schema import Model
from atlantis_ds.lm import staging

def fill(*arguments):
    print("copying", flush=True)
    really(*arguments)

really, staging._fill, staging.BLOCK = staging._fill, fill, int(sys.argv[3])
print(staging._copy(Model(model_name_or_path=sys.argv[1]), sys.argv[2], 1))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(2**16) * 256)
    return folder


def copy_of(source: Path, stage: object) -> Path:
    return _copy(Model(model_name_or_path=str(source)), str(stage), 1)


def test_a_copy_that_is_killed_and_two_jobs_on_one_node(source: Path, tmp_path: Path) -> None:
    script, stage = tmp_path / "job.py", tmp_path / "stage"
    script.write_text(COPY)
    job = start("local", 1, script, source, stage, 64)
    job.kill_when(lambda: any(file.stat().st_size for file in stage.glob(".*.tmp/model.safetensors")))
    assert not any(path.is_dir() and not path.name.startswith(".") for path in stage.iterdir())
    jobs = [start("local", 1, script, source, stage, 4096) for _ in range(2)]
    done = [job.wait() for job in jobs]
    assert [one.code for one in done] == [0, 0], done
    assert sum(one.out.count("copying") for one in done) == 1, "one copies, the other finds it"
    (copy,) = (path for path in stage.iterdir() if path.is_dir())
    assert all(one.out.rstrip().endswith(str(copy)) for one in done)
    for name in ("config.json", "model.safetensors"):
        assert (copy / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("harm", ["a wrong byte", "cut", "gone"])
def test_a_copy_that_is_not_whole_is_made_again(source: Path, tmp_path: Path, harm: str) -> None:
    copy = copy_of(source, tmp_path / "stage")
    weights, content = copy / "model.safetensors", (source / "model.safetensors").read_bytes()
    inode = weights.stat().st_ino
    assert copy_of(source, tmp_path / "stage") == copy and weights.stat().st_ino == inode, "a whole one is left alone"
    if harm == "a wrong byte":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "cut":
        os.truncate(weights, 1000)
    else:
        weights.unlink()
    assert copy_of(source, tmp_path / "stage") == copy
    assert weights.read_bytes() == content
    (source / "config.json").write_text('{"other": 1}')
    assert copy_of(source, tmp_path / "stage") != copy, "another model is another copy"


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root and a kernel that lets it mount a tmpfs")
    need = sum(file.stat().st_size for file in source.iterdir())
    try:
        message = rf"models\.stage: {small}: {need} bytes are needed .* are free"
        with pytest.raises(RunError, match=message):
            copy_of(source, small)
        # And where it says that there is room, and fills up on the way.
        usage = shutil.disk_usage
        told = iter([usage(tmp_path)])
        monkeypatch.setattr(shutil, "disk_usage", lambda path: next(told, None) or usage(path))
        with pytest.raises(RunError, match=message):
            copy_of(source, small)
        assert not [path for path in small.iterdir() if path.is_dir()]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_folder_that_is_not_set(source: Path) -> None:
    with pytest.raises(InputError, match=r"models\.stage: \$NO_SUCH_VARIABLE/models: this variable is not set"):
        copy_of(source, "$NO_SUCH_VARIABLE/models")


STAGE = """
import sys, shutil
from pathlib import Path
from atlantis_ds.cluster.ranks import end_rank, start_ranks, stop_ranks
from atlantis_ds.config.loading import load_recipe
from atlantis_ds.config.schema import Model
from atlantis_ds.lm import load, staging
from atlantis_ds.run import Run
from atlantis_ds.run_folder import RunFolder

ranks = start_ranks(1)
run = Run(load_recipe(sys.argv[1]), RunFolder(Path(sys.argv[1]).parent), ranks)
really = staging._fill
def fill(*arguments):
    sys.stdout.write(f"rank {ranks.rank} copies\\n")
    really(*arguments)
staging._fill = fill
model = Model(model_name_or_path=sys.argv[2])
expected = load.load_model(model, "float32")
copy = staging.node_copy(run, model)
ranks.barrier()
if ranks.is_main:
    (Path(sys.argv[2]) / "model.safetensors").unlink()
ranks.barrier()
found = load.load_model(model, "float32", copy=copy)
same = all((one == other).all() for one, other in zip(expected.parameters(), found.parameters(), strict=True))
sys.stdout.write(f"same: {same}, named: {found.name_or_path == sys.argv[2]}\\n")
stop_ranks()
end_rank()
"""


def test_one_rank_of_a_node_copies_and_all_read_the_copy(
    base_model: Path, tiny_recipe: WriteRecipe, tmp_path: Path
) -> None:
    model, script = tmp_path / "model", tmp_path / "stage.py"
    shutil.copytree(base_model, model)
    script.write_text(STAGE)
    recipe = tiny_recipe(tmp_path, {"models.stage": "$NODE_DISK/models"})
    done = launch("torchrun", 2, script, recipe, model, env={"NODE_DISK": str(tmp_path / "disk")})
    assert done.code == 0 and done.out.count("rank 0 copies") == 1 and "rank 1 copies" not in done.out, done.out[-3000:]
    assert done.out.count("same: True, named: True") == 2, done.out[-3000:]
    assert [path.name for path in (tmp_path / "disk" / "models").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_staging_changes_no_fingerprint_and_no_name(base_model: Path, tiny_recipe: WriteRecipe, tmp_path: Path) -> None:
    changes = {"train.mode": "lora", "train.num_train_epochs": 1, "arms": {"atlantis": {}}, "data.test_size": 4}
    recipe = tiny_recipe(tmp_path, changes)
    staged = launch("local", 1, "run", recipe, "--force", "--set", f"models.stage={tmp_path}/disk")
    assert staged.code == 0, staged.out[-3000:]
    assert len([path for path in (tmp_path / "disk").iterdir() if path.is_dir()]) == 1, "one base for all of them"
    adapter = json.loads((tmp_path / "run" / "model" / "atlantis" / "last" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(base_model)
    again = launch("local", 1, "run", recipe, "--force")
    assert again.code == 0 and "0 to do" in again.out and again.out.count("already finished") == 2, again.out[-3000:]
