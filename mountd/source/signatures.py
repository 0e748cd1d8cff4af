"""Which signatures an image carries: a table of magic numbers and the few that need more than a magic.

The table is that of libblkid (util-linux, libblkid/src/superblocks/*.c), as far as a kernel, a boot loader
or an udev rule would act on it. What is looked for and not mounted serves two ends: a clear refusal, and
that an image is never one thing for mountd and another for the next program that looks at it.

Long magics count wherever they are. Magics of two bytes turn up by chance in compressed data, so that they
count only together with other fields; see `ext4.is_plausible`, `is_fat` and `has_partitions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.errors import InvalidImage
from mountd.source import btrfs, erofs, ext4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Read = Callable[[int, int], bytes]

# As far as the superblock of btrfs, the last one of those that are mounted; one read, so that all checks see
# the same bytes even if somebody writes to the image meanwhile.
HEAD_LENGTH = btrfs.START + btrfs.LENGTH
MAXIMUM_IMAGE_SIZE = (1 << 63) - 1  # loff_t


@dataclass(frozen=True, slots=True)
class Signature:
    """A sign of `type` at byte `offset`."""

    type: str
    offset: int

    @property
    def family(self) -> str:
        """What it counts as: types of one family are found together in honest images."""
        return FAMILIES.get(self.type, self.type)


# Type, where its magics can be, and the magics.
MAGICS: tuple[tuple[str, tuple[int, ...], tuple[bytes, ...]], ...] = (
    ("erofs", (erofs.START,), (b"\xe2\xe1\xf5\xe0",)),
    ("squashfs", (0,), (b"hsqs",)),
    ("xfs", (0,), (b"XFSB",)),
    ("btrfs", (btrfs.START + 64,), (b"_BHRfS_M",)),
    ("vfat", (0x52,), (b"MSWIN", b"FAT32   ")),
    ("vfat", (0x36,), (b"MSDOS", b"FAT16   ", b"FAT12   ", b"FAT     ")),
    ("exfat", (3,), (b"EXFAT   ",)),
    ("ntfs", (3,), (b"NTFS    ",)),
    ("BitLocker", (3,), (b"-FVE-FS-",)),
    ("ReFS", (3,), (b"ReFS\0",)),
    ("iso9660", (0x8001,), (b"CD001",)),
    ("iso9660", (0x8009,), (b"CDROM",)),
    # The volume recognition sequence: a descriptor every 2048 bytes (ECMA-167, 2/8).
    ("udf", tuple(range(0x8001, 0xC001, 2048)), (b"BEA01", b"NSR02", b"NSR03", b"BOOT2")),
    ("f2fs", (0x400, 0x1400), (b"\x10\x20\xf5\xf2",)),
    ("crypto_LUKS", (0,), (b"LUKS\xba\xbe",)),
    ("crypto_LUKS", (0x4000, 0x8000, 0x10000), (b"SKUL\xba\xbe",)),
    ("swap", (0xFF6, 0x1FF6, 0x3FF6, 0x7FF6, 0xFFF6), (b"SWAP-SPACE", b"SWAPSPACE2", b"LINHIB0001")),
    ("swap", (0xFF6, 0x1FF6, 0x3FF6, 0x7FF6, 0xFFF6), (b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND")),
    ("LVM2_member", (0x018, 0x218, 0x418, 0x618), (b"LVM2 001",)),
    ("cramfs", (0, 0x200), (b"\x45\x3d\xcd\x28", b"\x28\xcd\x3d\x45")),
    ("romfs", (0,), (b"-rom1fs-",)),
    ("jfs", (0x8000,), (b"JFS1",)),
    ("reiserfs", (0x2034, 0x10034), (b"ReIsErFs", b"ReIsEr2Fs", b"ReIsEr3Fs")),
    ("reiserfs", (0x2014,), (b"ReIsErFs",)),
    ("reiser4", (0x10000,), (b"ReIsEr4",)),
    # The second place is that of the backup superblock, at 2 MiB.
    ("bcachefs", (0x1018, 0x200018), (bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef"),)),
    ("bcache", (0x1018,), (bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"),)),
    ("gfs2", (0x10000,), (b"\x01\x16\x19\x70",)),
    ("ocfs2", (0x400, 0x800, 0x1000, 0x2000), (b"OCFSV2",)),
    ("apfs", (32,), (b"NXSB",)),
    ("squashfs of the other byte order", (0,), (b"sqsh",)),
    ("DM_verity_hash", (0,), (b"verity\0\0",)),
    ("DM_integrity", (0,), (b"integrt\0",)),
    ("DM_snapshot_cow", (0,), (b"SnAp",)),
    ("qcow2", (0,), (b"QFI\xfb",)),
    ("vmdk", (0,), (b"KDMV",)),
    ("vhdx", (0,), (b"vhdxfile",)),
    # For sectors of 512, 2048 and 4096 bytes.
    ("gpt", (512, 2048, 4096), (b"EFI PART",)),
    ("linux_raid_member", (0, 0x1000), (b"\xfc\x4e\x2b\xa9\x01\0\0\0",)),  # metadata 1.1 and 1.2
)

# A DVD is often both; a GPT comes with a protective MBR.
FAMILIES = {
    "iso9660": "optical disc",
    "udf": "optical disc",
    "gpt": "partition table",
    "dos": "partition table",
}

# The nvlist of a ZFS label starts with the pair "version" (OpenZFS, spa_config_generate()); this is its name
# with the length before it, 20 bytes into the list, which is 16 KiB into each of four labels of 256 KiB.
ZFS_LABEL = 256 << 10
ZFS_MAGIC = b"\0\0\0\x07version"
ZFS_MAGIC_OFFSET = (16 << 10) + 20
RAID_MAGICS = (b"\xfc\x4e\x2b\xa9", b"\xa9\x2b\x4e\xfc")  # MD_SB_MAGIC, which version 0.90 has in host order


# A GPT says more than its protective MBR; the others have boot code where the MBR has its table.
HIDE_PARTITIONS = ("gpt", "vfat", "exfat", "ntfs", "BitLocker", "ReFS")


# The same, one row for each place: those that the head always covers, and those to be read.
_ROWS = [(type, offset, magics) for type, offsets, magics in MAGICS for offset in offsets]
FAR = [row for row in _ROWS if row[1] + max(map(len, row[2])) > HEAD_LENGTH]
IN_HEAD = [row for row in _ROWS if row not in FAR]


class Image:
    """The bytes of an image that are looked at: the head once, and a few bytes elsewhere."""

    __slots__ = ("_read", "head", "size")

    def __init__(self, read: Read, size: int) -> None:
        """Read the head of the image of `size` bytes."""
        if not 0 <= size <= MAXIMUM_IMAGE_SIZE:
            raise InvalidImage(f"{size} bytes is no size of a file")
        self._read = read
        self.size = size
        self.head = self._read_whole(0, min(size, HEAD_LENGTH))

    def _read_whole(self, offset: int, length: int) -> bytes:
        found = self._read(offset, length)[:length] if length else b""
        if len(found) < length:
            # It was cut off meanwhile. What cannot be read cannot be ruled out either.
            raise InvalidImage("the image is shorter than its size", offset=offset + len(found))
        return found

    def has(self, offset: int, magic: bytes) -> bool:
        """Tell whether `magic` is at `offset`; outside the image, there is nothing."""
        if offset < 0 or offset + len(magic) > self.size:
            return False
        if offset + len(magic) <= len(self.head):
            return self.head.startswith(magic, offset)
        return self._read_whole(offset, len(magic)) == magic


def find(image: Image) -> list[Signature]:
    """Return all signatures of `image`, the first of each family only, in the order of their offsets."""
    found = sorted(
        [*from_table(image), *from_head(image.head), *from_end(image)],
        key=lambda signature: signature.offset,
    )
    if any(signature.type in HIDE_PARTITIONS for signature in found):
        found = [signature for signature in found if signature.type != "dos"]
    if not found and image.head.startswith(ext4.MAGIC, ext4.START + 0x38):
        # Nothing else it could be: then say what is wrong with it rather than that nothing was found.
        found = [Signature("ext4", ext4.START + 0x38)]
    families: dict[str, Signature] = {}
    for signature in found:
        families.setdefault(signature.family, signature)
    return list(families.values())


def from_table(image: Image) -> Iterable[Signature]:
    """Find what has a magic at a fixed place."""
    for type, offset, magics in IN_HEAD:
        if image.head.startswith(magics, offset):
            yield Signature(type, offset)
    for type, offset, magics in FAR:
        if any(image.has(offset, magic) for magic in magics):
            yield Signature(type, offset)


def from_head(head: bytes) -> Iterable[Signature]:
    """Find what has only two bytes of magic."""
    if head.startswith(ext4.MAGIC, ext4.START + 0x38) and ext4.is_plausible(head):
        yield Signature("ext4", ext4.START + 0x38)
    if head.startswith(b"\x55\xaa", 510):
        if is_fat(head):
            yield Signature("vfat", 0)
        elif has_partitions(head):
            yield Signature("dos", 446)


def is_fat(head: bytes) -> bool:
    """Tell whether a boot sector has the BIOS parameter block of a FAT (fat_read_bpb() in the kernel)."""
    sector_size = int.from_bytes(head[11:13], "little")
    cluster, reserved, fats, media = head[13], int.from_bytes(head[14:16], "little"), head[16], head[21]
    return (
        sector_size in (512, 1024, 2048, 4096)
        and cluster > 0
        and cluster & (cluster - 1) == 0
        and reserved > 0
        and fats > 0
        and (media >= 0xF8 or media == 0xF0)
    )


def has_partitions(head: bytes) -> bool:
    """Tell whether the first sector, known to end in 55 AA, has a partition table and not only boot code.

    All boot flags have to be valid and one entry in use: a boot loader in the first 1024 bytes of an ext4 or
    the first 64 KiB of a btrfs has the two bytes, too, and leaves the entries zero.
    """
    entries = [head[start : start + 16] for start in range(446, 510, 16)]
    return all(entry[0] in (0, 0x80) for entry in entries) and any(
        entry[4] != 0 and any(entry[12:16]) for entry in entries
    )


def from_end(image: Image) -> Iterable[Signature]:
    """Find what has its place counted from the end of the image."""
    size = image.size
    for sector_size in (512, 4096):
        if image.has(size - sector_size, b"EFI PART"):
            yield Signature("gpt", size - sector_size)
    last_label = size - size % ZFS_LABEL - ZFS_LABEL
    for label in dict.fromkeys((0, ZFS_LABEL, last_label - ZFS_LABEL, last_label)):
        if label >= 0 and image.has(label + ZFS_MAGIC_OFFSET, ZFS_MAGIC):
            yield Signature("zfs_member", label + ZFS_MAGIC_OFFSET)
    # Metadata 1.0 and 0.90 (the kernel's drivers/md/md.c, super_1_load() and calc_dev_sboffset()).
    for start in ((size & ~0xFFF) - 0x2000, (size & ~0xFFFF) - 0x10000):
        if any(image.has(start, magic) for magic in RAID_MAGICS):
            yield Signature("linux_raid_member", start)
