"""Images that a policy trusts for what they are, and asking for them as a user."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mountd.fds import OwnedFd
from mountd.store.store import Store
from tests.container import USER, as_user
from tests.daemon import Daemon
from tests.e2e.calls import explain, mount_fds, outcome
from tests.signing import LEAF, Gpg, Signatory

NONE = ("", "")
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


@contextlib.contextmanager
def signing_keys(keys: Path) -> Iterator[Makers]:
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


SEALED_RULE = rule("sealed", "any = true", '"sealed"')
STORED = rule("stored and signed", "any = true", '"stored"', ', signature = "ed25519"')


def signed_by(kind: str, *integrity: str) -> str:
    key = "sigstore" if kind == "bundle" else kind
    kinds = ", ".join(f'"{each}"' for each in integrity)
    return rule("by key", "any = true", kinds, f', signature = "{key}"')
