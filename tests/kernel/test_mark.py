"""Marks on mounts: each is there for exactly as long as its mount."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.errors import SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import libc, mark, mount_api, namespaces
from mountd.kernel.flags import Clone, MountAttr, Propagation
from mountd.kernel.fs_context import FsContext
from tests.container import forked


@pytest.fixture
def marks() -> Iterator[OwnedFd]:
    found = mark.create()
    assert found is not None
    with found:
        yield found


def new_mount(mode: str = "0755") -> OwnedFd:
    with FsContext.open("tmpfs") as context:
        context.set_string("mode", mode)
        context.create()
        return context.mount(MountAttr(0))


def test_with_the_last_descriptor(marks: OwnedFd) -> None:
    with new_mount() as one, new_mount() as two:
        numbers = {mark.mark(marks.fileno(), each.fileno()) for each in (one, two)}
        assert len(numbers) == 2
        assert mark.marked(marks.fileno()) == numbers
        one.close()
        assert len(mark.marked(marks.fileno())) == 1
    assert mark.marked(marks.fileno()) == set()


def test_on_its_way_between_two_sockets(marks: OwnedFd) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with new_mount() as mount:
            number = mark.mark(marks.fileno(), mount.fileno())
            socket.send_fds(ours, [b"x"], [mount.fileno()])
        assert mark.marked(marks.fileno()) == {number}
    assert mark.marked(marks.fileno()) == set()


def test_attached_and_copied(marks: OwnedFd, tmp_path: Path) -> None:
    def work() -> list[set[int]]:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with new_mount() as mount:
            number = mark.mark(marks.fileno(), mount.fileno())
            mount_api.move_mount(mount.fileno(), str(tmp_path))
        attached = mark.marked(marks.fileno())
        with mount_api.clone_mount(str(tmp_path)):
            mount_api.umount(str(tmp_path))
            return [attached ^ {number}, mark.marked(marks.fileno())]

    assert forked(work) == [set(), set()]


def test_it_is_told_nothing_and_two_are_one(marks: OwnedFd) -> None:
    with new_mount() as mount:
        assert mark.mark(marks.fileno(), mount.fileno()) == mark.mark(marks.fileno(), mount.fileno())
        os.close(os.open(f"/proc/self/fd/{mount.fileno()}", os.O_RDONLY))
        with pytest.raises(BlockingIOError):
            os.read(marks.fileno(), 4096)


def test_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch, marks: OwnedFd) -> None:
    monkeypatch.setitem(libc.inject, "fanotify_init", errno.ENOSYS)
    assert mark.create() is None
    monkeypatch.setitem(libc.inject, "fanotify_init", errno.EMFILE)
    with pytest.raises(SyscallError, match="EMFILE"):
        mark.create()
    with new_mount() as mount, pytest.raises(SyscallError, match="EBADF"):
        mark.mark(mount.fileno(), mount.fileno())


def test_what_it_is(marks: OwnedFd) -> None:
    assert mark.is_fanotify(marks.fileno())
    with new_mount() as mount:
        assert not mark.is_fanotify(mount.fileno())
    with pytest.raises(SyscallError, match="ENOENT"):
        mark.is_fanotify(10**6)
