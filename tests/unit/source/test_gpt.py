"""Partition tables by the tool that everybody uses are read; every other way to read them is refused."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import pytest

from mountd.errors import InvalidImage
from mountd.source import gpt
from tests.disks import FIRST, MIB, NATIVE, Part, build_disk, type_uuid

ROOT_UUID = "0f2e0a51-9bd2-4c1a-8d1c-0a6b4f1d2e33"
needs_root = pytest.mark.kernel


@dataclass
class Disk:
    """The bytes of a disk image, to be damaged."""

    data: bytearray
    sector: int = 512

    def read(self) -> gpt.Table:
        lengths = []

        def read(offset: int, length: int) -> bytes:
            assert offset >= 0
            assert length > 0
            lengths.append(length)
            return bytes(self.data[offset : offset + length])

        try:
            return gpt.read(read, len(self.data))
        finally:
            assert sum(lengths) <= gpt.MAXIMUM_READ

    def set(self, offset: int, format: str, value: int) -> None:
        struct.pack_into(f"<{format}", self.data, offset, value)

    def get(self, offset: int, format: str) -> int:
        return int(struct.unpack_from(f"<{format}", self.data, offset)[0])

    @property
    def copy(self) -> int:
        """Where the copy of the header is."""
        return self.get(self.sector + 32, "Q") * self.sector

    def sign(self) -> None:
        """Make all checksums fit again; the copy of the entries follows the entries."""
        for header in (self.sector, self.copy):
            count, size = self.get(header + 80, "I"), self.get(header + 84, "I")
            source = self.get(self.sector + 72, "Q") * self.sector
            place = self.get(header + 72, "Q") * self.sector
            table = bytes(self.data[source : source + count * size])
            if place + len(table) <= len(self.data):
                self.data[place : place + len(table)] = table
            self.set(header + 88, "I", crc32(table))
            self.sign_header(header)

    def sign_header(self, header: int) -> None:
        self.set(header + 16, "I", 0)
        length = min(self.get(header + 12, "I"), self.sector)
        self.set(header + 16, "I", crc32(self.data[header : header + length]))

    def both(self, offset: int, format: str, value: int) -> None:
        """Set a field of both headers."""
        for header in (self.sector, self.copy):
            self.set(header + offset, format, value)

    def entry(self, number: int) -> int:
        """Where the entry with this number is."""
        return 2 * self.sector + (number - 1) * 128


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    parts = [
        Part("root", size=2 * MIB, uuid=ROOT_UUID, label="one_1.2", attributes="GUID:60"),
        Part("home", label="home ü", attributes="GUID:59,63"),
        Part("esp", attributes="LegacyBIOSBootable"),
    ]
    return build_disk(tmp_path_factory.mktemp("gpt") / "disk.raw", parts).read_bytes()


@pytest.fixture
def disk(made: bytes) -> Disk:
    return Disk(bytearray(made))


def test_a_table_as_sfdisk_makes_it(disk: Disk) -> None:
    table = disk.read()
    assert table.sector_size == 512
    assert uuid.UUID(table.uuid)
    root, home, esp = table.entries
    assert (root.number, root.type, root.uuid) == (1, type_uuid("root", NATIVE), ROOT_UUID)
    assert (root.start, root.size, root.label) == (FIRST, 2 * MIB, "one_1.2")
    assert root.attributes == gpt.READ_ONLY
    assert (home.start, home.size, home.label) == (FIRST + 2 * MIB, MIB, "home ü")
    assert home.attributes == gpt.GROW | gpt.NO_AUTO
    assert (esp.type, esp.attributes) == (type_uuid("esp"), 1 << 2)


@needs_root
def test_large_sectors(tmp_path: Path) -> None:
    image = build_disk(tmp_path / "disk.raw", [Part("root"), Part("srv")], sector_size=4096)
    table = Disk(bytearray(image.read_bytes()), 4096).read()
    assert table.sector_size == 4096
    assert [(each.start, each.size) for each in table.entries] == [(FIRST, MIB), (FIRST + MIB, MIB)]


def test_an_image_that_was_made_longer(disk: Disk) -> None:
    before = disk.read()
    disk.data += bytes(MIB)
    assert disk.read() == before


def test_a_name_that_is_not_for_terminals(disk: Disk) -> None:
    name = "a\x1b[2Jb\ud800".encode("utf-16-le", "surrogatepass")
    disk.data[disk.entry(1) + 56 : disk.entry(1) + 128] = name.ljust(72, b"\0")
    disk.sign()
    assert disk.read().entries[0].label == "a\ufffd[2Jb\ufffd"


def damage(offset: int, format: str, value: int) -> Callable[[Disk], None]:
    """A way to damage both headers, with checksums that fit."""

    def apply(disk: Disk) -> None:
        disk.both(offset, format, value)
        disk.sign()

    return apply


def of_entry(number: int, offset: int, format: str, value: int) -> Callable[[Disk], None]:
    """A way to damage an entry, with checksums that fit."""

    def apply(disk: Disk) -> None:
        disk.set(disk.entry(number) + offset, format, value)
        disk.sign()

    return apply


def raw(offset: int, data: bytes) -> Callable[[Disk], None]:
    """A way to overwrite bytes, from the end with a negative offset."""

    def apply(disk: Disk) -> None:
        start = offset % len(disk.data)
        disk.data[start : start + len(data)] = data

    return apply


def in_copy(offset: int, format: str, value: int) -> Callable[[Disk], None]:
    """A way to make the copy of the header say something else, with a checksum that fits."""

    def apply(disk: Disk) -> None:
        place = disk.copy
        disk.set(place + offset, format, value)
        disk.sign_header(place)

    return apply


def same_uuid(disk: Disk) -> None:
    first, second = disk.entry(1), disk.entry(2)
    disk.data[second + 16 : second + 32] = disk.data[first + 16 : first + 32]
    disk.sign()


def second_table(disk: Disk) -> None:
    """Another header where the end is now, after the image was made longer."""
    disk.data += bytes(MIB)
    disk.data[-512:] = disk.data[512:1024]


def hybrid(disk: Disk) -> None:
    disk.data[462:478] = bytes([0x80, 0, 0, 0, 0x83, 0, 0, 0]) + struct.pack("<II", 2048, 2048)


DAMAGES: dict[str, tuple[Callable[[Disk], None], str]] = {
    "no boot signature": (raw(510, b"\0\0"), "protective MBR"),
    "hybrid": (hybrid, "none or several partitions"),
    "empty MBR": (raw(446, bytes(16)), "none or several partitions"),
    "MBR of another type": (raw(450, b"\x83"), "not the one that protects"),
    "MBR that begins elsewhere": (raw(454, b"\x02"), "not the one that protects"),
    "no header": (raw(512, bytes(8)), "no header where the first should be"),
    "header at 4096 too": (raw(4096, b"EFI PART"), "several sizes of sectors"),
    "header at 2048 too": (raw(2048, b"EFI PART"), "several sizes of sectors"),
    "revision": (damage(8, "I", 0x20000), "revision"),
    "short header": (damage(12, "I", 91), "a header of 91 bytes"),
    "long header": (damage(12, "I", 513), "a header of 513 bytes"),
    "checksum": (raw(512 + 16, b"\0\0\0\0"), "checksum of the header"),
    "entry without checksum": (raw(1024, b"\1"), "checksum of the entries"),
    "own place": (damage(24, "Q", 2), "belongs elsewhere"),
    "copy in the header": (lambda disk: (disk.set(544, "Q", 1), disk.sign_header(512))[1], "outside"),
    "copy past the end": (lambda disk: (disk.set(544, "Q", 1 << 62), disk.sign_header(512))[1], "outside"),
    "no room": (damage(40, "Q", 1 << 40), "no room for partitions"),
    "area over the copy": (damage(48, "Q", 1 << 40), "overlap the copy"),
    "entries over the header": (damage(72, "Q", 1), "entries overlap the header"),
    "entries over the partitions": (
        lambda disk: (disk.set(584, "Q", 2020), disk.sign_header(512))[1],
        "overlap",
    ),
    "many entries": (damage(80, "I", 129), "16384 bytes"),
    "very many entries": (damage(80, "I", 0xFFFFFFFF), "16384 bytes"),
    "no entries": (damage(80, "I", 0), "0 entries"),
    "small entries": (damage(84, "I", 64), "entries of 64 bytes"),
    "odd entries": (damage(84, "I", 129), "entries of 129 bytes"),
    "copy of another disk": (in_copy(56, "Q", 1), "says something else"),
    "copy with another area": (in_copy(48, "Q", 4000), "says something else"),
    "copy of the entries over partitions": (in_copy(72, "Q", 2048), "out of place"),
    "copy of the entries past the header": (in_copy(72, "Q", 1 << 50), "out of place"),
    "copy is gone": (raw(-512, bytes(512)), "there is no header"),
    "copied entries differ": (lambda disk: raw(disk.copy - 16384, b"\1")(disk), "checksum of the entries"),
    "a second table": (second_table, "another header at the end"),
    "overlap": (of_entry(2, 32, "Q", 4096), "overlaps partition 1"),
    "backwards": (of_entry(1, 40, "Q", 2047), "outside of the area"),
    "before the area": (of_entry(1, 32, "Q", 1), "outside of the area"),
    "past the area": (of_entry(3, 40, "Q", 1 << 60), "outside of the area"),
    "same UUID": (same_uuid, "has the UUID of partition 1"),
    "cut off": (lambda disk: disk.data.__delitem__(slice(1100, None)), "outside of the image"),
    "empty": (lambda disk: disk.data.clear(), "ends inside"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_whatever_could_be_read_in_another_way(disk: Disk, name: str) -> None:
    damaged, text = DAMAGES[name]
    damaged(disk)
    with pytest.raises(InvalidImage, match=text) as caught:
        disk.read()
    offset = caught.value.parameters.get("offset")
    assert isinstance(offset, int)
    assert 0 <= offset <= len(disk.data)
