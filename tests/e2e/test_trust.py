"""Which images are trusted through the socket: sealed, signed, named by digest, stored by themselves."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from mountd.client import Client
from mountd.daemon.throttle import LINES, SECONDS
from mountd.errors import InUse, InvalidImage, NotFound, NotImmutable
from mountd.evidence.sealed import SEALS
from mountd.fds import OwnedFd
from mountd.service.inspection import LONG_TO_HASH
from mountd.store.quota import Limits
from mountd.store.record import Owner
from mountd.store.store import Store
from tests.container import USER, as_user, drop_capabilities, forked
from tests.daemon import Daemon
from tests.e2e.calls import explain, mount_fds, outcome, text_of
from tests.images import build_image, build_tree
from tests.signing import LEAF, Gpg, Signatory
from tests.unit.source.test_verity_superblock import superblock

NONE = ("", "")
ROUNDS = 120
LEFT_OUT = re.compile(r"mountd: (\d+) lines about requests of uid (\d+) were left out")
KINDS = ("x509", "ed25519", "sigstore", "bundle", "ecdsa", "gpg")
Sign = Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class Makers:
    """For each kind of signature, how the policy's key and another one make it over an image."""

    keys: Path
    own: dict[str, Sign]
    foreign: dict[str, Sign]
    expired: dict[str, Sign]


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def of_image(data: bytes) -> bytes:
    """What Ed25519 and PKCS#7 signatures of an image are over: its digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest().encode()


@pytest.fixture(scope="module")
def makers(place: Path) -> Iterator[Makers]:
    keys = place / "keys"
    keys.mkdir(mode=0o755)
    home = Path(tempfile.mkdtemp(prefix="gpg-", dir="/tmp"))
    gpg = Gpg(home)
    gpg.generate("own")
    gpg.generate("foreign")
    gpg.run("--faked-system-time", "20200101T000000", "--quick-generate-key", "old", "ed25519", "sign", "1d")
    (keys / "gpg.key").write_bytes(gpg.run("--export", "own"))
    (keys / "old.key").write_bytes(gpg.run("--export", "old"))
    made: dict[str, dict[str, Sign]] = {}
    for who in ("own", "foreign"):
        place_of = keys / who
        place_of.mkdir()
        authority = Signatory(place_of, f"{who} authority")
        leaf = Signatory(place_of, f"{who} leaf", extensions=LEAF, issuer=authority)
        ed = Signatory(place_of, f"ed25519 {who}", "ed25519")
        ec = Signatory(place_of, f"ec {who}")
        if who == "own":
            shutil.copy(authority.pem, keys / "x509.key")
            (keys / "ed25519.key").write_bytes(ed.public)
            (keys / "ecdsa.key").write_bytes(ec.public)

        def bundle(data: bytes, ec: Signatory = ec) -> bytes:
            return json.dumps({"base64Signature": base64.b64encode(ec.raw(data)).decode()}).encode()

        made[who] = {
            "x509": lambda data, leaf=leaf: leaf.cms(of_image(data)),  # type: ignore[misc]
            "ed25519": lambda data, ed=ed, at=place_of: ed.ed25519(of_image(data), at),  # type: ignore[misc]
            "sigstore": lambda data, ec=ec: base64.b64encode(ec.raw(data)),  # type: ignore[misc]
            "bundle": bundle,
            "ecdsa": lambda data, ec=ec: ec.raw(of_image(data)),  # type: ignore[misc]
            "gpg": lambda data, who=who: gpg.sign(of_image(data), who),  # type: ignore[misc]
        }
    old = {
        "gpg": lambda data: gpg.sign(of_image(data), "old", "--faked-system-time", "20200101T010000"),
    }
    yield Makers(keys, made["own"], made["foreign"], old)
    gpg.close()
    shutil.rmtree(home)


def key_sections(keys: Path) -> str:
    files = {
        "x509": ("x509", "x509"),
        "ed25519": ("ed25519", "ed25519"),
        "sigstore": ("sigstore", "ecdsa"),
        "ecdsa": ("ecdsa", "ecdsa"),
        "gpg": ("gpg", "gpg"),
    }
    return "".join(f'[key.{name}]\n{kind} = "{keys / file}.key"\n' for name, (kind, file) in files.items())


def rule(name: str, image: str, integrity: str, require: str = "", **grant: str) -> str:
    fields = {"file-systems": '["erofs", "ext4"]', "idmap": '["none"]'} | grant
    return f"""
[[rule]]
name = "{name}"
image = {{ {image} }}
caller = {{ any = true }}
require = {{ integrity = [{integrity}]{require} }}
grant = {{ {", ".join(f"{key} = {value}" for key, value in fields.items())} }}
verdict = "allow"
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A daemon of the test's, an image that users can read, and its bytes."""

    daemon: Daemon
    data: bytes

    def store(self) -> Store:
        return Store(self.daemon.directory / "state")

    def stored(self) -> list[str]:
        """The digests in the store; nothing but these is left there."""
        deadline = time.monotonic() + 5
        while list((self.daemon.directory / "state/incoming").iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not list((self.daemon.directory / "state/incoming").iterdir())
        return [record.digest for record in self.store().records()]


@pytest.fixture(scope="module")
def data(place: Path) -> bytes:
    tree = build_tree(place / "tree-trust")
    return build_image("erofs", tree, place / "trust.raw").read_bytes()


@pytest.fixture(scope="module")
def other(place: Path) -> bytes:
    tree = build_tree(place / "tree-other")
    (tree / "hello").write_text("hello from another image\n")
    return build_image("erofs", tree, place / "other.raw").read_bytes()


@pytest.fixture
def begin(start: Callable[..., Daemon], data: bytes) -> Callable[[str], Case]:
    return lambda policy: Case(start(policy), data)


@contextlib.contextmanager
def memfd(data: bytes, seals: int) -> Iterator[int]:
    fd = OwnedFd(os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    with fd:
        os.write(fd.fileno(), data)
        if seals:
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
        yield fd.fileno()


@contextlib.contextmanager
def users_file(directory: Path, data: bytes) -> Iterator[Path]:
    """A file that USER can write to, in a directory of its own."""
    home = Path(tempfile.mkdtemp(dir=directory))
    os.chown(home, USER, USER)
    path = home / "image.raw"
    path.write_bytes(data)
    os.chown(path, USER, USER)
    yield path
    shutil.rmtree(home)


def source(signature: bytes | None = None) -> dict[str, object]:
    given = {"imageFileDescriptor": 0}
    return given if signature is None else {**given, "signature": base64.b64encode(signature).decode()}


def both(case: Case, fd: int, signature: bytes | None = None, **fields: object) -> tuple[str, str]:
    """Ask Explain and Mount as the user; they agree, and Explain changes nothing.

    Return the name of the error, and its text with the hint.
    """
    before = case.stored()
    said = as_user(lambda: explain(case.daemon.socket, source(signature), [fd], **fields))
    assert case.stored() == before
    found = as_user(
        lambda: outcome(lambda: mount_fds(case.daemon.socket, source(signature), [fd], **fields))
    )
    decision = said["decision"]
    assert isinstance(decision, dict)
    assert (decision["verdict"] == "allow") is (found == NONE), (said, found)
    if found != NONE:
        assert decision["reason"] in found[1]
        return found[0], f"{found[1]}; hint: {decision.get('hint')}"
    return found


def as_the_user(case: Case, path: Path, signature: bytes | None, **fields: object) -> tuple[str, str]:
    with OwnedFd(os.open(path, os.O_RDWR)) as fd:
        return both(case, fd.fileno(), signature, **fields)


class Certified:
    """A certificate for a time that is given in days from now, which openssl makes for none that is past."""

    def __init__(self, name: str, days: tuple[int, int], issuer: Certified | None = None) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._issuer = issuer
        by, key = (issuer._name, issuer._key) if issuer else (self._name, self._key)
        first, last = (datetime.now(UTC) + timedelta(days=each) for each in days)
        self.certificate = (
            x509.CertificateBuilder(by, self._name, self._key.public_key(), 1 + sum(name.encode()))
            .not_valid_before(first)
            .not_valid_after(last)
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        """The certificate in PEM."""
        return self.certificate.public_bytes(Encoding.PEM)

    def cms(self, data: bytes) -> bytes:
        """A detached signature with the certificate in it."""
        builder = pkcs7.PKCS7SignatureBuilder(data).add_signer(self.certificate, self._key, hashes.SHA256())
        options = [pkcs7.PKCS7Options.DetachedSignature, pkcs7.PKCS7Options.Binary]
        return builder.sign(Encoding.DER, options)


SEALED_RULE = rule("sealed", "any = true", '"sealed"')


class TestSealed:
    def test_all_four_seals(self, begin: Callable[[str], Case]) -> None:
        case = begin(SEALED_RULE)

        def work() -> str:
            with mount_fds(case.daemon.socket, source(), [fd]) as reply:
                assert reply.decision["trustedBy"] == "sealed"
                return text_of(reply)

        with memfd(case.data, sum(SEALS)) as fd:
            assert both(case, fd) == NONE
            assert as_user(work) == "hello from the image\n"

    @pytest.mark.parametrize("missing", sorted(SEALS.values()))
    def test_any_seal_that_is_missing(self, begin: Callable[[str], Case], missing: str) -> None:
        case = begin(SEALED_RULE)
        seals = sum(seal for seal, name in SEALS.items() if name != missing)
        with memfd(case.data, seals) as fd:
            name, text = both(case, fd)
        assert name == "NotImmutable"
        assert f"it lacks {missing}" in text
        assert "hand it over as a memfd with all four seals" in text

    def test_future_writes_sealed_is_not_enough(self, begin: Callable[[str], Case]) -> None:
        case = begin(SEALED_RULE)
        seals = sum(seal for seal, name in SEALS.items() if name != "F_SEAL_WRITE") | 0x10
        with memfd(case.data, seals) as fd:
            assert both(case, fd)[0] == "NotImmutable"


def signed_by(kind: str, *integrity: str) -> str:
    key = "sigstore" if kind == "bundle" else kind
    kinds = ", ".join(f'"{each}"' for each in integrity)
    return rule("by key", "any = true", kinds, f', signature = "{key}"')


class TestSignatures:
    @pytest.mark.parametrize("kind", KINDS)
    def test_each_kind(self, begin: Callable[[str], Case], makers: Makers, other: bytes, kind: str) -> None:
        # Of the two kinds of ECDSA key, the policy has the one that the rule is about.
        used = "sigstore" if kind == "bundle" else kind
        unused = "ecdsa" if used == "sigstore" else "sigstore"
        sections = key_sections(makers.keys).replace(f"[key.{unused}]\n{unused}", f"[key.{unused}]\necdsa")
        sections = sections.replace(f'[key.{unused}]\necdsa = "{makers.keys}/ecdsa.key"\n', "")
        case = begin(sections + signed_by(kind, "sealed"))
        good = makers.own[kind](case.data)
        with memfd(case.data, sum(SEALS)) as fd:

            def ask(signature: bytes | None) -> tuple[str, str]:
                return both(case, fd, signature)

            assert ask(good) == NONE
            name, text = ask(None)
            assert name == "DeniedByPolicy"
            assert "hand over a detached signature by the key" in text
            assert ask(makers.own[kind](other))[0] == "SignatureInvalid"
            # A bare signature does not say whose it is.
            wrong = "KeyUnknown" if kind in ("x509", "gpg") else "SignatureInvalid"
            assert ask(makers.foreign[kind](case.data))[0] == wrong
            assert ask(good[: len(good) // 2])[0] == "SignatureInvalid"
            assert ask(good[:-1])[0] == "SignatureInvalid"
            assert ask(b"")[0] == "SignatureInvalid"
            assert ask(b"no signature at all")[0] == "SignatureInvalid"
        assert case.stored() == []

    def test_a_key_that_the_rule_does_not_want(self, begin: Callable[[str], Case], makers: Makers) -> None:
        case = begin(key_sections(makers.keys) + signed_by("ed25519", "sealed"))
        with memfd(case.data, sum(SEALS)) as fd:
            name, text = both(case, fd, makers.own["gpg"](case.data))
        assert name == "KeyUnknown"
        assert "sign it with the key “ed25519”" in text

    def test_an_expired_key(self, begin: Callable[[str], Case], makers: Makers) -> None:
        section = f'[key.old]\ngpg = "{makers.keys}/old.key"\n'
        case = begin(section + signed_by("old", "sealed"))
        with memfd(case.data, sum(SEALS)) as fd:
            found = both(case, fd, makers.expired["gpg"](case.data))
        assert found[0] == "SignatureInvalid"
        assert "expired" in found[1]

    @pytest.mark.parametrize(
        ("days", "name", "said"),
        [
            ((-10, 10), "", ""),
            ((-10, -1), "SignatureInvalid", "expired at"),
            ((1, 10), "SignatureInvalid", "is not valid before"),
        ],
    )
    @pytest.mark.parametrize("whose", ["the signer's", "the authority's"])
    def test_a_certificate_out_of_its_time(
        self,
        begin: Callable[[str], Case],
        makers: Makers,
        days: tuple[int, int],
        name: str,
        said: str,
        whose: str,
    ) -> None:
        good = (-10, 10)
        authority = Certified("authority", days if whose == "the authority's" else good)
        leaf = Certified("leaf", days if whose == "the signer's" else good, issuer=authority)
        (makers.keys / "timed.key").write_bytes(authority.pem)
        section = f'[key.timed]\nx509 = "{makers.keys}/timed.key"\n'
        case = begin(section + signed_by("timed", "sealed"))
        with memfd(case.data, sum(SEALS)) as fd:
            found = both(case, fd, leaf.cms(of_image(case.data)))
        assert found[0] == name, found
        assert said in found[1]

    def test_a_policy_without_keys(self, begin: Callable[[str], Case], makers: Makers) -> None:
        """The image is not even hashed."""
        case = begin(rule("any", "any = true", '"sealed"', ', min-strength = "signed"'))
        with memfd(case.data, sum(SEALS)) as fd:
            found = both(case, fd, makers.own["gpg"](case.data))
        assert found[0] == "DeniedByPolicy"
        assert "the policy has no keys" in found[1]

    def test_an_image_rule(self, begin: Callable[[str], Case], makers: Makers, other: bytes) -> None:
        """image = { signed = … } is about images that are signed so, and about no others."""
        case = begin(key_sections(makers.keys) + rule("signed", 'signed = "ed25519"', '"sealed"'))
        with memfd(case.data, sum(SEALS)) as fd:
            assert both(case, fd, makers.own["ed25519"](case.data)) == NONE
            for signature in (None, makers.own["ed25519"](other), makers.own["gpg"](case.data)):
                assert both(case, fd, signature)[0] == "DeniedByPolicy"


class TestDigests:
    def test_rules_name_bytes(self, begin: Callable[[str], Case], other: bytes, place: Path) -> None:
        digest = digest_of((place / "trust.raw").read_bytes())
        case = begin(rule("these bytes", f'digest = ["{digest}"]', '"sealed", "stored"'))
        with memfd(case.data, sum(SEALS)) as fd:
            assert both(case, fd) == NONE
        with memfd(other, sum(SEALS)) as fd:
            assert both(case, fd)[0] == "DeniedByPolicy"
        assert case.stored() == []
        with users_file(place, other) as path:
            assert as_the_user(case, path, None)[0] == "DeniedByPolicy"
        assert case.stored() == []
        with users_file(place, case.data) as path:
            assert as_the_user(case, path, None) == NONE
        assert case.stored() == [digest]


STORED = rule("stored and signed", "any = true", '"stored"', ', signature = "ed25519"')


class TestStoredByItself:
    def test_a_signed_file(self, begin: Callable[[str], Case], makers: Makers, place: Path) -> None:
        case = begin(key_sections(makers.keys) + STORED)
        signature = makers.own["ed25519"](case.data)

        def work() -> str:
            with (
                OwnedFd(os.open(path, os.O_RDWR)) as fd,
                mount_fds(case.daemon.socket, source(signature), [fd.fileno()]) as reply,
            ):
                # Nothing of the image has been read through the mount so far.
                os.pwrite(fd.fileno(), bytes(len(case.data)), 0)
                assert reply.decision["trustedBy"] == "stored"
                return text_of(reply)

        with users_file(place, case.data) as path:
            assert as_the_user(case, path, signature) == NONE
            assert case.stored() == [digest_of(case.data)]
            assert case.store().record(digest_of(case.data)).belongs_to(USER)
            assert as_user(work) == "hello from the image\n"
            assert as_the_user_refused(case, path, signature) == "UnsupportedFileSystem"

    def test_what_is_refused_is_never_copied(
        self, begin: Callable[[str], Case], makers: Makers, place: Path, other: bytes
    ) -> None:
        case = begin(key_sections(makers.keys) + STORED)
        with users_file(place, case.data) as path:
            for signature, name in (
                (None, "NotImmutable"),
                (makers.own["ed25519"](other), "NotImmutable"),
                (makers.foreign["ed25519"](case.data), "NotImmutable"),
                (makers.own["gpg"](case.data), "KeyUnknown"),  # holds, but is not the one that counts
            ):
                assert as_the_user(case, path, signature)[0] == name
                assert case.stored() == []
            good = makers.own["ed25519"](case.data)
            refused = as_the_user(case, path, good, imagePolicy="root=signed")
            assert refused[0] == "DeniedByPolicy"
            assert as_the_user(case, path, good, options=["suid"])[0] == "OptionNotPermitted"
            assert as_the_user(case, path, good, readOnly=False)[0] == "OptionNotPermitted"
            assert case.stored() == []
            assert as_the_user(case, path, good) == NONE
        assert case.stored() == [digest_of(case.data)]

    def test_not_where_the_policy_has_no_use_for_a_copy(
        self, begin: Callable[[str], Case], makers: Makers, place: Path
    ) -> None:
        case = begin(key_sections(makers.keys) + signed_by("ed25519", "sealed"))
        with users_file(place, case.data) as path:
            found = as_the_user(case, path, makers.own["ed25519"](case.data))
        assert found[0] == "NotImmutable"
        assert case.stored() == []

    @pytest.mark.parametrize("by", ["signature", "digest"])
    def test_a_sealed_image(
        self, begin: Callable[[str], Case], makers: Makers, other: bytes, data: bytes, by: str
    ) -> None:
        """Where a rule wants it stored, it does not matter that it could not change anyway."""
        if by == "signature":
            case, signature = begin(key_sections(makers.keys) + STORED), makers.own["ed25519"](data)
        else:
            case, signature = begin(rule("named", f'digest = ["{digest_of(data)}"]', '"stored"')), None

        def work() -> str:
            with mount_fds(case.daemon.socket, source(signature), [fd]) as reply:
                assert reply.decision["trustedBy"] == "stored"
                assert reply.decision["digest"] == digest_of(data)
                return text_of(reply)

        with memfd(other, sum(SEALS)) as fd:
            assert both(case, fd, signature)[0] in ("NotImmutable", "DeniedByPolicy")
            assert case.stored() == []
        with memfd(data, sum(SEALS)) as fd:
            for unfit in ({"readOnly": False}, {"options": ["suid"]}):
                assert both(case, fd, signature, **unfit)[0] == "OptionNotPermitted"
            assert case.stored() == []
            assert both(case, fd, signature) == NONE
            assert case.stored() == [digest_of(data)]
            assert case.store().record(digest_of(data)).belongs_to(USER)
            assert as_user(work) == "hello from the image\n"

    def test_who_can_have_nothing_in_the_store(
        self, begin: Callable[[str], Case], makers: Makers, place: Path, data: bytes
    ) -> None:
        """Explain says so, as Mount does."""
        case = begin(key_sections(makers.keys) + STORED)
        signature = makers.own["ed25519"](data)

        def ask(fd: int) -> set[tuple[str, bool]]:
            def work() -> set[tuple[str, bool]]:
                drop_capabilities()
                given = (case.daemon.socket, source(signature), [fd])
                found = [outcome(lambda: mount_fds(*given)), outcome(lambda: explain(*given))]
                return {(name, "root without CAP_SYS_ADMIN" in text) for name, text in found}

            return forked(work)

        with memfd(data, sum(SEALS)) as fd:
            assert ask(fd) == {("DeniedByPolicy", True)}
        with users_file(place, data) as path, OwnedFd(os.open(path, os.O_RDONLY)) as file:
            assert ask(file.fileno()) == {("DeniedByPolicy", True)}
        assert case.stored() == []

    def test_a_sealed_image_that_nobody_vouches_for(
        self, begin: Callable[[str], Case], makers: Makers, data: bytes
    ) -> None:
        case = begin(key_sections(makers.keys) + STORED)
        with memfd(data, sum(SEALS)) as fd:
            assert both(case, fd)[0] == "NotImmutable"
            assert both(case, fd, makers.foreign["ed25519"](data))[0] == "NotImmutable"
            # Signed, but by another key: a copy would not help.
            assert both(case, fd, makers.own["gpg"](data))[0] == "KeyUnknown"
        assert case.stored() == []

    def test_a_sealed_image_that_is_good_as_it_is(
        self, begin: Callable[[str], Case], makers: Makers, data: bytes
    ) -> None:
        both_kinds = rule("either", "any = true", '"sealed", "stored"', ', signature = "ed25519"')
        case = begin(key_sections(makers.keys) + both_kinds)
        with memfd(data, sum(SEALS)) as fd:
            assert both(case, fd, makers.own["ed25519"](data)) == NONE
        assert case.stored() == []

    def test_an_image_of_roots(
        self, begin: Callable[[str], Case], makers: Makers, place: Path, data: bytes
    ) -> None:
        """It is copied, unless a rule about where it lies denies it."""
        path = place / "trust.raw"
        signature = makers.own["ed25519"](data)
        denied = f"""
[[rule]]
name = "not these"
image = {{ location = "{place}/*" }}
caller = {{ any = true }}
verdict = "deny"
"""
        for policy, found, stored in (
            (denied + STORED, "DeniedByPolicy", []),
            (STORED, "", [digest_of(data)]),
        ):
            case = begin(key_sections(makers.keys) + policy)
            with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
                assert both(case, fd.fileno(), signature)[0] == found
            assert case.stored() == stored

    def test_a_file_that_changes_meanwhile(
        self, begin: Callable[[str], Case], makers: Makers, place: Path, other: bytes
    ) -> None:
        """What is mounted is what was signed, or nothing; and the record is about what is stored."""
        case = begin(key_sections(makers.keys) + STORED)
        size = max(len(case.data), len(other))
        good, bad = case.data.ljust(size, b"\0"), other.ljust(size, b"\0")
        signature = makers.own["ed25519"](good)
        store = case.store()

        def ask() -> str:
            with OwnedFd(os.open(path, os.O_RDWR)) as fd:
                try:
                    reply = mount_fds(case.daemon.socket, source(signature), [fd.fileno()])
                except (NotImmutable, InvalidImage):
                    return ""
                with reply:
                    return text_of(reply)

        found = []
        with users_file(place, good) as path, writer(path, good, bad):
            for _ in range(ROUNDS):
                found.append(as_user(ask))
                for record in store.records():
                    assert record.digest == digest_of(good)
                    assert record.file_system is not None
                    with contextlib.suppress(InUse):
                        store.remove(record.digest, 0)  # so that it is stored anew
        assert set(found) == {"", "hello from the image\n"}
        assert set(case.stored()) <= {digest_of(good)}

    def test_a_key_that_is_replaced_after_the_import(
        self, begin: Callable[[str], Case], makers: Makers, place: Path
    ) -> None:
        keys = place / "replaced"
        keys.mkdir(mode=0o755)
        shutil.copy(makers.keys / "ed25519.key", keys / "ed25519.key")
        policy = f'[key.ed25519]\ned25519 = "{keys}/ed25519.key"\n' + STORED
        case = begin(policy)
        stored = {"reference": f"stored:{digest_of(case.data)}"}

        def ask() -> tuple[str, str]:
            return as_user(lambda: outcome(lambda: mount_fds(case.daemon.socket, stored, [])))

        with users_file(place, case.data) as path:
            assert as_the_user(case, path, makers.own["ed25519"](case.data)) == NONE
        assert ask() == NONE
        (keys / "ed25519.key").write_bytes(Signatory(keys, "ed25519 new", "ed25519").public)
        reload(case.daemon)
        name, text = ask()
        assert (name, "no signature came along" in text) == ("DeniedByPolicy", True)
        shutil.copy(makers.keys / "ed25519.key", keys / "ed25519.key")
        reload(case.daemon)
        assert ask() == NONE
        shutil.rmtree(keys)


class TestHashing:
    """What is hashed for a caller costs it as much as an import."""

    @pytest.mark.parametrize("sealed", [False, True])
    def test_larger_than_an_image_may_be(
        self, begin: Callable[[str], Case], makers: Makers, place: Path, data: bytes, sealed: bool
    ) -> None:
        case = begin(key_sections(makers.keys) + STORED + signed_by("ed25519", "sealed"))
        signature = makers.own["ed25519"](data)
        size = Limits().image_bytes + 4096

        def check(fd: int) -> None:
            given = (case.daemon.socket, source(signature), [fd])
            for ask in (mount_fds, explain):
                name, text = as_user(lambda ask=ask: outcome(lambda: ask(*given)))  # type: ignore[misc]
                assert (name, "bytes in an image that is hashed" in text) == ("LimitExceeded", True)

        # Both are sparse, and cost whoever made them nothing.
        if sealed:
            with memfd(data, 0) as fd:
                os.ftruncate(fd, size)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, sum(SEALS))
                check(fd)
        else:
            with users_file(place, data) as path, OwnedFd(os.open(path, os.O_RDWR)) as file:
                os.ftruncate(file.fileno(), size)
                check(file.fileno())
        assert case.stored() == []

    @pytest.mark.parametrize("sealed", [False, True])
    def test_as_many_at_once_as_transfers(
        self, begin: Callable[[str], Case], makers: Makers, place: Path, data: bytes, sealed: bool
    ) -> None:
        """Those that take long are counted; what is small is let through all the same."""
        case = begin(key_sections(makers.keys) + STORED + signed_by("ed25519", "sealed"))
        store = case.store()
        small = makers.own["ed25519"](data)
        long = data.ljust(LONG_TO_HASH + 4096, b"\0")
        signature = makers.own["ed25519"](long)
        with users_file(place, data) as path, memfd(data, 0) as memory, contextlib.ExitStack() as stack:
            file = stack.enter_context(OwnedFd(os.open(path, os.O_RDWR))).fileno()
            assert both(case, file, small) == NONE
            fd = memory if sealed else file
            os.ftruncate(fd, len(long))
            if sealed:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, sum(SEALS))
            with contextlib.ExitStack() as slots:
                for _ in range(store.limits.owner_transfers):
                    slots.enter_context(store.slot(Owner(USER, USER)))
                given = (case.daemon.socket, source(signature), [fd])
                for ask in (mount_fds, explain):
                    name, text = as_user(lambda ask=ask: outcome(lambda: ask(*given)))  # type: ignore[misc]
                    assert (name, "transfers of one owner" in text) == ("LimitExceeded", True)
                with users_file(place, data) as other:
                    assert as_the_user(case, other, small) == NONE
            assert as_user(lambda: outcome(lambda: explain(*given))) == NONE


class TestDowngrade:
    """Who asks for dm-verity gets no mount without it."""

    @pytest.mark.parametrize("length", [32, 64])
    def test_a_root_hash_of_another_algorithm(
        self, begin: Callable[[str], Case], place: Path, data: bytes, length: int
    ) -> None:
        """The image is trusted for where it lies, which does not make up for it."""
        case = begin(rule("here", f'location = "{place}/*"', '"root-owned"'))
        algorithm = {32: b"sha512", 64: b"sha256"}[length]
        blocks = len(data) // 4096
        tree = superblock(algorithm=algorithm, data_blocks=blocks).ljust(4096, b"\0") + bytes(64 << 10)
        verity = {"dataFileDescriptor": 1, "rootHash": "ab" * length}
        asked = {"imageFileDescriptor": 0, "verity": verity}
        with OwnedFd(os.open(place / "trust.raw", os.O_RDONLY)) as image, memfd(tree, 0) as hashes:
            given = (case.daemon.socket, asked, [image.fileno(), hashes])
            for ask in (mount_fds, explain):
                name, text = as_user(lambda ask=ask: outcome(lambda: ask(*given)))  # type: ignore[misc]
                assert (name, "source.verity.rootHash" in text) == ("InvalidParameter", True), text
            without = (case.daemon.socket, source(), [image.fileno()])
            assert as_user(lambda: outcome(lambda: mount_fds(*without))) == NONE


def reload(daemon: Daemon) -> None:
    """Have it read the policy anew, and wait until no worker has the old one."""
    before = daemon.log.count("policy")
    workers = set(daemon.workers)
    daemon.signal(signal.SIGHUP)
    deadline = time.monotonic() + 10
    while daemon.log.count("policy") == before or workers & set(daemon.workers):
        assert time.monotonic() < deadline, daemon.log
        time.sleep(0.02)


def as_the_user_refused(case: Case, path: Path, signature: bytes) -> str:
    """Ask for a mount, and return the name of the error."""

    def ask() -> str:
        with OwnedFd(os.open(path, os.O_RDWR)) as fd:
            return outcome(lambda: mount_fds(case.daemon.socket, source(signature), [fd.fileno()]))[0]

    return as_user(ask)


@contextlib.contextmanager
def writer(path: Path, good: bytes, bad: bytes) -> Iterator[None]:
    """A process that keeps exchanging the contents of the file in place."""
    pid = os.fork()
    if pid == 0:
        try:
            fd = os.open(path, os.O_RDWR)
            while True:
                for data in (bad, good):
                    os.pwrite(fd, data, 0)
                    time.sleep(random.uniform(0, 0.004))
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


IMAGE_POLICIES = {
    "*": "",
    "root=unprotected": "",
    "root=open": "",
    "root=unprotected+read-only-on": "",
    "root=erofs": "",
    "root=signed": "DeniedByPolicy",
    "root=verity": "DeniedByPolicy",
    "root=encrypted": "DeniedByPolicy",
    "root=absent": "DeniedByPolicy",
    "root=ext4": "DeniedByPolicy",
    "usr=open": "DeniedByPolicy",
    "~": "DeniedByPolicy",
    "-": "DeniedByPolicy",
    "root": "InvalidParameter",
    "root=nonsense": "InvalidParameter",
    "": "InvalidParameter",
}


def test_an_image_policy_only_narrows(begin: Callable[[str], Case]) -> None:
    case = begin(SEALED_RULE)

    def ask(fd: int, wanted: str) -> str:
        return outcome(lambda: mount_fds(case.daemon.socket, source(), [fd], imagePolicy=wanted))[0]

    def work() -> None:
        with memfd(case.data, sum(SEALS)) as fd:
            assert {wanted: ask(fd, wanted) for wanted in IMAGE_POLICIES} == IMAGE_POLICIES
        with memfd(case.data, 0) as fd:
            assert ask(fd, "*") == "NotImmutable"
            assert ask(fd, "root=unprotected") == "NotImmutable"

    as_user(work)


class TestJournal:
    def test_what_was_left_out_is_told(self, begin: Callable[[str], Case]) -> None:
        """In the next window, with the first line about the same owner, and with nobody else's."""
        case = begin(SEALED_RULE)
        missing = {"reference": "stored:sha256:" + "0" * 64}
        count = 0

        def ask(times: int) -> None:
            with Client(str(case.daemon.socket)) as client:
                for _ in range(times):
                    with pytest.raises(NotFound):
                        client.mount(missing, [])

        # More than fit into two windows, as one may end meanwhile.
        for _ in range(3):
            as_user(lambda: ask(LINES))
            count += LINES
        deadline = time.monotonic() + 3 * SECONDS
        while not (told := LEFT_OUT.findall(case.daemon.log)):
            assert time.monotonic() < deadline, case.daemon.log[-2000:]
            as_user(lambda: ask(1), uid=USER + 1)
            time.sleep(0.5)
            as_user(lambda: ask(1))
            count += 1
        written = case.daemon.log.count(f"Mount for uid {USER} ")
        assert {uid for _, uid in told} == {str(USER)}
        assert sum(int(number) for number, _ in told) + written == count

    def test_lines_of_an_owner_are_limited(self, begin: Callable[[str], Case], data: bytes) -> None:
        case = begin(SEALED_RULE)

        def work() -> None:
            with Client(str(case.daemon.socket)) as client:
                for _ in range(3 * LINES):
                    with pytest.raises(NotFound):
                        client.mount({"reference": "stored:sha256:" + "0" * 64}, [])

        as_user(work)
        written = case.daemon.log.count(f"Mount for uid {USER} ")
        # The window may have ended once or twice meanwhile.
        assert LINES <= written < 3 * LINES
        with memfd(data, sum(SEALS)) as fd:  # of another owner, which has lines of its own
            assert outcome(lambda: mount_fds(case.daemon.socket, source(), [fd])) == NONE
        assert "Mount for uid 0 " in case.daemon.log
