"""Directories: which rule is about them, whose it trusts, and which ids may be mapped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mountd.caller.model import FOREIGN
from mountd.evidence.model import Evidence, Ownership
from mountd.source.model import Directory, Source, SourceKind
from mountd.trust.decide import Decision, decide
from mountd.trust.policy import (
    Access,
    Grant,
    ImageMatch,
    Policy,
    PolicyValueError,
    Require,
    Rule,
    Verdict,
)
from mountd.trust.policy_lint import lint
from mountd.trust.wishes import MountWishes
from tests.policies import ANYBODY, ROOT, USER, WISHES, deny, image, policy, rule

AT = "/srv/trees/one"
DIRECTORY = Directory(1, 2, 3, 1000, 1000, opened=True, read_only=False, file_system="ext4", path_hint=AT)
EVERY = ("none", "namespace", "caller", "ranges")
GRANT = Grant(access=Access.READ_WRITE, idmap=EVERY)
BASE = FOREIGN.start


def about(
    *ownership: str, grant: Grant = GRANT, location: tuple[str, ...] = (), name: str = "directories"
) -> Rule:
    match = ImageMatch(kind="directory", location=location)
    return Rule(
        name, f"a.toml: {name}", match, ANYBODY, Require((), ownership=ownership), grant, Verdict.ALLOW
    )


def evidence(ownership: Ownership) -> Evidence:
    path = AT if ownership is Ownership.ROOT else None
    problem = "it belongs to uid 7" if ownership is Ownership.OTHER else None
    return Evidence(path, None, False, ownership=ownership, ownership_problem=problem)


def judge(
    rules: Policy | Rule,
    ownership: Ownership = Ownership.CALLER,
    wishes: MountWishes = WISHES,
    directory: Directory = DIRECTORY,
) -> Decision:
    source = Source(SourceKind.DIRECTORY, None, None, None, directory=directory)
    used = rules if isinstance(rules, Policy) else policy(rules)
    return decide(used, USER, source, evidence(ownership), wishes)


def refused(decision: Decision) -> str:
    assert decision.verdict is Verdict.DENY
    assert decision.error is not None
    return type(decision.error).__name__


@pytest.mark.parametrize("ownership", [Ownership.CALLER, Ownership.FOREIGN, Ownership.ROOT])
def test_a_rule_trusts_whom_it_names(ownership: Ownership) -> None:
    reading = replace(GRANT, access=Access.READ_ONLY)
    for trusted in ("caller", "foreign", "root"):
        decision = judge(about(trusted, grant=reading), ownership)
        if trusted == ownership:
            assert decision.verdict is Verdict.ALLOW
            assert decision.trusted_by == f"{ownership}-owned"
            assert {"nosuid", "nodev"} <= decision.attributes
        else:
            assert refused(decision) == "DeniedByPolicy"
            assert f"the rule trusts what is {trusted}-owned" in decision.reason


def test_nobody_trusts_what_is_somebody_elses() -> None:
    everybodys = about("caller", "foreign", "root")
    assert refused(judge(everybodys, Ownership.OTHER)) == "DeniedByPolicy"
    source = Source(SourceKind.DIRECTORY, None, None, None, directory=DIRECTORY)
    of_root = decide(policy(everybodys), ROOT, source, evidence(Ownership.OTHER), WISHES)
    assert refused(of_root) == "DeniedByPolicy"


@pytest.mark.parametrize("match", [ImageMatch(any=True), ImageMatch(location=("/srv/trees/*",))])
def test_a_rule_about_images_allows_no_directory_but_one_that_denies_does(match: ImageMatch) -> None:
    allowing = judge(rule(image=match), Ownership.ROOT)
    assert refused(allowing) == "DeniedByPolicy"
    assert allowing.rule is None
    assert judge(policy(rule(image=match), about("root", grant=Grant())), Ownership.ROOT).error is None
    denying = judge(policy(deny(image=match), about("root", grant=Grant())), Ownership.ROOT)
    assert denying.rule == "no"


def test_a_rule_about_directories_is_about_no_image() -> None:
    decision = decide(policy(about("root", grant=Grant())), USER, image(), Evidence(AT, None, False), WISHES)
    assert refused(decision) == "DeniedByPolicy"


def test_a_location_is_a_proven_one() -> None:
    there = about("root", grant=Grant(), location=("/srv/trees/*",))
    assert judge(there, Ownership.ROOT).error is None
    for ownership in (Ownership.CALLER, Ownership.OTHER):
        assert "not proven to lie at" in str(judge(there, ownership).error) or (
            "seems to lie at" in str(judge(there, ownership).error)
        )
    elsewhere = about("root", grant=Grant(), location=("/srv/other/*",))
    assert refused(judge(elsewhere, Ownership.ROOT)) == "DeniedByPolicy"


WRITING = replace(WISHES, read_only=False)


def test_writing() -> None:
    assert not judge(about("caller"), wishes=WRITING).read_only
    everybodys = about("caller", "root", "foreign")
    assert refused(judge(everybodys, Ownership.ROOT, WRITING)) == "OptionNotPermitted"
    on_read_only = replace(DIRECTORY, read_only=True)
    assert refused(judge(everybodys, wishes=WRITING, directory=on_read_only)) == "OptionNotPermitted"
    reading = replace(GRANT, access=Access.READ_ONLY)
    assert refused(judge(about("caller", grant=reading), wishes=WRITING)) == "OptionNotPermitted"


RANGES = [
    (Ownership.CALLER, ((1000, 1),), ((1000, 1),), True),
    (Ownership.CALLER, ((1000, 2),), ((1000, 1),), False),
    (Ownership.CALLER, ((1000, 1), (0, 1)), ((1000, 1),), False),
    (Ownership.CALLER, ((1000, 1),), ((0, 1),), False),
    (Ownership.CALLER, ((999, 2),), ((1000, 1),), False),
    (Ownership.CALLER, ((BASE, 1),), ((BASE, 1),), False),
    (Ownership.FOREIGN, ((BASE, 65536),), ((BASE, 65536),), True),
    (Ownership.FOREIGN, ((BASE - 1, 2),), ((BASE, 1),), False),
    (Ownership.FOREIGN, ((BASE, 65537),), ((BASE, 1),), False),
    (Ownership.FOREIGN, ((1000, 1),), ((BASE, 1),), False),
    (Ownership.ROOT, ((0, 65536),), ((0, 65536),), True),
]


@pytest.mark.parametrize(("ownership", "uids", "gids", "good"), RANGES)
def test_ids_on_disk(
    ownership: Ownership, uids: tuple[tuple[int, int], ...], gids: tuple[tuple[int, int], ...], good: bool
) -> None:
    wishes = replace(WISHES, idmap_kind="ranges", disk_uids=uids, disk_gids=gids)
    decision = judge(about("caller", "root", "foreign"), ownership, wishes)
    assert (decision.error is None) is good, decision.reason


def test_overlay_is_not_idmapped() -> None:
    overlay = replace(DIRECTORY, file_system="overlay")
    assert judge(about("caller"), directory=overlay).error is None
    mapped = judge(about("caller"), wishes=replace(WISHES, idmap_kind="caller"), directory=overlay)
    assert refused(mapped) == "UnsupportedFileSystem"


def test_without_access_only_the_owner() -> None:
    path_only = replace(DIRECTORY, opened=False)
    assert judge(about("caller"), directory=path_only).error is None
    found = judge(about("root", grant=Grant()), Ownership.ROOT, directory=path_only)
    assert refused(found) == "BadFileDescriptor"


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Require((), ownership=("nobody",)), "require.ownership"),
        (lambda: Require(("root-owned",), ownership=("root",)), "require.ownership"),
        (lambda: about(), "require.integrity"),
        (lambda: about("root"), "grant.access"),
        (lambda: about("caller", location=("/home/*",)), "require.ownership"),
        (lambda: about("root", grant=Grant(("erofs",))), "grant.file-systems"),
        (lambda: about("root", grant=Grant(options=("acl",))), "grant.options"),
        (lambda: rule(require=Require((), ownership=("root",))), "require.ownership"),
        (lambda: ImageMatch(kind="image", location=("/srv/*",)), "image"),
        (lambda: ImageMatch(kind="directory", any=True), "image"),
    ],
)
def test_rules_that_cannot_be(make: object, key: str) -> None:
    with pytest.raises(PolicyValueError) as caught:
        make()  # type: ignore[operator]
    assert caught.value.key == key


def test_what_hides_a_rule_about_directories() -> None:
    later = about("root", grant=Grant(), location=("/srv/*",))
    for earlier, hidden in (
        (rule(), False),
        (deny(), True),
        (about("caller", name="all"), True),
        (about("root", grant=Grant(), location=("/etc/*",), name="there"), False),
    ):
        found = [each for each in lint(policy(earlier, later)) if each.rule == later.name]
        assert bool(found) is hidden, earlier.name
