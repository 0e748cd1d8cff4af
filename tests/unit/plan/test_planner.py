"""From a decision to operations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mountd.caller.model import Caller, IdExtent, UserNamespace
from mountd.errors import InvalidParameter, LimitExceeded
from mountd.kernel.flags import MountAttr
from mountd.plan.idmap import MAXIMUM_RANGES, IdMapKind, IdRange, host_extents
from mountd.plan.operations import (
    Backing,
    CreateSuperblock,
    MakeMount,
    MapRanges,
    MapRootOwner,
    MapToNamespace,
    Seal,
    Verity,
)
from mountd.plan.planner import ATTRIBUTES, plan_mount
from mountd.source.model import BackingFile, FileSystem, Source, SourceKind, Tmpfs, VeritySuperblock
from mountd.trust.decide import Decision
from mountd.trust.options import RESTRICTING
from mountd.trust.policy import Verdict

EXTENTS = (IdExtent(0, 100000, 1000), IdExtent(1000, 500000, 10))
CONTAINER = UserNamespace(4, 5, EXTENTS, EXTENTS, 1000, is_host=False)
HOST = UserNamespace(4, 1, (IdExtent(0, 0, 1 << 32),), (IdExtent(0, 0, 1 << 32),), 0, is_host=True)
USER = Caller(100000, 100000, frozenset(), 7, CONTAINER, 1000)
ROOT = Caller(0, 0, frozenset(), 7, HOST, 0, sys_admin=True)
BACKING = BackingFile(4096, 1, 2, 0, 0, 0o100644, writable=False, path_hint=None)


def image(type: str) -> Source:
    return Source(SourceKind.IMAGE, BACKING, FileSystem(type, 4096, 512, None, None, False), None)


def allowed(
    *, read_only: bool = True, attributes: frozenset[str] = frozenset(), options: tuple[str, ...] = ()
) -> Decision:
    return Decision(Verdict.ALLOW, "r", None, "", None, (), None, read_only, attributes, options)


LOCKED = frozenset({"nosuid", "nodev"})


@pytest.mark.parametrize(
    ("type", "read_only", "backing", "options"),
    [
        ("erofs", True, Backing.FILE, ()),
        ("squashfs", True, Backing.LOOP, ()),
        ("ext4", True, Backing.LOOP, (("errors", "remount-ro"), ("noload", None))),
        ("ext4", False, Backing.LOOP, (("errors", "remount-ro"),)),
        ("xfs", True, Backing.LOOP, (("nouuid", None), ("norecovery", None))),
        ("xfs", False, Backing.LOOP, (("nouuid", None),)),
        ("btrfs", True, Backing.LOOP, (("rescue", "nologreplay"),)),
        ("btrfs", False, Backing.LOOP, ()),
    ],
)
def test_superblock(
    type: str, read_only: bool, backing: Backing, options: tuple[tuple[str, str | None], ...]
) -> None:
    plan = plan_mount(image(type), allowed(read_only=read_only), USER, IdMapKind.NONE)
    assert plan.operations[0] == CreateSuperblock(type, backing, read_only, options)


def test_attributes_are_there_from_the_first_moment_and_are_locked_last() -> None:
    plan = plan_mount(image("erofs"), allowed(attributes=LOCKED), USER, IdMapKind.NAMESPACE)
    attributes = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV
    assert plan.operations[1:] == (MakeMount(attributes), Seal(), MapToNamespace())


def test_root_of_the_host_gets_it_unsealed() -> None:
    plan = plan_mount(image("erofs"), allowed(), ROOT, IdMapKind.NONE)
    assert plan.operations[1:] == (MakeMount(MountAttr.RDONLY),)


def test_idmaps() -> None:
    plan = plan_mount(image("erofs"), allowed(), USER, IdMapKind.CALLER)
    assert MapRootOwner(100000, 100000) in plan.operations
    plan = plan_mount(image("erofs"), allowed(), USER, IdMapKind.RANGES, EXTENTS, EXTENTS[:1])
    assert MapRanges(EXTENTS, EXTENTS[:1]) in plan.operations


def test_granted_options_come_after_the_forced_ones() -> None:
    plan = plan_mount(image("ext4"), allowed(options=("noacl", "x=y")), USER, IdMapKind.NONE)
    superblock = plan.operations[0]
    assert isinstance(superblock, CreateSuperblock)
    assert superblock.options[-2:] == (("noacl", None), ("x", "y"))


def test_tmpfs() -> None:
    source = Source(SourceKind.TMPFS, None, None, Tmpfs(8192, 16, 0o1777))
    plan = plan_mount(source, allowed(read_only=False, attributes=LOCKED), USER, IdMapKind.NAMESPACE)
    options = (("size", "8192"), ("nr_inodes", "16"), ("mode", "1777"))
    assert plan.operations[0] == CreateSuperblock("tmpfs", Backing.NOTHING, False, options)
    assert plan.operations[1] == MakeMount(MountAttr.NOSUID | MountAttr.NODEV)


def test_every_flag_of_a_policy_has_its_attribute() -> None:
    assert set(ATTRIBUTES) >= RESTRICTING


def test_a_plan_can_be_read() -> None:
    plan = plan_mount(image("ext4"), allowed(attributes=LOCKED), USER, IdMapKind.RANGES, EXTENTS, EXTENTS)
    assert plan.describe() == (
        "make a read-only superblock of ext4 from loop (errors=remount-ro,noload)",
        "make a detached mount with attributes <MountAttr.RDONLY|NOSUID|NODEV: 7>",
        "lock the attributes",
        "map uids 0→100000 (1000), 1000→500000 (10) and gids 0→100000 (1000), 1000→500000 (10)",
    )


def test_ranges_are_numbers_of_the_namespace_and_may_span_its_extents() -> None:
    found = host_extents((IdRange(0, 999, 3), IdRange(10, 0, 1)), CONTAINER, gids=False)
    assert found == (IdExtent(0, 100999, 1), IdExtent(1, 500000, 2), IdExtent(10, 100000, 1))


@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        ((), "no ranges"),
        ((IdRange(0, 0, 0),), "no range of ids"),
        ((IdRange(-1, 0, 1),), "no range of ids"),
        ((IdRange(0, -5, 1),), "no range of ids"),
        ((IdRange(4294967295, 0, 1),), "no range of ids"),
        ((IdRange(0, 0, 1 << 40),), "no range of ids"),
        ((IdRange(0, 0, 2), IdRange(1, 5, 1)), "two ranges have the first 1"),
        ((IdRange(0, 0, 2), IdRange(5, 1, 1)), "two ranges have the target 1"),
        ((IdRange(0, 2000, 1),), "does not map 2000"),
        ((IdRange(0, 1005, 6),), "does not map 1010"),
    ],
)
def test_ranges_refused(ranges: tuple[IdRange, ...], reason: str) -> None:
    with pytest.raises(InvalidParameter, match=reason):
        host_extents(ranges, CONTAINER, gids=True)


def test_too_many_ranges() -> None:
    ranges = tuple(IdRange(n, n, 1) for n in range(MAXIMUM_RANGES + 1))
    with pytest.raises(LimitExceeded, match="ranges in idMap.uidRanges"):
        host_extents(ranges, CONTAINER, gids=False)


def test_dm_verity_needs_a_root_hash_and_is_read_only() -> None:
    verified = Verity.of(VeritySuperblock(4096, 512, 7, 1, "sha256", b"salt", None), b"\xab" * 32)
    superblock = CreateSuperblock("erofs", Backing.VERITY, True, (), verified)
    assert superblock.describe() == (
        f"make a read-only superblock of erofs from dm-verity, root hash sha256:{'ab' * 32}, (no options)"
    )
    assert verified == Verity(b"\xab" * 32, "sha256", b"salt", 4096, 512, 7, 1)
    for backing, read_only, verity in (
        (Backing.VERITY, True, None),
        (Backing.VERITY, False, verified),
        (Backing.LOOP, True, verified),
        (Backing.NOTHING, False, verified),
    ):
        with pytest.raises(ValueError, match="dm-verity"):
            CreateSuperblock("erofs", backing, read_only, (), verity)


def test_a_mount_is_not_shared_with_one_through_other_hash_data() -> None:
    """What does not fit the root hash gives errors to whoever reads through it, and to nobody else."""
    superblock = VeritySuperblock(4096, 512, 7, 1, "sha256", b"salt", None)
    fixed = replace(image("erofs"), backing=replace(BACKING, changed=1))

    def name(**changes: int) -> str | None:
        file = replace(BACKING, **({"changed": 1} | changes))
        verity = Verity.of(superblock, b"\xab" * 32, hash_file=file.state)
        decision = allowed(attributes=LOCKED)
        return plan_mount(fixed, decision, USER, IdMapKind.NONE, verity=verity).shared

    names = [
        name(),
        *(name(**{field: 77}) for field in ("dev", "ino", "changed", "size")),
        name(uid=5),
        name(),
    ]
    assert None not in names
    assert len(set(names)) == 5
    assert names[0] == names[-2] == names[-1]


def test_a_layer_is_not_locked_and_can_be_shared_as_any_other() -> None:
    fixed = Source(
        SourceKind.IMAGE,
        BackingFile(4096, 1, 2, 0, 0, 0o100644, writable=False, path_hint=None, changed=1),
        FileSystem("erofs", 4096, 512, None, None, False),
        None,
    )
    decision = allowed(attributes=frozenset({"nosuid", "nodev"}))
    alone = plan_mount(fixed, decision, USER, IdMapKind.NAMESPACE)
    layer = plan_mount(fixed, decision, USER, IdMapKind.NAMESPACE, as_layer=True)
    assert Seal() in alone.operations
    assert layer.operations == tuple(each for each in alone.operations if each != Seal())
    assert layer.shared == alone.shared is not None
