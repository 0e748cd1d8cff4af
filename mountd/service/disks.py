"""How a disk image is trusted: as a whole, or as far as dm-verity protects it.

As a whole, it is an image like any other: nobody can change its bytes any more, and whoever vouches for them
vouches for all partitions. Where the policy does not allow it for that, the image may speak for itself: a
root or /usr partition with hash data, whose root hash is signed beside it. Then that partition is mounted
through dm-verity, and nothing that dm-verity does not protect is used. The two are judged apart, each with
the evidence that holds for it alone, and so is each partition that has a root hash of its own.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from mountd.evidence import dm_verity
from mountd.evidence.model import Proof
from mountd.service.inspection import is_fixed, judged, signed
from mountd.source.disk import MAXIMUM_SIGNATURE
from mountd.trust.options import shown
from mountd.trust.vouching import bound_signers

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.evidence.model import Evidence
    from mountd.service.context import RequestContext
    from mountd.service.inspection import Inspected
    from mountd.service.requests import MountRequest
    from mountd.source.model import Partition, PartitionVerity


def settle(found: Inspected, request: MountRequest, caller: Caller, context: RequestContext) -> Inspected:
    """Return `found`, which has partitions, in the way in which it is going to be judged.

    A refusal is found again by whoever judges that. Raises SyscallError, OSError.
    """
    disk = found.source.disk
    if disk is None or (
        request.wishes.image_policy is None and judged(found, request, caller, context) is None
    ):
        return found
    evidence = {
        partition.designator: evidence_of(found, partition.verity, request, context)
        for partition in disk.partitions
        if partition.verity is not None
    }
    names = frozenset(name for name, each in evidence.items() if covers_root_hash(each))
    whole = replace(found, evidence=replace(found.evidence, signed_partitions=names))
    if not evidence or judged(whole, request, caller, context) is None:
        return whole
    source = replace(found.source, disk=replace(disk, only_verity=True))
    settled = [
        replace(found, source=source, evidence=replace(each, signed_partitions=names))
        for each in evidence.values()
    ]
    for each in settled:
        if judged(each, request, caller, context) is not None:
            return each
    rules = {context.policy.decide(caller, source, each.evidence, request.wishes).rule for each in settled}
    # What one rule allows of it and another rule the rest is allowed by none.
    return settled[0] if len(rules) == 1 else whole


def evidence_of(
    found: Inspected, verity: PartitionVerity, request: MountRequest, context: RequestContext
) -> Evidence:
    """Return what speaks for a partition that is read through dm-verity."""
    evidence = found.evidence
    if not is_fixed(evidence):
        # Whatever was found out about bytes that can still change is not about those behind dm-verity.
        evidence = replace(evidence, proofs=(), digest=None, signers=(), provenance=None)
    proof = dm_verity.prove(verity.superblock, verity.root_hash)
    if not isinstance(proof, Proof) or proof.digest is None:
        return evidence
    evidence = replace(evidence, proofs=(*evidence.proofs, proof))
    blob = signature_of(found.image_fd, verity) or request.signature
    if blob is None:
        return evidence
    return signed(evidence, blob, [("root-hash", proof.digest)], context)


def signature_of(image_fd: int | None, verity: PartitionVerity) -> bytes | None:
    """Return what is in the signature partition, None where there is none."""
    window = verity.signature
    if window is None or image_fd is None:
        return None
    found = os.pread(image_fd, min(window.size, MAXIMUM_SIGNATURE), window.offset)
    return found.rstrip(b"\0") or None


def covers_root_hash(evidence: Evidence) -> bool:
    """Tell whether the root hash is signed with a key of the policy."""
    return any(signer.covers == "root-hash" for signer in bound_signers(evidence))


def shown_partition(partition: Partition) -> str:
    """Return a partition in a few words, for people."""
    kind = partition.contents or "unknown contents"
    if partition.file_system is not None:
        kind = partition.file_system.type
    words = [kind] + (["dm-verity"] if partition.verity is not None else [])
    if partition.luks is not None:
        words.append("encrypted")
    if "-verity" in partition.designator:
        words = []
    label = f" “{shown(partition.label, 64)}”" if partition.label else ""
    return f"{partition.designator}{label}" + (f" ({', '.join(words)})" if words else "")
