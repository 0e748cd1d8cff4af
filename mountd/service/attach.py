"""Attach of io.mountd.Mount: for callers that may not attach a mount by themselves.

The route of Attach is that of Mount, and goes on: where the target lies is found out, the rule that allows
the mount has to grant the place, and the mount that is made then is attached there instead of being sent.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mountd.caller.home import home_of
from mountd.caller.model import OVERFLOW_ID
from mountd.errors import (
    AttachNotPermitted,
    BadFileDescriptor,
    InvalidParameter,
    NotSupported,
    PeerGone,
    SyscallError,
)
from mountd.evidence.target import Who
from mountd.evidence.target import find as find_target
from mountd.execute import attachment, mount_table, trees
from mountd.execute.seal import ONE_OF_THEM
from mountd.fds import close_all
from mountd.kernel import mount_info, namespaces
from mountd.kernel.flags import StatxMask
from mountd.kernel.paths import STATX_ATTR_MOUNT_ROOT, statx
from mountd.service import encrypted
from mountd.service.attachments import ATTACHED, Attachment, Attachments
from mountd.service.descriptors import Descriptors
from mountd.service.handing_out import handing_out
from mountd.service.mount import allowed, decision_reply, described, judge, make
from mountd.service.phase import Phase
from mountd.service.requests import TARGET_FIELD
from mountd.source.partition_types import MOUNT_POINTS
from mountd.trust import attach as places
from mountd.trust.made import grant_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from mountd.caller.model import Caller
    from mountd.evidence.target import Place
    from mountd.fds import OwnedFd
    from mountd.ledger.record import Record
    from mountd.service.context import RequestContext
    from mountd.service.mount import Judged
    from mountd.trust.decide import Decision

    Reply = tuple[dict[str, object], list[OwnedFd]]

MOUNT_FIELD = "mountFileDescriptor"
CAP_SYS_ADMIN = 21  # linux/capability.h
ALWAYS = frozenset({"nosuid", "nodev"})
LOCKED_FLAGS = os.ST_NOSUID | os.ST_NODEV
BY_ITSELF = "call Mount, and attach what it returns with move_mount(2)"


@dataclass(frozen=True, slots=True)
class Site:
    """Where a mount is to be attached; the descriptors are borrowed."""

    target_fd: int
    namespace_fd: int
    who: Who
    place: Place


@dataclass(frozen=True, slots=True)
class Part:
    """One mount that is to be attached: descriptor, borrowed, unique id, place below the first one."""

    fd: int
    id: int
    place: str = ""


def attach(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """io.mountd.Mount.Attach: mount, and attach the mount for the caller; or attach what was made for it."""
    records = needed(context)
    if parameters.get(MOUNT_FIELD) is not None:
        return attach_made(parameters, fds, records, context)
    if parameters.get("source") is None:
        raise InvalidParameter("source", f"one of source and {MOUNT_FIELD} has to be given")
    judged = judge(parameters, fds, context, may_change=True)
    judged = allowed(judged, fds, context, lambda: check_before(judged, context))
    # Found again after a question: that may have taken minutes.
    with site_for(judged, context) as site, encrypted.opened(judged, context) as judged:
        return made_and_attached(judged, site, records, context), []


def check_before(judged: Judged, context: RequestContext) -> None:
    """Raise for what could not be attached, whoever consents to it."""
    mount_points(judged.decision)
    with site_for(judged, context):
        pass


def site_for(judged: Judged, context: RequestContext) -> AbstractContextManager[Site]:
    """Find out where a request wants to have something attached, as `site_of` does."""
    decision, target_fd = judged.decision, judged.request.target_fd
    if target_fd is None:
        raise InvalidParameter(TARGET_FIELD)
    return site_of(target_fd, judged.caller, decision.rule, decision.attach, context)


def attach_made(
    parameters: dict[str, Any], fds: list[OwnedFd], records: Attachments, context: RequestContext
) -> Reply:
    """Attach a mount that Mount has made for the same caller: that very one, and no copy of it.

    Its flags were locked when it was made, and its contents judged; whether it may be attached is asked of
    the rule by which it was, as that is now. Raises AttachNotPermitted for any other mount, DeniedByPolicy
    where that rule does not allow this caller anything.
    """
    context.enter(Phase.VERIFY)
    for name, value in parameters.items():
        if value is not None and name not in (MOUNT_FIELD, TARGET_FIELD, "interactive"):
            raise InvalidParameter(name, f"it does not go with {MOUNT_FIELD}, which was mounted already")
    table = Descriptors(fds)
    mount_fd = table.take(parameters[MOUNT_FIELD], MOUNT_FIELD)
    target_fd = table.take(parameters[TARGET_FIELD], TARGET_FIELD)
    table.check_all_named()
    caller = context.caller_to_judge()
    record = made_for(caller, root_id(mount_fd, MOUNT_FIELD), context)
    if os.fstatvfs(mount_fd).f_flag & LOCKED_FLAGS != LOCKED_FLAGS:
        raise AttachNotPermitted("the mount is not nosuid and nodev", hint=BY_ITSELF)
    grant = grant_of(context.policy.policy, record.rule, caller)
    patterns = () if grant is None else grant.attach
    with site_of(target_fd, caller, record.rule, patterns, context) as site:
        namespace = id_of(site.namespace_fd)
        if records.find(record.id) is not None or attachment.is_there(record.id, namespace):
            raise AttachNotPermitted(ATTACHED, hint="detach it first")
        context.enter(Phase.MOUNT)
        context.notes["mount"] = str(record.id)
        written_down_and_put([Part(mount_fd, record.id)], record.rule, site, records, context)
    # Or the mount would be in use until this worker has cleaned up.
    close_all(fds)
    decision = {
        "verdict": "allow",
        "rule": record.rule,
        "trustedBy": record.trusted_by,
        "signer": record.signer,
        "digest": record.digest,
        "reason": "mountd has made the mount for the same caller",
    }
    return {"id": record.id, "decision": {k: v for k, v in decision.items() if v is not None}}, []


def made_for(caller: Caller, id: int, context: RequestContext) -> Record:
    """Return what the ledger knows of a mount that was made for the caller. Raises AttachNotPermitted."""
    found = [] if context.ledger is None else context.ledger.records()
    for record in found:
        if record.id == id and record.uid == caller.uid:
            return record
    raise AttachNotPermitted(
        "it is no mount that mountd has made for the caller",
        hint="hand over what Mount has returned, and no copy of it; or the source instead",
    )


@contextmanager
def site_of(
    target_fd: int, caller: Caller, rule: str | None, patterns: tuple[str, ...], context: RequestContext
) -> Iterator[Site]:
    """Find out where the target is, and whether the caller may have something attached there by the rule.

    Raises AttachNotPermitted, BadFileDescriptor, PeerGone, SyscallError.
    """
    with context.peer.mount_namespace() as namespace:
        # Once more: it may have left with its user namespace since, and be in another mount namespace.
        context.peer.identify()
        refuse_capable(caller, namespace.fileno())
        who = who_is(caller)
        place = find_target(target_fd, namespace.fileno(), who, home_of(caller))
        uid, gid = inner_ids(caller)
        places.judge(rule, patterns, place.path, home=place.home, uid=uid, gid=gid)
        context.notes["target"] = place.path
        context.peer.check()
        yield Site(target_fd, namespace.fileno(), who, place)


def needed(context: RequestContext) -> Attachments:
    """Return the records of attachments. Raises NotSupported for an instance that has none."""
    if context.attachments is None:
        raise NotSupported("attaching by what only pulls")
    return context.attachments


def refuse_capable(caller: Caller, namespace_fd: int) -> None:
    """Refuse a caller that can attach by itself: its mount namespace is its own to arrange.

    Raises AttachNotPermitted, SyscallError, and OSError for a caller that has ended.
    """
    capable = caller.sys_admin
    if not capable and caller.pid:
        try:
            with namespaces.owner_of(namespace_fd) as owner:
                own = namespaces.identity(owner.fileno()) == identity_of(caller)
        except SyscallError:
            raise AttachNotPermitted(
                "the mount namespace of the caller does not lie within mountd's",
                hint="call where mountd runs, or in a container there; or ask the host's mountd",
            ) from None
        try:
            effective = namespaces.effective_capabilities(caller.pid)
        except OSError:
            raise PeerGone("it has ended") from None
        capable = own and bool(effective >> CAP_SYS_ADMIN & 1)
    if capable:
        raise AttachNotPermitted("the caller can attach a mount by itself", hint=BY_ITSELF)
    if caller.uid == OVERFLOW_ID:
        raise AttachNotPermitted(
            "the caller is nobody, and what belongs to nobody may be anybody's", hint="call as another user"
        )


def identity_of(caller: Caller) -> tuple[int, int]:
    """Return device and inode of the caller's user namespace."""
    return caller.user_namespace.dev, caller.user_namespace.ino


def who_is(caller: Caller) -> Who:
    """Return whom a target has to belong to. Above it there may be directories of the container's root."""
    root = caller.user_namespace.host_uid(0)
    roots = {0} if root is None else {0, root}
    return Who(caller.uid, caller.gid, caller.groups, frozenset(roots))


def inner_ids(caller: Caller) -> tuple[int, int]:
    """Return uid and gid of the caller as its own user namespace has them, and paths that it knows."""
    found = []
    pairs = ((caller.uid, caller.user_namespace.uid_map), (caller.gid, caller.user_namespace.gid_map))
    for outer, id_map in pairs:
        inner = [e.inner + outer - e.outer for e in id_map if e.outer <= outer < e.outer + e.count]
        found.append(inner[0] if inner else OVERFLOW_ID)
    return found[0], found[1]


def made_and_attached(
    judged: Judged, site: Site, records: Attachments, context: RequestContext
) -> dict[str, object]:
    """Make the mount, or all of a disk image's, attach it, and return the reply.

    Whatever goes wrong, nothing is left of it.
    """
    context.enter(Phase.MOUNT)
    context.writable = not judged.decision.read_only
    # As for everybody but the host's root, who is not served here; said once more, since it is the promise.
    decision = replace(judged.decision, attributes=judged.decision.attributes | ALWAYS)
    judged = replace(judged, decision=decision)
    places = mount_points(decision)
    with handing_out(judged, context) as entry:
        made = make(judged, context, entry.notice)
        try:
            ids = entry.take_down(made, sent=False)
            context.notes["mount"] = str(ids[0])
            left_out: list[str] = []
            if len(made) > 1:
                mounts = [(each.fileno(), place) for each, place in zip(made, places, strict=True)]
                left_out = trees.put_together(mounts, context.seal)
            parts = [
                Part(each.fileno(), id, place)
                for each, id, place in zip(made, ids, places, strict=True)
                if place not in left_out
            ]
            written_down_and_put(parts, decision.rule, site, records, context)
        finally:
            # Or what is attached would be in use until this worker has cleaned up.
            close_all(made)
    reply: dict[str, object] = {"id": ids[0], "decision": decision_reply(decision)}
    if len(ids) > 1:
        reply["mounts"] = [
            {name: value for name, value in each.items() if name != MOUNT_FIELD}
            for each in described(judged, ids)
            if each.get("mountPoint") not in left_out
        ]
    return reply | ({"leftOut": left_out} if left_out else {})


def mount_points(decision: Decision) -> list[str]:
    """Return where each mount is attached, below the first; raise NotSupported if that is not the root."""
    found = [MOUNT_POINTS[use.partition.designator] for use in decision.uses] or [""]
    if len(found) > 1 and found[0]:
        raise NotSupported(
            "attaching several partitions, none of which is the root, for a caller", hint=ONE_OF_THEM
        )
    return found


def written_down_and_put(
    parts: list[Part], rule: str | None, site: Site, records: Attachments, context: RequestContext
) -> None:
    """Attach a tree of mounts once it is written down that it is.

    Raises what `put_there` and `Attachments.held` do.
    """
    tree = tuple(each.id for each in parts) if len(parts) > 1 else ()
    attached = [
        Attachment(
            id=part.id,
            uid=site.who.uid,
            gid=site.who.gid,
            namespace=id_of(site.namespace_fd),
            rule=rule,
            path=os.path.join(site.place.path, part.place) if part.place else site.place.path,
            since=int(time.time()),
            tree=tree,
        )
        for part in parts
    ]
    with records.held(attached) as locks:
        put_there([each.fd for each in parts], site, context, locks)
    found = [statx(each.fd, "", StatxMask.MNT_ID, sync=False) for each in parts]
    mount_table.note_attached(site.namespace_fd, *(int(each.stx_mnt_id) for each in found))


def put_there(mounts: list[int], site: Site, context: RequestContext, locks: list[int]) -> None:
    """Attach the first of the mounts, which the others are below, unless something is no longer what it was.

    That is the place, and the caller. `locks` are held for as long as anybody is about to attach them.
    Raises AttachNotPermitted, PeerGone, SyscallError.
    """
    mount_fd, *below = mounts

    def problem(mounted: int | None) -> str | None:
        return site.place.problem(site.who, mounted)

    wrong = attachment.attach(
        mount_fd, site.target_fd, site.namespace_fd, site.who.ids, problem, below, locks
    )
    if wrong is not None:
        raise AttachNotPermitted(wrong, hint="leave the directories above it alone meanwhile")
    try:
        context.peer.check()
        with context.peer.mount_namespace() as namespace:
            if namespaces.identity(namespace.fileno()) != namespaces.identity(site.namespace_fd):
                raise PeerGone("it is no longer in the mount namespace that it asked from")
    except BaseException:
        attachment.drop(mount_fd, site.namespace_fd, site.who.ids)
        raise


def id_of(namespace_fd: int) -> int:
    """Return the id of a mount namespace, 0 on kernels that tell none. Raises SyscallError."""
    try:
        return mount_info.namespace_id(namespace_fd)
    except NotSupported:
        return 0


def root_id(fd: int, field: str) -> int:
    """Return the unique id of the mount whose root directory `fd` is. Raises BadFileDescriptor."""
    status = statx(fd, "", StatxMask.BASIC_STATS | StatxMask.MNT_ID_UNIQUE, sync=False)
    if not status.stx_attributes & STATX_ATTR_MOUNT_ROOT:
        raise BadFileDescriptor(field, "it is not the root directory of a mount")
    return int(status.stx_mnt_id)


METHODS = {"io.mountd.Mount.Attach": attach}
