"""Reading one message from a connection, and no byte more.

What is there is first only looked at (MSG_PEEK). Then exactly the bytes up to the end of the message are
received, with the descriptors that came with them; so those of the next message stay where they are, and a
worker keeps nothing between two requests.
"""

from __future__ import annotations

import fcntl
import struct
import termios
from typing import TYPE_CHECKING

from mountd.errors import BadFileDescriptor, ProtocolError
from mountd.kernel import sockets
from mountd.wire.framing import MAX_FDS, MessageReader, boundary, whole_message

if TYPE_CHECKING:
    import socket

    from mountd.wire.framing import Message

CHUNK = 64 << 10


class DescriptorsLost(BadFileDescriptor):
    """The kernel could not deliver all descriptors; the process that this happened to had better end."""

    def __init__(self) -> None:
        """There is one reason for all."""
        super().__init__(
            "fileDescriptors", "some were lost: mountd has none left, or a security module kept them back"
        )


def has_sent(connection: socket.socket) -> bool:
    """Tell whether there is something to read; nothing is received for that (SIOCINQ, unix(7)).

    If not, a connection that could be read has ended. Raises OSError.
    """
    raw = fcntl.ioctl(connection.fileno(), termios.FIONREAD, bytes(4))
    (length,) = struct.unpack("i", raw)
    return bool(length)


def read_message(connection: socket.socket, deadline: float) -> Message | None:
    """Return the next message, None if the peer has closed the connection between two.

    `deadline` is a time.monotonic(). Raises TimeoutError after it, OSError, ProtocolError, LimitExceeded and
    DescriptorsLost; nothing is kept then.
    """
    reader = MessageReader()
    try:
        while True:
            peeked = sockets.peek(connection, CHUNK, deadline)
            if not peeked:
                if reader.pending:
                    raise ProtocolError("the connection ended within a message")
                return None
            # One more than allowed, so that too many are told from lost ones.
            end = boundary(peeked)
            data, fds, lost = sockets.receive(connection, end or len(peeked), MAX_FDS + 1)
            too_few = lost and len(fds) <= MAX_FDS
            if end is not None and len(data) == end and not reader.pending and not too_few:
                return whole_message(data, fds)
            reader.feed(data, fds)
            if too_few:
                raise DescriptorsLost
            message = reader.next_message()
            if message is not None:
                return message
    finally:
        reader.close()
