"""Detach of io.mountd.Mount: detaching what Attach has attached, for the same user or for the host's root.

That is found by the unique id of the mount, and only in the mount namespace of the caller.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from mountd.caller.model import OVERFLOW_ID
from mountd.errors import InUse, InvalidParameter, NotFound, SyscallError
from mountd.execute import attachment, mount_table, trees
from mountd.execute.attachment import Outcome
from mountd.fds import close_all
from mountd.kernel import capabilities, mount_info
from mountd.kernel.flags import StatmountMask
from mountd.ledger import find
from mountd.ledger.rebuilding import NOBODY
from mountd.service.attach import id_of, needed, root_id
from mountd.service.attachments import Attachment
from mountd.service.descriptors import Descriptors
from mountd.service.phase import Phase
from mountd.service.requests import TARGET_FIELD

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.execute.attachment import Ids
    from mountd.fds import OwnedFd
    from mountd.service.attachments import Attachments
    from mountd.service.context import RequestContext

    Reply = tuple[dict[str, object], list[OwnedFd]]

CLOSE_OR_LAZY = "close what is open in it (“fuser -vm DIR” shows it), or be lazy"
ROOT = (0, 0, ())
YOURS = "“mountctl list” shows what is attached for you"


def detach(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.mountd.Mount.Detach: detach what was attached for the caller."""
    context.enter(Phase.VERIFY)
    records = needed(context)
    id = wanted_id(parameters, fds)
    caller = context.caller()
    context.notes["mount"] = str(id)
    record = records.find(id)
    lost = record is None
    record = record or told_by_the_ledger(id, caller, context)
    if record is None or not (caller.is_host_root or (record.uid == caller.uid != OVERFLOW_ID)):
        raise NotFound(f"a mount with the id {id} that is attached for you", hint=YOURS)
    # Or the mount would be in use by whoever is to detach it.
    close_all(fds)
    groups = caller.groups if caller.uid == record.uid else frozenset()
    ids = (record.uid, record.gid, groups)
    lazy = bool(parameters.get("lazy"))
    context.peer.check()
    context.enter(Phase.MOUNT)
    try:
        with records.locked(id) as there:
            outcome = Outcome.ABSENT
            if there or lost:
                outcome = detached(record, ids, records, context, lazy=lazy, by_root=caller.is_host_root)
    except TimeoutError:
        raise InUse("the mount is just being attached, or detached", hint="try again") from None
    if outcome is Outcome.ABSENT:
        raise NotFound(f"the mount with the id {id} in your mount namespace", hint=YOURS)
    if outcome is Outcome.BUSY:
        raise InUse("the mount is in use", hint=CLOSE_OR_LAZY)
    if outcome is Outcome.PARTLY:
        raise InUse("the mount is in use, and what was mounted below it is detached", hint=CLOSE_OR_LAZY)
    if outcome is Outcome.COVERED:
        raise InUse("something else is mounted over the mount", hint="unmount that first")
    return {}, []


def told_by_the_ledger(id: int, caller: Caller, context: RequestContext) -> Attachment | None:
    """Return what the ledger has of a mount that is attached, for when what was written down of it is lost.

    Only of one that never left mountd but by being attached: any other, its user may have given to somebody,
    who has attached it where it is none of that user's business. Of which tree it is, is lost. Raises
    PeerGone, SyscallError.
    """
    with context.peer.mount_namespace() as namespace:
        here = id_of(namespace.fileno())
    try:
        path = mount_info.statmount(id, StatmountMask.MNT_POINT, here).mount_point if here else None
    except SyscallError:
        return None  # it is not there, or no id
    if path is None or context.ledger is None:
        return None
    for each in context.ledger.records():
        if each.id == id and not each.sent and each.uid < NOBODY:
            return Attachment(id, each.uid, caller.gid, here, each.rule, path, each.since)
    return None


def detached(
    record: Attachment,
    ids: Ids,
    records: Attachments,
    context: RequestContext,
    *,
    lazy: bool,
    by_root: bool,
) -> Outcome:
    """Detach a mount in the mount namespace of the caller, and forget what is not attached there then.

    No mode of a directory above it keeps root from it, which has none of the user's groups. Raises PeerGone,
    SyscallError, OSError.
    """
    with context.peer.mount_namespace() as namespace:
        try:
            outcome, gone = taken_away(record, namespace.fileno(), ids, lazy=lazy)
        except SyscallError as error:
            if not by_root or error.errno != errno.EACCES:
                raise
            with capabilities.reading_everything():
                outcome, gone = taken_away(record, namespace.fileno(), ROOT, lazy=lazy)
        here = id_of(namespace.fileno())
        if outcome in (Outcome.DONE, Outcome.PARTLY):
            mount_table.note_detached(namespace.fileno(), None if record.tree else record.path)
    if outcome is not Outcome.ABSENT or (here and record.namespace == here):
        for each in gone:
            records.remove(each)
    return outcome


def taken_away(record: Attachment, namespace_fd: int, ids: Ids, *, lazy: bool) -> tuple[Outcome, set[int]]:
    """Detach a mount, with what is below it in its tree; return which mounts of it are not attached then.

    Raises SyscallError.
    """
    if not record.tree:
        outcome = attachment.detach(record.id, namespace_fd, ids, lazy=lazy)
        return outcome, {record.id} if outcome in (Outcome.DONE, Outcome.ABSENT) else set()
    asked_of = set(record.tree) if record.id == record.tree[0] else {record.id}
    if not lazy and find.uses(set(), asked_of)[0]:
        return Outcome.BUSY, set()
    return trees.detach(record.id, record.tree, namespace_fd, ids, lazy=lazy)


def wanted_id(parameters: dict[str, Any], fds: list[OwnedFd]) -> int:
    """Return the id of the mount that is to be detached.

    Raises InvalidParameter, BadFileDescriptor.
    """
    id, index = parameters.get("id"), parameters.get(TARGET_FIELD)
    if (id is None) is (index is None):
        raise InvalidParameter("id", f"one of id and {TARGET_FIELD} has to be given")
    table = Descriptors(fds)
    target_fd = table.optional(index, TARGET_FIELD)
    table.check_all_named()
    if id is not None:
        if id <= 0:
            raise InvalidParameter("id", "it is a positive number")
        return int(id)
    return root_id(target_fd or 0, TARGET_FIELD)


METHODS = {"io.mountd.Mount.Detach": detach}
