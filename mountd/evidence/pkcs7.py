"""Detached PKCS#7 signatures: `.roothash.p7s` as systemd has it, and the same over the other digests.

Made, for example, by `openssl smime -sign -binary -noattr -nocerts` (the certificate is the policy's own) or
by `openssl cms -sign -binary` (certificates come along, and lead to one of the policy's). The signer's
certificate has to be one of the key's or be issued by one, directly or by way of certificates in the message
(`certificate.chain`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mountd.errors import KeyUnknown, SignatureInvalid
from mountd.evidence import certificate, cms, public_key
from mountd.evidence.algorithms import RefusedAlgorithm, digest_algorithm, signature_hash
from mountd.evidence.certificate import CertificateError
from mountd.evidence.content import LENGTHS, Payload
from mountd.evidence.model import Signer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.evidence.certificate import Certificate
    from mountd.evidence.cms import SignedData
    from mountd.evidence.content import Content
    from mountd.evidence.keys import Loaded


def verify(
    data: bytes, keys: Sequence[Loaded[list[Certificate]]], contents: Sequence[Content], now: int
) -> Signer:
    """Return who has made the signature `data` (DER) over one of `contents`.

    `keys` are of the kind "x509". Raises SignatureInvalid and KeyUnknown.
    """
    return verify_with_certificate(data, keys, contents, now)[0]


def verify_with_certificate(
    data: bytes, keys: Sequence[Loaded[list[Certificate]]], contents: Sequence[Content], now: int
) -> tuple[Signer, Certificate]:
    """Do as `verify` does, and return the signer's certificate, too."""
    try:
        signed = cms.read(data)
        hashed = digest_algorithm(signed.digest_algorithm)
        key, signer = _find_signer(signed, keys, now)
        algorithm = signature_hash(signed.signature_algorithm, signer.key, hashed)
    except (cms.CmsError, CertificateError) as error:
        raise SignatureInvalid(str(error)) from None
    except RefusedAlgorithm as error:
        raise SignatureInvalid(f"it uses {error}") from None
    content = _find_content(signed, signer, contents, algorithm)
    made = Signer(key, signer.name, content.covers, content.digest, valid_until=signer.not_after)
    return made, signer


def _find_signer(
    signed: SignedData, keys: Sequence[Loaded[list[Certificate]]], now: int
) -> tuple[str, Certificate]:
    """Return the name of the key that vouches for the signer, and the signer's certificate."""
    came_along = [certificate.read(raw) for raw in signed.certificates]
    problem: CertificateError | None = None
    signer: Certificate | None = None
    for loaded in keys:
        for signer in (each for each in (*loaded.value, *came_along) if _is_named(each, signed)):
            try:
                if certificate.chain(signer, loaded.value, came_along, now):
                    return loaded.name, signer
            except CertificateError as error:
                problem = problem or error
    if problem is not None:
        raise problem
    names = ", ".join(loaded.name for loaded in keys)
    if signer is not None:
        # mkosi, for one, gives the same name to every key that it makes.
        alike = any(each.name == signer.name for loaded in keys for each in loaded.value)
        raise KeyUnknown(
            f"no certificate of the keys that count ({names}) leads to its signer, {signer.name}"
            + (" (another one of that name is among them)" if alike else ""),
            hint="have it signed by one of them, or name the signer's authority in the policy",
        )
    raise KeyUnknown(
        f"its signer's certificate neither came with it nor is one of the keys that count ({names})",
        hint="leave out -nocerts when signing, or name the signer's certificate in the policy",
    )


def _is_named(candidate: Certificate, signed: SignedData) -> bool:
    if signed.identifier is not None:
        return candidate.identifier == signed.identifier
    return (candidate.issuer, candidate.serial) == (signed.issuer, signed.serial)


def _find_content(
    signed: SignedData, signer: Certificate, contents: Sequence[Content], algorithm: str
) -> Content:
    """Return which of `contents` was signed, after checking that it was. Raises SignatureInvalid."""
    if signed.attributes is None:
        for content in contents:
            if public_key.made(signer.key, signed.signature, content.payload, algorithm):
                return content
        raise SignatureInvalid(
            f"{signer.name} has not signed this image, or the signature is damaged", hint=_hint(contents)
        )
    hashed = digest_algorithm(signed.digest_algorithm)
    if not public_key.made(signer.key, signed.signature, Payload(signed.attributes), algorithm):
        raise SignatureInvalid(f"it is damaged: it does not fit the public key of {signer.name}")
    if len(signed.message_digest or b"") != LENGTHS[hashed]:
        raise SignatureInvalid("its messageDigest does not have the length of its hash")
    for content in contents:
        if content.payload.hash(hashed) == signed.message_digest:
            return content
    raise SignatureInvalid(f"{signer.name} has signed something else than this image", hint=_hint(contents))


def _hint(contents: Sequence[Content]) -> str:
    covers = ", ".join(sorted({content.covers for content in contents}))
    return f"sign the hexadecimal digits of the digest ({covers}), without a newline"
