"""Noticing the end of a mount, with fanotify(7): a mark on it lives as long as the mount does.

The kernel takes the mark away when the mount is detached everywhere and no descriptor of it is left, in no
process and not on its way between two sockets. It lists those that are left in the fdinfo of the fanotify
descriptor. A mark does not keep a mount alive, is on it and on no copy of it, and waits for nothing: it only
says what is to be ignored, so that no access to the mount costs more for it.

The numbers are the ids that /proc/self/mountinfo shows, which are used again once a mount is gone. Of two
mounts that had the same, the younger one is meant.
"""

import errno
import os

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import capabilities
from mountd.kernel.flags import StatxMask
from mountd.kernel.libc import call
from mountd.kernel.numbers import AT_FDCWD
from mountd.kernel.paths import statx

# include/uapi/linux/fanotify.h
FAN_CLOEXEC = 0x1
FAN_NONBLOCK = 0x2
FAN_UNLIMITED_MARKS = 0x20
FAN_MARK_ADD = 0x1
FAN_MARK_MOUNT = 0x10
FAN_MARK_IGNORED_MASK = 0x20
FAN_MARK_IGNORED_SURV_MODIFY = 0x40
FAN_OPEN_EXEC = 0x1000  # a mark has to be for something; of all, this happens least

INIT = FAN_CLOEXEC | FAN_NONBLOCK | FAN_UNLIMITED_MARKS
ADD = FAN_MARK_ADD | FAN_MARK_MOUNT | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY


def create() -> "OwnedFd | None":
    """Return a new fanotify descriptor, without marks; None for a kernel without. Raises SyscallError."""
    try:
        return OwnedFd(call("fanotify_init", INIT, os.O_RDONLY | os.O_CLOEXEC))
    except NotSupported:
        return None


def mark(marks_fd: int, mount_fd: int) -> int:
    """Mark the mount that `mount_fd` is of, and return the number of the mark. Raises SyscallError."""
    path = f"/proc/self/fd/{mount_fd}".encode()
    try:
        call("fanotify_mark", marks_fd, ADD, FAN_OPEN_EXEC, AT_FDCWD, path)
    except SyscallError as error:
        if error.errno != errno.EACCES:
            raise
        # Its root directory is closed to others, as the ids of whoever may read it are not this process's.
        with capabilities.reading_everything():
            call("fanotify_mark", marks_fd, ADD, FAN_OPEN_EXEC, AT_FDCWD, path)
    return int(statx(mount_fd, "", StatxMask.MNT_ID).stx_mnt_id)


def marked(marks_fd: int) -> "set[int]":
    """Return the numbers of the marks that are left. Raises OSError."""
    with open(f"/proc/self/fdinfo/{marks_fd}", encoding="ascii") as file:
        lines = [line.split(None, 2) for line in file if line.startswith("fanotify mnt_id:")]
    return {int(line[1].partition(":")[2], 16) for line in lines}


def is_fanotify(fd: int) -> bool:
    """Return whether `fd` is a fanotify descriptor."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[fanotify]"
    except OSError as error:
        raise SyscallError(error.errno or 0, f"readlink(/proc/self/fd/{fd})") from None
