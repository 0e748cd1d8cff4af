"""What a caller's image descriptor is, found out without waiting for anybody.

A file on a FUSE file system whose server is silent stops whoever reads it, asks for its status or closes it.
So the descriptor is judged by what the kernel knows by itself: its flags, and a statx(2) that asks no file
system. Only then is it read.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from typing import TYPE_CHECKING

from mountd.errors import BadFileDescriptor
from mountd.kernel.flags import StatxMask
from mountd.kernel.fuse import is_fuse
from mountd.kernel.paths import fd_flags, path_hint, statx
from mountd.source.model import BackingFile

if TYPE_CHECKING:
    from mountd.kernel.abi import statx as statx_struct

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFLNK: "a symbolic link",
}
WANTED = StatxMask.BASIC_STATS | StatxMask.MNT_ID_UNIQUE
MNT_ID_UNIQUE = int(StatxMask.MNT_ID_UNIQUE)  # the operators of flags cost as much as a system call
# Flags that a descriptor to read an image from does not have, and how to say it.
REFUSED_FLAGS = (
    (os.O_PATH, "it was opened with O_PATH, which proves no access"),
    (os.O_APPEND, "it was opened with O_APPEND"),
    (os.O_DIRECT, "it was opened with O_DIRECT"),
)


def lies_on_fuse(status: statx_struct) -> bool:
    """Tell whether a file, whose status names its mount, belongs to a FUSE server."""
    major, minor = int(status.stx_dev_major), int(status.stx_dev_minor)
    if not status.stx_mask & MNT_ID_UNIQUE:
        return is_fuse(major, minor)
    return mount_is_fuse(int(status.stx_mnt_id), major, minor)


@lru_cache(maxsize=64)
def mount_is_fuse(_mount: int, major: int, minor: int) -> bool:
    """As `is_fuse`, for a file in a mount, which stays on its file system; its id is never another's."""
    return is_fuse(major, minor)


def inspect_descriptor(fd: int, parameter: str) -> BackingFile:
    """Return what is known about the image descriptor `fd`, borrowed, that the field `parameter` named.

    Raises BadFileDescriptor for all but a regular file, open for reading, on a file system that cannot make
    mountd wait, and SyscallError.
    """
    flags = fd_flags(fd)
    for flag, reason in REFUSED_FLAGS:
        if flags & flag:
            raise BadFileDescriptor(parameter, reason)
    status = statx(fd, "", WANTED, sync=False)
    kind = stat.S_IFMT(status.stx_mode)
    if kind != stat.S_IFREG:
        raise BadFileDescriptor(parameter, f"it is {KINDS.get(kind, 'no file')}, not a regular file")
    if flags & os.O_ACCMODE not in (os.O_RDONLY, os.O_RDWR):
        raise BadFileDescriptor(parameter, "it is not open for reading")
    if lies_on_fuse(status):
        raise BadFileDescriptor(
            parameter, "it lies on a FUSE file system, whose server could change the image or stop mountd"
        )
    return BackingFile(
        size=int(status.stx_size),
        dev=os.makedev(status.stx_dev_major, status.stx_dev_minor),
        ino=int(status.stx_ino),
        uid=int(status.stx_uid),
        gid=int(status.stx_gid),
        mode=int(status.stx_mode),
        writable=flags & os.O_ACCMODE == os.O_RDWR,
        path_hint=path_hint(fd),
        changed=int(status.stx_ctime.tv_sec) * 1_000_000_000 + int(status.stx_ctime.tv_nsec),
    )
