"""Which ids on disk appear as which ids on the host, from what the request asked for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from mountd.caller.model import IdExtent, outer_id
from mountd.errors import InvalidParameter, LimitExceeded

if TYPE_CHECKING:
    from mountd.caller.model import UserNamespace

MAXIMUM_RANGES = 340  # what the kernel takes for one map (user_namespaces(7))
MAXIMUM_MAP = 4095  # bytes of its text: one write(2) of less than a page (user_namespaces(7))
MAXIMUM_ID = (1 << 32) - 2


class IdMapKind(StrEnum):
    """How ids are to be mapped."""

    NONE = "none"
    NAMESPACE = "namespace"
    CALLER = "caller"
    RANGES = "ranges"


@dataclass(frozen=True, slots=True)
class IdRange:
    """`count` ids on disk from `first` on appear as `target` and following, numbers of a user namespace."""

    first: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class IdMapWish:
    """The idmap of a request; the ranges are there for RANGES only."""

    kind: IdMapKind
    uid_ranges: tuple[IdRange, ...] = ()
    gid_ranges: tuple[IdRange, ...] = ()


def host_extents(
    ranges: tuple[IdRange, ...], namespace: UserNamespace, *, gids: bool
) -> tuple[IdExtent, ...]:
    """Return `ranges` with their targets, numbers of `namespace`, as host ids.

    Raises InvalidParameter for ranges that are empty, overlap or have a target that the namespace does not
    map, and LimitExceeded for more than the kernel takes.
    """
    parameter = "idMap.gidRanges" if gids else "idMap.uidRanges"
    if not ranges:
        raise InvalidParameter(parameter, "there are no ranges")
    if len(ranges) > MAXIMUM_RANGES:
        raise LimitExceeded(f"ranges in {parameter}", MAXIMUM_RANGES)
    check_disjoint(parameter, sorted((each.first, each.count) for each in ranges), "first")
    check_disjoint(parameter, sorted((each.target, each.count) for each in ranges), "target")
    id_map = namespace.gid_map if gids else namespace.uid_map
    extents: list[IdExtent] = []
    for each in ranges:
        extents += translate(parameter, each, id_map)
    if len(extents) > MAXIMUM_RANGES:
        raise LimitExceeded(f"ranges in {parameter}", MAXIMUM_RANGES)
    if sum(len(f"{each.inner} {each.outer} {each.count}\n") for each in extents) > MAXIMUM_MAP:
        raise LimitExceeded(
            f"bytes in the map of {parameter}", MAXIMUM_MAP, hint="ask for fewer ranges or smaller numbers"
        )
    return tuple(extents)


def check_disjoint(parameter: str, spans: list[tuple[int, int]], what: str) -> None:
    """Refuse spans (first, count), sorted, that are empty, too high or overlap."""
    end = 0
    for first, count in spans:
        if count < 1 or first < 0 or first + count - 1 > MAXIMUM_ID:
            raise InvalidParameter(parameter, f"{first} and {count} following are no range of ids")
        if first < end:
            raise InvalidParameter(parameter, f"two ranges have the {what} {first}")
        end = first + count


def translate(parameter: str, wish: IdRange, id_map: tuple[IdExtent, ...]) -> list[IdExtent]:
    """Return the host extents of one range, which may span several extents of the namespace's map."""
    extents = []
    first, target, left = wish.first, wish.target, wish.count
    while left:
        outer = outer_id(id_map, target)
        if outer is None:
            raise InvalidParameter(parameter, f"the user namespace does not map {target}")
        within = next(e for e in id_map if e.inner <= target < e.inner + e.count)
        count = min(left, within.inner + within.count - target)
        extents.append(IdExtent(first, outer, count))
        first, target, left = first + count, target + count, left - count
    return extents
