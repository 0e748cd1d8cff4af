"""Who vouches for it that an image is the one that it should be: signatures, digests, records, a place.

A signature says something about an image only through a digest, and only if that digest is proven to be the
image's: one of its bytes was measured, one of a root hash is what dm-verity checks against. A signature over
a root hash says nothing about an image that is mounted without dm-verity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.trust.policy import Strength

if TYPE_CHECKING:
    from mountd.evidence.model import Evidence, Signer
    from mountd.trust.policy import Rule

# What a signature covers -> the kind of proof that makes it the image's.
PROVEN_BY = {"root-hash": "dm-verity", "fs-verity": "fs-verity"}
# The proofs whose digest, where they have one, is that of the image's bytes.
OF_BYTES = ("root-owned", "sealed", "stored")
# The requirements of containers-policy.json(5) that check a signature.
CHECKING = ("signedBy", "sigstoreSigned")


def digests_of_bytes(evidence: Evidence) -> frozenset[str]:
    """Return what is known of the digest of the image's bytes."""
    found = {proof.digest for proof in evidence.proofs if proof.kind in OF_BYTES} | {evidence.digest}
    return frozenset(digest for digest in found if digest is not None)


def is_bound(signer: Signer, evidence: Evidence) -> bool:
    """Whether what was signed is proven to be this very image."""
    if signer.covers == "image":
        return signer.digest in digests_of_bytes(evidence)
    kind = PROVEN_BY.get(signer.covers)
    return any(proof.kind == kind and proof.digest == signer.digest for proof in evidence.proofs)


def bound_signers(evidence: Evidence) -> tuple[Signer, ...]:
    """Return the signatures that are about this very image."""
    return tuple(signer for signer in evidence.signers if is_bound(signer, evidence))


def is_checked_provenance(evidence: Evidence) -> bool:
    """Whether the image was pulled under a requirement that checks a signature."""
    return evidence.provenance is not None and evidence.provenance.requirement in CHECKING


def strength(rule: Rule, evidence: Evidence) -> Strength | None:
    """Return who vouches for an image that `rule` is about, None if nobody does."""
    if bound_signers(evidence) or is_checked_provenance(evidence):
        return Strength.SIGNED
    if evidence.provenance is not None or digests_of_bytes(evidence) & set(rule.image.digest):
        return Strength.DIGEST
    return Strength.LOCATION if evidence.root_owned_path is not None else None
