"""Taking down in the ledger what is handed out: before it is made, for the limits, and before it leaves."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from mountd.errors import InUse, LimitExceeded
from mountd.kernel import compat, watch
from mountd.ledger.record import Record
from mountd.plan.idmap import IdMapKind
from mountd.source.model import SourceKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.fds import OwnedFd
    from mountd.ledger.book import Book, Reservation
    from mountd.service.context import RequestContext
    from mountd.service.mount import Judged

# Whose st_dev is not that of the superblock.
OWN_DEVICES = ("btrfs",)
UNKNOWN = "unknown"
USED = "another mount that is there has this directory for its top"
# Seconds: somebody else's clean-up after its reply may not have come to it.
PAUSES = (0.02, 0.1, 0.3, 0.6)


class Entry:
    """The entries of one request in the making, for a with statement: an exception frees their places."""

    __slots__ = ("_book", "_context", "_judged", "_places", "_seen")

    def __init__(self, judged: Judged, context: RequestContext) -> None:
        """Reserve a place for each mount, where there is a ledger. Raises LimitExceeded, SyscallError."""
        self._judged = judged
        self._context = context
        self._book: Book | None = context.ledger
        self._places: list[Reservation] = []
        self._seen: list[tuple[int, int]] = []  # watch and mark
        if self._book is None:
            return
        decision, caller = judged.decision, judged.caller
        owner = None if caller.is_host_root else caller.payer
        try:
            # A stack is one mount, and one by each rule that has allowed a layer of it.
            parts = [*judged.layers, *(() if judged.top is None else (judged.top,))]
            layers = [part.decision for part in parts] or [decision]
            (rule, maximum), *more = dict.fromkeys((each.rule, each.max_mounts) for each in layers)
            for _ in decision.uses or (None,):
                self._places.append(self._book.reserve(owner, rule, maximum, *more))
        except BaseException:
            self._give_back()
            raise
        context.claim = self.claim

    def __enter__(self) -> Entry:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._context.claim = None
        if kind is not None:
            self._give_back()

    def _give_back(self) -> None:
        while self._places:
            self._places.pop().give_back()

    def claim(self, name: str) -> None:
        """Take the top that is called `name` for the next mount, and for no other as long as that is there.

        Raises InUse, SyscallError. What has it may be just going.
        """
        for pause in (*PAUSES, None):
            try:
                if self._book is not None:
                    self._book.claim(self._places[len(self._seen)], name)
                return
            except LimitExceeded:
                if pause is None:
                    raise InUse(USED, hint="detach that one first") from None
            time.sleep(pause)

    def notice(self, mount: OwnedFd) -> None:
        """Watch over the next mount, whose ids are not mapped yet, and over its superblock."""
        if self._book is not None:
            watching = 0 if self._is_of_a_directory else self._book.watch(mount)
            self._seen.append((watching, self._book.mark(mount)))

    def take_down(self, mounts: Sequence[OwnedFd], *, sent: bool = True) -> list[int]:
        """Write down the mounts as they are handed out, and return their unique ids. Raises SyscallError.

        `sent` is whether they are going to be sent to the caller.
        """
        judged = self._judged
        found = [compat.mount_id_and_device(mount.fileno()) for mount in mounts]
        parts = [(use.type, use.read_only) for use in judged.decision.uses]
        parts = parts or [(file_system_of(judged), judged.decision.read_only)]
        for place, (watching, mark), (id, device), (type, read_only) in zip(
            self._places, self._seen, found, parts, strict=False
        ):
            if self._book is not None and watching and type in OWN_DEVICES:
                device = watch.watched(self._book.watches_fd).get(watching, device)
            record = self._record(id, watching, device, type, read_only=read_only, sent=sent)
            place.fill(replace(record, mark=mark))
        return [id for id, _ in found]

    @property
    def _is_of_a_directory(self) -> bool:
        """Whether the superblock is there without us, and has mounts that are none of ours."""
        return self._judged.inspected.source.directory is not None

    def _record(
        self, id: int, watch: int, device: tuple[int, int], type: str, *, read_only: bool, sent: bool
    ) -> Record:
        judged, decision, caller = self._judged, self._judged.decision, self._judged.caller
        superblock = not self._is_of_a_directory
        of_layers = bool(judged.layers) or judged.inspected.source.composefs is not None
        return Record(
            id=id,
            watch=watch,
            device=device,
            uid=caller.uid,
            owner=caller.owner_uid,
            roots_namespace=caller.roots_namespace,
            pid=caller.pid,
            source=self._context.notes.get("source", UNKNOWN),
            file_system=type,
            read_only=read_only,
            id_map=described(judged),
            since=int(time.time()),
            superblock=superblock,
            shared=superblock and read_only and not of_layers,
            sent=sent,
            unit=caller.unit,
            rule=decision.rule,
            trusted_by=decision.trusted_by,
            signer=decision.signer,
            digest=decision.digest or self._context.notes.get("digest"),
            layers=tuple(dict.fromkeys(self._context.layers)),
        )


handing_out = Entry


def file_system_of(judged: Judged) -> str:
    """Return the type of the file system that is mounted."""
    source = judged.inspected.source
    if source.directory is not None:
        return source.directory.file_system
    if source.kind is SourceKind.STACK or source.composefs is not None:
        return "overlay"
    return "tmpfs" if source.file_system is None else source.file_system.type


def described(judged: Judged) -> str:
    """Return how ids are mapped, for people."""
    kind = judged.request.idmap.kind
    if kind is not IdMapKind.RANGES:
        return kind.value
    uids = ", ".join(f"{each.inner}→{each.outer} ({each.count})" for each in judged.uids)
    gids = ", ".join(f"{each.inner}→{each.outer} ({each.count})" for each in judged.gids)
    return f"uids {uids or 'none'}; gids {gids or 'none'}"
