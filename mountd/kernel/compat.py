"""What older kernels need instead, each with the version that makes it unnecessary.

The rest of the code calls these and never asks what kernel it runs on.
"""

import os
import signal

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel.flags import StatxMask
from mountd.kernel.namespaces import namespace_of, pidfd_open
from mountd.kernel.paths import statx
from mountd.kernel.sockets import peer_credentials, peer_pidfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket


MNT_ID_UNIQUE = int(StatxMask.MNT_ID_UNIQUE)  # the operators of flags cost as much as a system call


def pidfd_of_peer(connection: "socket.socket") -> OwnedFd:
    """Linux 6.5 pins the peer itself; before, its pid is looked up, which another may have by now."""
    try:
        return peer_pidfd(connection)
    except NotSupported:
        return pidfd_open(peer_credentials(connection).pid)


def user_namespace_of(pidfd: int, pid: int) -> OwnedFd:
    """Linux 6.11 has an ioctl; before, /proc names the namespace, and the pidfd says it was still `pid`."""
    try:
        return namespace_of(pidfd, "user")
    except NotSupported:
        fd = OwnedFd(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC))
        try:
            check_alive(pidfd)
        except BaseException:
            fd.close()
            raise
        return fd


def mount_namespace_of(pidfd: int, pid: int) -> OwnedFd:
    """As `user_namespace_of`, for the mount namespace that a process is in."""
    try:
        return namespace_of(pidfd, "mnt")
    except NotSupported:
        fd = OwnedFd(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
        try:
            check_alive(pidfd)
        except BaseException:
            fd.close()
            raise
        return fd


def check_alive(pidfd: int) -> None:
    """Raise SyscallError(ESRCH) if the process of `pidfd` has ended."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except OSError as error:
        raise SyscallError(error.errno or 0, f"pidfd_send_signal({pidfd}, 0)") from None


def any_mount_id(fd: int) -> int:
    """Linux 6.8 has ids that are never reused; before, the id is unique among the living mounts only."""
    status = statx(fd, "", StatxMask.MNT_ID_UNIQUE)
    if not status.stx_mask & MNT_ID_UNIQUE:
        status = statx(fd, "", StatxMask.MNT_ID)
    return int(status.stx_mnt_id)
