"""Namespaces: entering them, asking about them (ioctl_nsfs(2), pidfd_open(2)), and their id maps.

Whoever enters a user namespace can be traced by that namespace's root, so that only a throw-away child does,
which holds nothing and is not dumpable.
"""

import ctypes
import errno
import os
import signal
from functools import lru_cache

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel import capabilities
from mountd.kernel.child import close_all_but, end, end_with_parent, fork
from mountd.kernel.flags import Clone, Ioctl, StatxMask
from mountd.kernel.libc import call
from mountd.kernel.paths import statx

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PR_SET_DUMPABLE = 4
MAXIMUM_MAP = 64 << 10

KINDS = {
    "user": Ioctl.PIDFD_GET_USER_NAMESPACE,
    "mnt": Ioctl.PIDFD_GET_MNT_NAMESPACE,
    "net": Ioctl.PIDFD_GET_NET_NAMESPACE,
    "pid": Ioctl.PIDFD_GET_PID_NAMESPACE,
}


def setns(fd: int, kind: Clone) -> None:
    """Enter the namespace `fd`. Raises SyscallError."""
    call("setns", fd, kind)


def unshare(kinds: Clone) -> None:
    """Leave the given namespaces for new ones. Raises SyscallError."""
    call("unshare", kinds)


def pidfd_open(pid: int) -> OwnedFd:
    """Return a pidfd of process `pid`. Raises SyscallError, ESRCH if there is none."""
    return OwnedFd(call("pidfd_open", pid, 0))


def namespace_of(pidfd: int, kind: str) -> OwnedFd:
    """Return the namespace of `kind` (user, mnt, net, pid) that the process is in (Linux 6.11).

    Raises SyscallError (ESRCH if it has ended) and NotSupported.
    """
    try:
        return OwnedFd(call("ioctl", pidfd, KINDS[kind], None))
    except SyscallError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP):
            raise NotSupported(f"the namespace ioctls of a pidfd ({KINDS[kind].name})") from None
        raise


def is_user_namespace(fd: int) -> bool:
    """Tell whether `fd` is a user namespace; False for whatever else.

    Only a file of the kernel's own file system for namespaces is asked what it is: to anything else the
    question could be a request to a FUSE server that does not answer.
    """
    try:
        status = statx(fd, "", StatxMask.TYPE, sync=False)
        if os.makedev(status.stx_dev_major, status.stx_dev_minor) != namespace_device():
            return False
        return call("ioctl", fd, Ioctl.NS_GET_NSTYPE, None) == Clone.NEWUSER
    except SyscallError:
        return False


@lru_cache(maxsize=1)
def namespace_device() -> int:
    """Return the device number of the kernel's own file system for namespaces."""
    return os.stat("/proc/self/ns/user").st_dev


def owner_uid(fd: int) -> int:
    """Return the user id, in this process's user namespace, of the owner of the user namespace `fd`."""
    uid = ctypes.c_uint32()
    call("ioctl", fd, Ioctl.NS_GET_OWNER_UID, ctypes.byref(uid))
    return uid.value


def owner_of(fd: int) -> OwnedFd:
    """Return the user namespace that owns the namespace `fd`. Raises SyscallError, EPERM outside of ours."""
    return OwnedFd(call("ioctl", fd, Ioctl.NS_GET_USERNS, None))


def parent(fd: int) -> "OwnedFd | None":
    """Return the parent of the user namespace `fd`, None for one that lies outside this process's own."""
    try:
        return OwnedFd(call("ioctl", fd, Ioctl.NS_GET_PARENT, None))
    except SyscallError as error:
        if error.errno == errno.EPERM:
            return None
        raise


def namespace_id(fd: int) -> "int | None":
    """Return the namespace's id, which is never used twice (Linux 6.14), or None on an older kernel."""
    id = ctypes.c_uint64()
    try:
        call("ioctl", fd, Ioctl.NS_GET_ID, ctypes.byref(id))
    except SyscallError:
        return None
    return id.value


def identity(fd: int) -> tuple[int, int]:
    """Return device and inode of a namespace: equal for the same one as long as somebody holds it."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def parse_id_map(text: str) -> list[tuple[int, int, int]]:
    """Read the lines of /proc/PID/uid_map: first id inside, first id as the reader sees it, count."""
    rows = []
    for line in text.splitlines():
        inner, outer, count = map(int, line.split())
        rows.append((inner, outer, count))
    return rows


IdMapRows = list[tuple[int, int, int]]


def process_id_maps(pid: int) -> tuple[IdMapRows, IdMapRows]:
    """Return uid and gid map of the user namespace of process `pid`. Raises OSError if it is gone."""
    maps = []
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{pid}/{name}", encoding="utf-8") as file:
            maps.append(parse_id_map(file.read(MAXIMUM_MAP)))
    return maps[0], maps[1]


def effective_capabilities(pid: int) -> int:
    """Return the effective capabilities of process `pid`, a bit each (capabilities(7)). Raises OSError.

    Raises ProcessLookupError for what /proc does not know as a process.
    """
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "CapEff":
                return int(value, 16)
    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


def read_id_maps(userns_fd: int) -> tuple[IdMapRows, IdMapRows]:
    """Return uid and gid map of the user namespace `userns_fd`, by a child that enters it.

    Raises SyscallError where it cannot be entered, and OSError.
    """
    with Child(lambda: setns(userns_fd, Clone.NEWUSER), keep=[userns_fd]) as child:
        return process_id_maps(child.pid)


def make_user_namespace(
    uid_map: "Sequence[tuple[int, int, int]]", gid_map: "Sequence[tuple[int, int, int]]"
) -> OwnedFd:
    """Return a new user namespace with the given maps (inner, outer, count), in which no process stays.

    Raises SyscallError and OSError, EINVAL for maps that overlap or are too long (340 lines).
    """
    with Child(lambda: unshare(Clone.NEWUSER), keep=[]) as child, capabilities.mapping_root():
        for name, rows in (("uid_map", uid_map), ("gid_map", gid_map)):
            text = "".join(f"{inner} {outer} {count}\n" for inner, outer, count in rows)
            fd = os.open(f"/proc/{child.pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        return OwnedFd(os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC))


class Child:
    """A throw-away child that has entered a namespace, holds nothing, and waits to be killed."""

    __slots__ = ("pid",)

    def __init__(self, enter: "Callable[[], None]", keep: "list[int]") -> None:
        """Fork, close everything but `keep`, and run `enter` there. Raises what `enter` failed with."""
        self.pid, reader = fork(lambda writer: _become(enter, keep, writer))
        with reader:
            answer = os.read(reader.fileno(), 4)
        number = int.from_bytes(answer, "little") if len(answer) == 4 else errno.ECHILD
        if number:
            self.close()
            raise SyscallError(number, "entering a user namespace")

    def close(self) -> None:
        """Kill the child and wait for its end."""
        end(self.pid)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _become(enter: "Callable[[], None]", keep: "list[int]", writer: int) -> int:
    """Be the child: no import, nothing open that somebody could take. Returns if that failed."""
    number = errno.EIO
    try:
        end_with_parent()
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        close_all_but({*keep, writer})
        enter()
        # Entering changed the credentials, which resets both.
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        end_with_parent()
        number = 0
    except SyscallError as error:
        number = error.errno or errno.EIO
    finally:
        os.write(writer, number.to_bytes(4, "little"))
    while not number:
        signal.pause()
    return 1
