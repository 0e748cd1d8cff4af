"""The superblock of ext2, ext3 and ext4: struct ext4_super_block in the kernel's fs/ext4/ext4.h.

The kernel's ext4 driver mounts all three, so all three are called "ext4" here.
"""

from __future__ import annotations

from mountd.source.fields import Fields
from mountd.source.model import FileSystem

START = 1024
MAGIC = b"\x53\xef"  # EXT4_SUPER_MAGIC
MAXIMUM_LOG_BLOCK_SIZE = 6  # EXT4_MAX_BLOCK_LOG_SIZE - EXT4_MIN_BLOCK_LOG_SIZE: 64 KiB
MAXIMUM_REVISION = 1  # EXT4_MAX_SUPP_REV

COMPAT_HAS_JOURNAL = 0x4
INCOMPAT_RECOVER = 0x4
INCOMPAT_JOURNAL_DEV = 0x8


def is_plausible(head: bytes) -> bool:
    """Tell whether there is more to the two bytes of magic than chance.

    One in 65536 squashfs images has them in its compressed data. What is asked for in addition are only
    fields without which the kernel refuses to mount (__ext4_fill_super()), so that nothing that could be
    mounted as ext4 is overlooked.
    """
    if len(head) < START + 0x68:
        return False
    sb = Fields("ext4", head, START, "little")
    return sb.u32(0x18) <= MAXIMUM_LOG_BLOCK_SIZE and sb.u32(0x20) > 0 and sb.u32(0x28) > 0


def check(head: bytes, size: int) -> FileSystem:
    """Judge the superblock in `head`, the first bytes of an image of `size` bytes."""
    sb = Fields("ext4", head, START, "little")
    sb.bytes(0, 1024)
    compat, incompat = sb.u32(0x5C), sb.u32(0x60)  # s_feature_compat, s_feature_incompat
    # First, as a journal device has no block groups and would fail for a less clear reason.
    sb.require(not incompat & INCOMPAT_JOURNAL_DEV, 0x60, "this is the external journal of a file system")

    revision = sb.u32(0x4C)  # s_rev_level
    sb.require(revision <= MAXIMUM_REVISION, 0x4C, f"unknown revision {revision}")
    log_block_size = sb.u32(0x18)
    sb.require(
        log_block_size <= MAXIMUM_LOG_BLOCK_SIZE,
        0x18,
        f"the block size 2^(10+{log_block_size}) is too large",
    )
    # Both halves whatever INCOMPAT_64BIT says, because ext4_blocks_count() does the same.
    blocks = sb.u32(0x150) << 32 | sb.u32(0x4)
    sb.require_size(blocks << (10 + log_block_size), size, 0x4)
    sb.require(sb.u32(0x14) < blocks, 0x14, "the first data block lies outside the file system")
    sb.require(sb.u32(0x20) > 0, 0x20, "the block groups have no blocks")
    sb.require(sb.u32(0x28) > 0, 0x28, "the block groups have no inodes")
    if compat & COMPAT_HAS_JOURNAL:
        # The kernel would open the device with this number, whichever it is (ext4_get_journal_blkdev()).
        # A journal inode beside it is no excuse: the kernel refuses to choose as well.
        sb.require(sb.u32(0xE4) == 0, 0xE4, "the journal is on an external device, which is never opened")
        sb.require(sb.u32(0xE0) != 0, 0xE0, "there is a journal, but the superblock does not say where")
    return FileSystem(
        type="ext4",
        size=blocks << (10 + log_block_size),
        block_size=1024 << log_block_size,
        uuid=sb.uuid(0x68),
        label=sb.label(0x78, 16),
        needs_recovery=bool(incompat & INCOMPAT_RECOVER),
    )
