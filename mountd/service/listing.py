"""io.mountd.Mount.List: the mounts that were handed out and are still there, and where they are attached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mountd.errors import DeniedByPolicy, NotSupported
from mountd.ledger import live
from mountd.service.descriptors import Descriptors
from mountd.service.phase import Phase

if TYPE_CHECKING:
    from mountd.caller.model import Caller
    from mountd.fds import OwnedFd
    from mountd.ledger.find import Attachment
    from mountd.ledger.live import Live
    from mountd.ledger.record import Record
    from mountd.service.context import RequestContext
    from mountd.wire.dispatch import Handler, Reply


def list_mounts(parameters: dict[str, Any], fds: list[OwnedFd], context: RequestContext) -> Reply:
    """Return the caller's mounts; with `all`, and for the host's root only, everybody's."""
    context.enter(Phase.VERIFY)
    everybody = bool(parameters.get("all"))
    Descriptors(fds).check_all_named()
    caller = context.peer.identify()
    if everybody and not caller.is_host_root:
        raise DeniedByPolicy(
            "only the host's root sees the mounts of others", hint="leave “all” out to see your own"
        )
    found = [each for each in living(context) if everybody or belongs_to(each.record, caller)]
    return {"mounts": [described(each) for each in found]}, []


def living(context: RequestContext) -> list[Live]:
    """Return all mounts that are there. Raises SyscallError, NotSupported."""
    if context.ledger is None:
        raise NotSupported("listing mounts, as there is no ledger", hint="the journal of mountd says why")
    return live.settled(context.ledger, context.ledger.records())


def belongs_to(record: Record, caller: Caller) -> bool:
    """Tell whether a mount is the caller's: asked for by itself, or in a container of its own.

    A container sees what was asked for by an id that it maps, and its owner's, so that one container of
    somebody does not see another.
    """
    if caller.on_host:
        return caller.uid in (record.uid, record.owner)
    namespace = caller.user_namespace
    mapped = any(each.outer <= record.uid < each.outer + each.count for each in namespace.uid_map)
    return mapped and (record.owner, record.roots_namespace) == caller.payer


def described(each: Live) -> dict[str, object]:
    """Return a LiveMount."""
    record = each.record
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
        "attached": [attachment(place) for place in each.attached],
    }
    return {name: value for name, value in fields.items() if value is not None}


def attachment(place: Attachment) -> dict[str, object]:
    """Return an Attachment."""
    return {"mountPoint": place.mount_point, "mountNamespace": place.namespace, "id": place.id}


METHODS: dict[str, Handler] = {"io.mountd.Mount.List": list_mounts}
