"""Noticing the end of a superblock, with inotify(7): a watch on its root directory lives as long as that.

The kernel takes the watch away when the last mount of the superblock is gone and nothing of it is in use. It
lists those that are left in the fdinfo of the inotify descriptor. So the question whether something is still
there is answered by the kernel, and by no note of ours. A watch does not keep a superblock alive.

The numbers of watches are not used again for as long as there are fewer than 2^31.
"""

import os

from mountd.errors import SyscallError
from mountd.fds import OwnedFd
from mountd.kernel.libc import call

IN_DELETE_SELF = 0x400  # a watch has to be for something; that it ends is told in any case
QUEUE = 1 << 16
MINOR_BITS = 20  # of the kernel's own device numbers


def create() -> OwnedFd:
    """Return a new inotify descriptor, without watches, which never blocks. Raises SyscallError."""
    return OwnedFd(call("inotify_init1", os.O_CLOEXEC | os.O_NONBLOCK))


def watch(watches_fd: int, fd: int) -> int:
    """Watch the superblock that the directory `fd` lies in; return the number of the watch.

    It is the same number for all that lie in the same directory. Raises SyscallError, EACCES for a directory
    that this process may not read.
    """
    return call("inotify_add_watch", watches_fd, f"/proc/self/fd/{fd}".encode(), IN_DELETE_SELF)


def watched(watches_fd: int) -> "dict[int, tuple[int, int]]":
    """Return the watches that are left: number -> device of the superblock. Raises OSError."""
    drain(watches_fd)
    found = {}
    with open(f"/proc/self/fdinfo/{watches_fd}", encoding="ascii") as file:
        for line in file:
            if line.startswith("inotify "):
                fields = dict(field.split(":", 1) for field in line.split()[1:])
                device = int(fields["sdev"], 16)
                minor = device & ((1 << MINOR_BITS) - 1)
                found[int(fields["wd"], 16)] = device >> MINOR_BITS, minor
    return found


def drain(watches_fd: int) -> None:
    """Throw away what the kernel has to tell: only what is left counts."""
    try:
        while os.read(watches_fd, QUEUE):
            pass
    except BlockingIOError:
        pass


def is_inotify(fd: int) -> bool:
    """Return whether `fd` is an inotify descriptor."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:inotify"
    except OSError as error:
        raise SyscallError(error.errno or 0, f"readlink(/proc/self/fd/{fd})") from None
