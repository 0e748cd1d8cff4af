"""Signatures, digests, registries, kinds of immutability: what makes a rule apply, and what it requires."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mountd.caller import cgroup
from mountd.caller.model import Caller
from mountd.errors import (
    DeniedByPolicy,
    InteractiveAuthenticationRequired,
    KeyUnknown,
    MountdError,
    NotImmutable,
    OptionNotPermitted,
    SignatureInvalid,
)
from mountd.evidence.model import Evidence
from mountd.trust.decide import Decision, decide
from mountd.trust.image_policy import parse
from mountd.trust.match import slice_is_within
from mountd.trust.policy import (
    CONTAINER_MANAGERS,
    CallerMatch,
    Grant,
    ImageMatch,
    PolicyValueError,
    Require,
    Rule,
    Strength,
    Verdict,
)
from tests.policies import (
    BYTES,
    EVERY_KIND,
    GRANT,
    GRANT_WRITE,
    LOCATED,
    NOWHERE,
    OTHER_BYTES,
    PULLED,
    TREE,
    USER,
    WISHES,
    deny,
    image,
    memory,
    policy,
    proven,
    rule,
    signed,
    tmpfs,
)

ID = "0" * 64


def judged(one: Rule, evidence: Evidence = LOCATED, **wishes: object) -> Decision:
    return decide(policy(one), USER, image(), evidence, replace(WISHES, **wishes))  # type: ignore[arg-type]


def refused(decision: Decision, error: type[MountdError], reason: str, hint: str = "") -> None:
    assert type(decision.error) is error, decision
    assert decision.verdict is Verdict.DENY
    assert reason in decision.reason
    assert hint in (decision.hint or "")
    assert decision.reason.isprintable()


STORED = proven("stored", BYTES)
SIGNED = replace(STORED, signers=(signed(),))
FROM_TEAM = replace(STORED, provenance=PULLED)

MATCHED = [
    (ImageMatch(kind="image"), NOWHERE),
    (ImageMatch(signed="team"), SIGNED),
    (ImageMatch(signed="team"), replace(SIGNED, signers=(signed("other"), signed()))),
    (ImageMatch(signed="team"), replace(NOWHERE, digest=BYTES, signers=(signed(),))),
    (ImageMatch(signed="team"), proven("dm-verity", TREE, signers=(signed("team", "root-hash", TREE),))),
    (ImageMatch(signed="team"), proven("fs-verity", TREE, signers=(signed("team", "fs-verity", TREE),))),
    (ImageMatch(digest=(OTHER_BYTES, BYTES)), replace(NOWHERE, digest=BYTES)),
    (ImageMatch(digest=(BYTES,)), STORED),
    (ImageMatch(digest=(BYTES,)), proven("sealed", BYTES)),
    (
        ImageMatch(registry=("r.example/*", "registry.example.com/team/*")),
        replace(STORED, provenance=PULLED),
    ),
    (ImageMatch(registry=("registry.example.com/team/app",)), FROM_TEAM),
]


@pytest.mark.parametrize(("match", "evidence"), MATCHED)
def test_image_matches(match: ImageMatch, evidence: Evidence) -> None:
    decision = decide(policy(deny(image=match)), USER, image(), evidence, WISHES)
    assert decision.rule == "no"
    # And a tmpfs is never meant.
    assert decide(policy(deny(image=match)), USER, tmpfs(), evidence, WISHES).rule is None


FAKE = replace(PULLED, repository="registry.example.com.evil/team/app")
NOT_MATCHED = [
    (ImageMatch(signed="team"), LOCATED, "no signature by “team” came along", "source.signature"),
    (ImageMatch(signed="team"), replace(STORED, signers=(signed("other"),)),
     "it is signed with “other”, not with “team”", "source.signature"),
    (ImageMatch(signed="team"), replace(STORED, signature_error=SignatureInvalid("it has expired")),
     "“team” has not signed it: invalid signature: it has expired", "source.signature"),
    # The signature is good, and of something else.
    (ImageMatch(signed="team"), replace(STORED, signers=(signed(digest=OTHER_BYTES),)),
     "covers the image, and nothing proves that", "sign the image"),
    (ImageMatch(signed="team"), replace(LOCATED, signers=(signed(),)), "nothing proves that", "sign"),
    (ImageMatch(signed="team"), proven("stored", TREE, signers=(signed("team", "root-hash", TREE),)),
     "covers the root-hash, and nothing proves that", "sign"),
    (ImageMatch(signed="team"), proven("fs-verity", TREE, signers=(signed("team", "root-hash", TREE),)),
     "covers the root-hash", "sign"),
    (ImageMatch(signed="team"), proven("fs-verity", BYTES, signers=(signed(),)), "covers the image", "sign"),
    (ImageMatch(signed="team"), proven("dm-verity", BYTES, signers=(signed("team", "root-hash", TREE),)),
     "covers the root-hash", "sign"),
    (ImageMatch(signed="team"), replace(STORED, signers=(signed("team", "a\nb", BYTES),)),
     r"covers the a\nb", "sign"),
    (ImageMatch(digest=(BYTES,)), LOCATED, "that of this one is not known", ""),
    (ImageMatch(digest=(BYTES,)), replace(LOCATED, digest=OTHER_BYTES), f"has the digest {OTHER_BYTES}",
     f"can add {OTHER_BYTES}"),
    # A digest of a tree of hashes is not one of the bytes.
    (ImageMatch(digest=(TREE,)), proven("fs-verity", TREE), "is not known", ""),
    (ImageMatch(digest=(TREE,)), proven("dm-verity", TREE), "is not known", ""),
    (ImageMatch(registry=("registry.example.com/team/*",)), STORED, "not recorded as pulled",
     "mountctl image pull"),
    (ImageMatch(registry=("registry.example.com/team/*",)), replace(STORED, provenance=FAKE),
     "it was pulled from registry.example.com.evil/team/app, not from registry.example.com/team/*", "pull"),
    (ImageMatch(registry=("registry.example.com/team/*",)),
     replace(STORED, provenance=replace(PULLED, repository="a\nb")), r"pulled from a\nb", "pull"),
]  # fmt: skip


@pytest.mark.parametrize(("match", "evidence", "reason", "hint"), NOT_MATCHED)
def test_image_does_not_match(match: ImageMatch, evidence: Evidence, reason: str, hint: str) -> None:
    decision = judged(rule(image=match), evidence)
    (step,) = decision.steps
    assert reason in step.reason
    assert hint in (step.hint or "")
    assert not step.applies
    # The only rule there is says as much to who is denied.
    refused(decision, DeniedByPolicy, reason, hint)


def test_the_denial_names_each_way_once_and_few() -> None:
    rules = [rule(f"{n}", image=ImageMatch(signed="team")) for n in range(9)]
    rules += [
        rule("r", image=ImageMatch(registry=("r.example/*",))),
        rule("l", image=ImageMatch(("/srv/*",))),
    ]
    decision = decide(policy(*rules), USER, image(), NOWHERE, WISHES)
    assert decision.reason == (
        "it does not lie in a directory that a rule trusts (/home/u belongs to uid 1000); "
        "no signature by “team” came along; it is not recorded as pulled from a registry"
    )
    assert (decision.hint or "").count("source.signature") == 1


# --- callers ---


def in_unit(path: str) -> Caller:
    place = cgroup.parse_path(path)
    return replace(USER, unit=place.unit, slice=place.slice, container=place.container, cgroup=path)


SERVICE = in_unit("/system.slice/builder@1.service")
SESSION = in_unit("/user.slice/user-1000.slice/session-1.scope")
DOCKER = in_unit(f"/system.slice/docker-{ID}.scope")
FORGER = in_unit(f"/user.slice/user-1000.slice/user@1000.service/system.slice/docker-{ID}.scope")

CALLERS = [
    (CallerMatch(units=("builder@1.service",)), SERVICE, None),
    (CallerMatch(units=("a.service", "builder@*.service")), SERVICE, None),
    (CallerMatch(units=("builder@*.service",), slices=("system.slice",)), SERVICE, None),
    (CallerMatch(units=("*.service",)), FORGER, None),
    (CallerMatch(units=("builder.service",)), SERVICE, "unit builder@1.service is not among its units"),
    (CallerMatch(units=("Builder@1.service",)), SERVICE, "is not among its units"),
    (CallerMatch(units=("*.scope",)), SERVICE, "is not among its units"),
    (CallerMatch(units=("*.service",)), USER, "in no unit that mountd knows of"),
    (CallerMatch(units=("docker-*.scope",)), FORGER, "user@1000.service is not among"),
    (CallerMatch(slices=("user.slice",)), SESSION, None),
    (CallerMatch(slices=("system.slice", "user-1000.slice")), SESSION, None),
    (CallerMatch(slices=("-.slice",)), SESSION, None),
    (CallerMatch(slices=("user-100.slice",)), SESSION, "slice user-1000.slice is not among its slices"),
    (CallerMatch(slices=("system.slice",)), FORGER, "is not among its slices"),
    (CallerMatch(slices=("-.slice",)), USER, "in no slice that mountd knows of"),
    (CallerMatch(containers=(f"docker:{ID}",)), DOCKER, None),
    (CallerMatch(containers=("docker:*",)), DOCKER, None),
    (CallerMatch(containers=("podman:*",)), DOCKER, "is not among its containers"),
    (CallerMatch(containers=("docker:*",)), FORGER, "in no container that mountd knows of"),
    (CallerMatch(units=("*.service",), users=frozenset({5})), SERVICE, "uid 1000 is not among its users"),
    (CallerMatch(units=("x.service",), users=frozenset({1000})), SERVICE, "is not among its units"),
]


@pytest.mark.parametrize(("match", "caller", "reason"), CALLERS)
def test_callers(match: CallerMatch, caller: Caller, reason: str | None) -> None:
    decision = decide(policy(deny(caller=match)), caller, image(), LOCATED, WISHES)
    if reason is None:
        assert decision.rule == "no"
    else:
        assert decision.rule is None
        assert reason in decision.steps[0].reason


@pytest.mark.parametrize(
    ("slice", "outer", "within"),
    [
        ("user.slice", "user.slice", True),
        ("user-1000.slice", "user.slice", True),
        ("user-1000.slice", "user-100.slice", False),
        ("user.slice", "user-1000.slice", False),
        ("users.slice", "user.slice", False),
        ("user.slice", "-.slice", True),
    ],
)
def test_slices_within(slice: str, outer: str, within: bool) -> None:
    assert slice_is_within(slice, outer) is within


def test_the_policy_knows_the_managers_that_callers_can_have() -> None:
    patterns = (*cgroup.UNITS_OF_CONTAINERS, *cgroup.GROUPS_OF_CONTAINERS)
    assert {manager for manager, _ in patterns} == set(CONTAINER_MANAGERS)


# --- immutability ---


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_one_kind_of_immutability_is_enough(kind: str) -> None:
    evidence = LOCATED if kind == "root-owned" else proven(kind, TREE)
    for require in (Require((kind,)), Require(EVERY_KIND)):
        decision = judged(rule(require=require), evidence)
        assert decision.verdict is Verdict.ALLOW
        assert decision.trusted_by == kind
        assert decision.digest == (None if kind == "root-owned" else TREE)
    others = tuple(each for each in EVERY_KIND if each != kind)
    decision = judged(rule(require=Require(others)), evidence)
    assert isinstance(decision.error, NotImmutable)


def test_the_digest_of_the_image_comes_first() -> None:
    decision = judged(rule(), replace(proven("fs-verity", TREE), digest=BYTES))
    assert decision.digest == BYTES


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_what_is_not_proven_says_why_and_the_way_out(kind: str) -> None:
    evidence = replace(NOWHERE, unproven=((kind, "because\nof it"),))
    decision = judged(rule(require=Require((kind,))), evidence)
    reason = "/home/u belongs to uid 1000" if kind == "root-owned" else r"because\nof it"
    way = {
        "root-owned": "owned by root",
        "sealed": "F_SEAL_WRITE",
        "dm-verity": "veritysetup format",
        "fs-verity": "fsverity enable",
        "stored": "mountctl image import",
    }[kind]
    refused(decision, NotImmutable, reason, way)
    assert decision.reason == reason
    decision = judged(rule(require=Require((kind,))), replace(NOWHERE, location_problem=None))
    assert isinstance(decision.error, NotImmutable)
    assert decision.reason


def test_every_kind_that_is_wanted_is_explained() -> None:
    unproven = (("stored", "it is not in the store"), ("fs-verity", "the file has no fs-verity"))
    decision = judged(rule(require=Require(("fs-verity", "stored"))), replace(NOWHERE, unproven=unproven))
    assert decision.reason == "fs-verity: the file has no fs-verity; stored: it is not in the store"
    assert (decision.hint or "").startswith("one of these is enough: fs-verity: run “fsverity enable")
    assert "stored: run “mountctl image import" in (decision.hint or "")


def test_a_writable_descriptor_matters_where_root_owns_the_image_only() -> None:
    writable = replace(LOCATED, descriptor_writable=True)
    refused(judged(rule(), writable), NotImmutable, "descriptor can write", "O_RDONLY")
    decision = judged(rule(), replace(writable, proofs=proven("dm-verity").proofs))
    assert decision.trusted_by == "dm-verity"


def test_only_what_root_owns_is_written_to() -> None:
    both = replace(proven("stored", BYTES, descriptor_writable=True), root_owned_path="/srv/a")
    grant = rule(grant=GRANT_WRITE)
    assert judged(grant, both, read_only=False).trusted_by == "root-owned"
    assert judged(grant, both).trusted_by == "stored"
    stored = replace(both, root_owned_path=None)
    refused(
        judged(grant, stored, read_only=False), OptionNotPermitted, "trusted by “stored”", "read-only mount"
    )


@pytest.mark.parametrize(
    ("match", "require"),
    [
        (ImageMatch(signed="team"), None),
        (ImageMatch(digest=(BYTES,)), None),
        (ImageMatch(registry=("r.example/*",)), None),
        (None, Require(EVERY_KIND, "team")),
        (None, Require(EVERY_KIND, "containers-policy")),
        (None, Require(EVERY_KIND, None, Strength.SIGNED)),
        (None, Require(EVERY_KIND, None, Strength.DIGEST)),
        (None, Require(("stored",))),
    ],
)
def test_what_is_trusted_for_its_contents_has_no_writers(
    match: ImageMatch | None, require: Require | None
) -> None:
    rule(image=match, require=require)
    with pytest.raises(PolicyValueError) as raised:
        rule(image=match, require=require, grant=GRANT_WRITE)
    assert raised.value.key == "grant.access"


# --- signatures ---

BY_TEAM = rule(require=Require(EVERY_KIND, "team"))


def test_the_required_signature_is_enough() -> None:
    decision = judged(BY_TEAM, SIGNED)
    assert (decision.verdict, decision.signer, decision.trusted_by) == (Verdict.ALLOW, "CN=team", "stored")
    many = replace(SIGNED, signers=(signed("other"), signed(digest=OTHER_BYTES), signed()))
    assert judged(BY_TEAM, many).signer == "CN=team"
    # A second one that does not hold changes nothing about the one that does.
    assert judged(BY_TEAM, replace(SIGNED, signature_error=KeyUnknown("x"))).verdict is Verdict.ALLOW


def test_a_signature_does_not_replace_immutability() -> None:
    evidence = replace(NOWHERE, digest=BYTES, signers=(signed(),))
    refused(judged(BY_TEAM, evidence), NotImmutable, "stored: ")


def test_a_required_signature_that_is_not_there() -> None:
    refused(judged(BY_TEAM, STORED), DeniedByPolicy, "no signature came along", "source.signature")


@pytest.mark.parametrize("error", [SignatureInvalid("it is torn"), KeyUnknown("CN=x", hint="h")])
def test_a_signature_that_does_not_hold_says_so_itself(error: MountdError) -> None:
    decision = judged(BY_TEAM, replace(STORED, signature_error=error))
    assert decision.error is error
    assert decision.hint == error.hint
    assert decision.steps[0].reason == error.message


def test_a_signature_by_another_key() -> None:
    refused(
        judged(BY_TEAM, replace(STORED, signers=(signed("other"),))), KeyUnknown, "signed with “other”",
        "sign it with the key “team”",
    )  # fmt: skip


@pytest.mark.parametrize(
    "signer", [signed(digest=OTHER_BYTES), signed("team", "root-hash"), signed("team", "fs-verity")]
)
def test_a_signature_of_something_else(signer: object) -> None:
    decision = judged(BY_TEAM, replace(STORED, signers=(signer,)))
    refused(decision, SignatureInvalid, "nothing proves that to be this image's", "sign the image")


def test_who_signed_is_said_even_where_nobody_asks() -> None:
    assert judged(rule(), SIGNED).signer == "CN=team"
    assert judged(rule(), replace(STORED, signers=(signed(digest=OTHER_BYTES),))).signer is None
    odd = replace(signed(), subject="CN=a\nb")
    assert judged(rule(), replace(STORED, signers=(odd,))).signer == r"CN=a\nb"


BY_REGISTRY = rule(require=Require(EVERY_KIND, "containers-policy"))


def test_containers_policy() -> None:
    for requirement in ("signedBy", "sigstoreSigned"):
        pulled = replace(STORED, provenance=replace(PULLED, requirement=requirement))
        decision = judged(BY_REGISTRY, pulled)
        assert (decision.verdict, decision.signer) == (Verdict.ALLOW, "CN=registry")
    refused(judged(BY_REGISTRY, SIGNED), DeniedByPolicy, "not recorded as pulled", "mountctl image pull")
    for requirement in ("insecureAcceptAnything", "reject", "", "SignedBy", "signedBy\n"):
        pulled = replace(STORED, provenance=replace(PULLED, requirement=requirement))
        refused(judged(BY_REGISTRY, pulled), DeniedByPolicy, "checks no signature", "containers-policy.json")


# --- strength ---

ACCEPTED = replace(PULLED, requirement="insecureAcceptAnything")


@pytest.mark.parametrize(
    ("match", "evidence", "strength"),
    [
        (None, proven("fs-verity", TREE), None),
        (None, replace(STORED, digest=BYTES), None),
        (None, replace(STORED, signers=(signed(digest=OTHER_BYTES),)), None),
        (None, LOCATED, "location"),
        (ImageMatch(digest=(BYTES,)), STORED, "digest"),
        (None, replace(STORED, provenance=ACCEPTED), "digest"),
        (None, replace(STORED, provenance=PULLED), "signed"),
        (None, SIGNED, "signed"),
        (None, replace(SIGNED, signers=(signed("other"),)), "signed"),
        (ImageMatch(digest=(BYTES,)), replace(SIGNED, root_owned_path="/srv/a"), "signed"),
    ],
)
def test_strength(match: ImageMatch | None, evidence: Evidence, strength: str | None) -> None:
    order = ["signed", "digest", "location"]
    for wanted in order:
        decision = judged(rule(image=match, require=Require(EVERY_KIND, None, Strength(wanted))), evidence)
        if strength is not None and order.index(strength) <= order.index(wanted):
            assert decision.verdict is Verdict.ALLOW
        else:
            found = "nothing vouches for it" if strength is None else f"it is by “{strength}” only"
            refused(decision, DeniedByPolicy, f"“{wanted}” at least, and {found}")
            assert decision.hint


def test_strength_says_what_is_wrong_with_a_signature() -> None:
    one = rule(require=Require(EVERY_KIND, None, Strength.SIGNED))
    decision = judged(one, replace(STORED, signature_error=SignatureInvalid("it is torn")))
    refused(decision, DeniedByPolicy, "(invalid signature: it is torn)")


# --- the request's own policy ---


def test_an_image_policy_can_refuse() -> None:
    assert judged(rule(), image_policy=parse("*")).verdict is Verdict.ALLOW
    assert judged(rule(), image_policy=parse("root=unprotected+ext4")).verdict is Verdict.ALLOW
    for text in ("~", "-", "root=verity", "root=signed", "root=erofs", "root=absent", "usr=open"):
        decision = judged(rule(), image_policy=parse(text))
        refused(decision, DeniedByPolicy, "imagePolicy", "without one")
        assert decision.rule == "images"


def test_an_image_policy_wants_dm_verity_and_no_other_kind() -> None:
    verity, root_hash = proven("dm-verity", TREE), signed("team", "root-hash", TREE)
    assert judged(rule(), verity, image_policy=parse("root=verity")).verdict is Verdict.ALLOW
    for evidence in (proven("fs-verity", TREE), STORED, SIGNED):
        decision = judged(rule(), evidence, image_policy=parse("root=verity+signed"))
        refused(decision, DeniedByPolicy, "imagePolicy")
    refused(judged(rule(), verity, image_policy=parse("root=signed")), DeniedByPolicy, "imagePolicy")
    both = replace(verity, signers=(root_hash,))
    assert judged(rule(), both, image_policy=parse("root=signed")).verdict is Verdict.ALLOW


def test_an_image_policy_can_want_a_read_only_mount() -> None:
    writable = replace(LOCATED, descriptor_writable=True)
    one = rule(grant=GRANT_WRITE)
    assert judged(one, writable, read_only=False).verdict is Verdict.ALLOW
    decision = judged(one, writable, read_only=False, image_policy=parse("root=read-only-on"))
    refused(decision, DeniedByPolicy, "imagePolicy")


def test_an_image_policy_is_not_for_a_tmpfs() -> None:
    wishes = replace(WISHES, image_policy=parse("*"))
    decision = decide(policy(memory()), USER, tmpfs(), NOWHERE, wishes)
    refused(decision, DeniedByPolicy, "imagePolicy is about images")


# --- steps and what the decision carries ---


def test_rules_after_the_one_that_decides_are_not_reached() -> None:
    rules = [deny("other", caller=CallerMatch(users=frozenset({5}))), rule("first"), rule("second"), deny()]
    for evidence in (LOCATED, NOWHERE):
        decision = decide(policy(*rules), USER, image(), evidence, WISHES)
        assert [(step.rule, step.applies) for step in decision.steps] == [
            ("other", False), ("first", True), ("second", False), ("no", False),
        ]  # fmt: skip
        assert [step.reason for step in decision.steps[2:]] == ["not reached: rule “first” decides"] * 2
        assert all(step.hint is None for step in decision.steps[2:])


def test_a_malformed_request_reaches_no_rule() -> None:
    decision = decide(policy(rule()), USER, image(), LOCATED, replace(WISHES, options=("a\n",)))
    (step,) = decision.steps
    assert (step.applies, step.reason) == (False, "not reached: the request itself is refused")


def test_the_decision_carries_what_is_enforced_later() -> None:
    grant = Grant(GRANT.file_systems, attach=("$HOME/**",), max_mounts=3)
    decision = judged(rule(grant=grant))
    assert (decision.attach, decision.max_mounts) == (("$HOME/**",), 3)
    decision = judged(rule(grant=grant), NOWHERE)
    assert (decision.attach, decision.max_mounts, decision.signer, decision.digest) == ((), None, None, None)


def test_asking_allows_nothing_by_itself() -> None:
    decision = judged(rule(verdict=Verdict.ASK), SIGNED)
    assert decision.verdict is Verdict.ASK
    assert isinstance(decision.error, InteractiveAuthenticationRequired)
