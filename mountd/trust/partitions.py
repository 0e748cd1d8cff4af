"""Which partitions of a disk image are used, and how: what the request's own imagePolicy says of each.

The use of a partition is one of those of systemd.image-policy(7), which are alternatives. What an image
offers is taken for what it is at least: a partition with a signed root hash may also be used unprotected.

* A partition is read through dm-verity where nothing else vouches for it, or where the policy does not
  have it without; otherwise as it is. What has hash data is read-only in either case: whatever is written
  to it would no longer fit them.
* Where nothing vouches for what dm-verity does not protect, that is not used, and the policy has to allow
  that.
* What is encrypted (LUKS) is used as that, and as nothing else; what is in it is judged once it was opened.
* What cannot be mounted is a refusal, unless the policy lets it be unused only. The ESP and the partition
  for boot loaders are for firmware, and for file systems that are not mounted here. They are left out, as
  swap space always is: others use them, and they have to be as the policy wants them.
* Hash data and signatures are used only as what they protect is, and nothing is used beside such that have
  nothing to protect. The root and /usr that are used have to be of one architecture.

Without a policy, everything is allowed, and used as far as it can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.errors import DeniedByPolicy, InvalidImage, UnsupportedFileSystem
from mountd.source.model import LUKS_TYPE
from mountd.trust.image_policy import DESIGNATORS, EVERYTHING, NOT_USED, TYPES, USES

if TYPE_CHECKING:
    from mountd.source.model import Disk, Partition
    from mountd.trust.image_policy import ImagePolicy

LEAVE_OUT = "leave it out, with an imagePolicy that does not use it, such as “root=open:usr=open”"
ANOTHER = "ask with another imagePolicy, or without one"
WRITABLE = frozenset({"btrfs", "ext4", "xfs"})
FOR_FIRMWARE = frozenset({"esp", "xbootldr"})
NEVER_MOUNTED = frozenset({"swap"})


@dataclass(frozen=True, slots=True)
class Use:
    """A partition that is used: through dm-verity or as it is, and whether read-only.

    `attributes` and `options` are those of a Decision, beyond what holds for all of its partitions.
    """

    partition: Partition
    verity: bool
    read_only: bool
    attributes: frozenset[str] = frozenset()
    options: tuple[str, ...] = ()

    @property
    def type(self) -> str:
        """The type of its file system, or for one that was not opened yet that of what it is in."""
        if self.partition.file_system is not None:
            return self.partition.file_system.type
        return self.partition.contents or ""

    @property
    def is_locked(self) -> bool:
        """Whether it is encrypted, and was not opened yet."""
        return self.partition.luks is not None and self.partition.file_system is None


def uses(
    disk: Disk, policy: ImagePolicy | None, signed: frozenset[str], *, read_only: bool
) -> tuple[Use, ...]:
    """Return what is used of a disk image, in the order in which it is mounted.

    `signed` are the designators of the partitions whose root hash is signed with a key of the policy. Raises
    DeniedByPolicy for what the request's own policy refuses, NotSupported, UnsupportedFileSystem,
    InvalidImage.
    """
    found = []
    used: set[str] = set()
    for partition in disk.partitions:
        flags = EVERYTHING if policy is None else policy.flags(partition.designator)
        if is_for_others(partition):
            if is_as_wanted(partition, flags):
                used.add(partition.designator)
            continue
        use = use_of(disk, partition, flags, signed, read_only=read_only)
        if use is not None:
            check_flags(use, flags)
            found.append(use)
            used.add(partition.designator)
            if use.verity:
                used.add(f"{partition.designator}-verity")
    if policy is not None:
        for designator in DESIGNATORS:
            check_presence(disk, policy, designator, used)
    if not found:
        raise DeniedByPolicy("no partition of the disk image is used", hint=ANOTHER)
    check_belonging(disk, policy, found)
    return tuple(found)


def is_for_others(partition: Partition) -> bool:
    """Tell whether a partition is left to others, such as firmware, and never mounted here."""
    cannot_be = partition.file_system is None and partition.luks is None
    return partition.designator in NEVER_MOUNTED or partition.designator in FOR_FIRMWARE and cannot_be


def is_as_wanted(partition: Partition, flags: frozenset[str]) -> bool:
    """Tell whether the policy allows that others use a partition. Raises DeniedByPolicy for its flags.

    What it says of types of file systems is about those that are mounted here.
    """
    found = "encrypted" if partition.contents == LUKS_TYPE else "unprotected"
    if found not in flags:
        wanted = flags & USES - NOT_USED
        if wanted and "unused" not in flags:
            name = partition.designator
            raise refused(
                f"it wants the {name} partition to be {', '.join(sorted(wanted))}, and it is {found}"
            )
        return False
    check_table_flags(partition, flags)
    return True


def check_belonging(disk: Disk, policy: ImagePolicy | None, found: list[Use]) -> None:
    """Raise InvalidImage if what is used does not belong together."""
    kinds = {use.partition.designator: use.partition.architecture for use in found}
    root, usr = kinds.get("root"), kinds.get("usr")
    if None not in (root, usr) and root != usr:
        raise InvalidImage(f"GPT: the root partition is for {root}, and the /usr partition for {usr}")
    for partition in disk.partitions:
        protected, _, end = partition.designator.partition("-verity")
        if protected == partition.designator or not may_be_used(policy, partition.designator):
            continue
        hashes = f"{protected}-verity"
        signs_nothing = bool(end) and not (disk.partition(hashes) and may_be_used(policy, hashes))
        if signs_nothing or disk.partition(protected) is None:
            lacks = hashes if signs_nothing else protected
            what = f"partition {partition.number} ({partition.designator})"
            raise InvalidImage(f"GPT: {what} is there, and no {lacks} partition that is used")


def may_be_used(policy: ImagePolicy | None, designator: str) -> bool:
    """Tell whether the policy allows any use of a partition."""
    return policy is None or bool(policy.flags(designator) & USES - NOT_USED)


def use_of(
    disk: Disk, partition: Partition, flags: frozenset[str], signed: frozenset[str], *, read_only: bool
) -> Use | None:
    """Return how a partition is used, None for not at all. Raises what `uses` raises."""
    name = partition.designator
    wanted = flags & USES - NOT_USED
    if "-verity" in name:
        return None
    if not wanted:
        if not flags & USES:
            raise refused(f"it wants what a {name} partition cannot be, such as protected by dm-verity")
        return None
    locked = partition.luks is not None and partition.file_system is None
    if partition.file_system is None and not locked:
        check_left_out(partition, flags, wanted)
        return None
    offered = {"unprotected"}
    if partition.luks is not None:
        # Its root hash, if it has one, is that of the ciphertext: nothing is made of both.
        offered = set() if disk.only_verity else {"encrypted"}
    elif partition.verity is not None:
        offered |= {"verity"} | ({"signed"} if name in signed else set())
    elif disk.only_verity:
        offered = set()
    if not wanted & offered:
        if "unused" in flags:
            return None
        have = "there, and nothing vouches for it" if not offered else ", ".join(sorted(offered))
        raise refused(f"it wants the {name} partition to be {', '.join(sorted(wanted))}, and it is {have}")
    verity = partition.verity is not None and (disk.only_verity or "unprotected" not in wanted)
    verity = verity and partition.luks is None
    can_be = partition.file_system is None or partition.file_system.type in WRITABLE
    has_hashes = disk.partition(f"{name}-verity") is not None
    writable = not (read_only or has_hashes or partition.read_only) and can_be
    return Use(partition, verity, not writable)


def check_left_out(partition: Partition, flags: frozenset[str], wanted: frozenset[str]) -> None:
    """Raise what is in the way of using a partition, unless it may be left out."""
    name, number = partition.designator, partition.number
    if "unused" in flags and wanted == {"encrypted"}:
        return
    holds = partition.contents or "nothing that is known"
    if partition.problem is not None:
        holds += f" ({partition.problem})"
    raise UnsupportedFileSystem(
        f"partition {number} ({name}) holds {holds}, which is not mounted",
        file_system_type=partition.contents,
        hint=LEAVE_OUT,
    )


def check_flags(use: Use, flags: frozenset[str]) -> None:
    """Raise DeniedByPolicy if a partition that is used has flags or a type that the policy does not have."""
    name, type = use.partition.designator, use.type
    check_table_flags(use.partition, flags)
    if type not in flags and not use.is_locked:
        allowed = ", ".join(sorted(flags & TYPES)) or "no type of file system"
        raise refused(f"it allows {allowed} for the {name} partition, which is {type}")


def check_table_flags(partition: Partition, flags: frozenset[str]) -> None:
    """Raise DeniedByPolicy if a partition has flags in the table that the policy does not have."""
    for what in sorted(table_flags(partition) - flags):
        flag, _, state = what.rpartition("-")
        other = "off" if state == "on" else "on"
        raise refused(f"it wants the flag {flag} of the {partition.designator} partition to be {other}")


def table_flags(partition: Partition) -> frozenset[str]:
    """Return what the table says of a partition, in the words of a policy."""
    flags = (("read-only", partition.read_only), ("growfs", partition.grow))
    return frozenset(f"{what}-{'on' if is_on else 'off'}" for what, is_on in flags)


def check_presence(disk: Disk, policy: ImagePolicy, designator: str, used: set[str]) -> None:
    """Raise DeniedByPolicy if a partition is not there, or not used, and the policy does not allow that."""
    flags = policy.flags(designator)
    partition = disk.partition(designator)
    if partition is None:
        # Also what a policy says of root includes: who may have it signed has to have what that takes.
        if "absent" not in flags:
            raise refused(f"it wants a {designator} partition, and there is none")
    elif "-verity" in designator:
        check_protecting(policy, partition, used)
    elif designator not in used and "unused" not in flags:
        raise refused(f"it does not allow the {designator} partition to be unused, as it would be")


def check_protecting(policy: ImagePolicy, partition: Partition, used: set[str]) -> None:
    """Raise DeniedByPolicy if hash data or a signature is there, or used, and the policy does not allow it.

    What a policy says of what they protect includes them: they may be there, and need not be used for that.
    More protection than it wants is not refused, unless it says so of them by name.
    """
    designator = partition.designator
    flags = policy.flags(designator)
    if flags & USES <= {"absent"}:
        raise refused(f"it wants no {designator} partition, and there is one")
    if may_be_used(policy, designator):
        check_table_flags(partition, flags)
    elif designator in used and designator in policy.partitions:
        raise refused(f"it allows no use of the {designator} partition")


def refused(why: str) -> DeniedByPolicy:
    """Return the error for what the request's own policy refuses."""
    return DeniedByPolicy(f"the request's own imagePolicy refuses it: {why}", hint=ANOTHER)
