"""Carrying out a plan: the only step of a request that changes the system.

Everything made on the way is held by a descriptor of this process, and is gone with it: a loop device clears
itself, a detached mount and its superblock are dropped. So a failure at any step, and a kill at any moment,
leaves nothing.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, TypeVar

from mountd.errors import BadFileDescriptor, NotSupported, SyscallError
from mountd.execute import composefs, overlay, verity
from mountd.kernel import cloning, loop_device, mount_api, namespaces
from mountd.kernel.flags import MountAttr
from mountd.kernel.fs_context import FsContext
from mountd.kernel.lease import open_again
from mountd.kernel.paths import statx
from mountd.plan.operations import (
    Backing,
    CloneTree,
    CreateSuperblock,
    MakeComposefs,
    MakeMount,
    MakeOverlay,
    MapRanges,
    MapRootOwner,
    MapToNamespace,
    Seal,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from mountd.execute.naming import Naming
    from mountd.execute.top import Top
    from mountd.fds import OwnedFd
    from mountd.plan.operations import Operation, Plan, Window

    Rows = Sequence[tuple[int, int, int]]

T = TypeVar("T")
HERE = nullcontext()
# File systems whose drivers remember the name of their device, and follow it again later.
OPENED_AGAIN = frozenset({"btrfs"})
# It finds an image by the id in it, and for a moment takes the device of a superblock that is just being
# dropped for this image's.
LEFT_BEHIND = frozenset({"btrfs"})
PAUSES = (0.001, 0.005, 0.02, 0.05, 0.1)  # seconds
# What drivers say of a device with larger sectors than the file system was made for (ext4; xfs).
REFUSED_SECTORS = frozenset({errno.EINVAL, errno.ENOSYS})
MAPPING = (MapToNamespace, MapRanges, MapRootOwner)
WRONG_ORDER = "the plan has its operations in the wrong order"
DIRECTORY = "source.directoryFileDescriptor"
OF_THE_HOST = "use a file system that the host has mounted, or, where that is possible, the idmap “none”"


class SectorsTooLarge(Exception):
    """The driver has refused a loop device that has taken over large sectors, for direct I/O."""


class Sealer(Protocol):
    """Locks the attributes of mounts, and may keep some for whoever asks for the same again."""

    def __call__(self, mount: OwnedFd, name: str | None = None) -> OwnedFd:
        """Take `mount` over and return one whose attributes are locked; keep it under `name`, if given."""

    def again(self, name: str, *, locked: bool = True) -> OwnedFd | None:
        """Return another such mount as was kept under `name`, if it is still there."""

    def making(self, name: str) -> AbstractContextManager[None]:
        """Be the one who makes what has this name: whoever else does has ended by then."""

    def keep(self, mount: OwnedFd, name: str) -> OwnedFd:
        """Take `mount` over and return one of the same that is not locked; keep it, if there is room."""

    def put_on(self, mount_fd: int, directory_fd: int) -> None:
        """Attach a mount with locked attributes at a directory of another, both detached and borrowed."""


class Inputs:
    """What the operations refer to, all borrowed: image or directory, hash data, namespaces, who seals."""

    __slots__ = (
        "hash_fd",
        "image_fd",
        "layers",
        "mount_namespace_fd",
        "naming",
        "note",
        "opened",
        "seal",
        "top",
        "userns_fd",
    )

    def __init__(
        self,
        *,
        image_fd: int | None,
        userns_fd: int | None,
        seal: Sealer,
        hash_fd: int | None = None,
        note: Callable[[OwnedFd], None] | None = None,
        naming: Naming | None = None,
        mount_namespace_fd: int | None = None,
        layers: Sequence[int] = (),
        opened: Mapping[Window | None, str] = MappingProxyType({}),
        top: Top | None = None,
    ) -> None:
        """`hash_fd` is the hash data of dm-verity, where the plan has it; `naming` names sources.

        `note` is shown the mount, borrowed, while its ids are those of the file system. `mount_namespace_fd`
        is where a directory, which is `image_fd` then, may lie. `layers` are the mounts of an overlay,
        for a composefs that of the metadata first, and `top` is what takes what is written to it. `opened`
        are the paths of the devices that show what was encrypted, by the part of the image that it is in.
        """
        self.opened = opened
        self.top = top
        self.layers = layers
        self.mount_namespace_fd = mount_namespace_fd
        self.naming = naming
        self.image_fd = image_fd
        self.hash_fd = hash_fd
        self.userns_fd = userns_fd
        self.seal = seal
        self.note = note


def run(plan: Plan, inputs: Inputs) -> OwnedFd:
    """Carry out `plan` and return the mount. Nothing is left of it if that fails.

    Raises SyscallError, NotSupported, InvalidImage for an image that does not fit its root hash, and
    BadFileDescriptor for a directory that is not the one that was judged.
    """
    # Nothing is made once ids are mapped.
    making = [operation for operation in plan.operations if not isinstance(operation, MAPPING)]
    locked = any(isinstance(operation, Seal) for operation in making)
    mount = (
        make(making, None, inputs)
        if plan.shared is None
        else shared(making, plan.shared, inputs, locked=locked)
    )
    try:
        if inputs.note is not None:
            inputs.note(mount)
        for operation in plan.operations[len(making) :]:
            map_ids(operation, mount.fileno(), inputs)
    except BaseException:
        mount.close()
        raise
    return mount


def shared(operations: Sequence[Operation], name: str, inputs: Inputs, *, locked: bool) -> OwnedFd:
    """Return what is there under `name`, or make it, once for all who ask for it at the same moment."""
    seal = inputs.seal
    found = seal.again(name, locked=locked)
    if found is not None:
        return found
    with seal.making(name):
        found = seal.again(name, locked=locked)
        if found is not None:
            return found
        made = make(operations, name, inputs)
        return made if locked else seal.keep(made, name)


def make(operations: Sequence[Operation], shared: str | None, inputs: Inputs) -> OwnedFd:
    """Return a new mount, whose ids are those of the file system; raises as `run` does."""
    context: FsContext | None = None
    mount: OwnedFd | None = None
    try:
        for operation in operations:
            if isinstance(operation, CreateSuperblock | MakeOverlay | MakeComposefs):
                context = superblock(operation, inputs)
            elif isinstance(operation, MakeMount):
                mount = _needed(context).mount(operation.attributes)
            elif isinstance(operation, CloneTree):
                mount = clone(operation, inputs)
            elif isinstance(operation, Seal):
                # The old descriptor is the sealer's now, whether it succeeds or not.
                unsealed, mount = _needed(mount), None
                mount = inputs.seal(unsealed, shared)
            else:
                raise ValueError(WRONG_ORDER)
        done, mount = _needed(mount), None
        return done
    finally:
        if context is not None:
            context.close()
        if mount is not None:
            mount.close()


def run_all(plans: Iterable[Plan], inputs: Inputs) -> list[OwnedFd]:
    """Carry out `plans` and return their mounts; nothing is left of any if one fails.

    Raises what `run` raises.
    """
    made: list[OwnedFd] = []
    try:
        for plan in plans:
            made.append(run(plan, inputs))
    except BaseException:
        # In reverse: what is mounted in another goes first.
        while made:
            made.pop().close()
        raise
    return made


def superblock(operation: CreateSuperblock | MakeOverlay | MakeComposefs, inputs: Inputs) -> FsContext:
    """Return the context of the new superblock, of whatever kind."""
    if isinstance(operation, MakeOverlay):
        return overlay.create(operation, inputs.layers, inputs.naming, inputs.top)
    if isinstance(operation, MakeComposefs):
        return composefs.create(operation, inputs.layers, inputs.naming)
    return create(operation, inputs)


def create(operation: CreateSuperblock, inputs: Inputs) -> FsContext:
    """Return the context of the new superblock."""
    if operation.backing is Backing.NOTHING:
        return _create_from(operation, operation.type)
    image_fd = _needed(inputs.image_fd)
    refuse_lease(image_fd)
    if operation.backing is Backing.CRYPT:
        return _create_from(operation, inputs.opened[operation.window])
    if operation.verity is not None:
        # In a disk image, data and hash data are partitions of one file.
        hash_fd = image_fd if operation.verity.hash_window is not None else _needed(inputs.hash_fd)
        refuse_lease(hash_fd)
        device = verity.attach(image_fd, hash_fd, operation.verity, operation.window)
        try:
            return _create_from(operation, device.path)
        finally:
            device.close()
    if operation.backing is Backing.FILE:
        try:
            return _create_named(operation, inputs, image_fd)
        except SyscallError as error:
            # The file system that the image lies on cannot serve reads of the kernel (tmpfs), or erofs was
            # built without: then it takes a block device.
            if error.errno != errno.ENOTBLK:
                raise
    try:
        return _create_on_loop(operation, inputs, image_fd)
    except SectorsTooLarge:
        return _create_on_loop(operation, inputs, image_fd, direct_io=False)


def _create_on_loop(
    operation: CreateSuperblock, inputs: Inputs, image_fd: int, *, direct_io: bool = True
) -> FsContext:
    """Make it on a loop device over the image. Raises SectorsTooLarge where it may go without direct I/O."""
    window = operation.window
    offset, size = (0, 0) if window is None else (window.offset, window.size)
    loop = loop_device.attach(
        image_fd, read_only=operation.read_only, direct_io=direct_io, offset=offset, size_limit=size
    )
    try:
        if operation.type in OPENED_AGAIN:
            return _create_from(operation, loop.path)
        return _create_named(operation, inputs, loop.fd.fileno())
    except SyscallError as error:
        if direct_io and error.errno in REFUSED_SECTORS and loop.sector_size() > loop_device.SECTOR:
            raise SectorsTooLarge from error
        raise
    finally:
        loop.close()


def clone(operation: CloneTree, inputs: Inputs) -> OwnedFd:
    """Return a mount of the directory that was judged. Raises BadFileDescriptor for what is another."""
    try:
        mount = cloning.clone_directory(
            _needed(inputs.image_fd), operation.attributes, _needed(inputs.mount_namespace_fd)
        )
    except SyscallError as error:
        if error.errno != errno.EINVAL:
            raise
        raise BadFileDescriptor(
            DIRECTORY,
            "it lies in a mount namespace that is not the caller's, or something is mounted below it that "
            "the caller may not look behind",
        ) from None
    try:
        status = statx(mount.fileno(), "")
        found = os.makedev(status.stx_dev_major, status.stx_dev_minor), status.stx_ino
        if found != (operation.dev, operation.ino):
            raise BadFileDescriptor(DIRECTORY, "it is not the directory that was judged")
        if (status.stx_uid, status.stx_gid) != (operation.uid, operation.gid):
            raise BadFileDescriptor(
                DIRECTORY,
                f"it is shown as {operation.uid}:{operation.gid}'s by an idmapped mount, and belongs to "
                f"{status.stx_uid}:{status.stx_gid}",
            )
    except BaseException:
        mount.close()
        raise
    return mount


def refuse_lease(image_fd: int) -> None:
    """Raise SyscallError if somebody has a lease on the image (F_SETLEASE in fcntl(2)).

    The kernel opens the image to mount it, and would wait until the lease is given up or broken.
    """
    open_again(image_fd).close()


def _create_named(operation: CreateSuperblock, inputs: Inputs, fd: int) -> FsContext:
    """Make it from an open file, by the name that mountinfo is to show where there is one."""
    name, naming = operation.name, inputs.naming
    if name is not None and naming is not None and naming.lead(name, fd):
        return _create_from(operation, name, naming.inside())
    # A process has no other way to name an open file to a file system (before Linux 7.2).
    return _create_from(operation, f"/proc/self/fd/{fd}")


def _create_from(
    operation: CreateSuperblock, source: str, place: AbstractContextManager[None] = HERE
) -> FsContext:
    """Make it from `source`, a name that the kernel follows in `place`."""
    for pause in PAUSES:
        try:
            return _create_once(operation, source, place)
        except SyscallError as error:
            if error.errno != errno.EEXIST or operation.type not in LEFT_BEHIND:
                raise
        time.sleep(pause)
    return _create_once(operation, source, place)


def _create_once(operation: CreateSuperblock, source: str, place: AbstractContextManager[None]) -> FsContext:
    context = FsContext.open(operation.type)
    try:
        context.set_string("source", source)
        if operation.read_only:
            context.set_flag("ro")
        for name, value in operation.options:
            if value is None:
                context.set_flag(name)
            else:
                context.set_string(name, value)
        with place:
            context.create()
    except BaseException:
        context.close()
        raise
    return context


def map_ids(operation: Operation, mount_fd: int, inputs: Inputs) -> None:
    """Map the ids of the mount, which nobody else has seen yet."""
    if isinstance(operation, MapToNamespace):
        _map(mount_fd, _needed(inputs.userns_fd))
        return
    if isinstance(operation, MapRanges):
        uids: Rows = [(each.inner, each.outer, each.count) for each in operation.uids]
        gids: Rows = [(each.inner, each.outer, each.count) for each in operation.gids]
        root = statx(mount_fd, "")
    elif not isinstance(operation, MapRootOwner):
        raise ValueError(WRONG_ORDER)
    else:
        root = statx(mount_fd, "")
        uids, gids = [(root.stx_uid, operation.uid, 1)], [(root.stx_gid, operation.gid, 1)]
    with namespaces.make_user_namespace(uids, gids) as userns:
        _map(mount_fd, userns.fileno())
    shown = statx(mount_fd, "")
    _check_mapped(uids, root.stx_uid, shown.stx_uid)
    _check_mapped(gids, root.stx_gid, shown.stx_gid)


def _check_mapped(rows: Rows, id: int, shown: int) -> None:
    """Raise NotSupported if `rows` map the root directory's `id`, and it is shown as another than that.

    On what was mounted in a user namespace, the kernel takes the ids of an idmap for those of that one.
    """
    for first, outer, count in rows:
        if first <= id < first + count and outer + id - first != shown:
            raise NotSupported(
                "mapping ids on a file system that was mounted in a user namespace", hint=OF_THE_HOST
            )


def _map(mount_fd: int, userns_fd: int) -> None:
    mount_api.mount_setattr(mount_fd, set=MountAttr.IDMAP, userns_fd=userns_fd)


def _needed(value: T | None) -> T:
    if value is None:
        raise ValueError(WRONG_ORDER)
    return value
