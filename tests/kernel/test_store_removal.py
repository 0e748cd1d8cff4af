"""What is swept from the store, and what is mounted and therefore never removed."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mountd.errors import InUse, InvalidImage, LimitExceeded, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import loop_device, mount_api
from mountd.kernel.flags import MountAttr, MoveMount, Unmount
from mountd.kernel.fs_context import FsContext
from mountd.kernel.lease import only_opener
from mountd.store.record import Record
from mountd.store.store import Store
from tests.leases import without_leases
from tests.store import MIB, OTHER, USER, age, content, digest_of, files, opened, put, tree


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
        self, home: Path, store: Store, erofs: Record, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            without_leases(patch)
            self.stays(home, store, erofs)
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


def test_what_fails_in_a_workspace_is_the_store_s_where_it_is(store: Store) -> None:
    """A process that cannot be made has nothing to do with the disk."""
    kinds = {errno.EAGAIN: BlockingIOError, errno.EIO: SyscallError, errno.ENOSPC: LimitExceeded}
    for number, kind in kinds.items():
        with pytest.raises(kind), store.workspace():
            raise OSError(number, "work")


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
