"""What a LUKS volume is encrypted with, as its header says, version 1 or 2.

The header is read before anything else reads it, cryptsetup(8) and the kernel included, and says no more to
them than what was found good here: one segment of data, a cipher of a short list, keys that can be derived
within bounds. What is not understood is a refusal: integrity, a reencryption that is under way, data that
lies elsewhere, a requirement of a newer version. Tokens are not looked at, and nobody else is asked to.

All offsets are within the volume, which is an image or a partition. The checksum of version 2 shows damage
and no malice; it is compared, as whoever reads the header next has to see the same.

It raises `InvalidImage` and `UnsupportedFileSystem` only, and lets through what `read` raises.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mountd.errors import InvalidImage, UnsupportedFileSystem
from mountd.source.model import LUKS_TYPE, Luks

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    Read = Callable[[int, int], bytes]

TYPE = LUKS_TYPE
MAGIC, SECOND_MAGIC = b"LUKS\xba\xbe", b"SKUL\xba\xbe"
SECTOR = 512
LENGTH_1 = 592  # struct luks_phdr
BINARY_2 = 4096  # of the header of version 2, before its JSON
METADATA_SIZES = tuple(1 << power for power in range(14, 21))  # up to 1 MiB of the 4 MiB that there can be
CHECKSUM = slice(448, 512)
SECTOR_SIZES = (512, 1024, 2048, 4096)
# In the words of dm-crypt, and the lengths of their keys in bytes. Others cryptsetup leaves to the kernel,
# by sockets or devices that it has no way to where it runs (execute.luks).
CIPHERS = {"aes-xts-plain64": (32, 64), "aes-xts-plain": (32, 64), "aes-cbc-essiv:sha256": (16, 32)}
HASHES = ("sha1", "sha256", "sha512", "ripemd160", "whirlpool")
STRIPES = 4000
SLOT_ACTIVE, SLOT_INACTIVE = 0x00AC71F3, 0x0000DEAD
SLOTS_1, SLOTS_2 = 8, 32
# What deriving a key may take: memory as cryptsetup takes it at most by itself, and the work that this
# memory, or as many rounds, are in some tens of seconds.
MAXIMUM_MEMORY = 1 << 30
MAXIMUM_WORK = 32 << 30  # bytes that are filled
MAXIMUM_ROUNDS = 100_000_000
MAXIMUM_THREADS = 16
MAXIMUM_HEADER = 64 << 20  # bytes up to the end of the last key
DECIMAL = re.compile("[0-9]{1,19}")
UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def read(read: Read, size: int) -> Luks:
    """Return how the volume of `size` bytes is encrypted. Raises InvalidImage, UnsupportedFileSystem.

    `read(offset, length)` returns the bytes there, fewer only at the end.
    """
    head = whole(read, 0, LENGTH_1)
    if not head.startswith(MAGIC):
        raise InvalidImage("LUKS: there is no magic", offset=0)
    version = int.from_bytes(head[6:8], "big")
    if version == 1:
        found = read_1(head, size)
    elif version == 2:
        found = read_2(read, size)
    else:
        unsupported(f"is of version {version}")
    check_window(found, size)
    return found


def read_1(head: bytes, size: int) -> Luks:
    """Return what a header of version 1 says."""
    name, mode, hash = (text(head[start : start + 32], start) for start in (8, 40, 72))
    check_hash(hash)
    offset = number(head, 104) * SECTOR
    key_size = number(head, 108)
    cipher = f"{name}-{mode}"
    check_cipher(cipher, key_size)
    rounds, end = [number(head, 164)], LENGTH_1
    for start in range(208, 208 + 48 * SLOTS_1, 48):
        state = number(head, start)
        if state not in (SLOT_ACTIVE, SLOT_INACTIVE):
            raise InvalidImage("LUKS: a key slot is neither in use nor free", offset=start)
        if state == SLOT_ACTIVE:
            if number(head, start + 44) != STRIPES:
                unsupported(f"has a key in {number(head, start + 44)} stripes")
            rounds.append(number(head, start + 4))
            end = max(
                end, check_area(number(head, start + 40) * SECTOR, key_size * STRIPES, LENGTH_1, offset)
            )
    if len(rounds) == 1:
        unsupported("has no key")
    for each in rounds:
        check_rounds(each)
    return Luks(
        version=1,
        uuid=uuid_of(head[168:208]),
        label=None,
        cipher=cipher,
        key_size=key_size,
        sector_size=SECTOR,
        offset=offset,
        size=(size - offset) // SECTOR * SECTOR,
        iv_offset=0,
        header_size=end,
        metadata_size=0,
        memory=0,
    )


def read_2(read: Read, size: int) -> Luks:
    """Return what a header of version 2 says."""
    binary = whole(read, 0, BINARY_2)
    length = int.from_bytes(binary[8:16], "big")
    if length not in METADATA_SIZES:
        unsupported(f"has {length} bytes of metadata")
    if int.from_bytes(binary[256:264], "big") != 0:
        raise InvalidImage("LUKS: the first header says that it is another", offset=256)
    metadata = whole(read, 0, length)
    check_checksum(metadata)
    document = parse_json(metadata[BINARY_2:])
    config = member(document, "config")
    if decimal(config, "json_size") != length - BINARY_2:
        raise InvalidImage("LUKS: it says that its metadata have another size", offset=BINARY_2)
    if member(config, "requirements", {}).get("mandatory"):
        unsupported("is being changed, or needs what only a newer version knows (“requirements”)")
    segments = member(document, "segments")
    if list(segments) != ["0"]:
        unsupported("has not exactly one segment of data")
    segment = member(segments, "0")
    if segment.get("type") != "crypt" or segment.get("flags") or "integrity" in segment:
        unsupported("has a segment with integrity, or of another type than “crypt”")
    offset, key_size = decimal(segment, "offset"), key_size_of(document)
    cipher, sector_size = string(segment, "encryption"), integer(segment, "sector_size")
    check_cipher(cipher, key_size)
    if sector_size not in SECTOR_SIZES:
        unsupported(f"has sectors of {sector_size} bytes")
    first = 2 * length
    end, memory = check_slots(document, first, min(first + decimal(config, "keyslots_size"), offset))
    room = size - offset if segment.get("size") == "dynamic" else decimal(segment, "size")
    return Luks(
        version=2,
        uuid=uuid_of(binary[168:208]),
        label=printable(text(binary[24:72], 24, ascii_only=False)) or None,
        cipher=cipher,
        key_size=key_size,
        sector_size=sector_size,
        offset=offset,
        size=room // sector_size * sector_size,
        iv_offset=decimal(segment, "iv_tweak"),
        header_size=end,
        metadata_size=length,
        memory=memory,
    )


def check_slots(document: dict[str, Any], first: int, last: int) -> tuple[int, int]:
    """Check the keys of version 2, which lie in `first` to `last`, and how each is derived.

    Returns where the last of them ends, and how many bytes of memory it takes to derive one.
    """
    slots, end, memory = member(document, "keyslots"), first, 0
    if not 1 <= len(slots) <= SLOTS_2:
        unsupported(f"has {len(slots)} keys")
    for name in slots:
        slot = member(slots, name)
        if slot.get("type") != "luks2":
            unsupported(f"has a key slot of the type “{printable(slot.get('type'))}”")
        spread, area = member(slot, "af"), member(slot, "area")
        if spread.get("type") != "luks1" or spread.get("stripes") != STRIPES or area.get("type") != "raw":
            unsupported("has a key that is kept in another way")
        check_hash(string(spread, "hash"))
        check_cipher(string(area, "encryption"), integer(area, "key_size"))
        needed = integer(slot, "key_size") * STRIPES
        size = decimal(area, "size")
        if size < needed:
            raise InvalidImage("LUKS: there is no room for a key", offset=BINARY_2)
        end = max(end, check_area(decimal(area, "offset"), size, first, last))
        memory = max(memory, check_derivation(member(slot, "kdf")))
    return end, memory


def check_derivation(kdf: dict[str, Any]) -> int:
    """Check that a key is derived within bounds; return how many bytes of memory that takes."""
    kind = kdf.get("type")
    if kind == "pbkdf2":
        check_hash(string(kdf, "hash"))
        check_rounds(integer(kdf, "iterations"))
        return 0
    if kind not in ("argon2i", "argon2id"):
        unsupported(f"has a key that is derived by “{printable(kind)}”")
    passes, memory, threads = (integer(kdf, name) for name in ("time", "memory", "cpus"))
    memory *= 1024
    if not 0 < memory <= MAXIMUM_MEMORY:
        unsupported(f"has a key that takes {memory} bytes to derive; at most {MAXIMUM_MEMORY} are given")
    if not 0 < passes <= MAXIMUM_WORK // memory:
        unsupported(f"has a key that takes {passes} passes to derive, which is too long")
    if not 0 < threads <= MAXIMUM_THREADS:
        unsupported(f"has a key that takes {threads} threads to derive")
    return memory


def key_size_of(document: dict[str, Any]) -> int:
    """Return the length of the key to the data, which all keys of the one digest have."""
    digests = member(document, "digests")
    if len(digests) != 1:
        unsupported("has not exactly one digest of a key")
    digest = member(digests, next(iter(digests)))
    if digest.get("type") != "pbkdf2" or digest.get("segments") != ["0"]:
        unsupported("has a digest of another type, or of something else than the data")
    check_hash(string(digest, "hash"))
    check_rounds(integer(digest, "iterations"))
    slots, opens = member(document, "keyslots"), digest.get("keyslots")
    if not isinstance(opens, list) or sorted(map(str, opens)) != sorted(slots):
        unsupported("has a key that is not one to the data")
    sizes = {integer(member(slots, name), "key_size") for name in slots}
    if len(sizes) != 1:
        unsupported("has keys of different lengths")
    return sizes.pop()


def check_window(found: Luks, size: int) -> None:
    """Raise InvalidImage unless header and data lie in the volume, and the one before the other."""
    if found.header_size > MAXIMUM_HEADER:
        unsupported(f"has a header of {found.header_size} bytes")
    if found.offset < found.header_size or found.offset % found.sector_size or found.iv_offset >> 55:
        raise InvalidImage("LUKS: its data lie in its header, elsewhere, or between two sectors", offset=0)
    if found.size < found.sector_size or found.offset + found.size > size:
        raise InvalidImage(f"LUKS: its data do not lie within its {size} bytes", offset=0)


def check_area(offset: int, size: int, first: int, last: int) -> int:
    """Return where the area of a key ends. Raises InvalidImage unless it lies in `first` to `last`."""
    if not first <= offset <= offset + size <= last:
        raise InvalidImage(f"LUKS: a key lies outside of the header, at {offset}", offset=0)
    return offset + size


def check_cipher(cipher: str, key_size: int) -> None:
    """Raise UnsupportedFileSystem for a cipher that is not one of the list, or not with such a key."""
    if cipher not in CIPHERS:
        unsupported(
            f"is encrypted with “{printable(cipher)}”, and only {', '.join(CIPHERS)} are opened here"
        )
    if key_size not in CIPHERS[cipher]:
        unsupported(f"is encrypted with “{printable(cipher)}” and a key of {key_size} bytes")


def check_hash(name: str) -> None:
    """Raise UnsupportedFileSystem for a hash that is not one of the list."""
    if name not in HASHES:
        unsupported(f"uses the hash “{printable(name)}”")


def check_rounds(rounds: int) -> None:
    """Raise UnsupportedFileSystem for what would take too long."""
    if not 0 < rounds <= MAXIMUM_ROUNDS:
        unsupported(f"has a key that takes {rounds} rounds to derive; at most {MAXIMUM_ROUNDS} are made")


def check_checksum(metadata: bytes) -> None:
    """Raise InvalidImage unless a header of version 2 has the checksum that it says."""
    if text(metadata[72:104], 72) != "sha256":
        unsupported("has another checksum than sha256")
    if checksum(metadata) != metadata[CHECKSUM]:
        raise InvalidImage("LUKS: its header is damaged: the checksum is another", offset=CHECKSUM.start)


def checksum(metadata: bytes) -> bytes:
    """Return the checksum that a header of version 2 has to have."""
    blank = bytearray(metadata)
    blank[CHECKSUM] = bytes(64)
    return hashlib.sha256(blank).digest().ljust(64, b"\0")


def second_of(metadata: bytes) -> bytes:
    """Return the second header that goes with a first one of version 2, and says the same."""
    made = bytearray(metadata)
    made[:6] = SECOND_MAGIC
    made[256:264] = len(metadata).to_bytes(8, "big")
    made[CHECKSUM] = checksum(bytes(made))
    return bytes(made)


def parse_json(area: bytes) -> dict[str, Any]:
    """Return the JSON of version 2. Raises InvalidImage for what is none, or says something twice."""
    document, _, rest = area.partition(b"\0")
    if rest.strip(b"\0"):
        raise InvalidImage("LUKS: there is something behind its metadata", offset=BINARY_2 + len(document))
    try:
        found = json.loads(
            document.decode(), object_pairs_hook=once, parse_float=refuse, parse_constant=refuse
        )
    except (ValueError, RecursionError):
        raise InvalidImage(
            "LUKS: its metadata are not the JSON that they should be", offset=BINARY_2
        ) from None
    if not isinstance(found, dict):
        raise InvalidImage("LUKS: its metadata are no object of JSON", offset=BINARY_2)
    return found


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; raise ValueError for one that has a member twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("twice")
    return found


def refuse(what: str) -> NoReturn:
    """Raise ValueError: there are no such numbers."""
    raise ValueError(what)


def member(of: dict[str, Any], name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a member that is an object. Raises InvalidImage."""
    found = of.get(name, default)
    if not isinstance(found, dict):
        raise InvalidImage(f"LUKS: “{printable(name)}” is missing in its metadata", offset=BINARY_2)
    return found


def string(of: dict[str, Any], name: str) -> str:
    """Return a member that is a text. Raises InvalidImage."""
    found = of.get(name)
    if not isinstance(found, str):
        raise InvalidImage(f"LUKS: “{name}” is no text in its metadata", offset=BINARY_2)
    return found


def integer(of: dict[str, Any], name: str) -> int:
    """Return a member that is a number, of 32 bits at most. Raises InvalidImage."""
    found = of.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 1 << 32:
        raise InvalidImage(f"LUKS: “{name}” is no number in its metadata", offset=BINARY_2)
    return found


def decimal(of: dict[str, Any], name: str) -> int:
    """Return a number of 64 bits, which is written as a text. Raises InvalidImage."""
    found = of.get(name)
    if not isinstance(found, str) or DECIMAL.fullmatch(found) is None:
        raise InvalidImage(f"LUKS: “{name}” is no number in its metadata", offset=BINARY_2)
    return int(found)


def number(head: bytes, offset: int) -> int:
    """Return a number of version 1."""
    return int.from_bytes(head[offset : offset + 4], "big")


def text(field: bytes, offset: int, *, ascii_only: bool = True) -> str:
    """Return a text of fixed size up to its first NUL. Raises InvalidImage for what is none."""
    found = field.partition(b"\0")[0]
    if ascii_only and not found.isascii():
        raise InvalidImage("LUKS: there is no text where one should be", offset=offset)
    return found.decode("utf-8", "replace")


def uuid_of(field: bytes) -> str | None:
    """Return the UUID, which is there to be shown, None for what does not look like one."""
    found = field.partition(b"\0")[0].decode("ascii", "replace")
    return found if UUID.fullmatch(found) else None


def printable(value: object) -> str:
    """Return a value of the header as something to print."""
    return "".join(each if each.isprintable() else "?" for each in str(value)[:48])


def whole(read: Read, offset: int, length: int) -> bytes:
    """Return exactly `length` bytes. Raises InvalidImage where the volume ends before."""
    found = read(offset, length)[:length]
    if len(found) < length:
        raise InvalidImage("LUKS: the volume ends within its header", offset=offset + len(found))
    return found


def unsupported(why: str) -> NoReturn:
    """Raise UnsupportedFileSystem for a volume that is not opened here."""
    raise UnsupportedFileSystem(f"the LUKS volume {why}", file_system_type=TYPE)


def to_plain(found: Luks) -> dict[str, Any]:
    """Return it as what JSON can say."""
    return asdict(found)


def from_plain(told: dict[str, Any], size: int) -> Luks:
    """Return what `to_plain` was given, for a volume of `size` bytes.

    Raises InvalidImage for anything else: it may be from somebody who has taken over what reads images.
    """
    try:
        found = Luks(**told)
        check_cipher(found.cipher, found.key_size)
        numbers = (found.offset, found.size, found.iv_offset, found.header_size, found.metadata_size)
        if (
            found.sector_size not in SECTOR_SIZES
            or found.metadata_size not in (0, *METADATA_SIZES)
            or min(numbers) < 0
            or not 0 <= found.memory <= MAXIMUM_MEMORY
        ):
            raise ValueError(found.sector_size)
        check_window(found, size)
    except (TypeError, ValueError, UnsupportedFileSystem):
        raise InvalidImage("its LUKS header could not be read: the answer makes no sense") from None
    return found
