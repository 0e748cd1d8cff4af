"""Devices of device-mapper, each of one target (linux/dm-ioctl.h).

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
# What the names of all devices begin with; nobody else has reason to use this.
PREFIX = "mountd-"
KINDS = ("verity", "crypt")
SECTOR = 512
VERSION = (4, 0, 0)  # the lowest that is compatible: deferred removal has a flag of its own
ROOM = 16384  # of an answer; a table of one target has below 1 KiB
MAXIMUM_ROOM = 4 << 20


class Device:
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

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def create(
    target: str,
    sectors: int,
    parameters: "bytes | bytearray",
    *,
    read_only: bool = True,
    secret: bool = False,
) -> Device:
    """Make a device of `sectors` of 512 bytes with the one target `target`, which may take a module.

    With `secret`, the parameters, which have to be a bytearray, are wiped once the kernel has them, and so
    is what it has read; they are in no error. Raises NotSupported where there is no device-mapper or no such
    target, SyscallError (EINVAL for values that do not fit together, with the reason in the kernel's log
    only); nothing is left then.
    """
    name = f"{PREFIX}{target}-{os.getpid()}-{os.urandom(16).hex()}"
    control: OwnedFd | None = None
    try:
        control = open_control(target)
        number = _ask(control, Ioctl.DM_DEV_CREATE, name, uuid=name).dev
        fd: OwnedFd | None = None
        try:
            flags = DeviceMapper(0)
            if read_only:
                flags |= DeviceMapper.READONLY
            if secret:
                flags |= DeviceMapper.SECURE_DATA
            _load(control, name, target, sectors, parameters, flags)
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
        if control is not None:
            control.close()
        if secret and isinstance(parameters, bytearray):
            parameters[:] = bytes(len(parameters))
    return Device(fd, path, name)


def status(name: str, flags: DeviceMapper = DeviceMapper(0)) -> str:  # noqa: B008 - a constant
    """Return what the target of a device says of itself. Raises SyscallError, ENXIO if there is none."""
    control = open_control()
    try:
        return _text(*_answer(control, Ioctl.DM_TABLE_STATUS, name, flags))
    finally:
        control.close()


def remove_unused(maker: "int | None" = None) -> int:
    """Have every device of mountd's go with its last user, at once if it has none; return their number.

    Only a process that was killed while it made one leaves such a device. This is for the start of the
    daemon: a device that is being made by another process is taken from it, whose request fails. With
    `maker`, it is about those of one process only, which has been killed. Nothing is done where there is no
    device-mapper. Raises SyscallError.
    """
    try:
        control = open_control()
    except NotSupported:
        return 0
    try:
        of = "" if maker is None else f"{maker}-"
        prefixes = tuple(f"{PREFIX}{kind}-{of}" for kind in KINDS)
        names = [name for name in _list(control) if name.startswith(prefixes)]
        for name in names:
            _remove(control, name)
        return len(names)
    finally:
        control.close()


def check_available(target: str) -> None:
    """Raise NotSupported where there is no device-mapper or no such target, SyscallError, OSError."""
    with open_control(target) as control:
        if not _has(control, target):
            raise _lacking(target)


def open_control(target: str = "verity") -> OwnedFd:
    """Open the control node; `target` is what the hint names. Raises NotSupported, OSError."""
    try:
        return OwnedFd(os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENODEV, errno.ENXIO):
            raise
        raise NotSupported(
            f"device-mapper ({CONTROL} cannot be opened)", hint=f"load the kernel module dm-{target}"
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


def _load(
    control: OwnedFd,
    name: str,
    target: str,
    sectors: int,
    parameters: "bytes | bytearray",
    flags: DeviceMapper,
) -> None:
    """Give the device its table of one target. Raises NotSupported where there is none of this kind."""
    spec = dm_target_spec(length=sectors, target_type=target.encode())
    try:
        _answer(control, Ioctl.DM_TABLE_LOAD, name, flags, spec=bytes(spec), text=parameters)
    except SyscallError as error:
        if error.errno == errno.EINVAL and not _has(control, target):
            raise _lacking(target) from None
        said = ""
        if not flags & DeviceMapper.SECURE_DATA:
            said = f" {bytes(parameters).decode('ascii', 'replace')}"
        raise SyscallError(error.errno or 0, f"ioctl({CONTROL}, DM_TABLE_LOAD, {target}{said})") from None


def _lacking(target: str) -> NotSupported:
    return NotSupported(f"dm-{target}", hint=f"load the kernel module dm-{target}")


def _has(control: OwnedFd, target: str) -> bool:
    try:
        _ask(control, Ioctl.DM_GET_TARGET_VERSION, target)
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
    spec: bytes = b"",
    text: "bytes | bytearray" = b"",
) -> "tuple[dm_ioctl, bytes]":
    """Make an ioctl of device-mapper and return its answer: the structure, and what follows it.

    Raises SyscallError; its text has the name of the device.
    """
    start = ctypes.sizeof(dm_ioctl)
    length = len(spec) + len(text)
    room = max(ROOM, start + length + 1)
    while True:
        header = dm_ioctl(
            version=VERSION,
            data_size=room,
            data_start=start,
            target_count=bool(spec),
            flags=int(flags),
            name=name.encode(),
            uuid=uuid.encode(),
        )
        buffer = ctypes.create_string_buffer(bytes(header) + spec, room)
        at = ctypes.addressof(buffer) + start + len(spec)
        _put(at, text)
        try:
            call("ioctl", control.fileno(), request, buffer)
        except SyscallError as error:
            raise SyscallError(error.errno or 0, f"ioctl({CONTROL}, {request.name}, {name!r})") from None
        finally:
            if flags & DeviceMapper.SECURE_DATA:
                ctypes.memset(at, 0, len(text))
        header = dm_ioctl.from_buffer_copy(buffer)
        if not header.flags & DeviceMapper.BUFFER_FULL:
            return header, buffer.raw[header.data_start :]
        if room >= MAXIMUM_ROOM:
            raise SyscallError(errno.EOVERFLOW, f"ioctl({CONTROL}, {request.name}, {name!r})")
        room *= 4


def _put(address: int, text: "bytes | bytearray") -> None:
    """Copy `text` to where the kernel reads it, and to nowhere else."""
    source = (ctypes.c_char * len(text)).from_buffer(text) if isinstance(text, bytearray) else text
    ctypes.memmove(address, source, len(text))


def _text(header: dm_ioctl, data: bytes) -> str:
    """Return the text of the first target of a status."""
    if not header.target_count:
        return ""
    start = ctypes.sizeof(dm_target_spec)
    return data[start : data.index(b"\0", start)].decode("utf-8", "replace")


def _minor(number: int) -> int:
    """Return the minor part of a dev_t as the kernel packs it for user space (huge_encode_dev())."""
    return (number & 0xFF) | (number >> 12 & 0xFFF00)
