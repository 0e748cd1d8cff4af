"""Directories: from a decision to operations, and which ids these map."""

from __future__ import annotations

import pytest

from mountd.caller.model import FOREIGN, Caller, IdExtent, UserNamespace
from mountd.errors import UserNamespaceNotPermitted
from mountd.evidence.model import Ownership
from mountd.kernel.flags import MountAttr
from mountd.plan.directory import plan_directory
from mountd.plan.idmap import IdMapKind
from mountd.plan.operations import CloneTree, MapRanges, MapRootOwner, MapToNamespace, Operation, Seal
from mountd.source.model import Directory
from mountd.trust.decide import Decision
from mountd.trust.policy import Verdict

BASE = FOREIGN.start
EXTENTS = (IdExtent(0, 100000, 1000), IdExtent(1000, 500000, 64000), IdExtent(65000, 700000, 65536))
CONTAINER = UserNamespace(4, 5, EXTENTS, EXTENTS, 1000, is_host=False)
HOST = UserNamespace(4, 1, (IdExtent(0, 0, 1 << 32),), (IdExtent(0, 0, 1 << 32),), 0, is_host=True)
USER = Caller(1000, 100, frozenset(), 7, HOST, 1000)
DIRECTORY = Directory(1, 2, 3, 1000, 0, opened=True, read_only=False, file_system="ext4", path_hint=None)


def operations(
    ownership: Ownership,
    idmap: IdMapKind,
    *,
    read_only: bool = False,
    namespace: UserNamespace | None = CONTAINER,
    caller: Caller = USER,
) -> tuple[Operation, ...]:
    decision = Decision(
        Verdict.ALLOW, "rule", None, "", None, (), None, read_only, frozenset({"nosuid", "nodev"}), ()
    )
    return plan_directory(DIRECTORY, ownership, decision, caller, idmap, namespace).operations


def test_what_is_cloned_is_what_was_judged_and_sealed() -> None:
    attributes = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV
    assert operations(Ownership.CALLER, IdMapKind.NONE, read_only=True) == (
        CloneTree(attributes, 1, 2, 1000, 0),
        Seal(),
    )


def test_the_callers_own_id_and_group_are_all_that_is_mapped() -> None:
    own = operations(Ownership.CALLER, IdMapKind.NAMESPACE)[-1]
    assert own == MapRanges((IdExtent(1000, 100000, 1),), (IdExtent(100, 100000, 1),))
    same = operations(Ownership.CALLER, IdMapKind.CALLER)[-1]
    assert same == MapRanges((IdExtent(1000, 1000, 1),), (IdExtent(100, 100, 1),))


def test_the_foreign_range_fills_the_namespace() -> None:
    extents = (
        IdExtent(BASE, 100000, 1000),
        IdExtent(BASE + 1000, 500000, 64000),
        IdExtent(BASE + 65000, 700000, 536),
    )
    assert operations(Ownership.FOREIGN, IdMapKind.NAMESPACE)[-1] == MapRanges(extents, extents)


def test_what_is_roots_is_mapped_whole_and_read_only() -> None:
    assert operations(Ownership.ROOT, IdMapKind.NAMESPACE, read_only=True)[-1] == MapToNamespace()
    assert operations(Ownership.ROOT, IdMapKind.CALLER, read_only=True)[-1] == MapRootOwner(1000, 100)
    for kind in IdMapKind:
        with pytest.raises(ValueError, match="write to one of root's"):
            operations(Ownership.ROOT, kind)
    with pytest.raises(ValueError, match="somebody else's"):
        operations(Ownership.OTHER, IdMapKind.NONE, read_only=True)


@pytest.mark.parametrize("ownership", [Ownership.CALLER, Ownership.FOREIGN])
def test_a_namespace_without_room(ownership: Ownership) -> None:
    high = (IdExtent(70000, 100000, 1),)
    empty = UserNamespace(4, 5, high, high, 1000, is_host=False)
    with pytest.raises(UserNamespaceNotPermitted):
        operations(ownership, IdMapKind.NAMESPACE, namespace=empty)


def test_a_group_that_is_anybodys() -> None:
    nobody = Caller(1000, 65534, frozenset(), 7, HOST, 1000)
    with pytest.raises(UserNamespaceNotPermitted, match="65534"):
        operations(Ownership.CALLER, IdMapKind.CALLER, caller=nobody)
