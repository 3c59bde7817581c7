"""Writes files of the run folder so that they are complete or absent, and reads them so that broken ones are named.

Every file is written under a temporary name in its own folder, flushed to disk, then renamed. Every output has a
fingerprint of everything that it was made from; a stage whose output has the right fingerprint is finished.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from atlantis_ds.errors import InputError, RunError

if TYPE_CHECKING:
    import pyarrow as pa


def fingerprint(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a JSON-serialisable value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hex. An unchanged file is read only once, because base models have gigabytes."""
    state = path.stat()
    return _file_hash(path, state.st_ino, state.st_size, state.st_mtime_ns)


@functools.lru_cache
def _file_hash(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write(temporary_path)``, flush the file to disk, and rename it to ``path``.

    Raises:
        OSError: with the name of the file, which a full disk alone does not give.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write(temporary_folder)``, flush what it wrote, and rename the folder to ``path``, replacing it."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    move_folder(temporary, path)


def move_folder(source: Path, target: Path) -> None:
    """Flush every file below ``source`` and rename it to ``target``, replacing an older folder there.

    Whoever can read the folder can read its files.
    """
    readers = source.stat().st_mode & 0o666
    for file in source.rglob("*"):
        if file.is_file():
            file.chmod(
                readers
            )  # safetensors makes files readable only for the owner, whatever the umask (its issue 782)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(source, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(source, target)
    _flush_folder(target.parent)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def read_json(path: Path) -> Any:
    """Read a JSON file of the run folder.

    Raises:
        InputError: the file is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run `{stage_of(path)}` first") from None
    except ValueError as error:
        raise InputError(f"{path}: broken JSON ({error}); remove it and run `{stage_of(path)}` again") from None


STAGES = {
    "examples": "prepare",
    "tokens": "prepare",
    "scores": "score",
    "weights.parquet": "merge",
    "weights.json": "merge",
    "model": "train",
    "eval": "evaluate",
}
"""Files and folders of the run folder, and the command that writes them."""


def stage_of(path: Path) -> str:
    """The command that writes a file of the run folder."""
    return next((STAGES[part] for part in reversed(path.parts) if part in STAGES), "run")


def write_table(path: Path, table: pa.Table, info: dict[str, Any]) -> None:
    """Write a Parquet file with page checksums and ``info`` (with its ``fingerprint``) in the metadata."""
    import pyarrow.parquet as pq

    table = table.replace_schema_metadata({"atlantis_ds": json.dumps(info, sort_keys=True)})
    write_atomic(path, lambda temporary: pq.write_table(table, temporary, write_page_checksum=True))


FORMATS = (".jsonl", ".csv", ".parquet")
"""The formats that `write_rows` writes, by suffix."""


def write_rows(path: Path, table: pa.Table) -> None:
    """Write a table for people and other programs: JSON Lines, CSV or Parquet, by the suffix of ``path``.

    In CSV, lists are JSON. Numbers are written so that reading them gives the same values.

    Raises:
        InputError: the suffix is unknown.
    """
    import pyarrow.parquet as pq

    refuse_unknown_format(path)

    def rows() -> Iterator[dict[str, Any]]:
        return (row for batch in table.to_batches(max_chunksize=10_000) for row in batch.to_pylist())

    def write(temporary: Path) -> None:
        if path.suffix == ".parquet":
            pq.write_table(table, temporary)
            return
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows())

    if path.suffix == ".csv":
        write_csv(path, table.column_names, map(_cells, rows()))
    else:
        write_atomic(path, write)


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    lists = {name: value for name, value in row.items() if isinstance(value, list | dict)}
    return row | {name: json.dumps(value, ensure_ascii=False) for name, value in lists.items()}


class _LineEnds:
    """Takes rows that end in CR LF, because Python 3.11 then quotes a lone CR in a text, and ends them in LF."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row.removesuffix("\r\n") + "\n")


def write_csv(path: Path, names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV in UTF-8 with a header and line ends ``\\n``."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(_LineEnds(file), names, lineterminator="\r\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomic(path, write)


def refuse_unknown_format(path: Path) -> None:
    """Raise InputError if `write_rows` cannot write a file of this name; call this before long work."""
    if path.is_dir():
        raise InputError(f"{path}: a folder; name a file")
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: the name must end in one of {', '.join(FORMATS)}")


def read_table(
    path: Path, columns: list[str] | None = None, dictionaries: list[str] | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """Read a Parquet file of the run folder, checking its page checksums.

    Args:
        columns: read only these.
        dictionaries: columns to read as Arrow dictionaries, which makes columns with few different strings small.

    Returns:
        the table, and the ``info`` with which it was written.

    Raises:
        InputError: the file is missing, truncated, changed, or not written by atlantis_ds.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=columns, read_dictionary=dictionaries, page_checksum_verification=True)
        return table.replace_schema_metadata(None), table_info(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run `{stage_of(path)}` first") from None
    except (OSError, pa.ArrowException) as error:
        reason, stage = str(error).splitlines()[0], stage_of(path)
        raise InputError(f"{path}: broken Parquet file ({reason}); remove it and run `{stage}` again") from None


def table_info(path: Path) -> dict[str, Any]:
    """The ``info`` with which a Parquet file was written, without reading its rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path).metadata or {}
        return json.loads(metadata[b"atlantis_ds"])
    except (KeyError, ValueError, pa.ArrowException):
        raise InputError(f"{path}: not written by atlantis_ds (no fingerprint in it)") from None


SEEN_WITHIN = 90.0
"""Seconds within which a file written by another node must appear: NFS caches folder listings for up to 60 s."""


def look_again(folder: Path) -> None:
    """Make this node discard its cached listing of a folder on a network file system, by changing the folder."""
    with contextlib.suppress(OSError):  # in a read-only folder, the listing cannot be refreshed
        handle, name = tempfile.mkstemp(prefix=".", dir=folder)
        os.close(handle)
        os.unlink(name)


def wait_for_files(paths: Iterable[Path], seconds: float = SEEN_WITHIN) -> None:
    """Wait until files that other nodes have written are visible on this node.

    Raises:
        RunError: a file does not appear within this many seconds.
    """
    end = time.monotonic() + seconds
    for path in paths:
        while not path.exists():
            if time.monotonic() > end:
                raise RunError(
                    f"{path}: another rank has written it, but it is not visible here after {seconds:.0f} s; do all "
                    "nodes share this folder?"
                )
            look_again(path.parent)
            time.sleep(0.5)


def finished(path: Path, expected: str) -> bool:
    """Whether a JSON or Parquet output exists and has the expected fingerprint."""
    try:
        info = read_json(path) if path.suffix == ".json" else table_info(path)
    except (InputError, OSError):
        return False
    return info.get("fingerprint") == expected


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
