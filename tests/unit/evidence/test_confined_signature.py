"""Signatures in a confined child: the same verdict, and a child that has nothing and gets nothing."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.errors import KeyUnknown, SignatureInvalid
from mountd.evidence import confined_signature, signature
from mountd.evidence.model import Signer
from tests.signing import LEAF, Signatory

ROOT = Path(__file__).parents[3]
NOW = int(time.time()) + 3600
HEX = hashlib.sha256(b"image").hexdigest()
DIGESTS = [("image", f"sha256:{HEX}")]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Signatory]:
    confined_signature.prepare()
    directory = tmp_path_factory.mktemp("people")
    return {
        name: Signatory(directory, name, name, LEAF)
        for name in ("p256", "p384", "p521", "rsa2048", "ed25519")
    }


@pytest.mark.parametrize("algorithm", ["p256", "p384", "p521", "rsa2048"])
@pytest.mark.parametrize("how", ["cms", "roothash", "raw"])
def test_the_same_verdict(people: dict[str, Signatory], algorithm: str, how: str) -> None:
    person = people[algorithm]
    if how == "raw" and algorithm == "rsa2048":
        algorithm, person = "p256", people["p256"]
    key = person.bare("ecdsa") if how == "raw" else person.anchor()
    blob = getattr(person, how)(HEX.encode())
    wanted = signature.verify(blob, [key], DIGESTS, NOW)
    assert confined_signature.verify(blob, [key], DIGESTS, NOW) == wanted
    assert isinstance(wanted, Signer)


def test_ed25519(people: dict[str, Signatory], tmp_path: Path) -> None:
    blob = people["ed25519"].ed25519(HEX.encode(), tmp_path)
    found = confined_signature.verify(blob, [people["ed25519"].bare("ed25519")], DIGESTS, NOW)
    assert found.key == "team"


def test_the_same_errors(people: dict[str, Signatory]) -> None:
    person, other = people["p256"], people["p384"]
    blob = person.cms(HEX.encode())
    cases = [
        (blob, [other.anchor()], NOW),
        (blob, [], NOW),
        (blob, [person.anchor()], NOW + 366 * 86400),
        (blob, [person.anchor()], NOW - 86400),
        (blob[:-1], [person.anchor()], NOW),
        (blob + b"\0", [person.anchor()], NOW),
        (person.cms(b"x"), [person.anchor()], NOW),
        (b"", [person.anchor()], NOW),
        (bytes(signature.MAXIMUM_SIGNATURE + 1), [person.anchor()], NOW),
        (b"{}", [person.anchor()], NOW),
    ]
    for each, keys, now in cases:
        caught = []
        for verify in (signature.verify, confined_signature.verify):
            with pytest.raises((SignatureInvalid, KeyUnknown)) as raised:
                verify(each, keys, DIGESTS, now)
            caught.append((type(raised.value), str(raised.value), raised.value.hint))
        assert caught[0] == caught[1]


def test_a_fresh_process_needs_nothing_but_prepare(people: dict[str, Signatory], tmp_path: Path) -> None:
    """In a process where libcrypto, codecs and Python's modules are as an import leaves them."""
    blobs = {
        "cms": people["rsa2048"].cms(HEX.encode()),
        "old": people["rsa2048"].cms(HEX.encode(), "-md", "sha384"),
        "bad": people["rsa2048"].cms(b"x"),
    }
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from mountd.errors import MountdError
from mountd.evidence import confined_signature
from mountd.evidence.model import Key
confined_signature.prepare()
key = Key("team", "x509", ({people["rsa2048"].pem.read_bytes()!r},), "k")
for name, blob in {blobs!r}.items():
    for now in ({NOW}, {NOW + 366 * 86400}):
        try:
            print(name, confined_signature.verify(blob, [key], {DIGESTS!r}, now).key)
        except MountdError as error:
            print(name, error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expired = r"invalid signature: the certificate of CN=rsa2048 expired at 2"
    lines = done.stdout.splitlines()
    assert lines[0::2] == ["cms team", "old team", f"bad {lines[4].removeprefix('bad ')}"]
    assert "has signed something else" in lines[4]
    assert all(expired in line for line in lines[1::2])


def attack(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> str:
    """Have the child do `work` instead of verifying, and return what is said of it."""

    def verify(*_: object) -> Signer:
        return Signer("x", str(work()), "image", "x")

    monkeypatch.setattr(signature, "verify", verify)
    try:
        return confined_signature.verify(b"x", [], DIGESTS, NOW).subject
    except SignatureInvalid as error:
        return str(error)


LIMITS = "it could not be verified within the limits set for that"


@pytest.mark.parametrize(
    "work",
    [
        lambda: os.open("/etc/passwd", os.O_RDONLY),
        lambda: os.kill(os.getppid(), signal.SIGTERM),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: os.fork(),
        lambda: os.pipe(),
        lambda: os.setuid(0),
    ],
    ids=["open", "kill", "exec", "fork", "pipe", "setuid"],
)
def test_the_child_can_do_nothing(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    assert LIMITS in attack(monkeypatch, work)


def test_the_child_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> list[int]:
        found = []
        for fd in range(64):
            try:
                os.read(fd, 0)
            except OSError as error:
                if error.strerror != "Bad file descriptor":
                    found.append(fd)
            else:
                found.append(fd)
        return found

    with open("/etc/passwd") as file:
        assert file.fileno() >= 0
        # Only the pipe that it answers by, which cannot be read from: EBADF, too.
        assert attack(monkeypatch, opened) == "[]"


def test_the_child_ends_when_it_takes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MemoryError" in attack(monkeypatch, lambda: bytes(256 << 20))
    monkeypatch.setattr(confined_signature, "SECONDS", 0.2)

    def forever() -> None:
        while True:
            pass

    start = time.monotonic()
    assert LIMITS in attack(monkeypatch, forever)
    assert time.monotonic() - start < 2


def test_a_long_failure_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("x" * 100000)

    assert len(attack(monkeypatch, fail)) < 1000
