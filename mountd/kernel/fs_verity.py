"""fs-verity: files whose contents the file system checks against a hash tree (linux/fsverity.h).

Once it is enabled on a file, nobody can write to the file any more, root included, and every read of it is
checked; the *digest* that `measure` returns is what the checks go back to. Until the last descriptor is
closed it stays the same even if the disk below is changed: then reads fail.
"""

import ctypes

from mountd.kernel.abi import fsverity_digest, fsverity_enable_arg
from mountd.kernel.flags import Ioctl, VerityAlgorithm
from mountd.kernel.libc import call

MAXIMUM_SALT = 32


def enable(
    fd: int,
    *,
    algorithm: VerityAlgorithm = VerityAlgorithm.SHA256,
    block_size: int = 4096,
    salt: bytes = b"",
) -> None:
    """Enable fs-verity on the regular file `fd` (borrowed), which is open for reading only.

    The kernel builds the hash tree, which takes as long as reading the file. Raises SyscallError: ETXTBSY
    while anybody has the file open for writing, EEXIST if it is enabled already, ENOTTY and EOPNOTSUPP where
    the file system cannot, EACCES, EROFS; ValueError for a salt longer than 32 bytes.
    """
    if len(salt) > MAXIMUM_SALT:
        raise ValueError(f"a salt of {len(salt)} bytes is longer than {MAXIMUM_SALT}")
    buffer = ctypes.create_string_buffer(salt, MAXIMUM_SALT)
    argument = fsverity_enable_arg(
        version=1,
        hash_algorithm=algorithm,
        block_size=block_size,
        salt_size=len(salt),
        salt_ptr=ctypes.addressof(buffer) if salt else 0,
    )
    call("ioctl", fd, Ioctl.FS_IOC_ENABLE_VERITY, ctypes.byref(argument))


def measure(fd: int) -> "tuple[VerityAlgorithm, bytes]":
    """Return algorithm and digest of the file `fd` (borrowed), which the kernel enforces.

    It takes no longer for a large file. Raises SyscallError: ENODATA if fs-verity is not enabled on it,
    ENOTTY and EOPNOTSUPP where the file system or the kernel has none; ValueError for an algorithm that is
    not known here.
    """
    result = fsverity_digest(digest_size=64)
    call("ioctl", fd, Ioctl.FS_IOC_MEASURE_VERITY, ctypes.byref(result))
    return VerityAlgorithm(result.digest_algorithm), bytes(result.digest)[: result.digest_size]
