"""The algorithms of certificates and PKCS#7: those that count, and the names of others.

From RFC 5754 (RSA and ECDSA in CMS), RFC 8419 (Ed25519 in CMS) and RFC 8410.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

if TYPE_CHECKING:
    from mountd.evidence.public_key import PublicKey

DIGESTS = {
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
    "2.16.840.1.101.3.4.2.3": "sha512",
}
# Of a signature: the kind of key, and the hash if the name says it. Ed25519 has one of its own.
SIGNATURES: dict[str, tuple[type[PublicKey], str | None]] = {
    "1.2.840.113549.1.1.1": (rsa.RSAPublicKey, None),
    "1.2.840.113549.1.1.11": (rsa.RSAPublicKey, "sha256"),
    "1.2.840.113549.1.1.12": (rsa.RSAPublicKey, "sha384"),
    "1.2.840.113549.1.1.13": (rsa.RSAPublicKey, "sha512"),
    "1.2.840.10045.2.1": (ec.EllipticCurvePublicKey, None),
    "1.2.840.10045.4.3.2": (ec.EllipticCurvePublicKey, "sha256"),
    "1.2.840.10045.4.3.3": (ec.EllipticCurvePublicKey, "sha384"),
    "1.2.840.10045.4.3.4": (ec.EllipticCurvePublicKey, "sha512"),
    "1.3.101.112": (ed25519.Ed25519PublicKey, None),
}
REFUSED = {
    "1.2.840.113549.2.5": "MD5",
    "1.3.14.3.2.26": "SHA-1",
    "2.16.840.1.101.3.4.2.4": "SHA-224",
    "1.2.840.113549.1.1.4": "RSA with MD5",
    "1.2.840.113549.1.1.5": "RSA with SHA-1",
    "1.2.840.113549.1.1.14": "RSA with SHA-224",
    "1.2.840.113549.1.1.10": "RSA-PSS",
    "1.2.840.10045.4.1": "ECDSA with SHA-1",
    "1.2.840.10045.4.3.1": "ECDSA with SHA-224",
    "1.2.840.10040.4.1": "DSA",
    "1.2.840.10040.4.3": "DSA with SHA-1",
    "2.16.840.1.101.3.4.3.2": "DSA with SHA-256",
    "1.3.101.113": "Ed448",
}


class RefusedAlgorithm(Exception):
    """An algorithm that does not count; the text names it."""


def digest_algorithm(identifier: str) -> str:
    """Return the name of a hash that counts, as in hashlib. Raises RefusedAlgorithm."""
    if identifier not in DIGESTS:
        raise RefusedAlgorithm(
            f"the hash {named(identifier)}, where it has to be SHA-256, SHA-384 or SHA-512"
        )
    return DIGESTS[identifier]


def signature_hash(identifier: str, key: PublicKey, digest: str | None) -> str:
    """Return the hash of a signature by `key`, whose algorithm is `identifier`.

    `digest` is the hash that was named beside it, None if none was. Raises RefusedAlgorithm for one that
    does not count, that is not the key's, or that contradicts `digest`.
    """
    if identifier not in SIGNATURES:
        wanted = "RSA, ECDSA or Ed25519 with SHA-256, SHA-384 or SHA-512"
        raise RefusedAlgorithm(f"the algorithm {named(identifier)}, where it has to be {wanted}")
    kind, said = SIGNATURES[identifier]
    if not isinstance(key, kind):
        raise RefusedAlgorithm(f"the algorithm {identifier}, which is not that of its key")
    if kind is ed25519.Ed25519PublicKey:
        return digest or "sha512"
    hashed = said or digest
    if hashed is None or digest not in (None, hashed):
        raise RefusedAlgorithm(f"the algorithm {identifier}, which does not fit its hash")
    return hashed


def named(identifier: str) -> str:
    """Return what people call the algorithm."""
    return REFUSED.get(identifier, identifier)
