"""What a rule requires of an image: that nobody can change it any more, and that somebody vouches for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.errors import DeniedByPolicy, KeyUnknown, NotImmutable, SignatureInvalid
from mountd.trust.match import location_problem, to_be_signed
from mountd.trust.options import shown
from mountd.trust.policy import CONTAINERS_POLICY, ROOT_OWNED, Access, Strength
from mountd.trust.vouching import is_bound, is_checked_provenance, strength

if TYPE_CHECKING:
    from mountd.trust.case import Case
    from mountd.trust.policy import Grant, Rule

# The smallest thing to do for each kind of immutability.
WAYS_OUT = {
    ROOT_OWNED: "an administrator can copy it, owned by root, to a directory that only root can write to",
    "sealed": "hand it over as a memfd with all four seals (F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, "
    "F_SEAL_WRITE)",
    "dm-verity": "make its hashes with “veritysetup format”, and hand them over with their root hash "
    "(source.verity)",
    "fs-verity": "run “fsverity enable IMAGE”, and open it again, read-only",
    "stored": "run “mountctl image import IMAGE”, and mount what that names",
    "regenerated": "hand over what “composefs-info dump IMAGE” prints, as a sealed memfd "
    "(source.composefs.dumpFileDescriptor)",
    "composefs-verity": "hand over a description in which each file has a digest, and object directories on "
    "a file system with fs-verity",
}
# Of disk images, which have their hash data themselves: what is missing, and the way out.
OF_DISKS = {
    "dm-verity": (
        "it has no hash data for its root or /usr partition, or none that fits",
        "build it with hash data and the signature of its root hash in it, as systemd-repart and mkosi do "
        "with Verity=",
    ),
}
# What is not looked for in the image itself.
UNPROVEN = {
    "dm-verity": "no hash data came along",
    "stored": "it is not an image of the store",
    "regenerated": "mountd has not made it of a description",
    "composefs-verity": "it is no description of a composefs whose contents fs-verity can check",
}
TRUSTED_BECAUSE = {
    ROOT_OWNED: "only root can change the image where it lies",
    "sealed": "the image is a sealed memfd, which nobody can change",
    "dm-verity": "dm-verity refuses every block that is not the one its root hash stands for",
    "fs-verity": "fs-verity makes the image unchangeable",
    "stored": "the image is in the store, which only mountd writes to",
    "regenerated": "mountd makes the metadata itself, of what the description says",
    "composefs-verity": "mountd makes the metadata itself, of what the description says",
}
FOR_STRENGTH = {
    Strength.SIGNED: "hand over a detached signature of it, by a key of the policy (source.signature)",
    Strength.DIGEST: "an administrator can name its digest in a rule, or pull it from a registry",
    Strength.LOCATION: WAYS_OUT[ROOT_OWNED],
}


def check_integrity(rule: Rule, grant: Grant, case: Case) -> str:
    """Return the kind of immutability that is proven, or raise NotImmutable, which names the ways to one.

    Any one of those that the rule names is enough. Only what is root-owned can be written to, so that this
    one is looked at first where that is asked for.
    """
    kinds = rule.require.integrity if rule.require is not None else ()
    missing: list[tuple[str, str, str]] = []
    for kind in sorted(kinds, key=lambda kind: case.asked.read_only or kind != ROOT_OWNED):
        problem = problem_with_location(grant, case) if kind == ROOT_OWNED else problem_with(kind, case)
        if problem is None:
            return kind
        missing.append((kind, *problem))
    if len(missing) == 1:
        ((_, reason, hint),) = missing
        raise NotImmutable(reason, rule=rule.name, hint=hint)
    raise NotImmutable(
        "; ".join(f"{kind}: {reason}" for kind, reason, _ in missing),
        rule=rule.name,
        hint="one of these is enough: " + "; ".join(f"{kind}: {hint}" for kind, _, hint in missing),
    )


def problem_with_location(grant: Grant, case: Case) -> tuple[str, str] | None:
    """Return why the image is not safe from the caller where it lies, and the way out.

    A location that only root can write to proves nothing about a caller who has a writable descriptor all
    the same. What such a caller may do with it is only for a rule to say that lets it write anyway.
    """
    evidence = case.evidence
    if evidence.root_owned_path is None:
        return location_problem(evidence), WAYS_OUT[ROOT_OWNED]
    writes_anyway = grant.access is Access.READ_WRITE and not case.asked.read_only
    if evidence.descriptor_writable and not writes_anyway and not case.caller.is_host_root:
        also = "" if case.asked.read_only else " and ask for a read-only mount"
        return "the caller's descriptor can write to it", f"open the image read-only (O_RDONLY){also}"
    return None


def problem_with(kind: str, case: Case) -> tuple[str, str] | None:
    """Return why this kind of immutability is not proven, and the way out; None if it is proven."""
    if any(proof.kind == kind for proof in case.evidence.proofs):
        return None
    if case.source.disk is not None and kind in OF_DISKS:
        return OF_DISKS[kind]
    reason = dict(case.evidence.unproven).get(kind, UNPROVEN.get(kind, "nothing proves it"))
    return shown(reason, 255), WAYS_OUT[kind]


def check_vouching(rule: Rule, case: Case) -> str | None:
    """Raise unless somebody vouches for the image as `rule` requires; return the signer that it names."""
    if rule.require is None:
        return None
    signer = None
    if rule.require.signature == CONTAINERS_POLICY:
        signer = check_provenance(rule, case)
    elif rule.require.signature is not None:
        signer = check_signature(rule, rule.require.signature, case)
    wanted = rule.require.min_strength
    found = strength(rule, case.evidence)
    if wanted is not None and (found is None or not found.reaches(wanted)):
        reason = f"the rule wants the image to be trusted by “{wanted}” at least, and "
        reason += "nothing vouches for it" if found is None else f"it is by “{found}” only"
        if wanted is Strength.SIGNED and case.evidence.signature_error is not None:
            reason += f" ({case.evidence.signature_error.message})"
        raise DeniedByPolicy(reason, rule=rule.name, hint=FOR_STRENGTH[wanted])
    return signer


def check_signature(rule: Rule, key: str, case: Case) -> str:
    """Return who has signed the image with `key`.

    Raises DeniedByPolicy where no signature came along, else SignatureInvalid or KeyUnknown.
    """
    evidence = case.evidence
    own = [signer for signer in evidence.signers if signer.key == key]
    for signer in own:
        if is_bound(signer, evidence):
            return shown(signer.subject, 255)
    for signer in own:
        raise SignatureInvalid(
            f"it covers the {shown(signer.covers)}, and nothing proves that to be this image's",
            hint="sign the image itself, or hand it over so that what was signed is checked",
        )
    if evidence.signature_error is not None:
        raise evidence.signature_error
    if evidence.signers:
        others = ", ".join(f"“{name}”" for name in sorted({signer.key for signer in evidence.signers}))
        raise KeyUnknown(
            f"the image is signed with {others}, and rule “{rule.name}” wants “{key}”",
            hint=f"sign it with the key “{key}”",
        )
    raise DeniedByPolicy(
        f"no signature came along, and the rule wants one by “{key}”",
        rule=rule.name,
        hint=to_be_signed(key, case.source),
    )


def check_provenance(rule: Rule, case: Case) -> str | None:
    """Return who signed the image in its registry, None if the record does not say; raise DeniedByPolicy."""
    provenance = case.evidence.provenance
    if provenance is None:
        raise DeniedByPolicy(
            "the image is not recorded as pulled from a registry",
            rule=rule.name,
            hint="pull it: “mountctl image pull oci:HOST/REPOSITORY:TAG”",
        )
    if not is_checked_provenance(case.evidence):
        raise DeniedByPolicy(
            f"it was pulled under “{shown(provenance.requirement)}”, which checks no signature",
            rule=rule.name,
            hint="an administrator can require signedBy or sigstoreSigned in containers-policy.json(5)",
        )
    return shown(provenance.signer, 255) if provenance.signer is not None else None
