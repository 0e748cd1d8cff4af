"""Directories: whose a rule trusts, and which ids on disk may become whose.

What is in a directory is no image that somebody has judged, and it is where others look at it as well. So:

* Only a rule about directories lets one be mounted, and it says whose.
* What is root's is never writable: whoever writes through a mount that maps ids makes files of root's, with
  any mode, where the host sees them. It can be mapped read-only, if the rule grants that: then whoever has
  the mount reads all that is in it.
* What is the caller's own, or of the foreign range, is mapped from these very ids and no others: a file of
  somebody else's in it stays that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.caller.model import FOREIGN, OVERFLOW_ID
from mountd.errors import BadFileDescriptor, DeniedByPolicy, OptionNotPermitted, UnsupportedFileSystem
from mountd.evidence.model import Ownership
from mountd.trust.match import Mismatch, caller_mismatch, image_mismatch
from mountd.trust.policy import DIRECTORY, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mountd.source.model import Directory
    from mountd.trust.case import Case
    from mountd.trust.policy import Policy, Rule

FIELD = "source.directoryFileDescriptor"
NONE, RANGES = "none", "ranges"
TRUSTED_BECAUSE = {
    Ownership.ROOT: "only root can change the directory where it lies",
    Ownership.CALLER: "the directory is the caller's own",
    Ownership.FOREIGN: "the directory is of the foreign range, below one of the caller's",
}
CANNOT_IDMAP = frozenset({"overlay"})


def not_meant(rule: Rule) -> Mismatch | None:
    """Return why a rule that matches is not about directories after all; None if it is, or denies."""
    if rule.verdict is Verdict.DENY or rule.image.kind == DIRECTORY:
        return None
    return Mismatch("it is about images, and the source is a directory")


def no_rule(policy: Policy, case: Case, hint: str) -> DeniedByPolicy:
    """Return the error for a directory that no rule is about."""
    for rule in policy.rules:
        if rule.image.kind != DIRECTORY or rule.verdict is Verdict.DENY:
            continue
        if caller_mismatch(rule.caller, case.caller, namespace_given=case.wishes.namespace_given) is None:
            mismatch = image_mismatch(rule.image, case.source, case.evidence)
            if mismatch is not None:
                return DeniedByPolicy(mismatch.reason, hint=mismatch.hint)
    return DeniedByPolicy("no rule lets this caller mount a directory", hint=hint)


def check_ownership(rule: Rule, case: Case, directory: Directory) -> Ownership:
    """Return whose the directory is, which is somebody whose `rule` trusts. Raises DeniedByPolicy.

    Raises BadFileDescriptor where it would take access to it to be mounted, which O_PATH does not prove.
    """
    found = case.evidence.ownership or Ownership.OTHER
    trusted = rule.require.ownership if rule.require is not None else ()
    if found is Ownership.OTHER:
        raise DeniedByPolicy(
            f"the directory is nobody's whom mountd could trust: {case.evidence.ownership_problem}",
            rule=rule.name,
            hint="hand over a directory of your own",
        )
    if found.value not in trusted:
        raise DeniedByPolicy(
            f"the directory is {found}-owned, and the rule trusts what is "
            + " or ".join(f"{each}-owned" for each in trusted),
            rule=rule.name,
        )
    if found is Ownership.ROOT and not directory.opened:
        raise BadFileDescriptor(FIELD, "it was opened with O_PATH, which proves no access")
    return found


def check_writable(ownership: Ownership, directory: Directory) -> None:
    """Raise OptionNotPermitted unless the directory may ever be written to, whatever the rule grants."""
    if ownership is Ownership.ROOT:
        raise OptionNotPermitted(
            "rw", "a directory of root's is never writable", hint="ask for a read-only mount"
        )
    if directory.read_only:
        raise OptionNotPermitted(
            "rw", "the directory lies on a read-only mount", hint="ask for a read-only mount"
        )


def check_ids(rule: Rule, case: Case, ownership: Ownership, directory: Directory) -> None:
    """Raise unless the ids on disk that are to be mapped are those that the directory is trusted for.

    For all but explicit ranges, the plan maps just these.
    """
    if case.wishes.idmap_kind == NONE:
        return
    if directory.file_system in CANNOT_IDMAP:
        raise UnsupportedFileSystem(
            f"the kernel maps no ids on {directory.file_system}",
            file_system_type=directory.file_system,
            hint="ask for the idmap “none”",
        )
    if ownership is Ownership.ROOT or case.wishes.idmap_kind != RANGES:
        return
    caller = case.caller
    own_gid = range(0) if caller.gid == OVERFLOW_ID else range(caller.gid, caller.gid + 1)
    allowed = (FOREIGN, FOREIGN)
    if ownership is Ownership.CALLER:
        allowed = (range(caller.uid, caller.uid + 1), own_gid)
    for what, wished, ids in zip(
        ("uids", "gids"), (case.wishes.disk_uids, case.wishes.disk_gids), allowed, strict=True
    ):
        check_within(rule, what, wished, ids)


def check_within(rule: Rule, what: str, wished: Iterable[tuple[int, int]], ids: range) -> None:
    """Raise DeniedByPolicy unless all ids on disk, first and number, are in `ids`."""
    for first, count in wished:
        if first not in ids or first + count - 1 not in ids:
            span = f"{ids.start}" if len(ids) == 1 else f"{ids.start} to {ids.stop - 1}"
            raise DeniedByPolicy(
                f"the idmap takes {count} {what} on disk from {first} on, which are not the directory's",
                rule=rule.name,
                hint=f"map {what} {span} only" if ids else f"map no {what}",
            )
