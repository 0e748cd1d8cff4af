"""The superblock of xfs: struct xfs_dsb in the kernel's fs/xfs/libxfs/xfs_format.h.

It does not say whether the log has to be replayed; only the log itself does. `needs_recovery` is therefore
always false, and whoever mounts an xfs that must not be written to has to ask for "norecovery" every time.
"""

from __future__ import annotations

from mountd.source.fields import Fields, is_power_of_two
from mountd.source.model import FileSystem

LENGTH = 264  # up to sb_meta_uuid, the last field that kernels of version 5 all have
MINIMUM_AG_BLOCKS = 64  # XFS_MIN_AG_BLOCKS
VERSIONS = (4, 5)  # XFS_SB_VERSION_4, XFS_SB_VERSION_5


def check(head: bytes, size: int) -> FileSystem:
    """Judge the superblock in `head`, the first bytes of an image of `size` bytes."""
    sb = Fields("xfs", head, 0, "big")
    sb.bytes(0, LENGTH)
    version = sb.u16(100) & 0xF  # sb_versionnum, XFS_SB_VERSION_NUMBITS
    sb.require(version in VERSIONS, 100, f"unknown version {version}")
    sb.require(sb.u8(126) == 0, 126, "mkfs or growfs did not finish")  # sb_inprogress

    block_size = sb.u32(4)
    sb.require(
        is_power_of_two(block_size) and 512 <= block_size <= 65536,
        4,
        f"the block size {block_size} is not a power of two between 512 and 65536",
    )
    sb.require(block_size == 1 << min(sb.u8(120), 63), 120, "sb_blocklog contradicts the block size")
    sector_size = sb.u16(102)
    sb.require(
        is_power_of_two(sector_size) and 512 <= sector_size <= 32768,
        102,
        f"the sector size {sector_size} is not a power of two between 512 and 32768",
    )
    blocks = check_groups(sb)
    sb.require_size(blocks * block_size, size, 8)

    sb.require(sb.u64(48) != 0, 48, "the log is on an external device, which is never opened")  # sb_logstart
    for offset in (16, 24):  # sb_rblocks, sb_rextents
        sb.require(
            sb.u64(offset) == 0, offset, "the file system needs a realtime device, which is never opened"
        )
    return FileSystem(
        type="xfs",
        size=blocks * block_size,
        block_size=block_size,
        uuid=sb.uuid(32),
        label=sb.label(108, 12),
        needs_recovery=False,
    )


def check_groups(sb: Fields) -> int:
    """Return sb_dblocks, after comparing it with the allocation groups as xfs_validate_sb_common() does."""
    blocks, group_blocks, groups = sb.u64(8), sb.u32(84), sb.u32(88)
    sb.require(groups > 0, 88, "there are no allocation groups")
    sb.require(
        group_blocks >= MINIMUM_AG_BLOCKS, 84, f"the allocation groups only have {group_blocks} blocks"
    )
    minimum = (groups - 1) * group_blocks + MINIMUM_AG_BLOCKS
    sb.require(
        minimum <= blocks <= groups * group_blocks,
        8,
        f"{blocks} blocks do not fit {groups} allocation groups of {group_blocks}",
    )
    return blocks
