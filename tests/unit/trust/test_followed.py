"""The image policy that a decision followed: read from its text, it has the same image used as it was."""

from __future__ import annotations

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from mountd.errors import DeniedByPolicy, InvalidImage, UnsupportedFileSystem
from mountd.evidence.model import Evidence
from mountd.source.model import (
    Disk,
    FileSystem,
    Partition,
    PartitionVerity,
    Source,
    SourceKind,
    VeritySuperblock,
    Window,
)
from mountd.trust.followed import followed
from mountd.trust.image_policy import DESIGNATORS, ImagePolicy, described, parse, refusal
from mountd.trust.partitions import Use, uses

WINDOW = Window(1, 1)
EROFS = FileSystem("erofs", 1, 1, None, None, False)
VERITY = PartitionVerity(VeritySuperblock(4096, 4096, 1, 1, "sha256", b"", None), bytes(32), WINDOW, WINDOW)


def part(designator: str, *, verity: bool = False) -> Partition:
    """A partition with a file system, but for what protects others."""
    found = None if "-verity" in designator or designator in ("swap", "esp") else EROFS
    read_only = "-verity" in designator  # as systemd-repart makes it
    return Partition(
        designator, 1, "", "", None, WINDOW, read_only, False, found, None, VERITY if verity else None
    )


def told(source: Source, wished: str | None, signed: frozenset[str], by: str | None = None) -> str:
    """What a client is told."""
    evidence = Evidence(None, "", False, signed_partitions=signed)
    return described(followed(source, evidence, by, None if wished is None else parse(wished)))


def disk_of(*parts: Partition, only_verity: bool) -> Source:
    return Source(SourceKind.IMAGE, None, None, None, disk=Disk(512, "", parts, only_verity))


ROOT = frozenset({"root"})
SIGNED = "root=absent+signed+unused:usr=absent+signed+unused"
HASHES = (part("root-verity"), part("root-verity-sig"))


@pytest.mark.parametrize(
    ("only_verity", "signed", "wished", "expected"),
    [
        (False, ROOT, None, "*"),
        (False, ROOT, "root=verity:home=absent", "root=verity:home=absent"),
        (True, ROOT, None, SIGNED),
        (True, ROOT, "*", SIGNED),
        # To want less protection than there is, or less than is needed, leaves what there is.
        (True, ROOT, "root=verity", "root=signed"),
        (True, ROOT, "root=unprotected+absent", "root=absent+signed"),
        (True, frozenset(), "root=verity", "root=verity"),
        (True, frozenset(), "root=open", "root=absent+unused+verity"),
        (True, ROOT, "root=open:root-verity=open:=absent", "root=absent+signed+unused:=absent"),
    ],
)
def test_what_a_client_is_told(
    only_verity: bool, signed: frozenset[str], wished: str | None, expected: str
) -> None:
    source = disk_of(part("root", verity=True), part("home"), *HASHES, only_verity=only_verity)
    assert told(source, wished, signed) == expected


def test_of_an_image_without_partitions() -> None:
    source = Source(SourceKind.IMAGE, None, EROFS, None)
    none: frozenset[str] = frozenset()
    assert told(source, None, none, "root-owned") == "*"
    assert told(source, "root=verity", none, "root-owned") == "root=verity"
    assert told(source, "root=verity:home=encrypted", none, "dm-verity") == "root=verity:home=encrypted"
    assert told(source, None, none, "dm-verity") == "root=absent+unused+verity"


FLAGS = st.lists(
    st.sampled_from(
        [
            "verity",
            "signed",
            "unprotected",
            "encrypted",
            "unused",
            "absent",
            "open",
            "ignore",
            "erofs",
            "ext4",
            "read-only-on",
            "read-only-off",
            "growfs-off",
        ]
    ),
    max_size=4,
).map("+".join)
RULES = st.dictionaries(
    st.sampled_from(["", "root", "usr", "home", "swap", "esp", *DESIGNATORS]), FLAGS, max_size=5
)
POLICIES = st.none() | RULES.map(lambda rules: ":".join(f"{name}={flags}" for name, flags in rules.items()))
PARTS = st.lists(st.sampled_from(["root", "root*", "usr", "usr*", "home", "srv", "swap"]), unique=True)


def used(disk: Disk, policy: ImagePolicy | None, signed: frozenset[str]) -> tuple[Use, ...]:
    try:
        return uses(disk, policy, signed, read_only=True)
    except (DeniedByPolicy, InvalidImage, UnsupportedFileSystem):
        reject()


@given(PARTS, st.frozensets(st.sampled_from(["root", "usr"])), POLICIES, st.booleans())
def test_the_image_is_used_by_it(
    names: list[str], signed: frozenset[str], wished: str | None, only_verity: bool
) -> None:
    parts: dict[str, Partition] = {}
    for name in names:
        designator = name.removesuffix("*")
        parts[designator] = part(designator, verity=name.endswith("*"))
        for suffix in ("-verity", "-verity-sig") if name.endswith("*") else ():
            if suffix == "-verity" or designator in signed:
                parts[designator + suffix] = part(designator + suffix)
    source = disk_of(*parts.values(), only_verity=only_verity)
    signed &= set(parts)
    assert source.disk is not None
    before = used(source.disk, None if wished is None else parse(wished), signed)
    evidence = Evidence(None, "", False, signed_partitions=signed)
    policy = followed(source, evidence, None, None if wished is None else parse(wished))
    assert uses(source.disk, parse(described(policy)), signed, read_only=True) == before
    for use in before:
        # It says no more than what was there.
        assert only_verity <= ("unprotected" not in policy.flags(use.partition.designator))


@given(POLICIES, st.booleans())
def test_an_image_without_partitions_is_used_by_it(wished: str | None, by_verity: bool) -> None:
    """As it was judged: `refusal` has nothing against it, before and after."""
    source = Source(SourceKind.IMAGE, None, EROFS, None)
    before = parse("*" if wished is None else wished)
    facts = {"file_system_type": "erofs", "verity": by_verity, "signed": False}
    if refusal(before, **facts) is not None:  # type: ignore[arg-type]
        reject()
    text = told(source, wished, frozenset(), "dm-verity" if by_verity else "root-owned")
    assert refusal(parse(text), **facts) is None  # type: ignore[arg-type]
