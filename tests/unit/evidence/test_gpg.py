"""OpenPGP: what gpg signs is verified by the real gpgv, and what it does not vouch for is refused."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountd.errors import KeyUnknown, NotSupported, SignatureInvalid
from mountd.evidence import gpg, openpgp
from mountd.evidence.confined_signature import verify
from mountd.evidence.model import Key, Signer
from tests.signing import Gpg

NOW = int(time.time()) + 3600
HEX = hashlib.sha256(b"image").hexdigest()
ROOT = hashlib.sha512(b"root").hexdigest()
DIGESTS = [("image", f"sha256:{HEX}"), ("root-hash", f"sha512:{ROOT}")]
PAST = ("--faked-system-time", "20200101T000000!")


@pytest.fixture(scope="module")
def home() -> Iterator[Gpg]:
    # The agent's socket lies in it, whose path may have a hundred characters only.
    directory = Path(tempfile.mkdtemp(prefix="gpg-", dir="/tmp"))
    made = Gpg(directory)
    made.generate("alice")
    made.generate("bob", "rsa2048")
    made.generate("carol", "nistp256")
    made.generate("small", "rsa1024")
    made.generate("expired", "ed25519", "2020-01-02", *PAST)
    yield made
    made.close()
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def _agent_is_there_before(home: Gpg) -> None:
    """Have the agent be started before descriptors and children are counted."""


def refused(
    signature: bytes, keys: list[Key], reason: str, kind: type[Exception] = SignatureInvalid, now: int = NOW
) -> None:
    with pytest.raises((SignatureInvalid, KeyUnknown)) as raised:
        verify(signature, keys, DIGESTS, now)
    assert reason in str(raised.value)
    assert type(raised.value) is kind


@pytest.mark.parametrize("user", ["alice", "bob", "carol"])
@pytest.mark.parametrize("armour", [(), ("--armor",)])
@pytest.mark.parametrize("covers", [0, 1])
def test_good_signatures(home: Gpg, user: str, armour: tuple[str, ...], covers: int) -> None:
    text = (HEX, ROOT)[covers].encode()
    keys = [home.key("alice" if user == "bob" else "bob", "other"), home.key(user, "team", *armour)]
    found = verify(home.sign(text, user, *armour), keys, DIGESTS, NOW)
    assert found == Signer("team", found.subject, *DIGESTS[covers])
    fingerprint = (
        home.run("--with-colons", "--list-keys", user).decode().split("fpr:::::::::")[1].split(":")[0]
    )
    assert found.subject == f"{fingerprint} ({user})"


def test_foreign_key(home: Gpg) -> None:
    signature = home.sign(HEX.encode(), "alice")
    refused(signature, [home.key("bob", "b"), home.key("carol", "c")], "that count (b, c)", KeyUnknown)
    refused(signature, [], "it is an OpenPGP signature, and none of the keys", KeyUnknown)


def test_wrong_contents(home: Gpg) -> None:
    for text in (HEX.encode() + b"\n", b"image", b""):
        refused(home.sign(text, "alice"), [home.key("bob"), home.key("alice")], "has signed something else")


def test_weak_hash(home: Gpg) -> None:
    weak = ("--digest-algo", "SHA1", "--weak-digest", "MD5")
    refused(home.sign(HEX.encode(), "bob", *weak), [home.key("bob")], "a hash that is not SHA-256")


def test_text_signature(home: Gpg) -> None:
    refused(home.sign(HEX.encode(), "alice", "--textmode"), [home.key("alice")], "a signature of a text")


def test_expired_signature(home: Gpg) -> None:
    signature = home.sign(HEX.encode(), "alice", "--default-sig-expire", "1d")
    assert verify(signature, [home.key("alice")], DIGESTS, NOW).key == "team"
    refused(signature, [home.key("alice")], "it has expired", now=NOW + 2 * 86400)


def test_signature_that_has_expired_for_gpgv(home: Gpg) -> None:
    home.generate("old", "ed25519", "never", *PAST)
    signature = home.sign(HEX.encode(), "old", "--default-sig-expire", "1d", *PAST)
    refused(signature, [home.key("old")], "it has expired")


def test_signature_of_the_future(home: Gpg) -> None:
    refused(home.sign(HEX.encode(), "alice"), [home.key("alice")], "made in the future", now=NOW - 86400)


def test_expired_key(home: Gpg) -> None:
    refused(home.sign(HEX.encode(), "expired", *PAST), [home.key("expired")], "its key has expired")


def test_revoked_key(home: Gpg) -> None:
    home.generate("revoked")
    signature = home.sign(HEX.encode(), "revoked")
    colons = home.run("--with-colons", "--list-keys", "revoked").decode()
    fingerprint = colons.split("fpr:::::::::")[1].split(":")[0]
    certificate = (home.home / "openpgp-revocs.d" / f"{fingerprint}.rev").read_text()
    home.run("--import", data=certificate.replace(":-----BEGIN", "-----BEGIN").encode())
    refused(signature, [home.key("revoked")], "its key was revoked")


def test_two_signers(home: Gpg) -> None:
    both = home.sign(HEX.encode(), "alice", "--local-user", "bob")
    refused(both, [home.key("alice"), home.key("bob", "other")], "it has more than one signer")


def test_what_is_no_detached_signature(home: Gpg) -> None:
    key = [home.key("alice")]
    signature = home.sign(HEX.encode(), "alice")
    refused(signature + b"\x88", key, "cut off within the header")
    refused(signature[:-1], key, "it is cut off: 1 bytes are missing")
    refused(home.run("--armor", "--export", "alice"), key, "that is no OpenPGP signature")
    refused(
        home.run("--clear-sign", "--local-user", "alice", data=b"x"), key, "that is no OpenPGP signature"
    )
    refused(b"\xc2\xe0" + signature, key, "an OpenPGP packet in parts")
    for packet in (b"\x88\x00", b"\x88\x01\x04", b"\x88\x03\x09\x00\x16"):
        refused(packet, key, "gpgv ")


def test_damaged(home: Gpg) -> None:
    signature = home.sign(HEX.encode(), "alice")
    damaged = signature[:-1] + bytes([signature[-1] ^ 1])
    refused(damaged, [home.key("alice")], "has signed something else")
    armoured = home.sign(HEX.encode(), "alice", "--armor")
    lines = armoured.splitlines(keepends=True)
    refused(armoured.replace(lines[-2], b"=AAAA\n"), [home.key("alice")], "the checksum differs")
    refused(b"".join(lines[:-1]), [home.key("alice")], "its armour is cut off")
    refused(armoured.replace(lines[3][:4], b"**=="), [home.key("alice")], "its armour is not base64")


def test_keys_that_cannot_be_used(home: Gpg) -> None:
    signature = home.sign(HEX.encode(), "alice")
    secret = home.run("--export-secret-keys", "alice")
    for data, reason in (
        (secret, "no exported OpenPGP public key"),
        (home.run("--export", "alice") + secret, "a secret key, where a public one belongs"),
        (home.run("--export", "small"), "an RSA key of 1024 bits"),
        (b"junk", "no OpenPGP packet at byte 0"),
        (signature, "no exported OpenPGP public key"),
    ):
        key = Key("team", "gpg", (data,), "/etc/k.gpg")
        refused(signature, [key], f"the key “team” from /etc/k.gpg cannot be used: {reason}", KeyUnknown)


def test_key_of_several_files(home: Gpg) -> None:
    several = Key(
        "set", "gpg", tuple(home.run("--export", "--armor", user) for user in ("bob", "alice")), "dir"
    )
    assert verify(home.sign(HEX.encode(), "alice"), [several], DIGESTS, NOW).key == "set"


def test_without_gpgv(home: Gpg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpg, "GPGV", "/nonexistent/gpgv")
    with pytest.raises(NotSupported, match="gpgv") as raised:
        verify(home.sign(HEX.encode(), "alice"), [home.key("alice")], DIGESTS, NOW)
    assert raised.value.hint == "install gpgv"


def impostor(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str) -> None:
    """Have a shell script in the place of gpgv, where nobody may run it."""
    directory.mkdir(exist_ok=True)
    (directory / "gpgv").write_text(f"#!/bin/sh\n{script}\n")
    for path in (directory, directory / "gpgv"):
        path.chmod(0o755)
    monkeypatch.setattr(gpg, "GPGV", str(directory / "gpgv"))


GOOD = "NEWSIG\nGOODSIG 1 x\nVALIDSIG F 2020-01-01 1577836800 0 4 0 22 8 00 F"


@pytest.mark.parametrize(
    ("lines", "status", "reason"),
    [
        (GOOD, 1, "cannot read it"),
        (GOOD.replace("NEWSIG\n", ""), 0, "cannot read it"),
        (GOOD.replace("GOODSIG 1 x\n", ""), 0, "cannot read it"),
        (GOOD + "\nNEWSIG", 0, "says NEWSIG of it more than once"),
        (GOOD + "\nEXPKEYSIG 1 x", 0, "its key has expired"),
        (GOOD + "\nBADSIG 1 x", 0, "has signed something else"),
        (GOOD + "\nERRSIG 1 22 8 00 1577836800 4 F", 0, "does not know its algorithm"),
        (GOOD.replace(" 22 8 ", " 22 2 "), 0, "a hash that is not SHA-256"),
        (GOOD.replace(" 22 8 ", " 17 8 "), 0, "an algorithm that is not RSA"),
        (GOOD.replace(" 8 00 ", " 8 01 "), 0, "a signature of a text"),
        (GOOD.replace("1577836800", "20200101T000000"), 0, "something about it that is not understood"),
        (GOOD.replace(" 00 F", ""), 0, "something about it that is not understood"),
        ("", 0, "cannot read it"),
    ],
)
def test_what_gpgv_says_has_to_fit(
    home: Gpg, monkeypatch: pytest.MonkeyPatch, lines: str, status: int, reason: str
) -> None:
    said = "\n".join(f"echo '[GNUPG:] {line}'" for line in lines.splitlines())
    with tempfile.TemporaryDirectory() as directory:
        impostor(monkeypatch, Path(directory), f"{said}\nexit {status}")
        refused(home.sign(HEX.encode(), "alice"), [home.key("alice")], reason)


def test_gpgv_that_hangs(home: Gpg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpg, "TIME", 0.3)
    with tempfile.TemporaryDirectory() as directory:
        impostor(monkeypatch, Path(directory), "exec 2>&-; while :; do :; done")
        start = time.monotonic()
        refused(home.sign(HEX.encode(), "alice"), [home.key("alice")], "did not come to an end within")
        assert time.monotonic() - start < 3


def test_packets() -> None:
    old = b"\x88\x01a" + b"\x89\x00\x01b" + b"\x8a\x00\x00\x00\x01c"
    new = b"\xc2\x01d" + b"\xc2\xc0\x00" + b"e" * 192 + b"\xc2\xff\x00\x00\x00\x01f"
    assert openpgp.packets(old + new) == [(2, each) for each in (b"a", b"b", b"c", b"d", b"e" * 192, b"f")]
    for wrong in (
        b"\x00",
        b"\x8b",
        b"\x88",
        b"\x88\x01",
        b"\x8a\0\0",
        b"\xc2",
        b"\xc2\xc0",
        b"\xc2\xe0\x01",
    ):
        with pytest.raises(openpgp.OpenPgpError):
            openpgp.packets(wrong)
    with pytest.raises(openpgp.OpenPgpError, match="more than 4096 packets"):
        openpgp.packets(b"\x88\x00" * 5000)
