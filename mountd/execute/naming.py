"""Names for what file systems are made from, which mountinfo and findmnt(8) show as their source.

A file system opens its source by name, and names on the host can change between the moment they are looked
at and the moment the kernel follows them. So the kernel follows none of them: while it makes the superblock,
the worker is in a root directory of its own, where the name is a symbolic link to the descriptor that was
judged. Nobody but mountd can change anything there. What the name says is thus for people only; that it is
true, `service` has seen to.

Each worker has its own such root directory, with nothing in it but /proc and the last name; and mounts,
while something is made of them that takes only what is attached somewhere.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from mountd.errors import NotSupported, SyscallError
from mountd.kernel import mount_api
from mountd.kernel.flags import Propagation
from mountd.kernel.libc import call

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import NoReturn

LOST = 70  # exit status of a worker that cannot come back
MAXIMUM_NAME = 255  # bytes: fsconfig(2)
MAXIMUM_COMPONENT = 255  # bytes
PROC = "proc"
ATTACHED = ".attached"


class Naming:
    """A worker's directory for names."""

    __slots__ = ("_directory", "_known")

    def __init__(self, directory: str) -> None:
        """`directory` was made by `prepare`."""
        self._directory = directory
        self._known: tuple[str, int] | None = None

    def lead(self, name: str, fd: int) -> bool:
        """Have `name` lead to the file open as `fd`, for use `inside`; return whether that is possible."""
        if (name, fd) == self._known:
            return True
        if not is_name(name):
            return False
        path = f"{self._directory}/{name.lstrip('/')}"
        known, self._known = self._known, None
        try:
            if known is not None and known[0] == name:
                os.unlink(path)
            else:
                self._forget()
                os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            os.symlink(f"/proc/self/fd/{fd}", path)
        except OSError:
            return False
        self._known = (name, fd)
        return True

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be in the root directory where names lead to what they were led to. Raises OSError."""
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.chdir(self._directory)
            try:
                os.chroot(".")
                yield
            finally:
                try:
                    os.fchdir(root)
                    os.chroot(".")
                except OSError:
                    be_lost()
        finally:
            os.close(root)

    @contextmanager
    def attached(self, mounts: Sequence[int]) -> Iterator[list[str]]:
        """Have `mounts`, borrowed, attached where nobody else can get, and yield the paths.

        Raises SyscallError, OSError.
        """
        detach(self._directory)
        paths = [f"{self._directory}/{ATTACHED}/{number}" for number in range(len(mounts))]
        try:
            for path, mount in zip(paths, mounts, strict=True):
                os.makedirs(path, 0o700)
                mount_api.move_mount(mount, path)
            yield paths
        finally:
            detach(self._directory)

    def _forget(self) -> None:
        """Remove what is left of the last name, also of a worker that was killed."""
        with suppress(OSError):
            for name in os.listdir(self._directory):
                if name not in (PROC, ATTACHED):
                    remove(f"{self._directory}/{name}")


def detach(directory: str) -> None:
    """Detach what a worker has attached in its directory, also one that was killed. Raises OSError."""
    top = f"{directory}/{ATTACHED}"
    with suppress(FileNotFoundError):
        for name in os.listdir(top):
            try:
                mount_api.umount(f"{top}/{name}")
            except SyscallError as error:
                if error.errno_name != "EINVAL":  # umount2(2): not a mount point
                    raise
            os.rmdir(f"{top}/{name}")


def remove(path: str) -> None:
    """Remove a link, or a directory with what is in it. Raises OSError."""
    if os.path.islink(path):
        os.unlink(path)
        return
    for name in os.listdir(path):
        remove(f"{path}/{name}")
    os.rmdir(path)


def be_lost() -> NoReturn:
    """End at once: a worker in the wrong root directory must not see another request."""
    os._exit(LOST)


def is_name(name: str) -> bool:
    """Tell whether `name` can be the name of a source: one line, and a path or the like of it."""
    components = name.lstrip("/").split("/")
    return (
        name.isprintable()
        and len(name.encode()) <= MAXIMUM_NAME
        and components[0] not in (PROC, ATTACHED)
        and not any(each in ("", ".", "..") for each in components)
        and all(len(each.encode()) <= MAXIMUM_COMPONENT for each in components)
    )


def prepare(directory: str, slots: int) -> None:
    """Make the directories for as many workers below `directory`, in this mount namespace only.

    On a kernel that lacks what it takes there is nothing to name: it cannot mount, either, and says so to
    whoever asks for a mount. Raises SyscallError, OSError.
    """
    call("mount", b"mountd", directory.encode(), b"tmpfs", 0, b"mode=0700,size=1m")
    mount_api.set_propagation(directory, Propagation.PRIVATE)
    for number in range(slots):
        proc = f"{directory}/{number}/{PROC}"
        os.makedirs(proc, 0o700)
        with suppress(NotSupported), mount_api.clone_mount("/proc") as mount:
            mount_api.mount_setattr(mount.fileno(), propagation=Propagation.PRIVATE)
            mount_api.move_mount(mount.fileno(), proc)
