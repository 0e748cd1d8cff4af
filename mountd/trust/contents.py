"""The contents of a composefs: what has to be proven of them beside what is of its metadata.

The metadata names the contents, and may name their digests; whether they are those is for fs-verity to
check, or for whoever can change what is in the object directories.

* Metadata that somebody vouches for has contents that nobody can change either: fs-verity checks them, or
  the object directories are root's, with what is in them.
* Of a description nobody has said anything. Its contents are the caller's own business, as what is in a
  directory of the caller's is: they are in directories of the caller's or of root's, or fs-verity checks
  them. Whose they are there is not looked at; who names a file that another can change gets what that one
  writes. What belongs to others is read only where everybody may read it (`plan.composefs`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.errors import DeniedByPolicy, NotImmutable, NotSupported
from mountd.evidence.model import Ownership
from mountd.source.model import SourceKind

if TYPE_CHECKING:
    from mountd.source.model import Composefs
    from mountd.trust.case import Case
    from mountd.trust.policy import Rule

VERITY = "composefs-verity"
CHECKED = "fs-verity checks the contents"
ROOTS = "only root can change the contents"
UNCHECKED = "nothing checks the contents, which the caller names in directories of the caller's or root's"
HINT = (
    "have an administrator copy the objects, owned by root, to a directory that only root can write to; or "
    "keep them on a file system with fs-verity, and enable it on each"
)


def check(rule: Rule, case: Case, composefs: Composefs, kind: str) -> tuple[bool, str]:
    """Return whether fs-verity has to check the contents, and what makes them trustworthy.

    `kind` is what makes the metadata immutable. Raises NotImmutable, DeniedByPolicy, and NotSupported where
    a check was asked for that is not possible.
    """
    found = case.evidence.objects
    described = case.source.kind is SourceKind.COMPOSEFS
    cannot = next(
        (f"objects {number}: {each.unverifiable}" for number, each in enumerate(found) if each.unverifiable),
        None,
    )
    if cannot is None and described and not any(each.kind == VERITY for each in case.evidence.proofs):
        cannot = "the description has files without a digest"
    if composefs.verity and cannot is not None:
        raise NotSupported(
            f"checking contents by fs-verity here ({cannot})",
            hint="ask without it, or keep the objects on a file system with fs-verity",
        )
    # Who names a digest wants the whole tree to be that, as far as it can be had.
    if kind == VERITY or composefs.verity or (composefs.digest is not None and cannot is None):
        return True, CHECKED
    if described:
        trusted = (Ownership.CALLER, Ownership.ROOT)
        others = [number for number, each in enumerate(found) if each.ownership not in trusted]
        if others and cannot is None:
            return True, CHECKED
        for number in others:
            raise DeniedByPolicy(
                f"others can change objects {number}, and fs-verity cannot check them: {cannot}",
                rule=rule.name,
                hint="hand over a directory of your own, or one on a file system with fs-verity",
            )
        return False, UNCHECKED
    problems = [f"objects {number}: {each.problem}" for number, each in enumerate(found) if each.problem]
    if not problems:
        return False, ROOTS
    if cannot is None:
        return True, CHECKED
    raise NotImmutable(
        f"the contents of its files can change: {problems[0]}; and fs-verity cannot check them: {cannot}",
        rule=rule.name,
        hint=HINT,
    )
