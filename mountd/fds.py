"""Ownership of file descriptors, said in types.

Three words are used throughout:

* *own*: whoever holds an `OwnedFd` closes it;
* *borrow*: a plain `int` is valid for the duration of the call and never stored;
* *take*: `OwnedFd.take()` moves the descriptor out, and the object owns nothing from then on.

An `OwnedFd` that is collected while it still owns something closes it and warns, which the tests turn into a
failure.
"""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class OwnedFd:
    """One file descriptor and the duty to close it."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        """Take ownership of `fd`. Raises ValueError for a negative number."""
        self._fd = -1
        if fd < 0:
            raise ValueError(f"{fd} is not a file descriptor")
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor, borrowed. Raises ValueError once it was closed or taken."""
        if self._fd < 0:
            raise ValueError("the file descriptor was closed or taken")
        return self._fd

    def take(self) -> int:
        """Move the descriptor out: the caller owns it now. Raises ValueError if there is none."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def close(self) -> None:
        """Close the descriptor; closing twice does nothing.

        What the file's own file system says at its close is nobody's business here; the descriptor is gone
        all the same. Raises OSError only for one that was closed behind our back.
        """
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.close(fd)
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise

    @property
    def closed(self) -> bool:
        """Whether nothing is owned any more."""
        return self._fd < 0

    def __enter__(self) -> OwnedFd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<OwnedFd {self._fd if self._fd >= 0 else 'closed'}>"

    def __del__(self) -> None:
        if self._fd >= 0 and sys.is_finalizing():
            self.close()
        elif self._fd >= 0:
            # Imported here because the warning is the exception and the lean side pays for each import.
            import warnings

            warnings.warn(
                f"file descriptor {self._fd} was never closed", ResourceWarning, source=self, stacklevel=2
            )
            self.close()


def close_all(fds: list[OwnedFd]) -> None:
    """Close every descriptor of `fds` and leave the list empty."""
    while fds:
        fds.pop().close()
