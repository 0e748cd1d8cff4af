"""The bytes of a layer, uncompressed, counted and hashed as they pass.

gzip is undone here by zlib, which says how much it may put out at once; a stream may have several members,
as parallel and seekable compressors write them. zstd has no place in the standard library, so that its
program undoes it on the other side of a pipe. No I/O but what `read` does.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage, LimitExceeded

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 256 << 10
GZIP_WINDOW = 31  # zlib.h, inflateInit2: the largest window, and gzip's header and trailer
# Text compresses to a hundredth at times. What grows more is made of nothing, which is allowed to be small.
MAXIMUM_RATIO = 200
ALWAYS_ALLOWED = 64 << 20


class Gunzip:
    """Reads from a gzip stream."""

    __slots__ = ("_inflate", "_input", "_read")

    def __init__(self, read: Callable[[int], bytes]) -> None:
        """`read(n)` returns from 1 to n bytes of the stream, none at its end."""
        self._read = read
        self._input = b""
        self._inflate = zlib.decompressobj(GZIP_WINDOW)

    def read(self, length: int) -> bytes:
        """Return from 1 to `length` uncompressed bytes, none at the end. Raises InvalidImage."""
        while True:
            if self._inflate.eof:
                self._input = self._inflate.unused_data or self._read(CHUNK)
                if not self._input:
                    return b""
                self._inflate = zlib.decompressobj(GZIP_WINDOW)
            elif not self._input:
                self._input = self._read(CHUNK)
                if not self._input:
                    raise InvalidImage("a compressed layer is cut off")
            try:
                found = self._inflate.decompress(self._input, length)
            except zlib.error as error:
                raise InvalidImage(f"a layer is not compressed as it says ({error})") from None
            self._input = self._inflate.unconsumed_tail
            if found:
                return found


class Measured:
    """Passes bytes on in whatever pieces are wanted, counts and hashes them, and stops at a maximum."""

    __slots__ = ("_compressed", "_hash", "_left", "_maximum", "_read", "count")

    def __init__(self, read: Callable[[int], bytes], maximum: int, compressed: int) -> None:
        """`compressed` is the size of what the bytes come from."""
        self._read = read
        self._maximum, self._compressed = maximum, compressed
        self._hash = hashlib.sha256()
        self._left = memoryview(b"")
        self.count = 0

    def read(self, length: int) -> bytes:
        """Return from 1 to `length` bytes, none at the end. Raises LimitExceeded and what `read` raises."""
        if not self._left:
            self._left = memoryview(self._more())
        piece, self._left = bytes(self._left[:length]), self._left[length:]
        return piece

    def _more(self) -> bytes:
        piece = self._read(CHUNK)
        self.count += len(piece)
        if self.count > self._maximum:
            raise LimitExceeded("bytes of an uncompressed layer", self._maximum)
        if self.count > max(ALWAYS_ALLOWED, self._compressed * MAXIMUM_RATIO):
            raise LimitExceeded("times that a layer may grow when it is uncompressed", MAXIMUM_RATIO)
        self._hash.update(piece)
        return piece

    @property
    def digest(self) -> str:
        """The digest of what has passed."""
        return "sha256:" + self._hash.hexdigest()
