"""The grammar of systemd.image-policy(7), read strictly, and that a policy can only narrow."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mountd.errors import InvalidParameter
from mountd.trust.image_policy import (
    DESIGNATORS,
    EVERYTHING,
    GROUPS,
    HOW_USED,
    TYPES,
    USES,
    ImagePolicy,
    described,
    parse,
    refusal,
)


def uses(text: str, designator: str = "root") -> set[str]:
    return set(parse(text).flags(designator) & USES)


@pytest.mark.parametrize(
    ("text", "designator", "expected"),
    [
        ("*", "root", USES),
        ("-", "root", {"unused", "absent"}),
        ("~", "root", {"absent"}),
        ("root=", "root", USES),
        ("root=open", "root", USES),
        ("=open", "usr", USES),
        ("=", "usr", USES),
        ("root=verity", "root", {"verity"}),
        ("root=verity+signed", "root", {"verity", "signed"}),
        ("root=verity+verity", "root", {"verity"}),
        ("root=verity:=absent", "root", {"verity"}),
        ("root=verity:=absent", "home", {"absent"}),
        ("root=verity", "home", {"unused", "absent"}),
        ("root=encryptedwithintegrity", "root", {"encryptedwithintegrity"}),
        ("root=ext4", "root", USES),
        ("root=read-only-on", "root", USES),
        # dm-verity's own partitions follow from the one that they protect.
        ("root=verity+absent", "root-verity", {"unprotected", "absent"}),
        ("root=verity", "root-verity-sig", {"unused", "absent"}),
        ("root=signed", "root-verity", {"unprotected"}),
        ("root=signed", "root-verity-sig", {"unprotected"}),
        ("root=unprotected", "root-verity", {"unused", "absent"}),
        ("root=signed:root-verity=absent", "root-verity", {"absent"}),
        ("usr=signed", "root-verity", {"unused", "absent"}),
    ],
)
def test_uses(text: str, designator: str, expected: set[str]) -> None:
    assert uses(text, designator) == expected


def test_groups_that_are_left_out_are_whole() -> None:
    assert parse("root=verity").flags("root") == HOW_USED | {"verity"}
    assert parse("root=verity+ext4").flags("root") & TYPES == {"ext4"}
    assert "read-only-off" not in parse("root=read-only-on").flags("root")
    assert parse("root=read-only-on+read-only-off") == parse("root=")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" ", "“ ” is not DESIGNATOR=FLAGS"),
        ("root", "not DESIGNATOR=FLAGS"),
        ("**", "not DESIGNATOR=FLAGS"),
        ("root=verity:", "not DESIGNATOR=FLAGS"),
        (":root=verity", "not DESIGNATOR=FLAGS"),
        ("root=verity::usr=", "not DESIGNATOR=FLAGS"),
        ("root=verity:root=open", "“root=” is there twice"),
        ("=verity:=open", "“=” is there twice"),
        ("Root=verity", "“Root” is no kind of partition"),
        ("ro ot=verity", "no kind of partition"),
        ("boot=verity", "“boot” is no kind of partition"),
        ("root=Verity", "“Verity” is no flag"),
        ("root=verity+", "“” is no flag"),
        ("root=+verity", "“” is no flag"),
        ("root=verity,signed", "is no flag"),
        ("root=verity=signed", "is no flag"),
        ("root=minix", "“minix” is no flag"),
        ("root=\n+verity", r"“” is no flag"),
        ("root=ver\nity", r"“ver\\nity” is no flag"),
        ("root=*", "“*” is no flag"),
        ("=" + "open+" * 2000, "longer than"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidParameter) as raised:
        parse(text)
    assert raised.value.parameters["parameter"] == "imagePolicy"
    assert reason.replace("\\\\", "\\") in raised.value.message
    assert raised.value.message.isprintable()


def judge(text: str, type: str = "ext4", *, verity: bool = False, signed: bool = False) -> str | None:
    return refusal(parse(text), file_system_type=type, verity=verity, signed=signed)


def test_a_bare_file_system_is_a_root_partition() -> None:
    assert judge("*") is None
    assert judge("root=unprotected") is None
    assert judge("=unprotected") is None
    assert judge("root=unprotected+ext4") is None
    assert "no use" in (judge("-") or "")
    assert "no use" in (judge("~") or "")
    assert "no use" in (judge("usr=unprotected") or "")
    assert "no use" in (judge("root=absent+unused:=open") or "")
    assert "ext4" in (judge("root=unprotected+erofs+xfs") or "")


def test_no_flag_of_a_bare_file_system_is_on() -> None:
    """They are those of a partition table, also if it is mounted read-only."""
    for flag in ("read-only", "growfs"):
        assert f"the flag {flag} of the root partition to be on" in (judge(f"root=open+{flag}-on") or "")
        assert judge(f"root=open+{flag}-off") is None
        assert judge(f"root=open+{flag}-off+{flag}-on") is None
        assert judge(f"root=open:home=open+{flag}-on") is None


def test_protection_is_the_least_that_is_wanted() -> None:
    assert "the image is unprotected" in (judge("root=verity") or "")
    assert judge("root=verity", verity=True) is None
    assert judge("root=verity", verity=True, signed=True) is None
    assert "the image is protected by dm-verity" in (judge("root=signed", verity=True) or "")
    assert judge("root=signed", verity=True, signed=True) is None
    assert judge("root=unprotected", verity=True, signed=True) is None
    assert judge("root=encrypted", verity=True, signed=True) is not None
    assert judge("root=encryptedwithintegrity", verity=True, signed=True) is not None


def test_what_programs_of_systemd_262_send_for_a_unit() -> None:
    every = "verity+signed+encrypted+encryptedwithintegrity+unprotected+absent"
    text = f"root={every}:usr={every}:home=encrypted+encryptedwithintegrity+unprotected+absent"
    assert judge(text) is None
    assert parse(described(parse(text))) == parse(text)


flags = st.lists(st.sampled_from([*sorted(EVERYTHING), "open"]), max_size=5).map("+".join)
rules = st.dictionaries(st.sampled_from(["", *DESIGNATORS]), flags, min_size=1, max_size=5)
policies = st.sampled_from(["*", "-", "~"]) | rules.map(
    lambda each: ":".join(f"{designator}={value}" for designator, value in each.items())
)
facts = st.fixed_dictionaries(
    {
        "file_system_type": st.sampled_from(["ext4", "erofs", "xfs"]),
        "verity": st.booleans(),
        "signed": st.booleans(),
    }
)


@given(st.text(alphabet="rotveiy=+:*-~ sgnd", max_size=30))
def test_anything_is_a_policy_or_refused(text: str) -> None:
    # Nothing else than the one error gets out.
    with contextlib.suppress(InvalidParameter):
        assert isinstance(parse(text), ImagePolicy)


def check_described(policy: ImagePolicy) -> None:
    again = parse(described(policy))
    assert again.default == policy.default
    assert [again.flags(each) for each in DESIGNATORS] == [policy.flags(each) for each in DESIGNATORS]
    assert described(again) == described(policy)


@given(policies)
def test_a_policy_that_is_described_is_the_same(text: str) -> None:
    check_described(parse(text))


@pytest.mark.parametrize("missing", GROUPS)
def test_what_cannot_be_said_is_not(missing: frozenset[str]) -> None:
    """An empty group would read as a whole one."""
    for impossible in (
        ImagePolicy({"root": EVERYTHING - missing}, EVERYTHING),
        ImagePolicy({}, EVERYTHING - missing),
    ):
        with pytest.raises(ValueError, match="cannot be said"):
            described(impossible)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("=open", "*"),
        ("", "-"),
        ("root=ignore", "-"),
        ("=absent:usr=absent", "~"),
        ("=-:root=-", "*"),
        ("root = verity + erofs", "root=erofs+verity"),
        ("usr=-:root=signed+absent:home=unused+absent", "root=absent+signed:usr=open"),
        ("home=unprotected+encrypted+encryptedwithintegrity+ignore", "home=open"),
        ("root=signed:root-verity=unprotected:root-verity-sig=absent", "root=signed:root-verity-sig=absent"),
    ],
)
def test_described(text: str, expected: str) -> None:
    assert described(parse(text)).replace("verity+erofs", "erofs+verity") == expected
