"""A file system context: fsopen(2), fspick(2), fsconfig(2) and fsmount(2) as one object.

The kernel tells in the context's message log what an errno cannot say; every failure carries it.
"""

import errno
import os

from mountd.errors import NotSupported, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel.flags import FsConfig, FsMount, FsOpen, FsPick, MountAttr
from mountd.kernel.libc import call, show
from mountd.kernel.mount_api import path_bytes
from mountd.kernel.numbers import AT_FDCWD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

MAXIMUM_MESSAGE = 4096
MAXIMUM_MESSAGES = 32  # the kernel keeps 8
# Of which a failure is the file system's own.
OF_THE_DRIVER = frozenset({FsConfig.CMD_CREATE, FsConfig.CMD_RECONFIGURE})


class FsContext:
    """Owns the descriptor of a file system context; usable in a with statement.

    Every method raises SyscallError with the kernel's messages in `log`, or NotSupported.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: OwnedFd) -> None:
        """Take `fd` over."""
        self._fd = fd

    @classmethod
    def open(cls, type: str) -> "FsContext":
        """Begin a new superblock of the file system `type`."""
        return cls(OwnedFd(call("fsopen", type.encode(), FsOpen.CLOEXEC)))

    @classmethod
    def pick(
        cls, path: "str | bytes", *, dir_fd: int = AT_FDCWD, flags: FsPick = FsPick.CLOEXEC
    ) -> "FsContext":
        """Begin to reconfigure the superblock mounted at `path`."""
        return cls(OwnedFd(call("fspick", dir_fd, path_bytes(path), flags | FsPick.CLOEXEC)))

    def fileno(self) -> int:
        """Return the descriptor, borrowed."""
        return self._fd.fileno()

    def set_flag(self, key: str) -> None:
        """Set an option that has no value."""
        self._config(FsConfig.SET_FLAG, key, None, 0)

    def set_string(self, key: str, value: "str | bytes") -> None:
        """Set an option to a string."""
        self._config(FsConfig.SET_STRING, key, path_bytes(value), 0)

    def set_fd(self, key: str, fd: int) -> None:
        """Set an option to an open file, borrowed."""
        self._config(FsConfig.SET_FD, key, None, fd)

    def create(self) -> None:
        """Make the superblock."""
        self._config(FsConfig.CMD_CREATE, None, None, 0)

    def reconfigure(self) -> None:
        """Apply the options to the picked superblock."""
        self._config(FsConfig.CMD_RECONFIGURE, None, None, 0)

    def mount(self, attributes: MountAttr) -> OwnedFd:
        """Return a detached mount of the superblock with `attributes`, close-on-exec."""
        try:
            return OwnedFd(call("fsmount", self.fileno(), FsMount.CLOEXEC, attributes))
        except SyscallError as error:
            raise self._explained(error) from None

    def messages(self) -> list[str]:
        """Take what the kernel has logged, oldest first; each line starts with e, w or i."""
        lines = []
        for _ in range(MAXIMUM_MESSAGES):
            try:
                line = os.read(self.fileno(), MAXIMUM_MESSAGE)
            except OSError:
                break  # ENODATA: there is no more; and there is nothing better to say about another failure
            lines.append(
                "".join(c if c.isprintable() else "?" for c in line.decode("utf-8", "replace").rstrip())
            )
        return lines

    def close(self) -> None:
        """Close the context; the superblock lives on in its mounts."""
        self._fd.close()

    def __enter__(self) -> "FsContext":
        return self

    def __exit__(
        self,
        kind: "type[BaseException] | None",
        value: "BaseException | None",
        trace: "TracebackType | None",
    ) -> None:
        self.close()

    def _config(self, command: FsConfig, key: "str | None", value: object, auxiliary: int) -> None:
        name = None if key is None else key.encode()
        try:
            call("fsconfig", self.fileno(), command, name, value, auxiliary)
        except SyscallError as error:
            raise self._explained(error) from None
        except NotSupported:
            if command not in OF_THE_DRIVER:
                raise
            # The call is there, as the options were set with it: it is what the driver says.
            said = f"fsconfig({self.fileno()}, {show(command)}, NULL, NULL, 0)"
            raise self._explained(SyscallError(errno.ENOSYS, said)) from None

    def _explained(self, error: SyscallError) -> SyscallError:
        return SyscallError(error.errno or 0, error.call, self.messages())
