"""Which records are of mounts that are still there, where a superblock alone does not tell.

A superblock may have been cloned for several mounts, and is kept for a while for those to come; and what was
not mounted by mountd, such as a directory, has a superblock that stays. Then the mark on the mount tells;
without one, a mount is there if it is attached somewhere, or something of it is open. A copy of it that the
receiver has made has another id, and no mark; while there are copies of a superblock that belong to nobody,
no mount of it is taken for gone; nor while it is there, and nothing tells why.

A record without a watch, as those are whose watches were lost, tells of a superblock by its device number
alone, which the kernel gives to the next one once that is gone. It is proven to be the same while the mount
itself is there: marked, attached or open, by its id, which no other ever gets. If it is not there, something
with the number of the superblock and the type of its file system may be a copy of the mount, or may have
nothing to do with it: that the number was in use without a gap cannot be known afterwards. Then the record
stays, so that the limit counts it and the host's root sees where to look, but what is there is not taken for
the owner's: nobody else is told of it, and Revoke does not detach it. A new watch could only be had by the
way to where something is attached, which leads through directories of others; so there is none.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.ledger import find

if TYPE_CHECKING:
    from mountd.ledger.book import Book
    from mountd.ledger.find import Attachment, Device
    from mountd.ledger.record import Record

YOUNG = 5.0  # seconds in which a mount without a mark may be on its way to who asked for it


@dataclass(frozen=True, slots=True)
class Live:
    """A mount that is there, and where it, or a copy of it, is attached.

    `kept` is whether mountd keeps the superblock for those who may ask for the same again. `unsure` is what
    may be a copy of it, or may be none: for people, and nothing is to be done to that. If there is any,
    nothing else tells that the mount is there. `partly` is whether there are so many mounts on this system
    that not all were looked at.
    """

    record: Record
    attached: tuple[Attachment, ...]
    kept: bool = False
    unsure: tuple[Attachment, ...] = ()
    partly: bool = False


def settled(book: Book, records: list[Record]) -> list[Live]:
    """Find out which of `records` are there, and have the book forget the others.

    Raises SyscallError, NotSupported.
    """
    devices = {record.device for record in records if record.superblock}
    ids = {record.id for record in records}
    everywhere, all_looked_at = find.attachments(devices, ids, frozenset()) if records else ([], True)
    attached = [each for each in everywhere if each.namespace not in book.hidden]
    kept = {each.device for each in everywhere if each.namespace in book.hidden}
    copied = {each.device for each in attached if each.id not in ids}
    sure = book.sure(records)
    unsure = [record for record in records if record.id not in sure and (not record.watch or record.shared)]
    proven = sure | {each.id for each in attached}
    # Of what was not looked at, nothing is known, and nothing is forgotten.
    seen = set(proven) if all_looked_at else proven | ids
    if any(record.id not in seen for record in unsure):
        # A descriptor of it keeps a mount that is attached nowhere.
        # btrfs has other device numbers for files than for the superblock.
        uses, complete = find.uses({record.device for record in unsure}, {record.id for record in unsure})
        proven |= {use.id for use in uses}
        seen |= proven if complete else ids
        copied |= {use.device for use in uses if use.id not in ids}
    now = time.time()
    gone = {
        record.id
        for record in unsure
        if record.id not in seen
        and not (has_device(record) and record.device in copied)
        and not (record.sent and not record.mark and now - record.since <= YOUNG)
    }
    gone -= held_unseen(book, records, gone, kept)
    known = {record.id for record in records if is_known(record, proven)} - gone
    perhaps = maybe_copies(records, known, [each for each in attached if each.id not in ids])
    gone -= perhaps.keys()
    if gone:
        book.forget(gone)
    living = [record for record in records if record.id not in gone]
    places = belonging(living, known, attached)
    return [
        Live(
            record,
            tuple(places[record.id]),
            has_device(record) and record.device in kept,
            tuple(perhaps.get(record.id, ())),
            partly=not all_looked_at,
        )
        for record in living
    ]


def in_use(book: Book, devices: set[Device]) -> set[Device]:
    """Return which superblocks have a mount that was handed out, or are a layer of one. Raises SyscallError.

    By the marks alone: the superblocks are there in any case, as mountd itself keeps them.
    """
    records = book.records()
    sure = book.sure(records)
    used = [record for record in records if record.id in sure]
    return devices & {device for record in used for device in (record.device, *record.layers)}


def maybe_copies(
    records: list[Record], known: set[int], copies: list[Attachment]
) -> dict[int, list[Attachment]]:
    """Return what may be copies of mounts that are not there themselves: the id of the record -> those.

    Of a superblock that is known, there is no doubt; and only the youngest of the others with its number
    can be one that is there.
    """
    found: dict[int, list[Attachment]] = {}
    told = {record.device for record in records if record.id in known}
    for record in sorted(records, key=lambda record: record.id, reverse=True):
        if record.superblock and record.device not in told:
            told.add(record.device)
            same = (record.device, record.file_system)
            if alike := [each for each in copies if (each.device, each.file_system) == same]:
                found[record.id] = alike
    return found


def held_unseen(book: Book, records: list[Record], gone: set[int], kept: set[Device]) -> set[int]:
    """Return the ids of those in `gone` whose superblock is there for no reason that could be found.

    It is not one that mountd keeps (`kept`). There is much that keeps a mount and that nobody can list: a
    descriptor on its way between two sockets, a mapping of a file, another file system made from it.
    """
    found = {record.device for record in records if record.id not in gone} | kept
    lost = [record for record in records if record.id in gone and has_device(record)]
    return {record.id for record in lost if record.device not in found and book.is_there(record)}


def belonging(
    records: list[Record], known: set[int], attached: list[Attachment]
) -> dict[int, list[Attachment]]:
    """Return where mounts are attached, by their ids; copies count for the oldest that they may be of.

    `known` are the ids of the records whose superblock is there for sure.
    """
    found: dict[int, list[Attachment]] = {record.id: [] for record in records}
    first: dict[Device, int] = {}
    for record in records:
        if record.id in known:
            first.setdefault(record.device, record.id)
    for each in attached:
        id = each.id if each.id in found else first.get(each.device)
        if id is not None:
            found[id].append(each)
    return found


def is_known(record: Record, proven: set[int]) -> bool:
    """Tell whether the number of its superblock is its own; `proven` are ids of mounts that are there."""
    return has_device(record) or (record.superblock and record.id in proven)


def has_device(record: Record) -> bool:
    """Whether the device number tells what belongs to it: without a watch, it may be another's by now."""
    return record.superblock and record.watch != 0
