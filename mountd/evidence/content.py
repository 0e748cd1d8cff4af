"""What a signature of an image is over: the few short texts that stand for its contents.

In each kind of signature, what is signed of an image is one of

* the digest as text: its lower-case hexadecimal digits in ASCII, without a newline and without the name of
  the algorithm. This is what systemd signs of a dm-verity root hash (`.roothash.p7s`), and the same is done
  with the digest of the image's bytes and with its fs-verity digest;
* for fs-verity, also what the kernel has signed: `struct fsverity_formatted_digest` of
  <linux/fsverity.h>, which is "FSVerity", the algorithm and the size as 16-bit little-endian numbers, and
  the digest;
* the bytes of the image themselves, where the signature is over a hash that is known already.

The same text may come from two kinds of digest, and then the signature holds for both. Whoever wants to use
that has to make an image whose one digest is the other digest of somebody else's image.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

COVERS = ("image", "root-hash", "fs-verity")
LENGTHS = {"sha256": 32, "sha384": 48, "sha512": 64}  # bytes of the digests that count
FS_VERITY_NUMBERS = {"sha256": 1, "sha512": 2}  # FS_VERITY_HASH_ALG_*
MAXIMUM_DIGESTS = 8
DIGEST = re.compile(r"(sha256|sha384|sha512):([0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class Payload:
    """What a signature is over: all of it, `data`, or the one digest (algorithm, bytes) that is known."""

    data: bytes | None
    hashed: tuple[str, bytes] | None = None

    def hash(self, algorithm: str) -> bytes | None:
        """Return its hash by `algorithm` (as in LENGTHS), None if that cannot be known."""
        if self.data is not None:
            return hashlib.new(algorithm, self.data).digest()
        if self.hashed is not None and self.hashed[0] == algorithm:
            return self.hashed[1]
        return None


@dataclass(frozen=True, slots=True)
class Content:
    """One thing that may have been signed, for the digest `digest` of what `covers` names."""

    covers: str
    digest: str
    payload: Payload


def signable(digests: Sequence[tuple[str, str]]) -> tuple[Content, ...]:
    """Return all that may have been signed of an image with the digests (covers, "ALGORITHM:HEX").

    Raises ValueError for a digest that is none: digests are made by mountd itself.
    """
    if len(digests) > MAXIMUM_DIGESTS:
        raise ValueError(f"more than {MAXIMUM_DIGESTS} digests")
    found: list[Content] = []
    for covers, digest in digests:
        if covers not in COVERS or not is_digest(digest):
            raise ValueError(f"no digest of an image: {covers} {digest!r}")
        algorithm, _, digits = digest.partition(":")
        raw = bytes.fromhex(digits)
        found.append(Content(covers, digest, Payload(digits.encode())))
        if covers == "fs-verity" and algorithm in FS_VERITY_NUMBERS:
            found.append(Content(covers, digest, Payload(formatted_digest(algorithm, raw))))
        elif covers == "image":
            found.append(Content(covers, digest, Payload(None, (algorithm, raw))))
    return tuple(found)


def is_digest(text: str) -> bool:
    """Tell whether this is a whole digest, as "ALGORITHM:HEX"."""
    match = DIGEST.fullmatch(text)
    return match is not None and len(match[2]) == 2 * LENGTHS[match[1]]


def formatted_digest(algorithm: str, raw: bytes) -> bytes:
    """Return struct fsverity_formatted_digest. Raises KeyError for an algorithm that fs-verity lacks."""
    number = FS_VERITY_NUMBERS[algorithm]
    return b"FSVerity" + number.to_bytes(2, "little") + len(raw).to_bytes(2, "little") + raw
