"""A client's connection as the listener has it: who is there, and an answer when no worker can give one.

The listener never receives from it: a descriptor in the queue of the socket may be one that makes its holder
unkillable. Sending and closing are safe.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

from mountd.daemon.channel import Entrance
from mountd.daemon.transport import has_sent
from mountd.service.mountfs_errors import in_their_words
from mountd.wire.framing import encode, error_body

if TYPE_CHECKING:
    from mountd.daemon.owners import Owner
    from mountd.errors import MountdError


class Connection:
    """Owns the socket."""

    __slots__ = ("_socket", "entrance", "namespace", "owner", "since")

    def __init__(
        self, connection: socket.socket, namespace: tuple[int, int], owner: Owner, entrance: Entrance
    ) -> None:
        """`namespace` is the user namespace of the peer, `entrance` is where it has connected."""
        self._socket = connection
        self.entrance = entrance
        self.namespace = namespace
        self.owner = owner
        self.since = time.monotonic()

    def fileno(self) -> int:
        """Return the descriptor, borrowed."""
        return self._socket.fileno()

    @property
    def speaks(self) -> bool:
        """Whether something was sent that nobody has received yet."""
        try:
            return has_sent(self._socket)
        except OSError:
            return False

    def answer(self, error: MountdError) -> None:
        """Send an error reply, if there is room for it without waiting."""
        answer(self._socket, error, self.entrance)

    def close(self) -> None:
        """End the connection for everybody: a worker that hangs may hold it, too."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def answer(connection: socket.socket, error: MountdError, entrance: Entrance) -> None:
    """Send an error reply without waiting for room."""
    if entrance is Entrance.MOUNT_FILE_SYSTEM:
        error = in_their_words(error)
    with contextlib.suppress(OSError):
        connection.send(encode(error_body(error), is_reply=True), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
