"""Keeping a mount for those who ask for the same: for as long as it is used, and made once for all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.errors import SyscallError
from mountd.execute import shared
from mountd.execute.shared import KEPT, PLACES, SharedMounts
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, MountAttr, OpenTree, Propagation
from mountd.kernel.fs_context import FsContext
from tests.container import forked

FIRST, SECOND = "a" * 64, "b" * 64


class Kept:
    """A directory of kept mounts as the workers have it, in a mount namespace of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        # As in the daemon, it is a file system by itself.
        directory.mkdir(exist_ok=True)
        with labelled("staging") as staging:
            mount_api.move_mount(staging.fileno(), str(directory))
        shared.prepare(str(directory))

    def worker(self, seconds: float = 60.0) -> SharedMounts:
        return SharedMounts(str(self.directory), seconds, mount_api.clone_mount)

    def file(self, name: str) -> Path:
        return self.directory / shared.NAMES / name

    def names(self) -> list[str]:
        return sorted(os.listdir(self.directory / shared.NAMES))

    def places(self) -> list[str]:
        return sorted(name for name in os.listdir(self.directory) if name not in (shared.NAMES, "staging"))

    def mounts(self) -> int:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        return table.count(f" {self.directory}/")

    def age(self, name: str, seconds: float) -> None:
        """Have it be used last so many seconds ago."""
        then = time.monotonic_ns() - int(seconds * 1e9)
        os.utime(self.file(name), ns=(then, then))

    def is_empty(self) -> bool:
        return (self.names(), self.places(), self.mounts()) == ([], [], 0)


def labelled(label: str) -> OwnedFd:
    """A new mount with a file of this name in it."""
    with FsContext.open("tmpfs") as context:
        context.create()
        mount = context.mount(MountAttr(0))
    os.close(os.open(label, os.O_CREAT | os.O_WRONLY, dir_fd=mount.fileno()))
    return mount


def keep(worker: SharedMounts, name: str, label: str) -> bool:
    """Have `worker` keep a new mount, and tell whether it did."""
    with labelled(label) as mount, worker.making(name):
        kept = worker.keep(name, mount)
    if kept is None:
        return False
    kept.close()
    return True


def found(worker: SharedMounts, name: str) -> list[str] | None:
    mount = worker.find(name)
    if mount is None:
        return None
    with mount:
        return os.listdir(f"/proc/self/fd/{mount.fileno()}")


def in_a_namespace(scratch: Path, work: Callable[[Kept], None]) -> None:
    forked(lambda: work(Kept(scratch / "shared")))


def test_any_worker_finds_what_one_has_kept(scratch: Path) -> None:
    def work(kept: Kept) -> None:
        one, other = kept.worker(), kept.worker()
        assert found(other, FIRST) is None
        assert keep(one, FIRST, "first")
        assert [found(each, FIRST) for each in (one, other)] == [["first"]] * 2
        assert found(other, SECOND) is None
        one.give_up_all()
        assert found(other, FIRST) is None
        assert kept.is_empty()

    in_a_namespace(scratch, work)


def test_what_is_used_stays_and_the_rest_goes(scratch: Path) -> None:
    """Whichever worker looks, and whether or not the one is there that has made it."""

    def work(kept: Kept) -> None:
        one, other = kept.worker(), kept.worker()
        for name in (FIRST, SECOND):
            assert keep(one, name, "it")
            kept.age(name, 61)
        due = other.due()
        assert due.keys() == {FIRST, SECOND}
        assert all(len(each) == 1 for each in due.values())  # st_dev is that of the superblock
        assert not set.intersection(*due.values())
        other.settle(due, [FIRST])
        assert (kept.names(), kept.places(), kept.mounts()) == ([FIRST], [FIRST], 1)
        assert found(one, FIRST) == ["it"]
        # It counts as used just now, by all of them.
        assert kept.worker().due() == {}
        assert 0 < (other.seconds_left() or 0) <= 60
        kept.age(FIRST, 61)
        late = kept.worker()
        late.settle(late.due(), [])
        assert kept.is_empty()

    in_a_namespace(scratch, work)


def test_what_is_asked_for_while_somebody_looks(scratch: Path) -> None:
    """It is not taken away, though it was found to be in no use."""

    def work(kept: Kept) -> None:
        one, other = kept.worker(), kept.worker()
        assert keep(one, FIRST, "first")
        kept.age(FIRST, 61)
        due = other.due()
        assert found(one, FIRST) == ["first"]
        other.settle(due, [])
        assert found(one, FIRST) == ["first"]
        one.give_up_all()

    in_a_namespace(scratch, work)


def test_how_often_is_looked(scratch: Path) -> None:
    """Each looks when what it keeps may be due, or now and then for what others have left."""

    def work(kept: Kept) -> None:
        one, other = kept.worker(0.5), kept.worker(0.5)
        assert [each.due() for each in (one, other)] == [{}, {}]
        assert all((each.seconds_left() or 0) > 50 for each in (one, other))
        assert keep(one, FIRST, "first")
        assert (one.seconds_left() or 1) <= 0.5
        assert (other.seconds_left() or 0) > 50
        assert one.due() == {}
        time.sleep(one.seconds_left() or 0)
        due = one.due()
        assert list(due) == [FIRST]
        one.settle(due, [FIRST])
        assert (one.seconds_left() or 1) <= 0.5
        one.give_up_all()
        assert kept.worker(0).seconds_left() is None

    in_a_namespace(scratch, work)


def test_who_asks_at_the_same_moment_waits_for_who_makes_it(scratch: Path) -> None:
    def work(kept: Kept) -> None:
        read, write = os.pipe()

        def make() -> None:
            worker = kept.worker()
            with worker.making(FIRST), labelled("first") as mount:
                os.write(write, b"x")
                time.sleep(0.2)
                made = worker.keep(FIRST, mount)
                assert made is not None
                made.close()

        pid = os.fork()
        if pid == 0:
            try:
                make()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.read(read, 1) == b"x"
        worker = kept.worker()
        assert found(worker, FIRST) is None
        with worker.making(FIRST):
            assert found(worker, FIRST) == ["first"]
        assert os.waitpid(pid, 0)[1] == 0
        worker.give_up_all()
        assert kept.is_empty()

    in_a_namespace(scratch, work)


@pytest.mark.parametrize("how", ["killed", "hanging"])
def test_who_makes_it_may_never_come_back(scratch: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed one is not waited for, one that hangs not for long; then nobody else gets what is made."""
    monkeypatch.setattr(shared, "PATIENCE", 0.3)

    def work(kept: Kept) -> None:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            with kept.worker().making(FIRST):
                os.write(write, b"x")
                signal.pause()
        assert os.read(read, 1) == b"x"
        if how == "killed":
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        worker = kept.worker()
        assert keep(worker, FIRST, "first") is (how == "killed")
        # Nor is it taken away by others meanwhile.
        kept.age(FIRST, 61)
        worker.settle([FIRST], [])
        assert kept.names() == ([FIRST] if how == "hanging" else [])
        if how == "hanging":
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        worker.give_up_all()
        assert kept.is_empty()

    in_a_namespace(scratch, work)


@pytest.mark.parametrize("left", ["file", "file and place", "place", "mount"])
def test_what_a_killed_one_leaves_hinders_nobody(scratch: Path, left: str) -> None:
    """At any moment of making it; and it goes when it is looked at."""

    def leave(kept: Kept) -> None:
        if "file" in left or left == "mount":
            kept.file(FIRST).touch()  # with the time of another clock
        if "place" in left or left == "mount":
            (kept.directory / FIRST).mkdir()
        if left == "mount":
            with labelled("first") as mount:
                mount_api.move_mount(mount.fileno(), str(kept.directory / FIRST))

    def work(kept: Kept) -> None:
        leave(kept)
        worker = kept.worker()
        assert found(worker, FIRST) == (["first"] if left == "mount" else None)
        if left != "mount":
            assert keep(worker, FIRST, "first")
            assert found(worker, FIRST) == ["first"]
            worker.give_up_all()
            assert kept.is_empty()
        if left == "place":
            return  # nobody looks for it without its file, and it is nobody's either
        if left != "mount":
            leave(kept)
        else:
            kept.file(FIRST).touch()
        late = kept.worker()
        late.settle(late.due(), [])
        assert kept.is_empty()

    in_a_namespace(scratch, work)


def test_as_many_as_there_is_room_for(scratch: Path) -> None:
    """Of those that nobody uses, only the latest stay."""

    def work(kept: Kept) -> None:
        worker = kept.worker()
        for number in range(PLACES):
            assert keep(worker, f"{number:064}", "it")
            kept.age(f"{number:064}", (PLACES - number) / 100)
        assert not keep(worker, SECOND, "one too many")
        assert found(worker, SECOND) is None
        assert worker.seconds_left() == 0
        due = worker.due()
        used = [f"{0:064}", f"{1:064}"]
        worker.settle(due, used)
        # And SECOND is only a name, of what was made just now.
        assert abs(len(kept.places()) - KEPT - len(used)) <= 1
        assert [found(worker, name) for name in used] == [["it"]] * 2
        assert found(worker, f"{PLACES - 1:064}") == ["it"]
        assert keep(worker, SECOND, "it")
        worker.give_up_all()
        assert kept.is_empty()

    in_a_namespace(scratch, work)


def test_what_is_taken_away_while_it_is_cloned(scratch: Path) -> None:
    """The kernel has found the mount by then, and does not clone what is not attached any more."""

    def work(kept: Kept) -> None:
        one = kept.worker()
        assert keep(one, FIRST, "first")

        def late(place: str) -> OwnedFd:
            with mount_api.open_tree(-100, place, OpenTree(0)) as seen:
                one.give_up_all()
                return mount_api.open_tree(seen.fileno(), "", OpenTree.CLONE | OpenTree.EMPTY_PATH)

        with pytest.raises(SyscallError, match="EINVAL"):
            late(str(kept.directory / FIRST))
        assert keep(one, FIRST, "first")
        assert kept.worker().find(FIRST, late) is None

    in_a_namespace(scratch, work)


def test_nothing_is_kept_where_none_is_to_be(scratch: Path) -> None:
    def work(kept: Kept) -> None:
        assert not keep(kept.worker(0), FIRST, "first")
        assert found(kept.worker(0), FIRST) is None
        assert kept.is_empty()

    in_a_namespace(scratch, work)


def test_what_nobody_says_that_he_makes_is_not_kept(scratch: Path) -> None:
    def work(kept: Kept) -> None:
        worker = kept.worker()
        with labelled("first") as mount, worker.making(SECOND):
            assert worker.keep(FIRST, mount) is None
        assert found(worker, FIRST) is None
        worker.give_up_all()
        assert kept.is_empty()

    in_a_namespace(scratch, work)
