"""Whether the policy has a use for an image in mountd's store, and for the digest of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.trust import registry
from mountd.trust.match import caller_mismatch
from mountd.trust.policy import IMAGE, Verdict

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.trust.policy import Policy

STORED = "stored"  # the kind of immutability


def storing(policy: Policy, caller: Caller, *, namespace_given: bool) -> Verdict:
    """Return whether a rule lets this caller have images that are immutable by being stored.

    If none allows it but one asks first, so does the store.
    """
    verdict = Verdict.DENY
    for rule in policy.rules:
        if rule.verdict is Verdict.DENY or rule.require is None or STORED not in rule.require.integrity:
            continue
        if caller_mismatch(rule.caller, caller, namespace_given=namespace_given) is None:
            if rule.verdict is Verdict.ALLOW:
                return Verdict.ALLOW
            verdict = Verdict.ASK
    return verdict


def may_store(policy: Policy, caller: Caller, *, namespace_given: bool) -> bool:
    """Tell whether a rule lets this caller have such images, even if somebody has to be asked first."""
    return storing(policy, caller, namespace_given=namespace_given) is not Verdict.DENY


def may_pull(policy: Policy, caller: Caller, repository: str) -> bool:
    """Tell whether this caller may have images of a registry's repository pulled into the store.

    It may where a rule that allows names the repository and takes images that are immutable by being
    stored, unless one before it says something else of all that comes from there: then nothing that is
    pulled could be mounted.
    """
    for rule in policy.rules:
        named = any(registry.matches(pattern, repository) for pattern in rule.image.registry)
        if not named and not rule.image.any and rule.image.kind != IMAGE:
            continue
        if caller_mismatch(rule.caller, caller, namespace_given=False) is not None:
            continue
        if rule.verdict is not Verdict.ALLOW:
            return False
        if named and rule.require is not None and STORED in rule.require.integrity:
            return True
    return False


def named_digests(policy: Policy, caller: Caller, *, namespace_given: bool) -> frozenset[str]:
    """Return the digests of images that rules about this caller name: without any, none need be computed."""
    return frozenset(
        digest
        for rule in policy.rules
        if rule.image.digest
        and caller_mismatch(rule.caller, caller, namespace_given=namespace_given) is None
        for digest in rule.image.digest
    )
