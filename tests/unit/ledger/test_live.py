"""What may be copies of mounts that are known by the number of their superblock alone."""

from __future__ import annotations

from dataclasses import replace

from mountd.ledger.find import Attachment
from mountd.ledger.live import belonging, is_known, maybe_copies
from mountd.ledger.record import Record

LOST = Record(5, 0, (0, 9), 4000, 4000, 1, "/image", "erofs", True, "none", 1)
WATCHED = replace(LOST, id=6, watch=3)
COPY = Attachment(20, (0, 9), "/copy", 7, "erofs")


def test_a_copy_of_what_is_not_there_is_unsure() -> None:
    assert maybe_copies([LOST], set(), [COPY]) == {LOST.id: [COPY]}


def test_another_type_is_no_copy() -> None:
    assert maybe_copies([LOST], set(), [replace(COPY, file_system="ext4")]) == {}
    assert maybe_copies([LOST], set(), [replace(COPY, device=(0, 8))]) == {}


def test_a_directory_has_a_superblock_of_others() -> None:
    assert maybe_copies([replace(LOST, superblock=False)], set(), [COPY]) == {}


def test_a_number_that_a_known_superblock_has_is_no_others() -> None:
    assert is_known(WATCHED, set())
    assert maybe_copies([LOST, WATCHED], {WATCHED.id}, [COPY]) == {}


def test_of_several_only_the_youngest_can_be_there() -> None:
    younger = replace(LOST, id=7)
    assert maybe_copies([LOST, younger], set(), [COPY]) == {younger.id: [COPY]}


def test_what_is_there_by_its_id_has_its_copies() -> None:
    own = Attachment(LOST.id, (0, 9), "/own", 7, "erofs")
    assert not is_known(LOST, set())
    assert is_known(LOST, {LOST.id})
    assert not is_known(replace(LOST, superblock=False), {LOST.id})
    assert belonging([LOST], {LOST.id}, [own, COPY]) == {LOST.id: [own, COPY]}
    assert belonging([LOST], set(), [own, COPY]) == {LOST.id: [own]}
    younger = replace(LOST, id=8)
    assert belonging([LOST, younger], {LOST.id, younger.id}, [COPY, own]) == {LOST.id: [COPY, own], 8: []}
