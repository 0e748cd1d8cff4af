"""The operations for the top of a stack: the file system or directory that takes what is written.

An overlay copies a file up from a layer with its owner, its mode and its capabilities (CVE-2023-0386), and
that by mountd's rights. So what takes it is a mount

* that is nosuid and nodev, whatever the policy says;
* that has its ids mapped, if it is a directory, also where no mapping was asked for: then the caller's own
  ids appear as themselves. There are no others, so that nobody else's file can come to lie in it, and none
  that lies there already is within the reach of mountd's rights.

A file system in memory need not be mapped: nobody gets at it but through the overlay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mountd.caller.model import FOREIGN, IdExtent, outer_id
from mountd.errors import UserNamespaceNotPermitted
from mountd.evidence.model import Ownership
from mountd.plan.directory import mapped
from mountd.plan.idmap import IdMapKind
from mountd.plan.operations import CloneTree, MapRanges, MapRootOwner, Plan
from mountd.plan.planner import attributes_of, plan_mount

if TYPE_CHECKING:
    from mountd.caller.model import Caller, UserNamespace
    from mountd.plan.operations import Operation
    from mountd.source.model import Directory, Source
    from mountd.trust.decide import Decision

    Extents = tuple[IdExtent, ...]

ALWAYS = frozenset({"nosuid", "nodev"})
ROOT_ON_DISK = 0


def plan_top(
    source: Source,
    ownership: Ownership | None,
    decision: Decision,
    caller: Caller,
    idmap: IdMapKind,
    namespace: UserNamespace | None = None,
    uids: Extents = (),
    gids: Extents = (),
) -> tuple[Plan, tuple[int, int]]:
    """Return the operations for a top that was allowed, and the host's uid and gid of who owns it.

    `ownership` is whose the directory is, if it is one; `namespace`, `uids` and `gids` are as for
    `plan_directory`. Raises UserNamespaceNotPermitted where the owner has no id on the host.
    """
    if decision.read_only:
        raise ValueError("a top to read only was allowed")
    decision = replace(decision, attributes=decision.attributes | ALWAYS)
    if source.directory is not None:
        return plan_directory_top(
            source.directory, ownership, decision, caller, idmap, namespace, uids, gids
        )
    plan = plan_mount(source, decision, caller, idmap, uids, gids, as_layer=True)
    last: Operation | None = plan.operations[-1] if idmap is not IdMapKind.NONE else None
    return plan, owner_by(last, namespace, ROOT_ON_DISK, ROOT_ON_DISK)


def plan_directory_top(
    directory: Directory,
    ownership: Ownership | None,
    decision: Decision,
    caller: Caller,
    idmap: IdMapKind,
    namespace: UserNamespace | None,
    uids: Extents,
    gids: Extents,
) -> tuple[Plan, tuple[int, int]]:
    """Return what `plan_top` does, for a directory."""
    if ownership not in (Ownership.CALLER, Ownership.FOREIGN):
        raise ValueError("to write to a directory of somebody else's was allowed")
    if idmap is IdMapKind.RANGES:
        mapping: Operation = MapRanges(uids, gids)
    elif idmap is IdMapKind.NONE and ownership is Ownership.FOREIGN:
        whole = (IdExtent(FOREIGN.start, FOREIGN.start, len(FOREIGN)),)
        mapping = MapRanges(whole, whole)
    elif idmap is IdMapKind.NONE:
        mapping = mapped(ownership, caller, IdMapKind.CALLER, namespace)
    else:
        mapping = mapped(ownership, caller, idmap, namespace)
    clone = CloneTree(
        attributes_of(decision.attributes, read_only=False),
        directory.dev,
        directory.ino,
        directory.uid,
        directory.gid,
    )
    return Plan((clone, mapping)), owner_by(mapping, namespace, directory.uid, directory.gid)


def owner_by(
    mapping: Operation | None, namespace: UserNamespace | None, uid: int, gid: int
) -> tuple[int, int]:
    """Return the host's ids that `mapping` makes of `uid` and `gid` on disk.

    Where it has no such gid, the first that it has: a directory may be of a group that is not the caller's.
    """
    found: tuple[int | None, int | None] = (uid, gid)
    if isinstance(mapping, MapRootOwner):
        found = (mapping.uid, mapping.gid)
    elif isinstance(mapping, MapRanges):
        own = outer_id(mapping.gids, gid)
        found = (outer_id(mapping.uids, uid), mapping.gids[0].outer if own is None else own)
    elif mapping is not None:
        if namespace is None:
            raise ValueError("there is no namespace to map ids to")
        found = (namespace.host_uid(uid), namespace.host_gid(gid))
    if found[0] is None or found[1] is None:
        raise UserNamespaceNotPermitted(
            f"the owner of the top has the id {uid} on disk, which is not mapped",
            hint="map it as well: it is the root of what is mounted",
        )
    return found[0], found[1]
