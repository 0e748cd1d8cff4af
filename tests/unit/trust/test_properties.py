"""What holds for every policy, caller, image and wish: hypothesis looks for one for which it does not."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mountd.caller.model import OVERFLOW_ID, Caller
from mountd.caller.peer import Peer
from mountd.errors import (
    BadFileDescriptor,
    KeyRequired,
    KeyUnknown,
    MountdError,
    OptionNotPermitted,
    SignatureInvalid,
)
from mountd.evidence.model import Evidence, Proof, Provenance, Signer
from mountd.fds import OwnedFd, close_all
from mountd.plan.idmap import IdMapKind, IdMapWish
from mountd.service import mount as methods
from mountd.service.context import RequestContext
from mountd.service.encrypted import is_encrypted
from mountd.service.inspection import Inspected
from mountd.service.requests import MountRequest
from mountd.source.model import Luks, Source
from mountd.trust.decide import decide
from mountd.trust.image_policy import DESIGNATORS, EVERYTHING, ImagePolicy, parse
from mountd.trust.options import RESTRICTING
from mountd.trust.policy import (
    Access,
    CallerMatch,
    Grant,
    ImageMatch,
    Policy,
    PolicyValueError,
    Require,
    Rule,
    Strength,
    Verdict,
)
from mountd.trust.vouching import bound_signers
from mountd.trust.wishes import IDMAP_KINDS, MountWishes
from tests.policies import (
    BYTES,
    EVERY_KIND,
    KEYS,
    NESTED,
    OTHER_BYTES,
    PATH,
    PULLED,
    ROOT,
    TREE,
    USER,
    disk_image,
    image,
    tmpfs,
)

EXAMPLES = settings(
    max_examples=int(os.environ.get("MOUNTD_PROPERTY_EXAMPLES", "400")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

digests = st.sampled_from([BYTES, BYTES, OTHER_BYTES, TREE])
key_names = st.sampled_from(["team", "team", "other"])
T = TypeVar("T")


def mostly(usual: T, *others: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    """Return `usual` more often than not: a case in which everything is odd is denied, and proves little."""
    return st.integers(0, 7).flatmap(lambda number: st.just(usual) if number else st.one_of(*others))


def some(values: list[str], *, least: int = 1, most: int = 3) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(values), min_size=least, max_size=most, unique=True).map(tuple)


callers = st.builds(
    replace,
    st.sampled_from([USER, USER, ROOT, NESTED, replace(USER, uid=OVERFLOW_ID)]),
    unit=st.none() | st.sampled_from(["a.service", "b@1.service", "s.scope"]),
    slice=st.none() | st.sampled_from(["system.slice", "user.slice", "user-1000.slice"]),
    container=st.none() | st.sampled_from(["lxc:a", "docker:b"]),
)
proofs = st.lists(st.builds(Proof, st.sampled_from(EVERY_KIND[:-1]), st.none() | digests), max_size=3)
signers = st.lists(
    st.builds(
        Signer, key_names, st.just("CN=x"), st.sampled_from(["image", "root-hash", "fs-verity"]), digests
    ),
    max_size=3,
)
provenances = st.none() | st.builds(
    replace,
    st.just(PULLED),
    repository=st.sampled_from([PULLED.repository, "registry.example.com.evil/team/app", "r.example/a"]),
    requirement=st.sampled_from(["signedBy", "sigstoreSigned", "insecureAcceptAnything"]),
)
evidences = st.builds(
    Evidence,
    root_owned_path=st.none() | st.sampled_from([PATH, "/opt/a"]),
    location_problem=st.none() | st.just("why"),
    descriptor_writable=st.booleans(),
    proofs=proofs.map(tuple),
    unproven=st.just((("stored", "it is not there"),)),
    digest=st.none() | digests,
    signers=signers.map(tuple),
    signature_error=mostly(None, st.sampled_from([SignatureInvalid("torn"), KeyUnknown("who")])),
    provenance=provenances,
)
images = st.builds(image, mostly("ext4", st.sampled_from(["erofs", "xfs"])), st.none() | st.just(PATH))
disks = st.builds(
    disk_image, some(["root", "usr", "home"]), st.sampled_from(["ext4", "erofs"]), st.booleans()
)
volume = Luks(2, None, None, "aes-xts-plain64", 64, 512, 1 << 18, 1 << 18, 0, 1 << 17, 1 << 14, 0)
encrypted = st.builds(
    replace, images, luks=st.just(volume), file_system=st.sampled_from([None, image().file_system])
)
sources = mostly(
    image(),
    images,
    encrypted,
    disks,
    st.builds(tmpfs, st.integers(-1, 1 << 21), st.none() | st.integers(-1, 300)),
)

flags = st.lists(st.sampled_from([*sorted(EVERYTHING), "open"]), max_size=4).map("+".join)
image_policies = st.one_of(
    st.sampled_from(["*", "=open", "root=verity", "root=signed", "root=unprotected", "root=ext4", "-"]),
    st.dictionaries(st.sampled_from(["", *DESIGNATORS]), flags, min_size=1, max_size=3).map(
        lambda rules: ":".join(f"{name}={value}" for name, value in rules.items())
    ),
).map(parse)
option_words = st.sampled_from(["acl", "discard", "rw", "ro", "suid", "relatime", "strictatime", "x\n"])
wishes = st.builds(
    MountWishes,
    read_only=st.booleans(),
    file_system_type=mostly(None, st.sampled_from(["ext4", "erofs", "tmpfs"])),
    options=mostly((), st.lists(option_words | st.sampled_from(sorted(RESTRICTING)), max_size=2).map(tuple)),
    idmap_kind=mostly("none", st.sampled_from(IDMAP_KINDS)),
    namespace_given=st.booleans(),
    image_policy=mostly(None, image_policies),
)

image_matches = mostly(
    ImageMatch(any=True),
    st.just(ImageMatch(kind="image")),
    st.just(ImageMatch(kind="tmpfs")),
    st.builds(ImageMatch, location=some(["/srv/images/*", "/opt/*", "/home/*"])),
    st.builds(ImageMatch, signed=key_names),
    st.builds(ImageMatch, digest=st.lists(digests, min_size=1, max_size=2).map(tuple)),
    st.builds(ImageMatch, registry=some(["registry.example.com/team/*", "r.example/a"])),
)
# All but one key are left out, or most would contradict each other.
caller_matches = mostly(
    {"any": True},
    st.fixed_dictionaries(
        {},
        optional={
            "users": st.sampled_from([frozenset({1000}), frozenset({0, 100000})]),
            "groups": st.just(frozenset({500})),
            "user_namespace": st.sampled_from(["own", "none"]),
            "host": st.booleans(),
            "units": some(["a.service", "b@*.service"]),
            "slices": some(["user.slice", "system.slice"]),
            "containers": some(["lxc:*", "docker:b"]),
        },
    ),
)
requires = st.builds(
    Require,
    integrity=some(list(EVERY_KIND), most=5),
    signature=mostly(None, key_names, st.just("containers-policy")),
    min_strength=mostly(None, st.sampled_from(Strength)),
)
grants = st.builds(
    Grant,
    file_systems=mostly(("ext4",), some(["ext4", "erofs"])),
    access=st.sampled_from(Access),
    options=some(["acl", "discard"], least=0),
    flags=some(["noexec", "noatime"], least=0),
    idmap=mostly(IDMAP_KINDS, some(list(IDMAP_KINDS))),
    attach=st.just(("$HOME/**",)),
    max_mounts=st.none() | st.just(3),
    encrypted=st.booleans(),
)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """All rules that can be made of what is drawn; what cannot be is left out."""
    rules = []
    for number in range(draw(st.integers(0, 3)) or draw(st.integers(0, 3))):
        rule = made(
            f"r{number}",
            draw(caller_matches),
            draw(image_matches),
            draw(requires),
            draw(grants),
            draw(mostly(Verdict.ALLOW, st.sampled_from(Verdict))),
        )
        if rule is not None:
            rules.append(rule)
    return Policy(tuple(rules), KEYS)


def made(
    name: str,
    caller: dict[str, Any],
    match: ImageMatch,
    require: Require,
    grant: Grant,
    verdict: Verdict,
) -> Rule | None:
    """Return the rule, with what it must not have left out, or None if there can be no such rule."""
    required: Require | None = require
    granted: Grant | None = grant
    if match.kind == "tmpfs":
        required, granted = None, replace(grant, file_systems=(), options=("huge",), max_size=1 << 20)
    elif match.names_bytes or require.names_bytes or "root-owned" not in require.integrity:
        granted = replace(grant, access=Access.READ_ONLY)
    if verdict is Verdict.DENY:
        required = granted = None
    try:
        return Rule(name, f"a.toml: {name}", match, CallerMatch(**caller), required, granted, verdict)
    except PolicyValueError:
        return None


every_case = (policies(), callers, sources, evidences, wishes)


@EXAMPLES
@given(*every_case)
def test_the_same_question_has_the_same_answer(
    policy: Policy, caller: Caller, source: Source, evidence: Evidence, wishes: MountWishes
) -> None:
    first = decide(policy, caller, source, evidence, wishes)
    second = decide(policy, caller, source, evidence, wishes)
    without = replace(first, error=None)
    assert replace(second, error=None) == without
    assert str(first.error) == str(second.error)
    assert type(first.error) is type(second.error)
    # Every rule is listed, in order, and the one that decides is the only one that applies.
    assert [step.rule for step in first.steps] == [rule.name for rule in policy.rules]
    assert [step.rule for step in first.steps if step.applies] == ([first.rule] if first.rule else [])
    for text in (first.reason, *(step.reason for step in first.steps)):
        assert text
        assert text.isprintable()


@EXAMPLES
@given(*every_case)
def test_an_allowed_image_is_immutable_and_vouched_for(
    policy: Policy, caller: Caller, source: Source, evidence: Evidence, wishes: MountWishes
) -> None:
    decision = decide(policy, caller, source, evidence, wishes)
    assert (decision.error is None) == (decision.verdict is Verdict.ALLOW)
    if decision.error is not None:
        return
    (rule,) = [each for each in policy.rules if each.name == decision.rule]
    # The host's root is not asked for consent to what it does itself.
    assert rule.verdict is Verdict.ALLOW or (rule.verdict is Verdict.ASK and caller.is_host_root)
    assert rule.grant is not None
    assert (decision.attach, decision.max_mounts) == (rule.grant.attach, rule.grant.max_mounts)
    assert caller.is_host_root or decision.attributes >= {"nosuid", "nodev"}
    assert decision.read_only or rule.grant.access is Access.READ_WRITE
    if source.tmpfs is not None:
        return
    assert rule.require is not None
    assert rule.grant.encrypted or source.luks is None
    proven = {proof.kind for proof in evidence.proofs}
    if evidence.root_owned_path is not None:
        proven.add("root-owned")
    assert decision.trusted_by in proven & set(rule.require.integrity)
    # Whoever can write to it is either let to, or the host's root, or has no power over what is proven.
    if evidence.descriptor_writable and decision.trusted_by == "root-owned":
        assert caller.is_host_root or not decision.read_only
    named = {rule.image.signed, rule.require.signature} - {None, "containers-policy"}
    assert named <= {signer.key for signer in bound_signers(evidence)}
    if rule.require.signature == "containers-policy":
        assert isinstance(evidence.provenance, Provenance)
        assert evidence.provenance.requirement != "insecureAcceptAnything"
    if rule.image.names_bytes or rule.require.names_bytes:
        assert decision.read_only


@EXAMPLES
@given(*every_case)
def test_absence_is_refusal(
    policy: Policy, caller: Caller, source: Source, evidence: Evidence, wishes: MountWishes
) -> None:
    assert decide(Policy(()), caller, source, evidence, wishes).verdict is Verdict.DENY
    # Without the rules that allow, nobody is allowed anything; nor asked about, without those that ask.
    rest = tuple(rule for rule in policy.rules if rule.verdict is not Verdict.ALLOW)
    without = decide(Policy(rest, KEYS), caller, source, evidence, wishes)
    assert without.verdict is not Verdict.ALLOW or caller.is_host_root
    rest = tuple(rule for rule in policy.rules if rule.verdict is Verdict.DENY)
    assert decide(Policy(rest, KEYS), caller, source, evidence, wishes).verdict is Verdict.DENY
    # Without any evidence, no image is allowed.
    nothing = Evidence(None, None, False)
    assert source.tmpfs or decide(policy, caller, source, nothing, wishes).verdict is Verdict.DENY


def narrowed(wishes: MountWishes, more: str | ImagePolicy) -> MountWishes:
    """Return `wishes` with one demand more: a type of file system, a restricting option, an image policy."""
    if isinstance(more, ImagePolicy):
        before = wishes.image_policy
        if before is not None:
            shared = {name: before.flags(name) & more.flags(name) for name in DESIGNATORS}
            more = ImagePolicy(shared, before.default & more.default)
        return replace(wishes, image_policy=more)
    if more in RESTRICTING:
        return replace(wishes, options=(*wishes.options, more))
    return replace(wishes, file_system_type=wishes.file_system_type or more)


@EXAMPLES
@given(
    *every_case, st.sampled_from([*sorted(RESTRICTING), "ext4", "erofs", "tmpfs", "a\n"]) | image_policies
)
def test_a_demand_more_never_allows(
    policy: Policy,
    caller: Caller,
    source: Source,
    evidence: Evidence,
    wishes: MountWishes,
    more: str | ImagePolicy,
) -> None:
    before = decide(policy, caller, source, evidence, wishes)
    after = decide(policy, caller, source, evidence, narrowed(wishes, more))
    if after.verdict is Verdict.ALLOW:
        assert before.verdict is Verdict.ALLOW
        assert (after.rule, after.trusted_by) == (before.rule, before.trusted_by)
        assert (after.read_only, after.options) == (before.read_only, before.options)
        assert after.attributes >= before.attributes


@EXAMPLES
@given(*every_case)
def test_asking_for_less_than_writing_allows_only_what_writing_prevented(
    policy: Policy, caller: Caller, source: Source, evidence: Evidence, wishes: MountWishes
) -> None:
    """A read-only mount may be allowed where a writable one is not, and then for that reason alone."""
    writable = replace(wishes, read_only=False)
    before = decide(policy, caller, source, evidence, writable)
    after = decide(policy, caller, source, evidence, replace(wishes, read_only=True))
    if after.verdict is Verdict.ALLOW and before.verdict is not Verdict.ALLOW:
        assert before.rule == after.rule
        assert about_writing(before.error) or "imagePolicy" in before.reason
    if before.verdict is Verdict.ALLOW and after.verdict is Verdict.ALLOW:
        assert after.read_only
        assert after.attributes == before.attributes


def about_writing(error: MountdError | None) -> bool:
    if isinstance(error, OptionNotPermitted):
        return error.parameters["option"] == "rw"
    return isinstance(error, BadFileDescriptor)


@EXAMPLES
@given(*every_case, callers)
def test_who_else_calls_does_not_matter_to_a_rule_for_all(
    policy: Policy,
    caller: Caller,
    source: Source,
    evidence: Evidence,
    wishes: MountWishes,
    other: Caller,
) -> None:
    """A caller that nothing is known about gets no rule that names units, slices or containers."""
    unknown = replace(caller, unit=None, slice=None, container=None)
    decision = decide(policy, unknown, source, evidence, wishes)
    for rule in policy.rules:
        if rule.name == decision.rule:
            assert (rule.caller.units, rule.caller.slices, rule.caller.containers) == (None, None, None)


# --- the methods of the interface ---


def null() -> OwnedFd:
    return OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))


@contextmanager
def judging(judged: methods.Judged) -> Iterator[RequestContext]:
    """Let the methods find these facts about a request, and hand out /dev/null as the mount."""
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        Peer(ours) as peer,
        patch.object(methods, "judge", lambda *_, **__: judged),
        patch.object(methods, "make", lambda judged, *_: [null() for _ in judged.decision.uses or (None,)]),
    ):
        facts = {"peer": peer, "enter": lambda *_: None, "writable": False, "ledger": None, "notes": {}}
        context: Any = type("Context", (), facts)
        yield context()


@settings(EXAMPLES, max_examples=100)
@given(*every_case)
def test_explain_and_mount_never_disagree(
    policy: Policy, caller: Caller, source: Source, evidence: Evidence, wishes: MountWishes
) -> None:
    decision = decide(policy, caller, source, evidence, wishes)
    request = MountRequest(source.kind, None, source.tmpfs, None, None, IdMapWish(IdMapKind.NONE), wishes)
    judged = methods.Judged(request, caller, Inspected(source, evidence), decision, (), (), None)
    with judging(judged) as context:
        explained: Any = methods.explain({}, [], context)[0]
        if decision.verdict is Verdict.ASK:
            assert explained["decision"]["verdict"] == "ask"
            return
        mounted: Any = None
        raised: MountdError | None = None
        try:
            mounted, fds = methods.mount({}, [], context)
            close_all(fds)
        except KeyRequired:
            # What is allowed, and encrypted, takes a password as well.
            assert decision.verdict is Verdict.ALLOW
            assert is_encrypted(judged)
            return
        except MountdError as error:
            raised = error
    assert raised is decision.error
    if raised is None:
        assert explained["decision"] == mounted["decision"]
        assert explained["decision"]["verdict"] == "allow"
    else:
        assert explained["decision"]["verdict"] == "deny"
        assert explained["decision"].get("hint") == raised.hint
        assert explained["decision"]["reason"] in raised.message
    assert [step["rule"] for step in explained["steps"]] == [rule.name for rule in policy.rules]
