"""Asking mountd for a mount: the Python interface of io.mountd.Mount, standard library only.

    from mountd.client import mount_image
    mount_image("/var/lib/machines/base.raw", "/mnt")

mounts an image in the mount namespace of this process. To have the mount itself, and attach it later or pass
it on:

    with Client() as client, client.mount_image("/var/lib/machines/base.raw") as reply:
        attach(reply.mount.fileno(), "/mnt")

Every refusal is a MountdError: its text is one line, and `hint` says how to get out of it.
"""

from __future__ import annotations

import os

from mountd.asking import (
    ENVIRONMENT,
    SOCKETS,
    Client,
    MountReply,
    attach_at,
    attach_reply,
    open_target,
    socket_paths,
)
from mountd.errors import MountdError, SyscallError

# Now, as the files of another root directory, or of another user's, are not those of this package.
from mountd.kernel import attaching, moving  # noqa: F401
from mountd.request import IDMAPS, OCI, STORED, TMPFS, Request, in_user_namespace, open_image
from mountd.wire import rebuilding  # noqa: F401

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def attach(mount_fd: int, target: str) -> None:
    """Attach a mount at the directory `target`, in this process's mount namespace.

    Raises NotFound, NotADirectoryError, SyscallError (EPERM without CAP_SYS_ADMIN over the mount namespace).
    """
    with open_target(target) as directory:
        attach_at(mount_fd, directory.fileno(), target)


def mount_image(source: str | os.PathLike[str], target: str | os.PathLike[str], **wishes: Any) -> MountReply:
    """Mount `source` at the directory `target`, and return what mountd decided.

    `wishes` are the arguments of `Request`. Raises what `Client`, `Client.mount_image` and `attach` raise.
    """
    path = os.fspath(target)
    with open_target(path) as directory, Client() as client, client.mount_image(source, **wishes) as reply:
        attach_reply(reply, directory.fileno(), path)
        return reply


__all__ = [
    "ENVIRONMENT",
    "IDMAPS",
    "OCI",
    "SOCKETS",
    "STORED",
    "TMPFS",
    "Client",
    "MountReply",
    "MountdError",
    "Request",
    "SyscallError",
    "attach",
    "attach_reply",
    "in_user_namespace",
    "mount_image",
    "open_image",
    "open_target",
    "socket_paths",
]
