"""Where an image lies: the proof that its path belongs to root from the top to the file itself.

The link in /proc only says where to look. The path is then walked from the root of the daemon's own mount
namespace, longer by one component each time, and what is found must be no link, belong to root and be
writable by nobody else. What the walk ends at has to be the very inode that the caller handed over. Where a
directory passed, nobody but root can change what the next name in it leads to, so that there is nothing to
race with, and no need to hold it.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from typing import TYPE_CHECKING

from mountd.errors import SyscallError
from mountd.evidence.model import Evidence
from mountd.kernel.abi import AT_FDCWD
from mountd.kernel.flags import StatxMask
from mountd.kernel.mount_info import statmount
from mountd.kernel.paths import statx

if TYPE_CHECKING:
    from mountd.kernel.abi import statx as statx_struct
    from mountd.source.model import BackingFile

MAXIMUM_COMPONENTS = 64
WANTED = StatxMask.BASIC_STATS | StatxMask.MNT_ID_UNIQUE
# Whoever runs the server decides what is in the file, and when it answers.
REMOTE = {"fuse", "fuseblk", "nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "afs"}


class NotThere(Exception):
    """The walk found that the path proves nothing; the text says why."""


def locate(backing: BackingFile, *, name_paths: bool) -> Evidence:
    """Find out whether the image that `backing` describes lies under a path that is root's alone.

    `name_paths` says whether the reason may name directories: whoever is in a container has no business with
    the host's. Raises NotSupported; whatever else goes wrong is a reason why there is no such evidence.
    """
    try:
        path = walk(backing, name_paths)
        problem = None
    except NotThere as reason:
        path, problem = None, str(reason)
    except SyscallError as error:
        path, problem = None, f"its path cannot be checked ({error.errno_name})"
    return Evidence(path, problem, backing.writable)


def walk(backing: BackingFile, name_paths: bool) -> str:
    """Return the path if every component of it proves to be root's. Raises NotThere, SyscallError."""
    hint = backing.path_hint
    if hint is None or not hint.startswith("/"):
        raise NotThere("it has no path")
    names = hint.split("/")[1:]
    if len(names) > MAXIMUM_COMPONENTS or any(name in ("", ".", "..") for name in names):
        raise NotThere("its path is not a plain one")
    path = "/"
    status = check(path, path, 0)
    for name in names:
        path = f"{path}/{name}" if path != "/" else f"/{name}"
        status = check(path, path if name_paths else "a part of its path", status.stx_mnt_id)
    dev = os.makedev(status.stx_dev_major, status.stx_dev_minor)
    if (dev, status.stx_ino) != (backing.dev, backing.ino) or not stat.S_ISREG(status.stx_mode):
        raise NotThere("another file is at its path, in the mount namespace of mountd")
    return hint


def check(path: str, shown: str, mount: int) -> statx_struct:
    """Refuse a component that is a link, or that another user or a server has power over; return its status.

    What `path` has before its last component passed already. `mount` is the mount that this is on.
    """
    try:
        # Without asking the file system: that is safe only once its mount is known not to be a server's.
        status = statx(AT_FDCWD, path, WANTED, sync=False)
    except SyscallError as error:
        if error.errno_name in ("ENOENT", "ENOTDIR"):
            raise NotThere("its path does not exist in the mount namespace of mountd") from None
        raise
    if stat.S_ISLNK(status.stx_mode):
        raise NotThere("its path has a symbolic link in it")
    if status.stx_mnt_id != mount:
        check_mount(status.stx_mnt_id, shown)
    check_owner(status, shown)
    return status


@lru_cache(maxsize=64)
def type_of_mount(id: int) -> str | None:
    """Return the file system type of the mount with this id, which is never another's.

    Raises SyscallError.
    """
    return statmount(id).fs_type


def check_mount(id: int, shown: str) -> None:
    """Refuse a mount whose contents a server decides about."""
    fs_type = type_of_mount(id)
    if fs_type is None or fs_type.split(".")[0] in REMOTE:
        raise NotThere(
            f"{shown} is on a file system of type {fs_type}, whose contents somebody else decides"
        )


def check_owner(status: statx_struct, shown: str) -> None:
    """Refuse what is not root's alone."""
    if status.stx_uid != 0:
        raise NotThere(f"{shown} belongs to uid {status.stx_uid}, not to root")
    if status.stx_mode & 0o022:
        who = "everybody" if status.stx_mode & 0o002 else "its group"
        raise NotThere(f"{shown} is writable by {who}")
