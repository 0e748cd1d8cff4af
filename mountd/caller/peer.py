"""The process at the other end of a connection, pinned for as long as a worker serves it.

Its credentials and its place among the control groups are found out once: they are those of the time when it
connected, and of the first request that a worker has served. What it could have changed since, and what it
may have lost, is asked for each request: the user namespace that it is in, and whether it is still there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.caller.identify import identify, pin
from mountd.errors import PeerGone, SyscallError
from mountd.kernel import compat

if TYPE_CHECKING:
    import socket

    from mountd.caller.model import Caller
    from mountd.fds import OwnedFd


class Peer:
    """Owns a pidfd of the process; `connection` is borrowed. To be closed, or used in a with statement."""

    __slots__ = ("_caller", "_connected_from", "_pidfd", "connection")

    def __init__(self, connection: socket.socket, connected_from: tuple[int, int] | None = None) -> None:
        """`connected_from` identifies the user namespace that the peer was in when it connected.

        Nothing is asked yet: most of what is said on a connection needs no answer about who says it.
        """
        self.connection = connection
        self._connected_from = connected_from
        self._pidfd: OwnedFd | None = None
        self._caller: Caller | None = None

    def identify(self) -> Caller:
        """Return who it is. Raises PeerGone, NotSupported, SyscallError."""
        if self._pidfd is None:
            self._pidfd = pin(self.connection)
        self._caller = identify(self.connection, self._pidfd.fileno(), self._connected_from, self._caller)
        return self._caller

    def check(self) -> None:
        """Raise PeerGone if nobody waits for the answer any more, so that nothing is made for nobody."""
        if self._pidfd is None:
            self._pidfd = pin(self.connection)
        try:
            compat.check_alive(self._pidfd.fileno())
        except SyscallError:
            raise PeerGone("it has ended") from None

    def close(self) -> None:
        """Let go of the process; the connection stays open."""
        if self._pidfd is not None:
            self._pidfd.close()
            self._pidfd = None
        self._caller = None

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
