"""What is mounted: statmount(2), listmount(2) and the unique mount id of statx(2)."""

import ctypes

from mountd.errors import SyscallError
from mountd.kernel.abi import STATMOUNT_STRINGS, mnt_id_req
from mountd.kernel.abi import statmount as statmount_struct
from mountd.kernel.flags import StatmountMask, StatxMask
from mountd.kernel.libc import call
from mountd.kernel.paths import statx

LSMT_ROOT = 0xFFFFFFFFFFFFFFFF
MAXIMUM_REPLY = 64 << 10
BATCH = 512
SIZE_OF_REQUEST = 24  # MNT_ID_REQ_SIZE_VER0: without another namespace


def mount_id(fd: int) -> int:
    """Return the unique id (never reused, Linux 6.8) of the mount that `fd` lies in."""
    return int(statx(fd, "", StatxMask.MNT_ID_UNIQUE).stx_mnt_id)


class MountInfo:
    """A mount as statmount(2) describes it; text is None where it was not asked for."""

    __slots__ = ("attributes", "fs_type", "id", "mount_point", "parent_id", "propagation", "root", "sb_dev")

    def __init__(self, struct: statmount_struct, strings: bytes) -> None:
        """Read the fields of the kernel's answer."""
        mask = struct.mask
        text = {}
        for name, flag in (
            ("fs_type", StatmountMask.FS_TYPE),
            ("mnt_root", StatmountMask.MNT_ROOT),
            ("mnt_point", StatmountMask.MNT_POINT),
        ):
            if mask & flag:
                start = getattr(struct, name)
                text[name] = strings[start : strings.index(b"\0", start)].decode("utf-8", "surrogateescape")
        self.id = int(struct.mnt_id)
        self.parent_id = int(struct.mnt_parent_id)
        self.attributes = int(struct.mnt_attr)
        self.propagation = int(struct.mnt_propagation)
        self.sb_dev = (int(struct.sb_dev_major), int(struct.sb_dev_minor))
        self.fs_type = text.get("fs_type")
        self.root = text.get("mnt_root")
        self.mount_point = text.get("mnt_point")


def statmount(
    id: int,
    mask: StatmountMask = StatmountMask.SB_BASIC | StatmountMask.MNT_BASIC | StatmountMask.FS_TYPE,
    namespace: int = 0,
) -> MountInfo:
    """Describe the mount with the unique `id`. Raises SyscallError, ENOENT if there is none.

    `namespace` is the id of the mount namespace to look in (Linux 6.11), 0 for that of this process.
    """
    size_of_request = ctypes.sizeof(mnt_id_req) if namespace else SIZE_OF_REQUEST
    request = mnt_id_req(size_of_request, 0, id, int(mask), namespace)
    size = 4096
    while True:
        buffer = (ctypes.c_char * size)()
        try:
            call("statmount", ctypes.byref(request), buffer, size, 0)
        except SyscallError as error:
            if error.errno_name != "EOVERFLOW" or size >= MAXIMUM_REPLY:
                raise
            size *= 4
            continue
        struct = statmount_struct.from_buffer(buffer)
        return MountInfo(struct, ctypes.string_at(ctypes.addressof(buffer), struct.size)[STATMOUNT_STRINGS:])


def listmount(parent_id: int = LSMT_ROOT) -> list[int]:
    """Return the unique ids of all mounts below the mount `parent_id` in this mount namespace."""
    found: list[int] = []
    while True:
        request = mnt_id_req(SIZE_OF_REQUEST, 0, parent_id, found[-1] if found else 0)
        ids = (ctypes.c_uint64 * BATCH)()
        count = call("listmount", ctypes.byref(request), ids, BATCH, 0)
        found += ids[:count]
        if count < BATCH:
            return found
