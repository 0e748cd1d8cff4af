"""The operations for a directory: which ids on disk become whose, by who the directory was trusted for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.caller.model import FOREIGN, OVERFLOW_ID, IdExtent
from mountd.errors import UserNamespaceNotPermitted
from mountd.evidence.model import Ownership
from mountd.plan.idmap import IdMapKind
from mountd.plan.operations import CloneTree, MapRanges, MapRootOwner, MapToNamespace, Plan, Seal
from mountd.plan.planner import attributes_of

if TYPE_CHECKING:
    from mountd.caller.model import Caller, UserNamespace
    from mountd.plan.operations import Operation
    from mountd.source.model import Directory
    from mountd.trust.decide import Decision

    Extents = tuple[IdExtent, ...]


def plan_directory(
    directory: Directory,
    ownership: Ownership,
    decision: Decision,
    caller: Caller,
    idmap: IdMapKind,
    namespace: UserNamespace | None = None,
    uids: Extents = (),
    gids: Extents = (),
) -> Plan:
    """Return the operations for a directory that was allowed.

    `namespace` is there for IdMapKind.NAMESPACE, `uids` and `gids` are for RANGES. Raises
    UserNamespaceNotPermitted for a namespace that has no place for the directory's ids.
    """
    if ownership is Ownership.OTHER or (ownership is Ownership.ROOT and not decision.read_only):
        raise ValueError("a directory of somebody else's was allowed, or to write to one of root's")
    attributes = attributes_of(decision.attributes, decision.read_only)
    operations: list[Operation] = [
        CloneTree(attributes, directory.dev, directory.ino, directory.uid, directory.gid)
    ]
    if attributes and not caller.is_host_root:
        operations.append(Seal())
    if idmap is IdMapKind.RANGES:
        operations.append(MapRanges(uids, gids))
    elif idmap is not IdMapKind.NONE:
        operations.append(mapped(ownership, caller, idmap, namespace))
    return Plan(tuple(operations))


def mapped(
    ownership: Ownership, caller: Caller, idmap: IdMapKind, namespace: UserNamespace | None
) -> Operation:
    """Return the operation that maps the ids which the directory was trusted for, and no others."""
    if ownership is Ownership.ROOT:
        if idmap is IdMapKind.NAMESPACE:
            return MapToNamespace()
        return MapRootOwner(caller.uid, caller.gid)
    if ownership is Ownership.FOREIGN:
        if idmap is IdMapKind.CALLER:
            return MapRootOwner(caller.uid, caller.gid)
        if namespace is None:
            raise ValueError("there is no namespace to map ids to")
        return MapRanges(foreign(namespace.uid_map), foreign(namespace.gid_map))
    uid: int | None = caller.uid
    gid: int | None = caller.gid
    if idmap is IdMapKind.NAMESPACE:
        uid = namespace.host_uid(0) if namespace is not None else None
        gid = namespace.host_gid(0) if namespace is not None else None
    if uid is None or gid is None:
        raise UserNamespaceNotPermitted(
            "it maps no id 0, which is what the owner of the directory is to be there",
            hint="map the ids 0, or ask for the idmap “ranges”",
        )
    if caller.gid == OVERFLOW_ID:
        raise UserNamespaceNotPermitted(
            f"the caller's gid {OVERFLOW_ID} stands for every unknown id, so nothing can belong to it",
            hint="call with a group that the host knows",
        )
    # Not whoever the group of the directory is: that may be one of the system's.
    return MapRanges((IdExtent(caller.uid, uid, 1),), (IdExtent(caller.gid, gid, 1),))


def foreign(id_map: Extents) -> Extents:
    """Return extents by which the foreign range appears as the ids 0 and following of a namespace.

    As many as it maps. Raises UserNamespaceNotPermitted if these are none.
    """
    found = tuple(
        IdExtent(FOREIGN.start + each.inner, each.outer, min(each.count, len(FOREIGN) - each.inner))
        for each in id_map
        if each.inner < len(FOREIGN)
    )
    if not found:
        raise UserNamespaceNotPermitted(
            f"it maps no id below {len(FOREIGN)}, as which the foreign range would appear",
            hint="map the ids from 0 on",
        )
    return found
