"""What is allowed in a policy and still is no use: rules that can never match, or never allow anything.

That one rule hides another is said only where it is certain: the earlier one has to be about all images and
all callers that the later one is about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.trust.policy import (
    COMPOSEFS,
    CONTAINERS_POLICY,
    DIRECTORY,
    IMAGE,
    ROOT_OWNED,
    TMPFS,
    Strength,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mountd.trust.policy import CallerMatch, ImageMatch, Policy, Rule


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is no use: the rule or the key that it is about, None for the whole policy.

    `key` is where in a rule, such as "image.location".
    """

    rule: str | None
    named_key: str | None
    key: str
    reason: str


def lint(policy: Policy) -> list[Finding]:
    """Return what is no use in `policy`, in its order."""
    if not policy.rules:
        return [Finding(None, None, "", "there are no rules: everything is denied")]
    found: list[Finding] = []
    for number, rule in enumerate(policy.rules):
        hiding = next((other for other in policy.rules[:number] if hides(other, rule)), None)
        if hiding is not None:
            reason = f"it can never match: “{hiding.name}” ({hiding.origin}) comes first and matches too"
            found.append(Finding(rule.name, None, "", reason))
        found += (Finding(rule.name, None, key, reason) for key, reason in useless(rule, policy))
    used = {rule.image.signed for rule in policy.rules}
    used |= {rule.require.signature for rule in policy.rules if rule.require is not None}
    # A rule that wants anything signed is content with each of them.
    if not any(rule.require and rule.require.min_strength is Strength.SIGNED for rule in policy.rules):
        found += (
            Finding(None, name, "", "no rule uses the key") for name in policy.keys if name not in used
        )
    return found


def hides(earlier: Rule, later: Rule) -> bool:
    """Whether `earlier` matches whenever `later` does."""
    if later.image.kind == DIRECTORY != earlier.image.kind and earlier.verdict is not Verdict.DENY:
        return False  # a rule about anything says nothing of directories, unless it denies
    return image_covers(earlier.image, later.image) and caller_covers(earlier.caller, later.caller)


def image_covers(wide: ImageMatch, narrow: ImageMatch) -> bool:
    """Whether `wide` is about every source that `narrow` is about."""
    if wide.any or wide == narrow:
        return True
    if narrow.any:
        return False
    if wide.kind is not None:
        if wide.kind == IMAGE:
            return narrow.kind not in (TMPFS, DIRECTORY, COMPOSEFS)
        # One about all directories is about those at a place, too.
        return wide.kind == narrow.kind and not wide.location
    if narrow.kind is not None:
        return False
    lists = (
        (wide.location, narrow.location),
        (wide.digest, narrow.digest),
        (wide.registry, narrow.registry),
    )
    return any(many and few and set(few) <= set(many) for many, few in lists)


def caller_covers(wide: CallerMatch, narrow: CallerMatch) -> bool:
    """Whether `wide` is about every caller that `narrow` is about."""
    if wide.any:
        return True
    for many, few in (
        (wide.users, narrow.users),
        (wide.groups, narrow.groups),
        (wide.units, narrow.units),
        (wide.slices, narrow.slices),
        (wide.containers, narrow.containers),
    ):
        if many is not None and (few is None or not set(few) <= set(many)):
            return False
    if wide.user_namespace not in (None, narrow.user_namespace):
        return False
    return on_host(wide) is None or on_host(wide) == on_host(narrow)


def on_host(match: CallerMatch) -> bool | None:
    """Whether callers have to be in the host's user namespace, or must not be; None if either will do."""
    if match.host is not None:
        return match.host
    return None if match.nested is None else not match.nested


def useless(rule: Rule, policy: Policy) -> Iterator[tuple[str, str]]:
    """Say what in one rule can never be: the key and why."""
    if rule.verdict is Verdict.ASK and on_host(rule.caller) is False:
        yield "verdict", "it can never allow anything: polkit knows nobody who is in a user namespace"
    if rule.require is None:
        return
    require = rule.require
    if rule.image.location and set(require.integrity) == {"sealed"}:
        yield "require.integrity", "it can never allow anything: a memfd lies at no location"
    if (
        require.min_strength is Strength.SIGNED
        and not policy.keys
        and not rule.image.registry
        and require.signature != CONTAINERS_POLICY
    ):
        yield "require.min-strength", "it can never allow anything but pulled images: the policy has no keys"
    if require.min_strength is Strength.LOCATION and require.integrity == (ROOT_OWNED,):
        yield "require.min-strength", f"“{ROOT_OWNED}” alone says as much; remove it"
