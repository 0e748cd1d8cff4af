"""A dm-verity device over an image and its hash data, for a superblock whose root hash is trusted.

Three devices are made, and each holds the one before: two loop devices, and dm-verity over both. All of
them go with the last that uses them, so that once there is a mount, it is the only one to hold them. If a
step fails, those made so far are closed, and that is all the undoing there is.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from mountd.errors import SyscallError, VerityMismatch
from mountd.kernel import dm_verity, loop_device

if TYPE_CHECKING:
    from mountd.kernel.device_mapper import Device
    from mountd.kernel.loop_device import LoopDevice
    from mountd.plan.operations import Verity, Window

# With direct I/O a loop device takes over the sectors of the disk below it, which may be as large as this,
# and dm-verity takes no blocks that are smaller than a sector.
PAGE = 4096


def attach(data_fd: int, hash_fd: int, verity: Verity, window: Window | None = None) -> Device:
    """Return a read-only device of the data in `data_fd` with the tree in `hash_fd`, both borrowed.

    `window` is where in its file the data is, as `verity.hash_window` is for the tree; they may be one file.
    Both were let through by `source.descriptor.inspect_descriptor`: a file with a server could stop the
    kernel. Its `path` is a source for a file system; whoever closes it before that is made loses it. Its
    first block has been read and fits the root hash. Raises VerityMismatch if it does not, NotSupported,
    SyscallError, and LimitExceeded where no loop device is free.
    """
    data = attach_loop(data_fd, window, verity.data_block_size)
    try:
        tree = attach_loop(hash_fd, verity.hash_window, verity.hash_block_size)
        try:
            device = dm_verity.create(
                data.path,
                tree.path,
                data_block_size=verity.data_block_size,
                hash_block_size=verity.hash_block_size,
                data_blocks=verity.data_blocks,
                hash_start_block=verity.hash_start_block,
                algorithm=verity.algorithm,
                root_hash=verity.root_hash,
                salt=verity.salt,
            )
        finally:
            tree.close()
    finally:
        data.close()
    try:
        check_first_block(device, verity.data_block_size)
    except BaseException:
        device.close()
        raise
    return device


def attach_loop(fd: int, window: Window | None, block_size: int) -> LoopDevice:
    """Return a read-only loop device over a file (borrowed) or over a part of it."""
    offset, size = (0, 0) if window is None else (window.offset, window.size)
    return loop_device.attach(
        fd, read_only=True, direct_io=block_size >= PAGE, offset=offset, size_limit=size
    )


def check_first_block(device: Device, length: int) -> None:
    """Read the first block, which the file system needs anyway and whose driver would only say "I/O error".

    Raises VerityMismatch if it does not fit the root hash.
    """
    try:
        os.pread(device.fd.fileno(), length, 0)
    except OSError as error:
        if error.errno == errno.EIO and dm_verity.is_corrupt(device.name):
            raise VerityMismatch from None
        raise SyscallError(error.errno or 0, f"pread({device.path}, {length}, 0)") from None
