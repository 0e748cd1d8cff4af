"""The verdict on one request: a pure function of the policy, the facts and the wishes.

1. The options of the request have to be well-formed, whatever the policy says.
2. The rules are tried in order. The first that matches the image and the caller decides; the ones before it
   become steps that say why they did not, the ones after it steps that say that they were not reached.
3. A rule that allows still has to be satisfied: what it requires of the image must be proven, and everything
   that is asked for must be within its grant. If not, the answer is no; later rules are not tried.
4. What the request itself demands of its image comes last, and can only refuse.
5. A rule that asks has to be satisfied in the same way; then the verdict is that somebody has to be asked,
   and whoever does not ask has a refusal in hands.
6. Where no rule matches, the answer is no.

`explain` shows the outcome of this function, and `mount` acts on it, so the two cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mountd.errors import (
    BadFileDescriptor,
    DeniedByPolicy,
    InteractiveAuthenticationRequired,
    InvalidImage,
    LimitExceeded,
    MountdError,
    NotImmutable,
    OptionNotPermitted,
    UnsupportedFileSystem,
)
from mountd.source.model import SourceKind
from mountd.trust import contents, encrypted, image_policy, options, owned, partitions
from mountd.trust.case import Case
from mountd.trust.match import caller_mismatch, copy_hint, image_mismatch, location_problem, shorten
from mountd.trust.partitions import WRITABLE
from mountd.trust.policy import DIRECTORY, ROOT_OWNED, TMPFS, Access, Verdict
from mountd.trust.requirements import TRUSTED_BECAUSE, check_integrity, check_vouching
from mountd.trust.vouching import bound_signers

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.evidence.model import Evidence
    from mountd.source.model import Directory, FileSystem, Source, Tmpfs
    from mountd.trust.partitions import Use
    from mountd.trust.policy import Grant, Policy, Rule
    from mountd.trust.wishes import MountWishes

ALWAYS_LOCKED = frozenset({"nosuid", "nodev"})
BYTES_PER_INODE = 4096
ADD_A_RULE = "an administrator can add a rule in /etc/mountd/policy.d"
ASKS = "an administrator has to consent (polkit): "
ASK_HINT = "mount it with --interactive, where an administrator can be asked"


@dataclass(frozen=True, slots=True)
class Step:
    """One rule: whether it applies, why or why not, and the smallest change that would make it allow."""

    rule: str
    origin: str
    applies: bool
    reason: str
    hint: str | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided and why; `error` is what to raise unless the verdict is allow, and None if it is.

    With the verdict ask, everything else is as it will be if somebody consents (service/consent).

    `trusted_by` names the proof that the verdict rests on, None where there is none to need; `signer` is who
    signed the image, and `digest` what is known of its contents, where that is known. `attributes` are the
    flags to lock on the mount, `options` what to pass to the file system, `attach` and `max_mounts` are
    those of the grant, `uses` are the partitions to mount of a disk image, `verify` is whether fs-verity has
    to check the contents of a composefs; they and `read_only` mean nothing if the verdict is deny.
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
    signer: str | None = None
    digest: str | None = None
    attach: tuple[str, ...] = ()
    max_mounts: int | None = None
    uses: tuple[Use, ...] = ()
    verify: bool = False


@dataclass(frozen=True, slots=True)
class Trust:
    """Why a rule that allows does: the reason, the kind of immutability, who signed, and what is used.

    `verify` is as in a Decision.
    """

    reason: str
    by: str | None = None
    signer: str | None = None
    uses: tuple[Use, ...] = ()
    verify: bool = False


def decide(
    policy: Policy, caller: Caller, source: Source, evidence: Evidence, wishes: MountWishes
) -> Decision:
    """Judge one request. A refusal is a Decision too, with its error; nothing is raised."""
    # What has no partitions is the root partition.
    whole = () if source.disk is not None else wishes.options_of(image_policy.ROOT)
    try:
        asked = options.parse((*wishes.options, *whole), read_only=wishes.read_only)
    except MountdError as error:
        return refusal(error, None, not_reached(policy.rules, "the request itself is refused"))
    case = Case(caller, source, evidence, wishes, asked)
    steps: list[Step] = []
    for number, rule in enumerate(policy.rules, start=1):
        mismatch = image_mismatch(rule.image, source, evidence) or caller_mismatch(
            rule.caller, caller, namespace_given=wishes.namespace_given
        )
        if mismatch is None and source.directory is not None:
            mismatch = owned.not_meant(rule)
        if mismatch is None:
            rest = not_reached(policy.rules[number:], f"rule “{rule.name}” decides")
            return apply(rule, case, tuple(steps), rest)
        steps.append(Step(rule.name, rule.origin, False, mismatch.reason, mismatch.hint))
    return refusal(no_rule(policy, case), None, tuple(steps))


def not_reached(rules: tuple[Rule, ...], why: str) -> tuple[Step, ...]:
    """Return the steps of rules that were not looked at."""
    return tuple(Step(rule.name, rule.origin, False, f"not reached: {why}", None) for rule in rules)


def apply(rule: Rule, case: Case, before: tuple[Step, ...], rest: tuple[Step, ...]) -> Decision:
    """Return what `rule`, which matches, makes of the case; the steps are those of the other rules."""
    try:
        grant = allowing_grant(rule)
        if case.source.tmpfs is not None and case.source.kind is SourceKind.TMPFS:
            trust = judge_tmpfs(rule, grant, case, case.source.tmpfs)
        elif case.source.directory is not None:
            trust = judge_directory(rule, grant, case, case.source.directory)
        else:
            trust = judge_image(rule, grant, case)
        attributes = locked_attributes(grant, case)
    except MountdError as error:
        applied = Step(rule.name, rule.origin, True, reason_of(error), error.hint)
        return refusal(error, rule, (*before, applied, *rest))
    # The host's root would be asked whether it consents to what it does itself.
    asks = rule.verdict is Verdict.ASK and not case.caller.is_host_root
    reason, hint = (ASKS + trust.reason, ASK_HINT) if asks else (trust.reason, None)
    return Decision(
        verdict=Verdict.ASK if asks else Verdict.ALLOW,
        rule=rule.name,
        trusted_by=trust.by,
        reason=reason,
        hint=hint,
        steps=(*before, Step(rule.name, rule.origin, True, reason, hint), *rest),
        error=InteractiveAuthenticationRequired(hint=ASK_HINT) if asks else None,
        read_only=case.asked.read_only or bool(trust.uses) and all(use.read_only for use in trust.uses),
        attributes=attributes,
        options=case.asked.file_system,
        signer=trust.signer,
        digest=digest_of(case.evidence, trust.by),
        attach=grant.attach,
        max_mounts=grant.max_mounts,
        uses=trust.uses,
        verify=trust.verify,
    )


def refusal(error: MountdError, rule: Rule | None, steps: tuple[Step, ...]) -> Decision:
    """Return the denial that `error` says, by `rule` or by none."""
    return Decision(
        verdict=Verdict.DENY,
        rule=rule.name if rule is not None else None,
        trusted_by=None,
        reason=reason_of(error),
        hint=error.hint,
        steps=steps,
        error=error,
        read_only=True,
        attributes=frozenset(),
        options=(),
    )


def reason_of(error: MountdError) -> str:
    """Return the reason of a refusal, without what a decision says in fields of its own."""
    plain = isinstance(error, DeniedByPolicy | NotImmutable)
    return str(error.parameters["reason"]) if plain else error.message


def digest_of(evidence: Evidence, trusted_by: str | None) -> str | None:
    """Return the digest of the image, or else the one that the proof `trusted_by` has."""
    if evidence.digest is not None:
        return evidence.digest
    return next((proof.digest for proof in evidence.proofs if proof.kind == trusted_by), None)


def allowing_grant(rule: Rule) -> Grant:
    """Return the grant of a rule that allows or asks; raise DeniedByPolicy for one that denies."""
    if rule.verdict not in (Verdict.ALLOW, Verdict.ASK) or rule.grant is None:
        raise DeniedByPolicy("the rule denies it", rule=rule.name)
    return rule.grant


def judge_image(rule: Rule, grant: Grant, case: Case) -> Trust:
    """Raise unless an image satisfies what `rule` requires and grants; return why it does."""
    disk, file_system = case.source.disk, case.source.file_system
    if file_system is None and disk is None and case.source.luks is None:
        raise UnsupportedFileSystem("nothing was recognised in the image")
    kind = check_integrity(rule, grant, case)
    signer = check_vouching(rule, case)
    uses: tuple[Use, ...] = ()
    if disk is not None:
        uses = partitions.uses(
            disk,
            case.wishes.image_policy,
            case.evidence.signed_partitions,
            read_only=case.asked.read_only,
        )
        uses = tuple(with_options(use, rule, grant, case) for use in uses)
    locked = encrypted.check(rule, grant, case, uses)
    types = [use.type for use in uses if not use.is_locked]
    types = [file_system.type] if file_system is not None else types
    check_types(rule, grant, case, types, max(len(uses), 1))
    if not case.asked.read_only:
        check_read_write(rule, grant, case, types, kind, locked=locked)
        if uses and all(use.read_only for use in uses):
            raise OptionNotPermitted(
                "rw", "no partition of the image can be written to", hint="ask for a read-only mount"
            )
    check_common(rule, grant, case, types[0] if types and not locked else None)
    if disk is None:
        check_image_policy(rule, case, file_system)
    signer = signer if signer is not None else known_signer(case.evidence)
    reason, verify = TRUSTED_BECAUSE[kind], False
    if locked:
        reason = f"{reason}; {encrypted.JUDGED_LATER}"
    if case.source.composefs is not None:
        verify, more = contents.check(rule, case, case.source.composefs, kind)
        reason = f"{reason}; {more}"
    return Trust(reason, kind, signer, uses, verify)


def with_options(use: Use, rule: Rule, grant: Grant, case: Case) -> Use:
    """Return a use with the options that are for its partition only. Raises OptionNotPermitted."""
    asked = options.parse(case.wishes.options_of(use.partition.designator), read_only=case.asked.read_only)
    # Of which type they are is known once it was opened.
    for option in () if use.is_locked else asked.file_system:
        options.permit(option, type=use.type, rule=rule.name, grants=grant.options, caller=case.caller)
    locked_attributes(grant, case, asked.attributes)
    read_only = use.read_only or asked.read_only
    return replace(use, read_only=read_only, attributes=asked.attributes, options=asked.file_system)


def check_types(rule: Rule, grant: Grant, case: Case, types: list[str], parts: int) -> None:
    """Raise unless all types of file systems are granted, and the first is the one that was asked for.

    There are `parts` in all, of which some may not be known yet.
    """
    for type in types:
        if type not in grant.file_systems:
            raise DeniedByPolicy(
                f"the image is {type}, and the rule grants {', '.join(grant.file_systems)}",
                rule=rule.name,
                hint="make the image with one of these file systems",
            )
    wished = case.wishes.file_system_type
    if types and wished not in (None, types[0]):
        raise InvalidImage(f"{options.shown(wished or '')} was asked for, but the image holds {types[0]}")
    if parts > 1 and case.asked.file_system:
        raise OptionNotPermitted(
            case.asked.file_system[0],
            f"the image has {parts} file systems, and the option would be for one",
            hint="leave the option out, or have one partition used, with an imagePolicy",
        )


def known_signer(evidence: Evidence) -> str | None:
    """Return who signed an image for which the rule does not ask."""
    for signer in bound_signers(evidence):
        return options.shown(signer.subject, 255)
    return None


def check_image_policy(rule: Rule, case: Case, file_system: FileSystem | None) -> None:
    """Raise DeniedByPolicy if the request's own policy refuses the image, an encrypted one without type."""
    wished = case.wishes.image_policy
    if wished is None:
        return
    why = image_policy.refusal(
        wished,
        file_system_type=None if file_system is None else file_system.type,
        encrypted=case.source.luks is not None,
        verity=any(proof.kind == "dm-verity" for proof in case.evidence.proofs),
        signed=any(signer.covers == "root-hash" for signer in bound_signers(case.evidence)),
    )
    if why is not None:
        raise DeniedByPolicy(
            f"the request's own imagePolicy refuses it: {why}",
            rule=rule.name,
            hint="ask with another imagePolicy, or without one",
        )


def check_read_write(
    rule: Rule, grant: Grant, case: Case, types: list[str], kind: str, *, locked: bool
) -> None:
    """Raise unless the image may be and can be mounted writable; `kind` is what makes it immutable.

    With `locked`, what is in it is not known yet.
    """
    check_access(rule, grant)
    if kind != ROOT_OWNED:
        raise OptionNotPermitted(
            "rw", f"the image is trusted by “{kind}” and cannot change", hint="ask for a read-only mount"
        )
    if not WRITABLE & set(types) and not locked:
        raise OptionNotPermitted(
            "rw", f"{' and '.join(types)} cannot be written to", hint="ask for a read-only mount"
        )
    if not case.evidence.descriptor_writable:
        raise BadFileDescriptor("source.imageFileDescriptor", "it is open read-only, but readOnly is false")


def judge_directory(rule: Rule, grant: Grant, case: Case, directory: Directory) -> Trust:
    """Raise unless a directory satisfies what `rule` requires and grants; return why it does."""
    ownership = owned.check_ownership(rule, case, directory)
    wished = case.wishes.file_system_type
    if wished not in (None, directory.file_system):
        raise UnsupportedFileSystem(
            f"{options.shown(wished or '')} was asked for, but the directory is on {directory.file_system}",
            file_system_type=directory.file_system,
        )
    if not case.asked.read_only:
        owned.check_writable(ownership, directory)
        check_access(rule, grant)
    check_common(rule, grant, case, DIRECTORY)
    owned.check_ids(rule, case, ownership, directory)
    if case.wishes.image_policy is not None:
        raise DeniedByPolicy(
            "imagePolicy is about images, and the source is a directory", rule=rule.name, hint="leave it out"
        )
    return Trust(owned.TRUSTED_BECAUSE[ownership], f"{ownership}-owned")


def judge_tmpfs(rule: Rule, grant: Grant, case: Case, tmpfs: Tmpfs) -> Trust:
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
    if case.wishes.image_policy is not None:
        raise DeniedByPolicy(
            "imagePolicy is about images, and the source is a tmpfs", rule=rule.name, hint="leave it out"
        )
    return Trust(f"{tmpfs.size} bytes are within the {grant.max_size} that the rule grants")


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


def check_common(rule: Rule, grant: Grant, case: Case, type: str | None) -> None:
    """Raise unless idmap and options are granted, for every kind of source.

    Of which type options are is None where it is not known yet.
    """
    kind = case.wishes.idmap_kind
    if kind not in grant.idmap:
        raise DeniedByPolicy(
            f"the rule does not grant the idmap “{options.shown(kind)}”",
            rule=rule.name,
            hint=f"ask for one of: {', '.join(grant.idmap)}",
        )
    for option in case.asked.file_system if type is not None else ():
        options.permit(option, type=str(type), rule=rule.name, grants=grant.options, caller=case.caller)


def locked_attributes(grant: Grant, case: Case, more: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return the flags that a mount gets and that whoever receives it cannot clear.

    `more` are asked for one partition. Raises OptionNotPermitted for flags that contradict each other.
    """
    always = frozenset() if case.caller.is_host_root else ALWAYS_LOCKED
    asked = case.asked.attributes | more
    if "strictatime" in asked and "noatime" in asked | frozenset(grant.flags):
        why = "the rule sets noatime" if "noatime" in grant.flags else "it contradicts noatime"
        raise OptionNotPermitted("strictatime", why, hint="leave the option out")
    return always | frozenset(grant.flags) | asked


def no_rule(policy: Policy, case: Case) -> DeniedByPolicy:
    """Return the error for a request that no rule matches, with the shortest way to one that does."""
    if not policy.rules:
        return DeniedByPolicy("the policy has no rules", hint=ADD_A_RULE)
    if case.source.kind is SourceKind.TMPFS:
        return DeniedByPolicy("no rule lets this caller have a tmpfs", hint=ADD_A_RULE)
    if case.source.kind is SourceKind.DIRECTORY:
        return owned.no_rule(policy, case, ADD_A_RULE)
    matches = [
        rule.image
        for rule in policy.rules
        if rule.verdict is not Verdict.DENY
        and rule.image.kind not in (TMPFS, DIRECTORY)
        and caller_mismatch(rule.caller, case.caller, namespace_given=case.wishes.namespace_given) is None
    ]
    if not matches:
        return DeniedByPolicy("no rule lets this caller mount an image", hint=ADD_A_RULE)
    problems, ways = [], []
    patterns = [pattern for match in matches for pattern in match.location]
    if patterns:
        unproven = case.evidence.root_owned_path is None
        problem = f" ({location_problem(case.evidence)})" if unproven else ""
        problems.append(f"it does not lie in a directory that a rule trusts{problem}")
        ways.append(copy_hint(patterns))
    for match in matches:
        mismatch = None if match.location else image_mismatch(match, case.source, case.evidence)
        if mismatch is not None:
            problems.append(mismatch.reason)
            ways.append(mismatch.hint or ADD_A_RULE)
    return DeniedByPolicy(shorten(dict.fromkeys(problems), "; "), hint=shorten(dict.fromkeys(ways), "; or "))
