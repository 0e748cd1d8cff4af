"""composefs whose contents fs-verity checks: what fits is read, and what does not is not."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mountd.client import MountReply
from mountd.evidence.fs_verity import digest_of
from mountd.fds import OwnedFd
from tests.container import USER
from tests.daemon import Daemon
from tests.e2e.calls import errno_of, mount_fds, outcome
from tests.e2e.directories import peer
from tests.vm.inside.test_fs_verity import bare, enable, make, unmake

__all__ = ["bare"]

CONTENTS = {name: name.encode() * 5000 for name in ("good", "bad", "plain", "unnamed")}
POLICY = """
[[rule]]
name = "metadata of the administrator's"
image = {{ location = "{place}/*" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["erofs"], idmap = ["none"] }}
verdict = "allow"
"""


@dataclass(frozen=True, slots=True)
class Scene:
    """A daemon that trusts the metadata, and object directories of USER's with fs-verity and without."""

    daemon: Daemon
    image: Path
    objects: Path
    unverifiable: Path


def object_of(objects: Path, name: str, data: bytes) -> bytes:
    """Put an object where its name leads, and return its digest."""
    path = objects / name
    path.write_bytes(data)
    with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
        return bytes.fromhex(digest_of(fd.fileno(), len(data)))


def metadata(tree: Path, image: Path, objects: Path) -> None:
    """Make an image as mkcomposefs does, of files whose contents are objects; that of “bad” is another."""
    tree.mkdir()
    for name, data in CONTENTS.items():
        digest = object_of(objects, name, data)
        if name != "plain":
            enable(objects / name)
        (tree / name).write_bytes(bytes(len(data)))
        if name == "bad":
            digest = hashlib.sha256(digest).digest()
        named = b"" if name == "unnamed" else struct.pack("BBBB", 0, 36, 0, 1) + digest
        os.setxattr(tree / name, "trusted.overlay.metacopy", named)
        os.setxattr(tree / name, "trusted.overlay.redirect", f"/{name}".encode())
    subprocess.run(["mkfs.erofs", "--quiet", image, tree], check=True)


@pytest.fixture(scope="module", params=["ext4", "btrfs"])
def scene(request: pytest.FixtureRequest, scratch: Path, bare: dict[str, Path]) -> Iterator[Scene]:
    disk, target = make(request.param, scratch)
    place = scratch / f"composefs-{request.param}"
    place.mkdir()
    objects, unverifiable = target / "objects", bare["xfs"] / f"objects-{request.param}"
    objects.mkdir()
    unverifiable.mkdir()
    metadata(scratch / f"tree-{request.param}", place / "tree.cfs", objects)
    for path in (objects, unverifiable, *objects.iterdir()):
        os.chown(path, USER, USER)
    daemon = Daemon(place / "daemon", POLICY.format(place=place))
    yield Scene(daemon, place / "tree.cfs", objects, unverifiable)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log
    unmake(disk, target)
    shutil.rmtree(place)


def ask(scene: Scene, objects: Path, **fields: object) -> MountReply:
    source: dict[str, object] = {"imageFileDescriptor": 0, "objectsFileDescriptors": [1], **fields}
    with (
        OwnedFd(os.open(scene.image, os.O_RDONLY)) as image,
        OwnedFd(os.open(objects, os.O_RDONLY)) as fd,
        peer(),
    ):
        return mount_fds(scene.daemon.socket, {"composefs": source}, [image.fileno(), fd.fileno()])


def test_contents_are_checked_where_they_could_change(scene: Scene) -> None:
    with ask(scene, scene.objects) as reply:
        assert "fs-verity checks the contents" in str(reply.decision["reason"])
        top = f"/proc/self/fd/{reply.mount.fileno()}"
        assert Path(f"{top}/good").read_bytes() == CONTENTS["good"]
        for name in ("bad", "plain", "unnamed"):
            assert errno_of(lambda name=name: Path(f"{top}/{name}").read_bytes()) == "EIO"  # type: ignore[misc]


def test_another_object_under_the_same_name(scene: Scene) -> None:
    with ask(scene, scene.objects) as reply:
        good = scene.objects / "good"
        good.rename(scene.objects / "kept")
        try:
            good.write_bytes(b"x" * len(CONTENTS["good"]))
            enable(good)
            path = f"/proc/self/fd/{reply.mount.fileno()}/good"
            assert errno_of(lambda: Path(path).read_bytes()) == "EIO"
        finally:
            (scene.objects / "kept").rename(good)


def test_the_digest_of_the_image(scene: Scene) -> None:
    with OwnedFd(os.open(scene.image, os.O_RDONLY)) as fd:
        digest = digest_of(fd.fileno(), scene.image.stat().st_size)
    with ask(scene, scene.objects, digest=digest) as reply:
        assert Path(f"/proc/self/fd/{reply.mount.fileno()}/good").read_bytes() == CONTENTS["good"]
    assert outcome(lambda: ask(scene, scene.objects, digest="0" * 64))[0] == "InvalidImage"


def test_without_fs_verity_they_have_to_be_roots(scene: Scene) -> None:
    assert outcome(lambda: ask(scene, scene.unverifiable))[0] == "NotImmutable"
    assert outcome(lambda: ask(scene, scene.unverifiable, verity=True))[0] == "NotSupported"
