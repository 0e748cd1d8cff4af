"""As an ordinary user: have a directory mounted for a namespace of nsresourced, and write there.

Prints as JSON what was answered, and what root of the namespace could do in that mount and outside it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

DIRECTORY, ELSEWHERE, REGISTRAR, MOUNTER = sys.argv[1:]


def call(address: str, method: str, fds: list[int], **parameters: Any) -> tuple[dict[str, Any], list[int]]:
    """The reply of a call, and the descriptors that came with it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        body = json.dumps({"method": method, "parameters": parameters}).encode() + b"\0"
        socket.send_fds(connection, [body], fds)
        received = b""
        numbers: list[int] = []
        while not received.endswith(b"\0"):
            data, more, _, _ = socket.recv_fds(connection, 65536, 16)
            assert data, f"{method}: no answer"
            received += data
            numbers.extend(more)
        return json.loads(received[:-1]), list(numbers)


def new_namespace() -> int:
    """A user namespace of the caller's, without maps."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.unshare(os.CLONE_NEWUSER)
        os.write(ready[1], b"x")
        os.close(go[1])
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    fd = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    os.close(go[1])
    os.waitpid(child, 0)
    return fd


def made(userns: int, where: int) -> str:
    """Whether root of the namespace can make a directory there: "made", or the error."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            os.setns(userns, os.CLONE_NEWUSER)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            os.mkdir("made", dir_fd=where)
            os.write(writer, b"made")
        except OSError as error:
            os.write(writer, str(error.strerror).encode())
        os._exit(0)
    os.wait()
    return os.read(reader, 256).decode()


userns = new_namespace()
method = "io.systemd.NamespaceResource.AllocateUserRange"
found: dict[str, Any] = {}
found["allocated"], _ = call(
    REGISTRAR, method, [userns], name="conform", size=65536, userNamespaceFileDescriptor=0
)
directory = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY)
method = "io.systemd.MountFileSystem.MountDirectory"
found["mounted"], fds = call(
    MOUNTER, method, [directory, userns], directoryFileDescriptor=0, userNamespaceFileDescriptor=1
)
found["in the mount"] = made(userns, fds[0]) if fds else "no mount"
found["elsewhere"] = made(userns, os.open(ELSEWHERE, os.O_RDONLY))
json.dump(found, sys.stdout)
