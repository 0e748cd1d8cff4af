"""AF_UNIX sockets: who is at the other end, and descriptors that cross (unix(7)).

The standard library's recv_fds() yields inheritable descriptors and hides a truncated list; what is here
does neither. Of its socket module, only the part in C is used: to load the enumerations of the other part
takes longer than to ask mountd for a mount, and their operators cost more than the system calls.
"""

import _socket
import errno
import os
import select
import struct
import time

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd

Socket = _socket.socket  # which those of the standard library's socket module are, too

SO_PEERGROUPS = 59
SO_PEERPIDFD = 77
READABLE, WRITABLE = select.POLLIN, select.POLLOUT  # for `wait`
MAXIMUM_GROUPS = 65536  # NGROUPS_MAX


class PeerCredentials:
    """SO_PEERCRED: who connected, at that moment, as this process's namespaces number it."""

    __slots__ = ("gid", "pid", "uid")

    def __init__(self, pid: int, uid: int, gid: int) -> None:
        """All three come from the kernel; there is no default to fall back to."""
        self.pid = pid
        self.uid = uid
        self.gid = gid


def peer_credentials(connection: Socket) -> PeerCredentials:
    """Return who connected. Raises OSError."""
    size = struct.calcsize("iII")
    raw = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, size)
    pid, uid, gid = struct.unpack("iII", raw)
    return PeerCredentials(pid, uid, gid)


def peer_groups(connection: Socket) -> frozenset[int]:
    """Return the supplementary groups that the peer had when it connected. Raises OSError."""
    try:
        raw = connection.getsockopt(_socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
        return frozenset(gid for (gid,) in struct.iter_unpack("I", raw))
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
    # The standard library's getsockopt() ends at 1024 bytes.
    import ctypes

    from mountd.kernel.libc import call

    buffer, size = (ctypes.c_uint32 * MAXIMUM_GROUPS)(), ctypes.c_uint32(MAXIMUM_GROUPS * 4)
    call("getsockopt", connection.fileno(), _socket.SOL_SOCKET, SO_PEERGROUPS, buffer, ctypes.byref(size))
    return frozenset(buffer[: size.value // 4])


def peer_pidfd(connection: Socket) -> OwnedFd:
    """Return a pidfd of the process that connected, even if it has ended (Linux 6.5).

    Raises NotSupported on an older kernel, SyscallError (ESRCH, EINVAL) if the process is gone.
    """
    try:
        raw = connection.getsockopt(_socket.SOL_SOCKET, SO_PEERPIDFD, 4)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            raise NotSupported("the socket option SO_PEERPIDFD") from None
        raise SyscallError(error.errno or 0, "getsockopt(SO_PEERPIDFD)") from None
    return OwnedFd(struct.unpack("i", raw)[0])


def receive(connection: Socket, size: int, max_fds: int) -> tuple[bytes, list[OwnedFd], bool]:
    """Receive up to `size` bytes with the descriptors they carry, close-on-exec from birth.

    Returns the bytes, the descriptors, which the caller owns, and whether some were lost, because there were
    more than `max_fds`, because this process has none left or because a security module kept one back: then
    the connection cannot be trusted any further. Raises OSError, and then nothing was kept.
    """
    room = _socket.CMSG_SPACE(max_fds * 4)
    data, ancillary, flags, _ = connection.recvmsg(size, room, _socket.MSG_CMSG_CLOEXEC)
    fds: list[OwnedFd] = []
    for level, kind, payload in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            whole = payload[: len(payload) - len(payload) % 4]
            fds += [OwnedFd(number) for (number,) in struct.iter_unpack("i", whole)]
    return data, fds, bool(flags & _socket.MSG_CTRUNC)


def peek(connection: Socket, size: int, deadline: "float | None" = None) -> bytes:
    """Return up to `size` bytes without taking them; descriptors are not looked at.

    `deadline` is a time.monotonic() by which there has to be one; raises TimeoutError after it and OSError
    otherwise. The connection does not block afterwards.
    """
    if deadline is None:
        return connection.recv(size, _socket.MSG_PEEK)
    _unblock(connection)
    while True:
        try:
            return connection.recv(size, _socket.MSG_PEEK)
        except BlockingIOError:
            wait(connection, READABLE, deadline)


def send(connection: Socket, data: bytes, fds: "list[OwnedFd]", deadline: "float | None" = None) -> None:
    """Send all of `data`, with `fds` on its first byte. The descriptors stay the caller's.

    `deadline` is a time.monotonic() by which the last byte has to be taken; raises TimeoutError after it and
    OSError otherwise. The connection does not block afterwards, if there is one.
    """
    rest = memoryview(data)
    rights = struct.pack(f"{len(fds)}i", *(fd.fileno() for fd in fds))
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if fds else []
    if deadline is not None:
        _unblock(connection)
    while rest:
        try:
            sent = connection.sendmsg([rest], ancillary, _socket.MSG_NOSIGNAL)
        except BlockingIOError:
            if deadline is None:
                raise
            wait(connection, WRITABLE, deadline)
            continue
        rest, ancillary = rest[sent:], []


def _unblock(connection: Socket) -> None:
    """Have no call on `connection` block; without a system call if that is so already."""
    if connection.gettimeout() != 0.0:
        connection.setblocking(False)


def wait(connection: Socket, events: int, deadline: float) -> None:
    """Wait for `events` of poll(2). Raises TimeoutError after `deadline`, a time.monotonic().

    The standard library's timeouts are the same, with a poll(2) also where there is nothing to wait for.
    """
    poller = select.poll()
    poller.register(connection, events)
    left = deadline - time.monotonic()
    if left <= 0 or not poller.poll(left * 1000):
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


def connect(path: str, timeout: "float | None" = None) -> Socket:
    """Return a stream connection to the socket at `path`, close-on-exec. Raises OSError."""
    connection = Socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(timeout)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def send_datagram(path: str, data: bytes) -> None:
    """Send one datagram to the socket at `path`, if it has room for it now. Raises OSError."""
    sender = Socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        sender.setblocking(False)
        sender.sendto(data, path)
    finally:
        sender.close()
