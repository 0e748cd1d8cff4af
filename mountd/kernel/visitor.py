"""A throw-away child in another mount namespace: for what can only be done from within.

The tree that it finds there is somebody else's, so that

* it imports nothing any more, opens no file, and runs no program: what is there by the name of a module or a
  library is not ours;
* it looks at files with the rights of the one whom it acts for: its user and group id for file systems
  (setfsuid(2)) are that one's. Its real and effective ids remain ours, or that one could trace or kill it;
* it holds nothing but what its work is about, is not dumpable, and dies with its parent;
* what the kernel says about its descriptors it reads from a directory of /proc that was opened before.
"""

import os
import struct

from mountd.errors import SyscallError
from mountd.kernel.child import (
    abandon,
    close_all_but,
    end,
    end_with_parent,
    fork,
    hanging,
    read_all,
)
from mountd.kernel.flags import Clone, Unmount
from mountd.kernel.libc import call
from mountd.kernel.mount_api import umount
from mountd.kernel.namespaces import PR_SET_DUMPABLE, setns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

MAXIMUM_ANSWER = 64 << 10  # bytes
MAXIMUM_HANGING = 16
DONE, FAILED = b"+", b"-"
NUMBER = struct.Struct("=i")


class TooManyHanging(SyscallError):
    """There is no further child while so many wait for file systems that do not answer."""

    def __init__(self) -> None:
        """It is what fork(2) raises where there are too many processes."""
        super().__init__(11, "fork(one more child, while others hang in file systems)")  # EAGAIN


class Visitor:
    """What the work of the child can do beside the other functions of this room."""

    __slots__ = ("_proc",)

    def __init__(self, proc_fd: int) -> None:
        """`proc_fd` is /proc/self/fd, of the child."""
        self._proc = proc_fd

    def path_of(self, fd: int) -> str:
        """Return where the kernel says that `fd` is, from the root of the namespace. Raises OSError."""
        return os.readlink(str(fd), dir_fd=self._proc)

    def drop(self, mount_fd: int) -> None:
        """Detach the mount `mount_fd`, and no other, from the tree. Raises SyscallError, OSError."""
        os.fchdir(self._proc)
        umount(str(mount_fd), Unmount.DETACH)


def visit(
    namespace_fd: int,
    keep: "Collection[int]",
    ids: "tuple[int, int, Iterable[int]]",
    work: "Callable[[Visitor], bytes]",
    seconds: "float | None" = None,
) -> bytes:
    """Have a child do `work` in the mount namespace `namespace_fd`, and return what it returns.

    All descriptors are borrowed; the child has those in `keep` only. `ids` are the user id, the group id and
    the other groups whose rights it has to files. After `seconds`, if given, nobody waits for it any more,
    even if it hangs in the kernel; TooManyHanging is raised if too many do by now. Raises SyscallError for
    an OSError of `work`, and where the namespace cannot be entered, or the child has ended without a word or
    is not waited for.
    """
    if seconds is not None and hanging() >= MAXIMUM_HANGING:
        raise TooManyHanging
    pid, reader = fork(lambda writer: _be(namespace_fd, keep, ids, work, writer))
    try:
        with reader:
            answer, _ = read_all(reader.fileno(), MAXIMUM_ANSWER, seconds)
    finally:
        end(pid) if seconds is None else abandon(pid)
    if answer[:1] == DONE:
        return answer[1:]
    if answer[:1] == FAILED:
        (number,) = NUMBER.unpack_from(answer, 1)
        raise SyscallError(number, answer[1 + NUMBER.size :].decode(errors="replace"))
    raise SyscallError(10, "a child in another mount namespace")  # ECHILD


def _be(
    namespace_fd: int,
    keep: "Collection[int]",
    ids: "tuple[int, int, Iterable[int]]",
    work: "Callable[[Visitor], bytes]",
    writer: int,
) -> int:
    """Be the child."""
    try:
        answer = DONE + _work(namespace_fd, keep, ids, work, writer)
    except SyscallError as error:
        answer = FAILED + NUMBER.pack(error.errno or 0) + error.call.encode(errors="replace")
    except OSError as error:
        # Its text could name a file that is not the reader's business.
        answer = FAILED + NUMBER.pack(error.errno or 0) + b"a call in another mount namespace"
    while answer:
        answer = answer[os.write(writer, answer) :]
    return 0


def _work(
    namespace_fd: int,
    keep: "Collection[int]",
    ids: "tuple[int, int, Iterable[int]]",
    work: "Callable[[Visitor], bytes]",
    writer: int,
) -> bytes:
    end_with_parent()
    proc = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    close_all_but({namespace_fd, writer, proc, *keep})
    setns(namespace_fd, Clone.NEWNS)
    uid, gid, groups = ids
    os.setgroups(list(groups))
    call("setfsgid", gid)
    call("setfsuid", uid)
    # Other ids have reset both.
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    end_with_parent()
    return work(Visitor(proc))
