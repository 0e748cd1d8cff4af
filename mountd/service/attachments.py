"""Who has attached what: a file for each mount that mountd has attached for somebody.

Its name is the mount's unique id, which the kernel gives to no other mount while the system runs; and the
directory is gone when it does not. So a file that has outlived its mount says nothing about any other. It is
written before the mount is attached, so that there is none without it, and the kernel has the last word on
whether it still is: what is attached no more is forgotten by and by.

Who attaches a mount, detaches it or forgets it has locked its file meanwhile (flock(2)), which ends with the
process: otherwise what is just being attached would look like what is attached no more.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import stat
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

from mountd.errors import AttachNotPermitted, LimitExceeded, SyscallError
from mountd.execute.attachment import is_there
from mountd.fds import OwnedFd
from mountd.ledger.record import is_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAXIMUM_FILE = 32 << 10  # bytes: JSON may have six for one of a path
ABANDONED = 60.0  # seconds after which nobody is about to attach what was written down
OVERFLOW = 0xFFFFFFFF
LONGEST_ID = 19  # digits
READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
NO_FILE = (errno.ELOOP, errno.ENXIO)  # a link, or a socket
PATIENCE_SECONDS = 0.5  # for who attaches or detaches the same mount
TICK_SECONDS = 0.005
ATTACHED = "the mount is attached already, or just being attached"
LOOKED_AT = 4  # files for each that was added, so that there are never many whose mount is gone


@dataclass(frozen=True, slots=True)
class Attachment:
    """A mount that is attached for somebody: its unique id, and the user and group of the host that asked.

    `namespace` is the id of the mount namespace that it is attached in, 0 if that is not known; `path` is
    where it was, for people; `since` in seconds since 1970. `tree` are the ids of all mounts that were
    attached with it, itself among them, each after the one that it is below; none for one alone.
    """

    id: int
    uid: int
    gid: int
    namespace: int
    rule: str | None
    path: str
    since: int
    tree: tuple[int, ...] = ()


NEEDED = {field.name for field in fields_of(Attachment) if field.default is MISSING}


class Attachments:
    """The files in one directory, which is root's alone."""

    def __init__(self, directory: Path) -> None:
        """The directory is made when there is something to be put into it."""
        self._directory = directory
        self._to_look_at = 0

    @contextmanager
    def held(self, attachments: Iterable[Attachment]) -> Iterator[list[int]]:
        """Write down what is attached meanwhile, and forget it if that fails; yield the locks on the files.

        Raises what `add` does.
        """
        with ExitStack() as stack:
            locks: list[int] = []
            added: list[int] = []
            try:
                for each in attachments:
                    locks.append(stack.enter_context(self.add(each)).fileno())
                    added.append(each.id)
                yield locks
            except BaseException:
                # And nothing that another has written down.
                for id in added:
                    self.remove(id)
                raise

    def add(self, attachment: Attachment) -> OwnedFd:
        """Write one down, and return the file, which is locked until it is closed.

        Raises AttachNotPermitted for what is written down already, LimitExceeded for what could not be read
        again, OSError.
        """
        data = json.dumps(asdict(attachment)).encode()
        if len(data) > MAXIMUM_FILE:
            raise LimitExceeded("bytes of what is written down of one mount", MAXIMUM_FILE)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._to_look_at += LOOKED_AT
        with ExitStack() as stack:
            directory = stack.enter_context(OwnedFd(os.open(self._directory, os.O_PATH | os.O_CLOEXEC)))
            # It is given its name once it is whole: of who is killed before nothing is left.
            file = stack.enter_context(OwnedFd(without_name(self._directory)))
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.write(file.fileno(), data) != len(data):
                raise SyscallError(errno.ENOSPC, "write(an attachment)")
            name = f"/proc/self/fd/{file.fileno()}"
            try:
                os.link(name, str(attachment.id), dst_dir_fd=directory.fileno())
            except FileExistsError:
                raise AttachNotPermitted(ATTACHED, hint="detach it first") from None
            return OwnedFd(file.take())

    @contextmanager
    def locked(self, id: int, seconds: float = PATIENCE_SECONDS) -> Iterator[bool]:
        """Have the file of one to oneself, and yield whether there is one.

        Raises TimeoutError where another has it for longer than `seconds`, OSError.
        """
        try:
            file = OwnedFd(os.open(self._directory / str(id), READING))
        except FileNotFoundError:
            yield False
            return
        with file:
            lock(file.fileno(), seconds)
            # Or it was forgotten meanwhile, and its name may be another's.
            yield os.fstat(file.fileno()).st_nlink > 0

    def remove(self, id: int) -> None:
        """Forget one, if there is one; for who has it locked. Raises OSError."""
        (self._directory / str(id)).unlink(missing_ok=True)

    def find(self, id: int) -> Attachment | None:
        """Return the one with this id, whether it is still attached or not. Raises OSError."""
        try:
            file = OwnedFd(os.open(self._directory / str(id), READING))
        except (FileNotFoundError, IsADirectoryError):
            return None
        except OSError as error:
            if error.errno in NO_FILE:
                return None
            raise
        with file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            found = decode(os.read(file.fileno(), MAXIMUM_FILE))
        return found if found is not None and found.id == id else None

    def all(self) -> Iterator[Attachment]:
        """Yield all that are written down, whether they are still attached or not. Raises OSError."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return
        for name in names:
            if is_id(name) and (found := self.find(int(name))) is not None:
                yield found

    def tidy(self) -> None:
        """Forget some of what is attached no more; for when nobody waits. Raises OSError.

        Nobody tells of an attachment that ends with its mount namespace or its directory.
        """
        if not self._to_look_at:
            return
        number, self._to_look_at = self._to_look_at, 0
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return
        for name in random.sample(names, min(number, len(names))):
            with suppress(FileNotFoundError, TimeoutError):
                self._look_at(name)

    def _look_at(self, name: str) -> None:
        """Forget a file of this name if it tells of nothing. Raises OSError, TimeoutError for one in use."""
        path = self._directory / name
        if time.time() - path.stat().st_mtime <= ABANDONED:
            return
        if not is_id(name):
            path.unlink()
            return
        with self.locked(int(name), 0) as there:
            attachment = self.find(int(name)) if there else None
            if there and (attachment is None or not still_there(attachment)):
                path.unlink()


def decode(data: bytes) -> Attachment | None:
    """Read what `Attachments.add` has written; None for anything else.

    Another version of mountd may have written less, or more.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not fields.keys() >= NEEDED:
        return None
    tree = fields.get("tree", [])
    if not all(is_number(fields[name]) for name in ("id", "namespace", "since")):
        return None
    # The last one is nobody's, and for the kernel that nothing is to be changed.
    if not all(is_number(fields[name]) and fields[name] < OVERFLOW for name in ("uid", "gid")):
        return None
    if not isinstance(fields["rule"], (str, NoneType)) or not is_path(fields["path"]):
        return None
    if not isinstance(tree, list) or not all(is_number(each) for each in tree):
        return None
    return Attachment(**{name: fields[name] for name in NEEDED}, tree=tuple(tree))


def is_path(value: object) -> bool:
    """Tell whether `value` can be the name of a file."""
    try:
        return isinstance(value, str) and "\0" not in value and bool(os.fsencode(value))
    except UnicodeEncodeError:
        return False


def is_id(name: str) -> bool:
    """Tell whether a file may be one of these, by its name."""
    return name.isascii() and name.isdecimal() and len(name) <= LONGEST_ID


def still_there(attachment: Attachment) -> bool:
    """Tell whether it is attached; on kernels that cannot say, as far as anybody knows."""
    if not attachment.namespace:
        return True
    try:
        return is_there(attachment.id, attachment.namespace)
    except SyscallError:
        return True


def without_name(directory: Path) -> int:
    """Open a new file in a directory that ends with its descriptor unless it is linked."""
    return os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)


def lock(fd: int, seconds: float) -> None:
    """Lock a file, for as long as it is open. Raises TimeoutError if another has it for longer, OSError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, "somebody holds the lock") from None
        time.sleep(TICK_SECONDS)
