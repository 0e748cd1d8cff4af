"""Detaching mounts whose holders would rather keep them.

Whoever is root of a mount namespace can mount something over a mount, over a directory above it, or over the
root directory; or have a file system of its own above it, whose server does not answer. No path leads to the
mount then, and there is no other way to detach it. So what is in the way is detached first, together with
what is mounted in that, where the namespace is the holder's own.

The host's is not, nor is one in a container of somebody else, to which a mount has come by propagation.
There, nothing is detached but other mounts that were handed out to the same owner.

No file system is asked for what lies in it if it can be one with a server in the holder's hands. What cannot
be told from others, such as an overlay over one, comes last, and is left alone once it takes too long.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from mountd.errors import SyscallError
from mountd.execute.attachment import COMPONENT, is_there, names_to
from mountd.kernel import mount_api
from mountd.kernel.flags import Clone, StatmountMask, StatxMask, Unmount
from mountd.kernel.mount_info import statmount
from mountd.kernel.namespaces import setns
from mountd.kernel.numbers import AT_FDCWD
from mountd.kernel.paths import statx
from mountd.kernel.visitor import visit

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from mountd.execute.attachment import Ids
    from mountd.kernel.visitor import Visitor

    Way = tuple[str, int]  # a name in the current directory, and the mount that it leads to

MAXIMUM_IN_THE_WAY = 1024
MAXIMUM_ANCESTORS = 1024
COUNT = struct.Struct("=I")
SECONDS_TO_TELL = 0.2
HIDDEN = 0  # no mount has this id
ROOT = "/"
FUSE, OVERLAY = "fuse", "overlay"
FLAGS = Unmount.NOFOLLOW | Unmount.DETACH


def take_back(
    ids: Sequence[int],
    namespace_fd: int,
    user: Ids,
    loose: Collection[int] | None,
    seconds: float,
    *,
    cautious: bool = False,
) -> int:
    """Detach the mounts with these unique ids in that namespace, one after the other, in `seconds` at most.

    The descriptor is borrowed; `user` are the ids of whose directories they are in. `loose` are the mounts
    that may be detached if they are in the way, None for all. If it is `cautious`, what is below an overlay
    is left out. What can be detached is: who wants to know looks afterwards. Returns how many calls that
    took, with what was in the way, so that one that begins with more of that than there is time for can be
    told from one that gets nowhere. Raises SyscallError, TooManyHanging.
    """
    end = time.monotonic() + seconds
    ordered = end - seconds * 3 / 4  # most of the time is for what it is about

    def work(_: Visitor) -> bytes:
        count = 0
        for id in safest_first(ids, ordered, cautious=cautious):
            with suppress(OSError):
                for _step in detaching(id, namespace_fd, loose):
                    count += 1
                    if time.monotonic() > end:
                        return COUNT.pack(count)
        return COUNT.pack(count)

    # A moment more, for one that is not held up to tell.
    (count,) = COUNT.unpack(visit(namespace_fd, [], user, work, seconds + SECONDS_TO_TELL))
    return int(count)


def safest_first(ids: Sequence[int], end: float, *, cautious: bool) -> list[int]:
    """Return mounts in the order in which to come to them, or only the safe ones if it is `cautious`.

    What is below an overlay comes last: one that waits for a server comes to nothing that is after it. All
    that is in a container whose root directory is an overlay is below that, which says nothing. Without
    more time, what is left to look at is taken for being below one.
    """
    known = {mount_at(AT_FDCWD, ROOT): False}
    safe: list[int] = []
    others: list[int] = []
    for id in ids:
        (others if time.monotonic() > end or is_below_overlay(id, known) else safe).append(id)
    return safe if cautious else safe + others


def is_below_overlay(id: int, known: dict[int, bool]) -> bool:
    """Tell whether a mount is, or is below, an overlay; `known` are answers, and gets those found out."""
    passed: list[int] = []
    answer = False
    with suppress(OSError):
        while id not in known and len(passed) < MAXIMUM_ANCESTORS:
            passed.append(id)
            known[id] = False  # of a root, which is below itself
            answer = is_of(id, OVERLAY)
            if answer:
                break
            id = statmount(id, StatmountMask.MNT_BASIC).parent_id
        else:
            answer = known.get(id, True)
    known.update(dict.fromkeys(passed, answer))
    return answer


def detaching(id: int, namespace_fd: int, loose: Collection[int] | None) -> Iterator[None]:
    """Detach one, from within a visitor, if there is a way to it; yield after each call. Raises OSError."""
    for _ in range(MAXIMUM_IN_THE_WAY):
        way = find_way(id) if is_there(id) else None
        if way is None:
            return
        name, found = way
        if found != id and loose is not None and found not in loose:
            return
        mount_api.umount(name, FLAGS)
        if name == ROOT:
            setns(namespace_fd, Clone.NEWNS)  # what was our root directory is none any more
        yield


def find_way(id: int) -> Way | None:
    """Return the mount to be detached next so that `id` is, and go to the directory that has its name.

    That is `id` itself, or what is in the way. None if its path leads nowhere. Raises OSError.
    """
    # What it is below takes long to find out, if that is much, and mostly nothing is in the way.
    with suppress(OSError):
        if (way := walk(id, None)) is not None:
            return way
    return walk(id, ancestors(id))


def walk(id: int, above: list[int] | None) -> Way | None:
    """Go to the mount; return what is in the way if `above` says what is not, which are its ancestors.

    Raises OSError.
    """
    at = os.open(ROOT, COMPONENT)
    try:
        mount = mount_at(at, "")
        if above is not None and mount not in above and not (mount == HIDDEN and is_fuse(above[-1])):
            return ROOT, mount
        for name in names_to(id):
            found = mount_at(at, name)
            if found == id or (found != mount and is_strange(found, above)):
                os.fchdir(at)
                return None if found != id and above is None else (name, found)
            below = os.open(name, COMPONENT, dir_fd=at)
            os.close(at)
            at, mount = below, found
    finally:
        os.close(at)
    return None


def is_strange(mount: int, above: list[int] | None) -> bool:
    """Tell whether a mount is not to be entered: in the way, or maybe with a server of a user's."""
    if mount == HIDDEN or is_fuse(mount):
        return True
    return mount not in above if above is not None else is_of(mount, OVERLAY)


def mount_at(at: int, name: str) -> int:
    """Return the mount that a name leads to, HIDDEN for one that its owner alone may look at.

    Raises OSError.
    """
    try:
        return int(statx(at, name, StatxMask.MNT_ID_UNIQUE, sync=False).stx_mnt_id)
    except SyscallError as error:
        if error.errno != errno.EACCES:
            raise
        # FUSE refuses this to all but its owner. That the name leads there, it does not.
        os.close(os.open(name or ".", COMPONENT, dir_fd=at))
        return HIDDEN


def ancestors(id: int) -> list[int]:
    """Return a mount, and those that it is below, up to the root. Raises SyscallError.

    Of a stack of very many, only so many: what is above these is taken for being in the way.
    """
    found: dict[int, None] = {}
    while id not in found and len(found) < MAXIMUM_ANCESTORS:
        try:
            above = statmount(id, StatmountMask.MNT_BASIC).parent_id
        except SyscallError as error:
            if error.errno == errno.ENOENT and found:
                break  # of the root of all, which lies on what cannot be seen
            raise
        found[id] = None
        id = above
    return list(found)


def is_fuse(mount: int) -> bool:
    """Tell whether a mount is of a file system with a server of a user's. Raises SyscallError."""
    return is_of(mount, FUSE)


def is_of(mount: int, type: str) -> bool:
    """Tell whether a mount is of a file system whose name begins so. Raises SyscallError."""
    return (statmount(mount, StatmountMask.FS_TYPE).fs_type or "").startswith(type)
