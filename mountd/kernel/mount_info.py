"""What is mounted: statmount(2), listmount(2) and the unique mount id of statx(2)."""

import ctypes
import os
from contextlib import contextmanager

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel.abi import MNT_ID_REQ_SIZE_VER0, STATMOUNT_STRINGS, mnt_id_req, mnt_ns_info
from mountd.kernel.abi import statmount as statmount_struct
from mountd.kernel.flags import Ioctl, StatmountMask, StatxMask
from mountd.kernel.libc import call
from mountd.kernel.paths import statx

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

LSMT_ROOT = 0xFFFFFFFFFFFFFFFF
MAXIMUM_REPLY = 64 << 10
BATCH = 512
COUNTED = 8192  # mounts at a time


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
    request = _request(id, int(mask), namespace)
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


def listmount(parent_id: int = LSMT_ROOT, namespace: int = 0) -> list[int]:
    """Return the unique ids of all mounts below the mount `parent_id`, in this mount namespace or that one.

    Raises SyscallError.
    """
    found: list[int] = []
    while True:
        request = _request(parent_id, found[-1] if found else 0, namespace)
        ids = (ctypes.c_uint64 * BATCH)()
        count = call("listmount", ctypes.byref(request), ids, BATCH, 0)
        found += ids[:count]
        if count < BATCH:
            return found


def count_mounts(namespace: int, most: int) -> int:
    """Return how many mounts a mount namespace has, or some number from `most` on. Raises SyscallError."""
    total, last = 0, 0
    ids = (ctypes.c_uint64 * COUNTED)()
    while total < most:
        request = _request(LSMT_ROOT, last, namespace)
        count = call("listmount", ctypes.byref(request), ids, COUNTED, 0)
        total += count
        if count < COUNTED:
            break
        last = ids[count - 1]
    return total


def _request(id: int, param: int, namespace: int) -> mnt_id_req:
    size = ctypes.sizeof(mnt_id_req) if namespace else MNT_ID_REQ_SIZE_VER0
    return mnt_id_req(size, 0, id, param, namespace)


class MountNamespace:
    """A mount namespace: `fd` keeps it alive and belongs to whoever has this, `id` is never used twice."""

    __slots__ = ("fd", "id")

    def __init__(self, fd: OwnedFd, id: int) -> None:
        """Take `fd` over."""
        self.fd = fd
        self.id = id


def mount_namespaces() -> "Iterator[MountNamespace]":
    """Yield all mount namespaces, each until the next is asked for: this process's own, and those around it.

    Only two are open at a time: any user can make more of them than a process may have descriptors. The
    kernel lists them for who has CAP_SYS_ADMIN and is in no pid namespace; within one, those are found that
    some process there is in. Raises SyscallError, and NotSupported before Linux 6.12.
    """
    with namespace_of("self") as own:
        yield own
        for way in (Ioctl.NS_MNT_GET_NEXT, Ioctl.NS_MNT_GET_PREV):
            try:
                space = _neighbour(own.fd, way)
            except SyscallError as error:
                if error.errno_name != "EPERM":
                    raise
                yield from _namespaces_of_processes(own.id)
                return
            while space is not None:
                with space.fd:
                    yield space
                    space = _neighbour(space.fd, way)


def _namespaces_of_processes(own: int) -> "Iterator[MountNamespace]":
    known = {own}
    for pid in os.listdir("/proc"):
        if not pid.isdecimal():
            continue
        try:
            fd = OwnedFd(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            continue  # it has ended, or is none of ours
        with fd:
            id = namespace_id(fd.fileno())
            if id not in known:
                known.add(id)
                yield MountNamespace(fd, id)


def namespace_id(fd: int) -> int:
    """Return the id of the mount namespace that `fd` refers to. Raises SyscallError, NotSupported."""
    info = mnt_ns_info(ctypes.sizeof(mnt_ns_info), 0, 0)
    _ask(fd, Ioctl.NS_MNT_GET_INFO, info)
    return int(info.mnt_ns_id)


@contextmanager
def namespace_of(process: str) -> "Iterator[MountNamespace]":
    """Yield the mount namespace of a process, or of this one ("self"). Raises OSError, NotSupported."""
    with OwnedFd(os.open(f"/proc/{process}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)) as fd:
        yield MountNamespace(fd, namespace_id(fd.fileno()))


def _neighbour(fd: OwnedFd, which: Ioctl) -> MountNamespace | None:
    info = mnt_ns_info(ctypes.sizeof(mnt_ns_info), 0, 0)
    try:
        found = OwnedFd(_ask(fd.fileno(), which, info))
    except SyscallError as error:
        if error.errno_name == "ENOENT":
            return None
        raise
    return MountNamespace(found, int(info.mnt_ns_id))


def _ask(fd: int, which: Ioctl, info: mnt_ns_info) -> int:
    try:
        return call("ioctl", fd, which, ctypes.byref(info))
    except SyscallError as error:
        if error.errno_name == "ENOTTY":
            raise NotSupported("listing mount namespaces (Linux 6.12)") from None
        raise
