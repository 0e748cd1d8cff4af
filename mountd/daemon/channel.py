"""What the daemon's processes say to each other: fixed structures, never a client's bytes.

listener → fork server: SPAWN a worker in a slot, RELOAD the policy
fork server → listener: READY, FAILED with a text, SPAWNED with the worker's socket and pidfd, GONE, RELOADED
listener → worker: a request, with the connection that it came on
worker → listener: ANSWERED, and whether the connection can go on; FREE, and whether the worker does;
  ASK_RELOAD with the end of a pipe for what comes of it
"""

from __future__ import annotations

import select
import socket
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from mountd.fds import OwnedFd, close_all
from mountd.kernel import sockets

if TYPE_CHECKING:
    from mountd.caller.identify import OwnerKey

COMMAND = struct.Struct("=Ii")  # Word, number
# Device and inode of the user namespace that the peer connected from, who pays for it, and where it did.
REQUEST = struct.Struct("=QQQQB")
MAXIMUM_TEXT = 4096


class Entrance(IntEnum):
    """The socket that a peer has connected to, which says what it may call."""

    OWN = 0  # the interfaces of mountd
    MOUNT_FILE_SYSTEM = 1  # io.systemd.MountFileSystem, and nothing else


class Word(IntEnum):
    """First number of a command or a report; the second is a slot, or yes or no."""

    SPAWN = 1
    RELOAD = 2
    READY = 3
    FAILED = 4
    SPAWNED = 5
    GONE = 6
    RELOADED = 7
    NOT_RELOADED = 8
    ANSWERED = 9
    FREE = 10
    ASK_RELOAD = 11


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets that keep messages apart."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def tell(
    channel: socket.socket, word: Word, number: int = 0, text: str = "", fds: list[OwnedFd] | None = None
) -> None:
    """Send a command or a report, with descriptors that stay the caller's. Raises OSError."""
    data = COMMAND.pack(word, number) + text.encode("utf-8", "replace")[:MAXIMUM_TEXT]
    sockets.send(channel, data, fds or [])


def wait(channel: socket.socket, seconds: float | None) -> bool:
    """Return whether there is something to receive within `seconds`, None for however long it takes."""
    return seconds is None or bool(select.select([channel], [], [], seconds)[0])


class Request(NamedTuple):
    """A connection with something to read, owned.

    `namespace` is the user namespace it is from, `owner` who pays for it, `entrance` where it came in.
    """

    fd: OwnedFd
    namespace: tuple[int, int]
    owner: OwnerKey
    entrance: Entrance


def next_request(channel: socket.socket) -> Request | None:
    """Receive a request, None at the end."""
    try:
        data, fds, _ = sockets.receive(channel, REQUEST.size, 1)
    except ConnectionResetError:
        return None
    if len(data) != REQUEST.size or len(fds) != 1:
        close_all(fds)
        return None
    dev, ino, uid, roots_namespace, entrance = REQUEST.unpack(data)
    return Request(fds[0], (dev, ino), (uid, roots_namespace), Entrance(entrance))


def hear(channel: socket.socket) -> tuple[Word, int, str, list[OwnedFd]] | None:
    """Receive one, with descriptors that are the caller's; None at the end. Raises OSError."""
    try:
        data, fds, _ = sockets.receive(channel, COMMAND.size + MAXIMUM_TEXT, 4)
    except ConnectionResetError:
        return None  # it has ended without reading what it was told
    if len(data) < COMMAND.size:
        return None
    word, number = COMMAND.unpack_from(data)
    return Word(word), number, data[COMMAND.size :].decode("utf-8", "replace"), fds
