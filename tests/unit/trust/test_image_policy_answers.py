"""Which disk images a policy allows, and that systemd allows the same.

`image_policy_answers.json` has policies, and images by their partitions: what each is for, what is in it,
and how the table describes it. To each image belongs what `systemd-dissect --validate` of systemd 262 makes
of each of the policies, in their order: + for what it allows, - for what it refuses. Types of file systems
are no part of it, as that program does not look at them; neither is what mountd refuses with any policy.
tests/vm/newest/test_image_policy_validate.py asks that program some of it again.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mountd.errors import MountdError
from mountd.source import disk, gpt
from mountd.source.gpt import Entry
from mountd.source.model import Disk
from mountd.source.partition_types import PER_ARCHITECTURE, PROTECTED
from mountd.trust import image_policy
from mountd.trust.partitions import uses
from tests.disks import type_uuid
from tests.unit.trust.test_partitions import VERITY, VOLUME, partition

if TYPE_CHECKING:
    from mountd.source.model import Partition

Told = dict[str, str]
RECORD = json.loads(Path(__file__).with_name("image_policy_answers.json").read_text())
POLICIES: list[str] = RECORD["policies"]
IMAGES: list[tuple[list[Told], str]] = [
    (image["partitions"], image["answers"]) for image in RECORD["images"]
]
NATIVE = "x86-64"  # where the program was asked
FLAGS = {"read-only": gpt.READ_ONLY, "growfs": gpt.GROW}


def entry(number: int, told: Told) -> Entry:
    """A partition as the table has it."""
    designator = told["for"]
    architecture = told.get("architecture", NATIVE) if designator in PER_ARCHITECTURE else None
    type = type_uuid(designator, architecture)
    return Entry(
        number,
        type,
        str(number),
        number << 20,
        1 << 20,
        FLAGS.get(told.get("flag", ""), 0),
        told.get("label", ""),
    )


def filled(found: Partition, told: Told, others: set[str]) -> Partition:
    """What is in it, and what protects it."""
    contents = told.get("contents")
    inside = partition(found.designator, "erofs" if contents == "erofs" else None)
    locked = contents == "luks"
    protects = found.designator in PROTECTED and f"{found.designator}-verity" in others
    return replace(
        found,
        file_system=inside.file_system,
        contents="crypto_LUKS" if locked else None,
        luks=VOLUME if locked and found.designator == "home" else None,
        verity=VERITY if protects else None,
    )


def disk_of(parts: list[Told]) -> tuple[Disk, frozenset[str]]:
    """The image, and what is signed in it."""
    chosen = disk.choose([entry(number, told) for number, told in enumerate(parts)], "x86_64")
    names = {each.designator for each in chosen}
    signed = frozenset(each for each in PROTECTED if {f"{each}-verity", f"{each}-verity-sig"} <= names)
    return Disk(512, "", tuple(filled(each, parts[each.number], names) for each in chosen)), signed


def answer(parts: list[Told], policy: str) -> str:
    try:
        made, signed = disk_of(parts)
        uses(made, image_policy.parse(policy), signed, read_only=True)
    except MountdError:
        return "-"
    return "+"


def test_there_are_enough_of_both_kinds() -> None:
    answers = "".join(each for _, each in IMAGES)
    assert len(answers) == len(POLICIES) * len(IMAGES)
    assert min(answers.count("+"), answers.count("-")) > 400


@pytest.mark.parametrize(
    ("parts", "answers"),
    IMAGES,
    ids=[",".join("/".join(told.values()) for told in parts) for parts, _ in IMAGES],
)
def test_as_systemd_answers(parts: list[Told], answers: str) -> None:
    found = {policy: answer(parts, policy) for policy in POLICIES}
    assert found == dict(zip(POLICIES, answers, strict=True))
