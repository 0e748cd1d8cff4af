"""The operations for a composefs: the overlay, and the object directories below it.

What is in an object is read with the rights of whoever made the overlay, mountd, and not of who reads: the
modes that are asked are those of the metadata, which says what it likes. Else whoever can name a file in a
description could read it. So each object directory has its ids mapped such that mountd has no more rights in
it than anybody has, but for what is the caller's:

* In one of the caller's own, the ids of the caller stay, and there are no others.
* In any other, there are none.

mountd reads what is not its own by a capability (CAP_DAC_READ_SEARCH), and that does not hold for a file of
a user or a group that is not there: it has to be one that everybody may read. That everybody may and the
caller may not, as a mode (0604) or an ACL has less for a group or a user than for others, makes no
difference: it is read all the same. The ids that are seen are those of the metadata.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.caller.model import OVERFLOW_ID, IdExtent
from mountd.evidence.model import Ownership
from mountd.kernel.flags import MountAttr
from mountd.plan.idmap import IdMapKind
from mountd.plan.operations import CloneTree, MakeComposefs, MakeMount, MapRanges, Plan, Seal
from mountd.plan.planner import attributes_of, plan_mounts
from mountd.source.model import SourceKind

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.plan.operations import Operation
    from mountd.source.model import Directory, Source
    from mountd.trust.decide import Decision

    Extents = tuple[IdExtent, ...]

OF_OBJECTS = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV
NOBODY_AT_ALL = (1 << 32) - 2  # as which no file is known to belong to anybody


def plan_objects(directory: Directory, ownership: Ownership, caller: Caller) -> Plan:
    """Return the operations for an object directory."""
    operations: list[Operation] = [
        CloneTree(OF_OBJECTS, directory.dev, directory.ino, directory.uid, directory.gid)
    ]
    if not caller.is_host_root:
        own = ownership is Ownership.CALLER
        operations.append(MapRanges(mapped(caller.uid, own=own), mapped(caller.gid, own=own)))
    return Plan(tuple(operations))


def mapped(id: int, *, own: bool) -> Extents:
    """Return the extents by which `id` is there if it is the `own` one, and by which else none is."""
    if own and id != OVERFLOW_ID:
        return (IdExtent(id, id, 1),)
    return (IdExtent(NOBODY_AT_ALL, NOBODY_AT_ALL, 1),)


def plan_metadata(
    source: Source, decision: Decision, caller: Caller, idmap: IdMapKind, uids: Extents, gids: Extents
) -> tuple[Plan, ...]:
    """Return the operations for the metadata, whose mount nobody but the overlay gets."""
    regenerated = source.kind is SourceKind.COMPOSEFS
    ids = ids_of_metadata(caller, idmap, uids, gids, regenerated=regenerated)
    return plan_mounts(source, decision, caller, *ids, as_layer=True)


def ids_of_metadata(
    caller: Caller, idmap: IdMapKind, uids: Extents, gids: Extents, *, regenerated: bool
) -> tuple[IdMapKind, Extents, Extents]:
    """Return how the ids of the metadata are mapped.

    As was asked for; but in what somebody has described nothing belongs to other users of the host. Where
    nothing is mapped, the caller's own ids are, to themselves.
    """
    if not regenerated or idmap is not IdMapKind.NONE or caller.is_host_root:
        return idmap, uids, gids
    same = (IdExtent(caller.uid, caller.uid, 1),), (IdExtent(caller.gid, caller.gid, 1),)
    return IdMapKind.RANGES, *same


def plan_composefs(decision: Decision, caller: Caller, objects: int, name: str | None = None) -> Plan:
    """Return the operations for the composefs itself, over so many object directories.

    `name` is what the mount table is to call it. Raises ValueError if it is to be writable.
    """
    if not decision.read_only:
        raise ValueError("a composefs to write to was allowed")
    operations: list[Operation] = [
        MakeComposefs(objects, decision.verify, name),
        MakeMount(attributes_of(decision.attributes, decision.read_only)),
    ]
    if not caller.is_host_root:
        operations.append(Seal())
    return Plan(tuple(operations))
