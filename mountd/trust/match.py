"""Whether a rule is about an image and about a caller, and if not, why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.caller.model import OVERFLOW_ID
from mountd.source.model import SourceKind
from mountd.trust import location

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mountd.caller.model import Caller
    from mountd.evidence.model import Evidence
    from mountd.source.model import Source
    from mountd.trust.policy import CallerMatch, ImageMatch

MAXIMUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why a rule does not apply, and what would make it."""

    reason: str
    hint: str | None = None


def image_mismatch(match: ImageMatch, source: Source, evidence: Evidence) -> Mismatch | None:
    """Return why `match` is not about the source, None if it is."""
    if match.any:
        return None
    is_tmpfs = source.kind is SourceKind.TMPFS
    if match.kind is not None:
        return None if is_tmpfs else Mismatch(f"it is about a {match.kind}, and the source is an image")
    if is_tmpfs:
        return Mismatch("it is about images, and the source is a tmpfs")
    return location_mismatch(match.location, source, evidence)


def location_mismatch(patterns: tuple[str, ...], source: Source, evidence: Evidence) -> Mismatch | None:
    """Return why the image is not proven to lie at one of `patterns`, None if it is."""
    hint = copy_hint(patterns)
    if evidence.root_owned_path is not None:
        if any(location.matches(pattern, evidence.root_owned_path) for pattern in patterns):
            return None
        return Mismatch(f"the image does not lie at {shorten(patterns)}", hint)
    problem = location_problem(evidence)
    seems = source.backing.path_hint if source.backing is not None else None
    if seems is not None and any(location.matches(pattern, seems) for pattern in patterns):
        return Mismatch(f"the image seems to lie at {shorten(patterns)}, but {problem}", hint)
    return Mismatch(f"the image is not proven to lie at {shorten(patterns)}: {problem}", hint)


def caller_mismatch(match: CallerMatch, caller: Caller, *, namespace_given: bool) -> Mismatch | None:
    """Return why `match` is not about the caller, None if it is."""
    known = caller.uid != OVERFLOW_ID  # else the uid is anybody's, and proves no membership either
    if match.users is not None and not (known and caller.uid in match.users):
        return Mismatch(f"the caller's uid {caller.uid} is not among its users")
    groups = (caller.groups | {caller.gid}) - {OVERFLOW_ID}
    if match.groups is not None and not (known and groups & match.groups):
        return Mismatch("the caller is in none of its groups")
    on_host = caller.on_host
    if (match.host is not None and match.host != on_host) or (
        match.nested is not None and match.nested == on_host
    ):
        return Mismatch(
            "the caller is in the host's user namespace"
            if on_host
            else "the caller is not in the host's user namespace"
        )
    own = not on_host or namespace_given
    if match.user_namespace == "own" and not own:
        return Mismatch(
            "the caller has no user namespace of its own",
            "hand a user namespace over, or call from within one",
        )
    if match.user_namespace == "none" and own:
        return Mismatch("the caller has a user namespace of its own")
    return None


def location_problem(evidence: Evidence) -> str:
    """Return what is wrong with the location of an image that has no root-owned path."""
    return evidence.location_problem or "where it lies is not known"


def copy_hint(patterns: Iterable[str]) -> str:
    """Say where an administrator would have to copy an image for `patterns` to match it."""
    directories = list(dict.fromkeys(map(location.directory, patterns)))
    return f"an administrator can copy it, owned by root, to one of: {shorten(directories)}"


def shorten(texts: Iterable[str]) -> str:
    """Return the first few of `texts`, with a sign if there are more."""
    found = list(texts)
    more = ["…"] if len(found) > MAXIMUM_SHOWN else []
    return ", ".join([*found[:MAXIMUM_SHOWN], *more])
