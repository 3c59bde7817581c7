"""Put the archived scores of the studies into one file for a release.

    python tools/archive_experiments.py

Needs experiments/scores, which the first command in experiments/README.md ("The kept scores") brings back. Writes
dist/experiments-scores.tar.gz, with the files below experiments/scores, and dist/experiments-scores.sha256: one
line for the archive and one for each file in it, in the format of `sha256sum --check`. The same files give a
byte-identical archive: names are sorted, and times, owners and permissions are left out.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
import tarfile
from pathlib import Path

from atlantis_ds.files import write_atomic, write_text

ROOT = Path(__file__).resolve().parents[1]


def archive(folder: Path, target: Path) -> None:
    """Write ``target``, a .tar.gz of the files below ``folder``, and ``target`` with .sha256 for .tar.gz.

    Names in both start at the parent of the parent of ``folder``: experiments/scores/….
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    start = folder.parents[1]

    def write(path: Path) -> None:
        with (
            path.open("wb") as raw,
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            for file in files:
                entry = tarfile.TarInfo(file.relative_to(start).as_posix())
                entry.size = file.stat().st_size
                with file.open("rb") as content:
                    tar.addfile(entry, content)

    write_atomic(target, write)
    lines = [f"{_sha256(target)}  {target.name}", *(f"{_sha256(f)}  {f.relative_to(start).as_posix()}" for f in files)]
    write_text(target.with_name(target.name.replace(".tar.gz", ".sha256")), "\n".join(lines) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    scores = ROOT / "experiments" / "scores"
    if not scores.is_dir():
        sys.exit(f"{scores}: no such folder; bring it back with `git archive`: experiments/README.md, The kept scores")
    archive(scores, ROOT / "dist" / "experiments-scores.tar.gz")
    for written in sorted((ROOT / "dist").glob("experiments-scores.*")):
        print(f"{written.relative_to(ROOT)} {written.stat().st_size:,} bytes")
