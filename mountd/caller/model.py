"""Who calls, as facts that came from the kernel.

All ids are host ids: what they are in the user namespace that the daemon runs in, as SO_PEERCRED shows them
there. What a caller's own namespace calls them is only in its maps.
"""

from __future__ import annotations

from dataclasses import dataclass

# What the kernel shows for every id that the reader's namespace has no mapping for: it may be anybody.
OVERFLOW_ID = 65534
# Ids that no user and no container ever has: what belongs to them is used through mounts that map them
# (the foreign UID range of systemd, systemd.io/UIDS-GIDS).
FOREIGN = range(2147352576, 2147352576 + 65536)


@dataclass(frozen=True, slots=True)
class IdExtent:
    """One line of a uid_map or gid_map: `count` ids from `inner` on are the host's from `outer` on."""

    inner: int
    outer: int
    count: int


@dataclass(frozen=True, slots=True)
class UserNamespace:
    """A user namespace: `dev` and `ino` identify it, `owner_uid` made it, `is_host` is the daemon's own."""

    dev: int
    ino: int
    uid_map: tuple[IdExtent, ...]
    gid_map: tuple[IdExtent, ...]
    owner_uid: int
    is_host: bool

    def __hash__(self) -> int:
        """Of what tells one from another: what was decided about it is looked up for each request."""
        return hash((self.dev, self.ino))

    def host_uid(self, inner: int) -> int | None:
        """Return what the uid `inner` of this namespace is on the host, None if it is not mapped."""
        return outer_id(self.uid_map, inner)

    def host_gid(self, inner: int) -> int | None:
        """Return what the gid `inner` of this namespace is on the host, None if it is not mapped."""
        return outer_id(self.gid_map, inner)


@dataclass(frozen=True, slots=True)
class Caller:
    """The process that connected; `owner_uid` is who pays for it: the owner of its outermost namespace.

    `roots_namespace` is the inode of that namespace if it is root who made it, 0 otherwise (`payer`).
    `sys_admin` is whether a process on the host has CAP_SYS_ADMIN there.
    `unit` and `slice` are systemd's, `container` is "MANAGER:NAME": what the path of its control group says
    as far as it is root's word (caller.cgroup). `cgroup` is that path, for messages. None is “not known”,
    and matches nothing.
    """

    uid: int
    gid: int
    groups: frozenset[int]
    pid: int
    user_namespace: UserNamespace
    owner_uid: int
    sys_admin: bool = False
    unit: str | None = None
    slice: str | None = None
    container: str | None = None
    cgroup: str | None = None
    roots_namespace: int = 0

    def __hash__(self) -> int:
        """Of what tells one from another, as that of a user namespace."""
        return hash((self.uid, self.pid, self.user_namespace.ino))

    @property
    def on_host(self) -> bool:
        """Whether it is in the daemon's own user namespace."""
        return self.user_namespace.is_host

    @property
    def payer(self) -> tuple[int, int]:
        """Whom its requests count for: an owner; and what root has made belongs to different people."""
        return self.owner_uid, self.roots_namespace

    @property
    def is_host_root(self) -> bool:
        """Whether it may do all that mountd could do for it.

        Not the root of some namespace that maps the host's root, and not one that was left without the
        capability: a service or a container that is uid 0 and may not mount gets no more than a user does.
        """
        return self.uid == 0 and self.on_host and self.sys_admin


@dataclass(frozen=True, slots=True)
class GivenNamespace:
    """A user namespace that the caller handed over.

    `chain` has (dev, ino, owner_uid) of the namespace itself and then of each ancestor, outward, without the
    host's.
    """

    namespace: UserNamespace
    chain: tuple[tuple[int, int, int], ...]

    def __hash__(self) -> int:
        """As that of the namespace."""
        return hash(self.namespace)


@dataclass(frozen=True, slots=True)
class DelegatedIds:
    """The ids that /etc/subuid and /etc/subgid give to the caller's uid."""

    uids: tuple[range, ...]
    gids: tuple[range, ...]


def outer_id(extents: tuple[IdExtent, ...], inner: int) -> int | None:
    """Return the host id that `extents` map `inner` to, None if they do not."""
    for extent in extents:
        if extent.inner <= inner < extent.inner + extent.count:
            return extent.outer + inner - extent.inner
    return None
