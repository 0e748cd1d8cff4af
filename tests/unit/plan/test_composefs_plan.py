"""From what was decided about a composefs to its operations, and whose rights objects are read with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mountd.caller.model import OVERFLOW_ID, IdExtent
from mountd.evidence.model import Ownership
from mountd.kernel.flags import MountAttr
from mountd.plan.composefs import (
    NOBODY_AT_ALL,
    ids_of_metadata,
    plan_composefs,
    plan_metadata,
    plan_objects,
)
from mountd.plan.idmap import IdMapKind
from mountd.plan.operations import CloneTree, MakeComposefs, MakeMount, MapRanges, MapRootOwner, Seal
from mountd.plan.planner import plan_mount
from mountd.source.model import BackingFile, Directory, FileSystem, Source, SourceKind
from mountd.trust.decide import Decision
from mountd.trust.policy import Verdict
from tests.policies import ROOT, USER

OBJECTS = Directory(1, 2, 3, 1000, 1000, opened=True, read_only=False, file_system="ext4", path_hint=None)
LOCKED = frozenset({"nosuid", "nodev"})
ALLOWED = Decision(Verdict.ALLOW, "r", None, "", None, (), None, True, LOCKED, (), verify=True)
READ_ONLY = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV
NOBODYS = (IdExtent(NOBODY_AT_ALL, NOBODY_AT_ALL, 1),)


def test_it_is_made_locked() -> None:
    plan = plan_composefs(ALLOWED, USER, 2)
    assert plan.operations == (MakeComposefs(2, True), MakeMount(READ_ONLY), Seal())
    assert plan.shared is None
    assert plan_composefs(ALLOWED, USER, 2, "/a").operations[0] == MakeComposefs(2, True, "/a")
    assert "has to have" in plan.describe()[0]
    unlocked = plan_composefs(replace(ALLOWED, attributes=frozenset(), verify=False), ROOT, 1)
    assert unlocked.operations == (MakeComposefs(1, False), MakeMount(MountAttr.RDONLY))


def test_what_is_none() -> None:
    with pytest.raises(ValueError, match="object"):
        plan_composefs(ALLOWED, USER, 0)
    with pytest.raises(ValueError, match="write"):
        plan_composefs(replace(ALLOWED, read_only=False), USER, 1)


def test_only_what_is_the_caller_s_own_has_an_owner() -> None:
    clone = CloneTree(READ_ONLY, 1, 2, 1000, 1000)
    mine = (IdExtent(USER.uid, USER.uid, 1),), (IdExtent(USER.gid, USER.gid, 1),)
    assert plan_objects(OBJECTS, Ownership.CALLER, USER).operations == (clone, MapRanges(*mine))
    for other in (Ownership.ROOT, Ownership.FOREIGN, Ownership.OTHER):
        assert plan_objects(OBJECTS, other, USER).operations == (clone, MapRanges(NOBODYS, NOBODYS))
    # The group that stands for all unknown ones is nobody's.
    nogroup = plan_objects(OBJECTS, Ownership.CALLER, replace(USER, gid=OVERFLOW_ID)).operations[1]
    assert nogroup == MapRanges(mine[0], NOBODYS)


def test_root_of_the_host_reads_what_it_reads_anyway() -> None:
    assert len(plan_objects(OBJECTS, Ownership.ROOT, ROOT).operations) == 1


def test_ids_of_a_description_are_those_of_its_caller() -> None:
    none, given = IdMapKind.NONE, ((IdExtent(0, 1, 1),), ())
    same = (IdExtent(USER.uid, USER.uid, 1),), (IdExtent(USER.gid, USER.gid, 1),)
    assert ids_of_metadata(USER, none, (), (), regenerated=True) == (IdMapKind.RANGES, *same)
    assert ids_of_metadata(USER, none, (), (), regenerated=False) == (none, (), ())
    assert ids_of_metadata(ROOT, none, (), (), regenerated=True) == (none, (), ())
    for kind in (IdMapKind.NAMESPACE, IdMapKind.CALLER, IdMapKind.RANGES):
        assert ids_of_metadata(USER, kind, *given, regenerated=True) == (kind, *given)


def test_the_metadata_are_locked_by_the_overlay_and_mapped_by_themselves() -> None:
    backing = BackingFile(4096, 1, 2, 0, 0, 0o100644, writable=False, path_hint=None, changed=7)
    source = Source(SourceKind.IMAGE, backing, FileSystem("erofs", 4096, 512, None, None, False), None)
    (plan,) = plan_metadata(source, ALLOWED, USER, IdMapKind.CALLER, (), ())
    assert plan.operations[1:] == (MakeMount(READ_ONLY), MapRootOwner(USER.uid, USER.gid))
    # So that an image which is mounted by itself as well is mounted once.
    assert plan.shared == plan_mount(source, ALLOWED, USER, IdMapKind.NONE).shared is not None
    made_anew = replace(source, kind=SourceKind.COMPOSEFS)
    (plan,) = plan_metadata(made_anew, ALLOWED, USER, IdMapKind.NONE, (), ())
    assert isinstance(plan.operations[-1], MapRanges)
