"""Making room in a store of what can be made again, where an image more is refused for want of it.

What nobody uses goes, and no more of it than has to: first what is on the account of who needs the room, and
what others have only where there is no room for anybody; of these, what was not used for longest. Where all
of it would not be enough, nothing does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mountd.errors import SyscallError
from mountd.kernel.lease import only_opener
from mountd.store import garbage, quota
from mountd.store.disk import all_records, image_path

if TYPE_CHECKING:
    from mountd.store.disk import State
    from mountd.store.quota import Limits
    from mountd.store.record import Owner, Record


def make(state: State, limits: Limits, size: int, owner: Owner, limit: object) -> bool:
    """Make room for an image of `size` bytes, and tell whether it has room then.

    `limit` is what a LimitExceeded was for. The lock has to be held. Raises OSError.
    """
    missing_bytes, missing_images = lacking(state, limits, size, owner, limit)
    if missing_bytes <= 0 and missing_images <= 0:
        return False

    def of_others(record: Record) -> bool:
        return any(each.charged != owner.charged for each in record.owners)

    candidates = [
        record for record in all_records(state) if limit not in quota.OF_OWNER or not of_others(record)
    ]
    candidates.sort(key=lambda record: (of_others(record), garbage.last_used(state, record)))
    return remove(state, candidates, missing_bytes, missing_images)


def lacking(state: State, limits: Limits, size: int, owner: Owner, limit: object) -> tuple[int, int]:
    """Return how many bytes, and how many images, have to go for one more to be within `limit`.

    `limit` is what a LimitExceeded was for; (0, 0) for one that is of no use to make room for. The lock has
    to be held.
    """
    sizes = quota.sizes_of(state, owner.charged if limit in quota.OF_OWNER else None)
    if limit == quota.DISK_BYTES:
        free = os.fstatvfs(state.fileno())
        return max(size - free.f_bavail * free.f_frsize, 1), 0
    return {
        quota.OWNER_BYTES: (sum(sizes) + size - limits.owner_bytes, 0),
        quota.OWNER_IMAGES: (0, len(sizes) + 1 - limits.owner_images),
        quota.STORE_BYTES: (sum(sizes) + size - limits.total_bytes, 0),
        quota.STORE_IMAGES: (0, len(sizes) + 1 - limits.images),
    }.get(str(limit), (0, 0))


def remove(state: State, candidates: list[Record], bytes: int, images: int) -> bool:
    """Remove the first of `candidates` that are so many, and not in use; none if all of them are not enough.

    Tell whether they are. The lock has to be held. Raises OSError.
    """
    found: list[Record] = []
    for record in candidates:
        if len(found) >= images and sum(each.size for each in found) >= bytes:
            break
        if is_unused(state, record.digest):
            found.append(record)
    if len(found) < images or sum(each.size for each in found) < bytes:
        return False
    return not garbage.collect(state, found).in_use


def is_unused(state: State, digest: str) -> bool:
    """Tell whether nobody has an image open."""
    try:
        with (
            state.open(image_path(digest), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY) as fd,
            only_opener(fd.fileno()) as nobody_else,
        ):
            return nobody_else
    except SyscallError:
        return False
