"""Reading numbers and names out of an untrusted superblock.

A superblock's fields are named by their offset, as in the kernel's header, and every refusal carries the
offset of the field that caused it. A field that lies past the end of the image is a refusal like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.errors import InvalidImage

if TYPE_CHECKING:
    from typing import Literal, NoReturn


class Fields:
    """The fields of one superblock: `start` is where it begins in `head`, the first bytes of the image."""

    __slots__ = ("byte_order", "head", "start", "type")

    def __init__(self, type: str, head: bytes, start: int, byte_order: Literal["little", "big"]) -> None:
        """`type` names the file system in refusals."""
        self.type = type
        self.head = head
        self.start = start
        self.byte_order = byte_order

    def bytes(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset` of the superblock, or refuse the image as cut off."""
        begin = self.start + offset
        found = self.head[begin : begin + length]
        if len(found) < length:
            self.refuse(offset, "the image ends inside the superblock")
        return found

    def number(self, offset: int, length: int) -> int:
        """Return the unsigned number of `length` bytes at `offset`."""
        return int.from_bytes(self.bytes(offset, length), self.byte_order)

    def u8(self, offset: int) -> int:
        """Return the __u8 at `offset`."""
        return self.number(offset, 1)

    def u16(self, offset: int) -> int:
        """Return the __le16 or __be16 at `offset`."""
        return self.number(offset, 2)

    def u32(self, offset: int) -> int:
        """Return the __le32 or __be32 at `offset`."""
        return self.number(offset, 4)

    def u64(self, offset: int) -> int:
        """Return the __le64 or __be64 at `offset`."""
        return self.number(offset, 8)

    def uuid(self, offset: int) -> str | None:
        """Return the UUID at `offset` in its usual notation, None for the all-zero one."""
        raw = self.bytes(offset, 16)
        if not any(raw):
            return None
        text = raw.hex()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    def label(self, offset: int, length: int) -> str | None:
        """Return the NUL-padded name at `offset`, None if empty.

        It ends up in terminals and journals: whatever is not a printable character is replaced.
        """
        raw = self.bytes(offset, length).split(b"\0", 1)[0]
        text = raw.decode("utf-8", "replace")
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text) or None

    def refuse(self, offset: int, reason: str) -> NoReturn:
        """Raise InvalidImage about the field at `offset`."""
        raise InvalidImage(f"{self.type}: {reason}", offset=self.start + offset)

    def require(self, true: bool, offset: int, reason: str) -> None:
        """Refuse unless `true`."""
        if not true:
            self.refuse(offset, reason)

    def require_size(self, claimed: int, size: int, offset: int) -> None:
        """Refuse a file system that is empty or larger than its image of `size` bytes."""
        self.require(claimed > 0, offset, "the file system has no blocks")
        # The kernel compares with the block device it gets, but a file that is mounted directly has no such
        # check for every type, and a larger claim is always damage or a lie.
        self.require(
            claimed <= size, offset, f"the file system has {claimed} bytes, the image only has {size}"
        )


def is_power_of_two(number: int) -> bool:
    """Tell whether `number` is 1, 2, 4, …."""
    return number > 0 and number & (number - 1) == 0
