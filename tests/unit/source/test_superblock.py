"""Images made by the real tools are recognised, and every way to damage or to double them is refused."""

from __future__ import annotations

import lzma
import os
import subprocess
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mountd.errors import InvalidImage, UnsupportedFileSystem
from mountd.source import signatures
from mountd.source.model import FileSystem
from mountd.source.superblock import CHECKS, MAXIMUM_READ, recognise

UUID = "6a4f8c1e-0d1b-4c55-9f0e-3b9f2f6f7a10"
KIB = 1 << 10
MIB = 1 << 20

MIRRORED = ("-m", "raid1", "-d", "raid1")


@dataclass(frozen=True)
class Image:
    """The first bytes of an image and its size; whatever follows is zero but for `far`."""

    head: bytes
    size: int
    far: tuple[tuple[int, bytes], ...] = ()

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        found = bytearray(self.head[offset : offset + length].ljust(length, b"\0"))
        for start, data in self.far:
            if offset <= start < offset + length:
                found[start - offset : start - offset + len(data)] = data
        return bytes(found[:length])

    def patched(self, offset: int, data: bytes) -> Image:
        head = self.head[:offset].ljust(offset, b"\0") + data + self.head[offset + len(data) :]
        return replace(self, head=head, size=max(self.size, len(head)))

    def judged(self) -> FileSystem:
        """Recognise it, and check that no more was read than promised."""
        lengths = []

        def read(offset: int, length: int) -> bytes:
            lengths.append(length)
            return self.read(offset, length)

        try:
            return recognise(read, self.size)
        finally:
            assert sum(lengths) <= MAXIMUM_READ


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The images by name; those of the five types are called as their type."""
    root = tmp_path_factory.mktemp("images")
    tree = root / "tree"
    tree.mkdir()
    (tree / "greeting").write_text("hello\n")
    # So that the squashfs and the erofs reach as far as the superblock of btrfs.
    (tree / "noise").write_bytes(os.urandom(200 * KIB))
    images = {
        name: root / f"{name}.img"
        for name in ("erofs", "erofs-lz4", "squashfs", "squashfs-zstd", "erofs-blob")
    }
    run("mkfs.erofs", "--quiet", f"-U{UUID}", "-T0", images["erofs"], tree)
    run("mkfs.erofs", "--quiet", "-zlz4", images["erofs-lz4"], tree)
    blob = f"--blobdev={root / 'blob'}"
    run("mkfs.erofs", "--quiet", "--chunksize=4096", blob, images["erofs-blob"], tree)
    run("mksquashfs", tree, images["squashfs"], "-quiet", "-no-progress")
    run("mksquashfs", tree, images["squashfs-zstd"], "-quiet", "-no-progress", "-comp", "zstd", "-nopad")

    def formatted(name: str, size: int, *command: str | Path) -> None:
        images[name] = sparse(root / f"{name}.img", size)
        run(*command, images[name])

    formatted("ext4", 8 * MIB, "mkfs.ext4", "-q", "-U", UUID, "-L", "four", "-d", tree)
    formatted("ext4-64bit", 64 * MIB, "mkfs.ext4", "-q", "-O", "64bit", "-b", "4096")
    formatted("ext2", 4 * MIB, "mkfs.ext2", "-q")
    formatted("ext3", 8 * MIB, "mkfs.ext3", "-q")
    formatted("ext4-journal", 8 * MIB, "mke2fs", "-q", "-O", "journal_dev")
    formatted("xfs", 300 * MIB, "mkfs.xfs", "-q", "-m", f"uuid={UUID}", "-L", "ex")
    log = sparse(root / "log", 64 * MIB)
    formatted("xfs-log", 300 * MIB, "mkfs.xfs", "-q", "-l", f"logdev={log}")
    realtime = sparse(root / "realtime", 300 * MIB)
    formatted("xfs-realtime", 300 * MIB, "mkfs.xfs", "-q", "-r", f"rtdev={realtime}")
    formatted("btrfs", 128 * MIB, "mkfs.btrfs", "-q", "-U", UUID, "-L", "butter")
    second = sparse(root / "second", 128 * MIB)
    formatted("btrfs-two", 128 * MIB, "mkfs.btrfs", "-q", *MIRRORED, second)
    formatted("btrfs-seed", 128 * MIB, "mkfs.btrfs", "-q")
    run("btrfstune", "-S1", images["btrfs-seed"])
    formatted("swap", 1 * MIB, "mkswap", "-q")
    for table in ("gpt", "dos"):
        images[table] = sparse(root / table, 16 * MIB)
        subprocess.run(["sfdisk", "-q", "-X", table, images[table]], input=b",,\n", check=True)
    return images


@pytest.fixture(scope="module")
def heads(made: dict[str, Path]) -> dict[str, Image]:
    """The same images, ready to be patched."""
    found = {}
    for name, path in made.items():
        with path.open("rb") as file:
            found[name] = Image(file.read(128 * KIB), path.stat().st_size)
    return found


EXPECTED = {
    "erofs": ("erofs", 4096, UUID, None),
    "squashfs": ("squashfs", 128 * KIB, None, None),
    "ext4": ("ext4", 1024, UUID, "four"),
    "xfs": ("xfs", 4096, UUID, "ex"),
    "btrfs": ("btrfs", 4096, UUID, "butter"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_recognises_what_the_tools_make(made: dict[str, Path], name: str) -> None:
    size = made[name].stat().st_size
    with made[name].open("rb") as file:
        found = recognise(lambda offset, length: os.pread(file.fileno(), length, offset), size)
    type, block_size, uuid, label = EXPECTED[name]
    assert (found.type, found.block_size, found.uuid, found.label) == (type, block_size, uuid, label)
    assert not found.needs_recovery
    assert size - 4 * KIB < found.size <= size


@pytest.mark.parametrize(
    ("name", "type"),
    [
        ("erofs-lz4", "erofs"),
        ("squashfs-zstd", "squashfs"),
        ("ext4-64bit", "ext4"),
        ("ext2", "ext4"),
        ("ext3", "ext4"),
    ],
)
def test_recognises_variants(heads: dict[str, Image], name: str, type: str) -> None:
    assert heads[name].judged().type == type


@pytest.mark.parametrize(
    ("name", "offset", "reason"),
    [
        ("erofs-blob", 1024 + 86, "external devices"),
        ("ext4-journal", 1024 + 0x60, "external journal"),
        ("xfs-log", 48, "external device"),
        ("xfs-realtime", 16, "realtime device"),
        ("btrfs-two", 0x10000 + 136, "2 devices"),
        ("btrfs-seed", 0x10000 + 56, "seed"),
    ],
)
def test_refuses_what_needs_other_devices(
    heads: dict[str, Image], name: str, offset: int, reason: str
) -> None:
    with pytest.raises(InvalidImage, match=reason) as caught:
        heads[name].judged()
    assert caught.value.parameters["offset"] == offset


@pytest.mark.parametrize(("name", "type"), [("swap", "swap"), ("gpt", "gpt"), ("dos", "dos")])
def test_names_what_it_does_not_mount(heads: dict[str, Image], name: str, type: str) -> None:
    with pytest.raises(UnsupportedFileSystem, match="not mounted") as caught:
        heads[name].judged()
    assert caught.value.parameters["fileSystemType"] == type


def le(number: int, length: int) -> bytes:
    return number.to_bytes(length, "little")


def be(number: int, length: int) -> bytes:
    return number.to_bytes(length, "big")


# Type, start of the superblock, offset of the field, its new value, part of the reason.
PATCHES = [
    ("erofs", 1024, 12, le(8, 1), "block size"),
    ("erofs", 1024, 12, le(17, 1), "block size"),
    ("erofs", 1024, 36, le(0, 4), "no blocks"),
    ("erofs", 1024, 36, le(0xFFFFFFFF, 4), "the image only has"),
    ("erofs", 1024, 80, le(0x80, 4), "unknown incompatible features 0x80"),
    ("erofs", 1024, 80, le(0x80000000, 4), "unknown incompatible features"),
    ("erofs", 1024, 86, le(1, 2), "1 external devices"),
    ("squashfs", 0, 28, le(3, 2), "version 3.0"),
    ("squashfs", 0, 28, le(4, 2) + le(1, 2), "version 4.1"),
    ("squashfs", 0, 12, le(2048, 4), "block size"),
    ("squashfs", 0, 12, le(2 << 20, 4), "block size"),
    ("squashfs", 0, 12, le(100000, 4), "block size"),
    ("squashfs", 0, 22, le(16, 2), "block_log"),
    ("squashfs", 0, 22, le(0xFFFF, 2), "block_log"),
    ("squashfs", 0, 20, le(0, 2), "compression"),
    ("squashfs", 0, 20, le(7, 2), "compression"),
    ("squashfs", 0, 40, le(1 << 40, 8), "the image only has"),
    ("squashfs", 0, 40, le((1 << 64) - 1, 8), "the image only has"),
    ("squashfs", 0, 40, le(95, 8), "smaller than its superblock"),
    ("squashfs", 0, 26, le(0, 2), "no ids"),
    ("squashfs", 0, 32, le(0xFFFF, 8), "root inode"),
    ("squashfs", 0, 48, le(96, 8), "id table"),
    ("squashfs", 0, 56, le(1 << 40, 8), "xattr table"),
    ("squashfs", 0, 64, le(1 << 40, 8), "inode table"),
    ("squashfs", 0, 64, le(0, 8), "inode table"),
    ("squashfs", 0, 72, le(96, 8), "directory table"),
    ("squashfs", 0, 80, le(1, 8), "fragment table"),
    ("squashfs", 0, 88, le((1 << 64) - 2, 8), "export table"),
    ("ext4", 1024, 0x4C, le(2, 4), "revision"),
    ("ext4", 1024, 0x18, le(7, 4), "block size"),
    ("ext4", 1024, 0x18, le(0xFFFFFFFF, 4), "block size"),
    ("ext4", 1024, 0x4, le(8193, 4), "the image only has"),
    ("ext4", 1024, 0x4, le(0, 4), "no blocks"),
    ("ext4", 1024, 0x14, le(8192, 4), "first data block"),
    ("ext4", 1024, 0x20, le(0, 4), "no blocks"),
    ("ext4", 1024, 0x28, le(0, 4), "no inodes"),
    ("ext4", 1024, 0x60, le(0x8, 4), "external journal"),
    ("ext4", 1024, 0xE4, le(0x0801, 4), "external device"),
    ("ext4", 1024, 0xE0, le(0, 4), "does not say where"),
    ("xfs", 0, 100, be(0xB4A3, 2), "version 3"),
    ("xfs", 0, 126, be(1, 1), "did not finish"),
    ("xfs", 0, 4, be(256, 4), "block size"),
    ("xfs", 0, 4, be(1 << 17, 4), "block size"),
    ("xfs", 0, 4, be(5000, 4), "block size"),
    ("xfs", 0, 120, be(13, 1), "sb_blocklog"),
    ("xfs", 0, 120, be(255, 1), "sb_blocklog"),
    ("xfs", 0, 102, be(256, 2), "sector size"),
    ("xfs", 0, 102, be(600, 2), "sector size"),
    ("xfs", 0, 88, be(0, 4), "no allocation groups"),
    ("xfs", 0, 84, be(63, 4), "only have 63 blocks"),
    ("xfs", 0, 8, be(1 << 62, 8), "do not fit"),
    ("xfs", 0, 8, be(0, 8), "do not fit"),
    ("xfs", 0, 48, be(0, 8), "external device"),
    ("xfs", 0, 16, be(1, 8), "realtime device"),
    ("xfs", 0, 24, be(1, 8), "realtime device"),
    ("btrfs", 0x10000, 48, le(0x4000000, 8), "another place"),
    ("btrfs", 0x10000, 56, le(1 << 32 | 1, 8), "seed"),
    ("btrfs", 0x10000, 56, le(1 << 33 | 1, 8), "metadata dump"),
    ("btrfs", 0x10000, 56, le(1 << 34 | 1, 8), "metadata dump"),
    ("btrfs", 0x10000, 56, le(1 << 35 | 1, 8), "UUID"),
    ("btrfs", 0x10000, 56, le(1 << 36 | 1, 8), "UUID"),
    ("btrfs", 0x10000, 136, le(2, 8), "2 devices"),
    ("btrfs", 0x10000, 136, le(0, 8), "0 devices"),
    ("btrfs", 0x10000, 144, le(2048, 4), "sector size"),
    ("btrfs", 0x10000, 144, le(1 << 17, 4), "sector size"),
    ("btrfs", 0x10000, 148, le(2048, 4), "node size"),
    ("btrfs", 0x10000, 148, le(12288, 4), "node size"),
    ("btrfs", 0x10000, 148, le(1 << 17, 4), "node size"),
    ("btrfs", 0x10000, 160, le(2049, 4), "system chunk array"),
    ("btrfs", 0x10000, 112, le(128 * MIB + 1, 8), "the image only has"),
    ("btrfs", 0x10000, 112, le(0, 8), "no blocks"),
    ("btrfs", 0x10000, 209, le(1 << 60, 8), "the image only has"),
]


@pytest.mark.parametrize(
    ("type", "start", "field", "value", "reason"),
    PATCHES,
    ids=lambda v: v.hex() if isinstance(v, bytes) else None,
)
def test_refuses_a_damaged_field(
    heads: dict[str, Image], type: str, start: int, field: int, value: bytes, reason: str
) -> None:
    with pytest.raises(InvalidImage, match=reason) as caught:
        heads[type].patched(start + field, value).judged()
    assert caught.value.parameters["offset"] == start + field
    assert caught.value.message.startswith(f"invalid image: {type}: ")


def test_ext4_counts_the_high_half_of_its_blocks(heads: dict[str, Image]) -> None:
    # Without INCOMPAT_64BIT as well: ext4_blocks_count() does not ask for it.
    for name in ("ext4-64bit", "ext2"):
        with pytest.raises(InvalidImage, match="the image only has"):
            heads[name].patched(1024 + 0x150, le(1, 4)).judged()


def test_xfs_larger_than_its_image(heads: dict[str, Image]) -> None:
    xfs = heads["xfs"]
    with pytest.raises(InvalidImage, match="the image only has") as caught:
        replace(xfs, size=xfs.size - 512).judged()
    assert caught.value.parameters["offset"] == 8


def test_an_ext4_that_needs_recovery(heads: dict[str, Image]) -> None:
    incompat = int.from_bytes(heads["ext4"].head[1024 + 0x60 : 1024 + 0x64], "little")
    assert heads["ext4"].patched(1024 + 0x60, le(incompat | 0x4, 4)).judged().needs_recovery


def test_a_btrfs_that_needs_recovery(heads: dict[str, Image]) -> None:
    assert heads["btrfs"].patched(0x10000 + 96, le(0x1D00000, 8)).judged().needs_recovery


def test_labels_and_uuids_are_made_harmless(heads: dict[str, Image]) -> None:
    found = heads["ext4"].patched(1024 + 0x68, bytes(16) + b"\x1b[2J\xff\nroot\0rest..").judged()
    assert found.uuid is None
    assert found.label == "\ufffd[2J\ufffd\ufffdroot"


# A few signatures as they would be implanted, by type.
IMPLANTS = {
    "btrfs": (0x10040, b"_BHRfS_M"),
    "squashfs": (0, b"hsqs"),
    "xfs": (0, b"XFSB"),
    "crypto_LUKS": (0, b"LUKS\xba\xbe"),
    "vfat": (0x52, b"FAT32   "),
    "ntfs": (3, b"NTFS    "),
    "exfat": (3, b"EXFAT   "),
    "swap": (0xFF6, b"SWAPSPACE2"),
    "LVM2_member": (0x218, b"LVM2 001"),
    "gpt": (512, b"EFI PART"),
    "dos": (446, bytes([0x80, 0, 1, 0, 0x83, 0, 1, 0]) + le(1, 4) + le(100, 4) + bytes(48) + b"\x55\xaa"),
    "iso9660": (0x8001, b"CD001"),
    "udf": (0x8801, b"NSR03"),
    "f2fs": (0x1400, b"\x10\x20\xf5\xf2"),
    "cramfs": (0x200, b"\x45\x3d\xcd\x28"),
    "romfs": (0, b"-rom1fs-"),
    "jfs": (0x8000, b"JFS1"),
    "reiserfs": (0x10034, b"ReIsEr2Fs"),
    "bcachefs": (0x1018, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef")),
    "zfs_member": (16 * KIB + 20, b"\0\0\0\x07version"),
    "linux_raid_member": (0x1000, b"\xfc\x4e\x2b\xa9\x01\0\0\0"),
}


@pytest.mark.parametrize("implant", [i for i in IMPLANTS if i not in CHECKS])
def test_names_each_known_type_alone(implant: str) -> None:
    with pytest.raises(UnsupportedFileSystem, match="not mounted") as caught:
        Image(b"", 4 * MIB).patched(*IMPLANTS[implant]).judged()
    assert caught.value.parameters["fileSystemType"] == implant


PAIRS = [
    (type, implant)
    for type in CHECKS
    for implant, (offset, _) in IMPLANTS.items()
    # Two that have the same place cannot be in one image.
    if type != implant and not (type in ("squashfs", "xfs") and offset < 4)
]


@pytest.mark.parametrize(("type", "implant"), PAIRS)
def test_refuses_two_signatures(heads: dict[str, Image], type: str, implant: str) -> None:
    offset, magic = IMPLANTS[implant]
    with pytest.raises(InvalidImage, match="ambiguous") as caught:
        heads[type].patched(offset, magic).judged()
    assert f"{type} at byte" in caught.value.message
    assert f"{implant} at byte {offset}" in caught.value.message


@pytest.mark.parametrize("type", ["squashfs", "xfs", "btrfs"])
def test_refuses_an_implanted_ext4(heads: dict[str, Image], type: str) -> None:
    with pytest.raises(InvalidImage, match=f"(?=.*{type} at byte)(?=.*ext4 at byte 1080)"):
        heads[type].patched(1024, heads["ext4"].head[1024:2048]).judged()


@pytest.mark.parametrize("type", ["squashfs", "xfs", "btrfs", "ext4"])
def test_refuses_an_implanted_erofs(heads: dict[str, Image], type: str) -> None:
    # In an ext4, only its first field, the number of inodes, is the magic of an erofs.
    with pytest.raises(InvalidImage, match=f"(?=.*{type} at byte)(?=.*erofs at byte 1024)"):
        heads[type].patched(1024, b"\xe2\xe1\xf5\xe0").judged()


def test_refuses_an_ext4_that_only_the_kernel_would_take(heads: dict[str, Image]) -> None:
    # Of a revision from the future, which the kernel mounts read-only.
    ext4 = heads["ext4"].patched(1024 + 0x4C, le(9, 4)).head[1024:2048]
    with pytest.raises(InvalidImage, match="ambiguous"):
        heads["squashfs"].patched(1024, ext4).judged()


@pytest.mark.parametrize("type", ["squashfs", "erofs"])
def test_two_bytes_in_the_right_place_are_chance(heads: dict[str, Image], type: str) -> None:
    image = heads[type].patched(1024 + 0x38, b"\x53\xef")
    if type == "squashfs":  # where compressed data is, as unlike an ext4 as it gets
        image = image.patched(1024 + 0x18, b"\xff" * 4)
    assert image.judged().type == type


def test_a_boot_loader_is_no_partition_table(heads: dict[str, Image]) -> None:
    for type in ("ext4", "btrfs", "erofs"):
        code = bytes(range(1, 247)) + bytes(200) + bytes(64) + b"\x55\xaa"
        assert heads[type].patched(0, code).judged().type == type


def test_a_fat_without_its_name() -> None:
    sector = (
        b"\xeb\x3c\x90mkdosfs\0"
        + le(512, 2)
        + b"\x04"
        + le(4, 2)
        + b"\x02"
        + le(512, 2)
        + le(0, 2)
        + b"\xf8"
    )
    with pytest.raises(UnsupportedFileSystem) as caught:
        Image(sector.ljust(510, b"\0") + b"\x55\xaa", MIB).judged()
    assert caught.value.parameters["fileSystemType"] == "vfat"


@pytest.mark.parametrize(
    ("offset", "magic", "type"),
    [
        (32 * MIB - 512, b"EFI PART", "gpt"),
        (32 * MIB - 4096, b"EFI PART", "gpt"),
        (32 * MIB - 8192, b"\xfc\x4e\x2b\xa9", "linux_raid_member"),
        (32 * MIB - 64 * KIB, b"\xfc\x4e\x2b\xa9", "linux_raid_member"),
        (32 * MIB - 64 * KIB, b"\xa9\x2b\x4e\xfc", "linux_raid_member"),
        (32 * MIB - 256 * KIB + 16 * KIB + 20, b"\0\0\0\x07version", "zfs_member"),
        (32 * MIB - 512 * KIB + 16 * KIB + 20, b"\0\0\0\x07version", "zfs_member"),
        (256 * KIB + 16 * KIB + 20, b"\0\0\0\x07version", "zfs_member"),
        (0x200018, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef"), "bcachefs"),
    ],
)
def test_looks_at_the_end_too(heads: dict[str, Image], offset: int, magic: bytes, type: str) -> None:
    image = replace(heads["erofs"], size=32 * MIB, far=((offset, magic),))
    with pytest.raises(InvalidImage, match=f"erofs at byte 1024 and {type} at byte {offset}"):
        image.judged()


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image(b"", 0), "empty"),
        (Image(b"", 1), "zero"),
        (Image(b"", 1 << 62), "zero bytes"),
        (Image(b"#!/bin/sh\n", 10), "no signature"),
        (Image(b'{"rootHash":"', 16384), "the signature of a root hash"),
        (Image(zlib.compress(b"data", wbits=31), 1 << 20), "compressed, with gzip"),
        (Image(lzma.compress(b"data"), 1 << 20), "compressed, with xz"),
    ],
)
def test_nothing_there(image: Image, reason: str) -> None:
    with pytest.raises(UnsupportedFileSystem, match=reason) as caught:
        image.judged()
    assert "fileSystemType" not in caught.value.parameters


@pytest.mark.parametrize("type", CHECKS)
def test_truncated_anywhere(heads: dict[str, Image], type: str) -> None:
    whole = heads[type].judged().size
    around = {
        edge + step for edge in (0, 96, 264, 512, 1024, 1152, 2048, 0x10000, 0x11000) for step in (-1, 0, 1)
    }
    for size in {*around, *range(0, 80 * KIB, 997), whole // 2, whole - 1}:
        if 0 <= size < whole:
            with pytest.raises((InvalidImage, UnsupportedFileSystem)):
                Image(heads[type].head[:size], size).judged()


@pytest.mark.parametrize("type", CHECKS)
def test_an_exact_fit_is_enough(heads: dict[str, Image], type: str) -> None:
    whole = heads[type].judged().size
    assert replace(heads[type], size=whole).judged().size == whole


@pytest.mark.parametrize("size", [-1, 1 << 63, 1 << 70])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(InvalidImage, match="no size of a file"):
        recognise(lambda offset, length: bytes(length), size)


@pytest.mark.parametrize("there", [0, 1, 1024, signatures.HEAD_LENGTH - 1, signatures.HEAD_LENGTH])
def test_shrunk_while_it_is_read(heads: dict[str, Image], there: int) -> None:
    data = heads["btrfs"].head[:there]
    with pytest.raises(InvalidImage, match="shorter than its size"):
        recognise(lambda offset, length: data[offset : offset + length], 128 * MIB)


def test_more_than_was_asked_for_is_not_looked_at(heads: dict[str, Image]) -> None:
    erofs = heads["erofs"]
    found = recognise(lambda offset, length: erofs.read(offset, length) + b"_BHRfS_M", erofs.size)
    assert found == erofs.judged()


def test_every_magic_fits_a_bounded_read() -> None:
    far = {
        (offset, magic)
        for _, offsets, magics in signatures.MAGICS
        for offset in offsets
        for magic in magics
        if offset + len(magic) > signatures.HEAD_LENGTH
    }
    assert signatures.HEAD_LENGTH + sum(len(magic) for _, magic in far) + 100 <= MAXIMUM_READ
