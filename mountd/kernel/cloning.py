"""A detached mount of a directory that lies in another process's mount namespace.

The kernel clones only what is mounted in the namespace of whoever asks (open_tree(2)), and what a caller
hands over lies in the caller's. So a throw-away child enters that one, clones what the descriptor is open
as, and sends the clone back. It looks up no path there, opens nothing and loads nothing: the files that it
would see are the caller's.

The clone is of one mount only: what is mounted below the directory is no part of it, whoever mounted it.
Where the kernel would have to show what such a mount hides from the caller, it refuses (EINVAL).
"""

import errno
import os
import socket

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import mount_api, namespaces, sockets
from mountd.kernel.child import close_all_but, end, end_with_parent, fork
from mountd.kernel.flags import Clone, MountAttr, OpenTree, Propagation, Resolve
from mountd.kernel.libc import call
from mountd.kernel.mount_info import mount_id, statmount
from mountd.kernel.paths import openat2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FLAGS = OpenTree.CLONE | OpenTree.EMPTY_PATH | OpenTree.NO_AUTOMOUNT | OpenTree.CLOEXEC
PARENT = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
TIMES = int(MountAttr.ATIME_MASK)
ACCESS_TIMES = MountAttr.ATIME_MASK | MountAttr.NODIRATIME
NOT_POSSIBLE = b"idmap"


def clone_directory(fd: int, attributes: MountAttr, namespace_fd: int) -> OwnedFd:
    """Return a detached, private mount of the directory `fd` with `attributes`; both fds are borrowed.

    It lies in this process's mount namespace, or in the one that `namespace_fd` is. An idmap that its mount
    has is left out; how it keeps times stays as it is where that is locked. Raises SyscallError (EINVAL for
    what lies in neither, or hides what is below it), and NotSupported for an idmap that the kernel cannot
    leave out (before Linux 6.15).
    """
    try:
        return _clone(fd, attributes)
    except SyscallError as error:
        if error.errno != errno.EINVAL:
            raise

    def there() -> OwnedFd:
        namespaces.setns(namespace_fd, Clone.NEWNS)
        return _clone(fd, attributes)

    return by_a_child(there, {fd, namespace_fd})


def open_parent(fd: int, uid: int) -> OwnedFd:
    """Open the directory above `fd`, borrowed, on the same mount, with O_PATH.

    Where this process may not look it up, a child does as `uid`, who owns `fd`. Raises SyscallError, EXDEV
    for the root of a mount.
    """
    try:
        return openat2(fd, "..", PARENT, Resolve.NO_XDEV)
    except SyscallError as error:
        if error.errno != errno.EACCES:
            raise

    def as_owner() -> OwnedFd:
        os.seteuid(uid)
        return openat2(fd, "..", PARENT, Resolve.NO_XDEV)

    return by_a_child(as_owner, {fd})


def by_a_child(work: "Callable[[], OwnedFd]", keep: set[int]) -> OwnedFd:
    """Return what a throw-away child makes, which has nothing but the descriptors `keep`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    with ours:
        with theirs:
            pid, reader = fork(lambda _: _be_the_child(work, keep, theirs))
        with reader:
            try:
                said, fds, _ = sockets.receive(ours, 64, 1)
            finally:
                end(pid)
    if fds:
        return fds[0]
    if said == NOT_POSSIBLE:
        raise NotSupported("leaving out the idmap of a mount", hint="use a directory on a mount without one")
    raise SyscallError(int(said or b"0") or errno.ECHILD, "getting at the directory in another process")


def _be_the_child(work: "Callable[[], OwnedFd]", keep: set[int], channel: socket.socket) -> int:
    """Do the work, and send what came of it or the number of an errno."""
    end_with_parent()
    call("prctl", namespaces.PR_SET_DUMPABLE, 0, 0, 0, 0)
    close_all_but({*keep, channel.fileno()})
    made = []
    try:
        made = [work()]
        said = b"made"
    except NotSupported:
        said = NOT_POSSIBLE
    except OSError as error:
        said = b"%d" % (error.errno or errno.EIO)
    sockets.send(channel, said, made)
    os._exit(0)


def _clone(fd: int, attributes: MountAttr) -> OwnedFd:
    try:
        return _clone_as_said(fd, attributes)
    except SyscallError as error:
        if error.errno != errno.EPERM or not attributes & ACCESS_TIMES:
            raise
    # Locked, as of all that a user namespace has got from outside of it (MNT_LOCK_ATIME): nothing is safer
    # for a change of it.
    return _clone_as_said(fd, attributes & ~ACCESS_TIMES)


def _clone_as_said(fd: int, attributes: MountAttr) -> OwnedFd:
    # The kernel changes how times are kept only where all of it is said anew.
    times = MountAttr.ATIME_MASK if int(attributes) & TIMES else MountAttr(0)

    def cloned(clear: MountAttr) -> OwnedFd:
        # Private at once: else what is mounted in the directory on one side would be on the other as well.
        return mount_api.open_tree_attr(
            fd, "", FLAGS, set=attributes, clear=clear, propagation=Propagation.PRIVATE
        )

    try:
        try:
            return cloned(times | MountAttr.IDMAP)
        except SyscallError as error:
            if error.errno != errno.EINVAL:
                raise
        # Where a mount cannot have an idmap, as of an overlay, none can be taken off either.
        return cloned(times)
    except NotSupported:
        pass
    # Refused for what lies elsewhere, which could not be asked about either.
    made = mount_api.open_tree(fd, "", FLAGS)
    try:
        if statmount(mount_id(fd)).attributes & MountAttr.IDMAP:
            raise NotSupported("open_tree_attr")
        mount_api.mount_setattr(made.fileno(), set=attributes, clear=times, propagation=Propagation.PRIVATE)
    except BaseException:
        made.close()
        raise
    return made
