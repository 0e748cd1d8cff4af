"""Which files are on a FUSE file system, told without asking its server (fusectl, fuse.rst)."""

import os

from mountd.errors import SyscallError
from mountd.kernel.libc import call

CONNECTIONS = "/sys/fs/fuse/connections"

_mounted: set[str] = set()  # where fusectl was seen


def is_fuse(major: int, minor: int) -> bool:
    """Tell whether a device number, as statx(2) has it, belongs to a FUSE connection.

    The directory that fusectl has for a connection is named after the kernel's dev_t as one number
    (fuse_ctl_add_conn()). Where fusectl is not mounted yet, as FUSE itself may be loaded only now, it is
    mounted here, in the mount namespace of this process.
    """
    if os.path.isdir(f"{CONNECTIONS}/{major << 20 | minor}"):
        return True
    # Only numbers that belong to no device can be a file system's own; and FUSE may be not there at all.
    if major or CONNECTIONS in _mounted:
        return False
    mount_fusectl()
    return os.path.isdir(f"{CONNECTIONS}/{minor}")


def mount_fusectl() -> None:
    """Have the directory of the connections in this mount namespace, if there is FUSE."""
    if not os.path.isdir(CONNECTIONS):
        return
    if not os.path.ismount(CONNECTIONS):
        try:
            call("mount", b"fusectl", CONNECTIONS.encode(), b"fusectl", 0, None)
        except SyscallError:
            return
    _mounted.add(CONNECTIONS)
