"""Signatures that are nothing but a signature: Ed25519 and ECDSA, binary or in base64.

Made, for example, by `openssl pkeyutl -sign -rawin` (Ed25519, over the digits of a digest: content.py) or
by `openssl dgst -sha256 -sign` (ECDSA, over these or over the image itself). Nothing in them says whose they
are, so that each key is tried, and a foreign one cannot be told from a wrong image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from mountd.errors import SignatureInvalid
from mountd.evidence import der, public_key
from mountd.evidence.model import Signer
from mountd.evidence.public_key import CURVES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.evidence.content import Content
    from mountd.evidence.keys import Loaded
    from mountd.evidence.public_key import PublicKey

ED25519_LENGTH = 64
MAXIMUM_ECDSA_LENGTH = 139  # a SEQUENCE of two INTEGERs of 521 bits


def is_ecdsa(data: bytes) -> bool:
    """Return whether `data` is an Ecdsa-Sig-Value (RFC 3279, 2.2.3): a SEQUENCE of two INTEGERs."""
    if len(data) > MAXIMUM_ECDSA_LENGTH:
        return False
    try:
        outer = der.Reader(data)
        reader = outer.take(der.SEQUENCE).reader()
        outer.end()
        reader.take(der.INTEGER)
        reader.take(der.INTEGER)
        reader.end()
    except der.DerError:
        return False
    return True


def verify(
    data: bytes, keys: Sequence[Loaded[list[PublicKey]]], contents: Sequence[Content], now: int
) -> Signer:
    """Return who has made the signature `data` over one of `contents`.

    `keys` are of the kinds "ed25519", "ecdsa" and "sigstore"; such keys have no validity, so that `now` is
    not looked at. ECDSA goes with SHA-256, or with the hash of the length of its curve. Raises
    SignatureInvalid.
    """
    wanted = ed25519.Ed25519PublicKey if len(data) == ED25519_LENGTH else ec.EllipticCurvePublicKey
    for loaded in keys:
        for key in loaded.value:
            if not isinstance(key, wanted):
                continue
            algorithms = {"sha256"}
            if isinstance(key, ec.EllipticCurvePublicKey):
                algorithms.add(CURVES[key.curve.name])
            for content in contents:
                if any(public_key.made(key, data, content.payload, each) for each in algorithms):
                    return Signer(loaded.name, public_key.fingerprint(key), content.covers, content.digest)
    names = ", ".join(loaded.name for loaded in keys)
    raise SignatureInvalid(
        f"none of the keys that count ({names}) has made it over this image",
        hint="sign the hexadecimal digits of the digest, without a newline",
    )
