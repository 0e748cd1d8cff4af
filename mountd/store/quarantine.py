"""Directories in which programs without privileges leave what nobody has verified yet.

A quarantine belongs to the programs' user and lies in a directory that is root's alone, so that nobody else
gets at it. Nothing in it is used where it lies: it is copied into root's hands while its digest is computed,
and the copy counts. Its names are found below the directory without following any link.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage, LimitExceeded, StorageFull, SyscallError
from mountd.fds import OwnedFd
from mountd.kernel.flags import Resolve
from mountd.kernel.paths import openat2
from mountd.store import program
from mountd.store.child import is_full

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from mountd.store.manifest import Descriptor

CHUNK = 1 << 20
MAXIMUM_FILES = 1024
COPY_BYTES = 64 << 20
# Where the two files are on file systems that do not know how to copy from each other.
NO_COPY_FILE_RANGE = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP)
SECTOR = 512  # stat(2): what st_blocks counts
PLAIN = Resolve.BENEATH | Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS | Resolve.NO_XDEV
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
FULL_HINT = "free space where mountd keeps its images"


class Quarantine:
    """A new directory `name` in root's directory `parent` (borrowed), gone after the with statement."""

    def __init__(self, parent: int, name: str) -> None:
        """Make it. Raises OSError."""
        self._parent, self._name = parent, name
        os.mkdir(name, 0o700, dir_fd=parent)
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = OwnedFd(os.open(name, flags, dir_fd=parent))
            os.fchown(self._fd.fileno(), *program.identity())
        except BaseException:
            self.remove()
            raise

    def fileno(self) -> int:
        """Return the directory, borrowed."""
        return self._fd.fileno()

    def remove(self) -> None:
        """Remove it with all that is in it."""
        if hasattr(self, "_fd"):
            self._fd.close()
        shutil.rmtree(self._name, dir_fd=self._parent)

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def usage(directory: int) -> int:
    """Return how many bytes the files in a directory and in its directories occupy.

    Raises LimitExceeded if there are more files than an image has. What changes meanwhile may be missed.
    """
    total = count = 0
    below: list[str] = []
    for status, name in entries(directory):
        total += status.st_blocks * SECTOR
        count += 1
        if stat.S_ISDIR(status.st_mode):
            below.append(name)
        check_count(count)
    for name in below:
        try:
            opened = openat2(directory, name, READ | os.O_DIRECTORY, PLAIN)
        except SyscallError:
            continue
        with opened:
            for status, _ in entries(opened.fileno()):
                total += status.st_blocks * SECTOR
                count += 1
                check_count(count)
    return total


def check_count(count: int) -> None:
    """Raise LimitExceeded for more files than there may be."""
    if count > MAXIMUM_FILES:
        raise LimitExceeded("files that belong to an image", MAXIMUM_FILES)


def entries(directory: int) -> Iterator[tuple[os.stat_result, str]]:
    """Yield what is in a directory now."""
    with os.scandir(directory) as found:
        for entry in found:
            try:
                yield entry.stat(follow_symlinks=False), entry.name
            except FileNotFoundError:
                continue


def open_directory(directory: int, name: str) -> OwnedFd:
    """Open a directory of a quarantine. Raises InvalidImage if there is none."""
    try:
        return openat2(directory, name, READ | os.O_DIRECTORY, PLAIN)
    except SyscallError as error:
        raise InvalidImage(f"the image is not there ({error.errno_name})") from None


def open_file(directory: int, name: str, what: str) -> OwnedFd:
    """Open a regular file of a quarantine for reading. Raises InvalidImage if there is none."""
    try:
        fd = openat2(directory, name, READ, PLAIN)
    except SyscallError as error:
        raise InvalidImage(f"{what} is not there ({error.errno_name})") from None
    if not stat.S_ISREG(os.fstat(fd.fileno()).st_mode):
        fd.close()
        raise InvalidImage(f"{what} is not a file")
    return fd


def read_document(directory: int, name: str, what: str, maximum: int) -> bytes:
    """Return the contents of a small file. Raises InvalidImage."""
    with open_file(directory, name, what) as fd:
        contents = bytearray()
        while piece := os.read(fd.fileno(), maximum + 1 - len(contents)):
            contents += piece
            if len(contents) > maximum:
                raise InvalidImage(f"{what} is larger than {maximum} bytes")
    return bytes(contents)


def receive(
    directory: int, descriptor: Descriptor, what: str, into: int, tick: Callable[[int], None]
) -> OwnedFd:
    """Copy a blob of an image into root's directory `into`, while computing its digest; return the copy.

    The copy has no name, so that it is gone with its descriptor. `tick` hears how many bytes each step
    copied. Raises InvalidImage if the blob is not the one described, StorageFull, OSError.
    """
    name = descriptor.digest.removeprefix("sha256:")
    with open_file(directory, name, what) as source:
        if os.fstat(source.fileno()).st_size != descriptor.size:
            raise InvalidImage(f"{what} does not have the size that its manifest says")
        copy = nameless_file(into, f"{name}.blob")
        try:
            digest = _copy_and_hash(source.fileno(), copy.fileno(), descriptor.size, tick)
            if digest != descriptor.digest:
                raise InvalidImage(f"the digest of {what} is {digest}, not {descriptor.digest}")
        except OSError as error:
            copy.close()
            raise _explain(error, what) from None
        except BaseException:
            copy.close()
            raise
    return copy


def _copy_and_hash(source: int, target: int, size: int, tick: Callable[[int], None]) -> str:
    state = hashlib.sha256()
    # One byte more than there should be, to notice that there is one.
    left = size + 1
    while left and (piece := os.read(source, min(left, CHUNK))):
        state.update(piece)
        view = memoryview(piece)
        while view:
            view = view[os.write(target, view) :]
        left -= len(piece)
        tick(len(piece))
    return "sha256:" + state.hexdigest()


def nameless_file(directory: int, name: str) -> OwnedFd:
    """Return a new file in root's `directory` that can be written and read and has no name any more."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = OwnedFd(os.open(name, flags, 0o600, dir_fd=directory))
    os.unlink(name, dir_fd=directory)
    return fd


def take(directory: int, name: str, into: int, new_name: str) -> tuple[OwnedFd, int]:
    """Copy a file that a program has made into root's directory `into`; return it, and its size in bytes.

    Whoever has the programs' user could still have the file open, so that the file itself is never used.
    Where the file system can, the copy shares its blocks. It is mode 0400, and the descriptor can only be
    read from. Raises InvalidImage for something that is no file, StorageFull, OSError.
    """
    what = "the file system image of a layer"
    with open_file(directory, name, what) as source:
        size = os.fstat(source.fileno()).st_size
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with OwnedFd(os.open(new_name, flags, 0o400, dir_fd=into)) as target:
            try:
                copy_range(source.fileno(), target.fileno(), size)
            except OSError as error:
                os.unlink(new_name, dir_fd=into)
                raise _explain(error, what) from None
            except BaseException:
                os.unlink(new_name, dir_fd=into)
                raise
    return OwnedFd(os.open(new_name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=into)), size


def copy_range(source: int, target: int, size: int) -> None:
    """Copy `size` bytes from the start of one file to the start of another. Raises OSError, InvalidImage."""
    done = 0
    while done < size:
        length = min(size - done, COPY_BYTES)
        try:
            count = os.copy_file_range(source, target, length, done, done)
        except OSError as error:
            if error.errno not in NO_COPY_FILE_RANGE:
                raise
            os.lseek(target, done, os.SEEK_SET)
            count = os.sendfile(target, source, done, length)
        if not count:
            raise InvalidImage("what was made of a layer was cut off while it was copied")
        done += count


def _explain(error: OSError, what: str) -> Exception:
    return StorageFull(what, hint=FULL_HINT) if is_full(error) else error
