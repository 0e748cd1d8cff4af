"""Signatures of `cosign sign-blob --key`: ECDSA on P-256 with SHA-256 over the image itself.

They come as base64, or in one of two bundles: cosign's own (`base64Signature`) and sigstore's
(`messageSignature`). Only the signature in a bundle is looked at; certificates and log entries in it stand
for signers without a key, which the policy cannot name.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from typing import TYPE_CHECKING

from mountd.errors import SignatureInvalid
from mountd.evidence import raw_signature

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mountd.evidence.content import Content
    from mountd.evidence.keys import Loaded
    from mountd.evidence.model import Signer
    from mountd.evidence.public_key import PublicKey


def is_bundle(body: Mapping[str, object]) -> bool:
    """Return whether the JSON object `body` is one of the two kinds of bundle."""
    return "base64Signature" in body or "messageSignature" in body


def verify(
    body: Mapping[str, object],
    keys: Sequence[Loaded[list[PublicKey]]],
    contents: Sequence[Content],
    now: int,
) -> Signer:
    """Return who has made the signature in the bundle `body` over one of `contents`.

    `keys` are of the kinds "sigstore" and "ecdsa". Raises SignatureInvalid.
    """
    message = body.get("messageSignature")
    if "messageSignature" in body:
        text = message.get("signature") if isinstance(message, dict) else None
    else:
        text = body.get("base64Signature")
    if not isinstance(text, str):
        raise SignatureInvalid("its bundle contains no signature by a key")
    try:
        data = b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SignatureInvalid("the signature in its bundle is not base64") from None
    if not raw_signature.is_ecdsa(data):
        raise SignatureInvalid("the signature in its bundle is not ECDSA")
    return raw_signature.verify(data, keys, contents, now)
