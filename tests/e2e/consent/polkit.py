"""What the daemon takes for polkit: a program in the place of pkcheck(1), which answers as the test says.

The daemon has a mount namespace of its own for that; tests/systemd has the real one.
"""

from __future__ import annotations

import os
import select
import socket
import time
from pathlib import Path

from mountd.kernel.flags import Clone
from mountd.kernel.libc import call

SECONDS = 20.0
FAKE = """#!/bin/sh
printf '%s\\n' "$@" END > {0}/asked
read answer < {0}/answer
exit "$answer"
"""


class Polkit:
    """What the daemon takes for polkit."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self.directory = directory
        self._fds = []
        for name in ("asked", "answer"):
            os.mkfifo(directory / name, 0o600)
            # Open at both ends: whoever opens one of them does not wait, and nothing is lost.
            self._fds.append(os.open(directory / name, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        (directory / "pkcheck").write_text(FAKE.format(directory))
        (directory / "pkcheck").chmod(0o755)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def asked(self, seconds: float = SECONDS) -> list[str]:
        """Wait for a question and return its words, [] for none."""
        text, deadline = b"", time.monotonic() + seconds
        while not text.endswith(b"\nEND\n"):
            if not select.select([self._fds[0]], [], [], max(0.0, deadline - time.monotonic()))[0]:
                assert not text
                return []
            text += os.read(self._fds[0], 1)
        return text.decode().splitlines()[:-1]

    def answer(self, status: int) -> None:
        """Answer one question, that is or will be asked, with the exit status of pkcheck(1)."""
        os.write(self._fds[1], b"%d\n" % status)

    def enter(self) -> None:
        """Be where this is polkit."""
        self._namespace()
        call("mount", os.fsencode(self.directory / "pkcheck"), b"/usr/bin/pkcheck", b"", MS_BIND, None)

    def enter_without(self) -> None:
        """Be where there is no polkit."""
        self._namespace(bus=False)

    def _namespace(self, *, bus: bool = True) -> None:
        call("unshare", Clone.NEWNS)
        call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        call("mount", b"tmpfs", b"/run/dbus", b"tmpfs", 0, None)
        if bus:
            socket.socket(socket.AF_UNIX).bind("/run/dbus/system_bus_socket")


MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18


def details_of(words: list[str]) -> dict[str, str]:
    return {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "--detail"}
