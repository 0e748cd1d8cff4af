"""Whether anybody at all has a file open, or has it open to write to it (F_SETLEASE in fcntl(2))."""

import contextlib
import errno
import fcntl
import os
import signal

from mountd.errors import SyscallError
from mountd.fds import OwnedFd

# How a file is opened by its name to be asked about: it may be anything by now.
OPEN_TO_ASK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

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


def has_writer(own: int) -> bool:
    """Tell whether anybody has a file open for writing.

    `own`, borrowed, is the file opened to be read, by this process and for this: a lease belongs to an open
    file, and nobody else's business is disturbed. The kernel grants a read lease only if nobody has. It
    counts as `only_opener` says, but only what was opened to be written to, which goes on to write whatever
    became of owner and mode since. The lease is given up at once: who opens the file afterwards is judged by
    the mode that it has then.

    Raises SyscallError where the file system has no leases, or nobody gets any (fs.leases-enable), and for
    the file of another (CAP_LEASE).
    """
    # What tells of an attempt to write meanwhile: by default, a signal that would end the process.
    fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return True
        raise SyscallError(error.errno or 0, "fcntl(F_SETLEASE)") from None
    fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def open_again(fd: int) -> OwnedFd:
    """Open the file of `fd` (borrowed) once more, to read it.

    Raises SyscallError, also if somebody has a lease on it that has to be given up or broken first.
    """
    try:
        return OwnedFd(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        leased = error.errno == errno.EAGAIN
        what = "the image, on which somebody has a lease" if leased else "the image"
        raise SyscallError(error.errno or 0, f"open({what})") from None
