"""Recognising a file system in an image that nothing vouches for yet, in a process that can do no harm.

The parser is the same (`superblock.recognise`); it runs in a throw-away child that has given up everything
but reading the image (kernel/sandbox.py), and that tells what it found.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mountd.errors import AmbiguousRoot, InvalidImage, UnsupportedFileSystem
from mountd.kernel import sandbox
from mountd.source import disk, luks, verity_superblock
from mountd.source.model import Disk, FileSystem, Luks, VeritySuperblock
from mountd.source.superblock import recognise, recognise_unless_disk

if TYPE_CHECKING:
    from collections.abc import Callable

    Parse = Callable[[Callable[[int, int], bytes]], dict[str, object]]

CPU_SECONDS = 2
MEMORY = 64 << 20


def recognise_image(fd: int, size: int, *, confined: bool) -> FileSystem:
    """Return the file system of the image `fd` (borrowed) of `size` bytes.

    Raises InvalidImage and UnsupportedFileSystem as `recognise` does.
    """
    if not confined:
        return recognise(_reader(fd), size)
    return FileSystem(**_in_child(fd, lambda read: asdict(recognise(read, size)), "its superblock"))


def recognise_source(fd: int, size: int, *, confined: bool) -> FileSystem | Disk | Luks:
    """Return the file system of the image `fd` (borrowed) of `size` bytes, its partitions, or LUKS header.

    Raises InvalidImage and UnsupportedFileSystem as `recognise`, `disk.read` and `luks.read` do.
    """
    machine = os.uname().machine

    def look(read: Callable[[int, int], bytes]) -> FileSystem | Disk | Luks:
        try:
            found = recognise_unless_disk(read, size)
        except UnsupportedFileSystem as error:
            if error.parameters.get("fileSystemType") != luks.TYPE:
                raise
            return luks.read(read, size)
        return disk.read(read, size, machine) if found is None else found

    def parse(read: Callable[[int, int], bytes]) -> dict[str, object]:
        found = look(read)
        if isinstance(found, FileSystem):
            return {"file_system": asdict(found)}
        if isinstance(found, Luks):
            return {"luks": luks.to_plain(found)}
        return {"disk": disk.to_plain(found)}

    if not confined:
        return look(_reader(fd))
    told = _in_child(fd, parse, "its superblock")
    if "disk" in told:
        return disk.from_plain(told["disk"], size)
    if "luks" in told:
        return luks.from_plain(told["luks"], size)
    return FileSystem(**told["file_system"])


def read_verity_superblock(hash_fd: int, hash_size: int, data_size: int) -> VeritySuperblock:
    """Return what the hash data `hash_fd` (borrowed) of dm-verity says about itself, read in a child.

    Raises InvalidImage as `verity_superblock.read` does.
    """

    def parse(read: Callable[[int, int], bytes]) -> dict[str, object]:
        found = verity_superblock.read(read, hash_size, data_size)
        return {**asdict(found), "salt": found.salt.hex()}

    told = _in_child(hash_fd, parse, "the superblock of the hash data")
    return VeritySuperblock(**{**told, "salt": bytes.fromhex(told["salt"])})


def read_luks(fd: int, size: int) -> Luks:
    """Return what the LUKS header at the start of `fd` (borrowed) says, of `size` bytes, read in a child.

    Raises InvalidImage and UnsupportedFileSystem as `luks.read` does.
    """
    told = _in_child(fd, lambda read: luks.to_plain(luks.read(read, size)), "its LUKS header")
    return luks.from_plain(told, size)


def _reader(fd: int) -> Callable[[int, int], bytes]:
    """Return a way to read the image, which raises InvalidImage where that is not possible."""

    def read(offset: int, length: int) -> bytes:
        try:
            return os.pread(fd, length, offset)
        except OSError as error:
            raise InvalidImage(f"it cannot be read ({error.strerror})", offset=offset) from None

    return read


def _in_child(fd: int, parse: Parse, what: str) -> dict[str, Any]:
    """Return what `parse` makes of the file in a confined child; `what` is what it reads, for messages.

    Raises InvalidImage and UnsupportedFileSystem. Without a deadline: how long the file takes to be read is
    for whoever has given it to know, and for whoever watches this process.
    """
    told = sandbox.ask(lambda: parse(_reader(fd)), {fd}, cpu_seconds=CPU_SECONDS, memory=MEMORY)
    if told is None:
        raise InvalidImage(f"{what} could not be read within the limits set for that")
    if "found" in told:
        return dict(told["found"])
    if told.get("error") == UnsupportedFileSystem.wire_name:
        raise UnsupportedFileSystem(told["reason"], file_system_type=told.get("fileSystemType"))
    if told.get("kind") == AmbiguousRoot.__name__:
        raise AmbiguousRoot
    if told.get("error") == InvalidImage.wire_name:
        raise InvalidImage(told["reason"], offset=told.get("offset"))
    raise InvalidImage(f"{what} could not be read: {told.get('failed')}")
