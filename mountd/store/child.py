"""Child processes that do the work on what a stranger sent, and waiting for several of them at once.

A child has a deadline, says what it has to say through pipes of which a bounded part is kept, and is dead
and reaped when `finish` or `kill` returns, whatever happens.
"""

from __future__ import annotations

import errno
import os
import select
import time
from typing import TYPE_CHECKING

from mountd.errors import TimedOut
from mountd.kernel import child as kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from mountd.fds import OwnedFd

TICK_SECONDS = 0.1
GRACE_SECONDS = 2.0
CHUNK = 65536


class Output:
    """What a child writes to one pipe: the first `maximum` bytes, or the last ones if `last`."""

    __slots__ = ("_kept", "_last", "_maximum", "fd")

    def __init__(self, fd: OwnedFd, maximum: int, *, last: bool = False) -> None:
        """Take the reading end of the pipe."""
        self.fd = fd
        self._maximum, self._last = maximum, last
        self._kept = bytearray()

    def read(self) -> bool:
        """Read what is there and tell whether there may be more to come."""
        piece = os.read(self.fd.fileno(), CHUNK)
        self._kept += piece
        if self._last:
            del self._kept[: -self._maximum]
        else:
            # One byte beyond the maximum stays, so that the reader knows of it.
            del self._kept[self._maximum + 1 :]
        return bool(piece)

    @property
    def kept(self) -> bytes:
        """What was kept: up to `maximum` bytes, or one more of the first ones if there were more."""
        return bytes(self._kept)


class Child:
    """A process that was forked, and the pipes it writes to. Ends with the with statement at the latest."""

    def __init__(self, name: str, pid: int, outputs: Sequence[Output] = ()) -> None:
        """`pid` is a child of this process, and `outputs` are taken over; `name` is for messages."""
        self.name = name
        self.outputs = tuple(outputs)
        self._pid = pid
        # None while it runs.
        self._code: int | None = None

    @property
    def code(self) -> int:
        """Its exit code, negative for the signal that ended it. Only for one that has ended."""
        assert self._code is not None
        return self._code

    def poll(self) -> bool:
        """Whether it has ended."""
        if self._code is None:
            self._code = kernel.ended(self._pid)
        return self._code is not None

    def kill(self) -> None:
        """End it, with all that it has started if it is the first process of a namespace, and reap it."""
        if not self.poll():
            # Not reaped yet, so that the number is still its own.
            self._code = kernel.end(self._pid)
        for output in self.outputs:
            output.fd.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class Deadline:
    """A point in time by which all has to be done."""

    __slots__ = ("_end", "_seconds")

    def __init__(self, seconds: int) -> None:
        """It is `seconds` from now."""
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise TimedOut if it has passed."""
        if time.monotonic() > self._end:
            raise TimedOut(self._seconds)


def finish(children: Sequence[Child], deadline: Deadline, tick: Callable[[], None]) -> None:
    """Wait for the end of all of the children and of what they write, or until one of them fails.

    Once one has failed, the others have a moment to notice; some wait for ever for input that has ended in
    the middle. `tick` is called about ten times a second and may raise, which ends the waiting and nothing
    else: the children belong to the caller's with statements. Raises TimedOut.
    """
    failed: float | None = None
    poll = select.poll()
    by_fd = {output.fd.fileno(): output for child in children for output in child.outputs}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    while by_fd or not all(child.poll() for child in children):
        deadline.check()
        tick()
        if failed is None and any(child.poll() and child.code for child in children):
            failed = time.monotonic()
        if failed is not None and time.monotonic() > failed + GRACE_SECONDS:
            return
        for fd, _ in poll.poll(TICK_SECONDS * 1000):
            if not by_fd[fd].read():
                poll.unregister(fd)
                del by_fd[fd]


def fork_python(name: str, work: Callable[[int], bool], maximum: int) -> Child:
    """Fork a child that calls `work` with a descriptor to write its answer to, of up to `maximum` bytes.

    `work` closes what it does not need and says whether all went well, which is the child's exit code: 0 or
    1. What it raises ends the child, which then has failed as well. Raises OSError.
    """
    pid, reader = kernel.fork(lambda writer: 0 if work(writer) else 1)
    return Child(name, pid, [Output(reader, maximum)])


def is_full(error: OSError) -> bool:
    """Whether a system call failed because there is no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
