"""Disk images with hash data and signature: they speak for themselves, and for nothing else in the image."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from mountd.client import MountReply, attach_reply, open_target
from mountd.fds import OwnedFd
from mountd.kernel import mount_api
from tests import mkosi
from tests.container import USER, as_user, in_container, mapper
from tests.daemon import Daemon
from tests.disks import FIRST, MIB, Part, build_disk, protected
from tests.e2e.calls import explain, mount_fds, outcome, text_of
from tests.images import build_image, build_tree
from tests.verity import Verified, build_verity, flip
from tests.vm.inside.conftest import dm_devices
from tests.vm.inside.test_daemon import Signatory
from tests.vm.machine import IMAGES, ROOT

POLICY = """
[key.team]
x509 = "{keys}/team.crt"

[key.mkosi]
x509 = "{keys}/mkosi.crt"

[[rule]]
name = "place"
image = {{ location = "{trusted}/*" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["erofs", "squashfs", "ext4"], idmap = ["none", "namespace"] }}
verdict = "allow"

[[rule]]
name = "signed"
image = {{ signed = "team" }}
caller = {{ any = true }}
require = {{ integrity = ["dm-verity"], signature = "team" }}
grant = {{ file-systems = ["erofs", "squashfs"], idmap = ["none", "namespace"] }}
verdict = "allow"

[[rule]]
name = "mkosi"
image = {{ signed = "mkosi" }}
caller = {{ any = true }}
require = {{ integrity = ["dm-verity"], signature = "mkosi" }}
grant = {{ file-systems = ["erofs", "squashfs"], idmap = ["none", "namespace"] }}
verdict = "allow"
"""
BUILT = ROOT / IMAGES  # by mkosi
NONE = ("", "")
SOURCE: dict[str, object] = {"imageFileDescriptor": 0}


@dataclass(frozen=True, slots=True)
class Scene:
    """A daemon, who signs, and where images lie: at a place that is trusted, and at one of the user's."""

    daemon: Daemon
    team: Signatory
    stranger: Signatory
    trusted: Path
    home: Path

    def users(self, name: str, parts: list[Part]) -> Path:
        """An image that its user can change at any time."""
        image = build_disk(self.home / name, parts)
        os.chown(image, USER, USER)
        return image


@pytest.fixture(scope="module")
def scene(scratch: Path) -> Iterator[Scene]:
    keys, trusted, home = (scratch / f"disk-{name}" for name in ("keys", "trusted", "home"))
    for directory in (keys, trusted, home):
        directory.mkdir(mode=0o755)
    os.chown(home, USER, USER)
    team, stranger = Signatory("team"), Signatory("stranger")
    (keys / "team.crt").write_bytes(team.certificate.public_bytes(Encoding.PEM))
    mkosi.copy(BUILT / mkosi.CERTIFICATE, keys)
    daemon = Daemon(scratch / "disk-daemon", POLICY.format(keys=keys, trusted=trusted))
    yield Scene(daemon, team, stranger, trusted, home)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log


@pytest.fixture(scope="module")
def other(scratch: Path) -> Verified:
    """Another tree, for /usr."""
    tree = build_tree(scratch / "usr-tree")
    (tree / "hello").write_text("hello from usr\n")
    return build_verity(build_image("squashfs", tree, scratch / "usr.img"))


def opened(image: Path) -> OwnedFd:
    return OwnedFd(os.open(image, os.O_RDONLY))


def ask(scene: Scene, image: Path, **fields: object) -> MountReply:
    """Mount as an ordinary user."""
    with opened(image) as fd:
        return mount_fds(scene.daemon.socket, SOURCE, [fd.fileno()], **fields)


def result(scene: Scene, image: Path, **fields: object) -> tuple[str, str]:
    """What a user gets."""

    def attempt() -> tuple[str, str]:
        return outcome(lambda: Closing(ask(scene, image, **fields)))

    return as_user(attempt)


class Closing:
    """Close all mounts of a reply at once."""

    def __init__(self, reply: MountReply) -> None:
        reply.close()


def uses(scene: Scene, image: Path, **fields: object) -> list[tuple[object, str]]:
    """Which partitions are mounted for a user, and whether through dm-verity; with the rule at the end."""

    def work() -> list[tuple[object, str]]:
        with ask(scene, image, **fields) as reply:
            found = [
                (each["designator"], "dm" if is_dm(fd) else "loop")
                for each, fd in zip(reply.mounts, reply.fds, strict=True)
            ]
            return [*found, (reply.decision["rule"], "rule")]

    return as_user(work)


def is_dm(fd: int) -> bool:
    """Whether the superblock of a mount is on a device of device-mapper."""
    device = os.fstat(fd).st_dev
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/dm").exists()


def test_a_users_image_that_speaks_for_itself(
    scene: Scene, verified: dict[str, Verified], scratch: Path
) -> None:
    """Only what is signed is mounted: not the home partition, which nothing protects."""
    source = verified["erofs"]
    home = build_image("ext4", build_tree(scratch / "home-tree"), scratch / "home.img")
    parts = [*protected(source, scene.team.sign(source.root_hash)), Part("home", home)]
    image = scene.users("good.raw", parts)

    def work() -> tuple[str, list[object], int, object]:
        with OwnedFd(os.open("/proc/self/ns/user", os.O_RDONLY)) as userns, open_target("/mnt") as target:
            fields = {"userNamespaceFileDescriptor": 1}
            with mount_fds(scene.daemon.socket, SOURCE, [fd.fileno(), userns.fileno()], **fields) as reply:
                attach_reply(reply, target.fileno(), "/mnt")
                text, owner = Path("/mnt/hello").read_text(), os.stat("/mnt").st_uid
                mount_api.umount("/mnt")
                named = [each["designator"] for each in reply.mounts]
                return text, named, owner, reply.decision["trustedBy"]

    with mapper(), opened(image) as fd:
        assert in_container(work) == ("hello from the image\n", ["root"], 0, "dm-verity")
    # The same, read from one image that is trusted for its place: all of it, and without dm-verity.
    place = build_disk(scene.trusted / "good.raw", parts)
    assert uses(scene, place) == [("root", "loop"), ("home", "loop"), ("place", "rule")]
    # Unless who asks wants it.
    wanted = uses(scene, place, imagePolicy="root=signed:home=unprotected:=absent")
    assert wanted == [("root", "dm"), ("home", "loop"), ("place", "rule")]
    assert uses(scene, image, imagePolicy="root=signed") == [("root", "dm"), ("signed", "rule")]
    name, text = result(scene, image, imagePolicy="root=signed:home=unprotected")
    assert (name, "nothing vouches for it" in text) == ("DeniedByPolicy", True), text


def test_root_and_usr_each_by_its_own_signature(
    scene: Scene, verified: dict[str, Verified], other: Verified
) -> None:
    root = verified["erofs"]
    signed = protected(root, scene.team.sign(root.root_hash))
    usr = protected(other, scene.team.sign(other.root_hash), "usr")
    assert uses(scene, scene.users("both.raw", [*usr, *signed])) == [
        *(("root", "dm"), ("usr", "dm"), ("signed", "rule"))
    ]
    assert uses(scene, scene.users("usr.raw", usr)) == [("usr", "dm"), ("signed", "rule")]
    # The signature of one is nothing to the other.
    unsigned = [*signed, *protected(other, None, "usr")]
    assert result(scene, scene.users("unsigned.raw", unsigned))[0] == "DeniedByPolicy"
    by_stranger = [*signed, *protected(other, scene.stranger.sign(other.root_hash), "usr")]
    assert result(scene, scene.users("stranger.raw", by_stranger))[0] in ("KeyUnknown", "DeniedByPolicy")
    swapped = [*signed, *protected(other, scene.team.sign(root.root_hash), "usr")]
    assert result(scene, scene.users("swapped.raw", swapped))[0] in ("SignatureInvalid", "DeniedByPolicy")


def test_each_way_to_fail(scene: Scene, verified: dict[str, Verified], other: Verified) -> None:
    source = verified["erofs"]
    good = scene.team.sign(source.root_hash)
    root, tree, signature = protected(source, good)
    mixed = Part("root", other.image, size=4 * MIB, uuid=root.uuid)
    wrong_uuid = Part("root-verity", source.tree, uuid="00000000-0000-0000-0000-000000000001")
    cases: list[tuple[str, list[Part], tuple[str, ...], str]] = [
        ("alone", [root], ("NotImmutable", "DeniedByPolicy"), ""),
        ("unsigned", [root, tree], ("DeniedByPolicy",), ""),
        ("stranger", protected(source, scene.stranger.sign(source.root_hash)), ("DeniedByPolicy",), ""),
        ("garbage", [root, tree, Part("root-verity-sig", b"{" * 5000)], ("DeniedByPolicy",), ""),
        ("other data", [mixed, tree, signature], ("InvalidImage",), "does not fit"),
        ("other uuid", [root, wrong_uuid, signature], ("InvalidImage",), "not what the UUIDs"),
    ]
    for name, parts, errors, text in cases:
        found = result(scene, scene.users(f"{name}.raw", parts))
        assert found[0] in errors, (name, found)
        assert text in found[1], (name, found)


def test_what_the_user_changes_afterwards_is_not_read(
    scene: Scene, verified: dict[str, Verified], tree: Path
) -> None:
    source = verified["erofs"]
    image = scene.users("changed.raw", protected(source, scene.team.sign(source.root_hash)))
    with ask(scene, image) as reply:
        where = image.read_bytes().find((tree / "big").read_bytes()[-64:])
        assert where > FIRST
        flip(image, where)
        with (
            OwnedFd(os.open("big", os.O_RDONLY, dir_fd=reply.mount.fileno())) as file,
            pytest.raises(OSError, match=os.strerror(errno.EIO)),
        ):
            os.pread(file.fileno(), 64, MIB - 64)


@pytest.fixture
def keeping(scene: Scene, scratch: Path) -> Iterator[Scene]:
    """The same with a daemon that keeps what it has mounted for longer than the test takes."""
    keys = scratch / "disk-keys"
    policy = POLICY.format(keys=keys, trusted=scene.trusted)
    daemon = Daemon(scratch / "keeping-daemon", policy, ["--shared-seconds", "60"])
    yield replace(scene, daemon=daemon)
    assert daemon.stop() == 0, daemon.log
    shutil.rmtree(scratch / "keeping-daemon")


def test_one_device_for_one_root_hash(keeping: Scene, verified: dict[str, Verified]) -> None:
    """For images of one owner, also in two files; and another for what somebody else can write to."""
    source = verified["erofs"]
    parts = protected(source, keeping.team.sign(source.root_hash))
    images = [keeping.users(f"shared-{number}.raw", parts) for number in range(2)]
    roots = build_disk(keeping.home / "root-owned.raw", parts)
    open_to_all = keeping.users("writable.raw", parts)
    open_to_all.chmod(0o666)
    before = dm_devices()

    def devices(*asked: Path) -> tuple[int, int]:
        replies = [ask(keeping, image) for image in asked]
        try:
            there = {os.fstat(reply.mount.fileno()).st_dev for reply in replies}
            return len(there), len(dm_devices() - before)
        finally:
            for reply in replies:
                reply.close()

    assert as_user(lambda: devices(*images, *images)) == (1, 1)
    assert as_user(lambda: devices(images[0], roots)) == (2, 2)
    assert as_user(lambda: devices(images[0], open_to_all)) == (2, 3)


def test_nothing_is_left_where_the_second_fails(
    scene: Scene, verified: dict[str, Verified], other: Verified
) -> None:
    """The root is there when the damage of /usr shows; nothing of it stays."""
    source = verified["erofs"]
    usr = protected(other, scene.team.sign(other.root_hash), "usr")
    image = scene.users("half.raw", [*protected(source, scene.team.sign(source.root_hash)), *usr])
    place = image.read_bytes().find(other.image.read_bytes()[:96], FIRST + MIB)
    flip(image, place + 3000)
    before = dm_devices()
    assert result(scene, image)[0] == "InvalidImage"
    deadline = time.monotonic() + 5
    while dm_devices() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert dm_devices() == before


def test_explain_shows_the_partitions(scene: Scene, verified: dict[str, Verified]) -> None:
    source = verified["erofs"]
    image = scene.users("explained.raw", protected(source, scene.team.sign(source.root_hash)))
    with opened(image) as fd:
        told = as_user(lambda: explain(scene.daemon.socket, SOURCE, [fd.fileno()]))
    assert told["decision"]["verdict"] == "allow"  # type: ignore[index]
    facts = told["facts"]
    assert isinstance(facts, dict)
    assert facts["partitions"] == "root (erofs, dm-verity), root-verity, root-verity-sig"
    assert facts["mounted"] == "root (dm-verity)"


def repart(directory: Path, team: Signatory, files: Path) -> Path:
    """An image by systemd-repart(8), with all that it can put there for us."""
    definitions = directory / "repart.d"
    definitions.mkdir()
    common = f"[Partition]\nFormat=erofs\nCopyFiles={files}:/\nVerityMatchKey=root\nMinimize=best\n"
    (definitions / "10-root.conf").write_text(f"{common}Type=root\nVerity=data\n")
    for number, kind in (("20", "hash"), ("30", "signature")):
        name = "root-verity" if kind == "hash" else "root-verity-sig"
        (definitions / f"{number}-{kind}.conf").write_text(
            f"[Partition]\nType={name}\nVerity={kind}\nVerityMatchKey=root\n"
            + ("SizeMinBytes=1M\n" if kind == "hash" else "")
        )
    (definitions / "40-srv.conf").write_text(
        f"[Partition]\nType=srv\nFormat=ext4\nSizeMinBytes=8M\nCopyFiles={files}:/\n"
    )
    certificate, key = directory / "cert.pem", directory / "key.pem"
    certificate.write_bytes(team.certificate.public_bytes(Encoding.PEM))
    key.touch(mode=0o600)
    key.write_bytes(team.private)
    image = directory / "repart.raw"
    command = [
        *("systemd-repart", "--empty=create", "--size=auto", "--offline=yes", "--dry-run=no"),
        *(f"--definitions={definitions}", f"--certificate={certificate}", f"--private-key={key}", image),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return image


def test_an_image_by_systemd_repart(scene: Scene, scratch: Path) -> None:
    work = scratch / "repart"
    work.mkdir()
    image = repart(work, scene.team, build_tree(work / "files"))
    users = scene.home / "repart.raw"
    users.write_bytes(image.read_bytes())
    os.chown(users, USER, USER)
    assert uses(scene, users) == [("root", "dm"), ("signed", "rule")]
    trusted = scene.trusted / "repart.raw"
    trusted.write_bytes(image.read_bytes())
    assert uses(scene, trusted) == [("root", "loop"), ("srv", "loop"), ("place", "rule")]
    strict = "root=signed+read-only-on+growfs-off:srv=unprotected+ext4:=absent"
    # Which it does not set for the signature.
    assert result(scene, trusted, imagePolicy=strict)[0] == "DeniedByPolicy"
    strict += ":root-verity-sig=unprotected"
    assert uses(scene, trusted, imagePolicy=strict) == [("root", "dm"), ("srv", "loop"), ("place", "rule")]
    assert result(scene, trusted, imagePolicy="root=signed+growfs-on")[0] == "DeniedByPolicy"


def test_images_by_mkosi(scene: Scene) -> None:
    """Signed with the key that it makes for itself, whose certificate is the policy's."""
    policy = "root=signed:srv=unprotected+absent:=absent"
    for name, rest in (("signed", [("srv", "loop")]), ("portable", [])):
        users = mkosi.copy(BUILT / f"{name}.raw", scene.home, USER)
        assert uses(scene, users) == [("root", "dm"), ("mkosi", "rule")]
        with ask(scene, users) as reply:
            assert (reply.decision["signer"], text_of(reply)) == (mkosi.SIGNER, mkosi.HELLO)
        trusted = mkosi.copy(BUILT / f"{name}.raw", scene.trusted)
        assert uses(scene, trusted, imagePolicy=policy) == [("root", "dm"), *rest, ("place", "rule")]


def test_partitions_by_mkosi(scene: Scene) -> None:
    """The same in files: the data, the hash data, and the signature as it is, with zeros at its end."""
    parts = [BUILT / f"portable.{part}.raw" for part in (mkosi.ROOT, mkosi.HASHES, mkosi.SIGNATURE)]
    data, tree = (mkosi.copy(part, scene.home, USER) for part in parts[:2])
    signature = parts[2].read_bytes()
    verity = {
        "dataFileDescriptor": 1,
        "rootHash": json.loads(signature.rstrip(b"\0"))["rootHash"],
        "signature": base64.b64encode(signature).decode(),
    }

    def work() -> tuple[object, bool, str]:
        with opened(data) as image, opened(tree) as hashes:
            fds = [image.fileno(), hashes.fileno()]
            with mount_fds(scene.daemon.socket, {**SOURCE, "verity": verity}, fds) as reply:
                return reply.decision["signer"], is_dm(reply.mount.fileno()), text_of(reply)

    assert as_user(work) == (mkosi.SIGNER, True, mkosi.HELLO)
