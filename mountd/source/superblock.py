"""What file system an image holds: exactly one, one that is mounted, and one that fits its image.

The kernel is told the type and never guesses, so the guess is made here, without trusting anything:

1. All known signatures are looked for, those of what is never mounted included (`signatures`). Two of them
   in one image are a refusal, as two programs could then take the image for two different things.
2. The superblock of the one that was found is judged by its own module: its sizes, which must not exceed the
   image, and whatever would make the kernel open another device.

Checksums are not compared: they show damage, which the kernel notices itself, and no malice.

All of it works on bytes that were read once, at most `MAXIMUM_READ` of them, and does nothing but compare
numbers. It raises `InvalidImage` and `UnsupportedFileSystem` only, and lets through what `read` raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.errors import InvalidImage, UnsupportedFileSystem
from mountd.source import btrfs, erofs, ext4, squashfs, xfs
from mountd.source.signatures import Image, find

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from mountd.source.model import FileSystem

MAXIMUM_READ = 128 << 10
GPT = "gpt"

CHECKS: dict[str, Callable[[bytes, int], FileSystem]] = {
    "btrfs": btrfs.check,
    "erofs": erofs.check,
    "ext4": ext4.check,
    "squashfs": squashfs.check,
    "xfs": xfs.check,
}

# How to name what is recognised and not mounted, where the type alone would not say it.
DESCRIPTIONS = {
    "gpt": "a disk image with a partition table (GPT)",
    "dos": "a disk image with a partition table (MBR)",
    "crypto_LUKS": "an encrypted LUKS volume",
    "BitLocker": "an encrypted BitLocker volume",
    "LVM2_member": "a physical volume of LVM2",
    "linux_raid_member": "a member of a Linux software RAID",
    "zfs_member": "a member of a ZFS pool",
    "swap": "swap space",
    "DM_verity_hash": "a dm-verity hash tree without its data",
    "DM_integrity": "a dm-integrity volume",
    "DM_snapshot_cow": "a device mapper snapshot store",
    "qcow2": "a qcow2 disk image",
    "vmdk": "a VMDK disk image",
    "vhdx": "a VHDX disk image",
}
# As images are kept and sent, and not mounted: mkosi's CompressOutput= makes such files.
COMPRESSED = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"\x1f\x8b\x08": "gzip"}


def recognise(read: Callable[[int, int], bytes], size: int) -> FileSystem:
    """Return the file system in an image of `size` bytes.

    `read(offset, length)` returns the bytes there, fewer than `length` only at the end of the image.
    Raises InvalidImage if there are two file systems or if the one does not hold together, and
    UnsupportedFileSystem if there is none or one that is not mounted.
    """
    found = recognise_unless_disk(read, size)
    if found is None:
        refuse_type(GPT)
    return found


def recognise_unless_disk(read: Callable[[int, int], bytes], size: int) -> FileSystem | None:
    """As `recognise`, but return None for an image with a GPT that could be nothing else."""
    image = Image(read, size)
    found = find(image)
    if not found:
        raise UnsupportedFileSystem(nothing_found(image))
    if len(found) > 1:
        signs = " and ".join(f"{signature.type} at byte {signature.offset}" for signature in found)
        raise InvalidImage(f"ambiguous contents: {signs}", offset=found[1].offset)
    type = found[0].type
    if type == GPT:
        return None
    if type not in CHECKS:
        refuse_type(type)
    return CHECKS[type](image.head, size)


def refuse_type(type: str) -> NoReturn:
    """Raise UnsupportedFileSystem for what is not mounted."""
    raise UnsupportedFileSystem(
        f"the image is {DESCRIPTIONS.get(type, type)}, which is not mounted; "
        f"only {', '.join(sorted(CHECKS))} are",
        file_system_type=type,
    )


def nothing_found(image: Image) -> str:
    """Say that nothing was recognised, and why that may be."""
    if not image.size:
        return "the image is empty"
    if not any(image.head):
        return f"the image starts with {len(image.head)} zero bytes, where a superblock would be"
    if image.head.startswith(b'{"rootHash"'):
        return "the image is the signature of a root hash, for an image with hash data, and none itself"
    for magic, program in COMPRESSED.items():
        if image.head.startswith(magic):
            return f"the image is compressed, with {program}; it has to be unpacked first"
    return "the image has no signature of a known file system"
