"""What is kept for requests that follow each other on a connection: who asks, and where it has looked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.caller.peer import Peer
from mountd.evidence.location import Walker

if TYPE_CHECKING:
    import socket


class Conversation:
    """Owns the peer, and a walker for the paths of its images; for a with statement."""

    __slots__ = ("peer", "walker")

    def __init__(self, connection: socket.socket, connected_from: tuple[int, int]) -> None:
        """`connection` is borrowed; `connected_from` is as `Peer` has it."""
        self.peer = Peer(connection, connected_from)
        self.walker = Walker()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.walker.close()
        self.peer.close()
