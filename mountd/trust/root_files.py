"""Files that only root can have written: policy files, and the keys that they name."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = frozenset({0})
MAXIMUM_KEY_BYTES = 64 << 10
MAXIMUM_CERTIFICATES = 64
MAXIMUM_COMPONENTS = 64
# O_NONBLOCK, as a pipe in the place of a file would otherwise wait for a writer for ever.
PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class NotUsable(ValueError):
    """A file that cannot be used; the text says why and what to do."""


@contextmanager
def opened(path: str, flags: int, directory_fd: int | None = None) -> Iterator[int]:
    """Open a file, and close it again at the end of the block. Raises OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def check_owner(status: os.stat_result, owners: frozenset[int]) -> None:
    """Raise NotUsable if somebody else than `owners` could have written this."""
    if status.st_uid not in owners:
        raise NotUsable(f"it belongs to uid {status.st_uid}; chown it to root")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotUsable("its group or others can write to it; chmod it go-w")


def read_all(fd: int, maximum: int) -> bytes:
    """Return the bytes of `fd`. Raises NotUsable if there are more than `maximum`, OSError."""
    contents = bytearray()
    while chunk := os.read(fd, maximum + 1 - len(contents)):
        contents += chunk
        if len(contents) > maximum:
            raise NotUsable(f"it is larger than {maximum} bytes")
    return bytes(contents)


def read_keys(path: str, *, directory_too: bool, owners: frozenset[int] = ROOT) -> tuple[bytes, ...]:
    """Return the contents of a file with keys, or of all *.crt files of a directory, if that may be one.

    Every component of the path has to belong to `owners` and be writable by nobody else, and no link may be
    among them: else somebody could put another key there. Raises NotUsable.
    """
    names = path.split("/")[1:]
    if not path.startswith("/") or any(name in ("", ".", "..") for name in names):
        raise NotUsable(f"“{path}” is not a plain absolute path")
    if len(names) > MAXIMUM_COMPONENTS:
        raise NotUsable(f"“{path}” has more than {MAXIMUM_COMPONENTS} components")
    shown = "/"
    at = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names[:-1]:
            check_directory(shown, os.fstat(at), owners)
            shown = os.path.join(shown, name)
            below = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
        check_directory(shown, os.fstat(at), owners)
        shown = path
        with opened(names[-1], PLAIN, at) as fd:
            return read_opened(path, fd, directory_too, owners)
    except OSError as error:
        raise NotUsable(f"{shown}: {reason(error)}") from None
    finally:
        os.close(at)


def check_directory(path: str, status: os.stat_result, owners: frozenset[int]) -> None:
    """Raise NotUsable unless what `path` holds is only the owners' to replace."""
    if stat.S_ISLNK(status.st_mode):
        raise NotUsable(f"{path}: it is a symbolic link; write the path that it leads to")
    if not stat.S_ISDIR(status.st_mode):
        raise NotUsable(f"{path}: it is not a directory")
    # In a directory such as /tmp, what belongs to root can be removed or renamed by nobody else.
    if status.st_uid in owners and status.st_mode & stat.S_ISVTX:
        return
    try:
        check_owner(status, owners)
    except NotUsable as error:
        raise NotUsable(f"{path}: {error}") from None


def read_opened(path: str, fd: int, directory_too: bool, owners: frozenset[int]) -> tuple[bytes, ...]:
    """Return what `read_keys` does, for the opened `path`."""
    status = os.fstat(fd)
    if not (directory_too and stat.S_ISDIR(status.st_mode)):
        return (read_file(path, fd, owners),)
    try:
        check_owner(status, owners)
    except NotUsable as error:
        raise NotUsable(f"{path}: {error}") from None
    names = sorted(name for name in os.listdir(fd) if name.endswith(".crt") and not name.startswith("."))
    if not names:
        raise NotUsable(f"{path}: there is no .crt file in it")
    if len(names) > MAXIMUM_CERTIFICATES:
        raise NotUsable(f"{path}: there are more than {MAXIMUM_CERTIFICATES} certificates in it")
    found = []
    for name in names:
        inner = os.path.join(path, name)
        try:
            with opened(name, PLAIN, fd) as file:
                found.append(read_file(inner, file, owners))
        except OSError as error:
            raise NotUsable(f"{inner}: {reason(error)}") from None
    return tuple(found)


def read_file(path: str, fd: int, owners: frozenset[int]) -> bytes:
    """Return the contents of one file with keys. Raises NotUsable naming `path`, OSError."""
    status = os.fstat(fd)
    try:
        if not stat.S_ISREG(status.st_mode):
            raise NotUsable("it is not a regular file")
        check_owner(status, owners)
        contents = read_all(fd, MAXIMUM_KEY_BYTES)
        if not contents:
            raise NotUsable("it is empty")
    except NotUsable as error:
        raise NotUsable(f"{path}: {error}") from None
    return contents


def reason(error: OSError) -> str:
    """Return why a file could not be opened."""
    if error.errno == errno.ELOOP:
        return "it is a symbolic link; write the path that it leads to"
    return error.strerror or str(error)
