"""The mount system calls that work on mounts: open_tree(2), move_mount(2), mount_setattr(2), umount2(2).

Descriptors passed in are borrowed; what a function returns as `OwnedFd` belongs to the caller. Every
function raises SyscallError, and NotSupported where the kernel lacks the call.
"""

from ctypes import byref, sizeof

from mountd.fds import OwnedFd
from mountd.kernel.abi import mount_attr
from mountd.kernel.flags import AtFlags, MountAttr, MoveMount, OpenTree, Propagation, Unmount
from mountd.kernel.libc import call
from mountd.kernel.numbers import AT_FDCWD

# Combining flags costs more than most system calls do.
NO_CHANGE = MountAttr(0)
CLONE = OpenTree.CLONE | OpenTree.NO_AUTOMOUNT | OpenTree.CLOEXEC
DETACH = Unmount.DETACH | Unmount.NOFOLLOW
WHOLE_TREE = AtFlags.EMPTY_PATH | AtFlags.RECURSIVE


def path_bytes(path: "str | bytes") -> bytes:
    """Return a path as the kernel takes it; undecodable bytes survive (PEP 383)."""
    return path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")


def open_tree(dir_fd: int, path: "str | bytes", flags: OpenTree) -> OwnedFd:
    """Return the mount object at `path`, close-on-exec; with CLONE, a detached copy of the mount."""
    return OwnedFd(call("open_tree", dir_fd, path_bytes(path), flags | OpenTree.CLOEXEC))


def clone_mount(path: "str | bytes") -> OwnedFd:
    """Return a detached copy of the mount at the absolute `path`, without what is mounted below it."""
    return OwnedFd(call("open_tree", AT_FDCWD, path_bytes(path), CLONE))


def open_tree_attr(
    dir_fd: int,
    path: "str | bytes",
    flags: OpenTree,
    *,
    set: MountAttr = NO_CHANGE,
    clear: MountAttr = NO_CHANGE,
    propagation: "Propagation | None" = None,
    userns_fd: int = 0,
) -> OwnedFd:
    """As `open_tree`, with the attributes of the copy changed before anybody can see it (Linux 6.15)."""
    attr = mount_attr(set, clear, propagation or 0, userns_fd)
    flags |= OpenTree.CLOEXEC
    return OwnedFd(call("open_tree_attr", dir_fd, path_bytes(path), flags, byref(attr), sizeof(attr)))


def move_mount(
    from_fd: int,
    to_path: "str | bytes",
    *,
    to_dir_fd: int = AT_FDCWD,
    flags: MoveMount = MoveMount.F_EMPTY_PATH,
) -> None:
    """Attach the mount `from_fd` at `to_path`; an empty path with T_EMPTY_PATH means `to_dir_fd` itself."""
    call("move_mount", from_fd, b"", to_dir_fd, path_bytes(to_path), flags)


def mount_setattr(
    fd: int,
    *,
    set: MountAttr = NO_CHANGE,
    clear: MountAttr = NO_CHANGE,
    propagation: "Propagation | None" = None,
    userns_fd: int = 0,
    recursive: bool = False,
) -> None:
    """Change the attributes of the mount `fd`. `userns_fd` is read with IDMAP only."""
    attr = mount_attr(set, clear, propagation or 0, userns_fd)
    flags = WHOLE_TREE if recursive else AtFlags.EMPTY_PATH
    call("mount_setattr", fd, b"", flags, byref(attr), sizeof(attr))


def umount(path: "str | bytes", flags: Unmount = DETACH) -> None:
    """Detach the topmost mount at `path`."""
    call("umount2", path_bytes(path), flags)


def set_propagation(path: "str | bytes", propagation: Propagation, *, recursive: bool = False) -> None:
    """Set the propagation type of the mount at `path` (MS_REC with `recursive`)."""
    call("mount", None, path_bytes(path), None, int(propagation) | (0x4000 if recursive else 0), None)
