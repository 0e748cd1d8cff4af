"""Detached signatures: which kind one is, and who has made it over an image.

The kind is told by the bytes, never by a name. What is signed is the same for all kinds (content.py). Each
kind has its module, and each module raises SignatureInvalid and KeyUnknown with a reason of one line.

Reading a signature that anybody may have made belongs into a process that can do no harm:
`confined_signature.verify` is what is called for a request.
"""

from __future__ import annotations

import binascii
import json
import re
from base64 import b64decode
from typing import TYPE_CHECKING

from mountd.errors import SignatureInvalid
from mountd.evidence import gpg, keys, openpgp, pkcs7, raw_signature, sigstore, verity_json
from mountd.evidence.content import signable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.evidence.content import Content
    from mountd.evidence.model import Key, Signer

MAXIMUM_SIGNATURE = 256 << 10  # bytes
MAXIMUM_BRACKETS = 64  # in JSON; a bundle has a dozen
PEM = re.compile(rb"-----BEGIN (PKCS7|CMS)-----\r?\n([A-Za-z0-9+/=\r\n]*)-----END \1-----\s*")
WHITE = b" \t\r\n"


def verify(
    signature: bytes, accepted: Sequence[Key], digests: Sequence[tuple[str, str]], now: int
) -> Signer:
    """Return who has made `signature` over one of `digests` of an image, with one of the keys `accepted`.

    Each digest is what it is of ("image", "root-hash", "fs-verity") and "ALGORITHM:HEX"; `now` is in seconds
    since the epoch. Raises SignatureInvalid, KeyUnknown, NotSupported where gpgv is missing, and ValueError
    for digests that are none.
    """
    contents = signable(digests)
    check_size(signature)
    if len(signature) == raw_signature.ED25519_LENGTH:
        # Its bytes are random, and may begin as any other kind does; none of those is as short as this.
        return _verify_ed25519(signature, accepted, contents, now)
    if openpgp.is_signature(signature):
        rings = keys.usable(accepted, ("gpg",), keys.keyring, "an OpenPGP signature")
        return gpg.verify(signature, rings, contents, now)
    if signature.lstrip(WHITE).startswith(b"{"):
        return _verify_json(signature, accepted, contents, now)
    data = _binary(signature)
    if len(data) == raw_signature.ED25519_LENGTH:
        return _verify_ed25519(data, accepted, contents, now)
    if raw_signature.is_ecdsa(data):
        found = keys.usable(accepted, ("ecdsa", "sigstore"), keys.public_keys, "an ECDSA signature")
        return raw_signature.verify(data, found, contents, now)
    if data[:1] == b"\x30":
        anchors = keys.usable(accepted, ("x509",), keys.certificates, "a PKCS#7 signature")
        return pkcs7.verify(data, anchors, contents, now)
    raise SignatureInvalid(
        "it is not of a known kind",
        hint="PKCS#7, OpenPGP, sigstore, Ed25519 and ECDSA signatures count, if they are detached",
    )


def check_size(signature: bytes) -> None:
    """Have a signature be of a size that is read at all. Raises SignatureInvalid."""
    if not signature:
        raise SignatureInvalid("it is empty")
    if len(signature) > MAXIMUM_SIGNATURE:
        raise SignatureInvalid(f"it has more than {MAXIMUM_SIGNATURE} bytes")


def _verify_ed25519(data: bytes, accepted: Sequence[Key], contents: Sequence[Content], now: int) -> Signer:
    found = keys.usable(accepted, ("ed25519",), keys.public_keys, "an Ed25519 signature")
    return raw_signature.verify(data, found, contents, now)


def _verify_json(signature: bytes, accepted: Sequence[Key], contents: Sequence[Content], now: int) -> Signer:
    body = _object(signature)
    if verity_json.is_verity_signature(body):
        anchors = keys.usable(accepted, ("x509",), keys.certificates, "a PKCS#7 signature")
        return verity_json.verify(body, anchors, contents, now)
    if sigstore.is_bundle(body):
        found = keys.usable(accepted, ("sigstore", "ecdsa"), keys.public_keys, "a sigstore bundle")
        return sigstore.verify(body, found, contents, now)
    raise SignatureInvalid("its JSON is neither a verity signature nor a sigstore bundle")


def _object(signature: bytes) -> dict[str, object]:
    """Read JSON. The partition that it comes from may be longer, and is filled up with NULs."""
    text = signature.rstrip(b"\0")
    if text.count(b"{") + text.count(b"[") > MAXIMUM_BRACKETS:
        raise SignatureInvalid(f"its JSON has more than {MAXIMUM_BRACKETS} brackets")
    try:
        body: object = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except ValueError:
        raise SignatureInvalid("its JSON cannot be read") from None
    if not isinstance(body, dict):
        raise SignatureInvalid("its JSON is not an object")
    return body


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise SignatureInvalid("its JSON has the same key twice in an object")
    return made


def _binary(signature: bytes) -> bytes:
    """Return the signature itself: what is in PEM or in base64, or all of it."""
    match = PEM.fullmatch(signature.lstrip(WHITE))
    text = match[2] if match else signature
    try:
        return b64decode(text.translate(None, WHITE), validate=True)
    except (binascii.Error, ValueError):
        if match:
            raise SignatureInvalid("its PEM is damaged") from None
        return signature
