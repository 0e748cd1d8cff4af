"""fs-verity as a kind of immutability: a file that its own file system lets nobody change.

The digest is measured on the descriptor that will be mounted, never claimed. The kernel keeps what it
measured as long as the file is open, here and later below the mount, and checks every read against it:
whoever can write to the disk below can make reads fail, and nothing else.

That holds for file systems of the kernel's that have fs-verity themselves. One with a server could answer
as it likes (FUSE passes the question on), so the type is asked first, and is one of a short list.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct

from mountd.errors import NotSupported, SyscallError
from mountd.evidence.model import Proof
from mountd.kernel.fs_verity import measure
from mountd.kernel.paths import file_system_magic

KIND = "fs-verity"
# linux/magic.h; the names are for nobody but the reader.
FILE_SYSTEMS = {0xEF53: "ext4", 0x9123683E: "btrfs", 0xF2F52010: "f2fs"}
VERITY_BLOCK = 4096
BLOCKS_AT_ONCE = 256
NOT_ENABLED = "fs-verity is not enabled on it"
NO_SUPPORT = "its file system has no fs-verity"
REASONS = {
    errno.ENODATA: NOT_ENABLED,
    errno.ENOTTY: NO_SUPPORT,
    errno.EOPNOTSUPP: f"{NO_SUPPORT}, or was made without the feature verity",
}


def prove(fd: int) -> Proof | str:
    """Measure the image `fd` (borrowed) and return the proof, or the reason why there is none.

    `fd` is one that `source.descriptor.inspect_descriptor` has let through, so that no server is waited for.
    Raises nothing.
    """
    try:
        if file_system_magic(fd) not in FILE_SYSTEMS:
            return NO_SUPPORT
        algorithm, digest = measure(fd)
    except SyscallError as error:
        return REASONS.get(error.errno or 0, f"fs-verity cannot be measured ({error.errno_name})")
    except (NotSupported, ValueError) as error:
        return f"fs-verity cannot be measured: {error}"
    return Proof(KIND, f"{algorithm.name.lower()}:{digest.hex()}")


def missing_in(directory: int) -> str | None:
    """Return why files below `directory`, borrowed, cannot have fs-verity; None if they can.

    The directory is one that `source.directory.inspect_directory` has let through. Raises nothing.
    """
    try:
        if file_system_magic(directory) not in FILE_SYSTEMS:
            return NO_SUPPORT
        measure(directory)
    except SyscallError as error:
        # That it is not enabled is for a file system to say that has it.
        return None if error.errno == errno.ENODATA else REASONS.get(error.errno or 0, NO_SUPPORT)
    except (NotSupported, ValueError) as error:
        return f"fs-verity cannot be measured: {error}"
    return None


def digest_of(fd: int, size: int) -> str:
    """Return the digest that fs-verity would have for the `size` bytes of `fd`, borrowed, as hexadecimal.

    It is that of SHA-256, blocks of 4096 bytes and no salt, which is what composefs goes by. The bytes are
    read as they are now. Raises ValueError if there are fewer of them, OSError.
    """
    levels: list[bytearray] = [bytearray()]
    for offset in range(0, size, VERITY_BLOCK * BLOCKS_AT_ONCE):
        length = min(size - offset, VERITY_BLOCK * BLOCKS_AT_ONCE)
        data = os.pread(fd, length, offset)
        if len(data) != length:
            raise ValueError("the file is shorter than it was")
        levels[0] += hashes(data)
    while len(levels[-1]) > hashlib.sha256().digest_size:
        levels.append(hashes(bytes(levels[-1])))
    # The size of a salt, the padding, and what is reserved for later.
    root = bytes(levels[-1]).ljust(64, b"\0")
    described = struct.pack("<BBBBIQ64s176x", 1, 1, VERITY_BLOCK.bit_length() - 1, 0, 0, size, root)
    return hashlib.sha256(described).hexdigest()


def hashes(data: bytes) -> bytearray:
    """Return the digests of the blocks of `data`, the last of which is filled up with zeros."""
    found = bytearray()
    for offset in range(0, len(data), VERITY_BLOCK):
        found += hashlib.sha256(data[offset : offset + VERITY_BLOCK].ljust(VERITY_BLOCK, b"\0")).digest()
    return found
