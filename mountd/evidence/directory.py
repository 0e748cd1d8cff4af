"""Whose a directory is, as far as that can make it trustworthy.

What is in a directory can change at any time, so that nothing is said about it: only about who can
change it.

* It is root's, under a path that is root's all the way: then root alone has put there what is in it.
* It is the caller's own: then it is worth as much as the caller.
* It belongs to the foreign range, ids that are nobody's, and lies below a directory of the caller's: then
  the caller has put it there, as nobody can act with these ids but by a mount that maps them.

The way up is walked by descriptors, one ".." at a time, and ends where the mount does: above that may be
what the caller has mounted there. All on the way has to be foreign as well. It is walked a second time once
the mount is made, so that what is moved meanwhile is of no use (`service.directories`).
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from mountd.caller.model import FOREIGN, OVERFLOW_ID
from mountd.errors import SyscallError
from mountd.evidence.location import NotThere
from mountd.evidence.model import Evidence, Ownership
from mountd.kernel.cloning import open_parent
from mountd.kernel.flags import StatxMask
from mountd.kernel.paths import statx

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.evidence.location import Walker
    from mountd.fds import OwnedFd
    from mountd.source.model import Directory

MAXIMUM_LEVELS = 16
WANTED = StatxMask.BASIC_STATS | StatxMask.MNT_ID_UNIQUE


def collect_ownership(fd: int, directory: Directory, caller: Caller, walker: Walker) -> Evidence:
    """Find out whose the directory is that `fd`, borrowed, is open as. Raises NotSupported."""
    if directory.uid == 0:
        return of_root(directory, caller, walker)
    problem = None
    if directory.uid == caller.uid and caller.uid != OVERFLOW_ID:
        ownership = Ownership.CALLER
    elif directory.uid in FOREIGN and directory.gid in FOREIGN:
        problem = problem_above(fd, directory, caller.uid)
        ownership = Ownership.FOREIGN if problem is None else Ownership.OTHER
    else:
        ownership = Ownership.OTHER
        problem = (
            f"it belongs to uid {directory.uid} and gid {directory.gid}, and the caller is {caller.uid}"
        )
    return Evidence(None, "it is not root's", False, ownership=ownership, ownership_problem=problem)


def of_root(directory: Directory, caller: Caller, walker: Walker) -> Evidence:
    """Find out whether nobody but root can have put a directory of root's where it is."""
    path, problem = None, None
    try:
        path = walker.walk(directory, caller.on_host, stat.S_IFDIR)
    except NotThere as reason:
        problem = str(reason)
    except SyscallError as error:
        problem = f"its path cannot be checked ({error.errno_name})"
    ownership = Ownership.OTHER if path is None else Ownership.ROOT
    return Evidence(path, problem, False, ownership=ownership, ownership_problem=problem)


def problem_above(fd: int, directory: Directory, uid: int) -> str | None:
    """Return why no directory above `fd`, borrowed, makes it the caller's; None if one does.

    `uid` is the caller's.
    """
    mount, owner = directory.mount, directory.uid
    nobodys = f"no directory above it, on the same mount, belongs to uid {uid}"
    if uid == OVERFLOW_ID:
        return nobodys
    held: OwnedFd | None = None
    try:
        for _ in range(MAXIMUM_LEVELS):
            at = fd if held is None else held.fileno()
            above = open_parent(at, owner)
            if held is not None:
                held.close()
            held = above
            status = statx(held.fileno(), "", WANTED, sync=False)
            owner = status.stx_uid
            if status.stx_mnt_id != mount:
                return nobodys
            if status.stx_uid == uid:
                return None
            if status.stx_uid not in FOREIGN:
                return f"{nobodys}, below the first that is uid {status.stx_uid}'s"
        return f"{nobodys}, within {MAXIMUM_LEVELS} levels"
    except SyscallError as error:
        # EXDEV: that is the root of the mount, whatever is above it.
        return (
            nobodys if error.errno_name == "EXDEV" else f"the way up cannot be walked ({error.errno_name})"
        )
    finally:
        if held is not None:
            held.close()
