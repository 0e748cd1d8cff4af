"""What a method knows beside its parameters: the connection that they came on, and the daemon around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from mountd.fds import OwnedFd
    from mountd.trust.policy import Policy


class Phase(IntEnum):
    """What a worker is doing. Each has a deadline that the listener holds it to."""

    IDLE = 0
    READ = 1
    VERIFY = 2
    MOUNT = 3
    REPLY = 4
    CLOSE = 5


@dataclass(slots=True)
class RequestContext:
    """One request. `connection` is borrowed.

    `connected_from` identifies the user namespace that the peer was in when it connected; `enter` is called
    at the border of each phase. `notes` is what the journal says about the request.
    """

    connection: socket.socket
    connected_from: tuple[int, int] | None
    policy: Policy
    seal: Callable[[OwnedFd], OwnedFd]
    enter: Callable[[Phase], None]
    notes: dict[str, str] = field(default_factory=dict)
