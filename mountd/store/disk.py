"""The store's directory, and the few things that are ever done to it.

    images/sha256/HEX         an image, root's, 0400: whole and on disk from the moment it has this name
    records/sha256/HEX.json   what is known about it; an image counts from the moment its record is there
    pulled/sha256/HEX.json    which images of the store are the layers of one in a registry, by its name
    tags/sha256/HEX.json      which of those a tag led to when it was pulled last
    incoming/                 what is not finished: SIZE.UID.RANDOM while an image is copied, record.RANDOM,
                              and the directory pull.RANDOM while one is pulled
    slots/N                   held by a transfer that is running, with the uid that it is charged to
    lock                      held by whoever changes or counts anything

Nothing here waits but for the lock and the disk. A file gets its final name by a rename, after it was
flushed, and the directory is flushed after that. So whatever a process is killed at leaves one of: a file in
incoming/ that nobody holds, an image without a record. Both are swept (`garbage`) by the next who looks. An
image that is being copied is held by an flock(2) on it, which the kernel drops with its process; the size in
its name is what it is counted with until then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage, NotFound, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel.flags import Resolve
from mountd.kernel.paths import openat2
from mountd.store import layering, tags
from mountd.store import record as records
from mountd.store.record import NoRecord, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mountd.evidence.model import Provenance
    from mountd.store.layering import PulledImage
    from mountd.store.tags import Tag

IMAGES = "images/sha256"
RECORDS = "records/sha256"
PULLED = "pulled/sha256"
TAGS = "tags/sha256"
INCOMING = "incoming"
SLOTS = "slots"
LOCK = "lock"
DIRECTORIES = ("images", IMAGES, "records", RECORDS, "pulled", PULLED, "tags", TAGS, INCOMING, SLOTS)
HEX = re.compile(r"[0-9a-f]{64}")
RESERVED = re.compile(r"([0-9]{1,19})\.([0-9]{1,10})\.[0-9a-f]{32}")
IMAGE_MODE = 0o400
BELOW = Resolve.BENEATH | Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS
# Whoever removes an image holds a lease on it, for as long as two calls of unlink take.
LEASE_RETRIES = 100
LEASE_WAIT = 0.01

# Told before each change. Filled by tests only, which end the process there.
reached: list[Callable[[str], None]] = []


def at(step: str) -> None:
    """Say that `step` comes next."""
    for tell in reached:
        tell(step)


class State:
    """The open state directory; owns its descriptor, usable in a with statement."""

    __slots__ = ("_fd",)

    def __init__(self, path: Path) -> None:
        """Open it. Raises SyscallError, and NotFound where it is missing or not root's alone."""
        try:
            self._fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
        except OSError as error:
            raise NotFound("the store", hint=f"its directory cannot be opened: {error.strerror}") from None
        status = os.fstat(self._fd.fileno())
        if status.st_uid != 0 or status.st_mode & 0o022:
            self.close()
            raise NotFound("the store", hint="its directory has to be root's, and writable by nobody else")

    def fileno(self) -> int:
        """Return the descriptor, borrowed."""
        return self._fd.fileno()

    def close(self) -> None:
        """Close the descriptor."""
        self._fd.close()

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def make_directories(self) -> None:
        """Have all directories. Raises OSError."""
        for name in DIRECTORIES:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=self.fileno())
        os.fsync(self.fileno())

    def open(self, path: str, flags: int = os.O_RDONLY, mode: int = 0) -> OwnedFd:
        """Open what lies below the directory, without following a link. Raises SyscallError."""
        return openat2(self.fileno(), path, flags, BELOW, mode)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock. Raises SyscallError."""
        with self.open(LOCK, os.O_RDWR | os.O_CREAT, 0o600) as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            yield

    def names(self, directory: str) -> list[str]:
        """Return what is in a directory, sorted. Raises SyscallError."""
        with self.open(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
            return sorted(os.listdir(fd.fileno()))

    def unlink(self, path: str) -> None:
        """Remove a file and have that on disk; one that is not there is gone already. Raises OSError."""
        at(f"unlink {path}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path, dir_fd=self.fileno())
        self.flush(os.path.dirname(path))

    def rename(self, source: str, target: str) -> None:
        """Give a file, which is on disk, its final name, and have that on disk. Raises OSError."""
        at(f"rename {target}")
        os.rename(source, target, src_dir_fd=self.fileno(), dst_dir_fd=self.fileno())
        self.flush(os.path.dirname(target))

    def flush(self, directory: str) -> None:
        """Have the names in a directory on disk. Raises OSError."""
        at(f"flush {directory}")
        with self.open(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.fsync(fd.fileno())

    def reserve(self, size: int, charged: int) -> tuple[str, OwnedFd]:
        """Make the file that an image of `size` bytes is copied to; return its path, and it, held.

        The lock has to be held. Raises SyscallError.
        """
        path = f"{INCOMING}/{size}.{charged}.{secrets.token_hex(16)}"
        at(f"create {INCOMING}")
        fd = self.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            fd.close()
            raise
        return path, fd

    def make_workspace(self) -> tuple[str, OwnedFd]:
        """Make an empty directory for a pull; return its path, and it, held.

        The lock has to be held, or a sweep could come in between. Raises SyscallError, OSError.
        """
        path = f"{INCOMING}/pull.{secrets.token_hex(16)}"
        os.mkdir(path, 0o700, dir_fd=self.fileno())
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            fd.close()
            raise
        return path, fd

    def discard(self, path: str) -> None:
        """Remove what was never finished: a file, or a directory with all that is in it. Raises OSError.

        What programs without privileges have left belongs to their user, and only a process that may read
        what is not its own can remove it; to any other it is no reason to fail.
        """
        try:
            self.unlink(path)
        except IsADirectoryError:
            with contextlib.suppress(PermissionError, FileNotFoundError):
                shutil.rmtree(path, dir_fd=self.fileno())

    def is_held(self, path: str) -> bool:
        """Tell whether a living process holds a file or directory by flock(2). The lock has to be held."""
        try:
            with self.open(path) as fd:
                fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except SyscallError:
            return False  # it has just been renamed or removed
        return False

    def write_record(self, record: Record) -> None:
        """Write a record, in the place of an older one. The lock has to be held. Raises OSError."""
        self._write(records.serialise(record), record_path(record.digest))

    def _write(self, data: bytes, target: str) -> None:
        path = f"{INCOMING}/record.{secrets.token_hex(16)}"
        at("create record")
        try:
            with self.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, IMAGE_MODE) as fd:
                at("write record")
                os.write(fd.fileno(), data)
                at("flush record")
                os.fsync(fd.fileno())
            self.rename(path, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path, dir_fd=self.fileno())
            raise

    def read_record(self, digest: str) -> Record:
        """Return the record of an image. Raises NotFound, and NoRecord for one that is damaged."""
        try:
            fd = self.open(record_path(digest))
        except SyscallError as error:
            if error.errno == errno.ENOENT:
                raise missing(digest) from None
            raise
        with fd:
            check_file(os.fstat(fd.fileno()), "its record")
            record = records.parse(os.read(fd.fileno(), records.MAXIMUM_RECORD + 1))
        if record.digest != digest:
            raise NoRecord("it is that of another image")
        return record

    def write_pulled(self, pulled: PulledImage) -> None:
        """Write which layers an image has, in the place of what was known. The lock has to be held.

        Raises OSError, and InvalidImage if it could not be read again.
        """
        self._write(layering.serialise(pulled), pulled_path(pulled.provenance))

    def read_pulled(self, path: str) -> PulledImage:
        """Return which layers an image has. Raises NoRecord for what is missing or damaged, SyscallError."""
        pulled = layering.parse(self._read(path, layering.MAXIMUM))
        if pulled_path(pulled.provenance) != path:
            raise NoRecord("it is that of another image")
        return pulled

    def write_tag(self, tag: Tag) -> None:
        """Write what a tag leads to, in the place of what was known. The lock has to be held.

        Raises OSError, and InvalidImage if it could not be read again.
        """
        self._write(tags.serialise(tag), tag_path(tag.repository, tag.tag))

    def read_tag(self, path: str) -> Tag:
        """Return what a tag leads to. Raises NoRecord for what is missing or damaged, SyscallError."""
        tag = tags.parse(self._read(path, tags.MAXIMUM))
        if tag_path(tag.repository, tag.tag) != path:
            raise NoRecord("it is that of another tag")
        return tag

    def _read(self, path: str, maximum: int) -> bytes:
        """Return what one of mountd's files has, one byte past `maximum` at most.

        Raises NoRecord for one that is missing or not root's alone, SyscallError.
        """
        try:
            fd = self.open(path)
        except SyscallError as error:
            if error.errno == errno.ENOENT:
                raise NoRecord("it was not pulled") from None
            if error.errno == errno.ELOOP:
                raise NoRecord("its record is a symbolic link") from None
            raise
        with fd:
            check_file(os.fstat(fd.fileno()), "its record")
            return os.read(fd.fileno(), maximum + 1)

    def open_image(self, record: Record) -> OwnedFd:
        """Open the stored bytes for reading. Raises NotFound, InvalidImage, SyscallError."""
        fd = self._open_image(record.digest)
        try:
            status = os.fstat(fd.fileno())
            try:
                check_file(status, "its file")
            except NoRecord as reason:
                raise InvalidImage(f"the store is damaged: {reason}") from None
            if status.st_size != record.size:
                raise InvalidImage(f"the store is damaged: {status.st_size} bytes instead of {record.size}")
        except BaseException:
            fd.close()
            raise
        return fd

    def _open_image(self, digest: str) -> OwnedFd:
        """Raises NotFound, InvalidImage, SyscallError."""
        for attempt in range(LEASE_RETRIES):
            try:
                return self.open(image_path(digest), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except SyscallError as error:
                if error.errno == errno.ENOENT:
                    raise missing(digest) from None
                if error.errno == errno.EACCES:  # which root's own are not
                    raise InvalidImage("the store is damaged: its file is not root's alone") from None
                if error.errno != errno.EAGAIN or attempt == LEASE_RETRIES - 1:
                    raise
            time.sleep(LEASE_WAIT)
        raise missing(digest)


def check_file(status: os.stat_result, what: str) -> None:
    """Raise NoRecord unless a file is one that only mountd has written."""
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != 0 or mode != IMAGE_MODE or status.st_nlink != 1:
        raise NoRecord(f"{what} is not root's alone")


def missing(digest: str) -> NotFound:
    """Return the error for an image that is not there, or not for the one who asks."""
    return NotFound(f"the stored image {digest}", hint="“mountctl image list” shows those of yours")


def all_records(state: State, past: str = "") -> Iterator[Record]:
    """Yield the records that can be read, in the order of their digests, those past the digits `past`."""
    for name in state.names(RECORDS):
        digits = name.removesuffix(".json")
        if HEX.fullmatch(digits) and digits > past:
            with contextlib.suppress(NoRecord, NotFound):
                yield state.read_record(f"sha256:{digits}")


def image_path(digest: str) -> str:
    """Return where an image lies below the state directory. Raises InvalidParameter."""
    return f"{IMAGES}/{records.hex_of(digest)}"


def record_path(digest: str) -> str:
    """Return where a record lies below the state directory. Raises InvalidParameter."""
    return f"{RECORDS}/{records.hex_of(digest)}.json"


def pulled_path(provenance: Provenance) -> str:
    """Return where it is written which layers an image has that was pulled."""
    return f"{PULLED}/{layering.key_of(provenance.repository, provenance.manifest)}.json"


def tag_path(repository: str, tag: str) -> str:
    """Return where it is written what a tag leads to."""
    return f"{TAGS}/{tags.key_of(repository, tag)}.json"
