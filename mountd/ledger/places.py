"""The files of the ledger: who has one, and taking away those that are nobody's any more."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from typing import TYPE_CHECKING

from mountd.ledger.record import MAXIMUM_SIZE, decode

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

# A path, with the inode and the contents that it had when it was looked at; None for any contents, as it is
# held open.
Place = tuple[str, int, bytes | None]


def free(ledger: str, places: Collection[Place]) -> None:
    """Remove these places of the ledger in that directory, unless they are others' by now.

    Raises OSError.
    """
    with freeing(ledger):
        for place in places:
            found = look_at(place[0])
            if found is not None and found[:2] == place[:2] and place[2] in (None, found[2]):
                os.unlink(place[0])


def free_abandoned(ledger: str, paths: Collection[str]) -> None:
    """Remove what has no record at these paths of the ledger, unless somebody is about to write it.

    Raises OSError.
    """
    with freeing(ledger):
        for path in paths:
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if decode(os.read(fd, MAXIMUM_SIZE)) is None:
                        os.unlink(path)
                finally:
                    os.close(fd)


@contextlib.contextmanager
def freeing(ledger: str) -> Iterator[None]:
    """Be the only one who frees places, so that none of them becomes another's meanwhile. Raises OSError.

    A ledger that is gone has no places.
    """
    try:
        fd = os.open(ledger, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield  # with all its places
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def look_at(path: str) -> Place | None:
    """Return what is at a path of the ledger, None for nothing, or nothing of ours."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        return (path, status.st_ino, os.read(fd, MAXIMUM_SIZE)) if stat.S_ISREG(status.st_mode) else None
    finally:
        os.close(fd)


def is_locked(fd: int) -> bool:
    """Lock a new place, and tell whether nobody has taken it for an abandoned one before."""
    fcntl.flock(fd, fcntl.LOCK_EX)
    return os.fstat(fd).st_nlink > 0
