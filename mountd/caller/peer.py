"""The process at the other end of a connection, pinned for as long as a worker serves it.

Its credentials and its place among the control groups are found out once: they are those of the time when it
connected, and of the first request that a worker has served. What it could have changed since, and what it
may have lost, is asked for each request: the user namespace that it is in, and whether it is still there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.caller.identify import identify, pin
from mountd.errors import NotSupported, PeerGone, SyscallError
from mountd.kernel import compat, namespaces

if TYPE_CHECKING:
    import socket

    from mountd.caller.model import Caller
    from mountd.fds import OwnedFd


def namespace_id_of(pidfd: int) -> int | None:
    """Return the id, never used twice, of the user namespace that a process is in, None if it has ended.

    It is None as well on kernels before Linux 6.14, which have no such ids.
    """
    try:
        with namespaces.namespace_of(pidfd, "user") as userns:
            return namespaces.namespace_id(userns.fileno())
    except (NotSupported, SyscallError):
        return None


def can_change(caller: Caller) -> bool:
    """Tell whether something else about a caller can have changed that stays in its user namespace.

    The host's root may have lost capabilities, and a map that is empty may have been written.
    """
    namespace = caller.user_namespace
    return caller.sys_admin or not (namespace.uid_map and namespace.gid_map)


class Peer:
    """Owns a pidfd of the process; `connection` is borrowed. To be closed, or used in a with statement."""

    __slots__ = ("_caller", "_connected_from", "_namespace", "_pidfd", "connection")

    def __init__(self, connection: socket.socket, connected_from: tuple[int, int] | None = None) -> None:
        """`connected_from` identifies the user namespace that the peer was in when it connected.

        Nothing is asked yet: most of what is said on a connection needs no answer about who says it.
        """
        self.connection = connection
        self._connected_from = connected_from
        self._pidfd: OwnedFd | None = None
        self._caller: Caller | None = None
        self._namespace: int | None = None  # the id of the user namespace that the caller was found in

    def identify(self) -> Caller:
        """Return who it is. Raises PeerGone, NotSupported, SyscallError."""
        pidfd = self._pin()
        namespace = namespace_id_of(pidfd)
        known = self._caller
        if known is None or namespace is None or namespace != self._namespace or can_change(known):
            known = identify(self.connection, pidfd, self._connected_from, known)
            self._caller, self._namespace = known, namespace
        return known

    def check(self) -> None:
        """Raise PeerGone if nobody waits for the answer any more, so that nothing is made for nobody."""
        try:
            compat.check_alive(self._pin())
        except SyscallError:
            raise PeerGone("it has ended") from None

    def mount_namespace(self) -> OwnedFd:
        """Return the mount namespace that it is in now, which is the caller's to close. Raises PeerGone."""
        try:
            return compat.mount_namespace_of(self._pin(), self.identify().pid)
        except (SyscallError, FileNotFoundError, ProcessLookupError):
            raise PeerGone("it has ended") from None

    def _pin(self) -> int:
        """Return the pidfd, borrowed, from the first question on the same."""
        if self._pidfd is None:
            self._pidfd = pin(self.connection)
        return self._pidfd.fileno()

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
