"""The superblock of erofs: struct erofs_super_block in the kernel's fs/erofs/erofs_fs.h."""

from __future__ import annotations

from mountd.source.fields import Fields
from mountd.source.model import FileSystem

START = 1024  # EROFS_SUPER_OFFSET

# All EROFS_FEATURE_INCOMPAT_* up to XATTR_PREFIXES. Later ones (48BIT, METABOX) change what the fields that
# are checked here mean, so that they cannot be passed on unread.
KNOWN_INCOMPAT = 0x7F


def check(head: bytes, size: int) -> FileSystem:
    """Judge the superblock in `head`, the first bytes of an image of `size` bytes."""
    sb = Fields("erofs", head, START, "little")
    bits = sb.u8(12)  # blkszbits
    sb.require(9 <= bits <= 16, 12, f"the block size is 2^{bits}, not between 512 and 65536")

    unknown = sb.u32(80) & ~KNOWN_INCOMPAT  # feature_incompat
    sb.require(unknown == 0, 80, f"unknown incompatible features 0x{unknown:x}")

    # extra_devices decides, not the feature bit DEVICE_TABLE: that is also COMPR_HEAD2, which images with
    # two compression algorithms have, and without extra devices the kernel opens none
    # (erofs_scan_devices()). It is refused without the feature bit, too: then no honest tool sets it.
    devices = sb.u16(86)
    sb.require(devices == 0, 86, f"the file system needs {devices} external devices, which are never opened")

    sb.require_size(sb.u32(36) << bits, size, 36)  # blocks
    return FileSystem(
        type="erofs",
        size=sb.u32(36) << bits,
        block_size=1 << bits,
        uuid=sb.uuid(48),
        label=sb.label(64, 16),
        needs_recovery=False,
    )
