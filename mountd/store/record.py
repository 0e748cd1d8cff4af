"""What the store knows about an image beside its bytes, and how that is written down.

A record is read as strictly as anything else: a key too many or too few, a wrong type, a number out of
range or a text too long, and it is no record. Only root can write to the store; but a disk can fail, and a
record decides whom a later mount is for.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from mountd.errors import InvalidImage, InvalidParameter
from mountd.evidence.model import Provenance, Signer
from mountd.source.model import FileSystem

ROOT = 0  # may see and remove everything; not to be said of a container's root

VERSION = 1
MAXIMUM_RECORD = 64 << 10  # bytes of a record as JSON
MAXIMUM_NAME = 255  # bytes of a name in UTF-8
MAXIMUM_TEXT = 4096  # characters of any other text
MAXIMUM_LAYERS = 256
REMEMBERED = 64  # records, by each worker
MAXIMUM_SIGNERS = 16
MAXIMUM_OWNERS = 64
MAXIMUM_ID = (1 << 32) - 2
MAXIMUM_INTEGER = (1 << 63) - 1

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Owner:
    """Somebody who imported an image: `uid` may see and remove it, `charged` has it on its account.

    Both are the host's. They differ for a container: it is the owner of its user namespace who pays.
    """

    uid: int
    charged: int


@dataclass(frozen=True, slots=True)
class Record:
    """One image of the store: `digest` is "sha256:HEX" of its `size` bytes.

    `created` is when it was imported first, in seconds since the epoch.

    `owners` are those who imported these bytes, the first one first; never empty. `name` is what the first
    called it, and proves nothing. `file_system` is what was recognised in the stored bytes, None for nothing
    that is known. `provenance` and `signers` were verified when they were written.
    """

    digest: str
    size: int
    owners: tuple[Owner, ...]
    created: int
    name: str | None = None
    file_system: FileSystem | None = None
    provenance: Provenance | None = None
    signers: tuple[Signer, ...] = ()

    @property
    def owner_uid(self) -> int:
        """Who imported it first."""
        return self.owners[0].uid

    def belongs_to(self, uid: int) -> bool:
        """Tell whether `uid` is one of its owners."""
        return any(owner.uid == uid for owner in self.owners)


class NoRecord(Exception):
    """The bytes are not a record; the text says why."""


def hex_of(digest: str) -> str:
    """Return the hexadecimal digits of a digest. Raises InvalidParameter for what is not "sha256:HEX"."""
    if not DIGEST.fullmatch(digest):
        raise InvalidParameter("digest", "it has to be “sha256:” and 64 hexadecimal digits in lower case")
    return digest.partition(":")[2]


def check_name(name: str | None) -> None:
    """Raise InvalidParameter for a name that cannot be shown on one line, or is too long."""
    if name is None:
        return
    if not name or not name.isprintable():
        raise InvalidParameter("name", "it has to be printable characters, and at least one")
    if len(name.encode()) > MAXIMUM_NAME:
        raise InvalidParameter("name", f"longer than {MAXIMUM_NAME} bytes")


def serialise(record: Record) -> bytes:
    """Return the record as JSON. Raises InvalidImage if `parse` would not take it back."""
    data = json.dumps({"version": VERSION, **asdict(record)}, ensure_ascii=False, sort_keys=True).encode()
    try:
        parse(data)
    except NoRecord as reason:
        raise InvalidImage(f"what is known about it cannot be recorded: {reason}") from None
    return data


# The same bytes say the same; an image of many layers has as many records.
@lru_cache(maxsize=REMEMBERED)
def parse(data: bytes) -> Record:
    """Read what `serialise` returned. Raises NoRecord, and nothing else."""
    told = read_json(data, MAXIMUM_RECORD, VERSION, _names(Record))
    return Record(
        digest=_digest(told["digest"], "digest"),
        size=_integer(told["size"], "size"),
        owners=_list(told["owners"], "owners", MAXIMUM_OWNERS, _owner, at_least=1),
        created=_integer(told["created"], "created"),
        name=_name(told["name"]),
        file_system=_optional(told["file_system"], _file_system),
        provenance=_optional(told["provenance"], read_provenance),
        signers=_list(told["signers"], "signers", MAXIMUM_SIGNERS, _signer),
    )


def read_json(data: bytes, maximum: int, version: int, names: set[str]) -> dict[str, Any]:
    """Return an object of JSON that has exactly these fields, and the version. Raises NoRecord."""
    if len(data) > maximum:
        raise NoRecord(f"longer than {maximum} bytes")
    try:
        told = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise NoRecord("not JSON") from None
    told = _struct(told, {"version", *names}, "record")
    if _integer(told.pop("version"), "version") != version:
        raise NoRecord("of another version")
    return told


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise NoRecord("the same key twice")
    return made


def _no_constant(name: str) -> None:
    raise NoRecord(f"{name} is no JSON")


def _struct(value: object, names: set[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != names:
        raise NoRecord(f"{where} has not exactly the fields it should")
    return value


def _names(model: type[Any]) -> set[str]:
    return {field.name for field in fields(model)}


def _integer(value: object, where: str, maximum: int = MAXIMUM_INTEGER) -> int:
    # The exact type: a bool is an int to isinstance.
    if type(value) is not int or not 0 <= value <= maximum:
        raise NoRecord(f"{where} is no number in its range")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) > MAXIMUM_TEXT or "\0" in value:
        raise NoRecord(f"{where} is no text, or too long")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise NoRecord(f"{where} has half of a surrogate pair") from None
    return value


def _optional_text(value: object, where: str) -> str | None:
    return None if value is None else _text(value, where)


def _digest(value: object, where: str) -> str:
    text = _text(value, where)
    if not DIGEST.fullmatch(text):
        raise NoRecord(f"{where} is no digest")
    return text


def _name(value: object) -> str | None:
    name = _optional_text(value, "name")
    try:
        check_name(name)
    except InvalidParameter as error:
        raise NoRecord(str(error)) from None
    return name


def _list(value: object, where: str, most: int, item: Any, at_least: int = 0) -> tuple[Any, ...]:
    if not isinstance(value, list) or not at_least <= len(value) <= most:
        raise NoRecord(f"{where} is no list of at most {most}")
    return tuple(item(each) for each in value)


def _optional(value: object, read: Any) -> Any:
    return None if value is None else read(value)


def _owner(value: object) -> Owner:
    told = _struct(value, _names(Owner), "owner")
    return Owner(*(_integer(told[name], f"owner.{name}", MAXIMUM_ID) for name in ("uid", "charged")))


def _file_system(value: object) -> FileSystem:
    told = _struct(value, _names(FileSystem), "file_system")
    if not isinstance(told["needs_recovery"], bool):
        raise NoRecord("file_system.needs_recovery is no bool")
    return FileSystem(
        type=_text(told["type"], "file_system.type"),
        size=_integer(told["size"], "file_system.size"),
        block_size=_integer(told["block_size"], "file_system.block_size"),
        uuid=_optional_text(told["uuid"], "file_system.uuid"),
        label=_optional_text(told["label"], "file_system.label"),
        needs_recovery=told["needs_recovery"],
    )


def read_digests(value: object, where: str) -> tuple[str, ...]:
    """Return the digests of layers. Raises NoRecord."""
    return _list(value, where, MAXIMUM_LAYERS, lambda each: _digest(each, where))


def read_provenance(value: object) -> Provenance:
    """Return where an image was pulled from. Raises NoRecord."""
    told = _struct(value, _names(Provenance), "provenance")
    return Provenance(
        repository=_text(told["repository"], "provenance.repository"),
        manifest=_digest(told["manifest"], "provenance.manifest"),
        layers=read_digests(told["layers"], "layers"),
        requirement=_text(told["requirement"], "provenance.requirement"),
        signer=_optional_text(told["signer"], "provenance.signer"),
        time=_integer(told["time"], "provenance.time"),
    )


def _signer(value: object) -> Signer:
    told = _struct(value, _names(Signer), "signer")
    until = told.pop("valid_until")
    mark = _optional_text(told.pop("key_mark"), "signer.key_mark")
    texts = {name: _text(text, f"signer.{name}") for name, text in told.items()}
    until = None if until is None else _integer(until, "signer.valid_until")
    return Signer(**texts, key_mark=mark, valid_until=until)
