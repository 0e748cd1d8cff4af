"""How bytes get into the store: shared where the file system can, copied and hashed where not."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.errors import InvalidImage, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import libc
from mountd.store import transfer
from mountd.store.store import Store
from tests.store import MIB, OTHER, USER, content, digest_of, put, tree


@pytest.mark.parametrize("fraction", [0, 1, 2, 3])
def test_holes_stay_holes(store: Store, fraction: int) -> None:
    data = bytearray(4 * MIB)
    data[fraction * MIB : fraction * MIB + 4096] = content(4096)
    record = put(store, bytes(data))
    assert record.digest == digest_of(bytes(data))
    fd, _ = store.lookup(record.digest)
    with fd:
        assert os.fstat(fd.fileno()).st_blocks * 512 <= 2 * MIB
        assert os.pread(fd.fileno(), len(data), 0) == bytes(data)


class TestReflink:
    """On file systems that share blocks an import costs none, and copies where it has to."""

    SIZE = 1 << 30

    @pytest.fixture(params=["btrfs", "xfs"])
    def disk(self, request: pytest.FixtureRequest, home: Path) -> Iterator[Path]:
        image, target = home / "disk", home / "mnt"
        with image.open("wb") as file:
            file.truncate(3 << 30)
        target.mkdir()
        command = ["mkfs.btrfs", "-q"] if request.param == "btrfs" else ["mkfs.xfs", "-q", "-m", "reflink=1"]
        subprocess.run([*command, image], check=True)
        subprocess.run(["mount", "-o", "loop", image, target], check=True)
        try:
            yield target
        finally:
            subprocess.run(["umount", target], check=True)
            image.unlink()

    def used(self, disk: Path) -> int:
        subprocess.run(["sync", "-f", disk], check=True)
        status = os.statvfs(disk)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def test_a_gibibyte_costs_no_copy(self, disk: Path) -> None:
        store = Store(disk / "state")
        store.prepare()
        source = disk / "image"
        block = content(MIB)
        sha256 = hashlib.sha256()
        with source.open("wb") as file:
            for each in range(self.SIZE // MIB):
                piece = each.to_bytes(4, "big") + block[4:]
                file.write(piece)
                sha256.update(piece)
        before = self.used(disk)
        assert before > self.SIZE
        with source.open("rb") as file:
            record = store.add(file.fileno(), self.SIZE, USER)
        assert record.digest == f"sha256:{sha256.hexdigest()}"
        assert self.used(disk) - before < 16 * MIB
        # What is stored stays what it is when the source is written to.
        with source.open("r+b") as file:
            file.write(b"changed")
        store.verify(record.digest, USER)
        # The same from another file system has to be copied.
        fd, _ = store.lookup(record.digest)
        with fd, OwnedFd(os.memfd_create("copy", os.MFD_CLOEXEC)) as copy:
            os.sendfile(copy.fileno(), fd.fileno(), 0, 64 * MIB)
            before = self.used(disk)
            store.add(copy.fileno(), 64 * MIB, OTHER)
            assert self.used(disk) - before >= 60 * MIB

    def test_a_source_of_another_size_than_it_had(self, disk: Path) -> None:
        store = Store(disk / "state")
        store.prepare()
        (disk / "image").write_bytes(content(MIB))
        with (disk / "image").open("rb") as file:
            for size in (MIB - 1, MIB + 1):
                with pytest.raises(InvalidImage, match="became"):
                    store.add(file.fileno(), size, USER)
        assert tree(disk) == set()

    def test_an_error_of_the_disk_is_none_of_sharing(self, disk: Path) -> None:
        store = Store(disk / "state")
        store.prepare()
        (disk / "image").write_bytes(content(MIB))
        libc.inject["ioctl FICLONE"] = errno.EIO
        try:
            with (disk / "image").open("rb") as file, pytest.raises(SyscallError, match="EIO"):
                store.add(file.fileno(), MIB, USER)
        finally:
            libc.inject.clear()
        assert tree(disk) == set()


@pytest.mark.parametrize("refusal", ["EXDEV", "EOPNOTSUPP", "EINVAL", "EPERM", "ENOTTY", "ETXTBSY"])
def test_what_cannot_be_shared_is_copied(home: Path, store: Store, refusal: str) -> None:
    data = content(MIB + 1)
    libc.inject["ioctl FICLONE"] = getattr(errno, refusal)
    try:
        assert put(store, data).digest == digest_of(data)
    finally:
        libc.inject.clear()


def test_hashing_is_about_as_fast_as_sha256sum(home: Path) -> None:
    path = home / "large"
    with path.open("wb") as file:
        for _ in range(256):
            file.write(content(MIB))
    best: dict[str, float] = {}
    with path.open("rb") as file:
        for _ in range(4):
            for name, work in (
                ("sha256sum", lambda: subprocess.run(["sha256sum", path], check=True, capture_output=True)),
                ("mountd", lambda: list(transfer.hashing(file.fileno(), 256 * MIB))),
            ):
                begin = time.monotonic()
                work()
                best[name] = min(best.get(name, 1e9), time.monotonic() - begin)
    path.unlink()
    assert best["sha256sum"] / best["mountd"] >= 0.7, best
