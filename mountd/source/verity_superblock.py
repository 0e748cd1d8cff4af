"""The superblock of dm-verity's hash data, as veritysetup(8) writes it (struct verity_sb of libcryptsetup).

It says how the hash tree was made, and nothing vouches for it: a root hash covers the blocks and the salt
that was put before each, and not the numbers here. So only what veritysetup makes is let through, and it
has to fit the files. A lie about the rest makes the checks fail, except for one about the number of
blocks, which shifts what counts as data: with fewer than there were, the device ends early, or shows
hashes as if they were data; with more, data is taken for hashes. For that to become another file system,
the image's first block or a block of hashes would have to be what the liar needs, and neither is his to
choose: the one is the superblock that was there, the other comes from a hash function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.source.fields import Fields, is_power_of_two
from mountd.source.model import VeritySuperblock

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH = 512
MAGIC = b"verity\0\0"
MAXIMUM_SALT = 256
MAXIMUM_BLOCK = 4096  # the kernel takes no block that is larger than a page, and most pages are of this size

# Bytes of a digest, by the algorithm's name. With another algorithm, a digest that is as long would mean
# something else: a root hash is "sha256:…" or "sha512:…".
DIGESTS = {"sha256": 32, "sha512": 64}


def read(read: Callable[[int, int], bytes], hash_size: int, data_size: int) -> VeritySuperblock:
    """Judge the superblock at the beginning of hash data of `hash_size` bytes for data of `data_size` bytes.

    `read(offset, length)` returns the bytes of the hash data there, fewer only at its end; it is called
    once. Raises InvalidImage, and what `read` raises.
    """
    sb = Fields("verity hash data", read(0, LENGTH), 0, "little")
    sb.require(sb.bytes(0, 8) == MAGIC, 0, "it does not begin with the superblock that veritysetup writes")
    sb.bytes(0, LENGTH)
    version, hash_type = sb.u32(8), sb.u32(12)
    sb.require(version == 1, 8, f"version {version} is not 1")
    sb.require(hash_type == 1, 12, f"hash type {hash_type} is not 1")

    raw = sb.bytes(32, 32)
    algorithm = raw.split(b"\0", 1)[0].decode("ascii", "replace")
    sb.require(algorithm in DIGESTS, 32, f"the algorithm is {algorithm!r}, not {' or '.join(DIGESTS)}")

    data_block, hash_block = sb.u32(64), sb.u32(68)
    for offset, block in ((64, data_block), (68, hash_block)):
        good = is_power_of_two(block) and LENGTH <= block <= MAXIMUM_BLOCK
        sb.require(
            good, offset, f"a block of {block} bytes is no power of two between 512 and {MAXIMUM_BLOCK}"
        )

    salt_size = sb.u16(80)
    sb.require(salt_size <= MAXIMUM_SALT, 80, f"a salt of {salt_size} bytes is longer than {MAXIMUM_SALT}")

    data_blocks = sb.u64(72)
    sb.require(data_blocks > 0, 72, "it has no data blocks")
    sb.require(
        data_blocks <= data_size // data_block,
        72,
        f"it is for {data_blocks} blocks of {data_block} bytes, the image only has {data_size} bytes",
    )
    start = -(-LENGTH // hash_block)
    needed = (start + tree_blocks(data_blocks, hash_block, DIGESTS[algorithm])) * hash_block
    sb.require(
        needed <= hash_size, 72, f"the hash tree takes {needed} bytes, the hash data only has {hash_size}"
    )
    return VeritySuperblock(
        data_block_size=data_block,
        hash_block_size=hash_block,
        data_blocks=data_blocks,
        hash_start_block=start,
        algorithm=algorithm,
        salt=sb.bytes(88, salt_size),
        uuid=sb.uuid(16),
    )


def tree_blocks(data_blocks: int, hash_block: int, digest: int) -> int:
    """Return how many hash blocks the tree over `data_blocks` takes, all levels together.

    One hash block has as many digests of `digest` bytes as fit, rounded down to a power of two (of these
    sizes, nothing is rounded).
    """
    per_block = hash_block // digest
    total, level = 0, data_blocks
    while level > 1:
        level = -(-level // per_block)
        total += level
    return total
