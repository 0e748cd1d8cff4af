"""Signatures without a message around them, and sigstore's and systemd's JSON: what holds, and what not."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mountd.errors import KeyUnknown, SignatureInvalid
from mountd.evidence import keys, public_key
from mountd.evidence.model import Key, Signer
from mountd.evidence.signature import MAXIMUM_BRACKETS, verify
from tests.signing import LEAF, Signatory

NOW = int(time.time()) + 3600
IMAGE = b"an image\n" * 1000
HEX = hashlib.sha256(IMAGE).hexdigest()
ROOT = hashlib.sha256(b"root").hexdigest()
DIGESTS = [("image", f"sha256:{HEX}"), ("root-hash", f"sha256:{ROOT}")]


class People:
    """One of each kind of key, and a second one that is foreign."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.p256, self.p384, self.p521, self.edwards, self.rsa, self.k256 = (
            Signatory(directory, algorithm, algorithm, LEAF)
            for algorithm in ("p256", "p384", "p521", "ed25519", "rsa2048", "k256")
        )
        self.foreign = Signatory(directory, "foreign")
        self.foreign_edwards = Signatory(directory, "ed-foreign", "ed25519")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    return People(tmp_path_factory.mktemp("people"))


def refused(
    signature: bytes, accepted: list[Key], reason: str, kind: type[Exception] = SignatureInvalid
) -> None:
    with pytest.raises((SignatureInvalid, KeyUnknown)) as raised:
        verify(signature, accepted, DIGESTS, NOW)
    assert reason in str(raised.value)
    assert type(raised.value) is kind


def subject(signatory: Signatory) -> str:
    return public_key.fingerprint(public_key.load(signatory.public))


@pytest.mark.parametrize(
    ("data", "covers"), [(IMAGE, 0), (HEX.encode(), 0), (ROOT.encode(), 1)], ids=["image", "digits", "root"]
)
@pytest.mark.parametrize("form", [bytes, base64.b64encode, base64.encodebytes])
@pytest.mark.parametrize("kind", ["ecdsa", "sigstore"])
def test_ecdsa(people: People, data: bytes, covers: int, form: Callable[[bytes], bytes], kind: str) -> None:
    signature = form(people.p256.raw(data))
    accepted = [people.foreign.bare(kind, "other"), people.p256.bare(kind)]
    found = verify(signature, accepted, DIGESTS, NOW)
    assert found == Signer("team", subject(people.p256), *DIGESTS[covers])
    refused(signature, accepted[:1], "none of the keys that count (other) has made it over this image")


def test_ecdsa_on_other_curves(people: People) -> None:
    for signatory, digest in ((people.p384, "sha384"), (people.p521, "sha512")):
        for each in ("sha256", digest):
            signature = signatory.raw(HEX.encode(), each)
            assert verify(signature, [signatory.bare("ecdsa")], DIGESTS, NOW).covers == "image"
        # Of the image itself only the SHA-256 is known.
        assert verify(signatory.raw(IMAGE), [signatory.bare("ecdsa")], DIGESTS, NOW).covers == "image"
        refused(signatory.raw(IMAGE, digest), [signatory.bare("ecdsa")], "none of the keys")
        refused(signatory.raw(HEX.encode()), [signatory.bare("sigstore")], "has to be P-256", KeyUnknown)


def test_ecdsa_with_another_hash(people: People) -> None:
    for digest in ("sha1", "sha384", "sha512"):
        refused(people.p256.raw(HEX.encode(), digest), [people.p256.bare("ecdsa")], "none of the keys")


def test_ed25519(people: People) -> None:
    signature = people.edwards.ed25519(HEX.encode(), people.directory)
    accepted = [people.foreign_edwards.bare("ed25519", "other"), people.edwards.bare("ed25519")]
    for form in (signature, base64.b64encode(signature)):
        assert verify(form, accepted, DIGESTS, NOW) == Signer("team", subject(people.edwards), *DIGESTS[0])
        refused(form, accepted[:1], "none of the keys that count (other)")
    for data in (HEX.encode() + b"\n", IMAGE, bytes.fromhex(HEX)):
        refused(people.edwards.ed25519(data, people.directory), accepted, "none of the keys")


def test_keys_of_the_wrong_kind(people: People) -> None:
    ecdsa, edwards = people.p256.raw(IMAGE), people.edwards.ed25519(HEX.encode(), people.directory)
    refused(ecdsa, [people.edwards.bare("ed25519")], "it is an ECDSA signature, and none of", KeyUnknown)
    refused(ecdsa, [people.p256.anchor()], "none of the keys that count is of the kind ecdsa", KeyUnknown)
    refused(edwards, [people.p256.bare("ecdsa")], "it is an Ed25519 signature, and none of", KeyUnknown)
    refused(ecdsa, [people.edwards.bare("ecdsa")], "that is not of the kind ecdsa", KeyUnknown)
    refused(edwards, [people.p256.bare("ed25519")], "that is not of the kind ed25519", KeyUnknown)
    refused(ecdsa, [people.rsa.bare("ecdsa")], "that is not of the kind ecdsa", KeyUnknown)
    refused(ecdsa, [people.k256.bare("ecdsa")], "the curve secp256k1", KeyUnknown)
    refused(
        ecdsa, [Key("team", "ecdsa", (b"junk",), "/k")], "from /k cannot be used: no public key", KeyUnknown
    )
    refused(ecdsa, [Key("team", "ecdsa", (), "/k")], "from /k cannot be used: no public key", KeyUnknown)


def test_keys_are_checked_where_a_policy_is_loaded(people: People) -> None:
    for kind in ("ecdsa", "sigstore"):
        keys.check(people.p256.bare(kind))
    keys.check(people.edwards.bare("ed25519"))
    keys.check(people.p256.anchor())
    for kind in ("x509", "ecdsa", "sigstore", "ed25519", "gpg"):
        with pytest.raises(keys.KeyProblem):
            keys.check(Key("team", kind, (b"junk",), "/k"))
    with pytest.raises(ValueError):
        keys.check(Key("team", "rsa", (b"junk",), "/k"))


@pytest.mark.parametrize("data", [b"x", b" \n", b"AAAA", b"\x30\x80", bytes(65), b"\xff" * 1000])
def test_what_is_no_signature(people: People, data: bytes) -> None:
    with pytest.raises((SignatureInvalid, KeyUnknown)):
        verify(data, [people.p256.anchor(), people.p256.bare("ecdsa", "raw")], DIGESTS, NOW)


def cosign(signature: bytes, **more: object) -> bytes:
    """The bundle of `cosign sign-blob --bundle` as it was until its version 3."""
    body = {
        "base64Signature": base64.b64encode(signature).decode(),
        "cert": "",
        "rekorBundle": {"Payload": {}},
    }
    return json.dumps(body | more).encode()


def sigstore(signature: bytes, **more: object) -> bytes:
    """The bundle of `cosign sign-blob --new-bundle-format`."""
    digest = base64.b64encode(bytes.fromhex(HEX)).decode()
    body = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": "x"}, "tlogEntries": []},
        "messageSignature": {
            "messageDigest": {"algorithm": "SHA2_256", "digest": digest},
            "signature": base64.b64encode(signature).decode(),
        },
    }
    return json.dumps(body | more).encode()


@pytest.mark.parametrize("bundle", [cosign, sigstore])
def test_bundles(people: People, bundle: Callable[..., bytes]) -> None:
    accepted = [people.p256.bare("sigstore")]
    signature = people.p256.raw(IMAGE)
    assert verify(bundle(signature), accepted, DIGESTS, NOW).key == "team"
    refused(bundle(people.foreign.raw(IMAGE)), accepted, "none of the keys that count (team)")
    refused(bundle(people.p256.raw(b"x")), accepted, "none of the keys that count (team)")
    refused(bundle(b"junk"), accepted, "is not ECDSA")
    refused(bundle(signature), [people.p256.anchor()], "it is a sigstore bundle, and none of", KeyUnknown)
    for wrong in (1, None, [], {"signature": 1}, {}):
        refused(bundle(b"", messageSignature=wrong), accepted, "contains no signature by a key")
    refused(cosign(b"", base64Signature="*"), accepted, "is not base64")
    refused(cosign(b"", base64Signature="ä"), accepted, "is not base64")


def partition(signatory: Signatory, root_hash: str = ROOT, **more: object) -> bytes:
    """The contents of a signature partition, as systemd-repart makes it."""
    body = {
        "rootHash": root_hash,
        "certificateFingerprint": hashlib.sha256(signatory.der).hexdigest(),
        "signature": base64.b64encode(signatory.roothash(root_hash.encode())).decode(),
    }
    merged = {key: value for key, value in (body | more).items() if value is not None}
    return json.dumps(merged).encode()


def test_verity_signature(people: People) -> None:
    accepted = [people.foreign.anchor("other"), people.p256.anchor()]
    wanted = Signer("team", "CN=p256", *DIGESTS[1])
    whole = partition(people.p256)
    for form in (whole, whole.ljust(16384, b"\0"), partition(people.p256, certificateFingerprint=None)):
        assert replace(verify(form, accepted, DIGESTS, NOW), valid_until=None) == wanted
    refused(whole, accepted[:1], "neither came with it nor is one of the keys", KeyUnknown)
    refused(whole, [people.p256.bare("ecdsa")], "it is a PKCS#7 signature, and none of", KeyUnknown)
    refused(partition(people.p256, rootHash=HEX), accepted, "the rootHash in its JSON is not that of")
    # Valid in itself, but what it is of is another image's root hash, or no root hash.
    other = hashlib.sha256(b"other").hexdigest()
    refused(partition(people.p256, other), accepted, "the rootHash in its JSON is not that of")
    refused(partition(people.p256, HEX), accepted, "the rootHash in its JSON is not that of")
    elsewhere = base64.b64encode(people.p256.roothash(other.encode())).decode()
    refused(partition(people.p256, signature=elsewhere), accepted, "has not signed this image")
    fingerprint = hashlib.sha256(people.foreign.der).hexdigest()
    refused(partition(people.p256, certificateFingerprint=fingerprint), accepted, "not that of its signer")
    for field, value, reason in (
        ("signature", "*", "is not base64"),
        ("signature", "", "it is cut off"),
        ("signature", 1, "is not a string"),
        ("signature", None, "lacks rootHash or signature"),
        ("rootHash", [], "is not a string"),
        ("certificateFingerprint", 1, "is not a string"),
    ):
        refused(partition(people.p256, **{field: value}), accepted, reason)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{}", "neither a verity signature nor a sigstore bundle"),
        (b"{", "cannot be read"),
        (b"{\xff}", "cannot be read"),
        (b'{"rootHash": 1' + b"0" * 5000 + b"}", "cannot be read"),
        (b'{"rootHash": "a", "rootHash": "b"}', "the same key twice"),
        (b'{"a":' * (MAXIMUM_BRACKETS + 1), f"more than {MAXIMUM_BRACKETS} brackets"),
        (b'{"a":' + b"[" * 100000, f"more than {MAXIMUM_BRACKETS} brackets"),
        (b'{"a": 1}\0x', "cannot be read"),
    ],
)
def test_json_that_is_none(people: People, data: bytes, reason: str) -> None:
    refused(data, [people.p256.anchor(), people.p256.bare("sigstore", "other")], reason)


@pytest.mark.parametrize("first", [b"{", b"\x30", b"\x88", b"\x89", b"\x8a", b"\xc2"], ids=repr)
def test_ed25519_that_begins_as_another_kind_does(first: bytes) -> None:
    """One of 256 has any given first byte: an honest signature must not be refused by chance."""
    key = Ed25519PrivateKey.generate()
    count = 0
    while True:
        contents = [("image", f"sha256:{hashlib.sha256(count.to_bytes(4, 'big')).hexdigest()}")]
        signature = key.sign(contents[0][1].removeprefix("sha256:").encode())
        if signature.startswith(first):
            break
        count += 1
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    accepted = [Key("team", "ed25519", (pem,), "team.key")]
    assert verify(signature, accepted, contents, NOW).key == "team"
    with pytest.raises(SignatureInvalid, match="none of the keys that count"):
        verify(signature, accepted, DIGESTS, NOW)
