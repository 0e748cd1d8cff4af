"""dm-verity: a block device whose every block is checked when it is read (linux/dm-ioctl.h).

The data, the hash tree and the root hash are told to the kernel once, when the device is made; a block that
does not fit cannot be read (EIO). What is below may change at any time: what is read from the device is what
the root hash was made from, or nothing.

A device is made in five steps, after the first of which it exists by name. It is opened as early as there
is something to open, and from then on told to go with its last user (*deferred removal*): the descriptor
that `create` returns keeps it, later a mount on it does. Whoever is killed before that leaves a device
that nobody uses and that `remove_unused` finds by its name.

No udev cookie is given: by udev's rules for device-mapper, the first event of a device without one turns the
rules for disks off for good, so that the device is not probed and there are no links to what it holds. What
remains is a link in /dev/mapper, to a name that nobody guesses.
"""

import ctypes
import errno
import os
import sys

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel.abi import dm_ioctl, dm_target_spec
from mountd.kernel.flags import DeviceMapper, Ioctl
from mountd.kernel.libc import call

CONTROL = "/dev/mapper/control"
# Where the names of devices are; nobody else has reason to use this one.
PREFIX = "mountd-verity-"
TARGET = b"verity"
SECTOR = 512
VERSION = (4, 0, 0)  # the lowest that is compatible: deferred removal has a flag of its own
ROOM = 16384  # of an answer; a table of one target has below 1 KiB
MAXIMUM_ROOM = 4 << 20


def create(
    data_path: str,
    hash_path: str,
    *,
    data_block_size: int,
    hash_block_size: int,
    data_blocks: int,
    hash_start_block: int,
    algorithm: str,
    root_hash: bytes,
    salt: bytes,
) -> "VerityDevice":
    """Make a read-only device over the block devices `data_path` and `hash_path`, which it keeps.

    The sizes are in bytes, `data_blocks` counts data blocks, `hash_start_block` is the hash block at which
    the tree begins. Nothing is verified yet: that happens with each read. Raises NotSupported where there is
    no device-mapper or no dm-verity, SyscallError (EINVAL for values that do not fit together, with the
    reason in the kernel's log only); nothing is left then.
    """
    parameters = (
        f"1 {data_path} {hash_path} {data_block_size} {hash_block_size} {data_blocks} {hash_start_block} "
        f"{algorithm} {root_hash.hex()} {salt.hex() or '-'}"
    )
    name = PREFIX + os.urandom(16).hex()
    control = _open_control()
    try:
        number = _ask(control, Ioctl.DM_DEV_CREATE, name, uuid=name).dev
        fd: OwnedFd | None = None
        try:
            _load(control, name, data_blocks * data_block_size // SECTOR, parameters)
            path = f"/dev/dm-{_minor(number)}"
            fd = _open_node(path)
            # From here on the device ends with its last user, whatever happens to this process.
            _remove(control, name)
            _ask(control, Ioctl.DM_DEV_SUSPEND, name)  # without the flag SUSPEND it resumes
        except BaseException:
            if fd is not None:
                fd.close()
            _remove(control, name)
            raise
    finally:
        control.close()
    return VerityDevice(fd, path, name)


class VerityDevice:
    """A device of its own: `path` of its node, its device-mapper `name`, the descriptor that keeps it."""

    __slots__ = ("fd", "name", "path")

    def __init__(self, fd: OwnedFd, path: str, name: str) -> None:
        """Take `fd` over."""
        self.fd = fd
        self.path = path
        self.name = name

    def close(self) -> None:
        """Give up the device; a mount on it keeps it until it is gone."""
        self.fd.close()


def is_corrupt(name: str) -> bool:
    """Tell whether the device of that name has seen a block that does not fit its root hash.

    Raises SyscallError, ENXIO if there is no such device.
    """
    control = _open_control()
    try:
        return _text(*_answer(control, Ioctl.DM_TABLE_STATUS, name)).startswith("C")
    finally:
        control.close()


def table(name: str) -> str:
    """Return the parameters that the device of that name was made with, as the kernel has them."""
    control = _open_control()
    try:
        return _text(*_answer(control, Ioctl.DM_TABLE_STATUS, name, DeviceMapper.STATUS_TABLE))
    finally:
        control.close()


def remove_unused() -> int:
    """Have every device of mountd's go with its last user, at once if it has none; return their number.

    Only a process that was killed while it made one leaves such a device. This is for the start of the
    daemon: a device that is being made by another process is taken from it, whose request fails. Nothing is
    done where there is no device-mapper. Raises SyscallError.
    """
    try:
        control = _open_control()
    except NotSupported:
        return 0
    try:
        names = [name for name in _list(control) if name.startswith(PREFIX)]
        for name in names:
            _remove(control, name)
        return len(names)
    finally:
        control.close()


def check_available() -> None:
    """Raise NotSupported where there is no device-mapper or no dm-verity, SyscallError, OSError."""
    with _open_control() as control:
        if not _has_verity(control):
            raise NotSupported("dm-verity")


def _open_control() -> OwnedFd:
    try:
        return OwnedFd(os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENODEV, errno.ENXIO):
            raise
        raise NotSupported(
            f"device-mapper ({CONTROL} cannot be opened)", hint="load the kernel module dm-verity"
        ) from None


def _open_node(path: str) -> OwnedFd:
    try:
        return OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise NotSupported(f"device-mapper ({path}: {error.strerror})") from None


def _remove(control: OwnedFd, name: str) -> None:
    """Have the device go with its last user, at once if it has none; it may be gone already."""
    try:
        _ask(control, Ioctl.DM_DEV_REMOVE, name, DeviceMapper.DEFERRED_REMOVE)
    except SyscallError as error:
        if error.errno != errno.ENXIO:
            raise


def _load(control: OwnedFd, name: str, sectors: int, parameters: str) -> None:
    """Give the device its table of one target. Raises NotSupported where there is no dm-verity."""
    text = parameters.encode() + b"\0"
    spec = dm_target_spec(length=sectors, target_type=TARGET)
    try:
        _answer(
            control, Ioctl.DM_TABLE_LOAD, name, DeviceMapper.READONLY, data=bytes(spec) + text, targets=1
        )
    except SyscallError as error:
        if error.errno == errno.EINVAL and not _has_verity(control):
            raise NotSupported("dm-verity", hint="load the kernel module dm-verity") from None
        raise SyscallError(
            error.errno or 0, f"ioctl({CONTROL}, DM_TABLE_LOAD, verity {parameters})"
        ) from None


def _has_verity(control: OwnedFd) -> bool:
    try:
        _ask(control, Ioctl.DM_GET_TARGET_VERSION, TARGET.decode())
    except SyscallError:
        return False
    return True


def _list(control: OwnedFd) -> "list[str]":
    """Return the names of all devices; the answer is a chain of struct dm_name_list."""
    header, data = _answer(control, Ioctl.DM_LIST_DEVICES, "")
    names: list[str] = []
    at = 0
    while header.data_size > header.data_start and int.from_bytes(data[at : at + 8], sys.byteorder):
        names.append(data[at + 12 : data.index(b"\0", at + 12)].decode("utf-8", "replace"))
        step = int.from_bytes(data[at + 8 : at + 12], sys.byteorder)
        if not step:
            break
        at += step
    return names


def _ask(
    control: OwnedFd,
    request: Ioctl,
    name: str,
    flags: DeviceMapper = DeviceMapper(0),  # noqa: B008 - a constant
    *,
    uuid: str = "",
) -> dm_ioctl:
    """Make an ioctl that takes and returns the structure alone."""
    header, _ = _answer(control, request, name, flags, uuid=uuid)
    return header


def _answer(
    control: OwnedFd,
    request: Ioctl,
    name: str,
    flags: DeviceMapper = DeviceMapper(0),  # noqa: B008
    *,
    uuid: str = "",
    data: bytes = b"",
    targets: int = 0,
) -> "tuple[dm_ioctl, bytes]":
    """Make an ioctl of device-mapper and return its answer: the structure, and what follows it.

    Raises SyscallError; its text has the name of the device.
    """
    start = ctypes.sizeof(dm_ioctl)
    room = max(ROOM, start + len(data))
    while True:
        header = dm_ioctl(
            version=VERSION,
            data_size=room,
            data_start=start,
            target_count=targets,
            flags=int(flags),
            name=name.encode(),
            uuid=uuid.encode(),
        )
        buffer = ctypes.create_string_buffer(bytes(header) + data, room)
        try:
            call("ioctl", control.fileno(), request, buffer)
        except SyscallError as error:
            raise SyscallError(error.errno or 0, f"ioctl({CONTROL}, {request.name}, {name!r})") from None
        header = dm_ioctl.from_buffer_copy(buffer)
        if not header.flags & DeviceMapper.BUFFER_FULL:
            return header, buffer.raw[header.data_start :]
        if room >= MAXIMUM_ROOM:
            raise SyscallError(errno.EOVERFLOW, f"ioctl({CONTROL}, {request.name}, {name!r})")
        room *= 4


def _text(header: dm_ioctl, data: bytes) -> str:
    """Return the text of the first target of a status."""
    if not header.target_count:
        return ""
    start = ctypes.sizeof(dm_target_spec)
    return data[start : data.index(b"\0", start)].decode("utf-8", "replace")


def _minor(number: int) -> int:
    """Return the minor part of a dev_t as the kernel packs it for user space (huge_encode_dev())."""
    return (number & 0xFF) | (number >> 12 & 0xFFF00)
