"""What a root hash proves, as far as that can be said without a kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mountd.evidence.dm_verity import prove
from mountd.evidence.model import Proof
from mountd.source.model import VeritySuperblock

SUPERBLOCK = VeritySuperblock(4096, 4096, 300, 1, "sha256", b"salt", None)


def test_the_root_hash_is_the_digest() -> None:
    assert prove(SUPERBLOCK, b"\xab" * 32) == Proof("dm-verity", "sha256:" + "ab" * 32)
    long = replace(SUPERBLOCK, algorithm="sha512")
    assert prove(long, b"\xcd" * 64) == Proof("dm-verity", "sha512:" + "cd" * 64)


@pytest.mark.parametrize(
    ("algorithm", "length", "reason"),
    [
        ("sha256", 0, "its root hash has 0 bytes, sha256 has 32"),
        ("sha256", 31, "its root hash has 31 bytes"),
        ("sha256", 64, "its root hash has 64 bytes"),
        ("sha512", 32, "its root hash has 32 bytes, sha512 has 64"),
        ("sha1", 20, "its hash algorithm sha1 is not trusted"),
    ],
)
def test_no_proof(algorithm: str, length: int, reason: str) -> None:
    said = prove(replace(SUPERBLOCK, algorithm=algorithm), bytes(length))
    assert isinstance(said, str)
    assert reason in said
