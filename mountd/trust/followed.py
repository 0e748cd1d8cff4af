"""Which image policy a decision followed, in the words of systemd.image-policy(7), for clients who ask.

Where the image as a whole is trusted, that is the request's own policy, or none: everything is allowed.
Where nothing but dm-verity speaks for it, only what has that is used, and what is beside it is left alone.
Then a policy of the request holds as well; as it says what there has to be at least, what has more is within
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.trust.image_policy import (
    DESIGNATORS,
    GROUPS,
    IGNORE,
    ROOT,
    USES,
    WITH_VERITY,
    ImagePolicy,
    parse,
)
from mountd.trust.partitions import is_for_others, table_flags
from mountd.trust.vouching import bound_signers

if TYPE_CHECKING:
    from mountd.evidence.model import Evidence
    from mountd.source.model import Disk, Source

EVERYTHING = "*"
ONLY = {
    False: parse("root=verity+ignore:usr=verity+ignore"),
    True: parse("root=signed+ignore:usr=signed+ignore"),
}
DM_VERITY = "dm-verity"


def followed(
    source: Source, evidence: Evidence, trusted_by: str | None, wished: ImagePolicy | None
) -> ImagePolicy:
    """Return the policy that an image which was allowed fits, and that it was used by.

    `wished` is the request's own.
    """
    disk = source.disk
    everything = parse(EVERYTHING) if wished is None else wished
    if disk is not None and disk.only_verity:
        return of_disk(disk, evidence.signed_partitions, everything)
    if disk is not None or trusted_by != DM_VERITY:
        return everything
    signed = any(signer.covers == "root-hash" for signer in bound_signers(evidence))
    root = ONLY[signed].flags(ROOT) & at_least(everything, ROOT)
    # What is said of others does not concern an image without partitions, whatever it is.
    return ImagePolicy({**everything.partitions, ROOT: root}, IGNORE if wished is None else wished.default)


def of_disk(disk: Disk, signed: frozenset[str], wished: ImagePolicy) -> ImagePolicy:
    """Return the policy for a disk image for which nothing speaks but dm-verity.

    `signed` are the partitions whose root hash is signed with a key of the policy.
    """
    others = [name for name in DESIGNATORS if "-verity" not in name]
    strict = {each.designator for each in disk.partitions if each.verity is not None} <= signed
    flags = {name: ONLY[strict or name in signed].flags(name) & at_least(wished, name) for name in others}
    for each in filter(is_for_others, disk.partitions):
        # Nobody's word is needed for what is not mounted.
        if not flags[each.designator] & {"unused"}:
            flags[each.designator] = wished.flags(each.designator)
    flags |= {name: each for name, each in wished.partitions.items() if name not in others}
    default = IGNORE & wished.default
    policy = ImagePolicy(flags, default if all(default & group for group in GROUPS) else IGNORE)
    for name in DESIGNATORS:
        # Unless it was named, what protects a partition is not what an image fails for.
        if name in flags:
            continue
        partition, allowed = disk.partition(name), policy.flags(name)
        if partition is None:
            fits = "absent" in allowed
        else:
            fits = not allowed & USES <= {"absent"} and table_flags(partition) <= allowed
        if not fits:
            flags[name] = wished.flags(name) | {"unprotected"}
    return policy


def at_least(policy: ImagePolicy, designator: str) -> frozenset[str]:
    """Return the flags of a partition with each protection that is better than one which is allowed."""
    flags = policy.flags(designator)
    for less, more in (("unprotected", "verity"), ("verity", "signed")):
        if less in flags and designator in WITH_VERITY:
            flags |= {more}
    return flags
