"""Whose the object directories of a composefs are, and whether fs-verity can check what is in them.

In such a directory files lie under names of their digests, most of them in directories of two digits. A path
that is root's says nothing about what is below it; so it is looked at all of that, and nobody may have any
of it open for writing. For a composefs, the kernel follows no symbolic links there, and enters no other
mounts (LOOKUP_NO_SYMLINKS and LOOKUP_NO_XDEV in fs/overlayfs/namei.c), so that what these lead to is of no
matter.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import nullcontext
from typing import TYPE_CHECKING

from mountd.evidence import fs_verity
from mountd.evidence.directory import collect_ownership
from mountd.evidence.model import Objects, Ownership
from mountd.fds import OwnedFd
from mountd.kernel import lease
from mountd.kernel.capabilities import reading_everything
from mountd.kernel.flags import Resolve, StatxMask
from mountd.kernel.mount_info import mount_id
from mountd.kernel.paths import openat2, statx

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mountd.caller.model import Caller
    from mountd.evidence.location import Walker
    from mountd.source.model import Directory

MAXIMUM_NAMES = 1 << 18  # a whole system has some hundred thousand files
MAXIMUM_DEPTH = 8
OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
STAYING = Resolve.NO_XDEV | Resolve.NO_SYMLINKS | Resolve.BENEATH
LOOKED_AT = StatxMask.TYPE | StatxMask.MODE | StatxMask.UID | StatxMask.MNT_ID_UNIQUE


def collect_objects(
    fd: int, directory: Directory, caller: Caller, walker: Walker, *, inside: bool
) -> Objects:
    """Find out about the directory that `fd`, borrowed, is open as, not with O_PATH.

    `inside` is whether it matters what is in a directory of root's, which takes a while.

    Raises NotSupported.
    """
    found = collect_ownership(fd, directory, caller, walker)
    ownership = found.ownership or Ownership.OTHER
    problem = found.ownership_problem
    if ownership is Ownership.ROOT:
        problem = problem_inside(fd) if inside else None
    elif problem is None:
        problem = f"it is {ownership}-owned"
    return Objects(ownership, problem, fs_verity.missing_in(fd))


def problem_inside(fd: int) -> str | None:
    """Return why what is in the directory `fd`, borrowed, is not root's alone; None if it is.

    It has to be done before anything is looked up in it: only root can change what has been looked at.
    """
    names = 0
    try:
        mount = mount_id(fd)
        for problem in problems_below(fd, mount, MAXIMUM_DEPTH):
            if problem is not None:
                return problem
            names += 1
            if names > MAXIMUM_NAMES:
                return f"there are more than {MAXIMUM_NAMES} names in it"
    except OSError as error:
        return f"what is in it cannot be looked at ({errno.errorcode.get(error.errno or 0)})"
    return None


def problem_of_file(at: int, name: str, mode: int) -> str | None:
    """Return why others can write to a file of root's in the directory `at`, borrowed. Raises OSError."""
    # Root may have files that it cannot read itself.
    with nullcontext() if mode & stat.S_IRUSR else reading_everything():
        own = OwnedFd(os.open(name, lease.OPEN_TO_ASK, dir_fd=at))
    with own:
        written = lease.has_writer(own.fileno())
    return "somebody has what is in it open for writing" if written else None


def problems_below(fd: int, mount: int, depth: int) -> Iterator[str | None]:
    """Yield what is wrong with each name in the directory `fd`, borrowed, and below it.

    `mount` is the unique id of the mount that it is in: in a namespace of the caller's, the caller can have
    mounted over what is there, and what that hides is what the composefs has. Raises OSError.
    """
    # Opened anew: how far the caller's has been read is the caller's.
    with OwnedFd(os.open(".", OPEN, dir_fd=fd)) as own, os.scandir(own.fileno()) as found:
        for entry in found:
            status = statx(own.fileno(), os.fsencode(entry.name), LOOKED_AT, sync=False)
            if status.stx_mnt_id != mount:
                yield "something is mounted on what is in it"
            is_link = stat.S_ISLNK(status.stx_mode)
            others = status.stx_uid != 0 or (status.stx_mode & 0o022 and not is_link)
            if not others and stat.S_ISREG(status.stx_mode):
                yield problem_of_file(own.fileno(), entry.name, status.stx_mode)
                continue
            yield "what is in it can be changed by others than root" if others else None
            if stat.S_ISDIR(status.stx_mode):
                if depth == 0:
                    yield f"there are more than {MAXIMUM_DEPTH} directories in one another in it"
                with openat2(own.fileno(), os.fsencode(entry.name), OPEN, STAYING) as below:
                    yield from problems_below(below.fileno(), mount, depth - 1)
