"""The digest of an image: of each size around a block, of holes, with progress, and cut off."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mountd.errors import InvalidImage
from mountd.evidence.digest import BLOCK, REPORT_EVERY, sha256_of
from mountd.fds import OwnedFd
from tests.bench import hashing

SIZES = (0, 1, 4095, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 17)


def opened(path: Path) -> OwnedFd:
    return OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


@pytest.mark.parametrize("size", SIZES)
def test_sizes(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "image").write_bytes(data)
    with opened(tmp_path / "image") as fd:
        os.lseek(fd.fileno(), min(size, 7), os.SEEK_SET)
        assert sha256_of(fd.fileno(), size) == "sha256:" + hashlib.sha256(data).hexdigest()
        # Nobody's offset is moved, and no more is read than was asked for.
        assert os.lseek(fd.fileno(), 0, os.SEEK_CUR) == min(size, 7)
        if size:
            assert sha256_of(fd.fileno(), size - 1) == "sha256:" + hashlib.sha256(data[:-1]).hexdigest()


def test_holes(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    os.truncate(tmp_path / "image", BLOCK + 5)
    with opened(tmp_path / "image") as fd:
        assert sha256_of(fd.fileno(), BLOCK + 5) == "sha256:" + hashlib.sha256(bytes(BLOCK + 5)).hexdigest()


def test_progress(tmp_path: Path) -> None:
    size = 2 * REPORT_EVERY + 5
    (tmp_path / "image").touch()
    os.truncate(tmp_path / "image", size)
    seen: list[int] = []
    with opened(tmp_path / "image") as fd:
        sha256_of(fd.fileno(), size, seen.append)
        assert seen == [REPORT_EVERY, 2 * REPORT_EVERY, size]
        seen.clear()
        sha256_of(fd.fileno(), 0, seen.append)
        assert seen == [0]


def test_what_a_client_would_not_wait_for_ends_it(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    os.truncate(tmp_path / "image", 4 * REPORT_EVERY)

    def cancel(done: int) -> None:
        raise InterruptedError(done)

    with opened(tmp_path / "image") as fd, pytest.raises(InterruptedError, match=str(REPORT_EVERY)):
        sha256_of(fd.fileno(), 4 * REPORT_EVERY, cancel)


def test_file_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(100))
    with (
        opened(tmp_path / "image") as fd,
        pytest.raises(InvalidImage, match="ends 28 bytes before") as raised,
    ):
        sha256_of(fd.fileno(), 128)
    assert raised.value.parameters["offset"] == 100


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with opened(tmp_path) as fd, pytest.raises(InvalidImage, match="cannot be read"):
        sha256_of(fd.fileno(), 1)


def test_it_is_as_fast_as_the_usual_program(tmp_path: Path) -> None:
    """As a ratio within one run; the best of three, as another's load may hit one of both."""
    size = 32 << 20
    hashing.build(tmp_path / "image", size)
    assert max(hashing.ratio(tmp_path / "image", size, 3)[0] for _ in range(3)) >= hashing.RATIO
