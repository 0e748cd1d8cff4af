"""Paths and what they name: openat2(2), statx(2), fstatfs(2), F_GETFL."""

import ctypes
import fcntl
import os

from mountd.fds import OwnedFd
from mountd.kernel.abi import open_how
from mountd.kernel.abi import statfs as statfs_struct
from mountd.kernel.abi import statx as statx_struct
from mountd.kernel.flags import AtFlags, Resolve, StatxMask
from mountd.kernel.libc import call
from mountd.kernel.mount_api import path_bytes

STATX_ATTR_MOUNT_ROOT = 0x2000  # linux/stat.h: the root of a mount, in stx_attributes
_NO_LINKS = AtFlags.SYMLINK_NOFOLLOW | AtFlags.NO_AUTOMOUNT
# By whether there is a path, and whether the file system is asked.
STATX_FLAGS = {
    (True, True): _NO_LINKS,
    (True, False): _NO_LINKS | AtFlags.STATX_DONT_SYNC,
    (False, True): _NO_LINKS | AtFlags.EMPTY_PATH,
    (False, False): _NO_LINKS | AtFlags.EMPTY_PATH | AtFlags.STATX_DONT_SYNC,
}


def openat2(dir_fd: int, path: "str | bytes", flags: int, resolve: Resolve, mode: int = 0) -> OwnedFd:
    """Open `path` below `dir_fd` under the rules of `resolve`, close-on-exec.

    Raises SyscallError: ELOOP for a link that `resolve` forbids, EXDEV for leaving where it may not.
    """
    how = open_how(flags | os.O_CLOEXEC, mode, resolve)
    return OwnedFd(call("openat2", dir_fd, path_bytes(path), ctypes.byref(how), ctypes.sizeof(how)))


def statx(
    dir_fd: int, path: "str | bytes", mask: StatxMask = StatxMask.BASIC_STATS, *, sync: bool = True
) -> statx_struct:
    """Return the status of `path` below `dir_fd`, of `dir_fd` itself for "". Links are not followed.

    With `sync` false no file system is asked anything: what FUSE or a network last said is good enough, and
    a silent server cannot hold the caller up.
    """
    result = statx_struct()
    call("statx", dir_fd, path_bytes(path), STATX_FLAGS[bool(path), sync], mask, ctypes.byref(result))
    return result


def fd_flags(fd: int) -> int:
    """Return the status flags and access mode of `fd` (F_GETFL)."""
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def file_system_magic(fd: int) -> int:
    """Return what kind of file system `fd` lies on, as a number of linux/magic.h (fstatfs(2)).

    A file system with a server asks it first, and waits; the number is the kernel's all the same.
    """
    result = statfs_struct()
    call("fstatfs", fd, ctypes.byref(result))
    return int(result.f_type)


def path_hint(fd: int) -> "str | None":
    """Return what /proc says `fd` was opened as: a hint for messages and for a search, never proof."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return None
