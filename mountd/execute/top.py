"""The two directories in the top of a stack: for what is written, and for what the kernel does on the way.

They are made, if they are not there, and opened through the mount of the top by its owner's ids and with the
rights of modes only: so there is nothing in them, and nothing that they could lead to, that the owner could
not have had made and opened. What is a symbolic link, or on another mount, is refused. From then on they are
descriptors, and whatever is moved under their names is not what the kernel is handed.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from mountd.errors import BadFileDescriptor, NotSupported, SyscallError
from mountd.fds import close_all
from mountd.kernel.acting import acting_as
from mountd.kernel.flags import Resolve
from mountd.kernel.paths import openat2

if TYPE_CHECKING:
    from mountd.fds import OwnedFd

FIELD = "source.directoryFileDescriptor"
UPPER, WORK = "upper", "work"
INNER = "work"  # what the kernel makes in the one for its work
WORK_MODE = 0o700
UNMAPPED = 65534  # whose the kernel says a file is whose owner has no id here (user_namespaces(7))
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
WITHIN = Resolve.NO_SYMLINKS | Resolve.NO_XDEV | Resolve.BENEATH
OTHER_IDS = "use a file system that was not mounted in a user namespace"
NO_DIRECTORY = (errno.ELOOP, errno.ENOTDIR, errno.EXDEV)


class Top:
    """The mount of a top and the two directories in it, all owned, and the host's ids of their owner."""

    __slots__ = ("_made", "mount", "owner", "upper", "work")

    def __init__(self, mount: OwnedFd, owner: tuple[int, int], mode: int) -> None:
        """Take `mount` over, and open the directories; what is written gets `mode` if it is made now.

        Raises BadFileDescriptor for what is in their place, SyscallError; nothing is left then.
        """
        self.mount = mount
        self.owner = owner
        self._made: list[str] = []
        opened: list[OwnedFd] = [mount]
        try:
            with acting_as(*owner):
                for name, bits in ((UPPER, mode), (WORK, WORK_MODE)):
                    opened.append(self._open(name, bits))
        except BaseException:
            try:
                self.discard()
            finally:
                close_all(opened)
            raise
        _, self.upper, self.work = opened

    def _open(self, name: str, mode: int) -> OwnedFd:
        at = self.mount.fileno()
        try:
            os.mkdir(name, WORK_MODE, dir_fd=at)
            self._made.append(name)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno == errno.EOVERFLOW:
                raise NotSupported("writing to this directory by its owner's ids", hint=OTHER_IDS) from None
            raise SyscallError(error.errno or 0, f"mkdir(“{name}” in the top)") from None
        try:
            fd = openat2(at, name, DIRECTORY, WITHIN)
        except SyscallError as error:
            if error.errno in NO_DIRECTORY:
                raise BadFileDescriptor(FIELD, f"“{name}” in it is not a directory of it") from None
            raise SyscallError(error.errno or 0, f"openat2(“{name}” in the top)") from None
        try:
            status = os.fstat(fd.fileno())
            if status.st_uid == UNMAPPED or (name == WORK and status.st_uid != self.owner[0]):
                raise BadFileDescriptor(FIELD, f"“{name}” in it belongs to somebody else")
            if name in self._made:
                os.fchmod(fd.fileno(), mode)
        except OSError as error:
            fd.close()
            raise SyscallError(error.errno or 0, f"fchmod(“{name}” in the top)") from None
        except BaseException:
            fd.close()
            raise
        return fd

    def names(self) -> list[str]:
        """Return what tells both directories from all others, whatever leads to them. Raises OSError."""
        found = [os.fstat(fd.fileno()) for fd in (self.upper, self.work)]
        return [f"{status.st_dev}:{status.st_ino}" for status in found]

    def discard(self) -> None:
        """Remove what was made here, as far as it is empty: no stack has come of it. Raises SyscallError."""
        if not self._made:
            return
        work = getattr(self, "work", None)
        with acting_as(*self.owner):
            if work is not None and WORK in self._made:
                with suppress(OSError):
                    os.rmdir(INNER, dir_fd=work.fileno())
            for name in reversed(self._made):
                with suppress(OSError):
                    os.rmdir(name, dir_fd=self.mount.fileno())

    def close(self) -> None:
        """Close the descriptors; an overlay has clones of what they are."""
        close_all([self.mount, self.upper, self.work])
