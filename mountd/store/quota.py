"""How much the store takes, of whom, and how many long operations run at the same time."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.errors import LimitExceeded
from mountd.store.disk import INCOMING, RESERVED, SLOTS, all_records
from mountd.store.record import ROOT

if TYPE_CHECKING:
    from mountd.fds import OwnedFd
    from mountd.store.disk import State
    from mountd.store.record import Owner

LATER = "try again later"
MAXIMUM_SLOT = 512  # bytes of what is written down about who has one
OWNER_BYTES, OWNER_IMAGES = "bytes of one owner in the store", "images of one owner in the store"
STORE_BYTES, STORE_IMAGES = "bytes in the store", "images in the store"
IMAGE_OWNERS = "owners of one stored image"
DISK_BYTES = "bytes on the disk of the store"
OF_OWNER = (OWNER_BYTES, OWNER_IMAGES)


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the store, in bytes and in numbers; those of an owner do not hold for the host's root.

    `transfers` are imports, pulls and verifications at the same time: fewer than there are workers, so that
    long ones leave room for mounts.
    """

    total_bytes: int = 256 << 30
    owner_bytes: int = 32 << 30
    image_bytes: int = 64 << 30
    images: int = 4096
    owner_images: int = 256
    transfers: int = 4
    owner_transfers: int = 2


def check(state: State, limits: Limits, size: int, owner: Owner) -> None:
    """Raise LimitExceeded if one image more, of `size` bytes, would be too much. The lock has to be held.

    What is being imported counts as if it were there.
    """
    taken, own = sizes_of(state), sizes_of(state, owner.charged)
    hint = "“mountctl image remove” makes room"
    if owner.uid != ROOT and sum(own) + size > limits.owner_bytes:
        raise LimitExceeded(OWNER_BYTES, limits.owner_bytes, hint=hint)
    if owner.uid != ROOT and len(own) >= limits.owner_images:
        raise LimitExceeded(OWNER_IMAGES, limits.owner_images, hint=hint)
    if sum(taken) + size > limits.total_bytes:
        raise LimitExceeded(STORE_BYTES, limits.total_bytes, hint=hint)
    if len(taken) >= limits.images:
        raise LimitExceeded(STORE_IMAGES, limits.images, hint=hint)


def sizes_of(state: State, charged: int | None = None) -> list[int]:
    """Return the sizes of all images, of those on one account if it is given, with what is being imported.

    The lock has to be held.
    """
    taken = [(record.size, {each.charged for each in record.owners}) for record in all_records(state)]
    for name in state.names(INCOMING):
        reserved = RESERVED.fullmatch(name)
        if reserved is not None:
            taken.append((int(reserved[1]), {int(reserved[2])}))
    return [size for size, accounts in taken if charged is None or charged in accounts]


def take_slot(state: State, limits: Limits, owner: Owner, work: str = "") -> OwnedFd:
    """Return what has to be kept open during a transfer. The lock has to be held.

    `work` is something that an owner does not do twice at the same time. Raises LimitExceeded, SyscallError.
    """
    free: OwnedFd | None = None
    own: list[str] = []
    try:
        for number in range(limits.transfers):
            fd = state.open(f"{SLOTS}/{number}", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                charged, _, busy_with = os.pread(fd.fileno(), MAXIMUM_SLOT, 0).decode().partition(" ")
                if charged == str(owner.charged):
                    own.append(busy_with)
                fd.close()
                continue
            if free is None:
                free = fd
            else:
                fd.close()
        if free is None:
            raise LimitExceeded("transfers at the same time", limits.transfers, hint=LATER)
        if owner.uid != ROOT and len(own) >= limits.owner_transfers:
            what = "transfers of one owner at the same time"
            raise LimitExceeded(what, limits.owner_transfers, hint=LATER)
        if work and work in own:
            raise LimitExceeded("transfers of the same by one owner at the same time", 1, hint=LATER)
        os.ftruncate(free.fileno(), 0)
        os.pwrite(free.fileno(), f"{owner.charged} {work}".encode(), 0)
    except BaseException:
        if free is not None:
            free.close()
        raise
    return free
