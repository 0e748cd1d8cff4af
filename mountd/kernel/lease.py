"""Whether anybody at all has a file open, and nobody may meanwhile (F_SETLEASE in fcntl(2))."""

import contextlib
import fcntl
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def only_opener(fd: int) -> "Iterator[bool]":
    """Tell whether `fd` (borrowed) is the only open file of its inode, and keep it so within the with.

    The kernel grants a write lease only then. It counts whatever opened the file, also what no process holds
    any more: the superblock of a file-backed mount, attached or detached, in whatever mount namespace, a
    loop device, a memory map. Not counted is O_PATH, which cannot be read from. Whoever opens the file
    within the with waits, or gets EAGAIN with O_NONBLOCK. False as well where the file system has no leases,
    or the file is another's (CAP_LEASE): what cannot be told is taken for open.
    """
    # An attempt to open the file meanwhile is told by this signal, which would end the process.
    previous = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    finally:
        signal.signal(signal.SIGIO, previous)
