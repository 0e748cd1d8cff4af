"""Whether the policy still stands by a mount that was made before, for who wants more of it now.

The facts about its image are gone, and it was judged by them. What can be asked again is whether the rule
that allowed it is for this caller, who may be somewhere else by now, and what the rule says today.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.errors import DeniedByPolicy
from mountd.trust.decide import allowing_grant
from mountd.trust.match import caller_mismatch
from mountd.trust.policy import Verdict

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.trust.policy import Grant, Policy

SOURCE_INSTEAD = "hand over the source instead, which is judged anew"


def grant_of(policy: Policy, name: str | None, caller: Caller) -> Grant | None:
    """Return what the rule of this name grants the caller, None if there is none by that name any more.

    A rule that asks has been consented to. Raises DeniedByPolicy where the rule is not for this caller, or
    denies by now, and where one before it denies the caller everything.
    """
    for rule in policy.rules:
        # No user namespace comes with what was made before; one of the caller's own still counts.
        mismatch = caller_mismatch(rule.caller, caller, namespace_given=False)
        if rule.name == name:
            if mismatch is not None:
                raise DeniedByPolicy(mismatch.reason, rule=name, hint=SOURCE_INSTEAD)
            return allowing_grant(rule)
        if rule.verdict is Verdict.DENY and rule.image.any and mismatch is None:
            allowing_grant(rule)
    return None
