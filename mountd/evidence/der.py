"""A strict reader of DER (ITU-T X.690), for what comes from an enemy.

It reads forwards and never calls itself: how deep it goes is how deep its caller's schema is, and at most
MAXIMUM_DEPTH. Only what DER allows is read: one-byte tags, definite lengths in their shortest form. Each
failure is a `DerError` that says at which byte.
"""

from __future__ import annotations

from dataclasses import dataclass

MAXIMUM_DEPTH = 16
MAXIMUM_LENGTH_BYTES = 4  # of a length: a signature has less than 2**18 bytes

INTEGER = 0x02
OCTET_STRING = 0x04
OBJECT_IDENTIFIER = 0x06
SEQUENCE = 0x30
SET = 0x31
NAMES = {
    INTEGER: "an INTEGER",
    OCTET_STRING: "an OCTET STRING",
    OBJECT_IDENTIFIER: "an OBJECT IDENTIFIER",
    SEQUENCE: "a SEQUENCE",
    SET: "a SET",
}


class DerError(Exception):
    """The bytes are not DER, or not what was expected; the text says where."""


def context(number: int) -> int:
    """Return the tag of a constructed, context-specific [number]."""
    return 0xA0 | number


@dataclass(frozen=True, slots=True)
class Element:
    """One element: its tag, where its contents lie, and all of its bytes including the header, `raw`."""

    tag: int
    content: bytes
    raw: bytes
    offset: int
    depth: int

    def reader(self) -> Reader:
        """Return a reader of what is inside. Raises DerError past MAXIMUM_DEPTH."""
        if self.depth >= MAXIMUM_DEPTH:
            raise DerError(f"it is nested deeper than {MAXIMUM_DEPTH} at byte {self.offset}")
        start = self.offset + len(self.raw) - len(self.content)
        return Reader(self.content, start, self.depth + 1)


class Reader:
    """Reads the elements of `data` one after the other; `offset` is where `data` lies in the whole."""

    __slots__ = ("_data", "_depth", "_offset", "_position")

    def __init__(self, data: bytes, offset: int = 0, depth: int = 0) -> None:
        self._data = data
        self._offset = offset
        self._depth = depth
        self._position = 0

    @property
    def at(self) -> int:
        """Where the next element begins in the whole."""
        return self._offset + self._position

    def peek(self) -> int | None:
        """Return the tag of the next element, None at the end."""
        return self._data[self._position] if self._position < len(self._data) else None

    def take(self, tag: int | None = None) -> Element:
        """Return the next element, which has to have `tag` unless that is None. Raises DerError."""
        start = self._position
        found = self._byte()
        if found & 0x1F == 0x1F:
            raise DerError(f"a tag of more than one byte at byte {self._offset + start}")
        if tag is not None and found != tag:
            wanted = NAMES.get(tag, f"the tag {tag:#04x}")
            raise DerError(f"the tag {found:#04x} at byte {self._offset + start}, where {wanted} has to be")
        length = self._length()
        end = self._position + length
        if end > len(self._data):
            raise DerError(f"it is cut off: {end - len(self._data)} bytes are missing at its end")
        content = self._data[self._position : end]
        self._position = end
        return Element(found, content, self._data[start:end], self._offset + start, self._depth)

    def optional(self, tag: int) -> Element | None:
        """Return the next element if it has `tag`, and None otherwise. Raises DerError."""
        return self.take(tag) if self.peek() == tag else None

    def end(self) -> None:
        """Have nothing left. Raises DerError."""
        left = len(self._data) - self._position
        if left:
            raise DerError(f"{left} bytes at byte {self.at} that do not belong there")

    def _byte(self) -> int:
        if self._position >= len(self._data):
            raise DerError(f"it is cut off at byte {self.at}")
        self._position += 1
        return self._data[self._position - 1]

    def _length(self) -> int:
        start = self.at
        first = self._byte()
        if first < 0x80:
            return first
        count = first & 0x7F
        if not 1 <= count <= MAXIMUM_LENGTH_BYTES:
            raise DerError(f"an indefinite or too long length at byte {start}")
        length = 0
        for _ in range(count):
            length = length << 8 | self._byte()
        if length < 0x80 or length < 1 << 8 * (count - 1):
            raise DerError(f"a length that is not in its shortest form at byte {start}")
        return length


def object_identifier(element: Element) -> str:
    """Return an OBJECT IDENTIFIER in its dotted form. Raises DerError."""
    content = element.content
    if not content or len(content) > 32 or content[-1] & 0x80:
        raise DerError(f"an OBJECT IDENTIFIER that is none at byte {element.offset}")
    arcs: list[int] = []
    value, fresh = 0, True
    for byte in content:
        if fresh and byte == 0x80:
            raise DerError(f"an OBJECT IDENTIFIER that is not in its shortest form at byte {element.offset}")
        value = value << 7 | byte & 0x7F
        fresh = not byte & 0x80
        if fresh:
            arcs.append(value)
            value = 0
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))


def integer(element: Element) -> int:
    """Return an INTEGER of at most 64 bytes. Raises DerError for one that is longer or not minimal."""
    content = element.content
    padded = len(content) > 1 and (content[0], content[1] >> 7) in ((0x00, 0), (0xFF, 1))
    if not content or len(content) > 64 or padded:
        raise DerError(f"an INTEGER that is too long or none at byte {element.offset}")
    return int.from_bytes(content, "big", signed=True)
