"""The superblock of dm-verity's hash data: what is let through, and that the rest is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mountd.errors import InvalidImage
from mountd.source.model import VeritySuperblock
from mountd.source.verity_superblock import DIGESTS, LENGTH, read, tree_blocks
from tests.superblock import FIELDS, superblock

DATA_SIZE = 300 * 4096
HASH_SIZE = (1 + 3 + 1) * 4096  # the superblock's block, three of leaves, one above them


def judge(raw: bytes, hash_size: int = HASH_SIZE, data_size: int = DATA_SIZE) -> VeritySuperblock:
    return read(lambda offset, length: raw[offset : offset + length], hash_size, data_size)


def test_good() -> None:
    assert judge(superblock()) == VeritySuperblock(
        data_block_size=4096,
        hash_block_size=4096,
        data_blocks=300,
        hash_start_block=1,
        algorithm="sha256",
        salt=b"abc",
        uuid="00010203-0405-0607-0809-0a0b0c0d0e0f",
    )


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"salt_size": 0}, 1),
        ({"salt_size": 256, "salt": b"x" * 256}, 1),
        ({"algorithm": b"sha512", "data_blocks": 1}, 1),
        ({"hash_block_size": 512, "data_blocks": 16}, 1),
        ({"data_block_size": 512, "hash_block_size": 1024}, 1),
        ({"uuid": bytes(16)}, 1),
    ],
)
def test_other_good_ones(changes: dict[str, object], start: int) -> None:
    found = judge(superblock(**changes))
    assert found.hash_start_block == start
    assert len(found.salt) == changes.get("salt_size", 3)


@pytest.mark.parametrize(
    ("changes", "offset", "reason"),
    [
        ({"signature": b"VERITY\0\0"}, 0, "does not begin with the superblock"),
        ({"version": 0}, 8, "version 0 is not 1"),
        ({"version": 2}, 8, "version 2 is not 1"),
        ({"hash_type": 0}, 12, "hash type 0 is not 1"),
        ({"algorithm": b"sha1"}, 32, "'sha1', not sha256 or sha512"),
        ({"algorithm": b""}, 32, "''"),
        ({"algorithm": b"sha256 x"}, 32, "'sha256 x'"),
        ({"algorithm": b"\xff" * 32}, 32, "the algorithm is"),
        ({"data_block_size": 0}, 64, "a block of 0 bytes"),
        ({"data_block_size": 256}, 64, "a block of 256 bytes"),
        ({"data_block_size": 3000}, 64, "a block of 3000 bytes"),
        ({"data_block_size": 65536}, 64, "a block of 65536 bytes"),
        ({"hash_block_size": 0}, 68, "a block of 0 bytes"),
        ({"hash_block_size": 1 << 31}, 68, "a block of 2147483648 bytes"),
        ({"data_blocks": 0}, 72, "no data blocks"),
        ({"data_blocks": 301}, 72, "for 301 blocks of 4096 bytes, the image only has 1228800 bytes"),
        ({"data_blocks": (1 << 64) - 1}, 72, "the image only has"),
        ({"salt_size": 257}, 80, "a salt of 257 bytes"),
        ({"algorithm": b"sha512"}, 72, "the hash tree takes 28672 bytes, the hash data only has 20480"),
    ],
)
def test_refused(changes: dict[str, object], offset: int, reason: str) -> None:
    with pytest.raises(InvalidImage, match=reason) as caught:
        judge(superblock(**changes))
    assert caught.value.parameters["offset"] == offset


@pytest.mark.parametrize("length", [0, 7, 8, 80, 511])
def test_cut_off(length: int) -> None:
    with pytest.raises(InvalidImage, match="verity hash data"):
        judge(superblock()[:length])


def test_sizes_at_their_edges() -> None:
    assert judge(superblock(), HASH_SIZE, DATA_SIZE + 4095)
    for hash_size, data_size in ((HASH_SIZE - 1, DATA_SIZE), (HASH_SIZE, DATA_SIZE - 1), (0, 0)):
        with pytest.raises(InvalidImage):
            judge(superblock(), hash_size, data_size)


def test_size_of_the_tree() -> None:
    assert tree_blocks(1, 4096, 32) == 0  # the root hash is that of the block itself
    assert tree_blocks(2, 4096, 32) == 1
    assert tree_blocks(128, 4096, 32) == 1
    assert tree_blocks(129, 4096, 32) == 2 + 1
    assert tree_blocks(128 * 128 + 1, 4096, 32) == 129 + 2 + 1
    assert tree_blocks((1 << 64) - 1, 512, 64) > 1 << 60  # in as many steps as there are levels


@given(st.binary(max_size=2 * LENGTH), st.integers(0, 1 << 63), st.integers(0, 1 << 63))
def test_never_anything_but_a_refusal(raw: bytes, hash_size: int, data_size: int) -> None:
    with pytest.raises(InvalidImage):
        judge(raw, hash_size, data_size)


@given(
    st.sampled_from(sorted(set(FIELDS) - {"signature"})),
    st.binary(min_size=256, max_size=256),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 40),
)
def test_what_is_let_through_is_bounded(name: str, value: bytes, hash_size: int, data_size: int) -> None:
    offset, format = FIELDS[name]
    raw = bytearray(superblock())
    length = struct.calcsize(format)
    raw[offset : offset + length] = value[:length]
    try:
        found = judge(bytes(raw), hash_size, data_size)
    except InvalidImage:
        return
    assert found.data_blocks * found.data_block_size <= data_size
    tree = tree_blocks(found.data_blocks, found.hash_block_size, DIGESTS[found.algorithm])
    assert (found.hash_start_block + tree) * found.hash_block_size <= hash_size
    assert len(found.salt) <= 256
