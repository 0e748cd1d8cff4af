"""Calls as callers of all kinds make them: what they import is here already when they have become others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from mountd.client import Client, MountReply, Request
from mountd.errors import MountdError, SyscallError
from mountd.fds import OwnedFd

T = TypeVar("T")
Outcome = tuple[str, str]  # ("", "") if it worked, else the error's name and its text


def mount(socket: Path, image: Path | str, **wishes: object) -> MountReply:
    """Ask for a mount of `image` as the command line tools would."""
    with Client(str(socket)) as client, Request(str(image), **wishes) as request:  # type: ignore[arg-type]
        return client.mount(request.source, request.fds, **request.parameters)


@contextlib.contextmanager
def mounted(socket: Path, image: Path | str, **wishes: object) -> Iterator[MountReply]:
    """As `mount`, for a with statement."""
    reply = mount(socket, image, **wishes)
    with reply.mount:
        yield reply


def mount_fds(socket: Path, source: Mapping[str, object], fds: list[int], **fields: object) -> MountReply:
    """Ask with these very parameters; `fds` are borrowed."""
    owned = [OwnedFd(os.dup(fd)) for fd in fds]
    try:
        with Client(str(socket)) as client:
            return client.mount(source, owned, **fields)
    finally:
        for fd in owned:
            fd.close()


def explain(
    socket: Path, source: Mapping[str, object], fds: list[int], **fields: object
) -> dict[str, object]:
    """As `mount_fds`, for Explain."""
    owned = [OwnedFd(os.dup(fd)) for fd in fds]
    try:
        with Client(str(socket)) as client:
            return client.explain(source, owned, **fields)
    finally:
        for fd in owned:
            fd.close()


def outcome(ask: Callable[[], object]) -> Outcome:
    """Make a call that may be refused; a mount that it returns is dropped."""
    try:
        reply = ask()
    except MountdError as error:
        return type(error).__name__, str(error)
    if isinstance(reply, MountReply):
        reply.mount.close()
    return "", ""


def refused(ask: Callable[[], object], name: str, text: str = "") -> None:
    """Assert that the call is refused with the error `name`, which says `text`."""
    found = outcome(ask)
    assert found[0] == name, found
    assert text in found[1], found


def errno_of(act: Callable[[], object]) -> str:
    """Return the name of the errno that `act` fails with, "" if it does not; what it returns is closed."""
    try:
        made = act()
    except SyscallError as error:
        return error.errno_name
    except OSError as error:
        return SyscallError(error.errno or 0, "").errno_name
    if isinstance(made, OwnedFd):
        made.close()
    return ""


def text_of(mount: MountReply, name: str = "hello") -> str:
    """Read a file of a mount, attached or not."""
    with open(os.open(name, os.O_RDONLY, dir_fd=mount.mount.fileno()), encoding="utf-8") as file:
        return file.read()
