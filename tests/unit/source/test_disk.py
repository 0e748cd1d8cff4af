"""Which partition counts, and what protects it."""

from __future__ import annotations

import platform
import struct
import uuid
from dataclasses import replace

import pytest

from mountd.errors import InvalidImage, UnsupportedFileSystem
from mountd.source import disk, gpt, partition_types, version_order
from mountd.source.gpt import Entry
from mountd.source.model import Disk
from mountd.source.partition_types import FOR_ALL, GENERIC, MACHINES, PER_ARCHITECTURE, TYPES
from tests.disks import type_uuid

MIB = 1 << 20
ORDER = [
    *("122.1", "123~rc1-1", "123", "123-a", "123-a.1", "123-1", "123-1.1", "123^post1"),
    *("123.a-1", "123.1-1", "123a-1", "124-1"),
]
PAIRS = [
    *(("11", 0, "11"), ("bar-123", -1, "foo-123"), ("123a", 1, "123"), ("123.a", 1, "123")),
    *(("123.a", -1, "123.b"), ("123a", 1, "123.a"), ("11α", 0, "11β"), ("B", -1, "a"), ("", -1, "0")),
    *(("0.", 1, "0"), ("0.0", 1, "0"), ("0", 1, "~"), ("", 1, "~"), ("1_", 0, "1"), ("_1", 0, "1")),
    *(("1_", -1, "1.2"), ("1_2_3", 1, "1.3.3"), ("1+", 0, "1"), ("007", 0, "7"), ("9" * 5000, 1, "8")),
]


def entry(number: int, designator: str, architecture: str | None = None, **fields: object) -> Entry:
    architecture = architecture or ("x86-64" if designator in PER_ARCHITECTURE else None)
    type = GENERIC if designator == "generic" else type_uuid(designator, architecture)
    made = Entry(number, type, str(uuid.UUID(int=number)), number * MIB, MIB, 0, "")
    return replace(made, **fields)  # type: ignore[arg-type]


def chosen(*entries: Entry, machine: str = "x86_64") -> dict[str, int]:
    return {each.designator: each.number for each in disk.choose(entries, machine)}


def test_every_type_is_there_once() -> None:
    assert len(TYPES) == len(FOR_ALL) + 21 * len(PER_ARCHITECTURE)
    assert all(str(uuid.UUID(each)) == each for each in TYPES)
    assert GENERIC not in TYPES
    architectures = {each.architecture for each in TYPES.values() if each.architecture}
    assert {name for names in MACHINES.values() for name in names} <= architectures
    assert platform.machine() in MACHINES
    with pytest.raises(KeyError):
        type_uuid("root")
    assert set(partition_types.MOUNT_POINTS) < {each.designator for each in TYPES.values()}


def test_versions_in_order() -> None:
    for place, one in enumerate(ORDER):
        for other_place, two in enumerate(ORDER):
            found = version_order.compare(one, two)
            assert (found > 0) - (found < 0) == (place > other_place) - (place < other_place), (one, two)
    for one, expected, two in PAIRS:
        found = version_order.compare(one, two)
        assert (found > 0) - (found < 0) == expected, (one, two)


def test_the_order_of_mounting() -> None:
    names = ("tmp", "var", "xbootldr", "esp", "srv", "home", "usr", "root", "swap")
    found = chosen(*(entry(number, name) for number, name in enumerate(names, 1)))
    assert list(found) == ["root", "usr", "home", "srv", "esp", "xbootldr", "var", "tmp", "swap"]


def test_the_first_counts_but_of_root_and_usr_the_newest() -> None:
    old, new = {"label": "os_1.9"}, {"label": "os_1.10"}
    for first, second, root in ((old, new, 2), (new, old, 1), (new, new, 1)):
        found = chosen(
            entry(1, "root", **first),
            entry(2, "root", **second),
            entry(3, "home", **first),
            entry(4, "home", **second),
            entry(5, "root-verity", **first),
            entry(6, "root-verity", **second),
        )
        assert found == {"root": root, "home": 3, "root-verity": root + 4}


@pytest.mark.parametrize(
    ("machine", "architectures", "expected"),
    [
        ("x86_64", ["x86", "arm64", "x86-64"], 3),
        ("x86_64", ["arm64", "x86"], 2),
        ("x86_64", ["arm64"], 1),
        ("aarch64", ["x86-64", "arm"], 2),
        ("unheard of", ["riscv64"], 1),
    ],
)
def test_the_architecture(machine: str, architectures: list[str], expected: int) -> None:
    entries = [entry(number, "root", name) for number, name in enumerate(architectures, 1)]
    # What protects that of another architecture is not mixed in.
    entries += [entry(10 + each.number, "root-verity", "s390x") for each in entries]
    assert chosen(*entries, machine=machine) == {"root": expected}
    # Whether the two go together is for who uses both.
    assert chosen(*entries, entry(30, "usr", "s390x"), machine=machine) == {"root": expected, "usr": 30}


def test_what_protects_nothing_is_shown() -> None:
    assert chosen(entry(1, "usr"), entry(2, "root-verity", "arm64")) == {"usr": 1, "root-verity": 2}


def test_several_architectures_that_are_not_this_machines() -> None:
    with pytest.raises(InvalidImage, match="root is there for arm64, s390x"):
        chosen(entry(1, "root", "arm64"), entry(2, "root", "s390x"))


def test_flags_take_a_partition_out() -> None:
    hidden = {"attributes": gpt.NO_AUTO}
    assert chosen(entry(1, "root"), entry(2, "home", **hidden)) == {"root": 1}
    # The ESP has another flag for that, and neither of these two.
    esp = entry(2, "esp", attributes=gpt.READ_ONLY | gpt.GROW | gpt.NO_AUTO)
    found = disk.choose([entry(1, "root", attributes=gpt.READ_ONLY | gpt.GROW), esp], "x86_64")
    assert [(each.designator, each.read_only, each.grow) for each in found] == [
        ("root", True, True),
        ("esp", False, False),
    ]
    assert chosen(entry(1, "root"), entry(2, "esp", attributes=gpt.NO_BLOCK_IO)) == {"root": 1}


def test_what_is_kept_for_the_next_version_does_not_count() -> None:
    """Its label would be the newest of all; so would its architecture be the only one."""
    empty = {"label": "_empty"}
    names = ("root", "root-verity", "root-verity-sig")
    there = [entry(number, name, label="app_1") for number, name in enumerate(names, 1)]
    free = [entry(number, name, **empty) for number, name in enumerate(names, 11)]
    expected = {"root": 1, "root-verity": 2, "root-verity-sig": 3}
    assert chosen(*there, *free) == chosen(*free, *there) == expected
    assert chosen(entry(1, "root", "arm64"), entry(2, "root", **empty), entry(3, "home", **empty)) == {
        "root": 1
    }
    assert chosen(entry(1, "generic"), entry(2, "generic", **empty)) == {"root": 1}
    assert chosen(entry(1, "root", label="_empty_")) == {"root": 1}


def test_the_generic_type() -> None:
    assert chosen(entry(1, "generic"), entry(2, "home")) == {"root": 1, "home": 2}
    assert chosen(entry(1, "generic"), entry(2, "generic"), entry(3, "usr")) == {"usr": 3}
    with pytest.raises(InvalidImage, match="several partitions could be the root"):
        chosen(entry(1, "generic"), entry(2, "generic"))


ROOT_HASH = bytes(range(32))


def verity_superblock(algorithm: bytes = b"sha256") -> bytes:
    made = bytearray(512)
    made[:8] = b"verity\0\0"
    struct.pack_into("<II", made, 8, 1, 1)
    made[32 : 32 + len(algorithm)] = algorithm
    struct.pack_into("<IIQ", made, 64, 4096, 4096, 1)
    return bytes(made)


def squashfs() -> bytes:
    """As much of a superblock as is looked at."""
    made = bytearray(96)
    struct.pack_into("<4sIIIIHHHHHH", made, 0, b"hsqs", 1, 0, 131072, 0, 1, 17, 0, 1, 4, 0)
    struct.pack_into("<8Q", made, 32, 0, 4096, 900, (1 << 64) - 1, 96, 128, 200, (1 << 64) - 1)
    return bytes(made)


def read_disk(
    monkeypatch: pytest.MonkeyPatch, contents: dict[int, bytes], *entries: Entry, size: int = 64 * MIB
) -> Disk:
    monkeypatch.setattr(gpt, "read", lambda *_: gpt.Table(512, str(uuid.UUID(int=9)), entries))

    def read(offset: int, length: int) -> bytes:
        found = bytearray(length)
        for number, data in contents.items():
            start = number * MIB - offset
            for place, byte in enumerate(data):
                if 0 <= start + place < length:
                    found[start + place] = byte
        return bytes(found)

    return disk.read(read, size, "x86_64")


def uuids(root_hash: bytes) -> tuple[dict[str, object], dict[str, object]]:
    return {"uuid": str(uuid.UUID(bytes=root_hash[:16]))}, {"uuid": str(uuid.UUID(bytes=root_hash[-16:]))}


@pytest.mark.parametrize(
    ("algorithm", "root_hash", "named", "protected"),
    [
        (b"sha256", ROOT_HASH, None, True),
        (b"sha256", ROOT_HASH, ROOT_HASH.hex(), True),
        (b"sha256", ROOT_HASH, ROOT_HASH.hex().upper(), True),
        # Without a signature, nobody says what the middle of it is.
        (b"sha512", ROOT_HASH * 2, None, False),
        (
            b"sha512",
            ROOT_HASH[:16] + bytes(32) + ROOT_HASH[16:],
            (ROOT_HASH[:16] + bytes(32) + ROOT_HASH[16:]).hex(),
            True,
        ),
    ],
)
def test_the_root_hash(
    monkeypatch: pytest.MonkeyPatch, algorithm: bytes, root_hash: bytes, named: str | None, protected: bool
) -> None:
    data, hashes = uuids(root_hash)
    entries = [entry(1, "root", **data), entry(2, "root-verity", **hashes)]
    contents = {1: squashfs(), 2: verity_superblock(algorithm)}
    if named is not None:
        entries.append(entry(3, "root-verity-sig"))
        contents[3] = f'{{"signature":"", "rootHash" : "{named}"}}'.encode()
    found = read_disk(monkeypatch, contents, *entries).partitions[0]
    assert found.file_system is not None
    assert found.file_system.type == "squashfs"
    assert (found.verity is not None) is protected
    if found.verity is not None:
        assert found.verity.root_hash == root_hash
        assert found.verity.window.offset == 2 * MIB
        assert (found.verity.signature is not None) is (named is not None)


def test_a_signature_of_another_root_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    data, hashes = uuids(ROOT_HASH)
    told = f'{{"rootHash": "{bytes(32).hex()}"}}'.encode()
    with pytest.raises(InvalidImage, match="partition 3 is not what the UUIDs of partitions 1 and 2"):
        read_disk(
            monkeypatch,
            {1: squashfs(), 2: verity_superblock(), 3: told},
            *(entry(1, "root", **data), entry(2, "root-verity", **hashes), entry(3, "root-verity-sig")),
        )


def test_what_is_wrong_in_a_partition_is_named_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {1: squashfs() + bytes(1024 - 96) + b"\xe2\xe1\xf5\xe0"}
    with pytest.raises(InvalidImage, match=r"partition 1 \(root\): ambiguous") as caught:
        read_disk(monkeypatch, two, entry(1, "root"))
    assert caught.value.parameters["offset"] == MIB + 1024
    with pytest.raises(InvalidImage, match=r"partition 2 \(root-verity\)"):
        read_disk(monkeypatch, {1: squashfs()}, entry(1, "root"), entry(2, "root-verity"))


def test_what_is_not_mounted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {1: squashfs(), 2: b"LUKS\xba\xbe", 3: bytes(512) + b"EFI PART"}
    found = read_disk(
        monkeypatch, contents, entry(1, "root"), entry(2, "home"), entry(3, "srv"), entry(4, "var")
    )
    assert [each.contents for each in found.partitions] == [None, "crypto_LUKS", "gpt", None]
    assert all(each.file_system is None for each in found.partitions[1:])


def test_nothing_to_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedFileSystem, match="neither a root nor a /usr"):
        read_disk(monkeypatch, {}, entry(1, "home"))


def test_an_answer_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be from somebody who has taken the confined process over."""
    good = disk.to_plain(read_disk(monkeypatch, {1: squashfs()}, entry(1, "root")))
    assert disk.from_plain(good, 64 * MIB).partitions
    with pytest.raises(InvalidImage, match="outside of the image"):
        disk.from_plain(good, 2 * MIB - 1)
    (partition,) = good["partitions"]
    for wrong in (
        {},
        {"partitions": [{}]},
        {**good, "more": 1},
        {**good, "partitions": None},
        {**good, "partitions": [{**partition, "window": {"offset": 0}}]},
        {**good, "partitions": [{**partition, "verity": {"superblock": {"salt": "x"}}}]},
        {**good, "partitions": [{**partition, "window": {"offset": "0", "size": 1}}]},
    ):
        with pytest.raises(InvalidImage):
            disk.from_plain(wrong, 64 * MIB)
