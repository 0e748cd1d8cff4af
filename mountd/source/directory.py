"""What a caller's directory descriptor is, found out without waiting for anybody.

As for an image, the descriptor is judged by what the kernel knows by itself, and a FUSE file system is
refused before it is asked anything. What is left has to be a file system that holds files: what /proc and
its like show is about the system, whoever its files seem to belong to.

A descriptor opened with O_PATH proves no access. It is taken all the same, and said to be one: whoever owns
a directory needs no other proof, and a directory of the foreign range can be opened in no other way.
"""

from __future__ import annotations

import os
import stat

from mountd.errors import BadFileDescriptor, UnsupportedFileSystem
from mountd.kernel.paths import fd_flags, file_system_magic, path_hint, statx
from mountd.source.descriptor import KINDS, WANTED, lies_on_fuse
from mountd.source.model import Directory

# The numbers of linux/magic.h, and those that bcachefs and ZFS have outside of it.
FILE_SYSTEMS = {
    0x9123683E: "btrfs",
    0xE0F5E1E2: "erofs",
    0xEF53: "ext4",  # and ext2 and ext3, which the same driver serves
    0xF2F52010: "f2fs",
    0x794C7630: "overlay",
    0x73717368: "squashfs",
    0x01021994: "tmpfs",
    0x58465342: "xfs",
    0xCA451A4E: "bcachefs",
    0x2FC12FC1: "zfs",
}
UNSIGNED = (1 << 32) - 1


def inspect_directory(fd: int, parameter: str) -> Directory:
    """Return what is known about the directory descriptor `fd`, borrowed, that `parameter` named.

    Raises BadFileDescriptor for all but a directory on a file system that cannot make mountd wait,
    UnsupportedFileSystem, SyscallError, OSError.
    """
    flags = fd_flags(fd)
    status = statx(fd, "", WANTED, sync=False)
    kind = stat.S_IFMT(status.stx_mode)
    if kind != stat.S_IFDIR:
        known = "a regular file" if kind == stat.S_IFREG else KINDS.get(kind, "no file")
        raise BadFileDescriptor(parameter, f"it is {known}, not a directory")
    if lies_on_fuse(status):
        raise BadFileDescriptor(parameter, "it lies on a FUSE file system, whose server could stop mountd")
    type = FILE_SYSTEMS.get(file_system_magic(fd) & UNSIGNED)
    if type is None:
        raise UnsupportedFileSystem(
            "directories of this file system are not mounted",
            hint=f"use one on {', '.join(sorted(FILE_SYSTEMS.values()))}",
        )
    return Directory(
        dev=os.makedev(status.stx_dev_major, status.stx_dev_minor),
        ino=int(status.stx_ino),
        mount=int(status.stx_mnt_id),
        uid=int(status.stx_uid),
        gid=int(status.stx_gid),
        opened=not flags & os.O_PATH,
        read_only=bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY),
        file_system=type,
        path_hint=path_hint(fd),
    )
