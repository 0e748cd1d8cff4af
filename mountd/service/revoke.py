"""io.mountd.Admin.Revoke: taking mounts back, wherever they are attached.

A mount can be detached, in any mount namespace; whoever has something of it open keeps that until it is
closed. So the answer says who that is.
"""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from mountd.errors import InvalidParameter, MountdError, NotFound, SyscallError
from mountd.execute import attachment as attaching
from mountd.execute import mount_table
from mountd.execute.attachment import Outcome
from mountd.kernel import capabilities
from mountd.ledger import find
from mountd.service.admin import admit
from mountd.service.listing import attachment, living
from mountd.service.phase import Phase

if TYPE_CHECKING:
    from mountd.fds import OwnedFd
    from mountd.ledger.find import Attachment
    from mountd.ledger.live import Live
    from mountd.ledger.record import Record
    from mountd.service.context import RequestContext
    from mountd.wire.dispatch import Handler, Reply

FIELDS = ("id", "digest", "uid")
UNSEEN = "no process shows it: a descriptor on its way, a mapping, or a file system that was made from it"
NOT_ALL = "there may be others: so many files are open on this system that not all were looked at"
PATIENCE_SECONDS = 0.2  # until a superblock that nobody has any more is gone
ROUNDS = 3  # in which what was copied meanwhile is detached as well


def revoke(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """Detach the mounts that are asked for everywhere, and return where, and what still holds them."""
    admit(fds, context)
    given = {name: parameters[name] for name in FIELDS if parameters.get(name) is not None}
    if len(given) != 1:
        raise InvalidParameter("id", f"one of {', '.join(FIELDS)} has to be given")
    ((name, value),) = given.items()
    chosen = [each for each in living(context) if is_meant(each.record, name, value)]
    if not chosen:
        raise NotFound(f"a live mount with {name} {value}", hint="“mountctl list --all” shows what there is")
    context.notes["source"] = ", ".join(sorted({each.record.source for each in chosen}))[:1024]
    context.enter(Phase.MOUNT)
    detached: list[Attachment] = []
    ids = {each.record.id for each in chosen}
    for _ in range(ROUNDS):
        # What is below another mount is the younger, and goes before it.
        done = [place for each in reversed(chosen) for place in each.attached if detach(place, each.record)]
        detached += done
        chosen = [each for each in living(context) if each.record.id in ids]
        if not done or not any(each.attached for each in chosen):
            break
    held = holders(chosen) or unseen(chosen, context)
    return {"detached": [attachment(place) for place in detached], "held": held}, []


def is_meant(record: Record, name: str, value: object) -> bool:
    """Tell whether a mount is one of those to be revoked: of an owner, all of its containers' as well."""
    if name == "uid":
        return value in (record.uid, record.owner)
    if name == "digest":
        # Of a stack, each layer's.
        return value in (record.digest or "").split(", ")
    return record.id == value


def detach(place: Attachment, record: Record) -> bool:
    """Detach a mount where it is attached; tell whether that was done.

    Whoever asked for the mount could enter the directories above it; within an image, maybe nobody can.
    """
    with find.all_namespaces() as spaces:
        for space in spaces:
            if space.id != place.namespace:
                continue
            for uid, rights in ((record.uid, nullcontext), (0, capabilities.reading_everything)):
                with suppress(SyscallError, MountdError), rights():
                    outcome = attaching.detach(place.id, space.fd.fileno(), (uid, uid, ()), lazy=True)
                    if outcome is Outcome.DONE:
                        mount_table.note_detached(space.fd.fileno())
                        return True
    return False


def holders(left: list[Live]) -> list[dict[str, object]]:
    """Return what still holds the mounts: processes, and where they are attached all the same."""
    sure = {each.record.device for each in left if each.record.superblock and each.record.watch}
    ids = {each.record.id for each in left}
    devices = {each.record.device for each in left}
    uses, complete = find.uses(devices, ids)
    found: list[dict[str, object]] = [
        {"pid": use.pid, "command": use.command, "what": use.what}
        for use in uses
        if use.device in sure or use.id in ids
    ]
    if left and not complete:
        found.append({"pid": 0, "command": "", "what": NOT_ALL})
    for each in left:
        for place in each.attached:
            what = f"attached at {place.mount_point} in mount namespace {place.namespace}"
            found.append({"pid": 0, "command": "", "what": what})
    return found


def unseen(left: list[Live], context: RequestContext) -> list[dict[str, object]]:
    """Return a holder for what nothing was found to hold, if it is there all the same."""
    book, deadline = context.ledger, time.monotonic() + PATIENCE_SECONDS
    if book is None:
        return []

    def is_there(each: Live) -> bool:
        record = each.record
        if record.id in book.sure(book.records()):
            return True
        return record.watch != 0 and not each.kept and book.is_there(record)

    while any(is_there(each) for each in left):
        if time.monotonic() > deadline:
            return [{"pid": 0, "command": "", "what": UNSEEN}]
        time.sleep(PATIENCE_SECONDS / 10)
    return []


METHODS: dict[str, Handler] = {"io.mountd.Admin.Revoke": revoke}
