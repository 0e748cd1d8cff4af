"""The store on real file systems: what gets in, what is refused, what is shared, what is never removed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mountd.errors import InUse, InvalidImage, InvalidParameter, LimitExceeded, NotFound, SyscallError
from mountd.evidence.model import Provenance, Signer
from mountd.fds import OwnedFd
from mountd.kernel import libc, loop_device, mount_api
from mountd.kernel.flags import MountAttr, MoveMount, Unmount
from mountd.kernel.fs_context import FsContext
from mountd.kernel.lease import only_opener
from mountd.store import transfer
from mountd.store.quota import Limits
from mountd.store.record import Owner, Record, serialise
from mountd.store.store import Known, Store, finish

MIB = 1 << 20
ROOT = Owner(0, 0)
USER = Owner(1000, 1000)
OTHER = Owner(1001, 1001)


@pytest.fixture
def home(scratch: Path, request: pytest.FixtureRequest) -> Path:
    path = scratch / f"store-{request.node.name[:60].replace('/', '_')}"
    path.mkdir()
    return path


@pytest.fixture
def store(home: Path) -> Store:
    made = Store(home / "state")
    made.prepare()
    return made


def limited(home: Path, **limits: int) -> Store:
    made = Store(home / "state", Limits(**limits))
    made.prepare()
    return made


def content(size: int, seed: int = 1) -> bytes:
    block = hashlib.shake_128(bytes([seed])).digest(min(size, MIB))
    return (block * (size // MIB + 1))[:size]


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def put(store: Store, data: bytes, owner: Owner = USER, **fields: object) -> Record:
    with opened(data) as fd:
        return store.add(fd, len(data), owner, **fields)  # type: ignore[arg-type]


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[int]:
    """An unnamed file in memory with `data`."""
    with OwnedFd(os.memfd_create("image", os.MFD_CLOEXEC)) as fd:
        with open(os.dup(fd.fileno()), "wb") as file:
            file.write(data)
        yield fd.fileno()


def tree(home: Path) -> set[str]:
    """All files of the store but its lock and slots, whose presence means nothing."""
    state = home / "state"
    return {
        str(path.relative_to(state))
        for path in state.rglob("*")
        if path.is_file() and path.relative_to(state).parts[0] not in ("lock", "slots")
    }


def files(*digests: str) -> set[str]:
    """The files that these images consist of, and nothing else."""
    hexes = [digest.partition(":")[2] for digest in digests]
    return {f"images/sha256/{each}" for each in hexes} | {f"records/sha256/{each}.json" for each in hexes}


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


class TestQuota:
    def test_bytes_of_an_image(self, home: Path) -> None:
        store = limited(home, image_bytes=1000)
        refused(lambda: put(store, content(1001)), "image of the store", 1000)
        put(store, content(1000))

    def test_bytes_of_an_owner(self, home: Path) -> None:
        store = limited(home, owner_bytes=1000)
        first = put(store, content(600))
        refused(lambda: put(store, content(401, 2)), "bytes of one owner", 1000)
        put(store, content(401, 2), OTHER)
        put(store, content(2000, 3), ROOT)
        # Another uid, and the same one who pays.
        refused(lambda: put(store, content(401, 4), Owner(100000, 1000)), "bytes of one owner", 1000)
        # A container's root is not the host's: what is charged to uid 0 is bounded as well.
        put(store, content(999, 8), Owner(5, 5))
        refused(lambda: put(store, content(2001, 9), Owner(100001, 0)), "bytes of one owner", 1000)
        store.remove(first.digest, USER.uid)
        put(store, content(401, 4))

    def test_images_of_an_owner(self, home: Path) -> None:
        store = limited(home, owner_images=2)
        put(store, b"1")
        put(store, b"2")
        refused(lambda: put(store, b"3"), "images of one owner", 2)
        put(store, b"3", OTHER)

    def test_bytes_of_all(self, home: Path) -> None:
        store = limited(home, total_bytes=1000)
        put(store, content(600))
        refused(lambda: put(store, content(401, 2), ROOT), "bytes in the store", 1000)
        put(store, content(400, 2), OTHER)

    def test_images_of_all(self, home: Path) -> None:
        store = limited(home, images=1)
        put(store, b"1")
        refused(lambda: put(store, b"2", ROOT), "images in the store", 1)

    def test_the_same_bytes_count_for_each_owner_and_once_for_all(self, home: Path) -> None:
        store = limited(home, owner_bytes=1000, total_bytes=1500)
        put(store, content(700))
        put(store, content(700), OTHER)
        put(store, content(300, 2), ROOT)
        refused(lambda: put(store, content(301, 3), OTHER), "bytes of one owner", 1000)

    def test_what_is_being_imported_counts(self, home: Path) -> None:
        store = limited(home, owner_bytes=3 * MIB, total_bytes=5 * MIB)
        data = content(2 * MIB)
        with opened(data) as fd:
            steps = store.adding(fd, len(data), USER)
            next(steps)
            refused(lambda: put(store, content(2 * MIB, 2)), "bytes of one owner", 3 * MIB)
            refused(lambda: put(store, content(4 * MIB, 2), ROOT), "bytes in the store", 5 * MIB)
            steps.close()
        put(store, content(2 * MIB, 2))

    def test_transfers_at_the_same_time(self, home: Path) -> None:
        store = limited(home, transfers=3, owner_transfers=2)
        record = put(store, b"0", ROOT)
        with store.slot(USER), store.slot(USER):
            refused(lambda: put(store, b"1"), "transfers of one owner", 2)
            refused(lambda: put(store, b"1", Owner(100000, 1000)), "transfers of one owner", 2)
            with store.slot(OTHER):
                refused(lambda: put(store, b"1", ROOT), "transfers at the same time", 3)
                refused(lambda: store.verify(record.digest, ROOT), "transfers at the same time", 3)
            put(store, b"1", ROOT)
        put(store, b"2")

    def test_a_full_disk(self, home: Path) -> None:
        with mounted_tmpfs(home / "small", "2m") as place:
            store = Store(place / "state")
            store.prepare()
            record = put(store, content(MIB))
            with pytest.raises(LimitExceeded, match="bytes on the disk of the store") as raised:
                put(store, content(3 * MIB, 2))
            assert 0 < raised.value.parameters["maximum"] < 2 * MIB  # type: ignore[operator]
            assert tree(place) == files(record.digest)
            put(store, content(MIB // 2, 3))

    def test_a_disk_without_inodes(self, home: Path) -> None:
        with mounted_tmpfs(home / "small", "2m,nr_inodes=20") as place:
            store = Store(place / "state")
            store.prepare()
            held = set()

            def fill() -> None:
                for each in range(20):
                    held.add(put(store, bytes([each])).digest)

            with pytest.raises(LimitExceeded, match="disk"):
                fill()
            assert held
            assert tree(place) == files(*held)


def refused(work: Callable[[], object], limit: str, maximum: int) -> None:
    with pytest.raises(LimitExceeded, match=limit) as raised:
        work()
    assert raised.value.parameters["maximum"] == maximum


@contextlib.contextmanager
def mounted_tmpfs(path: Path, options: str) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=755,size={options}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


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


class TestSweep:
    def test_what_belongs_to_nothing_is_removed(self, home: Path, store: Store) -> None:
        record = put(store, content(5000))
        state = home / "state"
        hexes = [digest_of(bytes([each]))[7:] for each in range(3)]
        (state / "images/sha256" / hexes[0]).write_bytes(b"image without a record")
        (state / "records/sha256" / f"{hexes[1]}.json").write_bytes(b"record without an image")
        (state / "images/sha256" / hexes[2]).write_bytes(b"image with a record that cannot be read")
        (state / "records/sha256" / f"{hexes[2]}.json").write_bytes(b"{")
        (state / "incoming/77.1000.0123456789abcdef0123456789abcdef").write_bytes(b"x")
        (state / "incoming/record.0123").write_bytes(b"x")
        (state / "images/sha256/README").write_bytes(b"an administrator's, and in nobody's way")
        for sweep in (store.prepare, store.collect_garbage):
            sweep()
            assert tree(home) == files(record.digest) | {"images/sha256/README"}

    def test_what_is_being_copied_stays(self, home: Path, store: Store) -> None:
        data = content(2 * MIB)
        with opened(data) as fd:
            steps = store.adding(fd, len(data), USER)
            next(steps)
            before = tree(home)
            assert len(before) == 1
            store.prepare()
            assert store.collect_garbage(maximum_age=0).removed == ()
            assert tree(home) == before
            list(steps)
        assert tree(home) == files(digest_of(data))

    def test_old_ones_are_removed_and_others_not(self, home: Path, store: Store) -> None:
        old, new = put(store, b"old"), put(store, b"new", OTHER)
        age(home, old.digest)
        assert store.collect_garbage(maximum_age=3600).removed == (old.digest,)
        assert store.collect_garbage(maximum_age=3600).removed == ()
        assert tree(home) == files(new.digest)
        assert store.collect_garbage(by_uid=USER.uid, maximum_age=0).removed == ()
        both = put(store, b"new", USER)
        assert store.collect_garbage(by_uid=OTHER.uid, maximum_age=0).removed == ()
        collected = store.collect_garbage(maximum_age=0)
        assert (collected.removed, collected.freed, collected.in_use) == ((both.digest,), 3, ())

    def test_a_look_up_is_a_use(self, home: Path, store: Store) -> None:
        record = put(store, b"old")
        age(home, record.digest)
        store.lookup(record.digest)[0].close()
        assert store.collect_garbage(maximum_age=3600).removed == ()


def age(home: Path, digest: str) -> None:
    """Make an image one that was imported, and used last, a day ago."""
    path = home / "state/images/sha256" / digest[7:]
    yesterday = int(time.time()) - 86400
    os.utime(path, (yesterday, yesterday))
    record = home / "state/records/sha256" / f"{digest[7:]}.json"
    made = Store(home / "state").record(digest)
    record.chmod(0o600)
    record.write_bytes(serialise(replace(made, created=yesterday)))
    record.chmod(0o400)


class TestInUse:
    """What is mounted is never removed, however it is mounted."""

    @pytest.fixture
    def erofs(self, store: Store, images: dict[str, Path]) -> Record:
        return put(store, images["erofs"].read_bytes())

    @pytest.fixture
    def ext4(self, store: Store, images: dict[str, Path]) -> Record:
        return put(store, images["ext4"].read_bytes())

    def stays(self, home: Path, store: Store, record: Record) -> None:
        age(home, record.digest)
        with pytest.raises(InUse):
            store.remove(record.digest, 0)
        with pytest.raises(InUse):
            store.remove(record.digest, USER.uid)
        assert store.collect_garbage(maximum_age=0).in_use == (record.digest,)
        # Nor as an image that has lost its record.
        path = home / "state/records/sha256" / f"{record.digest[7:]}.json"
        kept = path.read_bytes()
        path.unlink()
        store.prepare()
        assert (home / "state/images/sha256" / record.digest[7:]).exists()
        path.write_bytes(kept)
        path.chmod(0o400)

    def goes(self, home: Path, store: Store, record: Record) -> None:
        deadline = time.monotonic() + 5
        while True:  # the kernel drops a superblock and a loop device a little later
            try:
                store.remove(record.digest, USER.uid)
                break
            except InUse:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert tree(home) == set()

    @pytest.mark.parametrize("attached", [True, False])
    def test_a_file_backed_mount(self, home: Path, store: Store, erofs: Record, attached: bool) -> None:
        fd, _ = store.lookup(erofs.digest)
        with fd:
            mount = superblock("erofs", f"/proc/self/fd/{fd.fileno()}")
        self.use(mount, attached, home, store, erofs)

    @pytest.mark.parametrize("attached", [True, False])
    def test_a_mount_of_a_loop_device(self, home: Path, store: Store, ext4: Record, attached: bool) -> None:
        fd, _ = store.lookup(ext4.digest)
        with fd:
            loop = loop_device.attach(fd.fileno(), read_only=True)
        mount = superblock("ext4", loop.path, "noload")
        loop.close()
        self.use(mount, attached, home, store, ext4)

    def use(self, mount: OwnedFd, attached: bool, home: Path, store: Store, record: Record) -> None:
        if attached:
            target = home / "target"
            target.mkdir()
            flags = MoveMount.F_EMPTY_PATH
            mount_api.move_mount(mount.fileno(), str(target), flags=flags)
            mount.close()
            try:
                self.stays(home, store, record)
                assert (target / "hello").read_text() == "hello from the image\n"
            finally:
                mount_api.umount(str(target), Unmount.DETACH)
        else:
            with mount:
                self.stays(home, store, record)
        self.goes(home, store, record)

    def test_a_loop_device_alone(self, home: Path, store: Store, ext4: Record) -> None:
        fd, _ = store.lookup(ext4.digest)
        with fd:
            loop = loop_device.attach(fd.fileno(), read_only=True)
        self.stays(home, store, ext4)
        loop.close()
        self.goes(home, store, ext4)

    def test_an_open_file(self, home: Path, store: Store, erofs: Record) -> None:
        fd, _ = store.lookup(erofs.digest)
        with fd:
            self.stays(home, store, erofs)
        self.goes(home, store, erofs)

    def test_a_look_up_waits_for_a_removal(self, home: Path, store: Store, erofs: Record) -> None:
        """It neither ends the process that holds the lease (SIGIO) nor fails."""
        path = home / "state/images/sha256" / erofs.digest[7:]
        with OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
            looked = 0
            with only_opener(fd.fileno()) as alone:
                assert alone
                looked = os.fork()
                if looked == 0:
                    code = 1
                    try:
                        store.lookup(erofs.digest)[0].close()
                        code = 0
                    finally:
                        os._exit(code)
                time.sleep(0.1)
            assert os.waitstatus_to_exitcode(os.waitpid(looked, 0)[1]) == 0

    def test_where_there_are_no_leases_nothing_is_removed(
        self, home: Path, store: Store, erofs: Record
    ) -> None:
        subprocess.run(["sysctl", "-qw", "fs.leases-enable=0"], check=True)
        try:
            self.stays(home, store, erofs)
        finally:
            subprocess.run(["sysctl", "-qw", "fs.leases-enable=1"], check=True)
        self.goes(home, store, erofs)


def superblock(type: str, source: str, *flags: str) -> OwnedFd:
    context = FsContext.open(type)
    try:
        context.set_string("source", source)
        for flag in ("ro", *flags):
            context.set_flag(flag)
        context.create()
        return context.mount(MountAttr.RDONLY)
    finally:
        context.close()


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


def incoming(home: Path) -> list[str]:
    return sorted(os.listdir(home / "state/incoming"))


def leave_workspace(home: Path) -> Path:
    """What a pull leaves that was killed."""
    left = home / "state/incoming/pull.0123456789abcdef0123456789abcdef"
    (left / "fetch/image").mkdir(parents=True)
    left.chmod(0o700)
    (left / "fetch").chmod(0o700)
    (left / "fetch/image/blob").write_bytes(b"x")
    (left / "fetch/outside").symlink_to(home)
    (left / "layer-0.erofs").write_bytes(b"x")
    os.chown(left / "fetch", 996, 996)
    return left


def test_a_workspace_is_there_as_long_as_it_is_used(store: Store, home: Path) -> None:
    with store.workspace() as directory:
        (name,) = incoming(home)
        assert stat.S_IMODE(os.fstat(directory).st_mode) == 0o700
        os.mkdir("fetch", dir_fd=directory)
        # Whoever sweeps meanwhile leaves it alone.
        store.prepare()
        store.collect_garbage()
        put(store, b"something else")
        assert incoming(home) == [name]
        assert os.listdir(directory) == ["fetch"]
    assert incoming(home) == []


def test_a_workspace_goes_with_what_fails_in_it(store: Store, home: Path) -> None:
    def fail() -> None:
        with store.workspace() as directory:
            os.mkdir("fetch", dir_fd=directory)
            raise InvalidImage("it is bad")

    with pytest.raises(InvalidImage):
        fail()
    assert incoming(home) == []


@pytest.mark.parametrize("way", ["prepare", "collect", "add", "workspace"])
def test_what_a_killed_pull_has_left_is_swept(store: Store, home: Path, way: str) -> None:
    leave_workspace(home)
    if way == "workspace":
        with store.workspace() as directory:
            assert os.listdir(directory) == []
    else:
        {"prepare": store.prepare, "collect": store.collect_garbage, "add": lambda: put(store, b"x")}[way]()
    assert incoming(home) == []
    assert (home / "state").is_dir()


def test_who_may_not_remove_what_a_pull_has_left_works_all_the_same(store: Store, home: Path) -> None:
    left = leave_workspace(home)
    script = (
        "import sys; from pathlib import Path; from mountd.store.store import Store;"
        " store = Store(Path(sys.argv[1])); store.prepare(); print(store.collect_garbage().freed)"
    )
    capabilities = "-dac_override,-dac_read_search"
    confined = ["setpriv", f"--bounding-set={capabilities}", f"--inh-caps={capabilities}"]
    done = subprocess.run(
        [*confined, sys.executable, "-c", script, str(home / "state")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "0\n"
    assert left.exists()
    store.prepare()
    assert not left.exists()


def test_a_slot_serves_for_the_transfers_within_it(home: Path) -> None:
    store = limited(home, transfers=1)
    with store.slot(USER), opened(b"x") as fd:
        with pytest.raises(LimitExceeded):
            next(store.adding(fd, 1, ROOT))
        record = finish(store.adding(fd, 1, ROOT, within_slot=True), None)
    assert record.digest == digest_of(b"x")


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
