"""What a method knows beside its parameters: the connection that they came on, and the daemon around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from mountd.errors import DeniedByPolicy

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from mountd.caller.model import Caller
    from mountd.evidence.model import Signer
    from mountd.fds import OwnedFd
    from mountd.service.phase import Phase
    from mountd.store.store import Store
    from mountd.trust.policy import Policy


class Enter(Protocol):
    """Says that a phase begins, and how many seconds it may take, 0 for as long as usual."""

    def __call__(self, phase: Phase, seconds: int = 0) -> None:
        """Write it where the listener looks."""


@dataclass(frozen=True, slots=True)
class PolicyInForce:
    """The policy that requests are judged by; `refusal` is what everybody gets if it could not be read."""

    policy: Policy
    refusal: DeniedByPolicy | None


def only_root(caller: Caller) -> None:
    """Raise DeniedByPolicy for everybody but the host's root."""
    if not caller.is_host_root:
        raise DeniedByPolicy(
            "only root may put images into the store",
            hint="an administrator can import it with “mountctl image import”",
        )


@dataclass(slots=True)
class RequestContext:
    """One request. `connection` is borrowed.

    `connected_from` identifies the user namespace that the peer was in when it connected; `enter` is called
    at the border of each phase. `notes` is what the journal says about the request, `writable` whether a
    mount was made that can be written to. `store` is None where there is no directory for one; `may_import`
    raises DeniedByPolicy for a caller who may put nothing into it. `verify_signature` takes a signature and
    the "sha256:HEX" of the image, None where signatures are not looked at.
    """

    connection: socket.socket
    connected_from: tuple[int, int] | None
    policy: PolicyInForce
    seal: Callable[[OwnedFd], OwnedFd]
    enter: Enter
    notes: dict[str, str] = field(default_factory=dict)
    writable: bool = False
    store: Store | None = None
    may_import: Callable[[Caller], None] = only_root
    verify_signature: Callable[[bytes, str], Signer] | None = None

    def note_caller(self, caller: Caller) -> None:
        """Tell the journal who called."""
        self.notes.update(
            caller_uid=str(caller.uid),
            caller_gid=str(caller.gid),
            caller_pid=str(caller.pid),
            owner_uid=str(caller.owner_uid),
        )
