"""What the policy says of encrypted images: whether they may be opened, and then what may be in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mountd.errors import (
    BadFileDescriptor,
    DeniedByPolicy,
    InteractiveAuthenticationRequired,
    InvalidImage,
    NotImmutable,
    OptionNotPermitted,
)
from mountd.source.model import FileSystem, Luks, Source, SourceKind
from mountd.trust.decide import Decision, decide
from mountd.trust.image_policy import parse
from mountd.trust.policy import Grant, Policy, PolicyValueError, Rule, Verdict
from mountd.trust.policy_file import PolicyError, load
from tests.policies import GRANT, GRANT_WRITE, LOCATED, NOWHERE, USER, WISHES, image, proven, rule

VOLUME = Luks(2, None, None, "aes-xts-plain64", 64, 512, 1 << 18, 1 << 18, 0, 1 << 17, 1 << 14, 0)
LOCKED = replace(image(), file_system=None, luks=VOLUME)
GRANTED = replace(GRANT, encrypted=True)
WRITABLE = replace(GRANT_WRITE, encrypted=True)


def opened(type: str = "ext4") -> Source:
    return replace(LOCKED, file_system=FileSystem(type, 1, 1, None, None, False))


def judged(source: Source, grant: Grant = GRANTED, evidence: object = LOCATED, **wishes: object) -> Decision:
    return decide(Policy((rule(grant=grant),)), USER, source, evidence, replace(WISHES, **wishes))  # type: ignore[arg-type]


def refused(decision: Decision, error: type[Exception], text: str) -> None:
    assert decision.verdict is Verdict.DENY
    assert type(decision.error) is error, decision
    assert text in decision.reason


@pytest.mark.parametrize("source", [LOCKED, opened()], ids=["locked", "opened"])
def test_a_grant_of_its_own(source: Source) -> None:
    decision = judged(source)
    assert decision.verdict is Verdict.ALLOW
    assert ("takes its password" in decision.reason) is (source is LOCKED)
    assert judged(image()).verdict is Verdict.ALLOW
    refused(judged(source, GRANT), DeniedByPolicy, "does not grant that it is opened")
    assert "encrypted = true" in (judged(source, GRANT).hint or "")
    # What is required of an image is required of the ciphertext.
    refused(judged(source, evidence=NOWHERE), NotImmutable, "uid 1000")
    assert judged(source, evidence=proven("stored")).verdict is Verdict.ALLOW


def test_what_is_in_it_is_judged_once_it_is_known() -> None:
    refused(judged(opened("xfs")), DeniedByPolicy, "the image is xfs")
    assert judged(LOCKED, file_system_type="erofs").verdict is Verdict.ALLOW
    refused(judged(opened(), file_system_type="erofs"), InvalidImage, "holds ext4")
    assert judged(LOCKED, options=("discard",)).verdict is Verdict.ALLOW
    refused(judged(opened(), options=("discard",)), OptionNotPermitted, "discard")
    granted = replace(GRANTED, options=("discard",))
    assert judged(opened(), granted, options=("discard",)).options == ("discard",)


def test_writing() -> None:
    evidence = replace(LOCATED, descriptor_writable=True)
    for source in (LOCKED, opened()):
        assert not judged(source, WRITABLE, evidence, read_only=False).read_only
        refused(judged(source, GRANTED, read_only=False), OptionNotPermitted, "read-only access")
        refused(judged(source, WRITABLE, LOCATED, read_only=False), BadFileDescriptor, "open read-only")
        refused(judged(source, WRITABLE, proven("stored"), read_only=False), OptionNotPermitted, "stored")
    refused(judged(opened("erofs"), WRITABLE, evidence, read_only=False), OptionNotPermitted, "erofs cannot")


@pytest.mark.parametrize("source", [LOCKED, opened()], ids=["locked", "opened"])
def test_image_policies(source: Source) -> None:
    for text in ("*", "root=encrypted", "root=encrypted+unprotected", "root=open", "root=encrypted+ext4"):
        assert judged(source, image_policy=parse(text)).verdict is Verdict.ALLOW, text
    for text in ("root=unprotected", "root=verity+signed", "root=unused", "root=absent", "-", "~"):
        refused(judged(source, image_policy=parse(text)), DeniedByPolicy, "imagePolicy refuses it")
    known = judged(source, image_policy=parse("root=encrypted+xfs"))
    assert known.verdict is (Verdict.ALLOW if source is LOCKED else Verdict.DENY)
    evidence = replace(LOCATED, descriptor_writable=True)
    policy = parse("root=encrypted+read-only-on")
    refused(
        judged(source, WRITABLE, evidence, read_only=False, image_policy=policy), DeniedByPolicy, "read-only"
    )


def test_who_is_encrypted_only_is_not_plain() -> None:
    refused(
        judged(image(), image_policy=parse("root=encrypted")),
        DeniedByPolicy,
        "and the image is unp",
    )


def test_asking() -> None:
    asks = Policy((rule(grant=GRANTED, verdict=Verdict.ASK),))
    for source in (LOCKED, opened()):
        decision = decide(asks, USER, source, LOCATED, WISHES)
        assert decision.verdict is Verdict.ASK
        assert type(decision.error) is InteractiveAuthenticationRequired


def test_nothing_at_all_is_not_allowed() -> None:
    nothing = Source(SourceKind.IMAGE, LOCKED.backing, None, None)
    assert judged(nothing).verdict is Verdict.DENY


TOML = """
[[rule]]
name = "a"
image = {image}
caller = {{ any = true }}
{rest}
verdict = "allow"
"""
REQUIRE = 'require = { integrity = ["root-owned"] }\ngrant = { file-systems = ["ext4"]'


def loaded(directory: Path, image: str, rest: str) -> Rule:
    directory.chmod(0o755)
    (directory / "a.toml").write_text(TOML.format(image=image, rest=rest))
    return load([directory]).rules[0]


@pytest.mark.parametrize(
    ("said", "meant"), [("", False), (", encrypted = false", False), (", encrypted = true", True)]
)
def test_in_a_file(tmp_path: Path, said: str, meant: bool) -> None:
    found = loaded(tmp_path, '{ location = "/srv/*" }', f"{REQUIRE}{said} }}")
    assert found.grant is not None
    assert found.grant.encrypted is meant


@pytest.mark.parametrize(
    ("image", "rest"),
    [
        ('{ location = "/srv/*" }', f'{REQUIRE}, encrypted = "yes" }}'),
        ('{ location = "/srv/*" }', f"{REQUIRE}, encrypted = 1 }}"),
        ('{ kind = "tmpfs" }', 'grant = { max-size = "1M", encrypted = true }'),
        ('{ kind = "directory" }', 'require = { ownership = ["caller"] }\ngrant = { encrypted = true }'),
        (
            '{ kind = "composefs" }',
            'require = { integrity = ["regenerated"] }\n'
            'grant = { file-systems = ["erofs"], encrypted = true }',
        ),
    ],
)
def test_what_a_file_cannot_say(tmp_path: Path, image: str, rest: str) -> None:
    with pytest.raises(PolicyError, match="grant.encrypted"):
        loaded(tmp_path, image, rest)


def test_a_rule_that_cannot_be() -> None:
    with pytest.raises(PolicyValueError, match="grant.encrypted"):
        replace(rule(), image=replace(rule().image, any=False, kind="tmpfs"), require=None,
                grant=Grant(max_size=1, encrypted=True))  # fmt: skip
