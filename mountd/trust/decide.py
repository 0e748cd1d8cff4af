"""The verdict on one request: a pure function of the policy, the facts and the wishes.

1. The options of the request have to be well-formed, whatever the policy says.
2. The rules are tried in order. The first that matches the image and the caller decides; the ones before it
   become steps that say why they did not.
3. A rule that allows still has to be satisfied: what it requires of the image must be proven, and everything
   that is asked for must be within its grant. If not, the answer is no; later rules are not tried.
4. Where no rule matches, the answer is no.

`explain` shows the outcome of this function, and `mount` acts on it, so the two cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.errors import (
    BadFileDescriptor,
    DeniedByPolicy,
    InvalidImage,
    LimitExceeded,
    MountdError,
    NotImmutable,
    OptionNotPermitted,
    UnsupportedFileSystem,
)
from mountd.source.model import SourceKind
from mountd.trust import options
from mountd.trust.match import caller_mismatch, copy_hint, image_mismatch, location_problem
from mountd.trust.policy import ROOT_OWNED, TMPFS, Access, Verdict

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.evidence.model import Evidence
    from mountd.source.model import FileSystem, Source, Tmpfs
    from mountd.trust.options import ParsedOptions
    from mountd.trust.policy import Grant, Policy, Rule
    from mountd.trust.wishes import MountWishes

ALWAYS_LOCKED = frozenset({"nosuid", "nodev"})
WRITABLE = frozenset({"btrfs", "ext4", "xfs"})
BYTES_PER_INODE = 4096
ADD_A_RULE = "an administrator can add a rule in /etc/mountd/policy.d"


@dataclass(frozen=True, slots=True)
class Step:
    """One rule that was looked at: whether it applies, why or why not, and what would change that."""

    rule: str
    origin: str
    applies: bool
    reason: str
    hint: str | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided and why; `error` is what to raise unless the verdict is allow, and None if it is.

    `trusted_by` names the proof that the verdict rests on, None where there is none to need. `attributes`
    are the flags to lock on the mount, `options` what to pass to the file system; they and `read_only` mean
    something only if the verdict is allow.
    """

    verdict: Verdict
    rule: str | None
    trusted_by: str | None
    reason: str
    hint: str | None
    steps: tuple[Step, ...]
    error: MountdError | None
    read_only: bool
    attributes: frozenset[str]
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """All that is judged, `asked` being the options of `wishes`, sorted."""

    caller: Caller
    source: Source
    evidence: Evidence
    wishes: MountWishes
    asked: ParsedOptions


def decide(
    policy: Policy, caller: Caller, source: Source, evidence: Evidence, wishes: MountWishes
) -> Decision:
    """Judge one request. A refusal is a Decision too, with its error; nothing is raised."""
    try:
        asked = options.parse(wishes.options, read_only=wishes.read_only)
    except MountdError as error:
        return refusal(error, None, ())
    case = Case(caller, source, evidence, wishes, asked)
    steps: list[Step] = []
    for rule in policy.rules:
        mismatch = image_mismatch(rule.image, source, evidence) or caller_mismatch(
            rule.caller, caller, namespace_given=wishes.namespace_given
        )
        if mismatch is None:
            return apply(rule, case, tuple(steps))
        steps.append(Step(rule.name, rule.origin, False, mismatch.reason, mismatch.hint))
    return refusal(no_rule(policy, case), None, tuple(steps))


def apply(rule: Rule, case: Case, steps: tuple[Step, ...]) -> Decision:
    """Return what `rule`, which matches, makes of the case."""
    try:
        grant = allowing_grant(rule)
        if case.source.tmpfs is not None and case.source.kind is SourceKind.TMPFS:
            reason, trusted_by = judge_tmpfs(rule, grant, case, case.source.tmpfs), None
        else:
            reason, trusted_by = judge_image(rule, grant, case), ROOT_OWNED
        attributes = locked_attributes(grant, case)
    except MountdError as error:
        return refusal(error, rule, steps)
    return Decision(
        verdict=Verdict.ALLOW,
        rule=rule.name,
        trusted_by=trusted_by,
        reason=reason,
        hint=None,
        steps=(*steps, Step(rule.name, rule.origin, True, reason, None)),
        error=None,
        read_only=case.asked.read_only,
        attributes=attributes,
        options=case.asked.file_system,
    )


def refusal(error: MountdError, rule: Rule | None, steps: tuple[Step, ...]) -> Decision:
    """Return the denial that `error` says, by `rule` or by none."""
    # The text of these two starts with what a decision says in fields of its own.
    plain = isinstance(error, DeniedByPolicy | NotImmutable)
    reason = str(error.parameters["reason"]) if plain else error.message
    if rule is not None:
        steps = (*steps, Step(rule.name, rule.origin, True, reason, error.hint))
    return Decision(
        verdict=Verdict.DENY,
        rule=rule.name if rule is not None else None,
        trusted_by=None,
        reason=reason,
        hint=error.hint,
        steps=steps,
        error=error,
        read_only=True,
        attributes=frozenset(),
        options=(),
    )


def allowing_grant(rule: Rule) -> Grant:
    """Return the grant of a rule that allows; raise DeniedByPolicy for one that does not."""
    if rule.verdict is Verdict.ASK:
        raise DeniedByPolicy("asking an administrator is not available", rule=rule.name, hint=ADD_A_RULE)
    if rule.verdict is not Verdict.ALLOW or rule.grant is None:
        raise DeniedByPolicy("the rule denies it", rule=rule.name)
    return rule.grant


def judge_image(rule: Rule, grant: Grant, case: Case) -> str:
    """Raise unless an image satisfies what `rule` requires and grants; return why it does."""
    file_system = case.source.file_system
    if file_system is None:
        raise UnsupportedFileSystem("nothing was recognised in the image")
    check_integrity(rule, grant, case)
    if file_system.type not in grant.file_systems:
        raise DeniedByPolicy(
            f"the image is {file_system.type}, and the rule grants {', '.join(grant.file_systems)}",
            rule=rule.name,
            hint="make the image with one of these file systems",
        )
    wished = case.wishes.file_system_type
    if wished not in (None, file_system.type):
        raise InvalidImage(
            f"{options.shown(wished or '')} was asked for, but the image holds {file_system.type}"
        )
    if not case.asked.read_only:
        check_read_write(rule, grant, case, file_system)
    check_common(rule, grant, case, file_system.type)
    return "only root can change the image where it lies"


def check_integrity(rule: Rule, grant: Grant, case: Case) -> None:
    """Raise NotImmutable unless the image is proven to stay what it is.

    A location that only root can write to proves nothing about a caller who has a writable descriptor all
    the same. What such a caller may do with it is only for a rule to say that lets it write anyway.
    """
    evidence = case.evidence
    if rule.require is None or evidence.root_owned_path is None:
        raise NotImmutable(
            location_problem(evidence),
            rule=rule.name,
            hint="an administrator can copy it, owned by root, to a directory that only root can write to",
        )
    writes_anyway = grant.access is Access.READ_WRITE and not case.asked.read_only
    if evidence.descriptor_writable and not writes_anyway and not case.caller.is_host_root:
        also = "" if case.asked.read_only else " and ask for a read-only mount"
        raise NotImmutable(
            "the caller's descriptor can write to it",
            rule=rule.name,
            hint=f"open the image read-only (O_RDONLY){also}",
        )


def check_read_write(rule: Rule, grant: Grant, case: Case, file_system: FileSystem) -> None:
    """Raise unless the image may be and can be mounted writable."""
    check_access(rule, grant)
    if file_system.type not in WRITABLE:
        raise OptionNotPermitted(
            "rw", f"{file_system.type} cannot be written to", hint="ask for a read-only mount"
        )
    if not case.evidence.descriptor_writable:
        raise BadFileDescriptor("source.imageFileDescriptor", "it is open read-only, but readOnly is false")


def judge_tmpfs(rule: Rule, grant: Grant, case: Case, tmpfs: Tmpfs) -> str:
    """Raise unless a tmpfs is within what `rule` grants; return that it is."""
    if grant.max_size is None:
        raise DeniedByPolicy(
            "the rule is about images",
            rule=rule.name,
            hint="an administrator can put a rule with kind = “tmpfs” before it",
        )
    wished = case.wishes.file_system_type
    if wished not in (None, TMPFS):
        raise UnsupportedFileSystem(
            f"{options.shown(wished or '')} was asked for, but the source is a tmpfs", file_system_type=TMPFS
        )
    # To the kernel, 0 is no limit at all.
    if not 0 < tmpfs.size <= grant.max_size:
        raise LimitExceeded(
            "bytes in a tmpfs", grant.max_size, hint=f"ask for a size from 1 to {grant.max_size}"
        )
    check_inodes(grant, tmpfs)
    if not case.asked.read_only:
        check_access(rule, grant)
    check_common(rule, grant, case, TMPFS)
    return f"{tmpfs.size} bytes are within the {grant.max_size} that the rule grants"


def check_inodes(grant: Grant, tmpfs: Tmpfs) -> None:
    """Raise LimitExceeded if a tmpfs could hold more inodes than granted.

    A rule that says nothing about them leaves the kernel's default, or as many as the bytes it grants are
    good for: nobody gets more by asking.
    """
    maximum = grant.max_inodes
    if maximum is None:
        if tmpfs.inodes is None:
            return
        maximum = max(1, (grant.max_size or 0) // BYTES_PER_INODE)
    if tmpfs.inodes is None or not 0 < tmpfs.inodes <= maximum:
        raise LimitExceeded("inodes in a tmpfs", maximum, hint=f"ask for inodes from 1 to {maximum}")


def check_access(rule: Rule, grant: Grant) -> None:
    """Raise OptionNotPermitted unless the mount may be writable."""
    if grant.access is not Access.READ_WRITE:
        raise OptionNotPermitted(
            "rw", f"rule “{rule.name}” grants read-only access", hint="ask for a read-only mount"
        )


def check_common(rule: Rule, grant: Grant, case: Case, type: str) -> None:
    """Raise unless idmap and options are granted, for every kind of source."""
    kind = case.wishes.idmap_kind
    if kind not in grant.idmap:
        raise DeniedByPolicy(
            f"the rule does not grant the idmap “{options.shown(kind)}”",
            rule=rule.name,
            hint=f"ask for one of: {', '.join(grant.idmap)}",
        )
    for option in case.asked.file_system:
        options.permit(option, type=type, rule=rule.name, grants=grant.options, caller=case.caller)


def locked_attributes(grant: Grant, case: Case) -> frozenset[str]:
    """Return the flags that the mount gets and that whoever receives it cannot clear."""
    always = frozenset() if case.caller.is_host_root else ALWAYS_LOCKED
    if "strictatime" in case.asked.attributes and "noatime" in grant.flags:
        raise OptionNotPermitted("strictatime", "the rule sets noatime", hint="leave the option out")
    return always | frozenset(grant.flags) | case.asked.attributes


def no_rule(policy: Policy, case: Case) -> DeniedByPolicy:
    """Return the error for a request that no rule matches, with the shortest way to one that does."""
    if not policy.rules:
        return DeniedByPolicy("the policy has no rules", hint=ADD_A_RULE)
    if case.source.kind is SourceKind.TMPFS:
        return DeniedByPolicy("no rule lets this caller have a tmpfs", hint=ADD_A_RULE)
    patterns = [
        pattern
        for rule in policy.rules
        if rule.verdict is Verdict.ALLOW
        and caller_mismatch(rule.caller, case.caller, namespace_given=case.wishes.namespace_given) is None
        for pattern in rule.image.location
    ]
    if not patterns:
        return DeniedByPolicy("no rule lets this caller mount an image", hint=ADD_A_RULE)
    problem = ""
    if case.evidence.root_owned_path is None:
        problem = f" ({location_problem(case.evidence)})"
    return DeniedByPolicy(
        f"it does not lie in a directory that a rule trusts{problem}", hint=copy_hint(patterns)
    )
