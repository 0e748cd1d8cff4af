"""The digest of an image's bytes.

It says something only of a file that cannot change: whoever calls this has the proof of that, or is about to
compare it with the digest of a copy that was made in between.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 256 << 10  # bytes a read; it stays in the second-level cache until it is hashed
REPORT_EVERY = 16 << 20  # bytes


def sha256_of(fd: int, size: int, progress: Callable[[int], None] | None = None) -> str:
    """Return "sha256:HEX" of the first `size` bytes of the file `fd` (borrowed; its offset stays).

    `progress` is called with the number of bytes done about every REPORT_EVERY bytes, and at the end. Raises
    InvalidImage for a file that ends before, or that cannot be read.
    """
    hashed = hashlib.sha256()
    buffer = bytearray(min(BLOCK, max(size, 1)))
    view = memoryview(buffer)
    os.posix_fadvise(fd, 0, size, os.POSIX_FADV_SEQUENTIAL)
    done, reported = 0, 0
    while done < size:
        wanted = view[: min(len(buffer), size - done)]
        try:
            count = os.preadv(fd, [wanted], done)
        except OSError as error:
            raise InvalidImage(f"it cannot be read ({error.strerror})", offset=done) from None
        if not count:
            raise InvalidImage(f"it ends {size - done} bytes before its size", offset=done)
        hashed.update(wanted[:count])
        done += count
        if progress is not None and done - reported >= REPORT_EVERY and done < size:
            progress(done)
            reported = done
    if progress is not None:
        progress(done)
    return f"sha256:{hashed.hexdigest()}"
