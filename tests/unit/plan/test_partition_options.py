"""Options for one partition only: judged by themselves, and in the plan of that one alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mountd.errors import OptionNotPermitted
from mountd.kernel.flags import MountAttr
from mountd.plan.idmap import IdMapKind
from mountd.plan.operations import CreateSuperblock, MakeMount, Plan
from mountd.plan.planner import plan_mounts
from mountd.source.model import Luks, Source
from mountd.trust.decide import Decision, decide
from mountd.trust.policy import Policy
from tests.policies import GRANT, GRANT_WRITE, LOCATED, USER, WISHES, disk_image, image, rule

TWO = disk_image(("root", "home"), "ext4")
TWO = replace(TWO, backing=replace(TWO.backing, changed=1))  # type: ignore[type-var]
ACL = replace(GRANT, options=("acl",))


def decided(
    source: Source, *each: tuple[str, tuple[str, ...]], policy: Policy, **wishes: object
) -> Decision:
    wished = replace(WISHES, partition_options=each, **wishes)  # type: ignore[arg-type]
    return decide(policy, USER, source, replace(LOCATED, descriptor_writable=not wished.read_only), wished)


def allowed(*each: tuple[str, tuple[str, ...]], source: Source = TWO, **wishes: object) -> tuple[Plan, ...]:
    grant = GRANT_WRITE if wishes else ACL
    decision = decided(source, *each, policy=Policy((rule(grant=grant),)), **wishes)
    assert decision.error is None
    return plan_mounts(source, decision, USER, IdMapKind.NONE)


def superblock(plan: Plan) -> CreateSuperblock:
    return next(each for each in plan.operations if isinstance(each, CreateSuperblock))


def attributes(plan: Plan) -> MountAttr:
    return next(each for each in plan.operations if isinstance(each, MakeMount)).attributes


def test_they_are_in_the_plan_of_their_partition() -> None:
    plain = allowed()
    root, home = allowed(("home", ("noexec", "acl")), ("srv", ("dev", "nonsense")))
    assert root == plain[0]
    assert attributes(home) == attributes(plain[1]) | MountAttr.NOEXEC
    assert ("acl", None) in superblock(home).options
    assert ("acl", None) not in superblock(root).options


def test_what_differs_in_them_is_not_shared() -> None:
    """Nobody gets a clone of a mount that has other attributes, or that was told something else."""
    names = [allowed(*each)[1].shared for each in ((), (("home", ("noexec",)),), (("home", ("acl",)),))]
    assert None not in names
    assert len(set(names)) == 3
    assert allowed(("root", ("noexec",)))[1].shared == names[0]


def test_one_is_read_only() -> None:
    root, home = allowed(("root", ("ro",)), read_only=False)
    assert (superblock(root).read_only, superblock(home).read_only) == (True, False)
    assert MountAttr.RDONLY in attributes(root)
    assert MountAttr.RDONLY not in attributes(home)


def test_what_has_no_partitions_is_the_root() -> None:
    (plan,) = allowed(("root", ("noexec",)), ("home", ("suid",)), source=image("ext4"))
    assert MountAttr.NOEXEC in attributes(plan)


@pytest.mark.parametrize(
    ("options", "more", "text"),
    [
        (("strictatime",), {"options": ("noatime",)}, "contradicts noatime"),
        (("noatime",), {"options": ("strictatime",)}, "contradicts noatime"),
        (("noatime", "strictatime"), {}, "contradicts noatime"),
        (("suid",), {}, "only the host's administrator"),
        (("discard",), {}, "does not grant it"),
        (("rw",), {}, "read-only"),
        (("noexec",) * 65, {}, "64"),
    ],
)
def test_refused(options: tuple[str, ...], more: dict[str, object], text: str) -> None:
    for source, designator in ((TWO, "home"), (TWO, "root"), (image("ext4"), "root")):
        policy = Policy((rule(grant=ACL),))
        error = decided(source, (designator, options), policy=policy, **more).error
        assert error is not None
        assert text in error.message
        if "64" not in text:
            assert isinstance(error, OptionNotPermitted)


def test_a_rule_that_sets_noatime() -> None:
    policy = Policy((rule(grant=replace(GRANT, flags=("noatime",))),))
    error = decided(TWO, ("home", ("strictatime",)), policy=policy).error
    assert error is not None
    assert "the rule sets noatime" in error.message


def test_what_is_encrypted_is_judged_once_it_is_open() -> None:
    """Before that, nobody knows of which file system the option would be."""
    assert TWO.disk is not None
    luks = Luks(2, None, None, "aes-xts-plain64", 64, 512, 1 << 18, 1 << 18, 0, 1 << 17, 1 << 14, 0)
    root, home = TWO.disk.partitions
    policy = Policy((rule(grant=replace(GRANT, encrypted=True)),))

    def decision(**fields: object) -> Decision:
        parts = (root, replace(home, contents="crypto_LUKS", luks=luks, **fields))  # type: ignore[arg-type]
        source = replace(TWO, disk=replace(TWO.disk, partitions=parts))  # type: ignore[type-var]
        return decided(source, ("home", ("acl",)), policy=policy)

    assert decision(file_system=None).error is None
    assert isinstance(decision().error, OptionNotPermitted)
