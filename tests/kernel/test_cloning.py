"""Clones of directories: in whatever namespace they lie, on kernels with and without open_tree_attr(2)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import cloning, libc, mount_api, namespaces
from mountd.kernel.flags import Clone, MountAttr, OpenTree, Propagation
from tests.container import forked, user_namespace

FLAGS = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV
SHOWN = os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV


@pytest.fixture(params=[True, False], ids=["open_tree_attr", "older"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setitem(libc.inject, "open_tree_attr", errno.ENOSYS)
    return bool(request.param)


@pytest.fixture
def directory(scratch: Path) -> Iterator[Path]:
    path = scratch / "cloned"
    path.mkdir()
    yield path
    path.rmdir()


def cloned(fd: int, attributes: MountAttr = FLAGS) -> int:
    """Clone from a namespace of one's own what lies in the one before; return the flags of the clone."""
    with OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY)) as before:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with cloning.clone_directory(fd, attributes, before.fileno()) as made:
            assert os.path.samestat(os.fstat(made.fileno()), os.fstat(fd))
            return os.fstatvfs(made.fileno()).f_flag


def test_from_either_namespace(directory: Path, kernel: bool) -> None:
    with OwnedFd(os.open(directory, os.O_RDONLY)) as fd:
        assert forked(lambda: cloned(fd.fileno())) & SHOWN == SHOWN
        assert forked(lambda: cloned(fd.fileno(), MountAttr.NOATIME)) & os.ST_NOATIME
        with (
            OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY)) as own,
            cloning.clone_directory(fd.fileno(), FLAGS, own.fileno()) as made,
        ):
            assert os.fstatvfs(made.fileno()).f_flag & SHOWN == SHOWN


def test_an_idmap_is_left_out_or_refused(directory: Path, kernel: bool) -> None:
    with mount_api.open_tree(-100, str(directory), OpenTree.CLONE) as bind:
        with user_namespace(((0, 4242, 1),)) as userns:
            mount_api.mount_setattr(bind.fileno(), set=MountAttr.IDMAP, userns_fd=userns.fileno())
        mount_api.move_mount(bind.fileno(), str(directory))
    try:
        with (
            OwnedFd(os.open(directory, os.O_RDONLY)) as fd,
            OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY)) as own,
        ):
            assert os.fstat(fd.fileno()).st_uid == 4242
            if kernel:
                with cloning.clone_directory(fd.fileno(), FLAGS, own.fileno()) as made:
                    assert os.fstat(made.fileno()).st_uid == 0
            else:
                with pytest.raises(NotSupported):
                    cloning.clone_directory(fd.fileno(), FLAGS, own.fileno())
    finally:
        mount_api.umount(str(directory))


def test_what_lies_in_no_namespace_at_hand(directory: Path, kernel: bool) -> None:
    def work() -> str:
        with OwnedFd(os.open(directory, os.O_RDONLY)) as fd:
            namespaces.unshare(Clone.NEWNS)
            with OwnedFd(os.open("/proc/self/ns/mnt", os.O_RDONLY)) as own:
                with pytest.raises(SyscallError) as caught:
                    cloning.clone_directory(fd.fileno(), FLAGS, own.fileno())
                return caught.value.errno_name

    assert forked(work) == "EINVAL"


def test_a_parent_that_only_the_owner_may_look_up(directory: Path) -> None:
    """As the service runs: with CAP_SETUID, and without the capabilities that ignore modes."""

    def work() -> bool:
        raw = ctypes.CDLL(None, use_errno=True)
        only = 1 << 7  # CAP_SETUID
        assert raw.capset(struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", only, only, 0, 0, 0, 0)) == 0
        with cloning.open_parent(fd.fileno(), 4242) as parent:
            return os.path.samestat(os.fstat(parent.fileno()), os.stat(directory.parent))

    os.chown(directory, 4242, 4242)
    directory.chmod(0o700)
    with OwnedFd(os.open(directory, os.O_PATH)) as fd:
        assert forked(work)
