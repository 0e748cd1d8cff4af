"""The listening socket: from systemd (sd_listen_fds(3)), or bound here where there is no systemd."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from mountd.fds import OwnedFd
from mountd.kernel import watch

MODE = 0o666  # decisions guard it, not file modes
BACKLOG = 4096
WATCHES_NAME = "watches"  # FDNAME= of the ledger's inotify descriptor


class StartFailure(Exception):
    """Why the daemon cannot start, in one line."""


def listening_socket(path: str) -> tuple[socket.socket, bool, OwnedFd | None]:
    """Return the socket to accept from, whether it was bound here, at `path`, and the watches of the ledger.

    Those are there if a service manager has kept them, and then they are the caller's. Raises StartFailure.
    """
    if "LISTEN_FDS" in os.environ or "LISTEN_PID" in os.environ:
        listening, kept = inherited()
        if listening is not None:
            return listening, False, kept
        return bound(path), True, kept
    return bound(path), True, None


def inherited() -> tuple[socket.socket | None, OwnedFd | None]:
    """Return the socket that systemd has passed, and what it has kept. Raises StartFailure for all else.

    A service that was not started by its socket may have been handed what was kept only.
    """
    from systemd import daemon  # type: ignore[import-untyped]

    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    try:
        fds = daemon.listen_fds(unset_environment=True)
    except OSError as error:
        raise StartFailure(f"LISTEN_FDS, LISTEN_PID: no such numbers ({error.strerror})") from None
    kept = None
    for fd, name in zip(list(fds), names, strict=False):
        if name == WATCHES_NAME and watch.is_inotify(fd):
            os.set_inheritable(fd, False)
            fds.remove(fd)
            if kept is not None:
                kept.close()
            kept = OwnedFd(fd)
    if not fds and kept is not None:
        return None, kept
    if len(fds) != 1:
        raise StartFailure(f"LISTEN_FDS: exactly one socket is needed, {len(fds)} came for this process")
    if not daemon.is_socket_unix(fds[0], socket.SOCK_STREAM, 1):
        raise StartFailure("LISTEN_FDS: what came is no listening AF_UNIX stream socket")
    os.set_inheritable(fds[0], False)
    return socket.socket(fileno=fds[0]), kept


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
