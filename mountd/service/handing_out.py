"""Taking down in the ledger what is handed out: before it is made, for the limits, and before it leaves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mountd.kernel import compat, watch
from mountd.ledger.record import Record
from mountd.plan.idmap import IdMapKind

if TYPE_CHECKING:
    from mountd.fds import OwnedFd
    from mountd.ledger.book import Book, Reservation
    from mountd.service.context import RequestContext
    from mountd.service.mount import Judged

# Whose st_dev is not that of the superblock.
OWN_DEVICES = ("btrfs",)
UNKNOWN = "unknown"


class Entry:
    """One entry of the ledger in the making, for a with statement: an exception gives its place back."""

    __slots__ = ("_book", "_context", "_judged", "_place", "_watch")

    def __init__(self, judged: Judged, context: RequestContext) -> None:
        """Reserve a place, where there is a ledger. Raises LimitExceeded, SyscallError."""
        self._judged = judged
        self._context = context
        self._book: Book | None = context.ledger
        self._place: Reservation | None = None
        self._watch = 0
        if self._book is not None:
            decision = judged.decision
            caller = judged.caller
            owner = None if caller.is_host_root else caller.owner_uid
            self._place = self._book.reserve(owner, decision.rule, decision.max_mounts)

    def __enter__(self) -> Entry:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._place is not None:
            self._place.give_back()

    def watch(self, mount: OwnedFd) -> None:
        """Watch the superblock of a mount, whose ids are not mapped yet."""
        if self._book is not None:
            self._watch = self._book.watch(mount)

    def take_down(self, mount: OwnedFd, *, superblock: bool = True, sent: bool = True) -> int:
        """Write down the mount as it is handed out, and return its unique id. Raises SyscallError.

        `superblock` is whether it was made for this, `sent` whether it is going to be sent to the caller.
        """
        id, device = compat.mount_id_and_device(mount.fileno())
        if self._book is None or self._place is None:
            return id
        judged, decision = self._judged, self._judged.decision
        caller, file_system = judged.caller, file_system_of(judged)
        if self._watch and file_system in OWN_DEVICES:
            device = watch.watched(self._book.watches_fd).get(self._watch, device)
        self._place.fill(
            Record(
                id=id,
                watch=self._watch if superblock else 0,
                device=device,
                uid=caller.uid,
                owner=caller.owner_uid,
                pid=caller.pid,
                source=self._context.notes.get("source", UNKNOWN),
                file_system=file_system,
                read_only=decision.read_only,
                id_map=described(judged),
                since=int(time.time()),
                superblock=superblock,
                shared=superblock and decision.read_only,
                sent=sent,
                unit=caller.unit,
                rule=decision.rule,
                trusted_by=decision.trusted_by,
                signer=decision.signer,
                digest=decision.digest or self._context.notes.get("digest"),
            )
        )
        return id


handing_out = Entry


def file_system_of(judged: Judged) -> str:
    """Return the type of the file system that is mounted."""
    found = judged.inspected.source.file_system
    return "tmpfs" if found is None else found.type


def described(judged: Judged) -> str:
    """Return how ids are mapped, for people."""
    kind = judged.request.idmap.kind
    if kind is not IdMapKind.RANGES:
        return kind.value
    uids = ", ".join(f"{each.inner}→{each.outer} ({each.count})" for each in judged.uids)
    gids = ", ".join(f"{each.inner}→{each.outer} ({each.count})" for each in judged.gids)
    return f"uids {uids or 'none'}; gids {gids or 'none'}"
