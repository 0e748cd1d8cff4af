"""X.509 certificates (RFC 5280): what one says, and whether a chain of them leads to one of the policy.

Names and serial numbers are compared as the bytes that they are, times are read here, and the rest is read
by `cryptography`. Nothing asks for a revocation list: who is no longer trusted is taken out of the policy.
"""

from __future__ import annotations

import calendar
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from mountd.evidence import der, public_key
from mountd.evidence.algorithms import RefusedAlgorithm, signature_hash
from mountd.evidence.content import Payload
from mountd.evidence.public_key import WeakKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TypeVar

    from mountd.evidence.public_key import PublicKey

    E = TypeVar("E", bound=x509.ExtensionType)

MAXIMUM_CHAIN = 4  # certificates from the signer's to the policy's, both counted
MAXIMUM_CHECKS = 32  # signatures of certificates that are looked at for one signature of an image
MAXIMUM_CERTIFICATES = 64  # of one key
MAXIMUM_SUBJECT = 200  # characters that are shown
UTC_TIME, GENERALIZED_TIME = 0x17, 0x18
# What is looked at here; another extension that is critical may forbid what it is used for. Of these, the
# alternative names (2.5.29.17) say nothing that counts: nobody is trusted for a name.
UNDERSTOOD = {"2.5.29.15", "2.5.29.19", "2.5.29.37", "2.5.29.17", "2.5.29.14", "2.5.29.35"}
# Of an extended key usage, critical or not (RFC 5280): what an image may be signed for.
FOR_SIGNATURES = {
    ExtendedKeyUsageOID.CODE_SIGNING,
    ExtendedKeyUsageOID.EMAIL_PROTECTION,
    ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
}
BAD = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension)


class CertificateError(Exception):
    """A certificate cannot be read, or must not be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate that was read. `serial`, `issuer` and `subject` are DER; times in seconds since 1970.

    `identifier` is its subject key identifier, `name` its subject for people. `path_length` is how many
    further authorities may follow one, None for any number.
    """

    raw: bytes
    serial: bytes
    issuer: bytes
    subject: bytes
    not_before: int
    not_after: int
    name: str
    identifier: bytes | None
    authority: bool
    path_length: int | None
    signs_data: bool
    signs_certificates: bool
    problem: str | None
    key: PublicKey
    algorithm: str
    signature: bytes
    signed: bytes


def read(raw: bytes) -> Certificate:
    """Return the certificate `raw`, in DER. Raises CertificateError."""
    try:
        serial, issuer, not_before, not_after, subject = _fields(raw)
    except der.DerError as error:
        raise CertificateError(f"a certificate cannot be read: {error}") from None
    try:
        # Its warnings about sloppy authorities are for their authors.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = x509.load_der_x509_certificate(raw)
            name = shown(found.subject.rfc4514_string())
            extensions = found.extensions
            key: object = found.public_key()
            algorithm = found.signature_algorithm_oid.dotted_string
            signature, signed = found.signature, found.tbs_certificate_bytes
    except BAD as error:
        raise CertificateError(f"a certificate cannot be read: {shown(str(error))}") from None
    try:
        accepted = public_key.accepted(key)
    except WeakKey as error:
        raise CertificateError(f"the certificate of {name} has {error}") from None
    constraints = _find(extensions, x509.BasicConstraints)
    usage = _find(extensions, x509.KeyUsage)
    identifier = _find(extensions, x509.SubjectKeyIdentifier)
    return Certificate(
        raw, serial, issuer, subject, not_before, not_after, name,
        identifier.digest if identifier else None,
        constraints.ca if constraints else False,
        constraints.path_length if constraints else None,
        usage.digital_signature if usage else True,
        usage.key_cert_sign if usage else True,
        _problem(extensions),
        accepted, algorithm, signature, signed,
    )  # fmt: skip


def read_all(files: Iterable[bytes]) -> list[Certificate]:
    """Return the certificates of a key's files, each in DER, or any number of them in PEM.

    Raises CertificateError, also for none and for more than MAXIMUM_CERTIFICATES.
    """
    found: list[Certificate] = []
    for data in files:
        if data.lstrip().startswith(b"-----BEGIN"):
            blocks = data.split(b"-----END CERTIFICATE-----")
            raws = [_from_pem(block + b"-----END CERTIFICATE-----\n") for block in blocks[:-1]]
        else:
            raws = [data]
        if len(found) + len(raws) > MAXIMUM_CERTIFICATES:
            raise CertificateError(f"more than {MAXIMUM_CERTIFICATES} certificates")
        found += [read(raw) for raw in raws]
    if not found:
        raise CertificateError("no certificate in PEM or DER")
    return found


def check_signer(certificate: Certificate, now: int) -> None:
    """Have the certificate be one that may sign data at `now`. Raises CertificateError."""
    _check_time(certificate, now)
    if certificate.problem:
        raise CertificateError(f"the certificate of {certificate.name} {certificate.problem}")
    if not certificate.signs_data:
        lacks = "its key usage lacks digitalSignature"
        raise CertificateError(f"the certificate of {certificate.name} is not for signatures: {lacks}")


def chain(
    signer: Certificate, anchors: Sequence[Certificate], others: Sequence[Certificate], now: int
) -> list[Certificate] | None:
    """Return the certificates from `signer` to one of `anchors`, None if there is no such chain.

    `others` are those that came with the signature. Raises CertificateError if there is one, but a
    certificate in it must not be used: expired, not an authority.
    """
    problem: CertificateError | None = None
    checks = 0
    waiting = [[signer]]
    while waiting:
        path = waiting.pop()
        last = path[-1]
        trusted = any(anchor.raw == last.raw for anchor in anchors)
        if trusted:
            try:
                for place, each in enumerate(path):
                    check_signer(each, now) if place == 0 else _check_authority(each, place, now)
            except CertificateError as error:
                problem = problem or error
                continue
            return path
        if len(path) == MAXIMUM_CHAIN:
            continue
        # The anchors last, as the last is the next to be looked at.
        for issuer in (*others, *anchors):
            if issuer.subject != last.issuer or any(issuer.raw == each.raw for each in path):
                continue
            checks += 1
            if checks > MAXIMUM_CHECKS:
                raise CertificateError("its certificates fit together in too many ways")
            if _issued(issuer, last):
                waiting.append([*path, issuer])
    if problem is not None:
        raise problem
    return None


def shown(text: str) -> str:
    """Return a text from a certificate as a message may have it: short, and on one line."""
    short = text if len(text) <= MAXIMUM_SUBJECT else text[:MAXIMUM_SUBJECT] + "…"
    return short if short.isprintable() else repr(short)


def _issued(issuer: Certificate, certificate: Certificate) -> bool:
    """Return whether `issuer` has signed `certificate`. Raises CertificateError for a weak algorithm."""
    try:
        hashed = signature_hash(certificate.algorithm, issuer.key, None)
    except RefusedAlgorithm as error:
        raise CertificateError(f"the certificate of {certificate.name} was signed with {error}") from None
    return public_key.made(issuer.key, certificate.signature, Payload(certificate.signed), hashed)


def _check_authority(certificate: Certificate, place: int, now: int) -> None:
    """Have it be one that may issue the certificate before it, with `place` certificates before it."""
    _check_time(certificate, now)
    if certificate.problem:
        raise CertificateError(f"the certificate of {certificate.name} {certificate.problem}")
    if not certificate.authority or not certificate.signs_certificates:
        raise CertificateError(f"{certificate.name} is no certificate authority")
    if certificate.path_length is not None and place - 1 > certificate.path_length:
        raise CertificateError(f"{certificate.name} may not have {place - 1} authorities below it")


def _check_time(certificate: Certificate, now: int) -> None:
    if now < certificate.not_before:
        raise CertificateError(
            f"the certificate of {certificate.name} is not valid before {_date(certificate.not_before)}"
        )
    if now > certificate.not_after:
        raise CertificateError(
            f"the certificate of {certificate.name} expired at {_date(certificate.not_after)}"
        )


def _date(seconds: int) -> str:
    # Not strftime(3), which looks at /etc/localtime each time: there is no way to it where this runs.
    return f"{datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)} UTC"


def _problem(extensions: x509.Extensions) -> str | None:
    """Return which extension is in the way of a signature, whoever makes it, None for none."""
    for each in extensions:
        if each.critical and each.oid.dotted_string not in UNDERSTOOD:
            return f"has the critical extension {each.oid.dotted_string}, which is not understood"
    purposes = _find(extensions, x509.ExtendedKeyUsage)
    if purposes is not None and FOR_SIGNATURES.isdisjoint(purposes):
        # That of a certificate is for all below it as well, as openssl has it.
        return "is not for signatures: its extended key usage has neither codeSigning nor emailProtection"
    return None


def _find(extensions: x509.Extensions, kind: type[E]) -> E | None:
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _from_pem(text: bytes) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return x509.load_pem_x509_certificate(text).public_bytes(Encoding.DER)
    except BAD as error:
        raise CertificateError(f"a certificate cannot be read: {shown(str(error))}") from None


def _fields(raw: bytes) -> tuple[bytes, bytes, int, int, bytes]:
    """Return serial number, issuer, begin and end of validity, and subject."""
    outer = der.Reader(raw)
    reader = outer.take(der.SEQUENCE).reader().take(der.SEQUENCE).reader()
    outer.end()
    reader.optional(der.context(0))  # the version
    serial = reader.take(der.INTEGER).content
    reader.take(der.SEQUENCE)  # the algorithm, again
    issuer = reader.take(der.SEQUENCE).raw
    validity = reader.take(der.SEQUENCE).reader()
    not_before, not_after = _time(validity.take()), _time(validity.take())
    validity.end()
    return serial, issuer, not_before, not_after, reader.take(der.SEQUENCE).raw


def _time(element: der.Element) -> int:
    text = element.content.decode("ascii", "replace")
    digits = {UTC_TIME: 12, GENERALIZED_TIME: 14}.get(element.tag)
    if digits is None or len(text) != digits + 1 or text[-1] != "Z" or not _decimal(text[:-1]):
        raise der.DerError(f"no time at byte {element.offset}")
    if digits == 12:
        text = ("19" if text >= "50" else "20") + text
    year, month, day = int(text[:4]), int(text[4:6]), int(text[6:8])
    hour, minute, second = int(text[8:10]), int(text[10:12]), int(text[12:14])
    fits = year >= 1950 and 1 <= month <= 12 and hour < 24 and minute < 60 and second < 60
    if not fits or not 1 <= day <= calendar.monthrange(year, month)[1]:
        raise der.DerError(f"no time at byte {element.offset}")
    return calendar.timegm((year, month, day, hour, minute, second))


def _decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal()
