"""Attaching a mount in the mount namespace of a caller, and detaching it there.

By a throw-away child that is in that namespace (kernel/visitor). A mount is attached at a descriptor, never
at a path; then the path has to lead to that very mount, which is told from any other by its unique id, or it
is taken away again.

To detach, a name is needed: whoever has a descriptor of a mount keeps it busy. So the child holds the
directory that the mount is in, finds the very mount under its name, and detaches what has this name there.
Who can exchange the two in between owns the directory; and that one could detach whatever is mounted in it
without any help, by removing the name in another mount namespace, where nothing is mounted on it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING

from mountd.errors import SyscallError
from mountd.kernel import mount_api
from mountd.kernel.flags import MoveMount, Propagation, StatmountMask, StatxMask, Unmount
from mountd.kernel.mount_info import mount_id, statmount
from mountd.kernel.numbers import AT_FDCWD
from mountd.kernel.paths import statx
from mountd.kernel.visitor import visit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mountd.kernel.visitor import Visitor

    Ids = tuple[int, int, Iterable[int]]
    # What is wrong with the place, before, and once the mount with this id is attached there.
    Problem = Callable[[int | None], str | None]

AT_TARGET = MoveMount.F_EMPTY_PATH | MoveMount.T_EMPTY_PATH
COMPONENT = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Outcome(StrEnum):
    """What came of detaching a mount."""

    DONE = "done"
    ABSENT = "absent"  # it is not attached in this namespace
    COVERED = "covered"  # something else is in the way
    BUSY = "busy"
    PARTLY = "partly"  # the mount is busy, and what was below it is detached (`execute.trees`)


def attach(
    mount_fd: int,
    target_fd: int,
    namespace_fd: int,
    ids: Ids,
    problem: Problem,
    below: Sequence[int] = (),
    keep: Sequence[int] = (),
) -> str | None:
    """Attach the mount at the target, in that namespace; all descriptors are borrowed.

    `below` are the mounts that are attached below it already, and come along; `keep`, what the child shall
    have open for as long as it is there. Returns what is wrong with the place, None if it is attached there
    now. `problem` is called in the child, before and afterwards. Whatever is wrong, the mount is attached
    nowhere then. Raises SyscallError.
    """
    id = mount_id(mount_fd)

    def work(visitor: Visitor) -> bytes:
        wrong = problem(None)
        if wrong is not None:
            return wrong.encode(errors="surrogateescape")
        mount_api.move_mount(mount_fd, "", to_dir_fd=target_fd, flags=AT_TARGET)
        try:
            make_private([mount_fd, *below])
            wrong = problem(id)
        except BaseException:
            visitor.drop(mount_fd)
            raise
        if wrong is None:
            return b""
        visitor.drop(mount_fd)
        return wrong.encode(errors="surrogateescape")

    try:
        said = visit(namespace_fd, [mount_fd, target_fd, *below, *keep], ids, work)
    except BaseException:
        # Who has done it may have been ended in between.
        with suppress(SyscallError):
            drop(mount_fd, namespace_fd, ids)
        raise
    return said.decode(errors="surrogateescape") or None


def make_private(mounts: Sequence[int]) -> None:
    """Have the attached mounts of a tree take part in nothing. Raises SyscallError.

    What is attached to a shared mount becomes one; what is mounted below it is nobody else's. But where the
    directory is shown in other mount namespaces, they have got a copy of the tree, and it has to go from
    there when it goes from here: the kernel sees to that only for what lies on a mount that is shared. So
    those with another one of the tree below them stay what they have become.
    """
    inner = {statmount(mount_id(fd), StatmountMask.MNT_BASIC).parent_id for fd in mounts[1:]}
    for fd in mounts:
        if mount_id(fd) not in inner:
            mount_api.mount_setattr(fd, propagation=Propagation.PRIVATE)


def drop(mount_fd: int, namespace_fd: int, ids: Ids) -> None:
    """Take the attached mount away again, in use or not. Raises SyscallError."""

    def work(visitor: Visitor) -> bytes:
        visitor.drop(mount_fd)
        return b""

    visit(namespace_fd, [mount_fd], ids, work)


def detach(id: int, namespace_fd: int, ids: Ids, *, lazy: bool) -> Outcome:
    """Detach the mount with the unique `id` in that namespace; the descriptor is borrowed.

    With `lazy` also what is in use: it ends with its last user. `ids` are those of whose directories it is
    in. Raises SyscallError.
    """
    flags = Unmount.NOFOLLOW | Unmount.DETACH if lazy else Unmount.NOFOLLOW

    def work(_: Visitor) -> bytes:
        if not is_there(id):
            return Outcome.ABSENT.encode()
        name = go_to(id)
        if name is None:
            return Outcome.COVERED.encode()
        try:
            mount_api.umount(name, flags)
        except SyscallError as error:
            if error.errno == errno.EBUSY:
                return Outcome.BUSY.encode()
            raise
        return (Outcome.COVERED if is_there(id) else Outcome.DONE).encode()

    return Outcome(visit(namespace_fd, [], ids, work).decode())


def is_there(id: int, namespace: int = 0) -> bool:
    """Tell whether the mount with the unique `id` is attached in a mount namespace, 0 for this process's.

    Raises SyscallError.
    """
    try:
        statmount(id, StatmountMask.MNT_BASIC, namespace)
    except SyscallError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def go_to(id: int) -> str | None:
    """Make the directory that a mount is attached in the current one, and return its name there.

    None if its path does not lead to it, as when something else is mounted over it. Raises OSError.
    """
    names = names_to(id)
    return None if not names else go_down(os.open("/", COMPONENT), names, id)


def names_to(id: int) -> list[str]:
    """Return the names on the path to a mount, from the root directory; none if it has no plain one."""
    names = (statmount(id, StatmountMask.MNT_POINT).mount_point or "").split("/")[1:]
    return names if all(names) else []


def go_down(at: int, names: list[str], id: int) -> str | None:
    """As `go_to`, by these names from the directory `at` on, which is closed. Raises OSError."""
    *above, last = names
    at = walk(at, above)
    try:
        os.fchdir(at)
    finally:
        os.close(at)
    found = statx(AT_FDCWD, last, StatxMask.MNT_ID_UNIQUE, sync=False)
    return last if found.stx_mnt_id == id else None


def walk(at: int, names: list[str]) -> int:
    """Return what the names lead to, from the directory `at` on, which is closed. Raises OSError."""
    for name in names:
        try:
            below = os.open(name, COMPONENT, dir_fd=at)
        finally:
            os.close(at)
        at = below
    return at
