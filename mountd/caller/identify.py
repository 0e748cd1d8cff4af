"""Who calls: everything about the peer of a connection that the kernel vouches for.

The credentials are those of the moment it connected (SO_PEERCRED, SO_PEERGROUPS); the process is pinned by a
pidfd, and what its namespaces are is asked through that, so that a process that has taken the number over is
never meant. Nothing here has a default: what cannot be found out is an error.
"""

from __future__ import annotations

import errno
import os
from functools import lru_cache
from typing import TYPE_CHECKING

from mountd.caller import cgroup
from mountd.caller.model import Caller, GivenNamespace, IdExtent, UserNamespace
from mountd.errors import BadFileDescriptor, PeerGone, SyscallError
from mountd.kernel import compat, namespaces, sockets

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from mountd.fds import OwnedFd

    Rows = list[tuple[int, int, int]]
    Maps = tuple[tuple[IdExtent, ...], tuple[IdExtent, ...]]
    Chain = tuple[tuple[int, int, int], ...]

# The kernel nests user namespaces at most 32 deep (user_namespaces(7)).
MAXIMUM_DEPTH = 33


def pin(connection: socket.socket) -> OwnedFd:
    """Return a pidfd of the process that connected. Raises PeerGone, NotSupported."""
    try:
        return compat.pidfd_of_peer(connection)
    except SyscallError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):
            raise PeerGone("it has ended") from None
        raise


def identify(connection: socket.socket, pidfd: int, connected_from: tuple[int, int] | None = None) -> Caller:
    """Return who is at the other end of `connection`; `pidfd` is what `pin` returned, borrowed.

    `connected_from` is device and inode of the user namespace that the peer was in when it connected. Raises
    PeerGone if it has ended or moved to another one since, NotSupported, SyscallError.
    """
    credentials = sockets.peer_credentials(connection)
    try:
        with compat.user_namespace_of(pidfd, credentials.pid) as userns:
            found = namespaces.identity(userns.fileno())
            if connected_from is not None and found != connected_from:
                raise PeerGone("it is no longer in the user namespace that it connected from")
            namespace, chain = describe(
                userns.fileno(), lambda: _maps_of_peer(userns.fileno(), credentials.pid, pidfd)
            )
        place = cgroup.parse(_cgroup_of(credentials.pid, pidfd))
    except SyscallError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):
            raise PeerGone("it has ended") from None
        raise
    except (FileNotFoundError, ProcessLookupError):
        raise PeerGone("it has ended") from None
    return Caller(
        uid=credentials.uid,
        gid=credentials.gid,
        groups=sockets.peer_groups(connection),
        pid=credentials.pid,
        user_namespace=namespace,
        owner_uid=chain[-1][2] if chain else credentials.uid,
        unit=place.unit,
        slice=place.slice,
        container=place.container,
        cgroup=place.path,
    )


def peer_namespace(connection: socket.socket) -> tuple[tuple[int, int], int]:
    """Return the identity of the peer's user namespace and the uid that is charged for its requests.

    That is the owner of the outermost namespace below the host's, as whoever has a range of ids can come as
    any of them. Raises as `identify` does.
    """
    credentials = sockets.peer_credentials(connection)
    try:
        with (
            compat.pidfd_of_peer(connection) as pidfd,
            compat.user_namespace_of(pidfd.fileno(), credentials.pid) as userns,
        ):
            chain = ancestry(userns.fileno())
            return namespaces.identity(userns.fileno()), chain[-1][2] if chain else credentials.uid
    except (SyscallError, FileNotFoundError, ProcessLookupError):
        raise PeerGone("it has ended") from None


def given_namespace(userns_fd: int, caller: Caller) -> GivenNamespace:
    """Describe the user namespace that the caller handed over, borrowed. Raises BadFileDescriptor."""
    if not namespaces.is_user_namespace(userns_fd):
        raise BadFileDescriptor("userNamespaceFileDescriptor", "it is not a user namespace")
    own = caller.user_namespace
    if namespaces.identity(userns_fd) == (own.dev, own.ino):
        return GivenNamespace(own, ancestry(userns_fd))
    namespace, chain = describe(userns_fd, lambda: _maps_by_entering(userns_fd))
    return GivenNamespace(namespace, chain)


def describe(userns_fd: int, read_maps: Callable[[], Maps]) -> tuple[UserNamespace, Chain]:
    """Return a user namespace as facts, and its ancestry; `read_maps()` is for all but the host's."""
    dev, ino = namespaces.identity(userns_fd)
    chain = ancestry(userns_fd)
    if not chain:
        everything = (IdExtent(0, 0, (1 << 32) - 1),)
        return UserNamespace(dev, ino, everything, everything, 0, is_host=True), chain
    uid_map, gid_map = read_maps()
    return UserNamespace(dev, ino, uid_map, gid_map, chain[0][2], is_host=False), chain


def ancestry(userns_fd: int) -> Chain:
    """Return (device, inode, owner) of the namespace and of each ancestor, outward, without the host's."""
    chain: list[tuple[int, int, int]] = []
    held: list[OwnedFd] = []
    fd = userns_fd
    try:
        while namespaces.identity(fd) != host_namespace() and len(chain) < MAXIMUM_DEPTH:
            chain.append((*namespaces.identity(fd), namespaces.owner_uid(fd)))
            outer = namespaces.parent(fd)
            if outer is None:
                # Not below the daemon's own: then nothing is known about who is responsible for it.
                raise PeerGone("its user namespace does not lie within mountd's own")
            held.append(outer)
            fd = outer.fileno()
    finally:
        for owned in held:
            owned.close()
    return tuple(chain)


@lru_cache(maxsize=1)
def host_namespace() -> tuple[int, int]:
    """Return the identity of the daemon's own user namespace, which is what “the host” means here."""
    status = os.stat("/proc/self/ns/user")
    return status.st_dev, status.st_ino


def _extents(rows: list[tuple[int, int, int]]) -> tuple[IdExtent, ...]:
    return tuple(IdExtent(*row) for row in rows)


def _cgroup_of(pid: int, pidfd: int) -> bytes:
    """Read /proc/PID/cgroup; as the pidfd is alive afterwards, `pid` was still the peer's."""
    contents = b""
    try:
        with open(f"/proc/{pid}/cgroup", "rb", buffering=0) as file:
            # One byte more than what is read in earnest, so that a longer file is noticed.
            while chunk := file.read(cgroup.MAXIMUM_BYTES + 1 - len(contents)):
                contents += chunk
    except FileNotFoundError:
        pass  # a kernel without control groups, if the process is still there
    compat.check_alive(pidfd)
    return contents


def _maps_of_peer(userns_fd: int, pid: int, pidfd: int) -> Maps:
    """Read the maps through /proc; as the pidfd is alive afterwards, `pid` was still the peer's."""

    def read() -> tuple[Rows, Rows]:
        maps = namespaces.process_id_maps(pid)
        compat.check_alive(pidfd)
        return maps

    return _remembered(userns_fd, read)


def _maps_by_entering(userns_fd: int) -> Maps:
    """Read the maps of a namespace in which no known process is."""
    return _remembered(userns_fd, lambda: namespaces.read_id_maps(userns_fd))


_known_maps: dict[int, Maps] = {}
MAXIMUM_KNOWN = 256


def _remembered(userns_fd: int, read: Callable[[], tuple[Rows, Rows]]) -> Maps:
    """Return the maps of a namespace, from `read` if they are not known yet.

    A map is written once and never changes, and the id of a namespace is never used again, so that what was
    read once is remembered; an empty map is not, as it can still be written.
    """
    id = namespaces.namespace_id(userns_fd)
    if id in _known_maps:
        return _known_maps[id]
    uid_map, gid_map = read()
    maps = _extents(uid_map), _extents(gid_map)
    if id is not None and uid_map and gid_map:
        if len(_known_maps) >= MAXIMUM_KNOWN:
            _known_maps.pop(next(iter(_known_maps)))
        _known_maps[id] = maps
    return maps
