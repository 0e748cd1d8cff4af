"""Sharing the blocks of a file instead of copying them (FICLONE in ioctl_ficlonerange(2))."""

import errno

from mountd.errors import SyscallError
from mountd.kernel.flags import Ioctl
from mountd.kernel.libc import call

# Two file systems, one that cannot share, a file that it cannot share: then the bytes can still be copied.
IMPOSSIBLE = (
    errno.EBADF,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENOTTY,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.ETXTBSY,
    errno.EXDEV,
)


def reflink(source_fd: int, target_fd: int) -> bool:
    """Make the empty file `target_fd` a snapshot of `source_fd`, both borrowed; tell whether that worked.

    The kernel takes the snapshot at once, so that a source which is written to meanwhile is seen before or
    after a write. False is for files that cannot share blocks; raises SyscallError for what is wrong beyond
    that: ENOSPC, EDQUOT, EIO.
    """
    try:
        # The argument is the descriptor itself, not a pointer to it.
        call("ioctl", target_fd, Ioctl.FICLONE, source_fd)
    except SyscallError as error:
        if error.errno in IMPOSSIBLE:
            return False
        raise
    return True
