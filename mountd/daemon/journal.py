"""Telling the administrator: to the journal with fields, or to standard error where there is none.

libsystemd opens a socket for the first message and keeps its number for the life of the process, with no way
to ask for it. Processes that close what they do not know have to keep it, or messages would go to whatever
has the number next; so the daemon calls `open_journal` once, before it forks, and they keep `descriptors`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from enum import IntEnum

from mountd.wire.framing import plain

JOURNAL_SOCKET = "/run/systemd/journal/socket"
# One for each kind of message (sd_journal_print(3)); made with systemd-id128 new.
REQUEST_ID = "6f0d0a4e5b1c4a7f8f3a51d7c9b2e640"
POLICY_ID = "0e1b7d5d86a44f0cb7d10f3b52c1a9d3"
WORKER_ID = "b8a9c1f2d6e04d3f9a7b5c4e3d2f1a08"


MAXIMUM_LINE = 1024  # characters of what others have a say in, such as the kernel or an image


class Priority(IntEnum):
    """Levels of syslog(3)."""

    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6


descriptors: set[int] = set()


def in_service() -> bool:
    """Tell whether messages go to the journal.

    systemd sets INVOCATION_ID for what it starts; everybody else wants to see them in the terminal.
    """
    return "INVOCATION_ID" in os.environ and os.path.exists(JOURNAL_SOCKET)


def open_journal(text: str) -> None:
    """Write the first message, and take note of the descriptor that is open for the others from now on."""
    before = sockets()
    log(Priority.INFO, text)
    if in_service():
        descriptors.update(sockets() - before)


def sockets() -> set[int]:
    """Return the numbers of the sockets that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        # The directory itself was open while it was read.
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.add(int(name))
    return found


def one_line(text: str, maximum: int | None = None) -> str:
    """Return `text` on one line, whoever has had a say in it, and no longer than `maximum`."""
    line = text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
    return line if maximum is None or len(line) <= maximum else f"{line[:maximum]}…"


def log(priority: Priority, text: str, *, message_id: str | None = None, **fields: str) -> None:
    """Write one message; `fields` become journal fields, prefixed with MOUNTD_ and in upper case.

    Never raises: a daemon that cannot log still serves.
    """
    line = one_line(text)
    try:
        if in_service():
            from systemd import journal  # type: ignore[import-untyped]

            named = {f"MOUNTD_{name.upper()}": plain(value) for name, value in fields.items()}
            # By itself the library would say “python3”.
            journal.send(
                line, MESSAGE_ID=message_id, PRIORITY=int(priority), SYSLOG_IDENTIFIER="mountd", **named
            )
            return
        sys.stderr.write(f"mountd: {line}\n")
        sys.stderr.flush()
    except OSError:
        return
