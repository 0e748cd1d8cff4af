"""io.mountd.Mount.List: the mounts that were handed out and are still there, and where they are attached."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mountd.errors import DeniedByPolicy, NotSupported
from mountd.kernel import mount_info
from mountd.ledger import live
from mountd.service.descriptors import Descriptors
from mountd.service.phase import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mountd.caller.model import Caller
    from mountd.fds import OwnedFd
    from mountd.ledger.find import Attachment
    from mountd.ledger.live import Live
    from mountd.ledger.record import Record
    from mountd.service.context import RequestContext
    from mountd.wire.dispatch import Handler, Reply

# Bytes of JSON in one reply of List; and for the places of one mount, which its owner makes as he likes,
# as many as he likes and with names of any length.
PAGE = 256 << 10
PLACES = 32 << 10


def list_mounts(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """Return as many of the caller's mounts as fit; with `all`, for the host's root only, everybody's."""
    context.enter(Phase.VERIFY)
    everybody = bool(parameters.get("all"))
    Descriptors(fds).check_all_named()
    caller = context.peer.identify()
    if everybody and not caller.is_host_root:
        raise DeniedByPolicy(
            "only the host's root sees the mounts of others", hint="leave “all” out to see your own"
        )
    here = None if caller.is_host_root else namespace_of(context)
    found = [each for each in living(context) if everybody or belongs_to(each.record, caller)]
    found.sort(key=lambda each: each.record.id)
    mounts: list[dict[str, object]] = []
    length = 0
    for each in found:
        if each.record.id <= (parameters.get("after") or 0):
            continue
        mount = described(each, caller, here)
        length += len(json.dumps(mount))
        if mounts and length > PAGE:
            return {"mounts": mounts, "next": mounts[-1]["id"]}, []
        mounts.append(mount)
    return {"mounts": mounts}, []


def living(context: RequestContext) -> list[Live]:
    """Return all mounts that are there. Raises SyscallError, NotSupported."""
    if context.ledger is None:
        raise NotSupported("listing mounts, as there is no ledger", hint="the journal of mountd says why")
    return live.settled(context.ledger, context.ledger.records())


def belongs_to(record: Record, caller: Caller) -> bool:
    """Tell whether a mount is the caller's: asked for by itself, or in a container of its own.

    A container sees what was asked for by an id that it maps, and its owner's, so that one container of
    somebody does not see another. Without the capability, uid 0 of the host is in many containers and
    services, so that it only sees what was asked for from within the same one.
    """
    if caller.on_host and caller.uid == 0 and not caller.is_host_root:
        return record.payer == caller.payer and record.unit == caller.unit is not None
    if caller.on_host:
        return caller.uid in (record.uid, record.owner)
    namespace = caller.user_namespace
    mapped = any(each.outer <= record.uid < each.outer + each.count for each in namespace.uid_map)
    return mapped and record.payer == caller.payer


def namespace_of(context: RequestContext) -> int | None:
    """Return the id of the mount namespace that the caller is in, None on kernels that tell none.

    Raises PeerGone, SyscallError.
    """
    try:
        with context.peer.mount_namespace() as namespace:
            return mount_info.namespace_id(namespace.fileno())
    except NotSupported:
        return None


def may_be_told(place: Attachment, caller: Caller, here: int | None) -> bool:
    """Tell whether the caller may know where something is attached: not what others call their directories.

    A mount gets there by propagation, into a container of somebody who has copied the directory above it.
    """
    return caller.is_host_root or place.payer in (None, caller.payer) or place.namespace == here


def described(each: Live, caller: Caller, here: int | None) -> dict[str, object]:
    """Return a LiveMount for a caller in the mount namespace `here`; what it may not know is counted."""
    record = each.record
    told = [place for place in each.attached if may_be_told(place, caller, here)]
    attached, unlisted = places(told)
    # Only the host's root is told what may be another's.
    perhaps, more = places(each.unsure) if caller.is_host_root else ([], len(each.attached) - len(told))
    fields = {
        "id": record.id,
        "uid": record.uid,
        "owner": record.owner,
        "source": record.source,
        "fileSystemType": record.file_system,
        "readOnly": record.read_only,
        "rule": record.rule,
        "trustedBy": record.trusted_by,
        "signer": record.signer,
        "digest": record.digest,
        "idMap": record.id_map,
        "since": record.since,
        "attached": attached,
        "maybeAttached": perhaps or None,
        "unlisted": unlisted + more or None,
        "partly": each.partly or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def places(attached: Iterable[Attachment]) -> tuple[list[dict[str, object]], int]:
    """Return as many Attachments as fit, and how many more there are."""
    found: list[dict[str, object]] = []
    length = unlisted = 0
    for each in attached:
        place = attachment(each)
        length += len(json.dumps(place))
        if found and length > PLACES:
            unlisted += 1
        else:
            found.append(place)
    return found, unlisted


def attachment(place: Attachment) -> dict[str, object]:
    """Return an Attachment."""
    return {"mountPoint": place.mount_point, "mountNamespace": place.namespace, "id": place.id}


METHODS: dict[str, Handler] = {"io.mountd.Mount.List": list_mounts}
