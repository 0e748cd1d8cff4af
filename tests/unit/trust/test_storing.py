"""Who may have an image pulled into the store."""

from __future__ import annotations

import pytest

from mountd.trust.policy import CallerMatch, ImageMatch, Require, Rule, Verdict
from mountd.trust.storing import may_pull
from tests.policies import NESTED, USER, deny, memory, policy, rule

APP = "registry.example.com/team/app"
STORED = Require(("stored",), signature="containers-policy")


def pulled(*patterns: str, **parts: object) -> Rule:
    """A rule about what was pulled from `patterns`."""
    defaults = {
        "image": ImageMatch(registry=patterns or ("registry.example.com/team/*",)),
        "require": STORED,
    }
    return rule("pulled", **{**defaults, **parts})  # type: ignore[arg-type]


def test_no_rule_lets_nobody() -> None:
    assert not may_pull(policy(), USER, APP)


@pytest.mark.parametrize("pattern", ["registry.example.com/team/*", "registry.example.com/*", APP])
def test_a_rule_about_the_repository(pattern: str) -> None:
    assert may_pull(policy(pulled(pattern)), USER, APP)
    assert may_pull(policy(pulled("other.example.com/*", pattern)), USER, APP)


@pytest.mark.parametrize(
    "repository",
    [
        "registry.example.com/teams/app",
        "registry.example.com/team",
        "registry.example.com:5000/team/app",
        "registry.example.com.evil.test/team/app",
        "evil.test/registry.example.com/team/app",
        "registry.exarnple.com/team/app",
        "registry.example.com/Team/app",
        "registry.example.com/team/app:1.0",
        "registry.example.com/team/../other/app",
        "",
    ],
)
def test_a_rule_about_another_repository(repository: str) -> None:
    assert not may_pull(policy(pulled()), USER, repository)


@pytest.mark.parametrize(
    "image",
    [
        ImageMatch(any=True),
        ImageMatch(kind="image"),
        ImageMatch(signed="team"),
        ImageMatch(location=("/srv/*",)),
        ImageMatch(digest=("sha256:" + "1" * 64,)),
    ],
)
def test_a_rule_that_names_no_registry(image: ImageMatch) -> None:
    assert not may_pull(policy(pulled(image=image)), USER, APP)


def test_a_rule_that_wants_another_kind_of_immutability() -> None:
    assert not may_pull(policy(pulled(require=Require(("dm-verity", "sealed")))), USER, APP)


def test_a_rule_about_other_callers() -> None:
    assert not may_pull(policy(pulled(caller=CallerMatch(users=frozenset({7})))), USER, APP)
    assert may_pull(policy(pulled(caller=CallerMatch(users=frozenset({USER.uid})))), USER, APP)
    assert not may_pull(policy(pulled(caller=CallerMatch(host=True))), NESTED, APP)


def test_a_rule_that_does_not_allow() -> None:
    assert not may_pull(policy(pulled(verdict=Verdict.ASK)), USER, APP)
    assert not may_pull(policy(deny(image=ImageMatch(registry=(APP,)))), USER, APP)


@pytest.mark.parametrize(
    "image", [ImageMatch(any=True), ImageMatch(kind="image"), ImageMatch(registry=(APP,))]
)
def test_the_first_rule_decides(image: ImageMatch) -> None:
    assert not may_pull(policy(deny(image=image), pulled()), USER, APP)
    assert may_pull(policy(pulled(), deny(image=image)), USER, APP)
    others = deny(image=image, caller=CallerMatch(users=frozenset({7})))
    assert may_pull(policy(others, pulled()), USER, APP)


def test_a_rule_about_something_else_is_passed_over() -> None:
    others = ImageMatch(registry=("registry.example.com/other/*",))
    assert may_pull(policy(deny(image=others), pulled()), USER, APP)
    assert may_pull(policy(memory(), pulled()), USER, APP)
