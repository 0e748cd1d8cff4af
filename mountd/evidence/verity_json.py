"""The signature partition of a disk image (Discoverable Partitions Specification): JSON around a PKCS#7.

Its members are `rootHash` (hexadecimal), `signature` (PKCS#7 in base64), and `certificateFingerprint`
(SHA-256 of the signer's certificate in DER, hexadecimal), which need not be there.
"""

from __future__ import annotations

import binascii
import hashlib
from base64 import b64decode
from typing import TYPE_CHECKING

from mountd.errors import SignatureInvalid
from mountd.evidence import pkcs7

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mountd.evidence.certificate import Certificate
    from mountd.evidence.content import Content
    from mountd.evidence.keys import Loaded
    from mountd.evidence.model import Signer


def is_verity_signature(body: Mapping[str, object]) -> bool:
    """Return whether the JSON object `body` is meant as one."""
    return "rootHash" in body


def verify(
    body: Mapping[str, object],
    keys: Sequence[Loaded[list[Certificate]]],
    contents: Sequence[Content],
    now: int,
) -> Signer:
    """Return who has signed the root hash in `body`, which has to be that of one of `contents`.

    `keys` are of the kind "x509". Raises SignatureInvalid and KeyUnknown.
    """
    root_hash, text = body["rootHash"], body.get("signature")
    if not isinstance(root_hash, str) or not isinstance(text, str):
        raise SignatureInvalid("its JSON lacks rootHash or signature, or one of them is not a string")
    fingerprint = body.get("certificateFingerprint")
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise SignatureInvalid("the certificateFingerprint in its JSON is not a string")
    meant = [each for each in contents if each.covers == "root-hash" and _digits(each) == root_hash.lower()]
    if not meant:
        raise SignatureInvalid("the rootHash in its JSON is not that of this image")
    try:
        data = b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SignatureInvalid("the signature in its JSON is not base64") from None
    signer, certificate = pkcs7.verify_with_certificate(data, keys, meant, now)
    found = hashlib.sha256(certificate.raw).hexdigest()
    if fingerprint is not None and fingerprint.lower() != found:
        raise SignatureInvalid("the certificateFingerprint in its JSON is not that of its signer")
    return signer


def _digits(content: Content) -> str:
    return content.digest.partition(":")[2]
