"""From what was decided about a top to the operations for it: nosuid and mapped, whatever was asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mountd.caller.model import FOREIGN, OVERFLOW_ID, IdExtent, UserNamespace
from mountd.errors import UserNamespaceNotPermitted
from mountd.evidence.model import Ownership
from mountd.kernel.flags import MountAttr
from mountd.plan.idmap import IdMapKind
from mountd.plan.operations import (
    Backing,
    CloneTree,
    CreateSuperblock,
    MakeMount,
    MapRanges,
    MapRootOwner,
    MapToNamespace,
)
from mountd.plan.stack import plan_stack
from mountd.plan.top import plan_top
from mountd.source.model import Directory, Source, SourceKind, Tmpfs
from mountd.trust.decide import Decision
from mountd.trust.policy import Verdict
from tests.policies import ROOT, USER

ALLOWED = Decision(Verdict.ALLOW, "r", None, "", None, (), None, False, frozenset({"nosuid", "nodev"}), ())
IN_MEMORY = Source(SourceKind.TMPFS, None, None, Tmpfs(4096, None, 0o755))
EXTENTS = (IdExtent(0, 100000, 1000),)
INSIDE = UserNamespace(4, 2, EXTENTS, EXTENTS, 1000, False)
NOBODY_IS_ROOT = replace(INSIDE, uid_map=(IdExtent(5, 100000, 10),))
LOCKED = MountAttr.NOSUID | MountAttr.NODEV


def directory(uid: int = 1000, gid: int = 1000) -> Source:
    found = Directory(1, 2, 3, uid, gid, True, False, "ext4", None)
    return Source(SourceKind.DIRECTORY, None, None, None, directory=found)


def test_memory_belongs_to_the_root_of_the_mapping() -> None:
    plan, owner = plan_top(IN_MEMORY, None, ALLOWED, USER, IdMapKind.NAMESPACE, INSIDE)
    made, mount, mapping = plan.operations
    assert isinstance(made, CreateSuperblock)
    assert (made.type, made.backing, made.read_only) == ("tmpfs", Backing.NOTHING, False)
    assert ("size", "4096") in made.options
    assert (mount, mapping, owner) == (MakeMount(LOCKED), MapToNamespace(), (100000, 100000))
    assert plan.shared is None
    plan, owner = plan_top(IN_MEMORY, None, ALLOWED, USER, IdMapKind.NONE)
    assert (plan.operations[1:], owner) == ((MakeMount(LOCKED),), (0, 0))
    plan, owner = plan_top(IN_MEMORY, None, ALLOWED, USER, IdMapKind.CALLER)
    assert (plan.operations[-1], owner) == (MapRootOwner(1000, 1000), (1000, 1000))
    _, owner = plan_top(IN_MEMORY, None, ALLOWED, USER, IdMapKind.RANGES, None, EXTENTS, EXTENTS)
    assert owner == (100000, 100000)


def test_the_hosts_root_gets_no_setuid_either() -> None:
    bare = replace(ALLOWED, attributes=frozenset())
    plan, _ = plan_top(IN_MEMORY, None, bare, ROOT, IdMapKind.NONE)
    assert plan.operations[1] == MakeMount(LOCKED)


@pytest.mark.parametrize("kind", [IdMapKind.NONE, IdMapKind.CALLER])
def test_a_directory_is_mapped_also_where_that_changes_nothing(kind: IdMapKind) -> None:
    plan, owner = plan_top(directory(), Ownership.CALLER, ALLOWED, USER, kind)
    own = (IdExtent(1000, 1000, 1),)
    assert plan.operations == (CloneTree(LOCKED, 1, 2, 1000, 1000), MapRanges(own, own))
    assert owner == (1000, 1000)


def test_the_callers_id_is_the_root_of_a_namespace() -> None:
    plan, owner = plan_top(directory(gid=7), Ownership.CALLER, ALLOWED, USER, IdMapKind.NAMESPACE, INSIDE)
    own = (IdExtent(1000, 100000, 1),)
    assert plan.operations[-1] == MapRanges(own, own)
    # Not the group that the directory has.
    assert owner == (100000, 100000)


def test_the_foreign_range() -> None:
    found = directory(FOREIGN.start + 3, FOREIGN.start)
    plan, owner = plan_top(found, Ownership.FOREIGN, ALLOWED, USER, IdMapKind.NAMESPACE, INSIDE)
    inside = (IdExtent(FOREIGN.start, 100000, 1000),)
    assert plan.operations[-1] == MapRanges(inside, inside)
    assert owner == (100003, 100000)
    plan, owner = plan_top(found, Ownership.FOREIGN, ALLOWED, USER, IdMapKind.NONE)
    whole = (IdExtent(FOREIGN.start, FOREIGN.start, len(FOREIGN)),)
    assert plan.operations[-1] == MapRanges(whole, whole)
    assert owner == (FOREIGN.start + 3, FOREIGN.start)


def test_an_owner_that_is_nobody() -> None:
    with pytest.raises(UserNamespaceNotPermitted, match="not mapped"):
        plan_top(IN_MEMORY, None, ALLOWED, USER, IdMapKind.NAMESPACE, NOBODY_IS_ROOT)
    other = (IdExtent(5, 100000, 10),)
    with pytest.raises(UserNamespaceNotPermitted, match="not mapped"):
        plan_top(IN_MEMORY, None, ALLOWED, USER, IdMapKind.RANGES, None, other, other)
    with pytest.raises(UserNamespaceNotPermitted, match="no id 0"):
        plan_top(directory(), Ownership.CALLER, ALLOWED, USER, IdMapKind.NAMESPACE, NOBODY_IS_ROOT)
    with pytest.raises(UserNamespaceNotPermitted, match="unknown id"):
        plan_top(directory(), Ownership.CALLER, ALLOWED, replace(USER, gid=OVERFLOW_ID), IdMapKind.NONE)


def test_what_must_not_be_planned() -> None:
    for ownership in (Ownership.ROOT, Ownership.OTHER, None):
        with pytest.raises(ValueError, match="somebody else"):
            plan_top(directory(), ownership, ALLOWED, USER, IdMapKind.NONE)
    with pytest.raises(ValueError, match="read only"):
        plan_top(IN_MEMORY, None, replace(ALLOWED, read_only=True), USER, IdMapKind.NONE)


def test_the_stack_is_writable_and_nobody_elses() -> None:
    plan = plan_stack(ALLOWED, USER, 1, (100000, 100000))
    assert plan.shared is None
    assert plan.operations[1] == MakeMount(LOCKED)
    assert plan.describe()[0].startswith(
        "make a writable overlay of 1 layers as 100000:100000 (metacopy=off"
    )
    with pytest.raises(ValueError, match="without a top"):
        plan_stack(replace(ALLOWED, read_only=True), USER, 1, (0, 0))
