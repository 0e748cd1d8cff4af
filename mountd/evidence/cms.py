"""Reading the SignedData of PKCS#7 and CMS (RFC 5652), as far as a detached signature needs it.

Pure: bytes become a `SignedData`, and nothing is verified yet. Strict: DER only, one signer, no contents
inside, the two attributes that a signature with attributes stands on exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass

from mountd.evidence import der
from mountd.evidence.der import DerError, Element, Reader, integer, object_identifier

MAXIMUM_CERTIFICATES = 16
MAXIMUM_ATTRIBUTES = 16
MAXIMUM_ALGORITHMS = 8
SIGNED_DATA = "1.2.840.113549.1.7.2"
DATA = "1.2.840.113549.1.7.1"
CONTENT_TYPE = "1.2.840.113549.1.9.3"
MESSAGE_DIGEST = "1.2.840.113549.1.9.4"
SUBJECT_KEY_IDENTIFIER = 0x80  # [0] IMPLICIT OCTET STRING


class CmsError(Exception):
    """It is no detached signature by one signer; the text says why."""


@dataclass(frozen=True, slots=True)
class SignedData:
    """A detached signature by one signer, who is named by issuer and serial number or by a key identifier.

    `attributes` are the signed attributes as they were signed (a SET OF in DER), and `message_digest` the
    digest of the contents that is among them; both are None for a signature over the contents themselves.
    Algorithms are object identifiers in dotted form.
    """

    certificates: tuple[bytes, ...]
    issuer: bytes | None
    serial: bytes | None
    identifier: bytes | None
    digest_algorithm: str
    signature_algorithm: str
    attributes: bytes | None
    message_digest: bytes | None
    signature: bytes


def read(data: bytes) -> SignedData:
    """Return the signature that `data` is, in DER. Raises CmsError."""
    try:
        return _content_info(data)
    except DerError as error:
        raise CmsError(f"it is not PKCS#7 in DER: {error}") from None


def _content_info(data: bytes) -> SignedData:
    outer = Reader(data)
    info = outer.take(der.SEQUENCE).reader()
    outer.end()
    kind = object_identifier(info.take(der.OBJECT_IDENTIFIER))
    if kind != SIGNED_DATA:
        raise CmsError(f"its PKCS#7 is not SignedData but {kind}")
    inner = info.take(der.context(0)).reader()
    info.end()
    reader = inner.take(der.SEQUENCE).reader()
    inner.end()
    integer(reader.take(der.INTEGER))  # the version, which says what is read below anyway
    algorithms = [_algorithm(each) for each in _members(reader.take(der.SET), MAXIMUM_ALGORITHMS, "hashes")]
    _no_content(reader.take(der.SEQUENCE).reader())
    certificates = reader.optional(der.context(0))
    reader.optional(der.context(1))  # revocation lists
    signers = reader.take(der.SET)
    reader.end()
    raws: tuple[bytes, ...] = ()
    if certificates is not None:
        members = _members(certificates, MAXIMUM_CERTIFICATES, "certificates")
        raws = tuple(each.raw for each in members if each.tag == der.SEQUENCE)
    found = _members(signers, 2, "signers")
    if len(found) != 1:
        raise CmsError("it has more than one signer" if found else "it has no signer")
    signed = _signer(found[0], raws)
    if signed.digest_algorithm not in algorithms:
        raise CmsError("its signer's hash is not among those it announces")
    return signed


def _no_content(reader: Reader) -> None:
    kind = object_identifier(reader.take(der.OBJECT_IDENTIFIER))
    if kind != DATA:
        raise CmsError(f"what it signs is not plain data but {kind}")
    if reader.peek() is not None:
        raise CmsError("it contains what it signs, where it has to be detached")


def _signer(element: Element, certificates: tuple[bytes, ...]) -> SignedData:
    if element.tag != der.SEQUENCE:
        raise DerError(f"no signer at byte {element.offset}")
    reader = element.reader()
    integer(reader.take(der.INTEGER))
    issuer = serial = identifier = None
    if reader.peek() == SUBJECT_KEY_IDENTIFIER:
        identifier = reader.take().content
    else:
        names = reader.take(der.SEQUENCE).reader()
        issuer = names.take(der.SEQUENCE).raw
        serial = names.take(der.INTEGER).content
        names.end()
    digest_algorithm = _algorithm(reader.take(der.SEQUENCE))
    attributes = reader.optional(der.context(0))
    message_digest = None if attributes is None else _message_digest(attributes)
    signature_algorithm = _algorithm(reader.take(der.SEQUENCE))
    signature = reader.take(der.OCTET_STRING).content
    reader.optional(der.context(1))  # unsigned attributes, such as time stamps: nothing stands on them
    reader.end()
    return SignedData(
        certificates,
        issuer,
        serial,
        identifier,
        digest_algorithm,
        signature_algorithm,
        # What is signed is the SET OF itself, not its place in here (RFC 5652, 5.4).
        None if attributes is None else bytes([der.SET]) + attributes.raw[1:],
        message_digest,
        signature,
    )


def _message_digest(attributes: Element) -> bytes:
    """Return the digest among the signed attributes, once both that have to be there are right."""
    found: dict[str, Element] = {}
    for member in _members(attributes, MAXIMUM_ATTRIBUTES, "signed attributes"):
        if member.tag != der.SEQUENCE:
            raise DerError(f"no attribute at byte {member.offset}")
        reader = member.reader()
        name = object_identifier(reader.take(der.OBJECT_IDENTIFIER))
        values = reader.take(der.SET)
        reader.end()
        if name in found:
            raise CmsError(f"its signed attribute {name} is there twice")
        found[name] = values
    for name, what in ((CONTENT_TYPE, "contentType"), (MESSAGE_DIGEST, "messageDigest")):
        if name not in found:
            raise CmsError(f"its signed attributes lack {what}")
    if object_identifier(_only(found[CONTENT_TYPE], der.OBJECT_IDENTIFIER)) != DATA:
        raise CmsError("its signed attribute contentType is not that of what it signs")
    return _only(found[MESSAGE_DIGEST], der.OCTET_STRING).content


def _only(values: Element, tag: int) -> Element:
    reader = values.reader()
    value = reader.take(tag)
    reader.end()
    return value


def _algorithm(element: Element) -> str:
    """Return the name of an AlgorithmIdentifier, which has to have no parameters that would change it."""
    if element.tag != der.SEQUENCE:
        raise DerError(f"no algorithm at byte {element.offset}")
    reader = element.reader()
    name = object_identifier(reader.take(der.OBJECT_IDENTIFIER))
    # NULL or nothing for all that count; for the others, it is their name that is refused.
    if reader.peek() is not None:
        reader.take()
    reader.end()
    return name


def _members(element: Element, maximum: int, what: str) -> list[Element]:
    reader = element.reader()
    members: list[Element] = []
    while reader.peek() is not None:
        if len(members) == maximum:
            raise CmsError(f"it has more than {maximum} {what}")
        members.append(reader.take())
    return members
