"""Whose the object directories of a composefs are, and whether fs-verity can check what is in them.

In such a directory files lie under names of their digests, most of them in directories of two digits. A path
that is root's says nothing about what is below it; so it is looked at what is in the directory itself.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from mountd.evidence import fs_verity
from mountd.evidence.directory import collect_ownership
from mountd.evidence.model import Objects, Ownership
from mountd.fds import OwnedFd

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.evidence.location import Walker
    from mountd.source.model import Directory

MAXIMUM_NAMES = 4096
OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def collect_objects(fd: int, directory: Directory, caller: Caller, walker: Walker) -> Objects:
    """Find out about the directory that `fd`, borrowed, is open as, not with O_PATH. Raises NotSupported."""
    found = collect_ownership(fd, directory, caller, walker)
    ownership = found.ownership or Ownership.OTHER
    problem = found.ownership_problem
    if ownership is Ownership.ROOT:
        problem = problem_inside(fd)
    elif problem is None:
        problem = f"it is {ownership}-owned"
    return Objects(ownership, problem, fs_verity.missing_in(fd))


def problem_inside(fd: int) -> str | None:
    """Return why what is in the directory `fd`, borrowed, is not root's alone; None if it is.

    It has to be done before anything is looked up in it: only root can change what has been looked at.
    """
    try:
        # Opened anew: how far the caller's has been read is the caller's.
        with OwnedFd(os.open(".", OPEN, dir_fd=fd)) as own, os.scandir(own.fileno()) as found:
            for count, entry in enumerate(found):
                if count == MAXIMUM_NAMES:
                    return f"there are more than {MAXIMUM_NAMES} names in it"
                status = entry.stat(follow_symlinks=False)
                if status.st_uid != 0 or (status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)):
                    return "what is in it can be changed by others than root"
    except OSError as error:
        return f"what is in it cannot be looked at ({error.strerror})"
    return None
