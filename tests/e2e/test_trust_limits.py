"""What bounds trust: when certificates are valid, what is hashed for whom, and that nothing is weakened."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from mountd.client import Client
from mountd.daemon.throttle import LINES, SECONDS
from mountd.errors import NotFound
from mountd.evidence.sealed import SEALS
from mountd.fds import OwnedFd
from mountd.service.inspection import LONG_TO_HASH
from mountd.store.quota import Limits
from mountd.store.record import Owner
from tests.container import USER, as_user
from tests.e2e.calls import explain, mount_fds, outcome
from tests.e2e.trust import (
    NONE,
    SEALED_RULE,
    STORED,
    Case,
    Makers,
    as_the_user,
    both,
    key_sections,
    memfd,
    of_image,
    rule,
    signed_by,
    source,
    users_file,
)
from tests.rogue import eventually
from tests.superblock import superblock

LEFT_OUT = re.compile(r"mountd: (\d+) lines about requests of uid (\d+) were left out")


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


class TestCertificates:
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

        def told() -> int:
            return sum(int(number) for number, _ in LEFT_OUT.findall(case.daemon.log))

        def written() -> int:
            return case.daemon.log.count(f"Mount for uid {USER} ")

        # A window may end meanwhile; a line comes a moment after the reply.
        while count - written() < LINES:
            as_user(lambda: ask(LINES))
            count += LINES
        time.sleep(SECONDS)
        as_user(lambda: ask(1), uid=USER + 1)
        as_user(lambda: ask(1))
        count += 1
        assert eventually(lambda: told() + written() == count), (case.daemon.log[-2000:], count)
        assert told() >= LINES // 2
        assert {uid for _, uid in LEFT_OUT.findall(case.daemon.log)} == {str(USER)}
