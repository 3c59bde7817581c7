"""Rows of data files and hub data sets, one after another, as plain dicts, each with its place in the source.

Nothing is converted: a CSV cell is text, a JSON value keeps its type. Text files are read with the standard library:
pyarrow's JSON reader, which ``datasets`` uses, turns a label like "2011-01-01" into a date and cannot name a bad line.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from atlantis_ds.errors import InputError
from atlantis_ds.hub import Repository, cached, of_data

SPLITS = {"train": ["train"], "dev": ["validation", "dev"], "test": ["test"]}
# Files that `Dataset.save_to_disk` writes next to its Arrow files.
NOT_DATA = ("/dataset_info.json", "/state.json")
BATCH = 256

Problems = Callable[[str, str], None]
# A place, and the row there, or a text that says what is wrong with it.
Read = Iterator[tuple[str, dict[str, Any] | str]]


@dataclass(frozen=True, slots=True)
class Row:
    where: str
    """``path:line``; ``path: row N``, N from 1; ``hub_id[split] row N``, N from 0."""
    number: int
    """Position in the split, from 0, over all its files; a bad row counts, a blank line does not."""
    values: dict[str, Any]


def expand(paths: str | list[str], key: str) -> list[Path]:
    """The files that paths, patterns (``data/part-*.jsonl``) and folders name, each file once.

    The order of the list is kept; the files of a pattern or a folder are sorted by name. A folder means the data files
    directly in it.

    Raises:
        InputError: there is no file; the message begins with ``key``, the key in the recipe.
    """
    files: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        place, missing = os.path.expanduser(path), "no such file"
        if os.path.isdir(place):
            names = glob.glob(os.path.join(glob.escape(place), "*"))
            found = [name for name in names if name.lower().endswith(tuple(READERS)) and not name.endswith(NOT_DATA)]
            missing = f"no data file in this folder; known kinds are {KNOWN}"
        else:  # a name may contain a bracket
            found = [place] if os.path.exists(place) else glob.glob(place, recursive=True)
        if not any(map(os.path.isfile, found)):
            raise InputError(f"{key}: {path}: {missing}")
        files += sorted(filter(os.path.isfile, found))
    return [Path(name) for name in dict.fromkeys(files)]


def read_rows(files: list[Path], problems: Problems) -> Iterator[Row]:
    """Read the rows of some files, by their suffix: JSON Lines, JSON, CSV, TSV (each also as .gz), Parquet, Arrow.

    In CSV and TSV, an empty cell is None, and a column without a name (as pandas writes its index) is ``column N``
    (from 1). In Parquet and Arrow, NaN is None, and class labels written by ``datasets`` become their names.

    Args:
        problems: called with the place of a row that cannot be read, and what is wrong; the row is left out.

    Raises:
        InputError: a file is missing, completely broken, not UTF-8, or of an unknown kind.
    """
    readers = [_reader(path) for path in files]  # open all of them before the first row
    return _rows(chain.from_iterable(read(path) for read, path in zip(readers, files)), problems)


def read_hub_rows(hub_id: str, split: str, problems: Problems) -> Iterator[Row] | None:
    """Read one split with ``datasets.load_dataset``; class labels become their names, or None for -1.

    Args:
        hub_id: a dataset id, ``id@revision``, or a local folder that ``datasets`` can read.
        split: train, dev (``validation`` or ``dev`` there) or test.

    Returns:
        the rows; None if the dataset has no dev split.

    Raises:
        InputError: the dataset cannot be loaded or lacks the split.
    """
    from datasets import config, load_dataset

    source, revision = hub_id, None
    try:
        if not Path(hub_id).exists():
            repository = of_data(hub_id)
            source, revision = repository.id, repository.revision
            if config.HF_HUB_OFFLINE:
                # Offline, `datasets` uses what it last read under this name, whatever the revision (5.2.0).
                source, revision = _cached_folder(repository), None
        dataset = load_dataset(source, revision=revision)
    except Exception as error:  # datasets raises many kinds of errors for "missing", "no network", "not readable"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"data.hub_id: {hub_id} cannot be loaded ({reason}); check the id and the connection, or give files"
        ) from None
    name = next((name for name in SPLITS[split] if name in dataset), None)
    if name is None:
        if split == "dev":
            return None
        raise InputError(f"data.hub_id: {hub_id} has no split `{split}`; it has {', '.join(dataset)}")
    rows = dataset[name]
    classes = {key: kind.names for key, kind in rows.features.items() if getattr(kind, "_type", "") == "ClassLabel"}
    found = ((f"{hub_id}[{name}] row {n}", _plain(row, classes)) for n, row in enumerate(rows))
    return _rows(found, problems)


def _cached_folder(repository: Repository) -> str:
    folder = cached(repository)
    if folder is None:
        raise FileNotFoundError("HF_HUB_OFFLINE is set, and `atlantis-ds fetch` has not downloaded it")
    return str(folder)


def _rows(found: Read, problems: Problems) -> Iterator[Row]:
    for number, (where, values) in enumerate(found):
        if isinstance(values, str):
            problems(where, values)
        else:
            yield Row(where, number, values)


def read_text(path: Path) -> str:
    """A whole text file without a byte order mark. Raises InputError: missing, unreadable or not UTF-8."""
    return "".join(line for _, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, numbered from 1, with unchanged line ends and without a byte order mark."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    byte = f"byte 0x{line[error.start]:02x}"
                    raise InputError(f"{path}:{number}: not UTF-8 ({byte}); convert the file") from None
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _json_lines(path: Path) -> Read:
    for number, line in _lines(path):
        if line.strip():
            try:
                found = _object(json.loads(line.rstrip("\r\n")), line)
            except (ValueError, RecursionError) as error:
                found = _broken_json(error)
            yield f"{path}:{number}", found


def _json(path: Path) -> Read:
    first, line = next(((number, line) for number, line in _lines(path) if line.strip()), (1, ""))
    if line.strip() == "{":
        raise InputError(
            f"{path}:{first}: an object over several lines; give a JSON array of objects, or one object per line"
        )
    if not line.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    text = read_text(path)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{getattr(error, 'lineno', first)}: {_broken_json(error)}") from None
    for number, item in enumerate(items, start=1):
        yield f"{path}: row {number}", _object(item, text)


def _broken_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON at column {error.colno}: {error.msg}"
    return "not valid JSON: nested too deep" if isinstance(error, RecursionError) else f"cannot be read: {error}"


def _object(value: Any, source: str) -> dict[str, Any] | str:
    """A row, or what is wrong with a value that was read from the JSON text ``source``."""
    if not isinstance(value, dict):
        return f"expected a JSON object, not {ascii(value)[:40]}"
    if "\\u" in source:  # JSON may cut an emoji in half, as in tweets; such a text cannot be written to any file
        for name, item in value.items():
            if half := re.search("[\ud800-\udfff]", json.dumps([name, item], ensure_ascii=False)):
                return f"half of a surrogate pair ({ascii(half[0])[1:-1]}) in `{ascii(name)[1:-1]}`; correct the text"
    return value


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def _broken_csv(error: csv.Error) -> str:
    return str(error).partition(" - ")[0]  # behind it Python asks how a programmer opened the file


def _csv(path: Path) -> Read:
    # Strict: a quotation mark that is not closed, or closed too early, is an error, not part of the text.
    csv.field_size_limit(2**31 - 1)
    tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
    reader = csv.reader((line for _, line in _lines(path)), delimiter="\t" if tabs else ",", strict=True)
    try:
        header = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: the header cannot be read: {_broken_csv(error)}") from None
    if len(header) == 1 and (mark := next((mark for mark in SEPARATORS if mark in header[0]), None)):
        raise InputError(
            f"{path}:{reader.line_num}: one column, {header[0]!r:.60}: its cells are separated by {SEPARATORS[mark]}, "
            f"not {SEPARATORS[reader.dialect.delimiter]}; save it as CSV with commas, or as .tsv with tabs"
        )
    header = [name if name.strip() else f"column {number}" for number, name in enumerate(header, start=1)]
    _unique(f"{path}:{reader.line_num}", header)
    number = 0
    cells: list[str] | None = header
    while cells is not None:
        wrong = ""
        try:
            cells = next(reader, None)
            if cells and len(cells) != len(header):
                wrong = f"{len(cells)} cells, but the header has {len(header)}"
        except csv.Error as error:
            wrong = f"quotation marks or line ends are wrong at line {reader.line_num}: {_broken_csv(error)}"
        if wrong or cells:  # else a blank line, or the end
            number += 1
            yield f"{path}: row {number}", wrong or dict(zip(header, (cell or None for cell in cells or [])))


def _table(path: Path) -> Read:
    """The rows of a Parquet or Arrow file; an Arrow file may be in the file or the stream format."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pa.memory_map(str(path)) as source:
            if path.suffix.lower() == ".parquet":
                file = pq.ParquetFile(source, page_checksum_verification=True)
                schema, batches = file.schema_arrow, file.iter_batches(BATCH)
            elif source.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(source)
                schema, batches = reader.schema, map(reader.get_batch, range(reader.num_record_batches))
            else:
                source.seek(0)
                batches = pa.ipc.open_stream(source)
                schema = batches.schema
            _unique(f"{path}", schema.names)
            features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features")
            kinds = {name: kind for name, kind in (features or {}).items() if isinstance(kind, dict)}
            classes = {name: kind.get("names", []) for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
            for batch in batches:
                for start in range(0, len(batch), BATCH):
                    for values in _values(batch.slice(start, BATCH)):
                        number += 1
                        yield f"{path}: row {number}", values if isinstance(values, str) else _plain(values, classes)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or ["broken"])[0]
        place = f" after row {number}" if number else ""
        raise InputError(f"{path}: cannot be read{place}: {reason}") from None


def _values(batch: Any) -> list[Any]:
    """The rows of a record batch; a message for a row that Python cannot represent: not UTF-8, or a date after 9999."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [f"cannot be read: {error}"]
        return [_values(batch.slice(row, 1))[0] for row in range(len(batch))]


def _plain(values: dict[str, Any], classes: dict[str, list[str]]) -> dict[str, Any] | str:
    """A row with NaN as None and class numbers as names, or what is wrong with it."""
    for key, value in values.items():
        if isinstance(value, float) and value != value:
            values[key] = None
        elif key in classes and type(value) is int:
            if not -1 <= value < len(classes[key]):
                return f"`{key}` {value} has no class name in the data set's features"
            values[key] = classes[key][value] if value >= 0 else None
    return values


def _unique(where: str, names: list[str]) -> None:
    for number, name in enumerate(names, start=1):
        if not name.strip():
            raise InputError(f"{where}: column {number} has no name")
        if name in names[: number - 1]:
            raise InputError(f"{where}: two columns have the name `{name}`; rename one")


TEXT = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv}
BINARY = {".parquet": _table, ".arrow": _table, ".feather": _table}
READERS = TEXT | BINARY | {f"{suffix}.gz": read for suffix, read in TEXT.items()}
KNOWN = f"{', '.join(TEXT)} (each also with .gz), {', '.join(BINARY)}"


def _reader(path: Path) -> Callable[[Path], Read]:
    for suffix, read in READERS.items():
        if path.name.lower().endswith(suffix):
            return read
    raise InputError(f"{path}: not a known kind of data file; known kinds are {KNOWN}")
