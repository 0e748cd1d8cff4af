"""Getting an image's bytes into a file of the store, and the digest of what is then in it.

The source may be written to, cut or extended all the while. So the digest is never taken from the source:
where blocks can be shared, the snapshot is hashed; where they are copied, each piece is read once, into
memory that nobody else has, and hashed and written from there. copy_file_range(2) is not used: it leaves
nothing to hash, and shares blocks only where FICLONE does.

Both are generators: they yield how many bytes are done, and return the digest.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage
from mountd.kernel.reflink import reflink

if TYPE_CHECKING:
    from collections.abc import Generator

CHUNK = 512 << 10  # small enough for the processor's cache, from which it is hashed and written
ZEROS = bytes(CHUNK)


def transfer(source_fd: int, size: int, target_fd: int) -> Generator[int, None, str]:
    """Fill the empty file `target_fd` with the `size` bytes of `source_fd`, both borrowed.

    Raises InvalidImage if the source cannot be read, or has another size when it was read; OSError for what
    is wrong with the target.
    """
    if reflink(source_fd, target_fd):
        check_size(os.fstat(target_fd).st_size, size)
        return (yield from hashing(target_fd, size))
    return (yield from copying(source_fd, size, target_fd))


def copying(source_fd: int, size: int, target_fd: int) -> Generator[int, None, str]:
    """As `transfer`, where blocks cannot be shared. What is zero is left out of the file, as a hole."""
    sha256 = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    done = 0
    while done < size:
        piece = buffer[: read(source_fd, buffer[: min(CHUNK, size - done)], done)]
        if not piece:
            check_size(done, size)
        sha256.update(piece)
        write(target_fd, piece, done)
        done += len(piece)
        yield done
    # One byte more than there should be.
    check_size(size + read(source_fd, buffer[:1], size), size)
    os.ftruncate(target_fd, size)
    return f"sha256:{sha256.hexdigest()}"


def hashing(fd: int, size: int) -> Generator[int, None, str]:
    """Return the digest of the `size` bytes of `fd`, borrowed. Raises InvalidImage."""
    sha256 = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    done = 0
    while done < size:
        count = read(fd, buffer[: min(CHUNK, size - done)], done)
        if not count:
            check_size(done, size)
        sha256.update(buffer[:count])
        done += count
        yield done
    return f"sha256:{sha256.hexdigest()}"


def read(fd: int, buffer: memoryview, offset: int) -> int:
    """Read into `buffer` and return how much. Raises InvalidImage."""
    try:
        return os.preadv(fd, [buffer], offset)
    except OSError as error:
        raise InvalidImage(f"it cannot be read ({error.strerror})", offset=offset) from None


def write(fd: int, piece: memoryview, offset: int) -> None:
    """Write all of `piece`, but for zeros. Raises OSError."""
    if piece == ZEROS[: len(piece)]:
        return
    while piece:
        count = os.pwrite(fd, piece, offset)
        piece, offset = piece[count:], offset + count


def check_size(found: int, size: int) -> None:
    """Raise InvalidImage if the source was not as long as it was at first."""
    if found != size:
        how = "shorter" if found < size else "longer"
        raise InvalidImage(f"it became {how} while it was read: it had {size} bytes")
