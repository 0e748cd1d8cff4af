"""The GUID partition table of a disk image (UEFI specification, chapter 5), read strictly.

A kernel, a boot loader and a partitioning tool each forgive other mistakes, so that one table can be read in
several ways. Here there is one way, and a table that has another is refused:

1. The first sector is a protective MBR with one entry, of type EE, from sector 1 on. Hybrids are two tables.
2. A header is found for one size of sectors only, 512 or 4096 bytes.
3. Header and entries fit their checksums; so do their copies, which have to say the same. The copies are
   where the header says that they are, which need not be the end of the image: an image that was made longer
   is a good one. But then there is no other header at the end.
4. Every partition lies within the area that the header has for them, and within the image; no two overlap,
   and no two have the same UUID.

All of it works on bytes that were read once, at most `MAXIMUM_READ` of them, and compares numbers. It raises
`InvalidImage` only, with the offset of what is wrong, and lets through what `read` raises.
"""

from __future__ import annotations

import codecs
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

from mountd.errors import InvalidImage
from mountd.source.fields import Fields, is_power_of_two

if TYPE_CHECKING:
    from collections.abc import Callable

    Read = Callable[[int, int], bytes]

MAGIC = b"EFI PART"
SECTOR_SIZES = (512, 4096)
# Where other tools look for a header, too.
OTHER_SECTOR_SIZES = (1024, 2048)
REVISION = 0x00010000
HEADER = 92  # bytes of the header that are defined
ENTRY = 128
# As many bytes as every tool reserves: 128 entries of 128 bytes.
MAXIMUM_TABLE = 16384
MAXIMUM_READ = 4 * 4096 + 2 * MAXIMUM_TABLE + 64
MBR = 512
MBR_ENTRIES = 446
PROTECTIVE = 0xEE
NAME = 56  # offset in an entry; 36 characters of UTF-16

# Attributes of a partition, as bits: for any type, and for those of the specification of types.
NO_BLOCK_IO = 1 << 1
GROW = 1 << 59
READ_ONLY = 1 << 60
NO_AUTO = 1 << 63


@dataclass(frozen=True, slots=True)
class Entry:
    """A partition: `number` counts from 1, `start` and `size` are in bytes, UUIDs are text.

    `label` is text from the image: a name to show, not proof of anything.
    """

    number: int
    type: str
    uuid: str
    start: int
    size: int
    attributes: int
    label: str


@dataclass(frozen=True, slots=True)
class Table:
    """A partition table; `entries` are those in use, in the order of the table."""

    sector_size: int
    uuid: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says; all positions are in sectors."""

    own: int
    other: int
    first: int
    last: int
    disk: bytes
    table: int
    count: int
    entry_size: int
    checksum: int


def read(read: Read, size: int) -> Table:
    """Return the partition table of an image of `size` bytes.

    `read(offset, length)` returns the bytes there, fewer than `length` only at the end of the image. Raises
    InvalidImage.
    """
    check_mbr(_read(read, size, 0, MBR))
    sector = sector_size(read, size)
    header = read_header(read, size, sector, 1)
    sectors = size // sector
    check_layout(header, sectors, sector)
    copy = read_header(read, size, sector, header.other)
    if copy.other != 1 or described(copy) != described(header):
        raise InvalidImage("GPT: the copy of the header says something else", offset=header.other * sector)
    length = header.count * header.entry_size
    if not header.last < copy.table or (copy.table * sector + length) > copy.own * sector:
        raise InvalidImage("GPT: the copy of the entries is out of place", offset=copy.own * sector + 72)
    table = read_table(read, size, sector, header, length)
    read_table(read, size, sector, copy, length)
    end = sectors - 1
    if end != header.other and _read(read, size, end * sector, len(MAGIC)) == MAGIC:
        raise InvalidImage("GPT: there is another header at the end of the image", offset=end * sector)
    entries = read_entries(table, header, sector)
    check_apart(entries, header, sector)
    return Table(sector, text_of_uuid(header.disk), entries)


def _read(read: Read, size: int, offset: int, length: int) -> bytes:
    """Return all of the bytes there, or refuse the image."""
    found = read(offset, length)[:length] if offset + length <= size else b""
    if len(found) < length:
        raise InvalidImage("GPT: the image ends inside the partition table", offset=offset + len(found))
    return found


def check_mbr(sector: bytes) -> None:
    """Refuse a first sector that is no protective MBR. Raises InvalidImage."""
    if sector[510:512] != b"\x55\xaa":
        raise InvalidImage("GPT: there is no protective MBR", offset=510)
    places = range(MBR_ENTRIES, 510, 16)
    used = [place for place in places if any(sector[place : place + 16])]
    if len(used) != 1:
        raise InvalidImage(
            "GPT: the MBR has none or several partitions, not the one that protects", offset=MBR_ENTRIES
        )
    (place,) = used
    if sector[place + 4] != PROTECTIVE or sector[place + 8 : place + 12] != b"\x01\0\0\0":
        raise InvalidImage("GPT: the partition in the MBR is not the one that protects", offset=place)


def sector_size(read: Read, size: int) -> int:
    """Return the one size of sectors for which there is a header. Raises InvalidImage."""
    found = [
        each
        for each in sorted(SECTOR_SIZES + OTHER_SECTOR_SIZES)
        if size >= 2 * each and _read(read, size, each, len(MAGIC)) == MAGIC
    ]
    if not found:
        raise InvalidImage("GPT: there is no header where the first should be", offset=SECTOR_SIZES[0])
    if len(found) > 1:
        raise InvalidImage("GPT: there are headers for several sizes of sectors", offset=found[1])
    if found[0] not in SECTOR_SIZES:
        raise InvalidImage(f"GPT: sectors of {found[0]} bytes are not known", offset=found[0])
    return found[0]


def read_header(read: Read, size: int, sector: int, number: int) -> Header:
    """Return the header in the sector with this number. Raises InvalidImage."""
    begin = number * sector
    fields = Fields("GPT", _read(read, size, begin, sector), 0, "little")

    def require(true: bool, offset: int, reason: str) -> None:
        if not true:
            raise InvalidImage(f"GPT: {reason}", offset=begin + offset)

    require(fields.bytes(0, 8) == MAGIC, 0, "there is no header")
    require(fields.u32(8) == REVISION, 8, f"revision 0x{fields.u32(8):x} is not known")
    length = fields.u32(12)
    require(HEADER <= length <= sector, 12, f"a header of {length} bytes is not one")
    plain = fields.bytes(0, 16) + bytes(4) + fields.bytes(20, length - 20)
    require(crc32(plain) == fields.u32(16), 16, "the checksum of the header does not fit")
    require(fields.u64(24) == number, 24, "the header belongs elsewhere")
    return Header(
        own=number,
        other=fields.u64(32),
        first=fields.u64(40),
        last=fields.u64(48),
        disk=fields.bytes(56, 16),
        table=fields.u64(72),
        count=fields.u32(80),
        entry_size=fields.u32(84),
        checksum=fields.u32(88),
    )


def described(header: Header) -> tuple[object, ...]:
    """Return what both copies of a header have to say alike."""
    return (header.first, header.last, header.disk, header.count, header.entry_size, header.checksum)


def check_layout(header: Header, sectors: int, sector: int) -> None:
    """Have all parts of the table be within the image, and apart from each other. Raises InvalidImage."""

    def require(true: bool, offset: int, reason: str) -> None:
        if not true:
            raise InvalidImage(f"GPT: {reason}", offset=sector + offset)

    require(1 < header.other < sectors, 32, "the copy of the header lies outside of the image")
    size = header.entry_size
    require(size >= ENTRY and is_power_of_two(size), 84, f"entries of {size} bytes are not known")
    length = header.count * size
    require(
        0 < length <= MAXIMUM_TABLE,
        80,
        f"{header.count} entries are none or more than {MAXIMUM_TABLE} bytes",
    )
    require(header.table >= 2, 72, "the entries overlap the header")
    require(header.first <= header.last, 40, "there is no room for partitions")
    require(
        header.table * sector + length <= header.first * sector, 72, "the entries overlap the partitions"
    )
    require(header.last < header.other, 48, "the partitions overlap the copy of the header")


def read_table(read: Read, size: int, sector: int, header: Header, length: int) -> bytes:
    """Return the entries of a header. Raises InvalidImage."""
    found = _read(read, size, header.table * sector, length)
    if crc32(found) != header.checksum:
        raise InvalidImage("GPT: the checksum of the entries does not fit", offset=header.own * sector + 88)
    return found


def read_entries(table: bytes, header: Header, sector: int) -> tuple[Entry, ...]:
    """Return the entries that are in use. Raises InvalidImage."""
    found = []
    for number in range(header.count):
        begin = number * header.entry_size
        raw = table[begin : begin + ENTRY]
        if not any(raw[:16]):
            continue
        first, last = int.from_bytes(raw[32:40], "little"), int.from_bytes(raw[40:48], "little")
        if not header.first <= first <= last <= header.last:
            raise InvalidImage(
                f"GPT: partition {number + 1} lies outside of the area for partitions",
                offset=header.table * sector + begin + 32,
            )
        found.append(
            Entry(
                number=number + 1,
                type=text_of_uuid(raw[:16]),
                uuid=text_of_uuid(raw[16:32]),
                start=first * sector,
                size=(last - first + 1) * sector,
                attributes=int.from_bytes(raw[48:56], "little"),
                label=text_of_name(raw[NAME:ENTRY]),
            )
        )
    return tuple(found)


def check_apart(entries: tuple[Entry, ...], header: Header, sector: int) -> None:
    """Refuse partitions that overlap, or that have one UUID. Raises InvalidImage."""

    def place(entry: Entry) -> int:
        return header.table * sector + (entry.number - 1) * header.entry_size

    end, before = 0, 0
    for entry in sorted(entries, key=lambda entry: entry.start):
        if entry.start < end:
            raise InvalidImage(
                f"GPT: partition {entry.number} overlaps partition {before}", offset=place(entry) + 32
            )
        end, before = entry.start + entry.size, entry.number
    known: dict[str, int] = {}
    for entry in entries:
        if entry.uuid in known:
            raise InvalidImage(
                f"GPT: partition {entry.number} has the UUID of partition {known[entry.uuid]}",
                offset=place(entry) + 16,
            )
        known[entry.uuid] = entry.number


def text_of_uuid(raw: bytes) -> str:
    """Return a UUID in its usual notation; on disk, the first three numbers of it are little-endian."""
    return str(uuid.UUID(bytes_le=raw))


def text_of_name(raw: bytes) -> str:
    """Return a label. It ends up in terminals and journals, so that what is not printable is replaced."""
    # By name, a codec is imported when it is first used, which a confined process cannot do.
    text = codecs.utf_16_le_decode(raw, "replace", True)[0].split("\0", 1)[0]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
