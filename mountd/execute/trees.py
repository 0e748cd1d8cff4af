"""Trees of mounts, those of a disk image with several partitions: put together, and detached.

A tree is put together before anybody sees it, and attached by one move_mount(2): all of it, or nothing.
While it is being made, it is held by descriptors of this process only, and gone with it.

A mount that has others below it is busy for umount2(2), whoever uses it or does not. So a tree is detached
from its ends, the last that was attached first, in the order that undoes what attaching did. That is not one
step, and before the first one, whether the tree is in use is found out as far as it can be:

* what has nothing below it, the kernel tells of: such a mount can be marked to go, as if it was to expire,
  and that is refused for one that is in use. The mark comes off it with the next look that is taken at it;
* of what has something below it, /proc tells which processes have it open, or are in it.

What is used without a process that shows it, or from just then on, keeps the mount that has it, and those
above it; what was below is gone by then.
"""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage
from mountd.execute.attachment import COMPONENT, Outcome, go_down, go_to, is_there, names_to, walk
from mountd.kernel import attaching, capabilities, mount_api, moving
from mountd.kernel.flags import StatmountMask, Unmount
from mountd.kernel.mount_info import listmount, statmount
from mountd.kernel.visitor import visit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mountd.execute.attachment import Ids
    from mountd.execute.run import Sealer
    from mountd.kernel.visitor import Visitor

ANOTHER_IS_THERE = "the directory for one of its partitions leads to where another one is"


def put_together(mounts: Sequence[tuple[int, str]], seal: Sealer) -> list[str]:
    """Attach detached mounts to the first of them, each at its place in it; all are borrowed.

    Links of an image are followed as if its root directory were that of the system. Returns the places of
    those that are left out (`attaching.attach_parts`). Raises NotFound for a directory that is not there,
    InvalidImage, NotSupported, SyscallError.
    """
    (root_fd, _), *others = mounts

    def put(mount_fd: int, directory_fd: int) -> None:
        if moving.mount_at(directory_fd) is not None:
            raise InvalidImage(ANOTHER_IS_THERE)
        seal.put_on(mount_fd, directory_fd)

    # Whoever may enter the directories of the image: what is below them is no part of it.
    with capabilities.reading_everything():
        return attaching.attach_parts(root_fd, others, put)


def detach(
    id: int, tree: Sequence[int], namespace_fd: int, ids: Ids, *, lazy: bool
) -> tuple[Outcome, set[int]]:
    """Detach the mount with the unique `id` in that namespace, with those of its tree that are below it.

    `tree` are the ids of the whole, as they were attached; for the rest as `attachment.detach`. Returns what
    came of it, and the ids of the tree that are not attached there now.
    """

    def work(_: Visitor) -> bytes:
        outcome = take_down(id, tree, lazy=lazy) if is_there(id) else Outcome.ABSENT
        return json.dumps([outcome.value, [each for each in tree if not is_there(each)]]).encode()

    outcome, gone = json.loads(visit(namespace_fd, [], ids, work))
    return Outcome(outcome), set(gone)


def take_down(id: int, tree: Sequence[int], *, lazy: bool) -> Outcome:
    """Detach a mount that is there, from within a visitor. Raises OSError."""
    below = set(listmount(id))
    if lazy or not below:
        return unmount(id, tree[0], Unmount.NOFOLLOW | (Unmount.DETACH if lazy else 0))
    if not below <= set(tree):
        return Outcome.BUSY  # by a mount that is none of ours
    order = [each for each in reversed(tree) if each in below or each == id]
    inner = {statmount(each, StatmountMask.MNT_BASIC).parent_id for each in order}
    for each in order:
        if each not in inner and unmount(each, tree[0], Unmount.NOFOLLOW | Unmount.EXPIRE) is Outcome.BUSY:
            return Outcome.BUSY
    for each in order:
        outcome = unmount(each, tree[0], Unmount.NOFOLLOW)
        if outcome is not Outcome.DONE:
            return outcome if each == order[0] else Outcome.PARTLY
    return Outcome.DONE


def unmount(id: int, first: int, flags: Unmount) -> Outcome:
    """Detach one mount of a tree, of which `first` is the first. Raises OSError."""
    if not is_there(id):
        return Outcome.DONE

    def do(name: str | None) -> Outcome:
        if name is None:
            return Outcome.COVERED
        mount_api.umount(name, flags)
        return Outcome.COVERED if is_there(id) else Outcome.DONE

    try:
        return by_name(id, first, do)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return Outcome.BUSY
        if error.errno in (errno.EAGAIN, errno.ENOENT, errno.ENOTDIR):
            # It is marked; or what is over it has no such directory.
            return Outcome.COVERED
        raise


def by_name(id: int, first: int, do: Callable[[str | None], Outcome]) -> Outcome:
    """Do something with the name of a mount, from the directory that has it. Raises OSError.

    Up to the first one of the tree, the way is the user's. From there on, it is an image's, whose modes do
    not keep what is mounted in it.
    """
    if id == first or not is_there(first):
        return do(go_to(id))
    above, names = names_to(first), names_to(id)
    if not above or names[: len(above)] != above:
        return do(None)
    at = walk(os.open("/", COMPONENT), above)
    with capabilities.reading_everything():
        return do(go_down(at, names[len(above) :], id))
