"""The mount system calls against the running kernel."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import compat, libc, mount_api, mount_info, namespaces
from mountd.kernel.flags import (
    Clone,
    FsPick,
    MountAttr,
    MoveMount,
    OpenTree,
    Propagation,
    Resolve,
    StatxMask,
)
from mountd.kernel.fs_context import FsContext
from mountd.kernel.loop_device import attach
from mountd.kernel.numbers import AT_FDCWD
from mountd.kernel.paths import openat2, statx
from tests.process import in_child

LOCKED = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV


def mount_erofs(image: Path) -> OwnedFd:
    with FsContext.open("erofs") as context:
        context.set_string("source", str(image))
        context.set_flag("ro")
        context.create()
        return context.mount(LOCKED)


def read(mount: int, name: str) -> str:
    fd = os.open(name, os.O_RDONLY, dir_fd=mount)
    with os.fdopen(fd) as file:
        return file.read()


def test_detached_mount_of_an_image(images: dict[str, Path]) -> None:
    with mount_erofs(images["erofs"]) as mount:
        assert read(mount.fileno(), "hello") == "hello from the image\n"
        assert not os.get_inheritable(mount.fileno())


@pytest.mark.parametrize("type", ["erofs", "squashfs", "ext4", "xfs", "btrfs"])
def test_through_a_loop_device_that_frees_itself(images: dict[str, Path], type: str) -> None:
    with OwnedFd(os.open(images[type], os.O_RDONLY)) as backing:
        loop = attach(backing.fileno(), read_only=True)
    with FsContext.open(type) as context:
        context.set_string("source", loop.path)
        context.set_flag("ro")
        context.create()
        loop.close()
        with context.mount(LOCKED) as mount:
            assert read(mount.fileno(), "hello") == "hello from the image\n"


def test_loop_window(images: dict[str, Path], scratch: Path) -> None:
    inner = images["squashfs"].read_bytes()
    outer = scratch / "window.img"
    outer.write_bytes(b"\0" * 4096 + inner + b"\1" * 4096)
    with OwnedFd(os.open(outer, os.O_RDONLY)) as backing:
        loop = attach(backing.fileno(), read_only=True, offset=4096, size_limit=len(inner))
    size = os.lseek(loop.fd.fileno(), 0, os.SEEK_END)
    loop.close()
    outer.unlink()
    assert size == len(inner)


def test_failure_carries_the_call_and_the_kernels_words(images: dict[str, Path]) -> None:
    with FsContext.open("erofs") as context:
        context.set_string("source", str(images["squashfs"]))
        with pytest.raises(SyscallError) as caught:
            context.create()
    assert caught.value.call.startswith("fsconfig(")
    assert "CMD_CREATE" in caught.value.call
    assert caught.value.errno_name == "EINVAL"


def test_unknown_option_is_named(images: dict[str, Path]) -> None:
    with FsContext.open("erofs") as context, pytest.raises(SyscallError) as caught:
        context.set_string("no-such-option", "value")
    assert caught.value.call.endswith('SET_STRING, "no-such-option", "value", 0)')
    assert "no-such-option" in " ".join(caught.value.log)


def test_unknown_bits_never_reach_the_kernel() -> None:
    with pytest.raises(ValueError, match="MountAttr"):
        MountAttr(0x400000)
    with pytest.raises(ValueError, match="NUL"):
        FsContext.open("ero\0fs")


def test_attach_clone_attributes_and_ids(images: dict[str, Path], scratch: Path) -> None:
    target = scratch / "attach"
    target.mkdir()

    def work() -> None:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with mount_erofs(images["erofs"]) as mount:
            first = mount_info.mount_id(mount.fileno())
            assert compat.any_mount_id(mount.fileno()) == first
            mount_api.move_mount(mount.fileno(), str(target))
            info = mount_info.statmount(first)
            assert info.fs_type == "erofs"
            assert info.attributes & LOCKED == LOCKED
            assert first in mount_info.listmount()
            mount_api.mount_setattr(mount.fileno(), clear=MountAttr.NODEV)
            assert not mount_info.statmount(first).attributes & MountAttr.NODEV
        with mount_api.clone_mount(str(target)) as copy:
            assert mount_info.mount_id(copy.fileno()) != first
            assert read(copy.fileno(), "hello")
        fd = os.open(target, os.O_PATH)
        with FsContext.pick("", dir_fd=fd, flags=FsPick.EMPTY_PATH) as context:
            context.reconfigure()
        os.close(fd)
        mount_api.umount(str(target))
        with pytest.raises(SyscallError) as caught:
            mount_info.statmount(first)
        assert caught.value.errno_name == "ENOENT"

    in_child(work)
    target.rmdir()


def test_idmap_shows_shifted_owners(images: dict[str, Path]) -> None:
    with mount_erofs(images["erofs"]) as mount:
        with namespaces.make_user_namespace([(0, 100000, 65536)], [(0, 100000, 65536)]) as userns:
            mount_api.mount_setattr(mount.fileno(), set=MountAttr.IDMAP, userns_fd=userns.fileno())
        assert statx(mount.fileno(), "owned").stx_uid == 101000
        assert os.stat("hello", dir_fd=mount.fileno()).st_gid == 100000


def test_open_tree_attr(images: dict[str, Path]) -> None:
    flags = OpenTree.CLONE | OpenTree.EMPTY_PATH
    with (
        mount_erofs(images["erofs"]) as mount,
        mount_api.open_tree_attr(mount.fileno(), "", flags, set=MountAttr.NOEXEC) as copy,
    ):
        assert os.fstatvfs(copy.fileno()).f_flag & os.ST_NOEXEC


def test_resolve_refuses_links(scratch: Path) -> None:
    link = scratch / "link"
    link.symlink_to("/etc/passwd")
    root = os.open(scratch, os.O_PATH)
    for resolve, number in ((Resolve.NO_SYMLINKS, errno.ELOOP), (Resolve.BENEATH, errno.EXDEV)):
        with pytest.raises(SyscallError) as caught:
            openat2(root, "link", os.O_RDONLY, resolve)
        assert caught.value.errno == number
    os.close(root)
    link.unlink()


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("fsopen", lambda: FsContext.open("erofs")),
        ("fspick", lambda: FsContext.pick("/")),
        ("open_tree", lambda: mount_api.clone_mount("/")),
        ("open_tree_attr", lambda: mount_api.open_tree_attr(AT_FDCWD, "/", OpenTree.CLONE)),
        ("move_mount", lambda: mount_api.move_mount(0, "/", flags=MoveMount.F_EMPTY_PATH)),
        ("mount_setattr", lambda: mount_api.mount_setattr(0)),
        ("openat2", lambda: openat2(AT_FDCWD, "/", os.O_PATH, Resolve.NO_SYMLINKS)),
        ("statmount", lambda: mount_info.statmount(1)),
        ("listmount", mount_info.listmount),
        ("setns", lambda: namespaces.setns(0, Clone.NEWUSER)),
        ("unshare", lambda: namespaces.unshare(Clone.NEWNS)),
        ("pidfd_open", lambda: namespaces.pidfd_open(1)),
        ("statx", lambda: statx(AT_FDCWD, "/", StatxMask.BASIC_STATS)),
    ],
)
def test_missing_system_call_is_not_supported(
    monkeypatch: pytest.MonkeyPatch, name: str, use: object
) -> None:
    monkeypatch.setitem(libc.inject, name, errno.ENOSYS)
    with pytest.raises(NotSupported, match=f"system call {name}"):
        use()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["fsconfig", "fsmount"])
def test_missing_half_of_the_mount_api(
    monkeypatch: pytest.MonkeyPatch, images: dict[str, Path], name: str
) -> None:
    monkeypatch.setitem(libc.inject, name, errno.ENOSYS)
    with pytest.raises(NotSupported, match=f"system call {name}"):
        mount_erofs(images["erofs"])


def test_what_the_driver_does_not_have_is_no_missing_call(
    monkeypatch: pytest.MonkeyPatch, images: dict[str, Path]
) -> None:
    """Such as xfs on a device whose sectors are larger than its own."""
    with FsContext.open("erofs") as context:
        context.set_string("source", str(images["erofs"]))
        monkeypatch.setitem(libc.inject, "fsconfig", errno.ENOSYS)
        with pytest.raises(SyscallError, match="CMD_CREATE, NULL, NULL") as caught:
            context.create()
        assert caught.value.errno_name == "ENOSYS"


def test_busy_loop_device_is_tried_again_and_then_said(
    monkeypatch: pytest.MonkeyPatch, images: dict[str, Path]
) -> None:
    monkeypatch.setitem(libc.inject, "ioctl LOOP_CONFIGURE", errno.EBUSY)
    with (
        OwnedFd(os.open(images["ext4"], os.O_RDONLY)) as backing,
        pytest.raises(Exception, match="at most 64 attempts to get a free loop device"),
    ):
        attach(backing.fileno(), read_only=True)
