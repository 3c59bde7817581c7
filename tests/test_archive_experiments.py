"""tools/archive_experiments.py: the archive of the kept scores has the same bytes for the same files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from archive_experiments import archive


def scores(folder: Path, time: int, mode: int) -> Path:
    """Two files below experiments/scores, written at this time, in an order that depends on it."""
    for name in sorted(["b/scores.json", "a/shard-00000-of-00001.parquet"], reverse=bool(time % 2)):
        path = folder / "experiments" / "scores" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(name.encode() * 1000)
        path.chmod(mode)
        os.utime(path, (time, time))
    return folder / "experiments" / "scores"


def test_archive_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    archive(scores(tmp_path / "one", 1_000, 0o644), tmp_path / "one.tar.gz")
    other = scores(tmp_path / "other", 2_000_001, 0o600)
    archive(other, tmp_path / "other.tar.gz")
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "other.tar.gz").read_bytes()
    (other / "b" / "scores.json").write_bytes(b"changed")
    archive(other, tmp_path / "other.tar.gz")
    assert (tmp_path / "one.tar.gz").read_bytes() != (tmp_path / "other.tar.gz").read_bytes()


def test_manifest_checks_the_archive_and_every_file_of_it(tmp_path: Path) -> None:
    archive(scores(tmp_path / "tree", 1_000, 0o644), tmp_path / "scores.tar.gz")
    assert len((tmp_path / "scores.sha256").read_text().splitlines()) == 3
    subprocess.run(["tar", "xzf", "scores.tar.gz"], cwd=tmp_path, check=True)
    check = ["sha256sum", "--check", "--quiet", "scores.sha256"]
    assert subprocess.run(check, cwd=tmp_path).returncode == 0
    (tmp_path / "experiments" / "scores" / "b" / "scores.json").write_bytes(b"altered")
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).returncode == 1
