"""The superblock of squashfs 4.0: struct squashfs_super_block in the kernel's fs/squashfs/squashfs_fs.h."""

from __future__ import annotations

from mountd.source.fields import Fields, is_power_of_two
from mountd.source.model import FileSystem

LENGTH = 96
INVALID_TABLE = 0xFFFF_FFFF_FFFF_FFFF  # SQUASHFS_INVALID_BLK: there is no such table
METADATA_SIZE = 8192  # SQUASHFS_METADATA_SIZE
ZSTD = 6  # ZSTD_COMPRESSION, the last one

# Offset of the field and name of each table that may be missing.
OPTIONAL_TABLES = ((56, "xattr"), (80, "fragment"), (88, "export"))


def check(head: bytes, size: int) -> FileSystem:
    """Judge the superblock in `head`, the first bytes of an image of `size` bytes."""
    sb = Fields("squashfs", head, 0, "little")
    sb.bytes(0, LENGTH)
    major, minor = sb.u16(28), sb.u16(30)  # s_major, s_minor
    sb.require((major, minor) == (4, 0), 28, f"version {major}.{minor} is not 4.0")

    block_size, block_log = sb.u32(12), sb.u16(22)
    sb.require(
        is_power_of_two(block_size) and 4096 <= block_size <= 1 << 20,
        12,
        f"the block size {block_size} is not a power of two between 4096 and 1048576",
    )
    sb.require(
        block_size == 1 << min(block_log, 63), 22, f"block_log {block_log} contradicts the block size"
    )
    compression = sb.u16(20)
    sb.require(1 <= compression <= ZSTD, 20, f"unknown compression {compression}")

    bytes_used = sb.u64(40)
    sb.require(bytes_used >= LENGTH, 40, "the file system is smaller than its superblock")
    sb.require_size(bytes_used, size, 40)
    check_tables(sb, bytes_used)
    return FileSystem(
        type="squashfs", size=bytes_used, block_size=block_size, uuid=None, label=None, needs_recovery=False
    )


def check_tables(sb: Fields, bytes_used: int) -> None:
    """Refuse tables outside the file system or not in the order that squashfs_fill_super() wants."""
    sb.require(sb.u16(26) > 0, 26, "there are no ids")  # no_ids
    sb.require(sb.u64(32) & 0xFFFF <= METADATA_SIZE, 32, "the root inode lies outside its metadata block")
    id_table, inode_table, directory_table = sb.u64(48), sb.u64(64), sb.u64(72)
    sb.require(LENGTH <= inode_table < bytes_used, 64, "the inode table lies outside the file system")
    sb.require(
        inode_table < directory_table < bytes_used, 72, "the directory table does not follow the inode table"
    )
    sb.require(
        directory_table < id_table < bytes_used, 48, "the id table does not follow the directory table"
    )
    for offset, name in OPTIONAL_TABLES:
        table = sb.u64(offset)
        sb.require(
            table == INVALID_TABLE or LENGTH <= table < bytes_used,
            offset,
            f"the {name} table lies outside the file system",
        )
