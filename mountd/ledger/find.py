"""Where mounts are attached, in all mount namespaces, and which processes have something of them open."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mountd.errors import NotSupported, SyscallError
from mountd.kernel import mount_info
from mountd.kernel.flags import StatmountMask, StatxMask
from mountd.kernel.namespaces import owner_of, owner_uid, parent
from mountd.kernel.paths import statx

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mountd.fds import OwnedFd

    Device = tuple[int, int]
    Payer = tuple[int, int]  # as that of a record
    Payers = dict[tuple[int, int], Payer | None]  # of user namespaces, by device and inode

DEVICE = StatmountMask.SB_BASIC
TYPE = StatmountMask.FS_TYPE
PLACE = StatmountMask.MNT_POINT
TOO_LONG = "(a path too long to be told)"
IDENTITY = StatxMask.MNT_ID_UNIQUE
LONGEST_LOOK = 2.0  # seconds
LONGEST_WALK = 3.0  # seconds, before that
MANY = 1 << 20  # mounts; more than the kernel lets a mount namespace have, as it is usually set
OWN_USERNS = "/proc/self/ns/user"
GONE = ("ENOENT", "ESRCH", "EINVAL")


@dataclass(frozen=True, slots=True)
class Attachment:
    """One mount of a superblock: `mount_point` is as seen from the root of its mount namespace.

    `id` is the unique mount id, `namespace` that of the mount namespace, `file_system` the type. `payer` is
    whose container that namespace is in, None for the host's own.
    """

    id: int
    device: Device
    mount_point: str
    namespace: int
    file_system: str = ""
    payer: Payer | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """What a process has open of a mount: `what` is "fd 5", "cwd", "root" or "exe"."""

    pid: int
    command: str
    what: str
    id: int
    device: Device


def attachments(
    devices: set[Device],
    ids: set[int],
    hidden: frozenset[int],
    seconds: float = LONGEST_LOOK,
    walk_seconds: float = LONGEST_WALK,
) -> tuple[list[Attachment], bool]:
    """Return where mounts of these superblocks, or with these ids, are attached, and whether that is all.

    Those in the mount namespaces with the ids `hidden` are left out. Any user can have more mounts, and more
    mount namespaces, than anybody has the time to look at, so that it goes through those for `walk_seconds`
    and looks at what is in them for `seconds` at the most. Raises SyscallError, NotSupported.
    """
    found: list[Attachment] = []
    namespaces, complete = in_order(hidden, time.monotonic() + walk_seconds)
    deadline = time.monotonic() + seconds
    for namespace, whose in namespaces:
        for id in ended_is_empty(namespace):
            place = attached_at(id, namespace, devices, ids)
            if place is not None:
                found.append(replace(place, payer=whose))
            if time.monotonic() > deadline:
                return found, False
    return found, complete and time.monotonic() <= deadline


def in_order(hidden: frozenset[int], deadline: float) -> tuple[list[tuple[int, Payer | None]], bool]:
    """Return the ids of mount namespaces with whose they are: the host's, then one of each payer in turn.

    And whether that are all: none is added after the deadline. Of one owner's, those with few mounts come
    first. So who makes many, of whichever, harms nobody else. Raises SyscallError, NotSupported.
    """
    of_each: dict[Payer | None, list[tuple[int, int]]] = {}
    known: Payers = {}
    complete = True
    for space in mount_info.mount_namespaces():
        if space.id in hidden:
            continue
        if time.monotonic() > deadline:
            complete = False
            break
        with contextlib.suppress(SyscallError):  # it has ended
            count = mount_info.count_mounts(space.id, MANY)
            of_each.setdefault(payer(space.fd, known), []).append((count, space.id))
    found: list[tuple[bool, int, int, int, Payer | None]] = []
    for whose, theirs in of_each.items():
        for turn, (count, id) in enumerate(sorted(theirs)):
            found.append((whose is not None, turn, count, id, whose))
    return [(id, whose) for *_, id, whose in sorted(found, key=lambda each: each[:4])], complete


def is_hosts(namespace: OwnedFd) -> bool:
    """Tell whether a mount namespace is of the host's root, and not of one of a container."""
    return payer(namespace) is None


def payer(namespace: OwnedFd, known: Payers | None = None) -> Payer | None:
    """Return whose container a mount namespace is in, None for the host's own.

    That is who made the outermost user namespace, and which one if it is root, as what root has made belongs
    to different people. In `known` it is kept of all on the way to that, for who
    asks of many that are all there: each of them can lie in as many others as the kernel lets it.
    """
    known = {} if known is None else known
    found: Payer | None = None
    passed: list[tuple[int, int]] = []
    with contextlib.suppress(SyscallError), contextlib.ExitStack() as stack:
        outer: OwnedFd | None = stack.enter_context(owner_of(namespace.fileno()))
        own = os.stat(OWN_USERNS)
        while outer is not None and not os.path.samestat(status := os.fstat(outer.fileno()), own):
            here = (status.st_dev, status.st_ino)
            if here in known:
                found = known[here]
                break
            passed.append(here)
            uid = owner_uid(outer.fileno())
            found = (uid, 0 if uid else status.st_ino)
            outer = parent(outer.fileno())
            if outer is not None:
                stack.enter_context(outer)
        known.update(dict.fromkeys(passed, found))
    return found


def attached_at(id: int, namespace: int, devices: set[Device], ids: set[int]) -> Attachment | None:
    """Return where the mount with this id is attached, if it is one of those.

    Of what is nothing to mountd, nothing but a number is asked: its path can be of any length.
    """
    try:
        device = mount_info.statmount(id, DEVICE, namespace).sb_dev
        if device not in devices and id not in ids:
            return None
        info = mount_info.statmount(id, TYPE, namespace)
    except SyscallError:
        return None  # it has ended
    try:
        place = mount_info.statmount(id, PLACE, namespace).mount_point
    except SyscallError as error:
        if error.errno_name in GONE:
            return None
        place = TOO_LONG
    return None if place is None else Attachment(id, device, place, namespace, info.fs_type or "")


def ended_is_empty(namespace: int) -> list[int]:
    """Return the ids of all mounts in a mount namespace, none if it has ended meanwhile."""
    try:
        return mount_info.listmount(namespace=namespace)
    except SyscallError as error:
        if error.errno_name in GONE:
            return []
        raise


def uses(devices: set[Device], ids: set[int], seconds: float = LONGEST_LOOK) -> tuple[list[Use], bool]:
    """Return what processes have open of these superblocks and mounts, working directories included.

    And whether that is all: any user can have more descriptors open than anybody has the time to look at, so
    that it ends after `seconds`. No file system is asked anything for it, so that none can hold it up. A
    process that this one may not look into has nothing, by this.
    """
    found: list[Use] = []
    deadline = time.monotonic() + seconds
    for name in os.listdir("/proc"):
        if name.isdecimal():
            # It may end at any moment.
            with contextlib.suppress(OSError):
                for use in _uses_of(int(name), devices, ids):
                    if use is not None:
                        found.append(use)
                    if time.monotonic() > deadline:
                        return found, False
    return found, True


def processes_in(namespaces: set[int], maximum: int) -> list[Use]:
    """Return so many processes of containers that are in these mount namespaces, at most."""
    found: list[Use] = []
    for name in os.listdir("/proc") if namespaces else ():
        if not name.isdecimal() or len(found) == maximum:
            continue
        # It may have ended, or be none of ours.
        with contextlib.suppress(OSError, NotSupported), mount_info.namespace_of(name) as space:
            if space.id in namespaces and not is_hosts(space.fd):
                what = f"in mount namespace {space.id}"
                found.append(Use(int(name), command_of(name), what, 0, (0, 0)))
    return found


def command_of(pid: str) -> str:
    """Return what a process calls itself. Raises OSError."""
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def _uses_of(pid: int, devices: set[Device], ids: set[int]) -> Iterator[Use | None]:
    """Yield the uses of one process, and None for whatever else it has open."""
    directory = f"/proc/{pid}"
    places = [("cwd", "cwd"), ("root", "root"), ("exe", "exe")]
    places += [(f"fd/{number}", f"fd {number}") for number in os.listdir(f"{directory}/fd")]
    for place, what in places:
        status = _identity(f"{directory}/{place}")
        if status is None or (status[1] not in devices and status[0] not in ids):
            yield None
        else:
            yield Use(pid, command_of(str(pid)), what, *status)


def _identity(link: str) -> tuple[int, Device] | None:
    """Return the unique id of the mount that a link of /proc leads to, and its device."""
    try:
        fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = statx(fd, "", IDENTITY, sync=False)
    except SyscallError:
        return None
    finally:
        os.close(fd)
    return int(status.stx_mnt_id), (int(status.stx_dev_major), int(status.stx_dev_minor))
