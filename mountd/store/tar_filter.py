"""The tar archive of a layer, walked entry by entry and written again with only what a layer may have.

Every entry is understood and made anew: nothing of the original reaches the program that builds a file
system from the result but names, owners, times, contents and the attributes that are allowed. The rules:

* A name is relative, has no "..", and every component above it is a directory of this layer. Directories
  that an archive leaves out are added, so that nobody else has to decide whose they are: the owner's that
  they have in the layers below (below.py), and as open.
* A name is there once; only a directory may be there again, and the last one counts.
* A hard link leads to an entry that came before it in the same layer.
* Extended attributes are dropped but for user.*: trusted.overlay.* and user.overlay.* would have overlayfs
  show what is elsewhere, security.capability would give privileges. Device nodes are dropped unless granted,
  and what the layers below have under the same name is hidden as it would be by them.
* Whiteouts (OCI layer.md, "Whiteouts") apply to the layers below. In the lowest layer there are none, so
  that they vanish. In others they come last, when it is known what else has the name: what the layer itself
  brings stays, and a directory that it brings in the place of another becomes opaque.

No I/O: bytes come from `read` and go to `write`, as they do.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage, LimitExceeded
from mountd.store import below as directories
from mountd.store import tar_header
from mountd.store.below import DEFAULT, Access
from mountd.store.tar_header import BLOCK, Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CHUNK = 256 << 10
MAXIMUM_PAX = 1 << 20
MAXIMUM_PATH = 4095  # PATH_MAX without its NUL
MAXIMUM_COMPONENT = 255  # NAME_MAX
WHITEOUT, SPECIAL, OPAQUE = b".wh.", b".wh..wh.", b".wh..wh..opq"
# Kinds of what is kept under a name.
IS_DIRECTORY, IS_OTHER, IS_DROPPED = 0, 1, 2
KEPT_XATTRS, DROPPED_XATTRS = b"user.", b"user.overlay."
DEVICES = (tar_header.CHARACTER, tar_header.BLOCK_DEVICE)
TYPES = (
    tar_header.REGULAR,
    tar_header.HARD_LINK,
    tar_header.SYMBOLIC_LINK,
    *DEVICES,
    tar_header.DIRECTORY,
    tar_header.FIFO,
)
LONG_NAMES = (tar_header.GNU_LONG_NAME, tar_header.GNU_LONG_LINK)
NOTHING: Mapping[bytes, Access] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Limits:
    """What a layer may have at most: `bytes` of content, `depth` directories in one another, and so on.

    `names` are the bytes of all names together, which are held in memory.
    """

    bytes: int = 64 << 30
    entries: int = 1 << 19
    names: int = 48 << 20
    depth: int = 64


@dataclass(frozen=True, slots=True)
class Summary:
    """What came out: `entries` written, and what was left out of it.

    `directories` are those that the next layer has to know of, None if they are too many.
    """

    entries: int
    content: int
    devices_dropped: int
    xattrs_dropped: int
    whiteouts: int
    directories: Mapping[bytes, Access] | None = field(default_factory=dict, compare=False, repr=False)


class Filter:
    """One walk over one archive."""

    def __init__(
        self,
        read: Callable[[int], bytes],
        write: Callable[[bytes], object],
        *,
        limits: Limits,
        lowest: bool,
        devices: bool,
        below: Mapping[bytes, Access] | None = NOTHING,
    ) -> None:
        """`read(n)` returns from 1 to n bytes, none at the end. `devices` is whether their nodes are kept.

        `lowest` is whether this layer has no other below it; `below` are the directories of those it has, as
        the Summary of the next one says.
        """
        self._read, self._write = read, write
        self._limits, self._lowest, self._devices = limits, lowest, devices
        self._below = below
        self._own: dict[bytes, Access] = {}
        self._offset = 0
        self._kinds: dict[bytes, int] = {}
        # Directory -> whether it is opaque; whiteouts by the name that they hide.
        self._opaque: set[bytes] = set()
        self._hidden: set[bytes] = set()
        self._counts = dict.fromkeys(("headers", "names", "content", "entries", "devices", "xattrs"), 0)

    def run(self) -> Summary:
        """Walk to the end. Raises InvalidImage, LimitExceeded, and what `read` and `write` raise."""
        while (found := self._next()) is not None:
            entry, offset = found
            self._take(entry, offset)
        if b"" not in self._kinds:
            self._add_parent(b"", 0)
        whiteouts = 0 if self._lowest else self._write_whiteouts()
        self._write(bytes(2 * BLOCK))
        return Summary(
            self._counts["entries"],
            self._counts["content"],
            self._counts["devices"],
            self._counts["xattrs"],
            whiteouts,
            self._directories(),
        )

    # Reading

    def _exactly(self, length: int) -> bytes:
        """Read `length` bytes, fewer only at the end of the archive."""
        pieces = []
        missing = length
        while missing and (piece := self._read(min(missing, CHUNK))):
            pieces.append(piece)
            missing -= len(piece)
        self._offset += length - missing
        return b"".join(pieces)

    def _data(self, size: int) -> bytes:
        """Read the data of a header of headers, with its padding."""
        offset = self._offset
        if size > MAXIMUM_PAX:
            raise LimitExceeded("bytes in a header of a tar archive", MAXIMUM_PAX)
        padded = size + -size % BLOCK
        data = self._exactly(padded)
        if len(data) < padded:
            raise InvalidImage("the tar archive ends inside a header", offset=offset)
        return data[:size]

    def _next(self) -> tuple[Entry, int] | None:
        """Return the next entry with all its headers, and where it stands; None at the end."""
        pax: dict[bytes, bytes] | None = None
        long: dict[bytes, bytes] = {}
        while True:
            offset = self._offset
            block = self._exactly(BLOCK)
            if not any(block) and len(block) in (0, BLOCK):
                if pax is not None or long:
                    raise InvalidImage("the tar archive ends after a header of a header", offset=offset)
                self._expect_zeros()
                return None
            if len(block) < BLOCK:
                raise InvalidImage("the tar archive ends inside a header", offset=offset)
            self._count("headers", 1, "entries in a layer", self._limits.entries)
            entry = tar_header.parse(block, offset)
            if entry.type == tar_header.PAX and pax is None:
                pax = tar_header.parse_pax(self._data(entry.size), offset + BLOCK)
            elif entry.type == tar_header.PAX_GLOBAL:
                self._refuse_global(tar_header.parse_pax(self._data(entry.size), offset + BLOCK), offset)
            elif entry.type in LONG_NAMES and entry.type not in long:
                long[entry.type] = tar_header.text(self._data(entry.size))
            elif entry.type not in TYPES:
                raise InvalidImage(
                    f"the tar archive has an entry of the unsupported type {entry.type!r}", offset=offset
                )
            else:
                self._complete(entry, pax or {}, long, offset)
                return entry, offset

    @staticmethod
    def _refuse_global(records: dict[bytes, bytes], offset: int) -> None:
        # It would hold for all entries that follow, for those readers that know of it.
        if set(records) - {b"comment"}:
            raise InvalidImage("a pax header for all entries is not supported", offset=offset)

    @staticmethod
    def _complete(entry: Entry, pax: dict[bytes, bytes], long: dict[bytes, bytes], offset: int) -> None:
        if long and pax:
            raise InvalidImage("an entry has both GNU's and pax headers", offset=offset)
        entry.path = long.get(tar_header.GNU_LONG_NAME, entry.path)
        entry.link = long.get(tar_header.GNU_LONG_LINK, entry.link)
        tar_header.apply_pax(entry, pax, offset)
        # Readers disagree about whether contents follow then.
        if entry.size and entry.type != tar_header.REGULAR:
            raise InvalidImage("an entry that is no file has contents", offset=offset)

    def _expect_zeros(self) -> None:
        """Read what follows the end, which is padding and nothing else."""
        while piece := self._exactly(CHUNK):
            if any(piece):
                raise InvalidImage("the tar archive goes on after its end", offset=self._offset - len(piece))

    def _count(self, what: str, number: int, limit: str, maximum: int) -> None:
        self._counts[what] += number
        if self._counts[what] > maximum:
            raise LimitExceeded(limit, maximum)

    # Judging

    def _take(self, entry: Entry, offset: int) -> None:
        """Write an entry, or remember it, or leave it out."""
        path = self._clean(entry.path, offset)
        components = path.split(b"/")
        if any(component.startswith(SPECIAL) for component in components[:-1]):
            self._skip(entry.size)
            return
        if any(component.startswith(WHITEOUT) for component in components[:-1]):
            raise InvalidImage("a whiteout is a directory", offset=offset)
        if components[-1].startswith(WHITEOUT):
            self._hide(path, components[-1], offset)
            self._skip(entry.size)
            return
        self._add(replace(entry, path=path), offset)

    def _clean(self, raw: bytes, offset: int) -> bytes:
        """Return a path without what says nothing; refuse one that leads elsewhere."""
        if raw.startswith(b"/"):
            raise InvalidImage("a name in the tar archive is absolute", offset=offset)
        components = [component for component in raw.split(b"/") if component not in (b"", b".")]
        if b".." in components:
            raise InvalidImage("a name in the tar archive has “..” in it", offset=offset)
        if len(components) > self._limits.depth:
            raise LimitExceeded("directories in one another in a layer", self._limits.depth)
        path = b"/".join(components)
        if len(path) > MAXIMUM_PATH or any(len(each) > MAXIMUM_COMPONENT for each in components):
            raise InvalidImage("a name in the tar archive is too long", offset=offset)
        return path

    def _hide(self, path: bytes, name: bytes, offset: int) -> None:
        """Remember what a whiteout is about."""
        directory = path[: -len(name)].rstrip(b"/")
        if name == OPAQUE:
            found, where = directory, self._opaque
        elif name.startswith(SPECIAL):
            return  # what aufs keeps for itself
        else:
            hidden = name.removeprefix(WHITEOUT)
            if hidden in (b"", b".", b".."):
                raise InvalidImage("a whiteout hides nothing that has a name", offset=offset)
            found, where = (directory + b"/" + hidden).lstrip(b"/"), self._hidden
        if self._lowest or found in where:
            return
        self._count("names", len(found), "bytes of names in a layer", self._limits.names)
        where.add(found)

    def _add(self, entry: Entry, offset: int) -> None:
        """Write an entry that is not a whiteout, after whatever directories it needs."""
        known = self._kinds.get(entry.path)
        is_directory = entry.type == tar_header.DIRECTORY
        if not entry.path and not is_directory:
            raise InvalidImage("the root of a layer is no directory", offset=offset)
        if known is not None and not (is_directory and known == IS_DIRECTORY):
            raise InvalidImage("a name is there twice in the tar archive", offset=offset)
        self._add_parents(entry.path, entry.mtime, offset)
        if entry.type in DEVICES and (not self._devices or not (entry.major or entry.minor)):
            # 0:0 is how overlayfs spells a whiteout; no device has that number.
            self._counts["devices"] += 1
            self._drop(entry.path, offset)
            return
        if entry.type == tar_header.HARD_LINK:
            entry.link = self._clean(entry.link, offset)
            target = self._kinds.get(entry.link)
            if target is None or target == IS_DIRECTORY:
                raise InvalidImage("a hard link leads to nothing that came before it", offset=offset)
            if target == IS_DROPPED:
                self._drop(entry.path, offset)
                return
        elif entry.type == tar_header.SYMBOLIC_LINK and not 0 < len(entry.link) <= MAXIMUM_PATH:
            raise InvalidImage("a symbolic link is empty or too long", offset=offset)
        elif entry.type not in (tar_header.HARD_LINK, tar_header.SYMBOLIC_LINK):
            entry.link = b""
        self._drop_xattrs(entry)
        if known is None:
            self._remember(entry.path, IS_DIRECTORY if is_directory else IS_OTHER)
        if is_directory:
            self._own[entry.path] = Access(entry.mode, entry.uid, entry.gid)
        self._emit(entry)
        self._copy(entry.size, offset)

    def _add_parents(self, path: bytes, mtime: int, offset: int) -> None:
        """Write the directories above `path` that are not there yet, from the root of the layer on."""
        missing = []
        while path:
            path = path.rpartition(b"/")[0]
            kind = self._kinds.get(path)
            if kind == IS_DIRECTORY:
                break
            if kind is not None:
                raise InvalidImage("a name in the tar archive goes through a file or a link", offset=offset)
            missing.append(path)
        for directory in reversed(missing):
            self._add_parent(directory, mtime)

    def _add_parent(self, path: bytes, mtime: int) -> None:
        """Write a directory that the archive has left out, as it is in the layers below."""
        self._count("headers", 1, "entries in a layer", self._limits.entries)
        self._remember(path, IS_DIRECTORY)
        if self._below is None:
            raise LimitExceeded("bytes about directories of the layers below", directories.MAXIMUM_BYTES)
        mode, uid, gid = self._own[path] = self._below.get(path, DEFAULT)
        self._emit(Entry(path, tar_header.DIRECTORY, mode=mode, uid=uid, gid=gid, mtime=mtime))

    def _directories(self) -> dict[bytes, Access] | None:
        """Return what the next layer has to know of the directories of this one and of those below."""
        if self._below is None:
            return None

        def replaced(path: bytes) -> bool:
            return path in self._hidden or self._kinds.get(path, IS_DIRECTORY) != IS_DIRECTORY

        return directories.with_layer(self._below, self._own, replaced, self._opaque.__contains__)

    def _drop(self, path: bytes, offset: int) -> None:
        """Leave something out; its name has to leave room to be that of a whiteout."""
        if not self._lowest and len(path.rpartition(b"/")[2]) > MAXIMUM_COMPONENT - len(WHITEOUT):
            raise InvalidImage("the name of a device is too long to be hidden", offset=offset)
        self._remember(path, IS_DROPPED)

    def _remember(self, path: bytes, kind: int) -> None:
        self._count("names", len(path), "bytes of names in a layer", self._limits.names)
        self._kinds[path] = kind

    def _drop_xattrs(self, entry: Entry) -> None:
        kept = {
            name: value
            for name, value in entry.xattrs.items()
            if name.startswith(KEPT_XATTRS) and not name.startswith(DROPPED_XATTRS)
        }
        self._counts["xattrs"] += len(entry.xattrs) - len(kept)
        entry.xattrs = kept

    # Writing

    def _emit(self, entry: Entry) -> None:
        shown = entry.path or b"."
        if entry.type == tar_header.DIRECTORY:
            shown += b"/"
        self._write(tar_header.build(replace(entry, path=shown)))
        self._counts["entries"] += 1

    def _copy(self, size: int, offset: int) -> None:
        """Copy the contents of a file, with padding of our own."""
        self._count("content", size, "bytes of files in a layer", self._limits.bytes)
        missing = size
        while missing:
            piece = self._exactly(min(missing, CHUNK))
            if not piece:
                raise InvalidImage("the tar archive ends inside a file", offset=offset)
            self._write(piece)
            missing -= len(piece)
        padding = -size % BLOCK
        self._write(bytes(padding))
        if len(self._exactly(padding)) < padding:
            raise InvalidImage("the tar archive ends inside a file", offset=offset)

    def _skip(self, size: int) -> None:
        self._count("content", size, "bytes of files in a layer", self._limits.bytes)
        missing = size + -size % BLOCK
        while missing and (piece := self._exactly(min(missing, CHUNK))):
            missing -= len(piece)
        if missing:
            raise InvalidImage("the tar archive ends inside a file", offset=self._offset)

    def _write_whiteouts(self) -> int:
        """Write what hides something of the layers below, in the notation of the archive."""
        opaque = self._opaque | {path for path in self._hidden if self._kinds.get(path) == IS_DIRECTORY}
        hidden = {path for path in self._hidden if path not in self._kinds}
        hidden |= {path for path, kind in self._kinds.items() if kind == IS_DROPPED}
        marks = {_join(path, OPAQUE) for path in opaque}
        marks |= {_join(path.rpartition(b"/")[0], WHITEOUT + path.rpartition(b"/")[2]) for path in hidden}
        # Nothing of the layer shows through its own whiteouts, so that their order says nothing.
        for path in sorted(marks):
            self._add_parents(path, 0, self._offset)
            self._emit(Entry(path, tar_header.REGULAR, mode=0))
        return len(marks)


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name
