"""fs-verity as a kind of immutability: a file that its own file system lets nobody change.

The digest is measured on the descriptor that will be mounted, never claimed. The kernel keeps what it
measured as long as the file is open, here and later below the mount, and checks every read against it:
whoever can write to the disk below can make reads fail, and nothing else.

That holds for file systems of the kernel's that have fs-verity themselves. One with a server could answer
as it likes (FUSE passes the question on), so the type is asked first, and is one of a short list.
"""

from __future__ import annotations

import errno

from mountd.errors import NotSupported, SyscallError
from mountd.evidence.model import Proof
from mountd.kernel.fs_verity import measure
from mountd.kernel.paths import file_system_magic

KIND = "fs-verity"
# linux/magic.h; the names are for nobody but the reader.
FILE_SYSTEMS = {0xEF53: "ext4", 0x9123683E: "btrfs", 0xF2F52010: "f2fs"}
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
