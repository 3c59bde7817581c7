"""A node's own copy of a model's weights: the shared file system is read once per node, not once per rank."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atlantis_ds.config.schema import Model
from atlantis_ds.errors import InputError, RunError
from atlantis_ds.files import file_hash, fingerprint, read_json, write_folder, write_json
from atlantis_ds.hub import adapter_base, cached, of_model
from atlantis_ds.run import Run

COPIED = "copied.json"
"""Size and SHA-256 of each file, as read from the source."""
BLOCK = 2**24


def node_copy(run: Run, model: Model) -> Path | None:
    """A folder on this node with the weights and configs of a model, or of an adapter's base. All ranks must call it.

    The first rank on each host creates it if it is missing or incomplete; the others wait.

    Returns:
        the folder; None if the recipe has no ``models.stage``.

    Raises:
        InputError: a variable in ``models.stage`` is not set, or the model is not in the hub's cache.
        RunError: the disk is full, the source is broken, or another job took too long to copy it.
    """
    if run.recipe.models.stage is None:
        return None
    hosts = run.ranks.gather(socket.gethostname())
    first = hosts.index(hosts[run.ranks.rank])
    found: Path | Exception | None = None
    if run.ranks.rank == first:
        try:
            found = _copy(adapter_base(model) or model, run.recipe.models.stage, run.recipe.timeout_minutes)
        except (InputError, RunError) as error:
            found = error
        except OSError as error:
            found = RunError(f"models.stage: {error}")
    copies = run.ranks.gather(found)
    for problem in copies:
        if isinstance(problem, Exception):
            raise problem  # on every rank, so that none waits for a rank that has ended
    copy: Path = copies[first]
    return copy


def _copy(model: Model, stage: str, minutes: float) -> Path:
    source, root = _source(model), Path(os.path.expandvars(stage)).expanduser()
    if "$" in str(root):
        raise InputError(f"models.stage: {stage}: this variable is not set on {socket.gethostname()}")
    files = sorted(file for file in source.iterdir() if file.suffix in (".safetensors", ".json", ".py"))
    state = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    name = re.sub(r"[^\w.-]", "_", Path(str(model.model_name_or_path)).name)
    target = root.absolute() / f"{name}-{fingerprint([str(source.resolve()), state])}"
    root.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_name(f".{target.name}.lock"), minutes):
        if target.exists() and target.stat().st_uid != os.getuid():
            raise RunError(f"models.stage: {target} belongs to another user; use another folder")
        if not _whole(target):
            shutil.rmtree(target, ignore_errors=True)
            _fill(target, files)
    return target


def _source(model: Model) -> Path:
    repository = of_model(model, "models")
    if repository is None:
        return Path(str(model.model_name_or_path)).expanduser()
    folder = cached(repository)
    if folder is None:
        raise InputError(f"models.stage: {repository} is not in the hub's cache; run `atlantis-ds fetch` first")
    return folder


@contextmanager
def _alone(path: Path, minutes: float) -> Iterator[None]:
    """Keep other jobs on this node from making the same copy; the system releases the lock when the process ends."""
    end = time.monotonic() + 60 * minutes
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RunError(
                        f"{path}: another job has been copying for {minutes:g} minutes; see its log"
                    ) from None
                time.sleep(0.1)
        yield


def _whole(copy: Path) -> bool:
    """Whether a copy has all of its files, with the same bytes as the source."""
    try:
        files = read_json(copy / COPIED)
        with ThreadPoolExecutor(4) as threads:
            return all(threads.map(lambda name: _facts(copy / name) == files[name], files))
    except (InputError, OSError):
        return False


def _facts(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": file_hash(file)}


def _fill(target: Path, files: list[Path]) -> None:
    need = sum(file.stat().st_size for file in files)

    def write(folder: Path) -> None:
        if shutil.disk_usage(folder).free < need:
            raise OSError(errno.ENOSPC, "full")
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda file: _copy_file(file, folder / file.name), files))
        write_json(folder / COPIED, dict(zip((file.name for file in files), found)))
        if not _whole(folder):
            raise RunError(
                f"models.stage: {target}: the data read back differ from the data written; is the disk broken?"
            )

    try:
        write_folder(target, write)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RunError(
            f"models.stage: {target.parent}: {need} bytes are needed for {target.name}, "
            f"{shutil.disk_usage(target.parent).free} are free"
        ) from None
    finally:
        shutil.rmtree(target.with_name(f".{target.name}.tmp"), ignore_errors=True)


def _copy_file(source: Path, target: Path) -> dict[str, Any]:
    """Copy a file; return its size and SHA-256, which is the name of a large file in the hub's cache."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(BLOCK):
            digest.update(block)
            write.write(block)
    known = source.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", known) and known != digest.hexdigest():
        raise RunError(f"{source}: content differs from the hub's hash; run `atlantis-ds fetch` again")
    return {"size": target.stat().st_size, "sha256": digest.hexdigest()}
