"""io.mountd.Admin.Revoke: taking mounts back, wherever they are attached.

A mount can be detached, in any mount namespace, whatever its holder has put in the way (`taking_back`), but
for copies that the kernel has locked in a user namespace within another. And whoever has something of it
open keeps that until it is closed. So the answer says who that is.
"""

from __future__ import annotations

import os
import random
import time
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

from mountd.errors import InvalidParameter, MountdError, NotFound, SyscallError
from mountd.evidence.content import is_digest
from mountd.execute import attachment as attaching
from mountd.execute import mount_table, taking_back
from mountd.fds import OwnedFd
from mountd.kernel import capabilities
from mountd.kernel.mount_info import MountNamespace, mount_namespaces
from mountd.kernel.visitor import TooManyHanging
from mountd.ledger import find
from mountd.service.admin import admit
from mountd.service.listing import living, places
from mountd.service.phase import Phase

if TYPE_CHECKING:
    from collections.abc import Collection
    from contextlib import AbstractContextManager

    from mountd.ledger.find import Attachment, Use
    from mountd.ledger.live import Live
    from mountd.ledger.record import Record
    from mountd.service.context import RequestContext
    from mountd.wire.dispatch import Handler, Reply

FIELDS = ("id", "digest", "uid")
NO_DIGEST = (
    "it has to be whole, such as “sha256:” and 64 hexadecimal digits; “mountctl list --all -l” shows it"
)
UNSEEN = "no process shows it: a descriptor on its way, a mapping, or a file system that was made from it"
NOT_ALL = "there may be others: so many files are open on this system that not all were looked at"
NOT_ALL_PLACES = "there may be other places: so many mounts are on this system that not all were looked at"
PATIENCE_SECONDS = 0.2  # until a superblock that nobody has any more is gone
SECONDS = 4.0  # of detaching, until it is looked at what is left
ROUNDS_SECONDS = 8.0  # until that is not done once more
MOST_SECONDS = 30  # in which all of that has an end, and looking where mounts are, and who holds them
SECONDS_OF_ONE = 1.0  # for one mount namespace, where a file system's server may be silent
MAXIMUM_SPACES = 128  # mount namespaces at a time
MAXIMUM_TOLD = 64  # of each kind of what holds a mount
MAXIMUM_PATH = 256  # characters of each
IN_THE_WAY = (
    "something is in the way, or did not answer, or it is locked there:"
    " end the processes there, or unmount what is above it"
)
LATE = "there was no more time: revoke it once more"
CROWDED = (
    "so many processes of mountd hang in file systems that do not answer that it begins no others: end the"
    " processes there, or abort the connections in /sys/fs/fuse/connections, and revoke it once more"
)


def revoke(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """Detach the mounts that are asked for everywhere, and return where, and what still holds them."""
    admit(fds, context)
    given = {name: parameters[name] for name in FIELDS if parameters.get(name) is not None}
    if len(given) != 1:
        raise InvalidParameter("id", f"one of {', '.join(FIELDS)} has to be given")
    ((name, value),) = given.items()
    if name == "digest" and not is_digest(value):
        # An empty one would be that of all mounts that have none.
        raise InvalidParameter(name, NO_DIGEST)
    everybody = living(context)
    chosen = [each for each in everybody if is_meant(each.record, name, value)]
    if not chosen:
        raise NotFound(f"a live mount with {name} {value}", hint="“mountctl list --all” shows what there is")
    context.notes["source"] = ", ".join(sorted({each.record.source for each in chosen}))[:1024]
    context.enter(Phase.MOUNT, MOST_SECONDS)
    detached: list[Attachment] = []
    ids = {each.record.id for each in chosen}
    deadline = time.monotonic() + ROUNDS_SECONDS
    why = LATE
    # Once more for what was copied meanwhile, or had more in the way than is detached at a time.
    while why == LATE and any(each.attached for each in chosen) and time.monotonic() < deadline:
        done, why = take_back(chosen, everybody)
        detached += done
        everybody = living(context)
        chosen = [each for each in everybody if each.record.id in ids]
    held = holders(chosen, why) or unseen(chosen, context)
    told, unlisted = places(detached)
    reply = {"detached": told, "held": held, "unlisted": unlisted or None}
    return {name: value for name, value in reply.items() if value is not None}, []


def is_meant(record: Record, name: str, value: object) -> bool:
    """Tell whether a mount is one of those to be revoked: of an owner, all of its containers' as well."""
    if name == "uid":
        return value in (record.uid, record.owner)
    if name == "digest":
        # Of a stack, each layer's.
        return record.digest is not None and value in record.digest.split(", ")
    return record.id == value


def take_back(chosen: list[Live], everybody: list[Live]) -> tuple[list[Attachment], str]:
    """Detach mounts wherever they are attached, for SECONDS at the most; return where that was done.

    And why the others are left, if there are any. It is of use to go on if that is LATE: something was
    detached, if only what is in the way, or not all places were come to.

    Whoever asked for one could enter the directories above it; within an image, maybe nobody can.
    """
    by_space: dict[int, list[tuple[Attachment, Record]]] = {}
    # What is below another mount is the younger, and goes before it.
    for each in reversed(chosen):
        for place in each.attached:
            by_space.setdefault(place.namespace, []).append((place, each.record))
    done: list[Attachment] = []
    moved, crowded = len(by_space) > MAXIMUM_SPACES, False
    with ExitStack() as stack:
        spaces = opened(by_space.keys(), stack)
        deadline = time.monotonic() + SECONDS
        for space in spaces:
            there = by_space[space.id]
            inside = find.payer(space.fd)
            for payer in {record.payer for _, record in there}:
                theirs = [(place, record) for place, record in there if record.payer == payer]
                loose = {each.record.id for each in everybody if each.record.payer == payer}
                # What root has asked for itself, it takes back from all of its containers.
                own = inside == payer or (payer == (0, 0) and inside is not None and inside[0] == 0)
                try:
                    moved |= take_back_there(theirs, space, None if own else loose, deadline)
                except TooManyHanging:
                    crowded = True
                    break
            gone = [place for place, _ in there if not attaching.is_there(place.id, space.id)]
            if gone:
                mount_table.note_detached(space.fd.fileno())
            done += gone
            if crowded:
                return done, CROWDED
    return done, LATE if moved or done else IN_THE_WAY


def opened(ids: Collection[int], stack: ExitStack) -> list[MountNamespace]:
    """Return some of the mount namespaces with these ids, which `stack` closes.

    In no order: otherwise those that take too long, if they came first, would keep the others for ever.
    """
    wanted = set(random.sample(sorted(ids), min(len(ids), MAXIMUM_SPACES)))
    found: list[MountNamespace] = []
    end = time.monotonic() + find.LONGEST_WALK
    for space in mount_namespaces():
        if space.id in wanted:
            fd = stack.enter_context(OwnedFd(os.dup(space.fd.fileno())))
            found.append(MountNamespace(fd, space.id))
        if len(found) == len(wanted) or time.monotonic() > end:
            break
    random.shuffle(found)
    return found


def take_back_there(
    there: list[tuple[Attachment, Record]], space: MountNamespace, loose: set[int] | None, deadline: float
) -> bool:
    """Detach what is attached in one mount namespace, and is of one owner; return whether to go on.

    Once it takes too long, a silent server was asked, and the others come only to what is below none for
    sure. Raises TooManyHanging.
    """
    moved = hung = False
    ways: list[tuple[int, AbstractContextManager[None]]] = [
        (uid, nullcontext()) for uid in sorted({record.uid for _, record in there})
    ]
    for uid, rights in (*ways, (0, capabilities.reading_everything())):
        if time.monotonic() > deadline:
            return True
        ids = [place.id for place, record in there if uid in (0, record.uid)]
        ids = [id for id in ids if attaching.is_there(id, space.id)]
        begin = time.monotonic()
        seconds = min(SECONDS_OF_ONE, deadline - begin)
        if ids and seconds > 0:
            try:
                with rights:
                    fd, user = space.fd.fileno(), (uid, uid, ())
                    moved |= taking_back.take_back(ids, fd, user, loose, seconds, cautious=hung) > 0
            except TooManyHanging:
                raise  # it is no matter of this place
            except (SyscallError, MountdError):
                pass  # what could not be detached is looked at afterwards
        if time.monotonic() - begin >= seconds:
            if hung:
                break  # nor would it answer another
            hung = True
    return moved


def holders(left: list[Live], why: str) -> list[dict[str, object]]:
    """Return what still holds the mounts: processes, and where they are attached all the same, and `why`."""
    sure = {each.record.device for each in left if each.record.superblock and each.record.watch}
    ids = {each.record.id for each in left}
    devices = {each.record.device for each in left}
    uses, complete = find.uses(devices, ids)
    using = [use for use in uses if use.device in sure or use.id in ids]
    found = [by_process(use) for use in using[:MAXIMUM_TOLD]]
    if left and (not complete or len(using) > MAXIMUM_TOLD):
        found.append({"pid": 0, "command": "", "what": NOT_ALL})
    if any(each.partly for each in left):
        found.append({"pid": 0, "command": "", "what": NOT_ALL_PLACES})
    attached = [place for each in left for place in each.attached]
    for place in attached[:MAXIMUM_TOLD]:
        what = f"attached at {short(place)} in mount namespace {place.namespace}, and {why}"
        found.append({"pid": 0, "command": "", "what": what})
    if len(attached) > MAXIMUM_TOLD:
        what = f"attached in {len(attached) - MAXIMUM_TOLD} more places: revoke it once more"
        found.append({"pid": 0, "command": "", "what": what})
    for place in [place for each in left for place in each.unsure][:MAXIMUM_TOLD]:
        what = f"maybe a copy, or another's, at {short(place)} in mount namespace {place.namespace}"
        found.append({"pid": 0, "command": "", "what": what})
    inside = find.processes_in({place.namespace for place in attached}, MAXIMUM_TOLD)
    return found + [by_process(use) for use in inside]


def by_process(use: Use) -> dict[str, object]:
    """Return a Holder."""
    return {"pid": use.pid, "command": use.command, "what": use.what}


def short(place: Attachment) -> str:
    """Return a path that there is room for many times in one reply."""
    path = place.mount_point
    return path if len(path) <= MAXIMUM_PATH else f"{path[:MAXIMUM_PATH]}…"


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
