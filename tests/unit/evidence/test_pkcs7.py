"""PKCS#7: what openssl signs holds, and each way in which a signature does not has its own reason."""

from __future__ import annotations

import base64
import hashlib
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mountd.errors import KeyUnknown, SignatureInvalid
from mountd.evidence import cms, content, der
from mountd.evidence.model import Key, Signer
from mountd.evidence.raw_signature import ED25519_LENGTH
from mountd.evidence.signature import MAXIMUM_SIGNATURE, verify
from tests.signing import AUTHORITY, LEAF, Signatory, run

NOW = int(time.time()) + 3600  # after all that is made here
YEAR = 365 * 24 * 3600
IMAGE = b"an image\n" * 1000
HEX = hashlib.sha256(IMAGE).hexdigest()
ROOT = hashlib.sha512(b"root").hexdigest()
VERITY = hashlib.sha256(b"verity").hexdigest()
DIGESTS = [("image", f"sha256:{HEX}"), ("root-hash", f"sha512:{ROOT}"), ("fs-verity", f"sha256:{VERITY}")]


class Pki:
    """What the tests sign with: one authority, one below it, and people."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = Signatory(directory, "root")
        self.middle = Signatory(directory, "middle", issuer=self.root)
        self.leaf = Signatory(directory, "leaf", extensions=LEAF, issuer=self.middle)
        self.direct = Signatory(directory, "direct", extensions=LEAF, issuer=self.root)
        self.alone = Signatory(directory, "alone", "rsa2048", extensions=LEAF)
        self.foreign = Signatory(directory, "foreign")

    def make(self, name: str, *arguments: object, **more: object) -> Signatory:
        return Signatory(self.directory, name, *arguments, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def refused(signature: bytes, keys: list[Key], reason: str, now: int = NOW) -> SignatureInvalid | KeyUnknown:
    with pytest.raises((SignatureInvalid, KeyUnknown)) as raised:
        verify(signature, keys, DIGESTS, now)
    assert reason in raised.value.parameters["reason"], raised.value  # type: ignore[operator]
    assert "\n" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize(
    ("data", "covers"),
    [
        (HEX.encode(), 0),
        (IMAGE, 0),
        (ROOT.encode(), 1),
        (VERITY.encode(), 2),
        (b"FSVerity\x01\0\x20\0" + bytes.fromhex(VERITY), 2),
    ],
    ids=["image-digits", "image", "root-hash", "fs-verity-digits", "fs-verity"],
)
@pytest.mark.parametrize("how", ["cms", "roothash"])
def test_what_may_be_signed(pki: Pki, data: bytes, covers: int, how: str) -> None:
    signature = getattr(pki.alone, how)(data)
    found = verify(signature, [pki.foreign.anchor("other"), pki.alone.anchor()], DIGESTS, NOW)
    assert found.valid_until is not None
    assert found.valid_until > NOW
    assert replace(found, valid_until=None) == Signer("team", "CN=alone", *DIGESTS[covers])


@pytest.mark.parametrize("algorithm", ["p256", "p384", "p521", "rsa2048"])
@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha512"])
def test_algorithms_that_count(pki: Pki, algorithm: str, digest: str) -> None:
    signer = pki.make(f"{algorithm}-{digest}", algorithm, LEAF)
    for signature in (signer.cms(HEX.encode(), "-md", digest), signer.roothash(HEX.encode(), "-md", digest)):
        assert verify(signature, [signer.anchor()], DIGESTS, NOW).covers == "image"


def tlv(tag: int, *parts: bytes) -> bytes:
    """One element in DER."""
    body = b"".join(parts)
    if len(body) < 0x80:
        return bytes([tag, len(body)]) + body
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(size)]) + size + body


def edwards_cms(signer: Signatory, data: bytes) -> bytes:
    """PKCS#7 with Ed25519 (RFC 8419), which the openssl of Debian 12 cannot make."""
    data_type = bytes.fromhex("06092a864886f70d010701")
    sha512 = tlv(0x30, bytes.fromhex("0609608648016503040203"))
    digest = tlv(4, hashlib.sha512(data).digest())
    attributes = tlv(0x30, bytes.fromhex("06092a864886f70d010903"), tlv(0x31, data_type))
    attributes += tlv(0x30, bytes.fromhex("06092a864886f70d010904"), tlv(0x31, digest))
    outer = der.Reader(signer.der).take().reader().take().reader()
    outer.take()
    serial = outer.take().raw
    outer.take()
    info = tlv(
        0x30, tlv(2, b"\x01"), tlv(0x30, outer.take().raw, serial), sha512, tlv(0xA0, attributes),
        tlv(0x30, bytes.fromhex("06032b6570")),
        tlv(4, signer.ed25519(tlv(0x31, attributes), signer.key.parent)),
    )  # fmt: skip
    signed = tlv(
        0x30,
        tlv(2, b"\x01"),
        tlv(0x31, sha512),
        tlv(0x30, data_type),
        tlv(0xA0, signer.der),
        tlv(0x31, info),
    )
    return tlv(0x30, bytes.fromhex("06092a864886f70d010702"), tlv(0xA0, signed))


def test_ed25519(pki: Pki) -> None:
    signer = pki.make("ed", "ed25519", LEAF)
    signature = edwards_cms(signer, HEX.encode())
    found = verify(signature, [signer.anchor()], DIGESTS, NOW)
    assert replace(found, valid_until=None) == Signer("team", "CN=ed", *DIGESTS[0])
    refused(edwards_cms(signer, b"x"), [signer.anchor()], "has signed something else")
    refused(signature[:-1] + bytes([signature[-1] ^ 1]), [signer.anchor()], "does not fit the public key")
    other = pki.make("ed448", "ed448", LEAF)
    refused(
        edwards_cms(signer, HEX.encode()),
        [other.anchor()],
        "a key that is neither RSA nor ECDSA nor Ed25519",
    )


def test_forms(pki: Pki) -> None:
    der = pki.alone.cms(HEX.encode())
    lines = base64.encodebytes(der)
    pem = b"-----BEGIN CMS-----\n" + lines + b"-----END CMS-----\n"
    for form in (der, lines, pem, pem.replace(b"CMS", b"PKCS7"), b"\n" + lines.replace(b"\n", b"\r\n")):
        assert verify(form, [pki.alone.anchor()], DIGESTS, NOW).key == "team"
    refused(pem.replace(b"-----END", lines[:5] + b"-----END"), [pki.alone.anchor()], "its PEM is damaged")
    refused(pem.replace(b"END CMS", b"END PKCS7"), [pki.alone.anchor()], "not of a known kind")


def test_signer_by_key_identifier(pki: Pki) -> None:
    signature = pki.direct.cms(HEX.encode(), "-keyid")
    assert verify(signature, [pki.root.anchor()], DIGESTS, NOW).subject == "CN=direct"
    bare = pki.direct.cms(HEX.encode(), "-keyid", "-nocerts")
    assert verify(bare, [pki.direct.anchor()], DIGESTS, NOW).subject == "CN=direct"
    assert type(refused(bare, [pki.root.anchor()], "neither came with it")) is KeyUnknown


def test_chains(pki: Pki) -> None:
    text = HEX.encode()
    whole = pki.leaf.cms(text, "-certfile", pki.middle.pem)
    for anchor in (pki.leaf, pki.middle, pki.root):
        found = verify(whole, [anchor.anchor()], DIGESTS, NOW)
        assert replace(found, valid_until=None) == Signer("team", "CN=leaf", *DIGESTS[0])
    without = pki.leaf.cms(text)
    both = Key("set", "x509", (pki.foreign.pem.read_bytes(), pki.middle.der), "/etc/verity.d")
    assert verify(without, [both], DIGESTS, NOW).key == "set"
    assert type(refused(without, [pki.root.anchor()], "leads to its signer, CN=leaf")) is KeyUnknown
    assert type(refused(whole, [pki.foreign.anchor()], "leads to its signer, CN=leaf")) is KeyUnknown


def test_authority_of_the_same_name_is_another(pki: Pki, tmp_path: Path) -> None:
    impostor = Signatory(tmp_path, "root")
    victim = Signatory(tmp_path, "direct", extensions=LEAF, issuer=impostor)
    signature = victim.cms(HEX.encode(), "-certfile", impostor.pem)
    assert type(refused(signature, [pki.root.anchor()], "leads to its signer")) is KeyUnknown
    # By issuer and serial number it is the certificate that the policy names, by its key it is not.
    refused(signature, [pki.direct.anchor()], "does not fit the public key of CN=direct")


def test_chain_that_is_too_long(pki: Pki) -> None:
    links = [pki.root]
    for number in range(4):
        links.append(pki.make(f"link{number}", issuer=links[-1]))
    bundle = pki.directory / "bundle.pem"
    bundle.write_bytes(b"".join(each.pem.read_bytes() for each in links[:-1]))
    signature = links[-1].cms(HEX.encode(), "-certfile", bundle)
    assert verify(signature, [links[1].anchor()], DIGESTS, NOW).subject == "CN=link3"
    assert type(refused(signature, [pki.root.anchor()], "leads to its signer")) is KeyUnknown


def test_times(pki: Pki) -> None:
    signature = pki.direct.cms(HEX.encode())
    for anchor in (pki.direct, pki.root):
        refused(signature, [anchor.anchor()], "expired at 20", NOW + 2 * YEAR)
        refused(signature, [anchor.anchor()], "is not valid before 20", NOW - YEAR)


@pytest.mark.parametrize(
    ("extensions", "reason"),
    [
        ("keyUsage=keyEncipherment", "is not for signatures: its key usage lacks digitalSignature"),
        ("1.2.3.4=critical,ASN1:NULL", "has the critical extension 1.2.3.4, which is not understood"),
        (f"{LEAF}\nextendedKeyUsage=critical,serverAuth", "neither codeSigning nor emailProtection"),
        (f"{LEAF}\nextendedKeyUsage=serverAuth,clientAuth", "is not for signatures: its extended key usage"),
        (f"{LEAF}\nextendedKeyUsage=critical,timeStamping", "is not for signatures: its extended key usage"),
    ],
)
def test_signers_that_may_not_sign(pki: Pki, extensions: str, reason: str) -> None:
    name = "not" + str(len(extensions))
    signer = pki.make(name, extensions=extensions, issuer=pki.root)
    for anchor in (pki.root, signer):
        refused(signer.cms(HEX.encode()), [anchor.anchor()], reason)


@pytest.mark.parametrize(
    "extension",
    [
        "extendedKeyUsage=critical,codeSigning",
        "extendedKeyUsage=emailProtection,serverAuth",
        "extendedKeyUsage=serverAuth,anyExtendedKeyUsage",
        "subjectAltName=critical,email:somebody@example.org",
    ],
)
def test_extensions_that_leave_signing_to_it(pki: Pki, extension: str) -> None:
    name = f"may{len(extension)}"
    signer = pki.make(name, extensions=f"{LEAF}\n{extension}", issuer=pki.root)
    for anchor in (pki.root, signer):
        assert verify(signer.cms(HEX.encode()), [anchor.anchor()], DIGESTS, NOW).subject == f"CN={name}"


@pytest.mark.parametrize(
    ("extensions", "reason"),
    [
        (LEAF, "is no certificate authority"),
        (f"{AUTHORITY}\nkeyUsage=digitalSignature", "is no certificate authority"),
        ("nameConstraints=critical,permitted;DNS:x.example\n" + AUTHORITY, "extension 2.5.29.30"),
        (f"extendedKeyUsage=serverAuth\n{AUTHORITY}", "is not for signatures: its extended key usage"),
    ],
)
def test_authorities_that_are_none(pki: Pki, extensions: str, reason: str) -> None:
    name = f"authority{len(extensions)}"
    authority = pki.make(name, extensions=extensions, issuer=pki.root)
    victim = pki.make(f"below-{name}", extensions=LEAF, issuer=authority)
    signature = victim.cms(HEX.encode(), "-certfile", authority.pem)
    for anchor in (authority, pki.root):
        refused(signature, [anchor.anchor()], reason)
    assert verify(signature, [victim.anchor()], DIGESTS, NOW).subject == f"CN=below-{name}"


def test_path_length(pki: Pki) -> None:
    top = pki.make("short", extensions=AUTHORITY + ",pathlen:0")
    below = pki.make("short-below", issuer=top)
    leaf = pki.make("short-leaf", extensions=LEAF, issuer=below)
    assert verify(below.cms(HEX.encode()), [top.anchor()], DIGESTS, NOW).subject == "CN=short-below"
    signature = leaf.cms(HEX.encode(), "-certfile", below.pem)
    refused(signature, [top.anchor()], "CN=short may not have 1 authorities below it")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("-md", "sha1"), "it uses the hash SHA-1"),
        (("-md", "md5"), "it uses the hash MD5"),
        (("-md", "sha224"), "it uses the hash SHA-224"),
        (("-keyopt", "rsa_padding_mode:pss"), "it uses the algorithm RSA-PSS"),
    ],
)
def test_algorithms_that_do_not_count(pki: Pki, options: tuple[str, ...], reason: str) -> None:
    refused(pki.alone.cms(HEX.encode(), *options), [pki.alone.anchor()], reason)


def test_weak_keys(pki: Pki) -> None:
    for algorithm, reason in (("rsa1024", "an RSA key of 1024 bits"), ("k256", "the curve secp256k1")):
        signer = pki.make(f"weak-{algorithm}", algorithm, LEAF, issuer=pki.root)
        signature = signer.cms(HEX.encode())
        assert type(refused(signature, [pki.root.anchor()], reason)) is SignatureInvalid
        error = refused(signature, [signer.anchor()], f"the certificate of CN=weak-{algorithm} has a")
        assert type(error) is KeyUnknown
        assert "cannot be used" in str(error)


def test_certificate_that_was_signed_with_a_weak_hash(pki: Pki) -> None:
    weak = pki.make("sha1-leaf", "p256", LEAF, issuer=pki.root, digest="sha1")
    refused(weak.cms(HEX.encode()), [pki.root.anchor()], "was signed with the algorithm ECDSA with SHA-1")
    # The policy names it itself: nobody's signature of it is needed.
    assert verify(weak.cms(HEX.encode()), [weak.anchor()], DIGESTS, NOW).key == "team"


def test_wrong_contents(pki: Pki) -> None:
    for text in (
        HEX.encode() + b"\n",
        b"sha256:" + HEX.encode(),
        hashlib.sha256(b"x").hexdigest().encode(),
        b"",
    ):
        error = refused(pki.alone.cms(text), [pki.alone.anchor()], "CN=alone has signed something else")
        assert error.hint is not None
        assert "without a newline" in error.hint
        refused(pki.alone.roothash(text), [pki.alone.anchor()], "CN=alone has not signed this image")


def test_digest_of_another_algorithm_is_another_digest(pki: Pki) -> None:
    signature = pki.alone.cms(HEX.encode())
    other = [("image", "sha512:" + hashlib.sha512(IMAGE).hexdigest())]
    with pytest.raises(SignatureInvalid):
        verify(signature, [pki.alone.anchor()], other, NOW)
    # Over the image itself, by a hash that is not known.
    with pytest.raises(SignatureInvalid):
        verify(pki.alone.cms(IMAGE, "-md", "sha256"), [pki.alone.anchor()], other, NOW)
    assert (
        verify(pki.alone.cms(IMAGE, "-md", "sha512"), [pki.alone.anchor()], other, NOW).digest == other[0][1]
    )


def test_two_signers(pki: Pki) -> None:
    both = ("-signer", pki.foreign.pem, "-inkey", pki.foreign.key)
    signature = pki.alone.cms(HEX.encode(), *both)
    refused(signature, [pki.alone.anchor(), pki.foreign.anchor("other")], "it has more than one signer")


def test_no_signer(pki: Pki) -> None:
    nobody = run("openssl", "crl2pkcs7", "-nocrl", "-certfile", pki.alone.pem, "-outform", "DER")
    refused(nobody, [pki.alone.anchor()], "it has no signer")


def test_contents_inside(pki: Pki) -> None:
    refused(pki.alone.cms(HEX.encode(), "-nodetach"), [pki.alone.anchor()], "it contains what it signs")
    streamed = pki.alone.cms(HEX.encode(), "-nodetach", "-stream")
    refused(streamed, [pki.alone.anchor()], "an indefinite or too long length at byte 1")
    other = pki.alone.cms(HEX.encode(), "-econtent_type", "1.2.3.4")
    refused(other, [pki.alone.anchor()], "not plain data but 1.2.3.4")


def test_other_kinds_of_pkcs7(pki: Pki) -> None:
    enveloped = run("openssl", "cms", "-encrypt", "-outform", "DER", pki.alone.pem, data=b"secret")
    refused(enveloped, [pki.alone.anchor()], "not SignedData but 1.2.840.113549.1.7.3")


def test_cut_off_anywhere(pki: Pki) -> None:
    signature = pki.alone.roothash(HEX.encode())
    for length in range(1, len(signature)):
        if length != ED25519_LENGTH:  # which would be another kind
            refused(signature[:length], [pki.alone.anchor()], "it is cut off")
    refused(b"", [pki.alone.anchor()], "it is empty")


def test_something_behind_it(pki: Pki) -> None:
    refused(pki.alone.cms(HEX.encode()) + b"\0\0", [pki.alone.anchor()], "2 bytes at byte")


def test_damaged_signatures(pki: Pki) -> None:
    for how, reason in ((pki.alone.cms, "does not fit the public key"), (pki.alone.roothash, "is damaged")):
        signature = how(HEX.encode())
        damaged = signature[:-1] + bytes([signature[-1] ^ 1])
        refused(damaged, [pki.alone.anchor()], reason)


def test_attributes_are_what_the_signature_is_over(pki: Pki) -> None:
    signature = pki.alone.cms(b"something else")
    was, wanted = (hashlib.sha256(each).digest() for each in (b"something else", HEX.encode()))
    assert signature.count(was) == 1
    refused(signature.replace(was, wanted), [pki.alone.anchor()], "does not fit the public key")


def test_attributes_that_are_missing_or_doubled(pki: Pki) -> None:
    signature = pki.alone.cms(HEX.encode())
    name = bytes.fromhex("06092a864886f70d0109")  # and 03 contentType, 04 messageDigest, 05 signingTime
    for changes, reason in (
        ([(b"\x04", b"\x63")], "lack messageDigest"),
        ([(b"\x03", b"\x63")], "lack contentType"),
        ([(b"\x05", b"\x04")], "is there twice"),
    ):
        changed = signature
        for was, becomes in changes:
            assert changed.count(name + was) == 1
            changed = changed.replace(name + was, name + becomes)
        refused(changed, [pki.alone.anchor()], reason)


def test_too_many_certificates_and_too_large(pki: Pki) -> None:
    bundle = pki.directory / "many.pem"
    many = [pki.make(f"many{number}") for number in range(cms.MAXIMUM_CERTIFICATES)]
    bundle.write_bytes(b"".join(each.pem.read_bytes() for each in many))
    refused(
        pki.alone.cms(HEX.encode(), "-certfile", bundle), [pki.alone.anchor()], "more than 16 certificates"
    )
    megabyte = pki.alone.cms(HEX.encode()).ljust(1 << 20, b"\0")
    refused(megabyte, [pki.alone.anchor()], f"more than {MAXIMUM_SIGNATURE} bytes")


def test_no_key_of_the_kind(pki: Pki) -> None:
    signature = pki.alone.cms(HEX.encode())
    for keys in ([], [pki.foreign.bare("ecdsa")]):
        error = refused(signature, keys, "it is a PKCS#7 signature, and none of the keys")
        assert type(error) is KeyUnknown


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "a certificate cannot be read"),
        (b"\x30\x03\x02\x01\x01", "a certificate cannot be read"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "a certificate cannot be read"),
        (b"-----BEGIN PUBLIC KEY-----\n", "no certificate in PEM or DER"),
    ],
)
def test_key_that_is_no_certificate(pki: Pki, data: bytes, reason: str) -> None:
    key = Key("team", "x509", (data,), "/etc/mountd/team.crt")
    signature = pki.alone.cms(HEX.encode())
    error = refused(signature, [key], f"the key “team” from /etc/mountd/team.crt cannot be used: {reason}")
    assert type(error) is KeyUnknown
    assert verify(signature, [key, pki.alone.anchor("good")], DIGESTS, NOW).key == "good"


def test_key_with_too_many_certificates(pki: Pki) -> None:
    key = Key("team", "x509", (pki.alone.pem.read_bytes() * 65,), "dir")
    refused(pki.alone.cms(HEX.encode()), [key], "more than 64 certificates")


@pytest.mark.parametrize(
    "digests",
    [
        [("image", "md5:" + "0" * 32)],
        [("image", "sha256:" + "0" * 63)],
        [("image", "sha256:" + "A" * 64)],
        [("label", "sha256:" + "0" * 64)],
        [("image", "sha256:" + "0" * 64)] * 9,
    ],
)
def test_digests_are_made_by_mountd(digests: list[tuple[str, str]]) -> None:
    with pytest.raises(ValueError):
        verify(b"x", [], digests, NOW)


def test_formatted_digest_is_the_kernels() -> None:
    # struct fsverity_formatted_digest: magic, le16 algorithm, le16 size, digest
    for number, algorithm, size in ((1, "sha256", 32), (2, "sha512", 64)):
        raw = bytes(range(size))
        assert content.formatted_digest(algorithm, raw) == b"FSVerity" + bytes([number, 0, size, 0]) + raw
