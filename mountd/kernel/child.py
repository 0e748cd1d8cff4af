"""Children of a fork(2): having one do something, hearing from it, and being rid of it.

What every child of mountd that reads what a stranger sent has in common is here; what it gives up, and what
its words mean, is the business of whoever forks it. Between them:

* a child never returns into the code that called `fork`, whatever it does or raises, and prints nothing;
* what it says comes through a pipe, of which a bounded part is read, until a deadline if there is one;
* whoever has forked it calls `end` (or `ended`, until that says so), and until then its number is its own.
"""

import os
import select
import signal
import time

from mountd.fds import OwnedFd
from mountd.kernel.libc import call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PR_SET_PDEATHSIG = 1
EXIT_RAISED = 127  # as shells say it of a command that could not be run
ABANDONED = 0.2  # seconds that a killed child has to end
PATIENCE_TICK = 0.0005  # seconds

_hanging: set[int] = set()  # abandoned children that have not ended


def pipe() -> tuple[OwnedFd, OwnedFd]:
    """Return the reading and the writing end of a new pipe, close-on-exec. Raises OSError."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    return OwnedFd(reader), OwnedFd(writer)


def fork(work: "Callable[[int], int]") -> tuple[int, OwnedFd]:
    """Fork a child that does `work`; return its pid, and the end of a pipe that reads what it writes.

    `work` is called with the descriptor to write to (borrowed) and returns the exit status; what it raises
    ends the child with EXIT_RAISED. The child has every other descriptor of its parent until it closes them.
    The caller has to `end` it. Raises OSError.
    """
    reader, writer = pipe()
    try:
        pid = os.fork()
        if pid == 0:
            status = EXIT_RAISED
            try:
                _hanging.clear()  # they are no children of this one
                reader.close()  # so that writing fails once nobody reads
                status = work(writer.fileno())
            finally:
                os._exit(status)  # whatever happens: what called has to go on in one process only
    except BaseException:
        reader.close()
        raise
    finally:
        writer.close()
    return pid, reader


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (PR_SET_PDEATHSIG, prctl(2)).

    Another user or group id, and other capabilities, reset it. Raises SyscallError.
    """
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def close_all_but(keep: set[int]) -> None:
    """Close every descriptor that is not in `keep`."""
    low = 0
    for fd in sorted(keep):
        # Not for an empty range: CPython 3.11 takes (0, 0) for all there are.
        if low < fd:
            os.closerange(low, fd)
        low = fd + 1
    # The kernel has close_range(2) for the rest; Python's closerange() uses it.
    os.closerange(low, 1 << 20)


def read_all(fd: int, maximum: int, seconds: "float | None" = None) -> tuple[bytes, bool]:
    """Read the pipe `fd` (borrowed) to its end; return what was read, and whether time ran out before.

    At most `maximum` bytes are read; if there are that many, there may have been more. Without `seconds` it
    takes the time it takes.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    deadline = None if seconds is None else time.monotonic() + seconds
    output = b""
    while len(output) < maximum:
        left = None if deadline is None else (deadline - time.monotonic()) * 1000
        # poll(2) takes less than 0 for eternity.
        if (left is not None and left <= 0) or not poll.poll(left):
            return output, True
        chunk = os.read(fd, maximum - len(output))
        if not chunk:
            return output, False
        output += chunk
    return output, False


def ended(pid: int) -> "int | None":
    """Reap the child if it has ended: its exit status, negative for a signal; None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def end(pid: int, patience: float = 0.0) -> int:
    """Kill the child, after `patience` seconds to end by itself, and reap it: no other than this may have.

    Returns its exit status, negative for a signal.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if (status := ended(pid)) is not None:
            return status
        time.sleep(PATIENCE_TICK)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def abandon(pid: int, patience: float = ABANDONED) -> bool:
    """Kill the child and reap it, if it ends within `patience` seconds; return whether it did.

    One that waits in the kernel for a file system's server ends when that answers, or its connection is
    aborted; `hanging` counts it until then.
    """
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + patience
    while ended(pid) is None:
        if time.monotonic() > deadline:
            _hanging.add(pid)
            return False
        time.sleep(PATIENCE_TICK)
    return True


def hanging() -> int:
    """Reap those of the abandoned children of this process that have ended; return how many have not."""
    _hanging.difference_update({pid for pid in _hanging if ended(pid) is not None})
    return len(_hanging)
