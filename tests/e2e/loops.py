"""The loop devices over an image."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from mountd.fds import OwnedFd
from mountd.kernel.abi import loop_info64
from mountd.kernel.flags import Ioctl, LoopFlags
from mountd.kernel.libc import call


def loops_over(image: Path | int) -> list[LoopFlags]:
    """The flags of all loop devices over an image, from LOOP_GET_STATUS64."""
    backing = os.stat(image)
    found = []
    for device in Path("/sys/block").glob("loop*/loop"):
        with OwnedFd(os.open(f"/dev/{device.parent.name}", os.O_RDONLY)) as fd:
            info = loop_info64()
            try:
                call("ioctl", fd.fileno(), Ioctl.LOOP_GET_STATUS64, ctypes.byref(info))
            except OSError:
                continue  # ENXIO: it was freed meanwhile
        if (info.lo_device, info.lo_inode) == (backing.st_dev, backing.st_ino):
            found.append(LoopFlags(info.lo_flags))
    return found


def wait_until_dropped(image: Path | int) -> None:
    deadline = time.monotonic() + 5
    while loops_over(image):
        assert time.monotonic() < deadline, "the loop device is still there"
        time.sleep(0.01)
