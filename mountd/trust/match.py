"""Whether a rule is about an image and about a caller, and if not, why not."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from mountd.caller.model import OVERFLOW_ID
from mountd.source.model import SourceKind
from mountd.trust import location, registry
from mountd.trust.options import shown
from mountd.trust.vouching import digests_of_bytes, is_bound

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mountd.caller.model import Caller
    from mountd.evidence.model import Evidence
    from mountd.source.model import Source
    from mountd.trust.policy import CallerMatch, ImageMatch

MAXIMUM_SHOWN = 5
NAMES = {
    SourceKind.IMAGE: "an image",
    SourceKind.TMPFS: "a tmpfs",
    SourceKind.DIRECTORY: "a directory",
    SourceKind.COMPOSEFS: "a description of a composefs",
}


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why a rule does not apply, and what would make it."""

    reason: str
    hint: str | None = None


def image_mismatch(match: ImageMatch, source: Source, evidence: Evidence) -> Mismatch | None:
    """Return why `match` is not about the source, None if it is."""
    if match.any:
        return None
    if match.kind is not None:
        found, wanted = NAMES[source.kind], NAMES[SourceKind(match.kind)]
        if wanted != found:
            return Mismatch(f"it is about {wanted}, and the source is {found}")
        return location_mismatch(match.location, source, evidence) if match.location else None
    # Where a directory lies is a place as that of an image is: what a rule denies there, it denies.
    placed = source.kind is SourceKind.DIRECTORY and match.location and evidence.root_owned_path is not None
    if source.kind is not SourceKind.IMAGE and not placed:
        return Mismatch(f"it is about images, and the source is {NAMES[source.kind]}")
    if match.signed is not None:
        return signed_mismatch(match.signed, source, evidence)
    if match.digest:
        return digest_mismatch(match.digest, evidence)
    if match.registry:
        return registry_mismatch(match.registry, evidence)
    return location_mismatch(match.location, source, evidence)


def to_be_signed(key: str, source: Source) -> str:
    """Return what would have an image be signed with `key`."""
    hint = f"hand over a detached signature by the key “{key}” with the image (source.signature)"
    if source.disk is None:
        return hint
    return f"build it with hash data and the signature of its root hash by the key “{key}” in it, or {hint}"


def signed_mismatch(key: str, source: Source, evidence: Evidence) -> Mismatch | None:
    """Return why the image is not proven to be signed with the policy's key `key`, None if it is."""
    hint = to_be_signed(key, source)
    own = [signer for signer in evidence.signers if signer.key == key]
    if any(is_bound(signer, evidence) for signer in own):
        return None
    for signer in own:
        return Mismatch(
            f"the signature by “{key}” covers the {shown(signer.covers)}, and nothing proves that to be "
            "this image's",
            "sign the image itself, or hand it over so that what was signed is checked",
        )
    if evidence.signature_error is not None:
        return Mismatch(f"“{key}” has not signed it: {evidence.signature_error.message}", hint)
    if evidence.signers:
        return Mismatch(f"it is signed with “{evidence.signers[0].key}”, not with “{key}”", hint)
    return Mismatch(f"no signature by “{key}” came along", hint)


def digest_mismatch(wanted: tuple[str, ...], evidence: Evidence) -> Mismatch | None:
    """Return why the image is not one of those that have the digests `wanted`, None if it is."""
    found = digests_of_bytes(evidence)
    if found & set(wanted):
        return None
    if not found:
        return Mismatch("it names images by their digest, and that of this one is not known")
    shown_digest = shorten(sorted(found))
    return Mismatch(
        f"the image has the digest {shown_digest}, which the rule does not name",
        f"an administrator can add {shown_digest} to the digests of the rule",
    )


def registry_mismatch(patterns: tuple[str, ...], evidence: Evidence) -> Mismatch | None:
    """Return why the image is not recorded as pulled from one of `patterns`, None if it is."""
    hint = f"pull it from {shorten(patterns)} with “mountctl image pull oci:HOST/REPOSITORY:TAG”"
    if evidence.provenance is None:
        return Mismatch("it is not recorded as pulled from a registry", hint)
    repository = evidence.provenance.repository
    if any(registry.matches(pattern, repository) for pattern in patterns):
        return None
    return Mismatch(f"it was pulled from {shown(repository, 255)}, not from {shorten(patterns)}", hint)


def location_mismatch(patterns: tuple[str, ...], source: Source, evidence: Evidence) -> Mismatch | None:
    """Return why the image is not proven to lie at one of `patterns`, None if it is."""
    hint = copy_hint(patterns)
    what = "the directory" if source.kind is SourceKind.DIRECTORY else "the image"
    if evidence.root_owned_path is not None:
        if any(location.matches(pattern, evidence.root_owned_path) for pattern in patterns):
            return None
        return Mismatch(f"{what} does not lie at {shorten(patterns)}", hint)
    problem = location_problem(evidence)
    found = source.backing or source.directory
    seems = found.path_hint if found is not None else None
    if seems is not None and any(location.matches(pattern, seems) for pattern in patterns):
        return Mismatch(f"{what} seems to lie at {shorten(patterns)}, but {problem}", hint)
    return Mismatch(f"{what} is not proven to lie at {shorten(patterns)}: {problem}", hint)


def caller_mismatch(match: CallerMatch, caller: Caller, *, namespace_given: bool) -> Mismatch | None:
    """Return why `match` is not about the caller, None if it is."""
    known = caller.uid != OVERFLOW_ID  # else the uid is anybody's, and proves no membership either
    if match.users is not None and not (known and caller.uid in match.users):
        return Mismatch(
            f"the caller's uid {caller.uid} is not among its users",
            f"an administrator can add {caller.uid} to the users of the rule" if known else None,
        )
    groups = (caller.groups | {caller.gid}) - {OVERFLOW_ID}
    if match.groups is not None and not (known and groups & match.groups):
        return Mismatch(
            "the caller is in none of its groups",
            "an administrator can add the user to one of them; log in again after that",
        )
    return place_mismatch(match, caller) or namespace_mismatch(match, caller, namespace_given)


def place_mismatch(match: CallerMatch, caller: Caller) -> Mismatch | None:
    """Return why `match` is not about the unit, slice or container that the caller is in, None if it is."""
    for kind, wanted, found in (
        ("unit", match.units, caller.unit),
        ("container", match.containers, caller.container),
    ):
        if wanted is None:
            continue
        if found is None:
            return Mismatch(f"the caller is in no {kind} that mountd knows of")
        if not any(fnmatchcase(found, pattern) for pattern in wanted):
            return Mismatch(
                f"the caller's {kind} {shown(found, 255)} is not among its {kind}s",
                f"an administrator can add {shown(found, 255)} to the {kind}s of the rule",
            )
    if match.slices is not None:
        if caller.slice is None:
            return Mismatch("the caller is in no slice that mountd knows of")
        if not any(slice_is_within(caller.slice, outer) for outer in match.slices):
            return Mismatch(
                f"the caller's slice {caller.slice} is not among its slices, nor below one",
                f"an administrator can add {caller.slice} to the slices of the rule",
            )
    return None


def slice_is_within(slice: str, outer: str) -> bool:
    """Whether `slice` is `outer` or lies somewhere below it, as their names say (systemd.slice(5))."""
    return slice == outer or outer == "-.slice" or slice.startswith(outer.removesuffix(".slice") + "-")


def namespace_mismatch(match: CallerMatch, caller: Caller, namespace_given: bool) -> Mismatch | None:
    """Return why `match` is not about the user namespace that the caller is in, None if it is."""
    on_host = caller.on_host
    if (match.host is not None and match.host != on_host) or (
        match.nested is not None and match.nested == on_host
    ):
        return Mismatch(
            "the caller is in the host's user namespace"
            if on_host
            else "the caller is not in the host's user namespace",
            "call from within a user namespace" if on_host else "call from the host's user namespace",
        )
    own = not on_host or namespace_given
    if match.user_namespace == "own" and not own:
        return Mismatch(
            "the caller has no user namespace of its own",
            "hand a user namespace over, or call from within one",
        )
    if match.user_namespace == "none" and own:
        return Mismatch(
            "the caller has a user namespace of its own",
            "call from the host's user namespace, and hand none over",
        )
    return None


def location_problem(evidence: Evidence) -> str:
    """Return what is wrong with the location of an image that has no root-owned path."""
    return evidence.location_problem or "where it lies is not known"


def copy_hint(patterns: Iterable[str]) -> str:
    """Say where an administrator would have to copy an image for `patterns` to match it."""
    directories = list(dict.fromkeys(map(location.directory, patterns)))
    return f"an administrator can copy it, owned by root, to one of: {shorten(directories)}"


def shorten(texts: Iterable[str], separator: str = ", ") -> str:
    """Return the first few of `texts`, with a sign if there are more."""
    found = list(texts)
    more = ["…"] if len(found) > MAXIMUM_SHOWN else []
    return separator.join([*found[:MAXIMUM_SHOWN], *more])
