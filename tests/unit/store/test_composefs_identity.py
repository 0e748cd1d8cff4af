"""Which mkcomposefs it is: another one may make another image of the same description."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.store import composefs_build, program


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation, and a system with nothing else."""
    for name in ("bin", "lib/of-machine", "lib64"):
        (tmp_path / "usr" / name).mkdir(parents=True)
    file = tmp_path / "usr/bin/mkcomposefs"
    file.write_bytes(b"\x7fELF...\0libc.so.6\0libcomposefs.so.1\0...")
    file.chmod(0o755)
    monkeypatch.setattr(program, "ENVIRONMENT", {"PATH": str(file.parent)})
    monkeypatch.setattr(composefs_build, "PREFIXES", (str(tmp_path / "usr"),))
    monkeypatch.setattr(composefs_build, "MULTIARCH", "of-machine")
    return tmp_path / "usr"


def replaced(path: Path) -> None:
    """As packages are upgraded, and with the very times that the contents had."""
    status = path.stat()
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    new.chmod(status.st_mode)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(path)


def test_the_program(prefix: Path) -> None:
    before = composefs_build.identity()
    assert composefs_build.identity() == before
    replaced(prefix / "bin/mkcomposefs")
    assert composefs_build.identity() != before
    (prefix / "bin/mkcomposefs").unlink()
    assert composefs_build.identity() == "missing"


@pytest.mark.parametrize("place", ["lib", "lib64", "lib/of-machine"])
def test_its_library(prefix: Path, place: str) -> None:
    """It is found by a link, whose name stays."""
    without = composefs_build.identity()
    library = prefix / place / "libcomposefs.so.1.4.0"
    library.write_bytes(b"\x7fELF")
    library.with_name("libcomposefs.so.1").symlink_to(library.name)
    before = composefs_build.identity()
    assert before != without
    replaced(library)
    upgraded = composefs_build.identity()
    assert upgraded != before
    other = library.with_name("libcomposefs.so.1.5.0")
    other.write_bytes(b"\x7fELF")
    library.with_name("libcomposefs.so.1").unlink()
    library.with_name("libcomposefs.so.1").symlink_to(other.name)
    assert composefs_build.identity() not in (before, upgraded)


def test_a_library_beside_the_program(prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the program is a link to where it was installed."""
    monkeypatch.setattr(composefs_build, "PREFIXES", ())
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mkcomposefs").symlink_to(prefix / "bin/mkcomposefs")
    monkeypatch.setattr(program, "ENVIRONMENT", {"PATH": str(tmp_path / "bin")})
    before = composefs_build.identity()
    (prefix / "lib/libcomposefs.so.1").write_bytes(b"\x7fELF")
    assert composefs_build.identity() != before


@pytest.mark.parametrize(
    "change",
    [
        lambda prefix: (prefix / "lib/libother.so.1").write_bytes(b""),
        lambda prefix: (prefix / "lib/libcomposefs.so.2").write_bytes(b""),
        lambda prefix: (prefix / "lib/libcomposefs.so.1").symlink_to("nowhere"),
    ],
)
def test_what_is_not_of_it(prefix: Path, change: Callable[[Path], object]) -> None:
    before = composefs_build.identity()
    change(prefix)
    assert composefs_build.identity() == before
