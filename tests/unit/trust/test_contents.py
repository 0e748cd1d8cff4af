"""composefs: which rules are about descriptions, and when contents have to be checked or are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mountd.evidence.model import Evidence, Objects, Ownership, Proof
from mountd.source.model import Composefs, Directory, FileSystem, Source, SourceKind
from mountd.trust.decide import Decision, decide
from mountd.trust.policy import Access, Grant, ImageMatch, PolicyValueError, Require, Rule, Verdict
from mountd.trust.policy_lint import lint
from tests.policies import ANYBODY, LOCATED, NOWHERE, USER, WISHES, deny, image, policy, rule

DIRECTORY = Directory(1, 2, 3, 0, 0, opened=True, read_only=False, file_system="ext4", path_hint=None)
PLAIN = Composefs((DIRECTORY,), verity=False, digest=None)
MADE = Source(
    SourceKind.COMPOSEFS, None, FileSystem("erofs", 0, 4096, None, None, False), None, composefs=PLAIN
)
GRANT = Grant(("erofs",))
NONE = "it has no fs-verity"
ROOTS = Objects(Ownership.ROOT, None, NONE)
OWN = Objects(Ownership.CALLER, "it is caller-owned", NONE)
OTHERS = Objects(Ownership.OTHER, "it belongs to uid 7", NONE)


def checkable(objects: Objects) -> Objects:
    return replace(objects, unverifiable=None)


def about(*integrity: str, match: ImageMatch | None = None, grant: Grant = GRANT) -> Rule:
    found = match or ImageMatch(kind="composefs")
    return Rule("r", "a.toml: r", found, ANYBODY, Require(integrity), grant, Verdict.ALLOW)


def made(*objects: Objects, digests: bool = True) -> Evidence:
    proofs = [Proof("regenerated")]
    if digests and all(each.unverifiable is None for each in objects):
        proofs.append(Proof("composefs-verity"))
    return replace(NOWHERE, proofs=tuple(proofs), objects=objects)


def judge(evidence: Evidence, source: Source = MADE, used: Rule | None = None) -> Decision:
    return decide(policy(used or about("regenerated")), USER, source, evidence, WISHES)


def of_image(composefs: Composefs = PLAIN) -> Source:
    return replace(image("erofs"), composefs=composefs)


def judge_image(*objects: Objects, composefs: Composefs = PLAIN) -> Decision:
    return judge(replace(LOCATED, objects=objects), of_image(composefs), rule())


def name(decision: Decision) -> str:
    return "" if decision.error is None else type(decision.error).__name__


@pytest.mark.parametrize("objects", [ROOTS, OWN])
def test_contents_of_a_description_are_the_caller_s_business(objects: Objects) -> None:
    decision = judge(made(objects))
    assert (decision.verdict, decision.trusted_by, decision.verify) == (Verdict.ALLOW, "regenerated", False)
    assert "nothing checks the contents" in decision.reason
    assert {"nosuid", "nodev"} <= decision.attributes


def test_but_not_what_others_can_change() -> None:
    assert name(judge(made(OTHERS))) == "DeniedByPolicy"
    assert name(judge(made(ROOTS, OTHERS))) == "DeniedByPolicy"
    assert judge(made(checkable(OTHERS))).verify
    assert name(judge(made(checkable(OTHERS), digests=False))) == "DeniedByPolicy"


def test_a_rule_can_want_them_checked() -> None:
    strict = about("composefs-verity")
    decision = judge(made(checkable(OWN)), used=strict)
    assert (decision.trusted_by, decision.verify) == ("composefs-verity", True)
    for evidence in (made(OWN), made(checkable(OWN), ROOTS), made(checkable(OWN), digests=False)):
        assert name(judge(evidence, used=strict)) == "NotImmutable"


def test_contents_of_an_image_cannot_change() -> None:
    decision = judge_image(ROOTS, ROOTS)
    assert (decision.trusted_by, decision.verify) == ("root-owned", False)
    assert "only root can change the contents" in decision.reason
    for objects in (OWN, OTHERS, replace(ROOTS, problem="others can change what is in it")):
        assert name(judge_image(ROOTS, objects)) == "NotImmutable"
        checked = judge_image(checkable(ROOTS), checkable(objects))
        assert (checked.verdict, checked.verify) == (Verdict.ALLOW, True)
        assert "fs-verity checks the contents" in checked.reason


def test_what_is_asked_for() -> None:
    asked = replace(PLAIN, verity=True)
    assert judge_image(checkable(ROOTS), composefs=asked).verify
    assert name(judge_image(ROOTS, composefs=asked)) == "NotSupported"
    assert judge(made(checkable(OWN)), replace(MADE, composefs=asked)).verify
    assert name(judge(made(checkable(OWN), digests=False), replace(MADE, composefs=asked))) == "NotSupported"
    named = replace(PLAIN, digest="0" * 64)
    assert judge_image(checkable(ROOTS), composefs=named).verify
    assert not judge_image(ROOTS, composefs=named).verify
    assert name(judge_image(OWN, composefs=named)) == "NotImmutable"


@pytest.mark.parametrize(
    "match",
    [ImageMatch(kind="image"), ImageMatch(location=("/srv/images/*",)), ImageMatch(kind="directory")],
)
def test_rules_about_something_else(match: ImageMatch) -> None:
    require = Require((), ownership=("caller",)) if match.kind == "directory" else Require(("root-owned",))
    grant = Grant() if match.kind == "directory" else GRANT
    other = Rule("o", "a.toml: o", match, ANYBODY, require, grant, Verdict.ALLOW)
    decision = judge(made(OWN), used=other)
    assert (decision.verdict, decision.rule) == (Verdict.DENY, None)


def test_no_image_is_what_mountd_has_made() -> None:
    everything = about("regenerated", match=ImageMatch(any=True))
    assert judge(made(OWN), used=everything).verdict is Verdict.ALLOW
    for kind in ("sealed", "stored", "fs-verity"):
        found = replace(NOWHERE, proofs=(Proof(kind),), objects=(ROOTS,))
        assert name(judge(found, of_image(), everything)) == "NotImmutable"
    # And what mountd has made is nothing that a rule trusts for another reason.
    others = rule(require=Require(("sealed", "stored", "root-owned")))
    assert name(judge(made(OWN), used=others)) == "NotImmutable"
    assert judge(made(OWN), used=deny()).verdict is Verdict.DENY


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        ({"require": Require(("regenerated", "stored"))}, "require.integrity"),
        ({"require": Require(("regenerated",), signature="team")}, "require"),
        ({"grant": Grant(("erofs", "ext4"))}, "grant.file-systems"),
        ({"grant": Grant(("erofs",), access=Access.READ_WRITE)}, "grant.access"),
        ({"image": ImageMatch(kind="image")}, "require.integrity"),
    ],
)
def test_no_such_rule(parts: dict[str, object], key: str) -> None:
    with pytest.raises(PolicyValueError) as caught:
        replace(about("regenerated"), **parts)  # type: ignore[arg-type]
    assert caught.value.key == key


def test_a_rule_about_images_does_not_hide_one_about_descriptions() -> None:
    images = rule("images", image=ImageMatch(kind="image"))
    found = lint(policy(images, replace(about("regenerated"), name="later")))
    assert not [each for each in found if each.rule is not None]
