"""A sealed memfd counts with all of its four seals, and nothing else does."""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
from pathlib import Path

import pytest

from mountd.evidence.model import Proof
from mountd.evidence.sealed import prove_sealed
from mountd.fds import OwnedFd

FOUR = {
    "F_SEAL_SEAL": fcntl.F_SEAL_SEAL,
    "F_SEAL_SHRINK": fcntl.F_SEAL_SHRINK,
    "F_SEAL_GROW": fcntl.F_SEAL_GROW,
    "F_SEAL_WRITE": fcntl.F_SEAL_WRITE,
}
F_SEAL_FUTURE_WRITE = 0x10


def memory(seals: int = 0, flags: int = os.MFD_ALLOW_SEALING) -> OwnedFd:
    fd = OwnedFd(os.memfd_create("test", os.MFD_CLOEXEC | flags))
    os.write(fd.fileno(), b"image")
    if seals:
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
    return fd


SETS = [set(each) for count in range(5) for each in itertools.combinations(FOUR, count)]


@pytest.mark.parametrize("names", SETS, ids=lambda names: "+".join(sorted(names)) or "none")
def test_each_set_of_seals(names: set[str]) -> None:
    with memory(sum(FOUR[name] for name in names)) as fd:
        found = prove_sealed(fd.fileno())
    if len(names) == 4:
        assert found == Proof("sealed")
    else:
        assert found == f"it lacks {', '.join(name for name in FOUR if name not in names)}"


def test_future_write_does_not_count_with_a_mapping_that_can_write() -> None:
    with memory() as fd:
        mapped = mmap.mmap(fd.fileno(), 5)
        with pytest.raises(OSError, match="busy"):
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        others = sum(FOUR.values()) - fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, others | F_SEAL_FUTURE_WRITE)
        assert prove_sealed(fd.fileno()) == "it lacks F_SEAL_WRITE"
        mapped[:5] = b"other"
        assert os.pread(fd.fileno(), 5, 0) == b"other"
        mapped.close()


def test_what_is_proven_holds() -> None:
    with memory(sum(FOUR.values())) as fd:
        assert prove_sealed(fd.fileno()) == Proof("sealed")
        with pytest.raises(PermissionError):
            os.pwrite(fd.fileno(), b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd.fileno(), 0)
        with pytest.raises(PermissionError):
            mmap.mmap(fd.fileno(), 5)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, 0)
        # Opened anew, it is the same memory.
        with OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", os.O_RDONLY | os.O_CLOEXEC)) as again:
            assert prove_sealed(again.fileno()) == Proof("sealed")


def test_what_is_no_memfd(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path, flags in (
        (str(tmp_path / "file"), os.O_RDWR),
        (str(tmp_path / "file"), os.O_PATH),
        (str(tmp_path), os.O_RDONLY),
        ("/dev/null", os.O_RDONLY),
        ("/proc/self/status", os.O_RDONLY),
    ):
        with OwnedFd(os.open(path, flags | os.O_CLOEXEC)) as fd:
            assert prove_sealed(fd.fileno()) == "it is not a memfd", path
    with memory(flags=0) as fd:
        assert prove_sealed(fd.fileno()) == "it lacks F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE"


def test_what_is_no_descriptor() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        prove_sealed(999)
