"""The verdict: each way to be allowed, each way to be refused, and that wishes only narrow."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mountd.caller.model import OVERFLOW_ID, Caller, UserNamespace
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
from mountd.evidence.model import Evidence
from mountd.source.model import BackingFile, FileSystem, Source, SourceKind, Tmpfs
from mountd.trust.decide import Decision, decide
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
    Verdict,
)
from mountd.trust.wishes import IDMAP_KINDS, MountWishes

HOST = UserNamespace(4, 1, (), (), 0, True)
CONTAINER = UserNamespace(4, 2, (), (), 1000, False)
USER = Caller(1000, 1000, frozenset({500}), 7, HOST, 1000)
ROOT = replace(USER, uid=0, gid=0, groups=frozenset(), sys_admin=True)
POWERLESS_ROOT = replace(ROOT, sys_admin=False)
NESTED = replace(USER, uid=100000, gid=100000, user_namespace=CONTAINER)
NESTED_ROOT = replace(ROOT, user_namespace=CONTAINER)

PATH = "/srv/images/a.raw"
TRUSTED = Evidence(PATH, None, False)
UNTRUSTED = Evidence(None, "/home/u belongs to uid 1000", False)
WRITABLE = replace(TRUSTED, descriptor_writable=True)
WISHES = MountWishes(True, None, (), "none", False)
WRITE = replace(WISHES, read_only=False)

ANYBODY = CallerMatch(any=True)
REQUIRE = Require(("root-owned",))
GRANT = Grant(("erofs", "ext4"))
GRANT_WRITE = replace(GRANT, access=Access.READ_WRITE)


def image(type: str = "ext4", hint: str | None = None) -> Source:
    backing = BackingFile(4096, 1, 2, 0, 0, 0o100644, False, hint)
    return Source(SourceKind.IMAGE, backing, FileSystem(type, 4096, 4096, None, None, False), None)


def tmpfs(size: int = 1000, inodes: int | None = None) -> Source:
    return Source(SourceKind.TMPFS, None, None, Tmpfs(size, inodes, 0o755))


def rule(grant: Grant = GRANT, *, name: str = "images", **parts: object) -> Rule:
    values: dict[str, object] = {
        "image": ImageMatch(location=("/srv/images/*",)),
        "caller": ANYBODY,
        "require": REQUIRE,
        "verdict": Verdict.ALLOW,
    } | parts
    return Rule(name=name, origin=f"a.toml: {name}", grant=grant, **values)  # type: ignore[arg-type]


def deny(name: str = "no", **parts: object) -> Rule:
    return replace(rule(name=name, **parts), require=None, grant=None, verdict=Verdict.DENY)


MEMORY = Rule(
    "memory", "a.toml: memory", ImageMatch(kind="tmpfs"), ANYBODY, None,
    Grant(access=Access.READ_WRITE, max_size=1 << 20), Verdict.ALLOW,
)  # fmt: skip
ANY_IMAGE = rule(name="any", image=ImageMatch(any=True))


@dataclass(frozen=True)
class Row:
    name: str
    rules: list[Rule]
    error: type[MountdError] | None = None
    reason: str = ""
    hint: str = ""
    caller: Caller = USER
    source: Source = field(default_factory=image)
    evidence: Evidence = TRUSTED
    wishes: MountWishes = WISHES
    rule: str | None = "images"
    verdict: Verdict = Verdict.DENY

    def decide(self) -> Decision:
        return decide(Policy(tuple(self.rules)), self.caller, self.source, self.evidence, self.wishes)


def wish(*options: str, read_only: bool = True) -> MountWishes:
    return replace(WISHES, options=options, read_only=read_only)


def grants(*options: str) -> Rule:
    return rule(replace(GRANT, options=options))


def memory(**changes: object) -> Rule:
    assert MEMORY.grant is not None
    return replace(MEMORY, grant=replace(MEMORY.grant, **changes))  # type: ignore[arg-type]


ALLOWED = [
    Row("at its location", [rule()]),
    Row("anywhere root-owned", [ANY_IMAGE], rule="any"),
    Row("type as asked", [rule()], wishes=replace(WISHES, file_system_type="ext4")),
    Row("option granted", [grants("acl")], wishes=wish("acl")),
    Row("restricting needs no grant", [rule()], wishes=wish(*RESTRICTING, "ro", "defaults")),
    Row("second rule", [rule(name="no", caller=CallerMatch(users=frozenset({5}))), rule()]),
    Row("by user", [rule(caller=CallerMatch(users=frozenset({5, 1000})))]),
    Row("by gid", [rule(caller=CallerMatch(groups=frozenset({1000})))]),
    Row("by supplementary group", [rule(caller=CallerMatch(groups=frozenset({5, 500})))]),
    Row("host", [rule(caller=CallerMatch(host=True, nested=False))]),
    Row("not the host", [rule(caller=CallerMatch(host=False))], caller=NESTED),
    Row("nested", [rule(caller=CallerMatch(nested=True))], caller=NESTED),
    Row("not nested", [rule(caller=CallerMatch(nested=False))]),
    Row("own by place", [rule(caller=CallerMatch(user_namespace="own"))], caller=NESTED),
    Row("own by descriptor", [rule(caller=CallerMatch(user_namespace="own"))],
        wishes=replace(WISHES, namespace_given=True)),
    Row("none", [rule(caller=CallerMatch(user_namespace="none"))]),
    Row("all of it", [rule(caller=CallerMatch(users=frozenset({1000}), groups=frozenset({500}),
        host=True))]),
    Row("idmap", [rule(replace(GRANT, idmap=("caller",)))], wishes=replace(WISHES, idmap_kind="caller")),
    Row("read-write", [rule(GRANT_WRITE)], evidence=WRITABLE, wishes=WRITE),
    Row("rw", [rule(GRANT_WRITE)], evidence=WRITABLE, wishes=wish("rw", read_only=False)),
    Row("writable descriptor of host root", [rule()], caller=ROOT, evidence=WRITABLE),
    Row("tmpfs", [rule(), MEMORY], source=tmpfs(), wishes=WRITE, rule="memory"),
    Row("largest tmpfs", [MEMORY], source=tmpfs(1 << 20, 256), wishes=WRITE, rule="memory"),
    Row("tmpfs inodes", [memory(max_inodes=9)], source=tmpfs(1, 9), wishes=WRITE, rule="memory"),
    Row("read-only tmpfs", [MEMORY], source=tmpfs(), wishes=replace(WISHES, file_system_type="tmpfs"),
        rule="memory"),
    Row("tmpfs option", [memory(options=("huge",))], source=tmpfs(), wishes=wish("huge=never"),
        rule="memory"),
]  # fmt: skip


@pytest.mark.parametrize("row", ALLOWED, ids=lambda row: row.name)
def test_allowed(row: Row) -> None:
    decision = row.decide()
    assert decision.error is None
    assert decision.verdict is Verdict.ALLOW
    assert decision.rule == row.rule
    assert decision.trusted_by == (None if row.source.tmpfs else "root-owned")
    assert decision.read_only is row.wishes.read_only
    assert decision.hint is None
    step = decision.steps[-1]
    assert (step.rule, step.applies, step.reason) == (row.rule, True, decision.reason)
    assert all(not step.applies and step.reason for step in decision.steps[:-1])


NOBODY = replace(USER, uid=OVERFLOW_ID, gid=OVERFLOW_ID, groups=frozenset({500, OVERFLOW_ID}))

REFUSED = [
    # No rule.
    Row("no rules", [], DeniedByPolicy, "the policy has no rules", "/etc/mountd/policy.d", rule=None),
    Row("elsewhere", [rule()], DeniedByPolicy, "it does not lie in a directory that a rule trusts",
        "an administrator can copy it, owned by root, to one of: /srv/images",
        evidence=replace(TRUSTED, root_owned_path="/opt/a"), rule=None),
    Row("deeper", [rule()], DeniedByPolicy, "does not lie in a directory",
        evidence=replace(TRUSTED, root_owned_path="/srv/images/x/a"), rule=None),
    Row("not root's", [rule()], DeniedByPolicy,
        "it does not lie in a directory that a rule trusts (/home/u belongs to uid 1000)",
        "one of: /srv/images", evidence=UNTRUSTED, rule=None),
    Row("nothing known", [rule()], DeniedByPolicy, "(where it lies is not known)",
        evidence=Evidence(None, None, False), rule=None),
    Row("location of others", [rule(caller=CallerMatch(users=frozenset({5})))], DeniedByPolicy,
        "no rule lets this caller mount an image", "/etc/mountd/policy.d", rule=None),
    Row("location denied only", [deny()], DeniedByPolicy, "no rule lets this caller mount an image",
        evidence=UNTRUSTED, rule=None),
    Row("no tmpfs", [rule()], DeniedByPolicy, "no rule lets this caller have a tmpfs", source=tmpfs(),
        rule=None),
    Row("only tmpfs", [MEMORY], DeniedByPolicy, "no rule lets this caller mount an image", rule=None),
    # Whom it is about.
    *(
        Row(name, [rule(caller=match)], DeniedByPolicy, caller=caller, rule=None)
        for name, match, caller in [
            ("other user", CallerMatch(users=frozenset({0, 500})), USER),
            ("other group", CallerMatch(groups=frozenset({0, 100})), USER),
            ("user but not group", CallerMatch(users=frozenset({1000}), groups=frozenset({5})), USER),
            ("user but nested", CallerMatch(users=frozenset({100000}), host=True), NESTED),
            ("unknown user", CallerMatch(users=frozenset({1000})), NOBODY),
            ("unknown user's group", CallerMatch(groups=frozenset({500})), NOBODY),
            ("host only", CallerMatch(host=True), NESTED),
            ("not host", CallerMatch(host=False), USER),
            ("nested only", CallerMatch(nested=True), USER),
            ("not nested", CallerMatch(nested=False), NESTED),
            ("own", CallerMatch(user_namespace="own"), USER),
            ("none, nested", CallerMatch(user_namespace="none"), NESTED),
        ]
    ),
    Row("none, given", [rule(caller=CallerMatch(user_namespace="none"))], DeniedByPolicy,
        wishes=replace(WISHES, namespace_given=True), rule=None),
    # What the rule says.
    Row("denied", [deny(), rule()], DeniedByPolicy, "the rule denies it", rule="no"),
    Row("denied to all", [deny(image=ImageMatch(any=True)), MEMORY], DeniedByPolicy, "the rule denies it",
        source=tmpfs(), rule="no"),
    Row("ask", [rule(verdict=Verdict.ASK)], InteractiveAuthenticationRequired,
        "an administrator has to consent (polkit): only root can change the image", "--interactive",
        verdict=Verdict.ASK),
    Row("ask first", [rule(verdict=Verdict.ASK, name="a"), rule()], InteractiveAuthenticationRequired,
        "(polkit)", verdict=Verdict.ASK, rule="a"),
    Row("ask, but not satisfied", [rule(replace(GRANT, file_systems=("xfs",)), verdict=Verdict.ASK)],
        DeniedByPolicy, "the rule grants xfs"),
    Row("ask, but not immutable", [replace(ANY_IMAGE, verdict=Verdict.ASK)], NotImmutable,
        evidence=UNTRUSTED, rule="any"),
    Row("first rule decides", [rule(replace(GRANT, file_systems=("xfs",)), name="1"), rule()],
        DeniedByPolicy, "the rule grants xfs", rule="1"),
    # What it requires.
    Row("any, but not root's", [ANY_IMAGE], NotImmutable, "/home/u belongs to uid 1000",
        "an administrator can copy it", evidence=UNTRUSTED, rule="any"),
    Row("any, not root's, host root", [ANY_IMAGE], NotImmutable, evidence=UNTRUSTED, caller=ROOT,
        rule="any"),
    Row("writable descriptor", [rule()], NotImmutable, "the caller's descriptor can write to it",
        "open the image read-only (O_RDONLY)", evidence=WRITABLE),
    Row("writable descriptor, granted, read-only wish", [rule(GRANT_WRITE)], NotImmutable,
        "the caller's descriptor can write to it", evidence=WRITABLE),
    Row("writable descriptor, granted, ro", [rule(GRANT_WRITE)], NotImmutable, evidence=WRITABLE,
        wishes=wish("ro", read_only=False)),
    Row("writable descriptor, write wish", [rule()], NotImmutable, "",
        "open the image read-only (O_RDONLY) and ask for a read-only mount", evidence=WRITABLE,
        wishes=WRITE),
    Row("writable descriptor of a namespace's root", [rule()], NotImmutable, evidence=WRITABLE,
        caller=NESTED_ROOT),
    # What it grants.
    Row("file system", [rule()], DeniedByPolicy, "the image is xfs, and the rule grants erofs, ext4",
        source=image("xfs")),
    Row("nothing recognised", [rule()], UnsupportedFileSystem, "nothing was recognised",
        source=replace(image(), file_system=None)),
    Row("other type", [rule()], InvalidImage, "erofs was asked for, but the image holds ext4",
        wishes=replace(WISHES, file_system_type="erofs")),
    Row("odd type", [rule()], InvalidImage, "a\\nb was asked for",
        wishes=replace(WISHES, file_system_type="a\nb")),
    Row("read-write", [rule()], OptionNotPermitted, "rule “images” grants read-only access",
        "ask for a read-only mount", wishes=WRITE),
    Row("read-write, host root", [rule()], OptionNotPermitted, "read-only access", evidence=WRITABLE,
        caller=ROOT, wishes=WRITE),
    Row("read-write erofs", [rule(GRANT_WRITE)], OptionNotPermitted, "erofs cannot be written to",
        source=image("erofs"), evidence=WRITABLE, wishes=WRITE),
    Row("read-write, descriptor is not", [rule(GRANT_WRITE)], BadFileDescriptor,
        "source.imageFileDescriptor: it is open read-only, but readOnly is false", wishes=WRITE),
    Row("idmap", [rule()], DeniedByPolicy, "does not grant the idmap “caller”", "ask for one of: none",
        wishes=replace(WISHES, idmap_kind="caller")),
    Row("no idmap", [rule(replace(GRANT, idmap=("namespace",)))], DeniedByPolicy, "the idmap “none”"),
    Row("odd idmap", [rule()], DeniedByPolicy, "“x\\n”", wishes=replace(WISHES, idmap_kind="x\n")),
    # Options.
    Row("option", [rule()], OptionNotPermitted, "rule “images” does not grant it", wishes=wish("acl")),
    Row("option of another", [grants("acl")], OptionNotPermitted, "does not grant it", wishes=wish("noacl")),
    Row("unknown option", [rule()], OptionNotPermitted, "never passes it to ext4", "acl",
        wishes=wish("journal_path=/dev/sda")),
    Row("strictatime", [rule(replace(GRANT, flags=("noatime",)))], OptionNotPermitted,
        "the rule sets noatime", wishes=wish("strictatime")),
    Row("suid", [rule()], OptionNotPermitted, "only the host's administrator", wishes=wish("suid"),
        rule=None),
    Row("suid, host root", [rule()], OptionNotPermitted, "only the host's administrator",
        wishes=wish("suid"),
        caller=ROOT, rule=None),
    Row("malformed", [rule()], OptionNotPermitted, "control character", wishes=wish("a\n"), rule=None),
    Row("rw of a read-only request", [rule()], OptionNotPermitted, "the request is read-only",
        wishes=wish("rw"), rule=None),
    Row("too many options", [rule()], LimitExceeded, "mount options", wishes=wish(*["nodev"] * 99),
        rule=None),
    # tmpfs.
    *(
        Row(f"tmpfs of {size}", [MEMORY], LimitExceeded, "at most 1048576 bytes in a tmpfs", "from 1 to",
            source=tmpfs(size), rule="memory")
        for size in (-1, 0, (1 << 20) + 1)
    ),
    *(
        Row(f"{inodes} inodes of 9", [memory(max_inodes=9)], LimitExceeded, "at most 9 inodes in a tmpfs",
            "ask for inodes from 1 to 9", source=tmpfs(1, inodes), rule="memory")
        for inodes in (None, -1, 0, 10)
    ),
    *(
        Row(f"{inodes} inodes", [MEMORY], LimitExceeded, "at most 256 inodes in a tmpfs",
            source=tmpfs(1, inodes), rule="memory")
        for inodes in (0, 257)
    ),
    Row("tmpfs of another type", [MEMORY], UnsupportedFileSystem, "ext4 was asked for", source=tmpfs(),
        wishes=replace(WISHES, file_system_type="ext4"), rule="memory"),
    Row("tmpfs read-write", [memory(access=Access.READ_ONLY)], OptionNotPermitted, "read-only access",
        source=tmpfs(), wishes=WRITE, rule="memory"),
    Row("tmpfs idmap", [MEMORY], DeniedByPolicy, "the idmap “namespace”", source=tmpfs(),
        wishes=replace(WISHES, idmap_kind="namespace"), rule="memory"),
    Row("tmpfs size as option", [MEMORY], OptionNotPermitted, "never passes it to tmpfs", source=tmpfs(),
        wishes=wish("size=1g"), rule="memory"),
    Row("tmpfs by a rule for any", [ANY_IMAGE, MEMORY], DeniedByPolicy, "the rule is about images",
        "kind = “tmpfs”", source=tmpfs(), rule="any"),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_refused(row: Row) -> None:
    decision = row.decide()
    assert type(decision.error) is row.error
    assert decision.verdict is row.verdict
    assert decision.rule == row.rule
    assert row.reason in decision.reason
    assert row.hint in (decision.hint or "")
    assert decision.reason.isprintable()
    assert decision.error is not None
    assert decision.error.message.isprintable()
    assert decision.error.hint == decision.hint
    if row.verdict is Verdict.DENY:
        assert decision.trusted_by is None
        assert (decision.read_only, decision.attributes, decision.options) == (True, frozenset(), ())
    assert [step.rule for step in decision.steps if step.applies] == ([row.rule] if row.rule else [])
    if isinstance(decision.error, DeniedByPolicy | NotImmutable):
        assert decision.error.parameters.get("rule") == row.rule
        assert decision.error.parameters["reason"] == decision.reason


@pytest.mark.parametrize(
    ("caller", "flags", "options", "attributes"),
    [
        (USER, (), (), {"nosuid", "nodev"}),
        (NESTED, (), (), {"nosuid", "nodev"}),
        (NESTED_ROOT, (), (), {"nosuid", "nodev"}),
        (POWERLESS_ROOT, (), (), {"nosuid", "nodev"}),
        (ROOT, (), (), set()),
        (ROOT, ("nosuid",), ("noexec",), {"nosuid", "noexec"}),
        (USER, ("noexec",), (), {"nosuid", "nodev", "noexec"}),
        (USER, (), ("nosymfollow", "strictatime"), {"nosuid", "nodev", "nosymfollow", "strictatime"}),
        (USER, ("noatime",), ("relatime",), {"nosuid", "nodev", "noatime"}),
    ],
)
def test_attributes(
    caller: Caller, flags: tuple[str, ...], options: tuple[str, ...], attributes: set[str]
) -> None:
    policy = Policy((rule(replace(GRANT, flags=flags)),))
    assert decide(policy, caller, image(), TRUSTED, wish(*options)).attributes == attributes


def test_options_are_passed_on() -> None:
    policy = Policy((grants("acl", "discard"),))
    decision = decide(policy, USER, image(), TRUSTED, wish("noexec", "acl", "ro", "discard"))
    assert decision.options == ("acl", "discard")


def test_ro_makes_read_only() -> None:
    decision = decide(Policy((rule(),)), USER, image(), TRUSTED, wish("ro", read_only=False))
    assert decision.error is None
    assert decision.read_only


def test_steps_say_why_not() -> None:
    rules = [
        MEMORY,
        rule(name="elsewhere", image=ImageMatch(location=("/opt/*", "/usr/x/*"))),
        rule(name="here", image=ImageMatch(location=("/home/u/*",))),
        rule(name="mine", image=ImageMatch(any=True), caller=CallerMatch(users=frozenset({5}))),
        rule(name="own", image=ImageMatch(any=True), caller=CallerMatch(user_namespace="own")),
    ]
    decision = decide(Policy(tuple(rules)), USER, image(hint="/home/u/a"), UNTRUSTED, WISHES)
    reasons = [(step.rule, step.reason) for step in decision.steps]
    assert reasons == [
        ("memory", "it is about a tmpfs, and the source is an image"),
        ("elsewhere", "the image is not proven to lie at /opt/*, /usr/x/*: /home/u belongs to uid 1000"),
        ("here", "the image seems to lie at /home/u/*, but /home/u belongs to uid 1000"),
        ("mine", "the caller's uid 1000 is not among its users"),
        ("own", "the caller has no user namespace of its own"),
    ]
    assert decision.steps[1].hint == "an administrator can copy it, owned by root, to one of: /opt, /usr/x"
    assert not any(step.applies for step in decision.steps)


def test_hint_names_each_directory_once_and_few() -> None:
    patterns = tuple(f"/d{number}/*.{end}" for number in range(9) for end in ("raw", "img"))
    decision = decide(Policy((rule(image=ImageMatch(location=patterns)),)), USER, image(), UNTRUSTED, WISHES)
    assert (decision.hint or "").endswith("to one of: /d0, /d1, /d2, /d3, /d4, …")


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        ({"require": None}, "require"),
        ({"grant": None}, "grant"),
        ({"grant": Grant()}, "grant.file-systems"),
        ({"verdict": Verdict.DENY}, "require"),
        ({"image": ImageMatch(kind="tmpfs")}, "require"),
    ],
)
def test_no_half_rule_can_be_made(parts: dict[str, object], key: str) -> None:
    with pytest.raises(PolicyValueError) as raised:
        replace(rule(), **parts)  # type: ignore[arg-type]
    assert raised.value.key == key


def test_no_half_match_can_be_made() -> None:
    for make in (ImageMatch, CallerMatch, lambda: Require(()), lambda: CallerMatch(users=frozenset())):
        with pytest.raises(PolicyValueError):
            make()


texts = st.text(max_size=12)
some_options = st.sampled_from(["acl", "discard", "compress", "rw", "ro", "suid", "relatime", "strictatime"])
wishes = st.builds(
    MountWishes,
    read_only=st.booleans(),
    file_system_type=st.none() | st.sampled_from(["ext4", "erofs", "tmpfs"]) | texts,
    options=st.lists(some_options | st.sampled_from(sorted(RESTRICTING)) | texts, max_size=4).map(tuple),
    idmap_kind=st.sampled_from(IDMAP_KINDS) | texts,
    namespace_given=st.booleans(),
)
sources = st.builds(image, st.sampled_from(["ext4", "erofs", "xfs"]), st.none() | texts | st.just(PATH)) | (
    st.builds(tmpfs, st.integers(-5, 1 << 21), st.none() | st.integers(-5, 300))
)
evidences = st.builds(
    Evidence, st.none() | st.sampled_from([PATH, "/opt/a"]), st.none() | st.just("why"), st.booleans()
)
callers = st.sampled_from([USER, ROOT, NESTED, NESTED_ROOT, NOBODY])
RULES = [
    rule(),
    replace(rule(GRANT_WRITE, name="w"), caller=CallerMatch(users=frozenset({1000}))),
    rule(replace(GRANT_WRITE, options=("acl", "discard"), flags=("noatime",), idmap=IDMAP_KINDS), name="o"),
    ANY_IMAGE,
    MEMORY,
    deny(caller=CallerMatch(nested=True)),
    rule(name="ask", verdict=Verdict.ASK, caller=CallerMatch(user_namespace="own")),
]
policies = st.lists(st.sampled_from(RULES), max_size=4).map(lambda rules: Policy(tuple(rules)))


@settings(max_examples=500, deadline=None)
@given(policies, callers, sources, evidences, wishes)
def test_every_outcome_is_a_decision(
    policy: Policy, caller: Caller, source: Source, evidence: Evidence, wishes: MountWishes
) -> None:
    decision = decide(policy, caller, source, evidence, wishes)
    assert decision.reason.isprintable()
    asked = decision.verdict is Verdict.ASK
    assert asked == isinstance(decision.error, InteractiveAuthenticationRequired)
    if decision.verdict is not Verdict.DENY:
        assert asked or decision.error is None
        assert decision.rule is not None
        assert source.tmpfs is not None or evidence.root_owned_path is not None
        assert decision.read_only >= wishes.read_only
        assert caller.is_host_root or decision.attributes >= {"nosuid", "nodev"}
        assert set(decision.options) <= {"acl", "discard"}
    else:
        assert decision.verdict is Verdict.DENY
        assert decision.error is not None


@settings(max_examples=500, deadline=None)
@given(policies, callers, sources, evidences, wishes, st.sampled_from(sorted(RESTRICTING)))
def test_a_restriction_never_allows(
    policy: Policy, caller: Caller, source: Source, evidence: Evidence, wishes: MountWishes, more: str
) -> None:
    before = decide(policy, caller, source, evidence, wishes)
    narrowed = replace(wishes, options=(*wishes.options, more))
    after = decide(policy, caller, source, evidence, narrowed)
    if after.verdict is Verdict.ALLOW:
        assert before.verdict is Verdict.ALLOW
        assert after.attributes == before.attributes | {more}
        assert (after.read_only, after.options) == (before.read_only, before.options)


@settings(max_examples=300, deadline=None)
@given(policies, callers, sources, evidences, wishes)
def test_ro_is_the_same_as_read_only(
    policy: Policy, caller: Caller, source: Source, evidence: Evidence, wishes: MountWishes
) -> None:
    by_option = decide(policy, caller, source, evidence, replace(wishes, options=(*wishes.options, "ro")))
    by_field = decide(policy, caller, source, evidence, replace(wishes, read_only=True))
    assert (by_option.verdict, by_option.rule, by_option.reason) == (
        by_field.verdict, by_field.rule, by_field.reason,
    )  # fmt: skip
    if by_option.verdict is Verdict.ALLOW:
        assert by_option.read_only
