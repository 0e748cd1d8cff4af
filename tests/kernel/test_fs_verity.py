"""What is said where fs-verity cannot be measured; the VM tier has file systems where it can."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mountd.evidence import fs_verity as evidence
from mountd.fds import OwnedFd
from mountd.kernel import libc
from mountd.kernel.paths import file_system_magic


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errno.ENODATA, "fs-verity is not enabled on it"),
        (errno.ENOTTY, "its file system has no fs-verity"),
        (errno.EOPNOTSUPP, "made without the feature verity"),
        (errno.EIO, "cannot be measured (EIO)"),
        (errno.ENOSYS, "the system call ioctl"),
    ],
)
def test_reasons(monkeypatch: pytest.MonkeyPatch, scratch: Path, error: int, reason: str) -> None:
    path = scratch / "file"
    path.write_bytes(b"contents")
    with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
        magic = file_system_magic(fd.fileno())
        monkeypatch.setattr(evidence, "FILE_SYSTEMS", {magic: "this one"})
        monkeypatch.setitem(libc.inject, "ioctl FS_IOC_MEASURE_VERITY", error)
        said = evidence.prove(fd.fileno())
    path.unlink()
    assert isinstance(said, str)
    assert reason in said


def test_algorithm_that_is_not_known(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    def measure(_: int) -> None:
        raise ValueError("7 is not a valid VerityAlgorithm")

    monkeypatch.setattr(evidence, "measure", measure)
    with OwnedFd(os.open(scratch, os.O_RDONLY)) as fd:
        monkeypatch.setattr(evidence, "FILE_SYSTEMS", {file_system_magic(fd.fileno()): "this one"})
        said = evidence.prove(fd.fileno())
    assert isinstance(said, str)
    assert "7 is not a valid" in said


def test_file_system_that_is_not_on_the_list_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A FUSE server would answer, as it likes."""
    monkeypatch.setattr(evidence, "measure", lambda _: pytest.fail("it was asked"))
    for path in ("/proc/version", "/dev/null", "/sys/kernel/mm"):
        with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
            assert evidence.prove(fd.fileno()) == "its file system has no fs-verity"


def test_file_system_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(libc.inject, "fstatfs", errno.EIO)
    assert evidence.prove(0) == "fs-verity cannot be measured (EIO)"
