"""Whether the policy has a use for a copy of an image in mountd's store, and for the digest of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.trust.match import caller_mismatch
from mountd.trust.policy import Verdict

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.trust.policy import Policy

STORED = "stored"  # the kind of immutability


def may_store(policy: Policy, caller: Caller, *, namespace_given: bool) -> bool:
    """Tell whether a rule that allows lets this caller have images that are immutable by being stored."""
    return any(
        rule.verdict is Verdict.ALLOW
        and rule.require is not None
        and STORED in rule.require.integrity
        and caller_mismatch(rule.caller, caller, namespace_given=namespace_given) is None
        for rule in policy.rules
    )


def named_digests(policy: Policy, caller: Caller, *, namespace_given: bool) -> frozenset[str]:
    """Return the digests of images that rules about this caller name: without any, none need be computed."""
    return frozenset(
        digest
        for rule in policy.rules
        if rule.image.digest
        and caller_mismatch(rule.caller, caller, namespace_given=namespace_given) is None
        for digest in rule.image.digest
    )
