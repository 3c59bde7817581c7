"""Finds the models and data sets of a recipe in the Hugging Face cache, and downloads them. Does not import torch.

For a model: safetensors, configs, tokenizer and chat templates; for a data set: tables and texts. Nothing that executes
code when loaded, unless the recipe sets ``trust_remote_code``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from atlantis_ds.config.schema import Model, Recipe
from atlantis_ds.errors import InputError, RunError
from atlantis_ds.files import file_hash, read_json, write_json
from atlantis_ds.progress import console
from atlantis_ds.run_folder import RunFolder, missing_folder

WEIGHTS = ["*.safetensors"]
TABLES = [
    f"*.{kind}{packed}"
    for kind in ("parquet", "arrow", "json", "jsonl", "ndjson", "csv", "tsv", "txt")
    for packed in ("", ".gz", ".bz2", ".xz", ".zst")
]
ABOUT_MODELS = [
    *("config.json", "generation_config.json", "model.safetensors.index.json", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece*.model"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
]
NOT_LOADED = ["*/*.safetensors", "consolidated*.safetensors"]
"""Copies of the weights for programs other than transformers."""


@dataclass(frozen=True)
class Repository:
    """A model or data set on the hub that a recipe names."""

    key: str
    """The key in the recipe, for messages."""
    kind: Literal["model", "dataset"]
    id: str
    revision: str | None
    code: bool = False
    """Whether the recipe allows the model's own code to run."""

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id

    @property
    def content(self) -> list[str]:
        """Patterns of the files that it must have."""
        return WEIGHTS if self.kind == "model" else TABLES

    @property
    def patterns(self) -> dict[str, Any]:
        """Which files to download, as arguments of ``snapshot_download``."""
        about = [*ABOUT_MODELS, *(["*.py"] if self.code else [])] if self.kind == "model" else ["README.md"]
        return {"allow_patterns": [*self.content, *about], "ignore_patterns": NOT_LOADED}

    def chosen(self, names: list[str]) -> list[str]:
        """Those of the names that are downloaded; empty if required content is missing."""
        from huggingface_hub.utils import filter_repo_objects

        found = list(filter_repo_objects(names, **self.patterns))
        return found if any(fnmatchcase(name, pattern) for name in found for pattern in self.content) else []


def repositories(recipe: Recipe) -> list[Repository]:
    """The repositories that a recipe needs: its models, the base models of its adapter folders, and its data set.

    Raises:
        InputError: a folder does not exist.
    """
    found: dict[Any, Repository] = {}
    for name in ("large", "small", "reference"):
        named = getattr(recipe.models, name)
        if named.model_name_or_path is None:
            continue  # built by the run, or the same as another model
        fields = named.model_dump(include={"model_name_or_path", "revision", "trust_remote_code"})
        repository = of_model(Model(**fields), f"models.{name}.model_name_or_path")
        if repository:
            found.setdefault((repository.id, repository.revision, repository.code), repository)
    hub_id = recipe.data.hub_id
    if hub_id and not missing_folder(hub_id) and not Path(hub_id).exists():
        found[hub_id] = of_data(hub_id)
    return list(found.values())


def of_model(model: Model, key: str) -> Repository | None:
    """The repository with the weights of a model, or of the base of an adapter folder; None for a folder."""
    model = adapter_base(model) or model
    name = str(model.model_name_or_path)
    if problem := missing_folder(name):
        raise InputError(f"{key}: {problem}")
    if Path(name).expanduser().is_dir():
        return None
    return Repository(key, "model", name, model.revision, model.trust_remote_code)


def of_data(hub_id: str) -> Repository:
    """The data set of ``id`` or ``id@revision``."""
    source, _, revision = hub_id.partition("@")
    return Repository("data.hub_id", "dataset", source, revision or None)


def adapter_base(model: Model) -> Model | None:
    """The base model named by a LoRA adapter folder; None for any other model."""
    file = Path(str(model.model_name_or_path)).expanduser() / "adapter_config.json"
    if not file.is_file():
        return None
    settings = json.loads(file.read_text(encoding="utf-8"))
    return model.model_copy(
        update={"model_name_or_path": settings["base_model_name_or_path"], "revision": settings.get("revision")}
    )


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached(repository: Repository) -> Path | None:
    """The folder of a repository in the hub's cache; None if it, or one of its files, is missing.

    A branch stands for the commit that was last fetched, by anyone. Uses no network.

    Raises:
        InputError: the id is not a valid hub id.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        place = snapshot_download(
            repository.id,
            repo_type=repository.kind,
            revision=repository.revision,
            local_files_only=True,
            **repository.patterns,
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError:
        raise InputError(f"{repository.key}: {repository.id}: neither a folder nor a Hugging Face id") from None
    # Downloads by other programs have no file list, and may contain only a model's config.
    names = [str(file.relative_to(place)) for file in Path(place).rglob("*") if file.is_file()]
    return Path(place) if repository.chosen(names) else None


def at_fetched_commit(folder: RunFolder, repository: Repository) -> Repository:
    """The repository at the commit that ``fetch`` downloaded for this run, if any: a branch may have moved since."""
    for found in read_json(folder.fetched)["repositories"] if folder.fetched.exists() else []:
        if all(found[key] == getattr(repository, key) for key in ("kind", "id", "revision")):
            return replace(repository, revision=found["commit"])
    return repository


def fetch(recipe: Recipe, folder: RunFolder, cache: Path | None) -> None:
    """Download what a recipe needs into the hub's cache, complete and verified, and write ``fetched.json``.

    Files that exist are not downloaded again.

    Args:
        cache: the hub's cache; default: the one set by HF_HUB_CACHE or HF_HOME.

    Raises:
        InputError: the hub has no such repository or revision, or this user has no access; or a model has no
            safetensors.
        RunError: the hub cannot be reached, the disk is full, or the hash of a file differs from the hub's (the file is
            removed).
    """
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    found = []
    for repository in repositories(recipe):
        fetched = _fetch_one(repository, cache)
        found.append(fetched)
        size = sum(file["size"] for file in fetched["files"].values()) / 2**30
        console.print(f"fetch: {repository}: {len(fetched['files'])} files, {size:.2f} GiB, commit {fetched['commit']}")
    if not found:
        console.print("fetch: the recipe names nothing on the hub")
        return
    write_json(folder.fetched, {"repositories": found})
    console.print(f"fetch: {folder.fetched}")


def _fetch_one(repository: Repository, cache: Path | None) -> dict[str, Any]:
    """The manifest entry of one repository, after it is downloaded."""
    from huggingface_hub import HfApi, snapshot_download

    source: dict[str, Any] = {"repo_type": repository.kind, "revision": repository.revision}
    try:
        info: Any = HfApi().repo_info(repository.id, files_metadata=True, **source)
        names = repository.chosen([file.rfilename for file in info.siblings])
        if not names:
            raise InputError(f"{repository.key}: {repository}: contains no {', '.join(repository.content[:8])}")
        place = Path(snapshot_download(repository.id, cache_dir=cache, **source, **repository.patterns))
    except (InputError, RunError):
        raise
    except Exception as error:  # the errors of the hub's client and its HTTP library have no common base class
        raise _one_line(repository, error, cache) from None
    if place.name != info.sha:  # the branch has moved, or the client fell back to an older commit
        raise RunError(
            f"{repository}: the hub became unreachable or the branch moved during the download; run the same command "
            "again to resume"
        )
    files = _checked(repository, place, [file for file in info.siblings if file.rfilename in names])
    asked = {key: getattr(repository, key) for key in ("kind", "id", "revision")}
    return {**asked, "commit": info.sha, "files": files}


def _one_line(repository: Repository, error: Exception, cache: Path | None) -> InputError | RunError:
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    if getattr(error, "errno", None) == errno.ENOSPC:
        place = cache or constants.HF_HUB_CACHE
        return RunError(f"{place}: no space left for {repository}; free some space and run `fetch` again, or use --out")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return InputError(
            f"{repository.key}: {repository}: HF_HUB_OFFLINE is set; unset it on a machine with internet access"
        )
    if isinstance(error, HFValidationError) or status in (401, 403, 404):
        return InputError(f"{repository.key}: {repository}: {said(error)}")
    return RunError(f"{repository}: {said(error)}; run the same command again to resume")


def said(error: Exception) -> str:
    """The error of the hub's client, in one line."""
    return f"the hub says: {' '.join(str(error).split())[:300] or type(error).__name__}"


def _checked(repository: Repository, place: Path, files: list[Any]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the fetched files, by name; files that differ from the hub's hashes are removed.

    The hub gives the SHA-256 of large files (Git LFS), and git's own hash of small files.
    """

    def is_right(file: Any) -> bool:
        path = place / file.rfilename
        return file_hash(path) == file.lfs.sha256 if file.lfs else _git_hash(path) == file.blob_id

    with ThreadPoolExecutor(4) as threads:
        wrong = [file.rfilename for file, right in zip(files, threads.map(is_right, files)) if not right]
    for name in wrong:
        (place / name).resolve().unlink()
        (place / name).unlink(missing_ok=True)
    if wrong:
        raise RunError(
            f"{repository}: {', '.join(wrong)}: content differs from the hub's hash; removed, run `fetch` again"
        )
    paths = {file.rfilename: place / file.rfilename for file in files}
    return {name: {"size": path.stat().st_size, "sha256": file_hash(path)} for name, path in sorted(paths.items())}


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
