"""What systemd makes of texts, and that it is the same here.

`image_policies.json` has texts, each with what `systemd-analyze image-policy` of systemd 257 prints of it:
null for what it refuses, else how a partition may be used, and whether its flags about read-only and growing
have to be on (yes), off (no) or may be either (-). Left out is what is ignored. The texts are those that
somebody has thought of, and others put together at random from words, blanks and mistakes.
tests/systemd/test_image_policy_program.py asks that program again.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mountd.errors import InvalidParameter
from mountd.trust.image_policy import DESIGNATORS, NOT_USED, USES, ImagePolicy, parse

Told = dict[str, str]
TEXTS: list[tuple[str, Told | None]] = [
    (text, told) for text, told in json.loads(Path(__file__).with_name("image_policies.json").read_text())
]
# systemd 257 has no word for it, and “open” is without it.
NEWER = frozenset({"encryptedwithintegrity"})
ORDER = ("verity", "signed", "encrypted", "unprotected", "unused", "absent")
IGNORED = "ignore - -"


def as_printed(flags: frozenset[str]) -> str:
    """Flags in the words of systemd-analyze."""
    uses = flags & USES - NEWER
    words = "open" if uses == USES - NEWER else "+".join(each for each in ORDER if each in uses) or "-"
    words = "ignore" if uses == NOT_USED else words
    columns = [words]
    for name in ("read-only", "growfs"):
        # Of what has to be absent, nothing else is said.
        either = {f"{name}-on", f"{name}-off"} <= flags or uses == {"absent"}
        columns.append("-" if either else "yes" if f"{name}-on" in flags else "no")
    return " ".join(columns)


def printed(policy: ImagePolicy) -> Told:
    """A policy as systemd-analyze prints it, without what is ignored."""
    told = {designator: as_printed(policy.flags(designator)) for designator in DESIGNATORS}
    return {name: words for name, words in told.items() if words != IGNORED}


def test_there_are_enough_of_both_kinds() -> None:
    refused = sum(told is None for _, told in TEXTS)
    assert refused >= 100
    assert len(TEXTS) - refused >= 150
    assert len({text for text, _ in TEXTS}) == len(TEXTS)


@pytest.mark.parametrize(("text", "told"), TEXTS)
def test_the_same_as_systemd(text: str, told: Told | None) -> None:
    if told is None:
        with pytest.raises(InvalidParameter):
            parse(text)
    else:
        assert printed(parse(text)) == told


@pytest.mark.parametrize(
    "text", ["root=ext4", "root=erofs+verity", "=squashfs+absent", "usr=encryptedwithintegrity"]
)
def test_words_of_later_systemd(text: str) -> None:
    """systemd 257 refuses these, and 262 does not."""
    assert parse(text)


@pytest.mark.parametrize(
    "text", [r"root\=verity", r"ro\ot=verity", r"root=veri\ty", "root=verity\\", r"root=open\:usr=open"]
)
def test_no_backslash(text: str) -> None:
    """systemd drops those that are before another character: nobody can mean that."""
    with pytest.raises(InvalidParameter):
        parse(text)
