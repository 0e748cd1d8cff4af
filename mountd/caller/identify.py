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

    Maps = tuple[tuple[IdExtent, ...], tuple[IdExtent, ...]]
    Chain = tuple[tuple[int, int, int], ...]
    # A uid, and for root the inode of the outermost user namespace, 0 for the host's own.
    OwnerKey = tuple[int, int]

CAP_SYS_ADMIN = 21  # linux/capability.h
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


def identify(
    connection: socket.socket,
    pidfd: int,
    connected_from: tuple[int, int] | None = None,
    earlier: Caller | None = None,
) -> Caller:
    """Return who is at the other end of `connection`; `pidfd` is what `pin` returned, borrowed.

    `connected_from` is device and inode of the user namespace that the peer was in when it connected,
    `earlier` what was returned for the same connection before. Raises PeerGone if it has ended or moved to
    another user namespace since, NotSupported, SyscallError.
    """
    credentials = sockets.peer_credentials(connection)
    try:
        with compat.user_namespace_of(pidfd, credentials.pid) as userns:
            namespace, chain = describe(
                userns.fileno(), lambda: _maps_of_peer(userns.fileno(), credentials.pid, pidfd)
            )
        if connected_from is not None and (namespace.dev, namespace.ino) != connected_from:
            raise PeerGone("it is no longer in the user namespace that it connected from")
        is_root = namespace.is_host and credentials.uid == 0 and credentials.pid != 0
        sys_admin = is_root and _has_sys_admin(credentials.pid, pidfd)
        if earlier is not None and (earlier.user_namespace, earlier.sys_admin) == (namespace, sys_admin):
            compat.check_alive(pidfd)
            return earlier
        place = cgroup.parse(_cgroup_of(credentials.pid, pidfd))
    except OSError as error:
        raise _gone(error) from None
    return Caller(
        uid=credentials.uid,
        gid=credentials.gid,
        groups=sockets.peer_groups(connection),
        pid=credentials.pid,
        user_namespace=namespace,
        owner_uid=chain[-1][2] if chain else credentials.uid,
        sys_admin=sys_admin,
        unit=place.unit,
        slice=place.slice,
        container=place.container,
        cgroup=place.path,
        roots_namespace=chain[-1][1] if chain and chain[-1][2] == 0 else 0,
    )


def peer_namespace(connection: socket.socket) -> tuple[tuple[int, int], OwnerKey]:
    """Return the identity of the peer's user namespace, and who is charged for its requests.

    That is the owner of the outermost namespace below the host's, as whoever has a range of ids can come as
    any of them. What root has made belongs to different people all the same, so each namespace of root's is
    an owner of its own. Raises as `identify` does.
    """
    credentials = sockets.peer_credentials(connection)
    try:
        with (
            compat.pidfd_of_peer(connection) as pidfd,
            compat.user_namespace_of(pidfd.fileno(), credentials.pid) as userns,
        ):
            chain = ancestry(userns.fileno())
            outermost = chain[-1] if chain else (0, 0, credentials.uid)
            owner = outermost[2]
            return namespaces.identity(userns.fileno()), (owner, 0 if owner else outermost[1])
    except OSError as error:
        raise _gone(error) from None


def _gone(error: Exception) -> Exception:
    """Return PeerGone for what says that the peer has ended, and any other failure as it is."""
    gone = isinstance(error, FileNotFoundError | ProcessLookupError) or (
        isinstance(error, SyscallError) and error.errno in (errno.ESRCH, errno.EINVAL)
    )
    return PeerGone("it has ended") if gone else error


def _has_sys_admin(pid: int, pidfd: int) -> bool:
    """Tell whether the process has CAP_SYS_ADMIN; as the pidfd is alive afterwards, `pid` was the peer's.

    The capabilities are those of now: uid 0 was the peer's when it connected, and less than it had then is
    no reason to give it more.
    """
    effective = namespaces.effective_capabilities(pid)
    compat.check_alive(pidfd)
    return bool(effective >> CAP_SYS_ADMIN & 1)


def given_namespace(userns_fd: int, caller: Caller) -> GivenNamespace:
    """Describe the user namespace that the caller handed over, borrowed. Raises BadFileDescriptor."""
    if not namespaces.is_user_namespace(userns_fd):
        raise BadFileDescriptor("userNamespaceFileDescriptor", "it is not a user namespace")
    namespace, chain = describe(userns_fd, lambda: _maps_by_entering(userns_fd))
    return GivenNamespace(namespace, chain)


def describe(userns_fd: int, read_maps: Callable[[], Maps]) -> tuple[UserNamespace, Chain]:
    """Return a user namespace as facts, and its ancestry; `read_maps()` is for all but the host's.

    A map is written once and never changes, nor do owner and ancestors, and the id of a namespace is never
    used again, so that what was found out once is remembered; an empty map is not, as it can still be
    written.
    """
    id = namespaces.namespace_id(userns_fd)
    if id in _known:
        return _known[id]
    found = _describe(userns_fd, read_maps)
    if id is not None and found[0].uid_map and found[0].gid_map:
        if len(_known) >= MAXIMUM_KNOWN:
            _known.pop(next(iter(_known)))
        _known[id] = found
    return found


def _describe(userns_fd: int, read_maps: Callable[[], Maps]) -> tuple[UserNamespace, Chain]:
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
    """Read /proc/PID/cgroup; as the pidfd is alive afterwards, `pid` was still the peer's.

    A peer outside of mountd's pid namespace has no number here, and no place that is known.
    """
    contents = b""
    if pid == 0:
        return contents
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
    """Read the maps through /proc; as the pidfd is alive afterwards, `pid` was still the peer's.

    A peer outside of mountd's pid namespace has no number here.
    """
    if pid == 0:
        return _maps_by_entering(userns_fd)
    uid_map, gid_map = namespaces.process_id_maps(pid)
    compat.check_alive(pidfd)
    return _extents(uid_map), _extents(gid_map)


def _maps_by_entering(userns_fd: int) -> Maps:
    """Read the maps of a namespace in which no known process is."""
    uid_map, gid_map = namespaces.read_id_maps(userns_fd)
    return _extents(uid_map), _extents(gid_map)


_known: dict[int, tuple[UserNamespace, Chain]] = {}
MAXIMUM_KNOWN = 256
