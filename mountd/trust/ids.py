"""Whose ids a caller may have mapped: the judgement of a user namespace that it hands over.

To map an image's ids into a namespace is to let its members act with the host ids behind it, so both have to
be the caller's: it controls the namespace, and it could have mapped the ids itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.caller.model import OVERFLOW_ID, DelegatedIds
from mountd.errors import UserNamespaceNotPermitted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mountd.caller.model import Caller, GivenNamespace, IdExtent, UserNamespace

# What the kernel shows for the outer id of an extent that the reader's own namespace does not map. Two of
# these may be different ids, so that having one of them says nothing about the other.
UNMAPPED_ID = (1 << 32) - 1
# The ids that systemd gives to containers for as long as they run, in blocks (systemd.io/UIDS-GIDS).
CONTAINERS = range(0x00080000, 0x70000000)
BLOCK = 65536


def authorize_ids(caller: Caller, given: GivenNamespace, delegated: DelegatedIds) -> None:
    """Raise UserNamespaceNotPermitted unless `caller` may have ids mapped into the namespace `given`.

    `delegated` are the ids that the host's administrator gave to the caller. The host's root may use any.
    """
    if given.namespace.is_host:
        raise UserNamespaceNotPermitted(
            "it is the host's, in which every id is itself",
            hint="leave it out, or make a user namespace of your own",
        )
    check_not_empty("uids", given.namespace.uid_map)
    check_not_empty("gids", given.namespace.gid_map)
    if caller.is_host_root:
        return
    if caller.uid == OVERFLOW_ID:
        raise UserNamespaceNotPermitted(
            f"the caller's uid {OVERFLOW_ID} stands for every unknown id, so nothing can belong to it",
            hint="call as a user that the host knows",
        )
    check_ownership(caller, given)
    check_extents(caller, delegated, given.namespace.uid_map, given.namespace.gid_map)


def authorize_extents(
    caller: Caller, delegated: DelegatedIds, uids: tuple[IdExtent, ...], gids: tuple[IdExtent, ...]
) -> None:
    """Raise UserNamespaceNotPermitted unless `caller` may have ids mapped to these host ids.

    For a request with explicit ranges and without a user namespace.
    """
    if caller.is_host_root:
        return
    if caller.uid == OVERFLOW_ID:
        raise UserNamespaceNotPermitted(
            f"the caller's uid {OVERFLOW_ID} stands for every unknown id, so nothing can belong to it",
            hint="call as a user that the host knows",
        )
    check_extents(caller, delegated, uids, gids)


def check_extents(
    caller: Caller, delegated: DelegatedIds, uids: tuple[IdExtent, ...], gids: tuple[IdExtent, ...]
) -> None:
    """Raise unless the caller may use all host ids of the extents."""
    own = caller.user_namespace if controls_own(caller) else None
    own_uids = mapped(own.uid_map) if own is not None else []
    own_gids = mapped(own.gid_map) if own is not None else []
    check_ids("uids", uids, [range(caller.uid, caller.uid + 1), *delegated.uids, *own_uids], "/etc/subuid")
    # A gid that is shown for want of a mapping is nobody's either.
    own_gid = [] if caller.gid == OVERFLOW_ID else [range(caller.gid, caller.gid + 1)]
    check_ids("gids", gids, [*own_gid, *delegated.gids, *own_gids], "/etc/subgid")


def of_containers(namespace: UserNamespace) -> DelegatedIds:
    """Return the ids of a user namespace that is mapped as systemd-nsresourced does, none for any other.

    A block for its own ids from 0 on, and blocks that it may map further, each as itself. That the service
    has given them to the caller is for the service to say.
    """
    extents = namespace.uid_map
    own, *others = extents or (None,)
    fit = own is not None and own.inner == 0 and all(each.inner == each.outer for each in others)
    blocks = [range(each.outer, each.outer + each.count) for each in extents]
    for ids in blocks:
        fit = fit and len(ids) == BLOCK and ids.start % BLOCK == 0 and ids.start in CONTAINERS
    if not fit or namespace.gid_map != extents:
        return DelegatedIds((), ())
    return DelegatedIds(tuple(blocks), tuple(blocks))


def controls_own(caller: Caller) -> bool:
    """Whether the caller is root or owner of a user namespace of its own."""
    own = caller.user_namespace
    return not own.is_host and caller.uid in (own.host_uid(0), own.owner_uid)


def check_ownership(caller: Caller, given: GivenNamespace) -> None:
    """Raise unless the namespace is the caller's or below it, and under the caller's control."""
    identities = [(dev, ino) for dev, ino, _ in given.chain]
    if identities[:1] != [identity(given.namespace)]:
        raise UserNamespaceNotPermitted("where it comes from could not be found out")
    own = identity(caller.user_namespace)
    if caller.on_host:
        inside = given.chain
    elif own in identities:
        inside = given.chain[: identities.index(own)]
    else:
        raise UserNamespaceNotPermitted(
            "it is neither the caller's own nor a descendant of it",
            hint="make the user namespace from within the caller's own",
        )
    if controls_own(caller) or any(owner_uid == caller.uid for _, _, owner_uid in inside):
        return
    if not inside:
        raise UserNamespaceNotPermitted(
            "it is the caller's own, of which the caller is neither root nor owner",
            hint="call as the root of the user namespace, or hand over one that you made",
        )
    raise UserNamespaceNotPermitted(
        f"neither it nor an ancestor of it belongs to the caller's uid {caller.uid}",
        hint="hand over a user namespace that you made",
    )


def check_not_empty(what: str, extents: tuple[IdExtent, ...]) -> None:
    """Raise if a map has not been written yet: nobody knows what will be in it."""
    if not any(extent.count > 0 for extent in extents):
        raise UserNamespaceNotPermitted(
            f"it maps no ids: its map of {what} is empty", hint="write its uid_map and its gid_map first"
        )


def check_ids(what: str, extents: tuple[IdExtent, ...], allowed: Iterable[range], file: str) -> None:
    """Raise unless all host ids of `extents` are in `allowed`; `file` is where more can be given."""
    check_not_empty(what, extents)
    ordered = sorted((ids for ids in allowed if ids.stop <= UNMAPPED_ID), key=lambda ids: ids.start)
    for ids in mapped(extents):
        outside = first_outside(ids, ordered)
        if outside is not None:
            span = f"{outside.start}" if len(outside) == 1 else f"{outside.start} to {outside.stop - 1}"
            raise UserNamespaceNotPermitted(
                f"it maps host {what} {span}, which the caller may not use",
                hint=f"map fewer ids, or have an administrator add them for the caller to {file}",
            )


def first_outside(ids: range, ordered: list[range]) -> range | None:
    """Return the first stretch of `ids` that no range covers, None if there is none.

    `ordered` are ranges by their start; they may overlap, and several may have to cover `ids` together.
    """
    position = ids.start
    for part in ordered:
        if part.start > position:
            return range(position, min(ids.stop, part.start)) if position < ids.stop else None
        position = max(position, part.stop)
    return range(position, ids.stop) if position < ids.stop else None


def mapped(extents: tuple[IdExtent, ...]) -> list[range]:
    """Return the host ids of `extents`."""
    return [range(extent.outer, extent.outer + extent.count) for extent in extents]


def identity(namespace: UserNamespace) -> tuple[int, int]:
    """Return what tells a namespace from all others."""
    return namespace.dev, namespace.ino
