"""Loop devices: a file as a block device, for file systems that want one (loop(4)).

A device is freed by the kernel with its last reference (autoclear), so that nothing has to be undone, and is
never shared between requests: its options would be shared as well.
"""

import ctypes
import errno
import os

from mountd.errors import LimitExceeded, NotSupported, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel.abi import loop_config, loop_info64
from mountd.kernel.flags import Ioctl, LoopFlags
from mountd.kernel.libc import call

CONTROL = "/dev/loop-control"
# Another process may take the free device before us; each retry asks for a new one.
MAXIMUM_TRIES = 64
SECTOR = 512  # bytes, as small as the sectors of a block device can be


class LoopDevice:
    """An attached loop device: `path` of its node, and the descriptor that keeps it alive."""

    __slots__ = ("fd", "path")

    def __init__(self, fd: OwnedFd, path: str) -> None:
        """Take `fd` over."""
        self.fd = fd
        self.path = path

    def sector_size(self) -> int:
        """Return how many bytes a sector of it has. Raises SyscallError."""
        size = ctypes.c_int()
        call("ioctl", self.fd.fileno(), Ioctl.BLKSSZGET, ctypes.byref(size))
        return size.value

    def close(self) -> None:
        """Give up the device; a mount on it keeps it until it is gone."""
        self.fd.close()


def attach(
    backing_fd: int,
    *,
    read_only: bool,
    direct_io: bool = True,
    offset: int = 0,
    size_limit: int = 0,
    block_size: int = 0,
) -> LoopDevice:
    """Return a loop device over `backing_fd` (borrowed), from byte `offset`, `size_limit` bytes or all.

    Direct I/O is a wish: the kernel leaves it where the backing file system cannot do it. With it, and
    without `block_size`, the device has the sectors of the disk below. Raises NotSupported where there are
    no loop devices, LimitExceeded when none is free, SyscallError.
    """
    flags = LoopFlags.AUTOCLEAR
    if read_only:
        flags |= LoopFlags.READ_ONLY
    if direct_io:
        flags |= LoopFlags.DIRECT_IO
    info = loop_info64(lo_offset=offset, lo_sizelimit=size_limit, lo_flags=int(flags))
    config = loop_config(fd=backing_fd, block_size=block_size, info=info)
    for _ in range(MAXIMUM_TRIES):
        number = _free_number()
        path = f"/dev/loop{number}"
        try:
            fd = OwnedFd(os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC))
        except FileNotFoundError:
            raise NotSupported(f"loop devices ({path} is missing)") from None
        try:
            call("ioctl", fd.fileno(), Ioctl.LOOP_CONFIGURE, ctypes.byref(config))
            return LoopDevice(fd, path)
        except SyscallError as error:
            fd.close()
            if error.errno != errno.EBUSY:
                raise
        except BaseException:
            fd.close()
            raise
    raise LimitExceeded("attempts to get a free loop device", MAXIMUM_TRIES, hint="try again later")


def backing_inode(path: str) -> tuple[int, int]:
    """Return device and inode of the file that the loop device at `path` shows. Raises SyscallError.

    ENXIO is for a device that is not attached.
    """
    info = loop_info64()
    try:
        fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        raise SyscallError(error.errno or 0, f"open({path})") from None
    with fd:
        call("ioctl", fd.fileno(), Ioctl.LOOP_GET_STATUS64, ctypes.byref(info))
    return int(info.lo_device), int(info.lo_inode)


def _free_number() -> int:
    try:
        control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        raise NotSupported(
            f"loop devices ({CONTROL} is missing)", hint="load the kernel module loop"
        ) from None
    try:
        return call("ioctl", control, Ioctl.LOOP_CTL_GET_FREE, None)
    finally:
        os.close(control)
