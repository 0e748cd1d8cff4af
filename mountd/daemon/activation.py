"""The listening sockets: from systemd (sd_listen_fds(3)), or bound here where there is no systemd."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.daemon.channel import Entrance
from mountd.fds import OwnedFd
from mountd.kernel import mark, watch

if TYPE_CHECKING:
    from collections.abc import Mapping

MODE = 0o666  # decisions guard it, not file modes
BACKLOG = 4096
# FDNAME= of the ledger's descriptors.
WATCHES_NAME = "watches"
MARKS_NAME = "marks"
KEPT = {WATCHES_NAME: watch.is_inotify, MARKS_NAME: mark.is_fanotify}
# FileDescriptorName= of the socket whose peers may call io.systemd.MountFileSystem only.
MOUNT_FILE_SYSTEM_ONLY = {"io.systemd.MountFileSystem": Entrance.MOUNT_FILE_SYSTEM}


class StartFailure(Exception):
    """Why the daemon cannot start, in one line."""


@dataclass(frozen=True, slots=True)
class Sockets:
    """What is accepted from, by what it leads to, mountd's own first; the paths of what was bound here.

    `kept` is what a service manager has kept of the ledger's descriptors, by name; they are the caller's.
    """

    listening: dict[Entrance, socket.socket]
    bound: tuple[str, ...]
    kept: dict[str, OwnedFd]

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where they listen, whoever has bound them; that of an abstract one begins with “@” (unix(7))."""
        return tuple(address(each) for _, each in sorted(self.listening.items()))

    def close(self) -> None:
        """Close the sockets, and remove those that were bound here."""
        for each in self.listening.values():
            each.close()
        for path in self.bound:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def address(listening: socket.socket) -> str:
    """Return where a socket listens."""
    name = os.fsencode(listening.getsockname())
    return os.fsdecode(name.replace(b"\0", b"@", 1) if name.startswith(b"\0") else name)


def listening_sockets(paths: Mapping[Entrance, str]) -> Sockets:
    """Return the sockets to accept from: what was passed to the process, and what of `paths` was not.

    Who was passed one gets no other but its own: that of io.systemd.MountFileSystem is the service
    manager's to give. Raises StartFailure.
    """
    listening: dict[Entrance, socket.socket] = {}
    kept: dict[str, OwnedFd] = {}
    if "LISTEN_FDS" in os.environ or "LISTEN_PID" in os.environ:
        listening, kept = inherited()
    wanted = {Entrance.OWN: paths[Entrance.OWN]} if listening else paths
    made = []
    for entrance, path in wanted.items():
        if entrance not in listening:
            listening[entrance] = bound(path)
            made.append(path)
    return Sockets(listening, tuple(made), kept)


def inherited() -> tuple[dict[Entrance, socket.socket], dict[str, OwnedFd]]:
    """Return the sockets that systemd has passed, and what it has kept. Raises StartFailure for all else.

    A service that was not started by its socket may have been handed what was kept only.
    """
    from systemd import daemon  # type: ignore[import-untyped]

    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    try:
        fds = daemon.listen_fds(unset_environment=True)
    except OSError as error:
        raise StartFailure(f"LISTEN_FDS, LISTEN_PID: no such numbers ({error.strerror})") from None
    kept: dict[str, OwnedFd] = {}
    passed: dict[Entrance, int] = {}
    names += [""] * len(fds)
    for fd, name in zip(list(fds), names, strict=False):
        if name in KEPT and KEPT[name](fd):
            os.set_inheritable(fd, False)
            fds.remove(fd)
            if name in kept:
                kept[name].close()
            kept[name] = OwnedFd(fd)
        else:
            passed.setdefault(MOUNT_FILE_SYSTEM_ONLY.get(name, Entrance.OWN), fd)
    if not fds and kept:
        return {}, kept
    if not fds or len(passed) != len(fds):
        raise StartFailure(f"LISTEN_FDS: exactly one socket is needed, {len(fds)} came for this process")
    for fd in fds:
        if not daemon.is_socket_unix(fd, socket.SOCK_STREAM, 1):
            raise StartFailure("LISTEN_FDS: what came is no listening AF_UNIX stream socket")
        os.set_inheritable(fd, False)
    return {entrance: socket.socket(fileno=fd) for entrance, fd in passed.items()}, kept


def bound(path: str) -> socket.socket:
    """Bind `path`, replacing a socket that nobody listens on. Raises StartFailure."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.makedirs(os.path.dirname(path) or ".", mode=0o755, exist_ok=True)
        remove_stale(path)
        listening.bind(path)
        os.chmod(path, MODE)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise StartFailure(f"cannot listen on {path}: {error.strerror or error}") from None
    except BaseException:
        listening.close()
        raise
    return listening


def remove_stale(path: str) -> None:
    """Remove a socket that a daemon that is no more has left. Raises StartFailure if one is there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise StartFailure(f"cannot listen on {path}: something else than a socket is there")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
    raise StartFailure(f"cannot listen on {path}: another process does")
