"""Calls to io.systemd.MountFileSystem, whole replies and all of the errors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mountd.fds import OwnedFd
from mountd.kernel import sockets
from tests.container import USER
from tests.daemon import Daemon
from tests.rogue import Raw, call

INTERFACE = "io.systemd.MountFileSystem"
SERVICE = "org.varlink.service"
OWN = f"{SERVICE}.GetInfo"


class Theirs(Raw):
    """A connection to the socket of systemd's interface."""

    def __init__(self, daemon: Daemon, uid: int | None = USER) -> None:
        where = daemon.directory.parent / "mountfs"
        if uid is not None:
            os.setegid(uid)
            os.seteuid(uid)
        try:
            connection = sockets.connect(str(where))
        finally:
            if uid is not None:
                os.seteuid(0)
                os.setegid(0)
        super().__init__(daemon, fd=connection.detach())


@contextlib.contextmanager
def asked(
    daemon: Daemon, method: str, fds: Sequence[int], uid: int | None = USER, **parameters: Any
) -> Iterator[tuple[dict[str, Any], list[OwnedFd]]]:
    """Make a call that works; its reply, and the descriptors that came with it."""
    with Theirs(daemon, uid) as raw:
        raw.send(call(f"{INTERFACE}.{method}", parameters), fds)
        reply = raw.reply()
        assert reply is not None
        assert "error" not in reply, reply
        yield reply["parameters"], raw.fds


def refusal(
    daemon: Daemon, method: str, fds: Sequence[int], uid: int | None = USER, **parameters: Any
) -> tuple[str, dict[str, Any]]:
    """Make a call that is refused; the full name of the error, and its parameters."""
    with Theirs(daemon, uid) as raw:
        raw.send(call(f"{INTERFACE}.{method}", parameters), fds)
        reply = raw.reply()
        assert reply is not None, daemon.log
        assert not raw.fds
        assert "error" in reply, reply
        return reply["error"], reply["parameters"]


def opened(stack: contextlib.ExitStack, path: Path | str, flags: int = os.O_RDONLY) -> int:
    return stack.enter_context(OwnedFd(os.open(path, flags | os.O_CLOEXEC))).fileno()


def hello(mount: OwnedFd) -> str:
    with open(os.open("hello", os.O_RDONLY, dir_fd=mount.fileno()), encoding="utf-8") as file:
        return file.read()


def info(raw: Raw, method: str, parameters: object = None) -> dict[str, Any]:
    raw.send(call(method, parameters))
    reply = raw.reply()
    assert reply is not None
    return reply


PARAMETER = f"{SERVICE}.InvalidParameter"
PERMISSION = f"{SERVICE}.PermissionDenied"


def connect_as(path: Path, uid: int = USER) -> int:
    os.seteuid(uid)
    try:
        return sockets.connect(str(path)).detach()
    finally:
        os.seteuid(0)
