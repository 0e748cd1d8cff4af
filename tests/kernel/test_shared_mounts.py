"""Keeping a mount for those who ask for the same, and what is left of a worker that was killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.execute import shared
from mountd.execute.shared import PLACES, SharedMounts
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, MountAttr, Propagation
from mountd.kernel.fs_context import FsContext
from tests.container import forked

WORKERS = 3
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
        shared.prepare(str(directory), WORKERS)

    def worker(self, number: int, seconds: float = 60.0) -> SharedMounts:
        return SharedMounts(str(self.directory), number, seconds, mount_api.clone_mount)

    def clean(self, number: int) -> None:
        shared.clean(str(self.directory), number)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.directory / shared.NAMES))

    def places(self, number: int) -> list[str]:
        return sorted(os.listdir(self.directory / str(number)))

    def mounts(self) -> int:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        return table.count(f" {self.directory}/")


def labelled(label: str) -> OwnedFd:
    """A new mount with a file of this name in it."""
    with FsContext.open("tmpfs") as context:
        context.create()
        mount = context.mount(MountAttr(0))
    os.close(os.open(label, os.O_CREAT | os.O_WRONLY, dir_fd=mount.fileno()))
    return mount


def keep(worker: SharedMounts, name: str, label: str) -> bool:
    """Have `worker` keep a new mount, and tell whether it did."""
    with labelled(label) as mount:
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
        one, other = kept.worker(0), kept.worker(1)
        assert found(other, FIRST) is None
        assert keep(one, FIRST, "first")
        assert [found(each, FIRST) for each in (one, other)] == [["first"]] * 2
        assert found(other, SECOND) is None
        one.expire(0)
        assert found(other, FIRST) is None
        assert (kept.names(), kept.places(0), kept.mounts()) == ([], [], 0)

    in_a_namespace(scratch, work)


def test_the_next_worker_keeps_something_else(scratch: Path) -> None:
    """What a killed worker has called by one name is not to be found by that once there is another image."""

    def work(kept: Kept) -> None:
        assert keep(kept.worker(0), FIRST, "first")
        kept.clean(0)
        assert (kept.names(), kept.places(0), kept.mounts()) == ([], [], 0)
        assert keep(kept.worker(0), SECOND, "second")
        assert found(kept.worker(1), FIRST) is None
        assert found(kept.worker(1), SECOND) == ["second"]

    in_a_namespace(scratch, work)


@pytest.mark.parametrize("cleaned", [True, False], ids=["cleaned", "not cleaned"])
def test_a_link_that_is_left_leads_to_nothing_else(scratch: Path, cleaned: bool) -> None:
    """Even where the link itself stays: whoever follows it may have read it long before."""

    def work(kept: Kept) -> None:
        assert keep(kept.worker(0), FIRST, "first")
        link = kept.directory / shared.NAMES / FIRST
        stale = os.readlink(link)
        if cleaned:
            kept.clean(0)
            os.symlink(stale, link)
        next = kept.worker(0)
        for number in range(PLACES):
            assert keep(next, f"{number:064}", "second")
        assert found(kept.worker(1), FIRST) == (None if cleaned else ["first"])
        assert not keep(next, SECOND, "one too many")

    in_a_namespace(scratch, work)


def test_what_was_expired_while_its_link_was_followed(scratch: Path) -> None:
    def work(kept: Kept) -> None:
        one = kept.worker(0)
        assert keep(one, FIRST, "first")
        link = kept.directory / shared.NAMES / FIRST
        stale = os.readlink(link)
        one.expire(0)
        assert keep(one, SECOND, "second")
        os.symlink(stale, link)
        assert found(kept.worker(1), FIRST) is None
        (kept.directory / "0" / FIRST).mkdir()  # made, and nothing is there yet
        assert found(kept.worker(1), FIRST) is None

    in_a_namespace(scratch, work)


def test_two_workers_keep_the_same(scratch: Path) -> None:
    """The later one is found; the earlier one goes by itself, and takes nothing of the other's."""

    def work(kept: Kept) -> None:
        one, other = kept.worker(0), kept.worker(1)
        assert keep(one, FIRST, "earlier")
        assert keep(other, FIRST, "later")
        assert found(kept.worker(2), FIRST) == ["later"]
        assert not keep(one, FIRST, "once more")
        one.expire()
        assert kept.places(0) == []
        assert found(kept.worker(2), FIRST) == ["later"]
        assert keep(one, FIRST, "once more")
        assert found(kept.worker(2), FIRST) == ["once more"]
        kept.clean(1)
        assert found(kept.worker(2), FIRST) == ["once more"]
        one.expire(0)
        assert (kept.names(), kept.mounts()) == ([], 0)

    in_a_namespace(scratch, work)


def test_the_next_worker_is_not_hindered_by_what_is_left(scratch: Path) -> None:
    """Of a worker that could not be cleaned up after."""

    def work(kept: Kept) -> None:
        assert keep(kept.worker(0), FIRST, "first")
        os.symlink(f"../0/{FIRST}", kept.directory / shared.NAMES / f"{FIRST}.0")
        next = kept.worker(0)
        assert keep(next, FIRST, "the same again")
        assert kept.names() == [FIRST]
        assert kept.mounts() == 2
        next.expire(0)
        assert (kept.names(), kept.places(0), kept.mounts()) == ([], [], 0)

    in_a_namespace(scratch, work)


def test_nothing_is_kept_where_none_is_to_be(scratch: Path) -> None:
    def work(kept: Kept) -> None:
        assert not keep(kept.worker(0, 0), FIRST, "first")
        assert found(kept.worker(0, 0), FIRST) is None
        assert (kept.names(), kept.places(0), kept.mounts()) == ([], [], 0)

    in_a_namespace(scratch, work)
