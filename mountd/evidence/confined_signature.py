"""Verifying a signature in a process that can do no harm.

The code is the same (`signature.verify`); it runs in a throw-away child that has given up everything but
computing (kernel/sandbox.py), and that tells what it found. The child can load nothing any more, so
that whoever forks it calls `prepare()` once before, best before it forks workers.

An OpenPGP signature is verified by gpgv, which such a child could not start. For that kind, and no other,
this process itself looks at the armour and at the headers of the packets, and gpgv is the confined process:
nobody's, without capabilities, with a filter of its own, and killed after ten seconds (gpg.py).
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from mountd.errors import KeyUnknown, SignatureInvalid
from mountd.evidence import certificate, openpgp, public_key, signature
from mountd.evidence.certificate import CertificateError
from mountd.evidence.content import Payload
from mountd.evidence.model import Signer
from mountd.kernel import sandbox

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.evidence.model import Key
    from mountd.evidence.public_key import PublicKey

CPU_SECONDS = 2
SECONDS = 5  # by the clock
MEMORY = 64 << 20
EPOCH = datetime(2020, 1, 1)
CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
ED25519_BASE_POINT = b"\x58" + b"\x66" * 31  # of RFC 8032, as a public key


def verify(blob: bytes, accepted: Sequence[Key], digests: Sequence[tuple[str, str]], now: int) -> Signer:
    """Return who has made the signature `blob`, as `signature.verify` does, and raise what that raises.

    Raises OSError where no child can be made.
    """
    signature.check_size(blob)
    if openpgp.is_signature(blob):
        return signature.verify(blob, accepted, digests, now)
    told = sandbox.ask(
        lambda: asdict(signature.verify(blob, accepted, digests, now)),
        set(),
        cpu_seconds=CPU_SECONDS,
        memory=MEMORY,
        seconds=SECONDS,
    )
    return _understand(told)


def prepare() -> None:
    """Have everything loaded that verifying a signature needs, in this process and in its children.

    A certificate is made and read, and each kind of key looks at a signature that is none: libcrypto fetches
    its algorithms when they are first used. Raises nothing but what a broken installation raises.
    """
    authority = ec.derive_private_key(1, ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mountd")])
    usage = x509.KeyUsage(True, False, False, False, False, True, False, False, False)
    builder = x509.CertificateBuilder(name, name, authority.public_key(), 1, EPOCH, EPOCH)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier(b"mountd"), critical=False)
    raw = builder.sign(authority, hashes.SHA256()).public_bytes(Encoding.DER)
    pem = x509.load_der_x509_certificate(raw).public_bytes(Encoding.PEM)
    made = certificate.read_all([raw, pem])[0]
    certificate.chain(made, [made], [], made.not_before)
    with contextlib.suppress(CertificateError):
        certificate.check_signer(made, made.not_after + 1)
    found: list[PublicKey] = [
        rsa.RSAPublicNumbers(65537, (1 << public_key.MINIMUM_RSA_BITS) - 1).public_key(),
        *(ec.derive_private_key(1, curve()).public_key() for curve in CURVES),
        ed25519.Ed25519PublicKey.from_public_bytes(ED25519_BASE_POINT),
    ]
    for key in found:
        for encoding in (Encoding.DER, Encoding.PEM):
            public_key.load(key.public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo))
        public_key.fingerprint(key)
        for algorithm in public_key.HASHES:
            public_key.made(key, made.signature, Payload(b""), algorithm)


def _understand(told: dict[str, Any] | None) -> Signer:
    """Turn the child's answer into what `signature.verify` returns or raises."""
    if told is None:
        raise SignatureInvalid("it could not be verified within the limits set for that")
    if "found" in told:
        return Signer(**told["found"])
    for kind in (SignatureInvalid, KeyUnknown):
        if told.get("error") == kind.wire_name:
            raise kind(told["reason"], hint=told.get("hint"))
    raise SignatureInvalid(f"it could not be verified: {told.get('failed') or told.get('error')}")
