"""What the ledger knows of one mount that was handed out, and how that is written down."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

MAXIMUM_SIZE = 32768  # bytes of one record: an image may have more than a hundred layers, with a digest each


@dataclass(frozen=True, slots=True)
class Record:
    """One mount: `id` is its unique mount id, `device` (major, minor) that of its superblock.

    `watch` is the number of the watch on the superblock, `mark` that of the mark on the mount, each 0 where
    there can be none. `uid` is who asked,
    `owner` with `roots_namespace` whom it counts for (`Caller.payer`), `pid` the process at that time, all
    the host's. `source` is where the caller said that the image is, `id_map` says how ids are mapped, both
    for people; `since` is in seconds since the epoch. `superblock` is whether the superblock was made for
    this, so that every mount of it is one that was handed out, or a copy of one; `shared`, whether there may
    be several of those; `sent`, whether it went to the caller as a descriptor, which may take its time to
    arrive. `layers` are the devices of what an overlay is made of.
    """

    id: int
    watch: int
    device: tuple[int, int]
    uid: int
    owner: int
    pid: int
    source: str
    file_system: str
    read_only: bool
    id_map: str
    since: int
    superblock: bool = True
    shared: bool = False
    sent: bool = True
    unit: str | None = None
    rule: str | None = None
    trusted_by: str | None = None
    signer: str | None = None
    digest: str | None = None
    roots_namespace: int = 0
    mark: int = 0
    layers: tuple[tuple[int, int], ...] = ()

    @property
    def payer(self) -> tuple[int, int]:
        """Whom the mount counts for: a user, or one of the containers that root has made."""
        return self.owner, self.roots_namespace

    def encode(self) -> bytes:
        """Return it as JSON."""
        return _in_json({name: getattr(self, name) for name in NAMES}).encode()


NAMES = tuple(field.name for field in fields(Record))
NEEDED = {field.name for field in fields(Record) if field.default is MISSING}
# Made once: this is on the way of every mount.
_in_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("id", "watch", "mark", "uid", "owner", "roots_namespace", "pid", "since"), int),
    **dict.fromkeys(("source", "file_system", "id_map"), str),
    **dict.fromkeys(("read_only", "superblock", "shared", "sent"), bool),
    **dict.fromkeys(("unit", "rule", "trusted_by", "signer", "digest"), (str, type(None))),
    **dict.fromkeys(("device", "layers"), list),
}


def decode(data: bytes) -> Record | None:
    """Read a record; None for what is not one, such as one that was never finished.

    Another version of mountd may have known less, or more.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not found.keys() >= NEEDED:
        return None
    found = {name: found[name] for name in NAMES if name in found}
    for name, value in found.items():
        kind = KINDS[name]
        if not isinstance(value, kind) or (kind is int and not is_number(value)):
            return None
    devices = [found["device"], *found.get("layers", ())]
    if not all(is_device(each) for each in devices):
        return None
    device, *layers = [(each[0], each[1]) for each in devices]
    return Record(**{**found, "device": device, "layers": tuple(layers)})


def is_device(value: object) -> bool:
    """Tell whether `value` is a device number."""
    return isinstance(value, list) and len(value) == 2 and all(is_number(each) for each in value)


def without(data: bytes, names: Iterable[str]) -> list[tuple[int, bytes]]:
    """Return what to write where over a record, so that the numbers with these names are 0.

    It stays as long as it is, as JSON has room for blanks. In a text a quotation mark has a backslash before
    it, so that nothing in one looks like a name.
    """
    found = (re.search(rf'(?<!\\)"{name}" ?: ?([0-9]+)'.encode(), data) for name in names)
    return [(each.start(1), b"0".ljust(len(each[1]))) for each in found if each is not None]


def ended(records: Collection[Record], sure: set[int]) -> set[int]:
    """Return the ids of the records that tell nothing any more; `sure` are those of marks that are left.

    The mark of a mount is gone, and its superblock is another's as well, which tells of it. Of a superblock
    that only copies or nobody seem to have, the oldest record stays.
    """
    over = [record for record in records if record.mark and record.id not in sure]
    told = {record.device for record in records if record.superblock and record.id in sure}
    gone = set()
    for record in sorted(over, key=lambda record: record.id):
        if not record.superblock:
            gone.add(record.id)
        elif record.shared and record.watch:
            if record.device in told:
                gone.add(record.id)
            told.add(record.device)
    return gone


def is_number(value: object) -> bool:
    """Tell whether `value` is a number that can be an id, or a time, or said in a reply."""
    return type(value) is int and 0 <= value < 1 << 63
