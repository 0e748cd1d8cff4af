"""What a method knows beside its parameters: the connection that they came on, and the daemon around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from mountd.errors import DeniedByPolicy
    from mountd.fds import OwnedFd
    from mountd.service.phase import Phase
    from mountd.trust.policy import Policy


@dataclass(frozen=True, slots=True)
class PolicyInForce:
    """The policy that requests are judged by; `refusal` is what everybody gets if it could not be read."""

    policy: Policy
    refusal: DeniedByPolicy | None


@dataclass(slots=True)
class RequestContext:
    """One request. `connection` is borrowed.

    `connected_from` identifies the user namespace that the peer was in when it connected; `enter` is called
    at the border of each phase. `notes` is what the journal says about the request, `writable` whether a
    mount was made that can be written to.
    """

    connection: socket.socket
    connected_from: tuple[int, int] | None
    policy: PolicyInForce
    seal: Callable[[OwnedFd], OwnedFd]
    enter: Callable[[Phase], None]
    notes: dict[str, str] = field(default_factory=dict)
    writable: bool = False
