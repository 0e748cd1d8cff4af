"""Attaching the mounts of a disk image, each at its directory below the first.

The directories are looked up in the image, whose links may lead anywhere: they are followed as if its root
directory were that of the system (RESOLVE_IN_ROOT in openat2(2)), so that nothing outside is reached.
"""

import os

from mountd.errors import NotFound, SyscallError
from mountd.kernel import moving, paths
from mountd.kernel.flags import Resolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mountd.fds import OwnedFd

NOT_THERE = ("ENOENT", "ENOTDIR", "ELOOP")
# For firmware: what it holds is of no use to who runs in the image, and systemd leaves it out, too.
OPTIONAL = {"efi": ("efi", "boot"), "boot": ("boot",)}


def attach_tree(directory_fd: int, parts: "Sequence[tuple[int, str]]") -> "list[str]":
    """As `attach_parts`, but with "" the first part belongs at the directory, the others below that part."""
    (first_fd, first_place), *others = parts
    if first_place:
        return attach_parts(directory_fd, parts)
    moving.attach(first_fd, directory_fd)
    try:
        return attach_parts(first_fd, others)
    except BaseException:
        detach(first_fd)
        raise


def attach_parts(
    root_fd: int,
    parts: "Sequence[tuple[int, str]]",
    attach: "Callable[[int, int], None]" = moving.attach,
) -> "list[str]":
    """Attach mounts, each with its place below the directory `root_fd`; all are borrowed.

    `attach` takes a mount and the directory for it. Returns the places that the image has no directory for,
    where that is no mistake. If one cannot be attached, none stays attached. Raises NotFound, SyscallError.
    """
    done: list[int] = []
    missing: list[str] = []
    wanted = [place for _, place in parts]
    try:
        for mount_fd, place in parts:
            target = find_place(root_fd, place, wanted)
            if target is None:
                missing.append(place)
                continue
            with target:
                attach(mount_fd, target.fileno())
            done.append(mount_fd)
    except BaseException:
        for mount_fd in reversed(done):
            detach(mount_fd)
        raise
    return missing


def find_place(root_fd: int, place: str, wanted: "Sequence[str]" = ()) -> "OwnedFd | None":
    """Return the directory at `place`, None if it may be missing. Raises NotFound, SyscallError.

    What makes do with another place has none that is among the `wanted`: a partition of its own goes there.
    """
    for path in OPTIONAL.get(place, (place,)):
        if path != place and path in wanted:
            continue
        try:
            return paths.openat2(
                root_fd, path, os.O_PATH | os.O_DIRECTORY, resolve=Resolve.IN_ROOT | Resolve.NO_MAGICLINKS
            )
        except SyscallError as error:
            if error.errno_name not in NOT_THERE:
                raise
    if place in OPTIONAL:
        return None
    raise NotFound(
        f"the directory {place} of the image, for its partition {place}",
        hint="have it in the image, or leave the partition out, with an imagePolicy such as “root=open”",
    )


def detach(mount_fd: int) -> None:
    """Detach what was attached, with all that is below it, if that can be done."""
    try:
        moving.detach(mount_fd)
    except OSError:
        return  # it has gone already
