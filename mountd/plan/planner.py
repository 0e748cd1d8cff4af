"""From what was asked for and what was decided to what is done: pure, and printable."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from mountd.kernel.flags import MountAttr
from mountd.plan.idmap import IdMapKind
from mountd.plan.operations import (
    Backing,
    CreateSuperblock,
    MakeMount,
    MapRanges,
    MapRootOwner,
    MapToNamespace,
    Plan,
    Seal,
    Verity,
)
from mountd.source.model import SourceKind

if TYPE_CHECKING:
    from mountd.caller.model import Caller, IdExtent
    from mountd.plan.operations import Operation
    from mountd.source.model import Source
    from mountd.trust.decide import Decision
    from mountd.trust.partitions import Use

ATTRIBUTES = {
    "nosuid": MountAttr.NOSUID,
    "nodev": MountAttr.NODEV,
    "noexec": MountAttr.NOEXEC,
    "nosymfollow": MountAttr.NOSYMFOLLOW,
    "noatime": MountAttr.NOATIME,
    "strictatime": MountAttr.STRICTATIME,
    "nodiratime": MountAttr.NODIRATIME,
}

# What mountd always asks for, whatever the image says about itself. An error in an ext4 must not stop the
# machine, as its superblock may wish; two copies of one xfs have one UUID.
FORCED: dict[str, tuple[tuple[str, str | None], ...]] = {
    "ext4": (("errors", "remount-ro"),),
    "xfs": (("nouuid", None),),
}
# A journal is not replayed for a read-only mount: that would write to the image, or need to.
FORCED_READ_ONLY: dict[str, tuple[tuple[str, str | None], ...]] = {
    "ext4": (("noload", None),),
    "xfs": (("norecovery", None),),
    "btrfs": (("rescue", "nologreplay"),),
}


def plan_mounts(
    source: Source,
    decision: Decision,
    caller: Caller,
    idmap: IdMapKind,
    uids: tuple[IdExtent, ...] = (),
    gids: tuple[IdExtent, ...] = (),
    verity: Verity | None = None,
    name: str | None = None,
    *,
    as_layer: bool = False,
) -> tuple[Plan, ...]:
    """Return a plan as of `plan_mount` for each mount: one, or for a disk image one for each use."""
    if source.disk is None:
        return (plan_mount(source, decision, caller, idmap, uids, gids, verity, name, as_layer=as_layer),)
    if not decision.uses:
        raise ValueError("a disk image of which nothing is used was allowed")
    return tuple(
        plan_mount(
            source, of_use(decision, use), caller, idmap, uids, gids, name=name, use=use, as_layer=as_layer
        )
        for use in decision.uses
    )


def of_use(decision: Decision, use: Use) -> Decision:
    """Return a decision as it is for one partition."""
    if not use.attributes and not use.options:
        return decision
    attributes, options = decision.attributes | use.attributes, (*decision.options, *use.options)
    return replace(decision, attributes=attributes, options=options)


def plan_mount(
    source: Source,
    decision: Decision,
    caller: Caller,
    idmap: IdMapKind,
    uids: tuple[IdExtent, ...] = (),
    gids: tuple[IdExtent, ...] = (),
    verity: Verity | None = None,
    name: str | None = None,
    use: Use | None = None,
    *,
    as_layer: bool = False,
) -> Plan:
    """Return the operations for a request that was allowed; `uids` and `gids` are for IdMapKind.RANGES.

    With `verity`, the image is read through dm-verity: that is what the verdict was about. `name` is what
    the mount table is to call the image, `use` the partition that it is about. `as_layer` is for a mount
    that nobody but an overlay gets, whose attributes need no lock.
    """
    made = of_partition(source, decision, use, name) if use else superblock(source, decision, verity, name)
    attributes = attributes_of(decision.attributes, made.read_only)
    operations: list[Operation] = [made, MakeMount(attributes)]
    shared = None
    # What is asked of the host's root is nothing: it may clear whatever it likes.
    if attributes and not caller.is_host_root and not as_layer:
        operations.append(Seal())
    # What root mounts for itself is to be gone once it is unmounted; what takes a password is for whoever
    # has just said it.
    if (not caller.is_host_root or idmap is IdMapKind.NAMESPACE) and made.backing is not Backing.CRYPT:
        shared = shared_name(source, decision, made, caller.payer)
    if idmap is IdMapKind.NAMESPACE:
        operations.append(MapToNamespace())
    elif idmap is IdMapKind.RANGES:
        operations.append(MapRanges(uids, gids))
    elif idmap is IdMapKind.CALLER:
        operations.append(MapRootOwner(caller.uid, caller.gid))
    return Plan(tuple(operations), shared)


@lru_cache(maxsize=64)
def shared_name(
    source: Source, decision: Decision, made: CreateSuperblock, owner: tuple[int, int]
) -> str | None:
    """Return a name that two requests have in common only if the one may have a clone of the other's mount.

    The image is the same, in the same state, and cannot change: that is known by its inode and the time of
    its last change, as it cannot be replaced while it is mounted. It is read in the same way, through the
    same hash data, as others may only give errors; it has the same attributes, is trusted for the same
    reason, and belongs to the same owner, so that what is taken from the one is not taken from another as
    well.
    """
    backing = source.backing
    if backing is None or not backing.changed or not made.read_only:
        return None
    image: tuple[object, ...] = backing.state
    if made.verity is not None and made.verity.hash_window is not None and not backing.mode & 0o022:
        # What is in it is known by its root hash. But whoever can write to one of two files could make the
        # other one's reader get errors: they have the same owner, and nobody else writes to them.
        image = ("root hash", backing.uid)
        made = replace(made, window=None, verity=replace(made.verity, hash_window=None))
    trust = (decision.rule, decision.trusted_by, decision.signer, decision.digest)
    facts = (image, made, sorted(decision.attributes), trust, owner)
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()


@lru_cache(maxsize=64)
def attributes_of(names: frozenset[str], read_only: bool) -> MountAttr:
    """Return the flags of a mount as the kernel takes them. Combining them costs more than a system call."""
    attributes = MountAttr.RDONLY if read_only else MountAttr(0)
    for name in names:
        attributes |= ATTRIBUTES[name]
    return attributes


def superblock(
    source: Source, decision: Decision, verity: Verity | None = None, name: str | None = None
) -> CreateSuperblock:
    """Return how the file system is made."""
    granted = tuple(split(option) for option in decision.options)
    if source.kind is SourceKind.TMPFS and source.tmpfs is not None:
        wishes: list[tuple[str, str | None]] = [("size", str(source.tmpfs.size))]
        if source.tmpfs.inodes is not None:
            wishes.append(("nr_inodes", str(source.tmpfs.inodes)))
        wishes.append(("mode", f"{source.tmpfs.mode:o}"))
        return CreateSuperblock("tmpfs", Backing.NOTHING, decision.read_only, (*wishes, *granted))
    if source.file_system is None:
        raise ValueError("an image without a file system was allowed")
    type = source.file_system.type
    forced = forced_options(type, decision.read_only)
    backing = Backing.FILE if type == "erofs" else Backing.LOOP
    if verity is not None:
        backing = Backing.VERITY
    elif source.luks is not None:
        backing, name = Backing.CRYPT, None
    return CreateSuperblock(type, backing, decision.read_only, (*forced, *granted), verity, name)


def of_partition(source: Source, decision: Decision, use: Use, name: str | None = None) -> CreateSuperblock:
    """Return how the file system in a partition is made, which is called as the image is.

    Raises ValueError for what must not be.
    """
    partition = use.partition
    if partition.file_system is None or (source.disk is not None and source.disk.only_verity > use.verity):
        raise ValueError("a partition that nothing vouches for was allowed, or one without a file system")
    options = tuple(split(option) for option in decision.options)
    type = partition.file_system.type
    verity = None
    if use.verity and partition.verity is not None:
        found = partition.verity
        verity = Verity.of(found.superblock, found.root_hash, found.window)
    backing = Backing.LOOP if not use.verity else Backing.VERITY
    if partition.luks is not None:
        backing = Backing.CRYPT
    forced = forced_options(type, use.read_only)
    # What is read through another device is called as that is.
    called = name if backing is Backing.LOOP else None
    return CreateSuperblock(
        type, backing, use.read_only, (*forced, *options), verity, called, partition.window
    )


def forced_options(type: str, read_only: bool) -> tuple[tuple[str, str | None], ...]:
    """Return what a file system is always told."""
    return FORCED.get(type, ()) + (FORCED_READ_ONLY.get(type, ()) if read_only else ())


def split(option: str) -> tuple[str, str | None]:
    """Return name and value of an option, None for a flag."""
    name, separator, value = option.partition("=")
    return name, value if separator else None
