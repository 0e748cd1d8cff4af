"""A file system that has no leases, for this process alone: the switch of the kernel is everybody's."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def without_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse them as the kernel does, also where fs.leases-enable is 0."""
    ask = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return ask(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
