"""The store on real file systems: what gets in, whose it is, what is refused, what is damaged."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.errors import InvalidImage, InvalidParameter, LimitExceeded, NotFound, SyscallError
from mountd.evidence.model import Provenance, Signer
from mountd.fds import OwnedFd
from mountd.store.record import Owner
from mountd.store.store import Known, Store
from tests.store import MIB, OTHER, ROOT, USER, content, digest_of, files, opened, put, tree


def test_an_image_gets_in_and_is_found(home: Path, store: Store) -> None:
    data = content(3 * MIB + 17)
    seen: list[tuple[int, int]] = []
    record = put(store, data, name="mine", report=lambda done, total: seen.append((done, total)))
    assert record.digest == digest_of(data)
    assert (record.size, record.owners, record.name) == (len(data), (USER,), "mine")
    assert abs(record.created - time.time()) < 60
    assert seen[-1] == (len(data), len(data))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(seen) > 3
    assert tree(home) == files(record.digest)
    fd, found = store.lookup(record.digest)
    with fd:
        assert found == record
        status = os.fstat(fd.fileno())
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o400)
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert os.pread(fd.fileno(), len(data) + 1, 0) == data
    assert list(store.records()) == [record]
    assert store.record(record.digest) == record
    assert store.verify(record.digest, USER) == record


def test_what_is_judged_is_the_stored_file_and_cannot_be_written(store: Store) -> None:
    data = content(5000)

    def judge(fd: int, digest: str) -> Known:
        assert digest == digest_of(data)
        assert os.pread(fd, 6000, 0) == data
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        return Known(signers=(Signer("key", "who", "image", digest),))

    provenance = Provenance("h/r", digest_of(b""), (), "signedBy", None, 1)
    record = put(store, data, judge=judge, provenance=provenance)
    assert record.signers == (Signer("key", "who", "image", record.digest),)
    assert store.record(record.digest).provenance == provenance


def test_who_judges_may_refuse(home: Path, store: Store) -> None:
    def judge(fd: int, digest: str) -> Known:
        raise InvalidImage("no")

    with pytest.raises(InvalidImage, match="no"):
        put(store, content(5000), judge=judge)
    assert tree(home) == set()


def test_giving_up_leaves_nothing(home: Path, store: Store) -> None:
    data = content(3 * MIB)
    with opened(data) as fd:
        steps = store.adding(fd, len(data), USER)
        next(steps)
        assert len(tree(home)) == 1
        steps.close()
    assert tree(home) == set()
    put(store, data)


class TestHostileSources:
    @pytest.mark.parametrize("size", [0, 100, MIB, 3 * MIB - 1])
    def test_one_that_shrinks(self, home: Path, store: Store, size: int) -> None:
        data = content(3 * MIB)
        with opened(data) as fd:
            steps = store.adding(fd, len(data), USER)
            next(steps)
            os.ftruncate(fd, size)
            with pytest.raises(InvalidImage, match="became shorter"):
                list(steps)
        assert tree(home) == set()

    @pytest.mark.parametrize("more", [1, 4096, 3 * MIB])
    def test_one_that_grows(self, home: Path, store: Store, more: int) -> None:
        data = content(3 * MIB)
        with opened(data) as fd:
            steps = store.adding(fd, len(data), USER)
            next(steps)
            os.ftruncate(fd, len(data) + more)
            with pytest.raises(InvalidImage, match="became longer"):
                list(steps)
        assert tree(home) == set()

    def test_one_that_is_rewritten_all_the_time(self, store: Store) -> None:
        """What is stored has the digest that is recorded, whatever it is."""
        size = 4 * MIB
        with opened(content(size)) as fd:
            writer = os.fork()
            if writer == 0:
                try:
                    for turn in range(1 << 30):
                        os.pwrite(fd, bytes([turn // 1000 & 255]) * 4096, turn * 4096 % size)
                finally:
                    os._exit(0)
            try:
                found = {store.add(fd, size, USER).digest for _ in range(10)}
            finally:
                os.kill(writer, 9)
                os.waitpid(writer, 0)
        assert len(found) > 1  # else nothing was tested
        for digest in found:
            store.verify(digest, USER)

    def test_one_of_8_eib(self, home: Path, store: Store) -> None:
        with opened(b"x") as fd:
            with pytest.raises(LimitExceeded) as raised:
                store.add(fd, (1 << 63) - 1, USER)
            assert raised.value.parameters["maximum"] == store.limits.image_bytes
        assert tree(home) == set()

    def test_one_that_is_empty(self, store: Store) -> None:
        with pytest.raises(InvalidImage, match="empty"):
            put(store, b"")

    @pytest.mark.parametrize("flags", [os.O_PATH, os.O_WRONLY])
    def test_one_that_cannot_be_read(self, home: Path, store: Store, flags: int) -> None:
        path = home / "image"
        path.write_bytes(content(5000))
        with OwnedFd(os.open(path, flags | os.O_CLOEXEC)) as fd, pytest.raises(InvalidImage, match="read"):
            store.add(fd.fileno(), 5000, USER)
        assert tree(home) == set()

    def test_a_directory(self, home: Path, store: Store) -> None:
        with OwnedFd(os.open(home, os.O_RDONLY)) as fd, pytest.raises(InvalidImage, match="read"):
            store.add(fd.fileno(), 4096, USER)
        assert tree(home) == set()

    def test_a_name_that_is_none(self, store: Store) -> None:
        with pytest.raises(InvalidParameter):
            put(store, b"x", name="a\nb")


class TestOwners:
    def test_the_same_bytes_have_several(self, home: Path, store: Store) -> None:
        data = content(5000)
        put(store, data, name="first")
        put(store, data)  # once more
        record = put(store, data, OTHER, name="second")
        assert (record.owners, record.name) == ((USER, OTHER), "first")
        assert tree(home) == files(record.digest)
        store.remove(record.digest, USER.uid)
        assert (store.record(record.digest).owners, store.record(record.digest).name) == ((OTHER,), None)
        with pytest.raises(NotFound):
            store.remove(record.digest, USER.uid)
        with pytest.raises(NotFound):
            store.verify(record.digest, USER)
        store.remove(record.digest, OTHER.uid)
        assert tree(home) == set()

    def test_root_removes_for_all(self, home: Path, store: Store) -> None:
        data = content(5000)
        put(store, data)
        record = put(store, data, OTHER)
        store.remove(record.digest, 0)
        assert tree(home) == set()

    def test_what_is_known_is_put_together(self, store: Store) -> None:
        signers = [Signer(name, "s", "image", digest_of(b"x")) for name in ("a", "b")]
        put(store, b"x", judge=lambda fd, digest: Known(signers=(signers[0],)))
        record = put(store, b"x", OTHER, judge=lambda fd, digest: Known(signers=tuple(signers)))
        assert record.signers == tuple(signers)
        assert store.record(record.digest) == record

    def test_there_can_be_too_many(self, home: Path, store: Store) -> None:
        for uid in range(64):
            put(store, b"x", Owner(uid, uid))
        with pytest.raises(LimitExceeded, match="owners"):
            put(store, b"x", Owner(64, 64))
        assert tree(home) == files(digest_of(b"x"))

    def test_what_is_not_there_is_not_found(self, store: Store) -> None:
        missing = digest_of(b"nothing")
        for ask in (
            lambda: store.lookup(missing),
            lambda: store.record(missing),
            lambda: store.remove(missing, 0),
            lambda: store.verify(missing, ROOT),
        ):
            with pytest.raises(NotFound):
                ask()
        with pytest.raises(InvalidParameter):
            store.lookup("sha256:../../lock")


class TestDamage:
    """What only root, or a broken disk, can do to the store."""

    def image(self, home: Path, digest: str) -> Path:
        return home / "state/images/sha256" / digest.partition(":")[2]

    def test_other_bytes_are_found_by_verify(self, home: Path, store: Store) -> None:
        record = put(store, content(5000))
        path = self.image(home, record.digest)
        with path.open("r+b") as file:
            file.seek(4999)
            file.write(b"x" if content(5000)[-1:] != b"x" else b"y")
        with pytest.raises(InvalidImage, match="damaged"):
            store.verify(record.digest, ROOT)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: os.truncate(path, 4999),
            lambda path: path.chmod(0o640),
            lambda path: os.chown(path, 1000, 0),
            lambda path: os.link(path, path.with_name("other")),
        ],
    )
    def test_a_file_that_is_not_as_it_was_made(
        self, home: Path, store: Store, damage: Callable[[Path], object]
    ) -> None:
        record = put(store, content(5000))
        damage(self.image(home, record.digest))
        with pytest.raises(InvalidImage, match="damaged"):
            store.lookup(record.digest)

    def test_a_link_is_not_followed(self, home: Path, store: Store) -> None:
        record = put(store, content(5000))
        path = self.image(home, record.digest)
        path.rename(home / "elsewhere")
        path.symlink_to(home / "elsewhere")
        with pytest.raises(SyscallError, match="ELOOP"):
            store.lookup(record.digest)

    def test_a_record_of_another_image(self, home: Path, store: Store) -> None:
        first, second = put(store, b"1"), put(store, b"2")
        place = home / "state/records/sha256"
        (place / f"{first.digest[7:]}.json").rename(place / f"{second.digest[7:]}.json")
        with pytest.raises(InvalidImage, match="another image"):
            store.lookup(second.digest)
        assert list(store.records()) == []
        store.prepare()
        assert tree(home) == set()

    def test_a_state_directory_that_others_can_write_to(self, home: Path, store: Store) -> None:
        (home / "state").chmod(0o770)
        with pytest.raises(NotFound, match="store"):
            store.lookup(digest_of(b""))
        (home / "state").chmod(0o700)
        os.chown(home / "state", 1000, 0)
        with pytest.raises(NotFound, match="store"):
            put(store, b"x")

    def test_no_state_directory(self, home: Path) -> None:
        with pytest.raises(NotFound, match="store"):
            put(Store(home / "none"), b"x")


def test_a_whole_image_does_not_become_a_part_of_another(store: Store) -> None:
    def pulled(name: str, layers: int) -> Provenance | None:
        digests = tuple("sha256:" + str(number) * 64 for number in range(layers))
        origin = Provenance(f"example.com/{name}", "sha256:" + "a" * 64, digests, "signedBy", None, 1)
        return put(store, b"x", ROOT, provenance=origin).provenance

    assert pulled("part", 2) == pulled("part", 2)
    whole = pulled("whole", 1)
    assert whole is not None
    assert whole.repository == "example.com/whole"
    assert pulled("part", 2) == whole
    later = pulled("later", 1)
    assert later is not None
    assert later.repository == "example.com/later"
