"""Removing from the store, and never what is in use.

What is in use
--------------
An image is in use as long as anybody has it open, and that is for the kernel to say: it grants a write lease
on a file (F_SETLEASE) only if no other open file refers to it (`kernel.lease`). Measured on Linux 6.18, it
is refused while a file-backed erofs is mounted from the file, attached or detached and in whatever mount
namespace, while a loop device has it, attached or detached mount or none, while a process has it open or
mapped; and granted again once the last of them is gone. Looking for the mounts instead would miss the
detached ones, which no mountinfo shows, and /sys/block/loop*/loop/backing_file shows only the loop devices.

While the lease is held nobody can open the file: a mount that comes in between waits a moment (`disk`) and
finds that the image is gone. Should the kernel have no leases for the store's file system, nothing is
removed. And a removal that went wrong would cost nothing but the name: the kernel keeps an unlinked file
for those who have it open.

A record goes before its image, so that at each moment whoever finds a record finds the image. What a
killed process has left is swept: what is in incoming/ and nobody holds, an image without a record, a record
without an image or one that cannot be read, what is known of a pulled image of which a layer is gone, and
tags that lead to no such image.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage, NotFound, SyscallError
from mountd.kernel.lease import only_opener
from mountd.store.disk import (
    HEX,
    IMAGES,
    INCOMING,
    PULLED,
    RECORDS,
    TAGS,
    image_path,
    record_path,
)
from mountd.store.layering import key_of
from mountd.store.record import NoRecord, hex_of

if TYPE_CHECKING:
    from mountd.store.disk import State
    from mountd.store.record import Record


@dataclass(frozen=True, slots=True)
class Collected:
    """What a garbage collection did: digests of what it removed, its bytes, and what stayed, as in use."""

    removed: tuple[str, ...]
    freed: int
    in_use: tuple[str, ...]


def sweep(state: State, *, read_records: bool = True) -> None:
    """Remove what killed processes have left. The lock has to be held. Raises OSError.

    Without `read_records` only by names, which takes no longer with many images: a killed process leaves
    nothing else.
    """
    for name in state.names(INCOMING):
        path = f"{INCOMING}/{name}"
        # A record is written under the lock, so that here it is nobody's.
        if not state.is_held(path):
            state.discard(path)
    for name in state.names(RECORDS) if read_records else ():
        digest = f"sha256:{name.removesuffix('.json')}"
        if HEX.fullmatch(name.removesuffix(".json")) and not is_whole(state, digest):
            state.unlink(record_path(digest))
    if read_records:
        sweep_pulled(state)
    known = set(state.names(RECORDS))
    for name in state.names(IMAGES):
        if HEX.fullmatch(name) and f"{name}.json" not in known:
            drop(state, f"sha256:{name}")


def sweep_pulled(state: State) -> None:
    """Remove what is known of images of which a layer is gone, and their tags.

    The lock has to be held. Raises OSError.
    """
    known = set(state.names(RECORDS))
    for name in state.names(PULLED):
        path = f"{PULLED}/{name}"
        try:
            whole = all(f"{hex_of(digest)}.json" in known for digest in state.read_pulled(path).stored)
        except NoRecord:
            whole = False
        if not whole:
            state.unlink(path)
    sweep_tags(state)


def sweep_tags(state: State) -> None:
    """Remove tags that lead to nothing. The lock has to be held. Raises OSError."""
    known = set(state.names(PULLED))
    for name in state.names(TAGS):
        path = f"{TAGS}/{name}"
        try:
            tag = state.read_tag(path)
            leads = f"{key_of(tag.repository, tag.manifest)}.json" in known
        except NoRecord:
            leads = False
        if not leads:
            state.unlink(path)


def is_whole(state: State, digest: str) -> bool:
    """Tell whether an image has a record that can be read, and a file."""
    try:
        state.read_record(digest)
        os.stat(image_path(digest), dir_fd=state.fileno(), follow_symlinks=False)
    except (NotFound, NoRecord, FileNotFoundError):
        return False
    return True


def drop(state: State, digest: str) -> bool:
    """Remove an image with its record, unless it is in use; tell which. The lock has to be held."""
    try:
        fd = state.open(image_path(digest), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except SyscallError:
        return False
    with fd, only_opener(fd.fileno()) as nobody_else:
        if nobody_else:
            state.unlink(record_path(digest))
            state.unlink(image_path(digest))
        return nobody_else


def collect(state: State, candidates: list[Record]) -> Collected:
    """Remove those of `candidates` that are not in use. The lock has to be held. Raises OSError."""
    removed: list[str] = []
    in_use: list[str] = []
    freed = 0
    for record in candidates:
        if drop(state, record.digest):
            removed.append(record.digest)
            freed += record.size
        else:
            in_use.append(record.digest)
    if removed:
        sweep_pulled(state)
    return Collected(tuple(removed), freed, tuple(in_use))


def last_used(state: State, record: Record) -> int:
    """Return when an image was mounted or read last, in seconds since the epoch (see `Store.lookup`)."""
    try:
        with state.open_image(record) as fd:
            return max(record.created, int(os.fstat(fd.fileno()).st_atime))
    except (NotFound, InvalidImage, SyscallError):
        return record.created
