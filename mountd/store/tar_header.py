"""The headers of tar archives, read strictly and written in one way only.

Read are the formats that image builders write: ustar and pax (POSIX pax(1), "ustar Interchange Format" and
"pax Header Block"), GNU's long names and binary numbers, and headers from before them all. Written is ustar
with a pax header for what does not fit. What two readers could take for two things is refused. No I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mountd.errors import InvalidImage

BLOCK = 512
MAXIMUM_NUMBER = (1 << 62) - 1
MAXIMUM_ID = (1 << 32) - 2
MAXIMUM_XATTRS = 64
MAXIMUM_XATTR_NAME = 255  # XATTR_NAME_MAX
MAXIMUM_XATTR_VALUE = 64 << 10  # XATTR_SIZE_MAX
REGULAR, HARD_LINK, SYMBOLIC_LINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = (
    bytes([c]) for c in b"0123456"
)
OLD_REGULAR, CONTIGUOUS = b"\0", b"7"
PAX, PAX_GLOBAL, GNU_LONG_NAME, GNU_LONG_LINK = b"x", b"g", b"L", b"K"
XATTR = b"SCHILY.xattr."
# Of what is written, what needs no pax header.
MAXIMUM_NAME = 100
MAXIMUM_OCTAL_7, MAXIMUM_OCTAL_11 = 0o7777777, 0o77777777777
OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
DECIMAL = re.compile(rb"[0-9]{1,19}")
TIME = re.compile(rb"(-?[0-9]{1,18})(?:\.([0-9]{0,32}))?")
RECORD = re.compile(rb"([1-9][0-9]{0,9}) ")


@dataclass(slots=True)
class Entry:
    """One member of an archive. `mtime` is in nanoseconds since the epoch."""

    path: bytes
    type: bytes
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    link: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


def parse(block: bytes, offset: int) -> Entry:
    """Return what a header block says. Raises InvalidImage; `offset` is where it stands in the archive."""
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if number(block[148:156], offset + 148) != unsigned:
        raise InvalidImage("a tar header's checksum is wrong", offset=offset)
    posix = block[257:265] == b"ustar\x0000"
    gnu = block[257:265] == b"ustar  \0"
    if not posix and not gnu and block[257:265] != bytes(8):
        raise InvalidImage("a tar header is of an unknown format", offset=offset)
    name = text(block[:100])
    if posix and (prefix := text(block[345:500])):
        name = prefix + b"/" + name
    entry = Entry(
        path=name,
        type=block[156:157],
        mode=number(block[100:108], offset + 100) & 0o7777,
        uid=identifier(number(block[108:116], offset + 108), offset),
        gid=identifier(number(block[116:124], offset + 116), offset),
        size=number(block[124:136], offset + 124),
        mtime=number(block[136:148], offset + 136, signed=True) * 10**9,
        link=text(block[157:257]),
    )
    if entry.type in (CHARACTER, BLOCK_DEVICE):
        entry.major = number(block[329:337], offset + 329)
        entry.minor = number(block[337:345], offset + 337)
        if entry.major > 0xFFF or entry.minor > 0xFFFFF:
            raise InvalidImage("a device number is too large", offset=offset + 329)
    if entry.type == OLD_REGULAR:
        # Before there were types, a slash at the end made a directory.
        entry.type = DIRECTORY if name.endswith(b"/") else REGULAR
    elif entry.type == CONTIGUOUS:
        entry.type = REGULAR
    return entry


def text(raw: bytes) -> bytes:
    """Return a field up to its first NUL."""
    return raw.split(b"\0", 1)[0]


def identifier(value: int, offset: int) -> int:
    """Return a uid or gid, refused if there can be none such."""
    if value > MAXIMUM_ID:
        raise InvalidImage("an owner's id is too large", offset=offset)
    return value


def number(raw: bytes, offset: int, *, signed: bool = False) -> int:
    """Return the number in a field: octal digits, or GNU's binary notation."""
    if raw[0] & 0x80:
        # The first bit says that it is binary, the second is the sign.
        value = int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
        if raw[0] & 0x40:
            value -= 1 << (8 * len(raw) - 1)
    else:
        match = OCTAL.fullmatch(raw)
        if match is None:
            raise InvalidImage("a number in a tar header is not octal", offset=offset)
        value = int(match[1] or b"0", 8)
    if abs(value) > MAXIMUM_NUMBER or (value < 0 and not signed):
        raise InvalidImage("a number in a tar header is out of range", offset=offset)
    return value


def parse_pax(data: bytes, offset: int) -> dict[bytes, bytes]:
    """Return the records of a pax header. Raises InvalidImage, also for a key that is there twice."""
    found: dict[bytes, bytes] = {}
    place = 0
    while place < len(data):
        match = RECORD.match(data, place)
        end = place + int(match[1]) if match else 0
        record = data[match.end() if match else 0 : end]
        key, equals, value = record[:-1].partition(b"=")
        if match is None or end > len(data) or not record.endswith(b"\n") or not equals or not key:
            raise InvalidImage("a pax header has a malformed record", offset=offset + place)
        if key in found:
            raise InvalidImage("a pax header has a key twice", offset=offset + place)
        found[key] = value
        place = end
    return found


def apply_pax(entry: Entry, records: dict[bytes, bytes], offset: int) -> None:
    """Have what a pax header says replace what the entry's own header says. Raises InvalidImage."""
    for key, value in records.items():
        # One layout with holes in it has several notations, which readers disagree about.
        if key.startswith(b"GNU.sparse.") or key == b"SCHILY.realsize":
            raise InvalidImage("a file is stored with holes, which is not supported", offset=offset)
        if key in (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime") or key.startswith(XATTR):
            _apply(entry, key, value, offset)


def _apply(entry: Entry, key: bytes, value: bytes, offset: int) -> None:
    if key in (b"path", b"linkpath"):
        if not value or b"\0" in value:
            raise InvalidImage("a name in a pax header is empty or has a NUL", offset=offset)
        if key == b"path":
            entry.path = value
        else:
            entry.link = value
    elif key.startswith(XATTR):
        _add_xattr(entry, key.removeprefix(XATTR), value, offset)
    elif key == b"mtime":
        match = TIME.fullmatch(value)
        if match is None or abs(int(match[1])) > MAXIMUM_NUMBER // 10**9:
            raise InvalidImage("a time in a pax header is malformed", offset=offset)
        fraction = int((match[2] or b"0")[:9].ljust(9, b"0"))
        seconds = int(match[1]) * 10**9
        entry.mtime = seconds - fraction if value.startswith(b"-") else seconds + fraction
    else:
        if not DECIMAL.fullmatch(value) or int(value) > MAXIMUM_NUMBER:
            raise InvalidImage("a number in a pax header is malformed", offset=offset)
        if key == b"size":
            entry.size = int(value)
        elif key == b"uid":
            entry.uid = identifier(int(value), offset)
        else:
            entry.gid = identifier(int(value), offset)


def _add_xattr(entry: Entry, name: bytes, value: bytes, offset: int) -> None:
    if not 0 < len(name) <= MAXIMUM_XATTR_NAME or b"\0" in name or len(value) > MAXIMUM_XATTR_VALUE:
        raise InvalidImage("an extended attribute is malformed or too long", offset=offset)
    if len(entry.xattrs) == MAXIMUM_XATTRS:
        raise InvalidImage(f"a file has more than {MAXIMUM_XATTRS} extended attributes", offset=offset)
    entry.xattrs[name] = value


def build(entry: Entry) -> bytes:
    """Return the header of an entry, in whole blocks, with a pax header before it where it needs one."""
    records: dict[bytes, bytes] = {}
    seconds, nanoseconds = divmod(entry.mtime, 10**9)
    if len(entry.path) > MAXIMUM_NAME:
        records[b"path"] = entry.path
    if len(entry.link) > MAXIMUM_NAME:
        records[b"linkpath"] = entry.link
    if entry.size > MAXIMUM_OCTAL_11:
        records[b"size"] = b"%d" % entry.size
    for key, value in ((b"uid", entry.uid), (b"gid", entry.gid)):
        if value > MAXIMUM_OCTAL_7:
            records[key] = b"%d" % value
    if nanoseconds or not 0 <= seconds <= MAXIMUM_OCTAL_11:
        records[b"mtime"] = time(entry.mtime)
    for name in sorted(entry.xattrs):
        records[XATTR + name] = entry.xattrs[name]
    header = block(entry, seconds)
    if not records:
        return header
    data = b"".join(record(key, value) for key, value in records.items())
    before = block(Entry(b"pax", PAX, mode=0o644, size=len(data)), 0)
    return before + data + bytes(-len(data) % BLOCK) + header


def time(nanoseconds: int) -> bytes:
    """Return a time as a pax header has it, in seconds."""
    seconds, rest = divmod(abs(nanoseconds), 10**9)
    return b"%s%d.%09d" % (b"-" if nanoseconds < 0 else b"", seconds, rest)


def record(key: bytes, value: bytes) -> bytes:
    """Return one record of a pax header, which begins with its own length."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    # The length's own digits may make it a digit longer.
    if len(str(length)) != len(str(rest)):
        length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def block(entry: Entry, seconds: int) -> bytes:
    """Return the ustar block of an entry; what does not fit is cut off, as the pax header has it."""
    in_range = min(max(seconds, 0), MAXIMUM_OCTAL_11)
    fields = (
        entry.path[:MAXIMUM_NAME].ljust(100, b"\0"),
        b"%07o\0" % entry.mode,
        b"%07o\0" % min(entry.uid, MAXIMUM_OCTAL_7),
        b"%07o\0" % min(entry.gid, MAXIMUM_OCTAL_7),
        b"%011o\0" % min(entry.size, MAXIMUM_OCTAL_11),
        b"%011o\0" % in_range,
        b" " * 8,
        entry.type,
        entry.link[:MAXIMUM_NAME].ljust(100, b"\0"),
        b"ustar\x0000",
        bytes(64),
        b"%07o\0" % entry.major,
        b"%07o\0" % entry.minor,
    )
    raw = b"".join(fields).ljust(BLOCK, b"\0")
    return raw[:148] + b"%06o\0 " % sum(raw) + raw[156:]
