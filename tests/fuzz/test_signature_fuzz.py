"""Whatever the bytes of a signature are: a signer, SignatureInvalid or KeyUnknown, and nothing else.

A signature that was changed only holds if what it says stayed the same, so that what is returned is what the
real one had returned.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mountd.errors import KeyUnknown, SignatureInvalid
from mountd.evidence import certificate, cms, der, openpgp
from mountd.evidence.model import Key, Signer
from mountd.evidence.signature import verify
from tests.signing import LEAF, Signatory

RELAXED = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NOW = int(time.time()) + 3600
HEX = hashlib.sha256(b"image").hexdigest()
DIGESTS = [("root-hash", f"sha256:{HEX}"), ("image", f"sha256:{HEX}")]
KINDS = ("cms", "chain", "roothash", "raw", "bundle", "partition")
# Where to cut, what to put there, how much to drop.
CHANGES = st.lists(
    st.tuples(
        st.integers(0, 1 << 16), st.binary(max_size=3) | st.sampled_from([b"\x30\x80", b"\x04\x84\xff"]),
        st.integers(0, 3),
    ),
    min_size=1, max_size=4,
)  # fmt: skip
FIELDS = ("rootHash", "signature", "certificateFingerprint", "base64Signature", "messageSignature")
BITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 7)), min_size=1, max_size=3)


class Samples(dict[str, bytes]):
    """A good signature of each kind, and the keys and the signers of all."""

    def __init__(self, directory: Path) -> None:
        root = Signatory(directory, "root")
        leaf = Signatory(directory, "leaf", extensions=LEAF, issuer=root)
        self.keys = [
            root.anchor("root"),
            leaf.anchor("leaf"),
            leaf.bare("ecdsa", "raw"),
            leaf.bare("sigstore", "s"),
        ]
        text = HEX.encode()
        raw = leaf.raw(b"image")
        p7s = leaf.roothash(text)
        partition = {
            "rootHash": HEX,
            "certificateFingerprint": hashlib.sha256(leaf.der).hexdigest(),
            "signature": base64.b64encode(p7s).decode(),
        }
        super().__init__(
            cms=leaf.cms(text),
            chain=leaf.cms(text, "-certfile", root.pem),
            roothash=p7s,
            raw=raw,
            bundle=json.dumps({"base64Signature": base64.b64encode(raw).decode()}).encode(),
            partition=json.dumps(partition).encode(),
        )
        self.signers = {kind: verify(self[kind], self.keys, DIGESTS, NOW) for kind in KINDS}

    def __repr__(self) -> str:
        return "Samples()"  # hypothesis prints the arguments of what failed


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return Samples(tmp_path_factory.mktemp("keys"))


def judge(data: bytes, keys: list[Key]) -> Signer | None:
    try:
        return verify(data, keys, DIGESTS, NOW)
    except (SignatureInvalid, KeyUnknown) as error:
        text = str(error)
        assert text.isprintable()
        assert len(text) < 1500
        return None


@RELAXED
@given(data=st.binary(max_size=2000))
def test_random_bytes(samples: Samples, data: bytes) -> None:
    # Those that begin as OpenPGP does are a program's to read: see test_packets_of_random_bytes.
    if not openpgp.is_signature(data):
        assert judge(data, samples.keys) is None


@RELAXED
@pytest.mark.parametrize("kind", KINDS)
@given(bits=BITS)
def test_flipped_bits(samples: Samples, kind: str, bits: list[tuple[int, int]]) -> None:
    data = bytearray(samples[kind])
    for offset, bit in bits:
        data[offset % len(data)] ^= 1 << bit
    assert_unchanged(samples, kind, bytes(data))


@RELAXED
@pytest.mark.parametrize("kind", KINDS)
@given(changes=CHANGES)
def test_cut_and_pasted(samples: Samples, kind: str, changes: list[tuple[int, bytes, int]]) -> None:
    data = samples[kind]
    for offset, new, dropped in changes:
        place = offset % (len(data) + 1)
        data = data[:place] + new + data[place + dropped :]
    assert_unchanged(samples, kind, data)


def assert_unchanged(samples: Samples, kind: str, data: bytes) -> None:
    if openpgp.is_signature(data):
        return
    found = judge(data, samples.keys)
    if found is None:
        return
    wanted = samples.signers[kind]
    # Another certificate of the policy may vouch for the same signer once the message names it no longer.
    assert (found.subject, found.covers, found.digest) == (wanted.subject, wanted.covers, wanted.digest)
    if kind in ("cms", "chain", "roothash"):
        was, is_ = (each_signed(each) for each in (samples[kind], data))
        assert was == is_


def each_signed(data: bytes) -> tuple[object, ...]:
    """What a verdict about a message stands on."""
    try:
        binary = base64.b64decode(data, validate=True)
    except ValueError:
        binary = data
    found = cms.read(binary)
    return found.digest_algorithm, found.attributes, found.message_digest, found.signature


@pytest.mark.parametrize("kind", ["cms", "chain", "roothash"])
def test_every_bit_of_what_is_signed(samples: Samples, kind: str) -> None:
    """No bit of the attributes and of the signature is without meaning."""
    data = samples[kind]
    signed = cms.read(data)
    for part in (signed.attributes and signed.attributes[1:], signed.signature):
        if not part:
            continue
        start = data.index(part)
        for offset in range(start, start + len(part)):
            for bit in range(8):
                changed = data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]
                assert judge(changed, samples.keys[:1] if kind != "roothash" else samples.keys) is None


@RELAXED
@given(body=st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.binary(max_size=90).map(
        lambda data: base64.b64encode(data).decode()
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(FIELDS),
        inner, max_size=5,
    ),
    max_leaves=20,
))  # fmt: skip
def test_random_json(samples: Samples, body: object) -> None:
    assert judge(json.dumps({"rootHash": HEX, "x": body}).encode(), samples.keys) is None
    if isinstance(body, dict):
        assert judge(json.dumps(body).encode(), samples.keys) is None
        assert judge(json.dumps({"rootHash": HEX, **body}).encode(), samples.keys) is None


@RELAXED
@given(data=st.binary(max_size=300))
def test_der_of_random_bytes(data: bytes) -> None:
    reader = der.Reader(data)
    taken, problem = b"", ""
    try:
        while reader.peek() is not None:
            each = reader.take()
            assert each.raw.endswith(each.content)
            taken += each.raw
            der.integer(each)
            der.object_identifier(each)
    except der.DerError as error:
        problem = str(error)
    assert problem.isprintable()
    assert data.startswith(taken)
    assert problem or taken == data


@RELAXED
@given(bits=BITS)
def test_certificates_with_flipped_bits(samples: Samples, bits: list[tuple[int, int]]) -> None:
    data = bytearray(cms.read(samples["cms"]).certificates[0])
    for offset, bit in bits:
        data[offset % len(data)] ^= 1 << bit
    problem = ""
    try:
        certificate.read(bytes(data))
    except certificate.CertificateError as error:
        problem = str(error)
    assert problem.isprintable()


@RELAXED
@given(data=st.binary(max_size=300), armoured=st.booleans())
def test_packets_of_random_bytes(data: bytes, armoured: bool) -> None:
    if armoured:
        body = base64.encodebytes(data)
        data = b"-----BEGIN PGP SIGNATURE-----\n\n" + body + b"-----END PGP SIGNATURE-----\n"
    for read in (openpgp.signature, openpgp.public_keys):
        problem = ""
        try:
            assert isinstance(read(data), bytes)
        except openpgp.OpenPgpError as error:
            problem = str(error)
        assert problem.isprintable()
