"""Attaching a mount at an open directory, and detaching it: all that a program has to do with what it got.

Apart from the rest of the mount calls (mountd.kernel.mount_api) and without the enumerations of their flags,
so that mount.mountd, which lasts for milliseconds, need not load those. Descriptors are borrowed. Raises
SyscallError, and NotSupported where the kernel lacks the call.
"""

from mountd.kernel.libc import call

ATTACH = 0x4 | 0x40  # MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH of linux/mount.h
DETACH = 0x2  # MNT_DETACH of sys/mount.h


def attach(mount_fd: int, directory_fd: int) -> None:
    """Attach a mount at the directory `directory_fd`."""
    call("move_mount", mount_fd, b"", directory_fd, b"", ATTACH)


def detach(mount_fd: int) -> None:
    """Detach an attached mount with all that is below it. Its descriptor leads to it, wherever that is."""
    call("umount2", b"/proc/self/fd/%d" % mount_fd, DETACH)
