"""Running a program that puts a question to somebody else, until it is answered or nobody needs the answer.

The program is trusted, and so is what it talks to: it keeps root's uid, as whoever it asks wants to know who
asks. It has nothing else: no capabilities and no way to get them back (PR_SET_NO_NEW_PRIVS), no environment,
no descriptors but its output, no file that it could write to, and no life after its parent's.
"""

import ctypes
import os
import resource
import select
import signal
import time

from mountd.kernel import child
from mountd.kernel.libc import call
from mountd.kernel.sandbox import PR_SET_NO_NEW_PRIVS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

CAPABILITY_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
MEMORY = 1 << 30  # bytes of address space: a program with threads maps much more than it uses
MAXIMUM_DESCRIPTORS = 64
MAXIMUM_OUTPUT = 4096
MAXIMUM_PATIENCE = 1.0  # seconds from the end of its output to that of the program


class Ended:
    """How it ended: the exit status (negative for a signal), what it printed, and what ended it.

    `by` is the descriptor that did, None for its own end; `timed_out` is whether it was the time.
    """

    __slots__ = ("by", "output", "status", "timed_out")

    def __init__(self, status: int, output: bytes, by: "int | None", timed_out: bool) -> None:
        self.status = status
        self.output = output
        self.by = by
        self.timed_out = timed_out


def ask(path: str, arguments: "Sequence[str]", *, seconds: float, watch: "Mapping[int, int]") -> Ended:
    """Run the program `path` until it ends, for at most `seconds`, or until one of `watch` has an event.

    `watch` maps descriptors, borrowed, to events of poll(2), of which POLLHUP and POLLERR always count. The
    program is killed then. Raises OSError where no process can be made.
    """
    pid, reader = child.fork(lambda writer: _become(path, [path, *arguments], writer))
    patience = 0.0
    try:
        with reader:
            output, by, timed_out = _listen(reader.fileno(), seconds, watch)
        patience = MAXIMUM_PATIENCE if by is None and not timed_out else 0.0
    finally:
        status = child.end(pid, patience)
    return Ended(status, output, by, timed_out)


def _listen(reader: int, seconds: float, watch: "Mapping[int, int]") -> "tuple[bytes, int | None, bool]":
    """Return what was printed until the end, which descriptor has ended it, and whether time has."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    for fd, events in watch.items():
        poll.register(fd, events)
    deadline = time.monotonic() + seconds
    output = b""
    while True:
        left = (deadline - time.monotonic()) * 1000
        # poll(2) takes less than 0 for eternity.
        ready = [fd for fd, _ in poll.poll(left)] if left > 0 else []
        if not ready:
            return output, None, True
        for fd in ready:
            if fd != reader:
                return output, fd, False
        chunk = os.read(reader, MAXIMUM_OUTPUT)
        if not chunk:
            return output, None, False
        output = (output + chunk)[:MAXIMUM_OUTPUT]


def _become(path: str, arguments: "list[str]", writer: int) -> "NoReturn":
    """Be the child. Raises if that fails."""
    high = os.dup(writer)
    while high <= 2:
        high = os.dup(writer)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for target, fd in ((0, null), (1, high), (2, high)):
        os.dup2(fd, target)
    child.close_all_but({0, 1, 2})
    os.chdir("/")
    for number in range(1, signal.NSIG):
        if signal.getsignal(number) == signal.SIG_IGN and number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAXIMUM_DESCRIPTORS, MAXIMUM_DESCRIPTORS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    child.end_with_parent()
    os.execve(path, arguments, {})
