"""Headers of LUKS: what cryptsetup makes is understood, and what else there may be is refused by name."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from mountd.errors import InvalidImage, MountdError, UnsupportedFileSystem
from mountd.source import luks
from mountd.source.confined import recognise_source
from mountd.source.model import Luks

MIB = 1 << 20
SIZE = 24 * MIB
METADATA = 16 << 10
UUID = "96c9b736-e3bc-4fef-bad8-6a7cd3674964"
KDF = {"type": "argon2id", "time": 4, "memory": 65536, "cpus": 2, "salt": "JxoabA=="}
DOCUMENT: dict[str, Any] = {
    "keyslots": {
        "0": {
            "type": "luks2",
            "key_size": 64,
            "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
            "area": {
                "type": "raw",
                "offset": "32768",
                "size": "258048",
                "encryption": "aes-xts-plain64",
                "key_size": 64,
            },
            "kdf": KDF,
        }
    },
    "tokens": {},
    "segments": {
        "0": {
            "type": "crypt",
            "offset": str(16 * MIB),
            "size": "dynamic",
            "iv_tweak": "0",
            "encryption": "aes-xts-plain64",
            "sector_size": 4096,
        }
    },
    "digests": {
        "0": {
            "type": "pbkdf2",
            "keyslots": ["0"],
            "segments": ["0"],
            "hash": "sha256",
            "iterations": 1000,
            "salt": "/b9s",
            "digest": "ilgl",
        }
    },
    "config": {"json_size": str(METADATA - 4096), "keyslots_size": str(16 * MIB - 2 * METADATA)},
}


def header_2(document: object = DOCUMENT, *, size: int = METADATA, **fields: bytes) -> bytes:
    """A first header of version 2, with its checksum; a document may be text already."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    binary = bytearray(4096)
    given = {
        "magic": luks.MAGIC,
        "version": b"\0\2",
        "length": size.to_bytes(8, "big"),
        "label": b"name",
        "algorithm": b"sha256",
        "uuid": UUID.encode(),
        "offset": bytes(8),
        **fields,
    }
    places = {
        "magic": 0,
        "version": 6,
        "length": 8,
        "label": 24,
        "algorithm": 72,
        "uuid": 168,
        "offset": 256,
    }
    for name, at in places.items():
        binary[at : at + len(given[name])] = given[name]
    made = bytearray(bytes(binary) + text.ljust(size - 4096, b"\0"))
    made[luks.CHECKSUM] = fields.get("checksum", luks.checksum(bytes(made)))
    return bytes(made)


def header_1(**changes: Any) -> bytes:
    """A header of version 1 with one key in use."""
    given = {
        "version": 1,
        "name": b"aes",
        "mode": b"xts-plain64",
        "hash": b"sha256",
        "offset": 4096,
        "key": 64,
        "rounds": 1000,
        "state": luks.SLOT_ACTIVE,
        "slot_rounds": 1000,
        "material": 8,
        "stripes": 4000,
        **changes,
    }
    head = struct.pack(
        ">6sH32s32s32sII20s32sI40s",
        luks.MAGIC,
        *(given[name] for name in ("version", "name", "mode", "hash", "offset", "key")),
        b"digest",
        b"salt",
        given["rounds"],
        UUID.encode(),
    )
    slots = [(given["state"], given["slot_rounds"], b"salt", given["material"], given["stripes"])]
    slots += [(luks.SLOT_INACTIVE, 0, b"", 512, 4000)] * 7
    return head + b"".join(struct.pack(">II32sII", *slot) for slot in slots)


def read(head: bytes, size: int = SIZE) -> Luks:
    return luks.read(lambda offset, length: head.ljust(size, b"\0")[offset : offset + length], size)


def changed(path: str, value: object) -> bytes:
    """The header of version 2 with one member of its document set, or with ... removed."""
    document = copy.deepcopy(DOCUMENT)
    *way, last = path.split(".")
    place = document
    for name in way:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return header_2(document)


def test_version_1() -> None:
    assert read(header_1()) == Luks(
        version=1,
        uuid=UUID,
        label=None,
        cipher="aes-xts-plain64",
        key_size=64,
        sector_size=512,
        offset=2 * MIB,
        size=SIZE - 2 * MIB,
        iv_offset=0,
        header_size=8 * 512 + 256000,
        metadata_size=0,
        memory=0,
    )
    assert read(header_1(mode=b"cbc-essiv:sha256", key=32)).cipher == "aes-cbc-essiv:sha256"


def test_version_2() -> None:
    found = read(header_2())
    assert found == Luks(
        version=2,
        uuid=UUID,
        label="name",
        cipher="aes-xts-plain64",
        key_size=64,
        sector_size=4096,
        offset=16 * MIB,
        size=8 * MIB,
        iv_offset=0,
        header_size=32768 + 258048,
        metadata_size=METADATA,
        memory=64 * MIB,
    )
    assert luks.from_plain(json.loads(json.dumps(luks.to_plain(found))), SIZE) == found
    assert read(changed("segments.0.size", "8192")).size == 8192
    assert read(changed("segments.0.iv_tweak", "8")).iv_offset == 8
    assert read(changed("tokens", {"0": {"type": "systemd-tpm2"}})) == found
    assert read(header_2(), SIZE + 4095).size == found.size


def test_the_second_header_is_the_first() -> None:
    second = luks.second_of(header_2())
    assert second.startswith(luks.SECOND_MAGIC)
    assert second[256:264] == METADATA.to_bytes(8, "big")
    assert second[luks.CHECKSUM] == luks.checksum(second) != header_2()[luks.CHECKSUM]
    assert second[4096:] == header_2()[4096:]


UNSUPPORTED = {
    "segments.0.type": ["linear", None],
    "segments.0.flags": [["backup-final"]],
    "segments.0.integrity": [{"type": "hmac(sha256)"}],
    "segments.0.encryption": ["aes-xts-plain65", "capi:xts(aes)-plain64", "cipher_null-ecb", "aes-ecb"],
    "segments.0.sector_size": [0, 100, 8192],
    "segments.1": [DOCUMENT["segments"]["0"]],
    "keyslots.0.type": ["reencrypt", "\n\x1b"],
    "keyslots.0.key_size": [32 << 20, 16],
    "keyslots.0.af.stripes": [1, 8000],
    "keyslots.0.af.hash": ["md5"],
    "keyslots.0.area.type": ["datashift"],
    "keyslots.0.area.encryption": ["cipher_null-ecb", "serpent-xts-plain64"],
    "keyslots.0.kdf.type": ["scrypt", ["argon2id"]],
    "keyslots.0.kdf.memory": [0, 4 << 20, (1 << 32) - 1],
    "keyslots.0.kdf.time": [0, (1 << 32) - 1],
    "keyslots.0.kdf.cpus": [0, 1000],
    "keyslots": [{}],
    "digests": [{}],
    "digests.0.type": ["none"],
    "digests.0.segments": [["1"], []],
    "digests.0.keyslots": [..., [], ["0", "1"], [0, 1], True, 0, "0", {"0": 0}],
    "digests.0.hash": ["crc32"],
    "digests.0.iterations": [0, (1 << 32) - 1],
    "config.requirements": [{"mandatory": ["online-reencrypt-v2"]}],
}
INVALID = {
    "segments.0.offset": ["0", "16777217", "99999999999", "-1", 16 * MIB, "0x1000", "9" * 30],
    "segments.0.size": ["0", "9223372036854775807", 4096, "4095"],
    "segments.0.iv_tweak": ["x", ..., str((1 << 63) - 1)],
    "segments.0.sector_size": ["512", 512.0, True],
    "segments": [..., [], None],
    "keyslots": [..., "0", {"0": 5}],
    "keyslots.0.kdf": [..., []],
    "keyslots.0.kdf.memory": ["64", -1, 1 << 40],
    "keyslots.0.area.offset": ["0", "16384", "16777216", "16000000000"],
    "keyslots.0.area.size": ["4096", "99999999999"],
    "config": [...],
    "config.json_size": ["4096", "0"],
    "config.keyslots_size": ["4096", ...],
    "config.requirements": ["mandatory"],
    "digests": [...],
}


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        (path, value, error)
        for error, table in ((UnsupportedFileSystem, UNSUPPORTED), (InvalidImage, INVALID))
        for path, values in table.items()
        for value in values
    ],
)
def test_what_is_refused_of_version_2(path: str, value: object, error: type[MountdError]) -> None:
    # A change in the length of the key is noticed in more than one place.
    with pytest.raises(error) as caught:
        read(changed(path, value))
    assert str(caught.value).isprintable()
    assert "LUKS" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"version": 3}, UnsupportedFileSystem),
        ({"name": b"cipher_null", "mode": b"ecb"}, UnsupportedFileSystem),
        ({"name": b"\xff\xfe"}, InvalidImage),
        ({"hash": b"md5"}, UnsupportedFileSystem),
        ({"key": 1 << 31}, UnsupportedFileSystem),
        ({"offset": 0}, InvalidImage),
        ({"offset": 100}, InvalidImage),
        ({"offset": SIZE // 512}, InvalidImage),
        ({"rounds": (1 << 32) - 1}, UnsupportedFileSystem),
        ({"slot_rounds": 0}, UnsupportedFileSystem),
        ({"slot_rounds": (1 << 32) - 1}, UnsupportedFileSystem),
        ({"material": 0}, InvalidImage),
        ({"material": (1 << 32) - 1}, InvalidImage),
        ({"stripes": 1}, UnsupportedFileSystem),
        ({"state": luks.SLOT_INACTIVE}, UnsupportedFileSystem),
        ({"state": 0}, InvalidImage),
    ],
)
def test_what_is_refused_of_version_1(changes: dict[str, Any], error: type[MountdError]) -> None:
    with pytest.raises(error):
        read(header_1(**changes))


@pytest.mark.parametrize("name", ["serpent", "twofish"])
def test_ciphers_that_cryptsetup_leaves_to_the_kernel(name: str) -> None:
    """They could not be opened where it runs, and it would not say why."""
    said = f"encrypted with “{name}-xts-plain64”, and only aes-xts-plain64, .* are opened here"
    for head in (header_1(name=name.encode()), changed("segments.0.encryption", f"{name}-xts-plain64")):
        with pytest.raises(UnsupportedFileSystem, match=said):
            read(head)


@pytest.mark.parametrize(
    ("head", "text"),
    [
        (header_2(checksum=bytes(64)), "checksum is another"),
        (header_2(offset=(METADATA).to_bytes(8, "big")), "is another"),
        (header_2(b"{"), "not the JSON"),
        (header_2(b"[" * 5000), "not the JSON"),
        (header_2(b"[]"), "no object"),
        (header_2(b'{"config": {}, "config": {}}'), "not the JSON"),
        (header_2(b'{"config": NaN}'), "not the JSON"),
        (header_2(b"\xff{}"), "not the JSON"),
        (header_2(b"{}\0{}"), "behind its metadata"),
        (header_2()[:5000], "ends within"),
        (header_1()[:500], "ends within"),
        (b"", "ends within"),
        (bytes(4096), "no magic"),
    ],
)
def test_headers_that_are_damaged(head: bytes, text: str) -> None:
    with pytest.raises(InvalidImage, match=text):
        luks.read(lambda offset, length: head[offset : offset + length], SIZE)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"algorithm": b"sha1"}, "another checksum"),
        ({"length": (4 * MIB).to_bytes(8, "big")}, "bytes of metadata"),
        ({"length": bytes(8)}, "bytes of metadata"),
        ({"version": b"\0\3"}, "version 3"),
    ],
)
def test_headers_of_another_kind(fields: dict[str, bytes], text: str) -> None:
    with pytest.raises(UnsupportedFileSystem, match=text):
        read(header_2(**fields))


def lie(**changes: object) -> dict[str, Any]:
    return {**luks.to_plain(read(header_2())), **changes}


@pytest.mark.parametrize(
    "told",
    [
        {},
        lie(more=1),
        lie(cipher="null"),
        lie(offset=0),
        lie(offset=-4096, header_size=-5000),
        lie(size=SIZE),
        lie(sector_size=3),
        lie(metadata_size=5),
        lie(header_size=-1),
        lie(memory=1 << 40),
        lie(iv_offset="0"),
    ],
)
def test_a_reader_that_was_taken_over_is_not_believed(told: dict[str, Any]) -> None:
    with pytest.raises(InvalidImage, match="LUKS"):
        luks.from_plain(told, SIZE)


def test_through_the_recogniser(tmp_path: Path) -> None:
    """Confined and not, and as one of two things that it could be."""
    image = tmp_path / "volume"
    image.write_bytes(header_2().ljust(SIZE, b"\0"))

    def reading(fd: int, *, confined: bool) -> object:
        return recognise_source(fd, SIZE, confined=confined)

    with image.open("rb") as file:
        assert (
            reading(file.fileno(), confined=True)
            == reading(file.fileno(), confined=False)
            == read(header_2())
        )
    with image.open("r+b") as file:
        file.seek(65536 + 64)
        file.write(b"_BHRfS_M")
    with image.open("rb") as file, pytest.raises(InvalidImage, match="ambiguous"):
        reading(file.fileno(), confined=True)
