"""Attaching and detaching, and what is mounted where: all that the programs need which mount(8) calls.

Apart from the rest of the mount calls (mountd.kernel.mount_api) and without the enumerations of their flags,
because these programs last for milliseconds, and would load those for as long. Descriptors are borrowed.
Every function raises SyscallError, and NotSupported where the kernel lacks the call.
"""

import errno
import os

from mountd.errors import SyscallError
from mountd.kernel.libc import call

ATTACH = 0x4 | 0x40  # MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH of linux/mount.h
FORCE, DETACH, NOFOLLOW = 1, 2, 8  # for `unmount`: MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW
ITSELF_AS_KNOWN = 0x1000 | 0x4000  # AT_EMPTY_PATH, AT_STATX_DONT_SYNC of linux/fcntl.h
BASIC_STATS, MNT_ID_UNIQUE = 0x7FF, 0x4000  # STATX_* of linux/stat.h
MOUNT_ROOT = 0x2000  # STATX_ATTR_MOUNT_ROOT, in stx_attributes


def attach(mount_fd: int, directory_fd: int) -> None:
    """Attach a mount at the directory `directory_fd`."""
    call("move_mount", mount_fd, b"", directory_fd, b"", ATTACH)


def unmount(path: str, flags: int = 0) -> None:
    """Detach the topmost mount at `path`."""
    call("umount2", os.fsencode(path), flags)


def detach(mount_fd: int) -> None:
    """Detach an attached mount with all that is below it. Its descriptor leads to it, wherever that is."""
    try:
        unmount(f"/proc/self/fd/{mount_fd}", DETACH)
    except SyscallError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        # There is no /proc here, or that of other processes, as in a mount namespace that was entered.
        detach_from_within(mount_fd)


def detach_from_within(mount_fd: int) -> None:
    """Detach an attached mount, which is the working directory meanwhile."""
    before = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fchdir(mount_fd)
        try:
            unmount(".", DETACH)
        finally:
            os.fchdir(before)
    finally:
        os.close(before)


def mount_at(directory_fd: int) -> "int | None":
    """Return the unique id of the mount whose root `directory_fd` is, None if it is not the root of one.

    No file system is asked: who serves it may not answer any more.
    """
    from ctypes import byref

    from mountd.kernel.abi import statx

    status = statx()
    call("statx", directory_fd, b"", ITSELF_AS_KNOWN, BASIC_STATS | MNT_ID_UNIQUE, byref(status))
    return int(status.stx_mnt_id) if status.stx_attributes & MOUNT_ROOT else None
