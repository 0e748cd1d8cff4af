"""Telling umount(8) of what was attached for a user: its line in /run/mount/utab (kernel.utab).

The file is found where the caller sees it, in the caller's mount namespace, and only if that belongs to the
same user namespace as mountd: then it was root who made it, and what is at /run/mount there. Whoever has
made a mount namespace of their own unmounts there without help.

Nothing depends on it but whether umount(8) knows whom to ask, so that what goes wrong is no error.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from mountd.fds import OwnedFd
from mountd.kernel import namespaces, utab
from mountd.kernel.flags import Clone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


INIT = "/proc/1"


def note_attached(namespace_fd: int, *mount_ids: int) -> bool:
    """Add a line for each of the mounts that have these ids in mountinfo there; return whether that is done.

    The descriptor is borrowed.
    """

    def work(directory: int, mountinfo: str) -> bool:
        entries = [utab.Entry.of(mountinfo, each) for each in mount_ids]
        for entry in entries:
            if entry is not None:
                utab.tidy(directory, mountinfo, entry.target)
                utab.add(directory, entry)
        return None not in entries

    return _within(namespace_fd, work)


def note_detached(namespace_fd: int, target: str | None = None) -> bool:
    """Remove the lines about mounts that are gone, those at `target` or all. The descriptor is borrowed."""

    def work(directory: int, mountinfo: str) -> bool:
        utab.tidy(directory, mountinfo, None if target is None else utab.escape(target))
        return True

    return _within(namespace_fd, work)


def _within(namespace_fd: int, work: Callable[[int, str], bool]) -> bool:
    """Do `work` with libmount's directory and the mountinfo of a namespace; return whether it was done."""
    with suppress(OSError):  # SyscallError is one
        if not is_roots(namespace_fd):
            return False
        with _seen_from(namespace_fd) as process:
            root = OwnedFd(os.open(f"{process}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            with root, utab.open_directory(root.fileno()) as directory:
                path = f"{process}/mountinfo"
                with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                    return work(directory.fileno(), file.read())
    return False


@contextmanager
def _seen_from(namespace_fd: int) -> Iterator[str]:
    """Yield the directory in /proc of a process that is in this mount namespace, and in no chroot.

    It is the first of all, or a child that does nothing but wait there. Raises OSError.
    """
    if is_inits(namespace_fd):
        yield INIT
        return
    enter = partial(namespaces.setns, namespace_fd, Clone.NEWNS)
    with namespaces.Child(enter, [namespace_fd]) as child:
        yield f"/proc/{child.pid}"


def is_inits(namespace_fd: int) -> bool:
    """Tell whether the first process is in this mount namespace and can be looked at. Raises OSError."""
    try:
        init = os.stat(f"{INIT}/ns/mnt")
    except OSError:
        return False
    return namespaces.identity(namespace_fd) == (init.st_dev, init.st_ino)


def is_roots(namespace_fd: int) -> bool:
    """Tell whether a mount namespace belongs to the user namespace of this process. Raises SyscallError."""
    with namespaces.owner_of(namespace_fd) as owner:
        own = os.stat("/proc/self/ns/user")
        return namespaces.identity(owner.fileno()) == (own.st_dev, own.st_ino)
