"""The textual description of a composefs image (composefs-dump(5)), read line by line and written anew.

Whoever hands one over has the image made of it by mountd itself, so that no file system of a stranger's is
ever given to the kernel. What makes the image (mkcomposefs) is a program in C; what it gets is not what
came, but what was understood: each line is taken apart here, checked, and written in one form only.

* Each path is an absolute one, below a directory that came before it; the first is the root. Nothing is
  there twice.
* A file has what is in it, or the relative path of its object: without `.` and `..`, so that it leads
  nowhere but below an object directory.
* A hard link is one to a file that came before it, and that is no link itself.
* There are no devices, but what overlayfs calls a whiteout; of the extended attributes, only user.* is
  anybody's to give. The mark of a directory with whiteouts is left out: mkcomposefs makes that itself.
* The number of lines, and what each can be, is bounded: in time and memory it costs what its bytes cost.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage, LimitExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

VERSION = 1  # of what is let through: what was made by other rules is made again
CHUNK = 1 << 18
MAXIMUM_DUMP = 64 << 20  # bytes
MAXIMUM_LINE = 1 << 17
MAXIMUM_ENTRIES = 1 << 19
MAXIMUM_DEPTH = 256
MAXIMUM_NAME = 255
MAXIMUM_PATH = 4095
MAXIMUM_CONTENT = 5000  # of a file that is in the image itself
MAXIMUM_ATTRIBUTES = 64
# What mkcomposefs takes of one file: names and values with what each needs in the image, and all as text.
MAXIMUM_ALL_VALUES = 32755
ATTRIBUTE_OVERHEAD = 7
MAXIMUM_ATTRIBUTE_TEXT = 65535
MAXIMUM_ID = (1 << 32) - 2
MAXIMUM_SIZE = (1 << 63) - 1
FIELDS = 11
MINIMUM_TIME = -1 << 63
DECIMAL = re.compile(rb"[0-9]{1,20}")
OCTAL = re.compile(rb"[0-7]{1,7}")
DIGEST = re.compile(rb"[0-9a-f]{64}")
ESCAPED = re.compile(rb"\\(?:x([0-9A-Fa-f]{2})|([\\nrt])|(.?))", re.DOTALL)
PLAIN = {b"\\": b"\\", b"n": b"\n", b"r": b"\r", b"t": b"\t"}
# What is written as it is; “=” is not in the name of an attribute.
SAFE = re.compile(rb"[^!-\[\]-~]")
SAFE_NAME = re.compile(rb"[^!-<>-\[\]-~]")
NAMESPACE = b"user."
HAS_WHITEOUTS = (b"trusted.overlay.opaque", b"x")  # of a directory
UNIX_LINES = "lines end in a line feed alone"
WITHOUT_DEVICES = "leave devices out: “mkcomposefs --skip-devices”"
ONLY_USERS = "leave other attributes out: “mkcomposefs --user-xattrs”"
KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True, slots=True)
class Summary:
    """What a description comes to: how many entries, and how many files whose contents are objects.

    `unverified` of these have no digest that the contents could be checked against.
    """

    entries: int
    objects: int
    unverified: int


def rewrite(read: Callable[[int], bytes], write: Callable[[bytes], object]) -> Summary:
    """Check the description that `read` returns piece by piece, b"" at its end, and write it in our form.

    Raises InvalidImage, which names the line, and LimitExceeded; what was written before is worth nothing.
    """
    return Reader(write).run(lines(read))


def lines(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield the lines without their ends. Raises LimitExceeded for a long one, or too many bytes of all."""
    rest, total = b"", 0
    while piece := read(CHUNK):
        total += len(piece)
        if total > MAXIMUM_DUMP:
            raise LimitExceeded("bytes of a composefs description", MAXIMUM_DUMP)
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
        if len(rest) > MAXIMUM_LINE:
            raise LimitExceeded("bytes of one line of a composefs description", MAXIMUM_LINE)
    if rest:
        yield rest


class Reader:
    """Reads one description, and remembers what later lines may refer to."""

    __slots__ = ("_directories", "_entries", "_files", "_objects", "_unverified", "_write")

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._directories: set[bytes] = set()
        # Each that is no directory, and what a hard link to it would be, None for what is one itself.
        self._files: dict[bytes, int | None] = {}
        self._entries = 0
        self._objects = 0
        self._unverified = 0

    def run(self, all_lines: Iterator[bytes]) -> Summary:
        """Read all lines."""
        for line in all_lines:
            self._entries += 1
            if self._entries > MAXIMUM_ENTRIES:
                raise LimitExceeded("lines of a composefs description", MAXIMUM_ENTRIES)
            if len(line) > MAXIMUM_LINE:
                raise LimitExceeded("bytes of one line of a composefs description", MAXIMUM_LINE)
            self._read(line)
        if not self._entries:
            raise InvalidImage("the description is empty")
        return Summary(self._entries, self._objects, self._unverified)

    def _fail(self, reason: str, way_out: str | None = None) -> NoReturn:
        more = "" if way_out is None else f"; {way_out}"
        raise InvalidImage(f"line {self._entries} of the description: {reason}{more}")

    def _read(self, line: bytes) -> None:
        if line.endswith(b"\r"):
            self._fail("it ends in a carriage return", UNIX_LINES)
        fields = line.split(b" ")
        if len(fields) < FIELDS:
            self._fail(f"it has {len(fields)} fields, and {FIELDS} are needed")
        path = self._unescape(fields[0], "the path")
        link = fields[2].startswith(b"@")
        mode = self._mode(fields[2][1:] if link else fields[2])
        kind = stat.S_IFMT(mode)
        self._place(path, kind)
        if link:
            self._hard_link(path, mode, fields)
            return
        if kind == stat.S_IFDIR:
            self._directories.add(path)
        else:
            self._files[path] = kind
        size = self._number(fields[1], "the size", MAXIMUM_SIZE)
        nlink = self._number(fields[3], "the number of links", MAXIMUM_ID)
        uid = self._number(fields[4], "the uid", MAXIMUM_ID)
        gid = self._number(fields[5], "the gid", MAXIMUM_ID)
        device = self._number(fields[6], "the device number", MAXIMUM_SIZE)
        if device or kind == stat.S_IFBLK:
            self._fail(f"it is {KINDS[kind]} with the number {device}", WITHOUT_DEVICES)
        size, payload, content, digest = self._contents(kind, size, fields)
        parts = [
            escape(path),
            b"%d %o %d %d %d 0" % (size, mode, nlink, uid, gid),
            self._time(fields[7]),
            optional(payload),
            optional(content),
            digest or b"-",
            *self._attributes(fields[FIELDS:], kind),
        ]
        self._write(b" ".join(parts) + b"\n")

    def _place(self, path: bytes, kind: int) -> None:
        """Refuse a path that is no place for a new entry."""
        if self._entries == 1:
            if path != b"/" or kind != stat.S_IFDIR:
                self._fail("the first is not the root directory, “/”")
            return
        if path in self._directories or path in self._files:
            self._fail("its path is there already")
        if len(path) > MAXIMUM_PATH or path.count(b"/") > MAXIMUM_DEPTH:
            self._fail(f"its path is longer than {MAXIMUM_PATH} bytes or {MAXIMUM_DEPTH} names")
        parent, slash, name = path.rpartition(b"/")
        if b"\0" in path:
            self._fail("its path has a zero byte")
        # The root is the one directory whose path ends in a slash.
        if not slash or parent == b"/" or name in (b"", b".", b"..") or len(name) > MAXIMUM_NAME:
            self._fail("its path is no absolute one, or ends in no name that a file can have")
        # What is in the path before is the path of one that was let through, name by name.
        if (parent or b"/") not in self._directories:
            self._fail("no directory before it is the one that it is in")

    def _hard_link(self, path: bytes, mode: int, fields: list[bytes]) -> None:
        target = self._unescape(fields[8], "the target of the link")
        if stat.S_IFMT(mode) == stat.S_IFDIR or self._files.get(target) is None:
            self._fail("it is a hard link, and its target is no file that came before it")
        self._files[path] = None
        self._write(b"%s 0 @%o 1 0 0 0 0.0 %s - -\n" % (escape(path), mode, escape(target)))

    def _contents(
        self, kind: int, size: int, fields: list[bytes]
    ) -> tuple[int, bytes | None, bytes | None, bytes | None]:
        """Return the size, the payload, what is in the image itself, and the digest."""
        payload, content = (
            None if field in (b"", b"-") else self._unescape(field, what)
            for field, what in ((fields[8], "the payload"), (fields[9], "the contents"))
        )
        digest = None if fields[10] in (b"", b"-") else fields[10]
        if kind == stat.S_IFLNK:
            if payload is None or len(payload) > MAXIMUM_PATH or b"\0" in payload:
                self._fail("it is a symbolic link, and its target is none that one can have")
            if content is not None or digest is not None:
                self._fail("it is a symbolic link, and has contents or a digest")
            return len(payload), payload, None, None
        if kind != stat.S_IFREG:
            if payload is not None or content is not None or digest is not None:
                self._fail(f"it is {KINDS[kind]}, and has a payload, contents or a digest")
            return (size if kind == stat.S_IFDIR else 0), None, None, None
        if digest is not None and DIGEST.fullmatch(digest) is None:
            self._fail("its digest is not 64 digits of 0-9 and a-f")
        if content is not None and (len(content) != size or size > MAXIMUM_CONTENT):
            self._fail(
                f"it has {len(content)} bytes of contents, its size is {size}, {MAXIMUM_CONTENT} at most"
            )
        if payload is not None:
            self._check_object(payload)
        if size and content is None:
            if payload is None:
                self._fail(f"it has {size} bytes, and neither contents nor an object")
            self._objects += 1
            self._unverified += digest is None
        return size, payload, content, digest

    def _check_object(self, payload: bytes) -> None:
        """Refuse a path that could lead out of an object directory, or that overlayfs would not take."""
        if len(payload) > MAXIMUM_PATH or b"\0" in payload:
            self._fail("the path of its object is too long, or has a zero byte")
        if any(name in (b"", b".", b"..") or len(name) > MAXIMUM_NAME for name in payload.split(b"/")):
            self._fail("the path of its object is no plain relative one")

    def _attributes(self, fields: list[bytes], kind: int) -> list[bytes]:
        """Return the extended attributes as they are written."""
        if len(fields) > MAXIMUM_ATTRIBUTES:
            self._fail(f"it has more than {MAXIMUM_ATTRIBUTES} extended attributes")
        found: dict[bytes, bytes] = {}
        total = 0
        for field in fields:
            key, equals, text = field.partition(b"=")
            if not equals:
                self._fail("an extended attribute has no “=”")
            name = self._unescape(key, "the name of an attribute")
            value = self._unescape(text, "the value of an attribute")
            if kind == stat.S_IFDIR and (name, value) == HAS_WHITEOUTS:
                continue
            total += len(name) + len(value) + ATTRIBUTE_OVERHEAD
            if total > MAXIMUM_ALL_VALUES:
                self._fail(f"its extended attributes are longer than {MAXIMUM_ALL_VALUES} bytes together")
            if name in found or b"\0" in name or len(name) > MAXIMUM_NAME:
                self._fail("an extended attribute is there twice, or has no name that one can have")
            if not name.startswith(NAMESPACE) or name == NAMESPACE:
                shown = "".join(chr(c) if 32 < c < 127 else "?" for c in name[:64])
                self._fail(f"the extended attribute “{shown}” is not one of user.*", ONLY_USERS)
            found[name] = value
        written = [b"%s=%s" % (escape(name, SAFE_NAME), escape(value)) for name, value in found.items()]
        if len(b" ".join(written)) > MAXIMUM_ATTRIBUTE_TEXT:
            self._fail(f"its extended attributes are longer than {MAXIMUM_ATTRIBUTE_TEXT} bytes as text")
        return written

    def _mode(self, text: bytes) -> int:
        mode = int(text, 8) if OCTAL.fullmatch(text) else 0
        if stat.S_IFMT(mode) not in KINDS or mode >> 16:
            self._fail("its mode is no octal number with a type that a file can have")
        return mode

    def _number(self, text: bytes, what: str, maximum: int) -> int:
        number = int(text) if DECIMAL.fullmatch(text) else -1
        if not 0 <= number <= maximum:
            self._fail(f"{what} is no number from 0 to {maximum}")
        return number

    def _time(self, text: bytes) -> bytes:
        """Return a time as it is written; one before 1970 has negative seconds, and counts on from there."""
        seconds, dot, nanoseconds = text.partition(b".")
        if not dot:
            self._fail("its time has no “.” between seconds and nanoseconds")
        before = seconds.startswith(b"-")
        maximum = -MINIMUM_TIME if before else MAXIMUM_SIZE
        number = self._number(seconds[before:], "the time in seconds, without its sign,", maximum)
        return b"%d.%d" % (
            -number if before else number,
            self._number(nanoseconds, "the nanoseconds", 999_999_999),
        )

    def _unescape(self, text: bytes, what: str) -> bytes:
        if b"\0" in text:
            self._fail(f"{what} has a zero byte")
        if b"\\" not in text:
            return text

        def plain(match: re.Match[bytes]) -> bytes:
            if match[1] is not None:
                return bytes((int(match[1], 16),))
            if match[2] is None:
                self._fail(f"{what} has a “\\” that stands for nothing")
            return PLAIN[match[2]]

        return ESCAPED.sub(plain, text)


def escape(data: bytes, unsafe: re.Pattern[bytes] = SAFE) -> bytes:
    """Return bytes as one field has them."""
    return unsafe.sub(lambda match: b"\\x%02x" % match[0][0], data)


def optional(data: bytes | None) -> bytes:
    """Return a field that may be missing, as which “-” is written."""
    if data is None:
        return b"-"
    return b"\\x2d" if data == b"-" else escape(data)
