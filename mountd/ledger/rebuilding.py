"""Writing the ledger anew, where its directory was removed while there are mounts.

What mountd has attached for callers is written down elsewhere as well: who asked, when, and by which rule.
Of all else that was handed out there are the watches, each of which tells of a superblock; where it is
attached tells what, and where, and nothing tells whose it is. So that is nobody's, and counts for nobody.

Where the image was is lost, with its digest and signer; and so is what is attached nowhere. The limits of
rules do not count what is written anew.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from mountd.errors import LimitExceeded, NotSupported, SyscallError
from mountd.kernel import mount_info, watch
from mountd.kernel.flags import MountAttr
from mountd.ledger import find
from mountd.ledger.record import Record

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mountd.ledger.book import Book
    from mountd.ledger.find import Device

UNKNOWN = "unknown"
NOBODY = 0xFFFFFFFF  # no user can have this


class Attached(Protocol):
    """What is known of a mount that mountd has attached for somebody: its unique id, who asked, and when."""

    @property
    def id(self) -> int:
        """The unique id."""

    @property
    def namespace(self) -> int:
        """The id of the mount namespace, 0 if that is not known."""

    @property
    def uid(self) -> int:
        """The user of the host who asked."""

    @property
    def rule(self) -> str | None:
        """The rule that allowed it."""

    @property
    def since(self) -> int:
        """Seconds since 1970."""


def rebuild(book: Book, attached: Iterable[Attached]) -> None:
    """Write down all that is still there, as far as it is known, in a book that was just begun.

    Raises OSError, SyscallError.
    """
    watches = {device: number for number, device in watch.watched(book.watches_fd).items()}
    told = {record.id for record in book.records()}
    for each in attached:
        with suppress(SyscallError, NotSupported, LimitExceeded):
            if each.id not in told:
                # It was attached for a user of the host, who then pays for it.
                _write(book, (each.uid, 0), known(described(each.id, each.namespace, watches), each))
    devices = watches.keys() - {record.device for record in book.records()}
    if not devices:
        return  # as it is after every start of the system: no need to look everywhere for nothing
    with suppress(SyscallError, NotSupported, LimitExceeded):
        for place in sorted(find.attachments(devices, set(), book.hidden)[0], key=lambda place: place.id):
            if place.device in devices:
                devices.discard(place.device)
                _write(book, None, described(place.id, place.namespace, watches))


def described(id: int, namespace: int, watches: dict[Device, int]) -> Record:
    """Return what the kernel knows of the mount with this id. Raises SyscallError."""
    info = mount_info.statmount(id, namespace=namespace)
    return Record(
        id=id,
        watch=watches.get(info.sb_dev, 0),
        device=info.sb_dev,
        uid=NOBODY,
        owner=NOBODY,
        pid=0,
        source=UNKNOWN,
        file_system=info.fs_type or UNKNOWN,
        read_only=bool(info.attributes & MountAttr.RDONLY),
        id_map=UNKNOWN,
        since=int(time.time()),
        # Directories have no watch, and a superblock that is not mountd's.
        superblock=info.sb_dev in watches,
        sent=False,
    )


def known(record: Record, attached: Attached) -> Record:
    """Add to a record what was written down elsewhere.

    As the mark on the mount is not known, it is looked for by its id, like what may share its superblock.
    """
    uid, rule, since = attached.uid, attached.rule, attached.since
    return replace(record, uid=uid, owner=uid, rule=rule, since=since, shared=record.superblock)


def _write(book: Book, owner: tuple[int, int] | None, record: Record) -> None:
    place = book.reserve(owner, None, None)
    try:
        place.fill(record)
    except BaseException:
        place.give_back()
        raise
