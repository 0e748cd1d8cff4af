"""The superblock of dm-verity's hash data, with whatever a test wants in it."""

from __future__ import annotations

import struct

from mountd.source.verity_superblock import LENGTH

UUID = bytes(range(16))
# By name: offset, format. The offsets are those of struct verity_sb.
FIELDS = {
    "signature": (0, "8s"),
    "version": (8, "<I"),
    "hash_type": (12, "<I"),
    "uuid": (16, "16s"),
    "algorithm": (32, "32s"),
    "data_block_size": (64, "<I"),
    "hash_block_size": (68, "<I"),
    "data_blocks": (72, "<Q"),
    "salt_size": (80, "<H"),
    "salt": (88, "256s"),
}
GOOD: dict[str, object] = {
    "signature": b"verity\0\0",
    "version": 1,
    "hash_type": 1,
    "uuid": UUID,
    "algorithm": b"sha256",
    "data_block_size": 4096,
    "hash_block_size": 4096,
    "data_blocks": 300,
    "salt_size": 3,
    "salt": b"abc",
}


def superblock(**changes: object) -> bytes:
    raw = bytearray(LENGTH)
    for name, value in {**GOOD, **changes}.items():
        offset, format = FIELDS[name]
        struct.pack_into(format, raw, offset, value)
    return bytes(raw)
