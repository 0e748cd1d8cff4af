"""The superblock of btrfs: struct btrfs_super_block in the kernel's include/uapi/linux/btrfs_tree.h."""

from __future__ import annotations

from mountd.source.fields import Fields, is_power_of_two
from mountd.source.model import FileSystem

START = 0x10000  # BTRFS_SUPER_INFO_OFFSET
LENGTH = 4096  # BTRFS_SUPER_INFO_SIZE
MAXIMUM_BLOCK_SIZE = 65536  # BTRFS_MAX_METADATA_BLOCKSIZE
SYSTEM_CHUNK_ARRAY_SIZE = 2048  # BTRFS_SYSTEM_CHUNK_ARRAY_SIZE

# BTRFS_SUPER_FLAG_*: such an image is one part of something else.
REFUSED_FLAGS = (
    (1 << 32, "it is a seed for other devices"),
    (1 << 33, "it is a metadata dump without contents"),
    (1 << 34, "it is a metadata dump without contents"),
    (1 << 35, "a change of its UUID did not finish"),
    (1 << 36, "a change of its UUID did not finish"),
)


def check(head: bytes, size: int) -> FileSystem:
    """Judge the superblock in `head`, the first bytes of an image of `size` bytes."""
    sb = Fields("btrfs", head, START, "little")
    sb.bytes(0, LENGTH)
    # A copy of a mirror, which the kernel does not take for the primary superblock either.
    sb.require(sb.u64(48) == START, 48, "the superblock is meant for another place")  # bytenr
    flags = sb.u64(56)
    for flag, reason in REFUSED_FLAGS:
        sb.require(not flags & flag, 56, reason)

    devices = sb.u64(136)  # num_devices
    sb.require(devices == 1, 136, f"the file system has {devices} devices, of which only one can be given")

    sector_size, node_size = sb.u32(144), sb.u32(148)
    sb.require(
        is_power_of_two(sector_size) and 4096 <= sector_size <= MAXIMUM_BLOCK_SIZE,
        144,
        f"the sector size {sector_size} is not a power of two between 4096 and {MAXIMUM_BLOCK_SIZE}",
    )
    sb.require(
        is_power_of_two(node_size) and sector_size <= node_size <= MAXIMUM_BLOCK_SIZE,
        148,
        f"the node size {node_size} is not a power of two between the sector size and {MAXIMUM_BLOCK_SIZE}",
    )
    sb.require(sb.u32(160) <= SYSTEM_CHUNK_ARRAY_SIZE, 160, "the system chunk array is too large")

    total = sb.u64(112)  # total_bytes
    sb.require_size(total, size, 112)
    sb.require_size(sb.u64(209), size, 209)  # dev_item.total_bytes
    return FileSystem(
        type="btrfs",
        size=total,
        block_size=sector_size,
        uuid=sb.uuid(32),
        label=sb.label(299, 256),
        needs_recovery=sb.u64(96) != 0,  # log_root: fsync'd data is in the log tree only
    )
