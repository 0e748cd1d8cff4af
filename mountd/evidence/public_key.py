"""Public keys: which are strong enough, and whether one of them has made a signature.

RSA of at least 2048 bits with PKCS #1 v1.5 padding, ECDSA on P-256, P-384 and P-521, Ed25519; hashed with
SHA-256, SHA-384 or SHA-512. Everything else is refused.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)

if TYPE_CHECKING:
    from mountd.evidence.content import Payload

    PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

HASHES: dict[str, hashes.HashAlgorithm] = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}
CURVES = {"secp256r1": "sha256", "secp384r1": "sha384", "secp521r1": "sha512"}  # and the hash of each
MINIMUM_RSA_BITS = 2048
MAXIMUM_RSA_BITS = 8192  # the time for a check grows with the square


class WeakKey(Exception):
    """A key that is too weak, or of a kind that does not count; the text says so."""


def accepted(key: object) -> PublicKey:
    """Return `key` if signatures by it count. Raises WeakKey."""
    if isinstance(key, rsa.RSAPublicKey):
        if not MINIMUM_RSA_BITS <= key.key_size <= MAXIMUM_RSA_BITS:
            limits = f"{MINIMUM_RSA_BITS} to {MAXIMUM_RSA_BITS}"
            raise WeakKey(f"an RSA key of {key.key_size} bits, where it has to be {limits}")
        return key
    if isinstance(key, ec.EllipticCurvePublicKey):
        if key.curve.name not in CURVES:
            raise WeakKey(f"a key on the curve {key.curve.name}, where it has to be P-256, P-384 or P-521")
        return key
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    raise WeakKey("a key that is neither RSA nor ECDSA nor Ed25519")


def load(data: bytes) -> PublicKey:
    """Return the public key that `data` is, a SubjectPublicKeyInfo in PEM or DER. Raises WeakKey."""
    try:
        pem = data.lstrip().startswith(b"-----BEGIN")
        key = load_pem_public_key(data) if pem else load_der_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise WeakKey("no public key in PEM or DER") from None
    return accepted(key)


def fingerprint(key: PublicKey) -> str:
    """Return what names the key: "SHA256:HEX" of its SubjectPublicKeyInfo."""
    info = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return "SHA256:" + hashlib.sha256(info).hexdigest()


def made(key: PublicKey, signature: bytes, payload: Payload, algorithm: str) -> bool:
    """Return whether `key` has made `signature` over `payload`, hashed by `algorithm`.

    Ed25519 does its own hashing, so that `algorithm` is not looked at, and of the image it needs all bytes.
    """
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            if payload.data is None:
                return False
            key.verify(signature, payload.data)
            return True
        hashed = payload.hash(algorithm)
        if hashed is None:
            return False
        prehashed = utils.Prehashed(HASHES[algorithm])
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, hashed, padding.PKCS1v15(), prehashed)
        else:
            key.verify(signature, hashed, ec.ECDSA(prehashed))
    except (InvalidSignature, ValueError):
        return False
    return True
