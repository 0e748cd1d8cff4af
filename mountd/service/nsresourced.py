"""Telling systemd-nsresourced about a mount, so that a user namespace of its making may write there.

The service keeps what it is told about until the namespace is gone, and a security module of its own lets
nobody create files in mounts that it was not told about. It listens to the system's services only, knows
the namespaces that it has registered, and says so of any other.
"""

from __future__ import annotations

import errno
import time
from contextlib import closing
from typing import TYPE_CHECKING

from mountd.errors import MountFailed, ProtocolError, UserNamespaceNotPermitted
from mountd.kernel import sockets
from mountd.wire.framing import decode, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.fds import OwnedFd
    from mountd.kernel.sockets import Socket

SOCKET = "/run/systemd/io.systemd.NamespaceResource"
METHOD = "io.systemd.NamespaceResource.AddMountToUserNamespace"
NOT_REGISTERED = "io.systemd.NamespaceResource.UserNamespaceNotRegistered"
# For all mounts of a request. A worker of its may first have the kernel verify a security module.
SECONDS = 6.0
MAXIMUM_REPLY = 1 << 16
NOWHERE = (errno.ENOENT, errno.ECONNREFUSED)


def add_mounts(userns: OwnedFd, mounts: Sequence[OwnedFd], *, must_be_registered: bool) -> None:
    """Have nsresourced know the mounts as those of the user namespace; all descriptors are borrowed.

    Where there is no nsresourced, or the namespace is none of its own, nothing has to be done. With
    `must_be_registered`, that raises UserNamespaceNotPermitted. Raises MountFailed if it cannot be told.
    """
    deadline = time.monotonic() + SECONDS
    try:
        with closing(sockets.connect(SOCKET, SECONDS)) as connection:
            if sockets.peer_credentials(connection).uid != 0:
                raise MountFailed(f"{METHOD}: whoever listens there is not root", "EPERM")
            registered = all([add(connection, userns, mount, deadline) for mount in mounts])
    except OSError as error:
        if error.errno not in NOWHERE:
            raise MountFailed(METHOD, errno.errorcode.get(error.errno or 0, "ETIMEDOUT")) from None
        registered = False
    if must_be_registered and not registered:
        raise UserNamespaceNotPermitted(
            "it maps ids of the range for containers, and is not registered with systemd-nsresourced",
            hint="have it registered, or map ids that /etc/subuid and /etc/subgid give to the caller",
        )


def add(connection: Socket, userns: OwnedFd, mount: OwnedFd, deadline: float) -> bool:
    """Tell it of one mount; return whether the namespace is registered. Raises MountFailed, OSError."""
    parameters = {"userNamespaceFileDescriptor": 0, "mountFileDescriptor": 1}
    sockets.send(connection, encode({"method": METHOD, "parameters": parameters}), [userns, mount], deadline)
    received = b""
    while not received.endswith(b"\0"):
        sockets.wait(connection, sockets.READABLE, deadline)
        more = connection.recv(MAXIMUM_REPLY)
        received += more
        if not more or len(received) > MAXIMUM_REPLY:
            raise MountFailed(f"{METHOD}: there is no answer", "EPROTO")
    try:
        said = decode(received[:-1]).get("error")
    except ProtocolError as error:
        raise MountFailed(f"{METHOD}: {error}", "EPROTO") from None
    if said is None or said == NOT_REGISTERED:
        return said is None
    raise MountFailed(f"{METHOD}: {said}", "EIO")
