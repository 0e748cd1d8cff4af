"""dm-verity as a kind of immutability: a root hash that the kernel checks every block against.

Nothing about the image's file has to hold. Whoever gave it may change it, and its hash data, at any time:
it is read through a device that mountd makes itself (`execute.verity`), and what comes out of that device
is the bytes that the root hash was made from, or EIO. So the proof is not about the file but about the
mount, and counts on one condition that the plan has to keep: the superblock is made with Backing.VERITY
and this very root hash.

What has to be shown here is only that such a device can be meant by it: the root hash is one of the
superblock's algorithm, and the superblock fits both files, as `source.verity_superblock.read` has
checked. What the root hash is worth is another question: it is the caller's own claim until a signature
over it makes it more than that. The proof carries it as its digest for exactly that purpose.

A root hash covers neither the superblock nor the file system's type. What was recognised in the image
before may not be what is there later; it is only ever a choice of which file system to try.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.evidence.model import Proof

if TYPE_CHECKING:
    from mountd.source.model import VeritySuperblock

KIND = "dm-verity"
LENGTHS = {"sha256": 32, "sha512": 64}


def prove(superblock: VeritySuperblock, root_hash: bytes) -> Proof | str:
    """Return the proof that a device with this root hash would be, or the reason why it is none.

    Raises nothing.
    """
    wanted = LENGTHS.get(superblock.algorithm)
    if wanted is None:
        return f"its hash algorithm {superblock.algorithm} is not trusted"
    if len(root_hash) != wanted:
        return f"its root hash has {len(root_hash)} bytes, {superblock.algorithm} has {wanted}"
    return Proof(KIND, f"{superblock.algorithm}:{root_hash.hex()}")
