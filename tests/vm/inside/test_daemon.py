"""dm-verity and fs-verity from the socket to the mount, as a policy requires them."""

from __future__ import annotations

import base64
import contextlib
import datetime
import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.hazmat.primitives.serialization.pkcs7 import PKCS7Options, PKCS7SignatureBuilder
from cryptography.x509.oid import NameOID

from mountd.client import Client, attach
from mountd.errors import MountdError, RemoteError, SyscallError
from mountd.evidence.content import formatted_digest
from mountd.fds import OwnedFd
from mountd.kernel import mount_api
from tests.container import USER, as_user, in_container, mapper
from tests.daemon import Daemon
from tests.e2e.calls import explain, mount_fds, outcome, text_of
from tests.verity import Verified, build_verity, flip
from tests.vm.inside.conftest import BIG
from tests.vm.inside.test_dm_verity import BLOCK, mount, place_of
from tests.vm.inside.test_fs_verity import computed, enable, ext4, make, place, unmake

__all__ = ["ext4", "place"]

POLICY = """
[key.team]
x509 = "{keys}/team.crt"

[key.files]
ed25519 = "{keys}/files.pem"

[key.kept]
ed25519 = "{keys}/kept.pem"

[[rule]]
name = "by its digest"
image = {{ digest = ["{digest}"] }}
caller = {{ any = true }}
require = {{ integrity = ["fs-verity"] }}
grant = {{ file-systems = ["erofs", "squashfs"], idmap = ["none", "namespace"] }}
verdict = "allow"

[[rule]]
name = "files"
image = {{ signed = "files" }}
caller = {{ any = true }}
require = {{ integrity = ["fs-verity"], signature = "files" }}
grant = {{ file-systems = ["erofs", "squashfs"], idmap = ["none", "namespace"] }}
verdict = "allow"

[[rule]]
name = "kept in the store"
image = {{ signed = "kept" }}
caller = {{ any = true }}
require = {{ integrity = ["stored"], signature = "kept" }}
grant = {{ file-systems = ["erofs"], idmap = ["none", "namespace"] }}
verdict = "allow"

[[rule]]
name = "disks"
image = {{ any = true }}
caller = {{ any = true }}
require = {{ integrity = ["dm-verity"], signature = "team" }}
grant = {{ file-systems = ["erofs", "squashfs"], idmap = ["none", "namespace"] }}
verdict = "allow"
"""
NONE = ("", "")


class Signatory:
    """A certificate that signs root hashes as systemd's tools have them signed."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self._key.public_key())
            .serial_number(1)
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def private(self) -> bytes:
        """The private key, for a tool that signs by itself."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def sign(self, root_hash: bytes) -> bytes:
        builder = PKCS7SignatureBuilder().set_data(root_hash.hex().encode())
        options = [PKCS7Options.DetachedSignature, PKCS7Options.Binary, PKCS7Options.NoAttributes]
        return builder.add_signer(self.certificate, self._key, hashes.SHA256()).sign(Encoding.DER, options)


@dataclass(frozen=True, slots=True)
class Scene:
    """A daemon, and those who sign: the policy's keys, and others."""

    daemon: Daemon
    team: Signatory
    stranger: Signatory
    files: Ed25519PrivateKey
    kept: Ed25519PrivateKey
    mountfs: Path  # the socket of io.systemd.MountFileSystem


@pytest.fixture(scope="module")
def scene(scratch: Path, verified: dict[str, Verified]) -> Iterator[Scene]:
    keys = scratch / "keys"
    keys.mkdir(mode=0o755)
    team, stranger, files = Signatory("team"), Signatory("stranger"), Ed25519PrivateKey.generate()
    (keys / "team.crt").write_bytes(team.certificate.public_bytes(Encoding.PEM))
    kept = Ed25519PrivateKey.generate()
    for name, key in (("files", files), ("kept", kept)):
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (keys / f"{name}.pem").write_bytes(pem)
    digest = hashlib.sha256(verified["squashfs"].image.read_bytes()).hexdigest()
    mountfs = scratch / "mountfs"
    policy = POLICY.format(keys=keys, digest=f"sha256:{digest}")
    daemon = Daemon(scratch / "daemon", policy, ["--mountfs-socket", str(mountfs)])
    yield Scene(daemon, team, stranger, files, kept, mountfs)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log
    shutil.rmtree(scratch / "daemon")


def base(data: bytes) -> str:
    return base64.b64encode(data).decode()


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user hands over: an image, hash data or none, and a signature of either."""

    image: Path
    tree: Path | None = None
    root_hash: bytes = b""
    signature: bytes | None = None

    def source(self) -> dict[str, object]:
        signature = {} if self.signature is None else {"signature": base(self.signature)}
        if self.tree is None:
            return {"imageFileDescriptor": 0, **signature}
        verity = {"dataFileDescriptor": 1, "rootHash": self.root_hash.hex(), **signature}
        return {"imageFileDescriptor": 0, "verity": verity}

    @contextlib.contextmanager
    def opened(self) -> Iterator[list[int]]:
        """The descriptors, opened by root: where the files lie is nothing to the user."""
        paths = [self.image] if self.tree is None else [self.image, self.tree]
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(OwnedFd(os.open(path, os.O_RDONLY))).fileno() for path in paths]


def both(scene: Scene, asked: Asked, **fields: object) -> tuple[str, str]:
    """Ask Mount and Explain as a user; return the mount's error, as Explain has it if that is policy's."""
    source, socket = asked.source(), scene.daemon.socket
    with asked.opened() as fds:
        found = as_user(lambda: outcome(lambda: mount_fds(socket, source, fds, **fields)))
        said = as_user(lambda: explained(socket, source, fds, fields))
    if isinstance(said, str):
        assert said == found[0]  # a request that is none, for both
    elif said["verdict"] == "deny":
        assert said["reason"] in found[1]
    else:
        # What only the kernel finds out, once there is a device, is no matter of policy.
        assert found == NONE or found[0] in ("InvalidImage", "MountFailed"), found
    return found


def explained(socket: Path, source: dict[str, object], fds: list[int], fields: dict[str, object]) -> Any:
    """Return the decision, or the name of the error."""
    try:
        return explain(socket, source, fds, **fields)["decision"]
    except MountdError as error:
        return type(error).__name__


def seen(scene: Scene, asked: Asked) -> tuple[str, dict[str, object]]:
    """Mount in a container whose user has no privileges outside, attach, and read there."""

    def work() -> tuple[str, dict[str, object]]:
        with OwnedFd(os.open("/proc/self/ns/user", os.O_RDONLY)) as userns:
            numbers = [*fds, userns.fileno()]
            fields = {"userNamespaceFileDescriptor": len(fds)}
            with mount_fds(scene.daemon.socket, asked.source(), numbers, **fields) as reply:
                attach(reply.mount.fileno(), "/mnt")
                assert os.stat("/mnt").st_uid == 0
                text = Path("/mnt/hello").read_text()
                mount_api.umount("/mnt")
                return text, dict(reply.decision)

    with mapper(), asked.opened() as fds:
        return in_container(work)


class TestDmVerity:
    @pytest.fixture
    def good(self, scene: Scene, verified: dict[str, Verified]) -> Asked:
        source = verified["erofs"]
        return Asked(source.image, source.tree, source.root_hash, scene.team.sign(source.root_hash))

    @pytest.mark.parametrize("type", ["erofs", "squashfs"])
    def test_a_container_reads_it(self, scene: Scene, verified: dict[str, Verified], type: str) -> None:
        source = verified[type]
        asked = Asked(source.image, source.tree, source.root_hash, scene.team.sign(source.root_hash))
        assert both(scene, asked) == NONE
        text, decision = seen(scene, asked)
        assert text == "hello from the image\n"
        assert (decision["rule"], decision["trustedBy"]) == ("disks", "dm-verity")
        assert decision["digest"] == f"sha256:{source.root_hash.hex()}"
        assert "team" in str(decision["signer"])

    def test_each_way_to_fail(self, scene: Scene, good: Asked, verified: dict[str, Verified]) -> None:
        other = verified["squashfs"]
        cases: list[tuple[Asked, str, str]] = [
            # A root hash that is signed, but not this image's.
            (
                replace(good, root_hash=other.root_hash, signature=scene.team.sign(other.root_hash)),
                "InvalidImage",
                "does not fit the verity root hash",
            ),
            (replace(good, root_hash=bytes(32)), "SignatureInvalid", ""),
            (replace(good, signature=None), "DeniedByPolicy", "no signature came along"),
            (replace(good, signature=scene.team.sign(other.root_hash)), "SignatureInvalid", ""),
            (replace(good, signature=scene.stranger.sign(good.root_hash)), "KeyUnknown", ""),
            (replace(good, signature=b"nothing"), "SignatureInvalid", ""),
            # Hash data of another image, which has other lengths, and what is no hash data at all.
            (replace(good, tree=good.image), "InvalidImage", "superblock that veritysetup writes"),
            # Without dm-verity there is nothing that keeps the image as it is.
            (replace(good, tree=None, signature=None), "NotImmutable", "no hash data came along"),
            # The right digits, but of an algorithm that the hash data does not have.
            (replace(good, root_hash=good.root_hash * 2), "InvalidParameter", "64 bytes, sha256 has 32"),
        ]
        for asked, name, text in cases:
            found = both(scene, asked)
            assert found[0] == name, (found, asked)
            assert text in found[1], found

    def test_requiring_it_is_no_wish(self, scene: Scene, good: Asked) -> None:
        """Another rule that would do does not make up for hash data that does not fit."""
        assert both(scene, replace(good, root_hash=bytes(64)))[0] == "InvalidParameter"
        assert both(scene, good, readOnly=False)[0] == "OptionNotPermitted"
        assert both(scene, good, imagePolicy="root=verity") == NONE
        assert both(scene, good, imagePolicy="root=signed") == NONE
        assert both(scene, good, imagePolicy="root=encrypted")[0] == "DeniedByPolicy"

    def test_tampered(self, scene: Scene, broken: Verified, tree: Path) -> None:
        asked = Asked(broken.image, broken.tree, broken.root_hash, scene.team.sign(broken.root_hash))
        # In the middle of a file: what is hit cannot be read, and all else can.
        place = place_of(broken, tree, BIG - 64)
        flip(broken.image, place)

        def work() -> tuple[str, int | None]:
            with mount_fds(scene.daemon.socket, asked.source(), fds) as reply:
                with OwnedFd(os.open("big", os.O_RDONLY, dir_fd=reply.mount.fileno())) as file:
                    try:
                        os.pread(file.fileno(), 64, BIG - 64)
                        error = None
                    except OSError as caught:
                        error = caught.errno
                return text_of(reply), error

        with asked.opened() as fds:
            assert as_user(work) == ("hello from the image\n", errno.EIO)
        flip(broken.image, place)
        for path, at in ((broken.image, 2000), (broken.tree, BLOCK + 5)):
            flip(path, at)
            name, text = both(scene, asked)
            assert (name, "does not fit the verity root hash" in text) == ("InvalidImage", True)
            flip(path, at)
        assert both(scene, asked) == NONE

    def test_in_the_words_of_mountfsd(self, scene: Scene, broken: Verified) -> None:
        """Data or hashes that do not fit the root hash are the error that a bad signature is."""
        signature = base64.b64encode(scene.team.sign(broken.root_hash)).decode()
        verity = {"verityDataFileDescriptor": 1, "verityRootHash": broken.root_hash.hex()}
        asked = Asked(broken.image, broken.tree, broken.root_hash)

        def call(said: str) -> str:
            parameters = {"imageFileDescriptor": 0, **verity, "verityRootHashSignature": said}
            with asked.opened() as numbers, Client(str(scene.mountfs)) as client:
                fds = [OwnedFd(os.dup(number)) for number in numbers]
                try:
                    _, mounts = client.call("io.systemd.MountFileSystem.MountImage", parameters, fds)
                except RemoteError as error:
                    return error.name.rpartition(".")[2]
                finally:
                    for fd in fds:
                        fd.close()
                mounts[0].close()
                return ""

        assert call(signature) == ""
        assert call(base64.b64encode(b"nothing").decode()) == "VerityFailure"
        for path, at in ((broken.image, 2000), (broken.tree, BLOCK + 5)):
            flip(path, at)
            assert call(signature) == "VerityFailure"
            flip(path, at)
        assert call(signature) == ""

    def test_a_lie_about_the_file_system(
        self, scene: Scene, verified: dict[str, Verified], tmp_path: Path
    ) -> None:
        """What is in the image is recognised before it is verified.

        A lie there chooses the driver, out of those that the rule grants, and that driver reads nothing but
        what was signed: so that it fails.
        """
        source = verified["ext4"].copy(tmp_path / "lie")  # in blocks of 1024 bytes
        asked = Asked(source.image, source.tree, source.root_hash, scene.team.sign(source.root_hash))
        name, text = both(scene, asked)
        assert (name, "the image is ext4" in text) == ("DeniedByPolicy", True)
        with source.image.open("r+b") as file:
            # Where both have their superblock; the first page is read before any driver is.
            file.seek(1024)
            file.write(verified["erofs"].image.read_bytes()[1024:2048])
        name, text = both(scene, asked)
        assert (name, "does not fit the verity root hash" in text) == ("InvalidImage", True)

    def test_another_driver_on_what_was_signed(self, verified: dict[str, Verified]) -> None:
        """As if the lie had been undone once it was believed."""
        for real, tried in (
            ("ext4", "erofs"),
            ("erofs", "squashfs"),
            ("squashfs", "erofs"),
            ("erofs", "ext4"),
        ):
            with pytest.raises(SyscallError, match="FSCONFIG_CMD_CREATE|CREATE"):
                mount(verified[real], tried)


class TestFsVerity:
    @pytest.fixture
    def image(self, place: Path, verified: dict[str, Verified]) -> Iterator[Path]:
        path = place / "image.raw"
        path.write_bytes(verified["erofs"].image.read_bytes())
        path.chmod(0o644)
        os.chown(path, USER, USER)
        yield path
        path.unlink()

    def test_signed(self, scene: Scene, image: Path) -> None:
        """Over the digest as text, as the kernel has it, or over the digest of the bytes."""
        enable(image)
        digest = bytes.fromhex(computed(image).removeprefix("sha256:"))
        for payload in (
            digest.hex().encode(),
            formatted_digest("sha256", digest),
            hashlib.sha256(image.read_bytes()).hexdigest().encode(),
        ):
            asked = Asked(image, signature=scene.files.sign(payload))
            assert both(scene, asked) == NONE
        text, decision = seen(scene, asked)
        assert text == "hello from the image\n"
        assert (decision["rule"], decision["trustedBy"]) == ("files", "fs-verity")

    def test_named_by_its_digest(
        self, scene: Scene, place: Path, verified: dict[str, Verified], image: Path
    ) -> None:
        listed = place / "listed.raw"
        listed.write_bytes(verified["squashfs"].image.read_bytes())
        assert both(scene, Asked(listed))[0] == "NotImmutable"
        enable(listed)
        enable(image)
        assert both(scene, Asked(listed)) == NONE
        assert seen(scene, Asked(listed))[1]["trustedBy"] == "fs-verity"
        # With fs-verity, but with a digest that no rule names.
        found = both(scene, Asked(image))
        assert found[0] == "NotImmutable", found
        with Asked(image).opened() as fds:
            said: Any = as_user(lambda: explain(scene.daemon.socket, Asked(image).source(), fds))
        (step,) = [each for each in said["steps"] if each["rule"] == "by its digest"]
        assert not step["applies"]
        assert "which the rule does not name" in step["reason"]
        listed.unlink()

    def test_each_way_to_fail(self, scene: Scene, image: Path) -> None:
        digits = computed(image).removeprefix("sha256:").encode()
        good = Asked(image, signature=scene.files.sign(digits))
        # Signed, and not made immutable: the digest is measured, and nobody's claim.
        assert both(scene, good)[0] == "NotImmutable"
        enable(image)
        assert both(scene, good) == NONE
        stranger = Ed25519PrivateKey.generate()
        for signature in (None, scene.files.sign(b"0" * 64), stranger.sign(digits)):
            name, text = both(scene, replace(good, signature=signature))
            # No rule about signed files is about it; the last wants something else.
            assert (name, "no hash data came along" in text) == ("NotImmutable", True)

    def test_a_rule_that_wants_it_stored(self, scene: Scene, image: Path) -> None:
        """It is copied. There it has no fs-verity, so that a signature over that digest says nothing."""
        # What the store has already, and is known to be signed, would do whoever hands it over.
        with image.open("ab") as file:
            file.write(os.urandom(BLOCK))
        enable(image)
        digits = computed(image).removeprefix("sha256:").encode()
        assert both(scene, Asked(image, signature=scene.kept.sign(digits)))[0] == "NotImmutable"
        of_bytes = hashlib.sha256(image.read_bytes()).hexdigest().encode()
        asked = Asked(image, signature=scene.kept.sign(of_bytes))
        assert both(scene, asked) == NONE
        assert seen(scene, asked)[1]["trustedBy"] == "stored"

    def test_where_there_is_no_fs_verity(
        self, scene: Scene, scratch: Path, verified: dict[str, Verified]
    ) -> None:
        disk, target = make("xfs", scratch)
        try:
            image = target / "image.raw"
            image.write_bytes(verified["erofs"].image.read_bytes())
            os.chown(image, USER, USER)
            digits = hashlib.sha256(image.read_bytes()).hexdigest().encode()
            assert both(scene, Asked(image, signature=scene.files.sign(digits)))[0] == "NotImmutable"
        finally:
            unmake(disk, target)

    def test_disk_that_is_changed_below(
        self, scene: Scene, ext4: tuple[Path, Path], verified: dict[str, Verified], tree: Path
    ) -> None:
        """The digest that the kernel measures stays; what has to be read for one cannot be."""
        disk, target = ext4
        image = target / "image.raw"
        image.write_bytes(verified["erofs"].image.read_bytes())
        os.chown(image, USER, USER)
        enable(image)
        bytes_digest = hashlib.sha256(image.read_bytes()).hexdigest().encode()
        digits = computed(image).removeprefix("sha256:").encode()
        subprocess.run(["umount", target], check=True)
        at = disk.read_bytes().find((tree / "big").read_bytes()[-64:])
        assert at > 0
        flip(disk, at)
        subprocess.run(["mount", "-o", "loop", disk, target], check=True)
        assert both(scene, Asked(image, signature=scene.files.sign(digits))) == NONE
        name, text = both(scene, Asked(image, signature=scene.files.sign(bytes_digest)))
        assert (name, "cannot be read" in text) == ("InvalidImage", True), text


def test_hash_data_of_another_algorithm(scene: Scene, verified: dict[str, Verified], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(verified["squashfs"].image.read_bytes())
    source = build_verity(image, "--hash=sha512")
    asked = Asked(source.image, source.tree, source.root_hash, scene.team.sign(source.root_hash))
    assert both(scene, asked) == NONE
    assert both(scene, replace(asked, root_hash=source.root_hash[:32]))[0] == "InvalidParameter"
