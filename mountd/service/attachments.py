"""Who has attached what: a file for each mount that mountd has attached for somebody.

Its name is the mount's unique id, which the kernel gives to no other mount while the system runs; and the
directory is gone when it does not. So a file that has outlived its mount says nothing about any other. It is
written before the mount is attached, so that there is none without it, and the kernel has the last word on
whether it still is: what is attached no more is forgotten by whoever comes across it.
"""

from __future__ import annotations

import json
import os
import random
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mountd.errors import SyscallError
from mountd.execute.attachment import is_there

MAXIMUM_FILE = 16 << 10  # bytes
ABANDONED = 60.0  # seconds after which nobody is about to attach what was written down
LOOKED_AT = 4  # files for each that was added, so that there are never many whose mount is gone


@dataclass(frozen=True, slots=True)
class Attachment:
    """A mount that is attached for somebody: its unique id, and the user and group of the host that asked.

    `namespace` is the id of the mount namespace that it is attached in, 0 if that is not known; `path` is
    where it was, for people; `since` in seconds since 1970.
    """

    id: int
    uid: int
    gid: int
    namespace: int
    rule: str | None
    path: str
    since: int


class Attachments:
    """The files in one directory, which is root's alone."""

    def __init__(self, directory: Path) -> None:
        """The directory is made when there is something to be put into it."""
        self._directory = directory
        self._to_look_at = 0

    def add(self, attachment: Attachment) -> None:
        """Write one down. Raises OSError."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        path = self._directory / str(attachment.id)
        new = path.with_name(f"{attachment.id}.new")
        self._to_look_at += LOOKED_AT
        try:
            new.write_text(json.dumps(asdict(attachment)))
            os.rename(new, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(new)
            raise

    def remove(self, id: int) -> None:
        """Forget one, if there is one. Raises OSError."""
        (self._directory / str(id)).unlink(missing_ok=True)

    def find(self, id: int) -> Attachment | None:
        """Return the one with this id, whether it is still attached or not. Raises OSError."""
        try:
            with (self._directory / str(id)).open() as file:
                return Attachment(**json.loads(file.read(MAXIMUM_FILE)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return None  # cut off by a full disk: it was never attached then

    def of(self, uid: int | None = None) -> list[Attachment]:
        """Return those of a user, or all; what is attached no more is forgotten. Raises OSError."""
        names: list[str] = []
        with suppress(FileNotFoundError):
            names = os.listdir(self._directory)
        found = []
        for name in names:
            attachment = self.find(int(name)) if name.isdecimal() else None
            if attachment is None or uid not in (None, attachment.uid):
                continue
            if still_there(attachment):
                found.append(attachment)
            else:
                self.remove(attachment.id)
        return sorted(found, key=lambda each: each.id)

    def tidy(self) -> None:
        """Forget some of what is attached no more; for when nobody waits. Raises OSError.

        Nobody tells of an attachment that ends with its mount namespace or its directory.
        """
        if not self._to_look_at:
            return
        number, self._to_look_at = self._to_look_at, 0
        names = os.listdir(self._directory)
        for name in random.sample(names, min(number, len(names))):
            path = self._directory / name
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime <= ABANDONED:
                    continue
                attachment = self.find(int(name)) if name.isdecimal() else None
                if attachment is None or not still_there(attachment):
                    path.unlink()


def still_there(attachment: Attachment) -> bool:
    """Tell whether it is attached; on kernels that cannot say, as far as anybody knows."""
    if not attachment.namespace:
        return True
    try:
        return is_there(attachment.id, attachment.namespace)
    except SyscallError:
        return True
