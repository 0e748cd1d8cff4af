"""Attaching a disk image with an encrypted partition for a user: all of it, or nothing and nothing left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.errors import MountdError, NotSupported
from mountd.fds import OwnedFd
from mountd.kernel import mount_api
from mountd.kernel.flags import OpenTree
from mountd.kernel.mount_info import listmount
from tests.container import as_user
from tests.daemon import Daemon
from tests.disks import Part, build_disk
from tests.e2e.attaching import DIRECTORY, records
from tests.images import build_image
from tests.luks import PASSWORD, build_luks, make_header
from tests.rogue import eventually
from tests.vm.inside.conftest import dm_devices

POLICY = """
[[rule]]
name = "trees"
image = {{ location = "{place}/*.raw" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["erofs"], encrypted = true, attach = ["{place}/target"] }}
verdict = "allow"
"""
USER = 4280
SOURCE: dict[str, object] = {"imageFileDescriptor": 0}
ROOT_ONLY = "root=open:=unused+absent"


def puts_trees_together() -> bool:
    """Whether the kernel attaches mounts to what is attached nowhere, which came with a system call."""
    try:
        mount_api.open_tree_attr(-1, "", OpenTree(0)).close()
    except NotSupported:
        return False
    except OSError:
        return True
    return True


@dataclass(frozen=True, slots=True)
class Scene:
    """A daemon, an image whose /home is encrypted, and the directory of the user's for it."""

    daemon: Daemon
    image: Path
    target: Path

    def attach(self, **fields: object) -> tuple[str, str, int]:
        """What comes of Attach: the error's name and text, the id."""

        def work() -> tuple[str, str, int]:
            with (
                OwnedFd(os.open(self.image, os.O_RDONLY)) as image,
                OwnedFd(os.open(self.target, DIRECTORY)) as target,
                Client(str(self.daemon.socket)) as client,
            ):
                try:
                    reply = client.attach(SOURCE, [image, target], targetFileDescriptor=1, **fields)
                except MountdError as error:
                    return type(error).__name__, f"{error} ({error.hint})", 0
            return "", "", int(str(reply["id"]))

        return as_user(work, USER)

    def detach(self, id: int) -> None:
        def work() -> None:
            with Client(str(self.daemon.socket)) as client:
                client.detach(id)

        as_user(work, USER)


@pytest.fixture(scope="module")
def scene(scratch: Path) -> Iterator[Scene]:
    work, place = scratch / "trees", scratch / "trees-place"
    work.mkdir()
    place.mkdir(mode=0o755)
    target = place / "target"
    target.mkdir()
    os.chown(target, USER, USER)
    for name, directory in (("root", "home"), ("home", "user")):
        (work / name / directory).mkdir(parents=True)
        (work / name / "name").write_text(name)
    root, home = (build_image("erofs", work / name, work / f"{name}.img") for name in ("root", "home"))
    volume = build_luks(work / "home.luks", make_header(work), home)
    image = build_disk(place / "tree.raw", [Part("root", root), Part("home", volume)])
    daemon = Daemon(scratch / "trees-daemon", POLICY.format(place=place))
    yield Scene(daemon, image, target)
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log
    assert PASSWORD not in daemon.log
    assert records(daemon) == []


@contextlib.contextmanager
def nothing_left(scene: Scene) -> Iterator[None]:
    mounts, devices = listmount(), dm_devices()
    yield
    assert listmount() == mounts
    assert eventually(lambda: dm_devices() == devices, 5)
    assert os.listdir(scene.target) == []


def test_without_the_password(scene: Scene) -> None:
    with nothing_left(scene):
        assert scene.attach()[0] == "KeyRequired"
        assert scene.attach(password="another")[0] == "WrongKey"


def test_with_it(scene: Scene) -> None:
    if not puts_trees_together():
        with nothing_left(scene):
            name, text, _ = scene.attach(password=PASSWORD)
            assert (name, "(Linux 6.15)" in text, "have an imagePolicy use one" in text) == (
                *("NotSupported", True, True),
            )
        return
    _, _, id = scene.attach(password=PASSWORD)
    assert (scene.target / "name").read_text() == "root"
    assert (scene.target / "home/name").read_text() == "home"
    assert any(name.startswith("mountd-crypt-") for name in dm_devices())
    scene.detach(id)
    assert os.listdir(scene.target) == []


def test_with_one_partition(scene: Scene) -> None:
    """What the hint says is of use on any kernel."""
    name, text, id = scene.attach(imagePolicy=ROOT_ONLY)
    assert name == "", text
    assert (scene.target / "name").read_text() == "root"
    assert os.listdir(scene.target / "home") == []
    scene.detach(id)
