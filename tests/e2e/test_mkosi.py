"""Disk images as mkosi makes them: those without hash data, and what is said of those that have it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import mkosi
from tests.container import USER, in_container
from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.programs import Done, as_user, run
from tests.signing import Signatory

SIGNED = """
[key.mkosi]
x509 = "{certificate}"

[[rule]]
name = "signed"
image = {{ signed = "mkosi" }}
caller = {{ any = true }}
require = {{ integrity = ["dm-verity"], signature = "mkosi" }}
grant = {{ file-systems = ["erofs", "squashfs"], idmap = ["none", "namespace"] }}
verdict = "allow"
"""


@dataclass(frozen=True, slots=True)
class Built:
    """What mkosi has made: at a place that a rule trusts, and at one of the user's."""

    trusted: Path
    home: Path
    certificate: Path


@pytest.fixture(scope="module")
def built(place: Path) -> Built:
    made = Built(place / "mkosi-trusted", place / "mkosi-home", place / mkosi.CERTIFICATE)
    for directory in (made.trusted, made.home):
        directory.mkdir(mode=0o755)
    os.chown(made.home, USER, USER)
    found = mkosi.build()
    mkosi.copy(found / mkosi.CERTIFICATE, place)
    for image in found.glob("*.raw"):
        mkosi.copy(image, made.trusted)
        mkosi.copy(image, made.home, USER)
    return made


@pytest.fixture
def daemon(start: Callable[..., Daemon], built: Built) -> Daemon:
    return start(trusting(built.trusted) + SIGNED.format(certificate=built.certificate))


def explained(done: Done) -> tuple[dict[str, object], dict[str, object]]:
    """What “explain --json” says: the decision, and the facts."""
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    return told["decision"], told["facts"]


def root_hash_of(signature: Path) -> str:
    """The root hash in a partition for signatures, which is padded with zeros."""
    told = json.loads(signature.read_bytes().rstrip(b"\0"))
    assert isinstance(told["rootHash"], str)
    return told["rootHash"]


def test_an_image_without_hash_data(
    daemon: Daemon, installed: Path, built: Built, place: Path, containers: None
) -> None:
    """The firmware's partition comes first in it, and is left to the firmware."""
    mountctl, image = installed / "bin/mountctl", built.trusted / "disk.raw"
    told = as_user([mountctl, "explain", image], daemon.socket)
    assert "partitions: root “root-x86-64” (ext4), esp “esp” (vfat)\n" in told.stdout, told.stderr
    assert "mounted: root\n" in told.stdout
    target = place / "mkosi target"
    target.mkdir()

    def work() -> tuple[Done, str, str]:
        done = run([mountctl, "mount", image, target], daemon.socket)
        return done, (target / "hello").read_text(), (target / "usr/lib/os-release").read_text()

    done, hello, release = in_container(work)
    assert (done.returncode, done.stderr) == (0, "")
    assert (hello, "ID=mountd-test\n" in release) == (mkosi.HELLO, True)
    # The same image where its user can change it.
    told = as_user([mountctl, "explain", built.home / "disk.raw"], daemon.socket)
    assert (told.returncode, told.stdout.startswith("deny: no rule applies")) == (1, True), told.stdout
    assert "with hash data and the signature of its root hash by the key “mkosi”" in told.stdout


@pytest.mark.parametrize("name", ["signed", "portable"])
def test_a_signed_image(daemon: Daemon, installed: Path, built: Built, name: str) -> None:
    """It vouches for itself, its other partitions do not; how it is mounted is for another kernel."""
    mountctl, image = installed / "bin/mountctl", built.home / f"{name}.raw"
    root_hash = root_hash_of(built.home / f"{name}.{mkosi.SIGNATURE}.raw")
    decision, facts = explained(as_user([mountctl, "explain", "--json", image], daemon.socket))
    assert (decision["verdict"], decision["rule"], decision["trustedBy"]) == ("allow", "signed", "dm-verity")
    assert (decision["signer"], decision["digest"]) == (mkosi.SIGNER, f"sha256:{root_hash}")
    assert facts["mounted"] == "root (dm-verity)"
    # By the same words, in files of its own.
    parts = [built.home / f"{name}.{part}.raw" for part in (mkosi.ROOT, mkosi.HASHES, mkosi.SIGNATURE)]
    words = ["--verity", parts[1], "--root-hash", root_hash, "--root-hash-signature", parts[2], parts[0]]
    told = as_user([mountctl, "explain", *words], daemon.socket)
    assert told.stdout.startswith("allow: by rule “signed”"), told.stdout + told.stderr
    assert f"\nsigned by: {mkosi.SIGNER}\n" in told.stdout


def test_how_it_is_mounted(
    daemon: Daemon, installed: Path, built: Built, place: Path, containers: None
) -> None:
    """Through dm-verity, if the kernel has that, or not at all; where it is trusted anyway, without."""
    mountctl, target = installed / "bin/mountctl", place / "mkosi signed target"
    target.mkdir()

    def mount(image: Path) -> tuple[int, str, list[str]]:
        def work() -> tuple[int, str, list[str]]:
            done = run([mountctl, "mount", image, target], daemon.socket)
            found = [path.read_text() for path in (target / "hello", target / "srv/hello") if path.exists()]
            return done.returncode, done.stderr, found

        return in_container(work)

    both = [mkosi.HELLO, mkosi.SRV]
    there = "device-mapper" in Path("/proc/misc").read_text()
    # What is not in the root of the first is in a partition that nothing vouches for.
    for name, own in (("signed", both[:1]), ("portable", both)):
        status, said, found = mount(built.home / f"{name}.raw")
        assert (status, found) == ((0, own) if there else (32, [])), said
        assert there or "not supported here: device-mapper" in said
        assert mount(built.trusted / f"{name}.raw") == (0, "", both)


def test_another_key_of_the_same_name(
    start: Callable[..., Daemon], installed: Path, built: Built, place: Path
) -> None:
    """All that mkosi makes are named alike."""
    keys = place / "mkosi-keys"
    keys.mkdir(mode=0o755)
    other = Signatory(keys, mkosi.SIGNER.removeprefix("CN="), "rsa2048")
    daemon = start(SIGNED.format(certificate=other.pem))
    told = as_user(
        [installed / "bin/mountctl", "explain", "--json", built.home / "portable.raw"], daemon.socket
    )
    decision, _ = explained(told)
    assert decision["verdict"] == "deny"
    assert "another one of that name" in str(decision["reason"]), decision
