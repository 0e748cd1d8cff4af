"""Stacks with encrypted layers: one password for all of them, and devices that go with the overlay."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mountd.client import MountReply
from mountd.kernel import device_mapper
from tests.container import USER, as_user
from tests.daemon import ROOT, Daemon
from tests.disks import Part, build_disk
from tests.e2e.attaching import id_at, user_of
from tests.e2e.calls import Outcome, mount, outcome, text_of
from tests.e2e.conftest import TMPFS_RULE, trusting
from tests.e2e.stacks.calls import directory
from tests.images import build_image
from tests.luks import PASSWORD, Header, build_luks, make_header
from tests.programs import as_user as run_as_user
from tests.vm.inside.conftest import dm_devices

RIGHTS = {"encrypted": "true", "file_systems": '["erofs", "squashfs"]'}


@dataclass(frozen=True, slots=True)
class Scene:
    """A daemon, images that its policy trusts in `place`, by name, and where it lets users attach."""

    daemon: Daemon
    place: Path
    grounds: Path
    work: Path
    header: Header

    def image(self, name: str) -> Path:
        return self.place / f"{name}.raw"

    def encrypted(self, name: str, contents: Path | bytes) -> Path:
        return build_luks(self.image(name), self.header, contents)


@pytest.fixture(scope="module")
def scene(scratch: Path) -> Iterator[Scene]:
    work, place, grounds = (scratch / f"crypt-{name}" for name in ("work", "place", "grounds"))
    for each in (work, place, grounds):
        each.mkdir(mode=0o755)
    policy = trusting(place, attach=f'["{grounds}/$UID/**"]', **RIGHTS) + TMPFS_RULE
    made = Scene(Daemon(scratch / "crypt-daemon", policy), place, grounds, work, make_header(work))
    trees = {name: directory(work / name, {"both": name, name: name}) for name in ("top", "bottom")}
    top = build_image("erofs", trees["top"], made.image("plain"))
    made.encrypted("top", top)
    made.encrypted("bottom", build_image("squashfs", trees["bottom"], work / "bottom.img"))
    build_disk(made.image("disk"), [Part("root", made.image("top")), Part("home", top)])
    yield made
    assert made.daemon.stop() == 0, made.daemon.log
    assert "internal error" not in made.daemon.log, made.daemon.log
    assert PASSWORD not in made.daemon.log
    for each in (work, place, grounds):
        shutil.rmtree(each)


@pytest.fixture(scope="module")
def key(scene: Scene) -> Path:
    path = scene.grounds / "key"
    path.write_text(PASSWORD)
    path.chmod(0o644)
    return path


@contextlib.contextmanager
def stacked(scene: Scene, *names: str, key: Path | None, **wishes: object) -> Iterator[MountReply]:
    """Have a stack of these images, the topmost first."""
    *above, lowest = (str(scene.image(name)) for name in names)
    file = None if key is None else str(key)
    with mount(scene.daemon.socket, lowest, layers=above, key_file=file, **wishes) as reply:
        yield reply


def refusal(scene: Scene, *names: str, key: Path | None, **wishes: object) -> Outcome:
    def attempt() -> None:
        with stacked(scene, *names, key=key, **wishes):
            pass

    return outcome(attempt)


def volumes() -> int:
    """How many volumes are open."""
    return len([name for name in dm_devices() if name.startswith(f"{device_mapper.PREFIX}crypt-")])


def test_two_encrypted_layers(scene: Scene, key: Path) -> None:
    def work() -> tuple[object, ...]:
        with stacked(scene, "top", "bottom", key=key) as reply:
            fd, (told,) = reply.mount.fileno(), reply.mounts
            found = (
                text_of(reply, "both"),
                text_of(reply, "bottom"),
                sorted(os.listdir(f"/proc/self/fd/{fd}")),
            )
            flags = os.fstatvfs(fd).f_flag
            return (*found, volumes(), told["fileSystemType"], bool(flags & os.ST_RDONLY & told["readOnly"]))

    assert as_user(work) == ("top", "bottom", ["both", "bottom", "top"], 2, "overlay", True)


def test_beside_layers_that_are_not_encrypted(scene: Scene, key: Path) -> None:
    """And a disk image, of which one partition is used, that is encrypted."""
    with stacked(scene, "plain", "bottom", key=key) as reply:
        assert (text_of(reply, "both"), text_of(reply, "bottom"), volumes()) == ("top", "bottom", 1)
    # What is demanded holds for each layer, and one that is no disk image is a root.
    policy = "root=encrypted:home=unused"
    with stacked(scene, "bottom", "disk", key=key, image_policy=policy) as reply:
        assert (text_of(reply, "both"), text_of(reply, "top"), volumes()) == ("bottom", "top", 2)


def test_below_a_top(scene: Scene, key: Path) -> None:
    """Of several layers, and of the source alone."""
    before = scene.image("bottom").read_bytes()
    for names in (("top", "bottom"), ("bottom",)):
        with stacked(scene, *names, key=key, top="tmpfs:1M") as reply:
            assert reply.mounts[0]["readOnly"] is False
            path = Path(f"/proc/self/fd/{reply.mount.fileno()}")
            (path / "both").write_text("written")
            assert ((path / "both").read_text(), text_of(reply, "bottom")) == ("written", "bottom")
    assert scene.image("bottom").read_bytes() == before


def test_refusals_that_leave_nothing(scene: Scene, key: Path) -> None:
    """What is left is looked at after each test."""
    others = bytearray(scene.image("bottom").read_bytes())
    others[40000] ^= 1  # of the key, so that no password opens it
    scene.image("others").write_bytes(others)
    ext4 = scene.work / "ext4.img"
    with ext4.open("wb") as file:
        file.truncate(256 << 10)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", ext4], check=True)
    scene.encrypted("foreign", ext4)
    squashfs = (scene.work / "bottom.img").read_bytes()
    scene.encrypted("broken", squashfs[:96] + bytes(len(squashfs) - 96))
    cases = [
        (("top", "others"), "WrongKey", "source.layers[1]: "),
        (("plain", "foreign"), "DeniedByPolicy", "source.layers[1]: the image is ext4"),
        (("top", "broken"), "MountFailed", "source.layers[1]: "),
    ]
    for names, error, text in cases:
        found = refusal(scene, *names, key=key)
        assert (found[0], text in found[1]) == (error, True), found


def test_it_is_attached_for_a_user(scene: Scene, key: Path) -> None:
    """Who calls the program, which then has mountd attach the mount."""
    own = user_of(scene.daemon, scene.grounds, USER)
    target = own.directory("target")
    program = scene.work / "program"
    # Where everybody can read it.
    shutil.copytree(ROOT / "mountd", program / "mountd", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["chmod", "-R", "a+rX", program], check=True)
    words: list[object] = [sys.executable, "-m", "mountd.cli.mountctl", "mount", "--json", "--key-file", key]
    words += ["--layer", scene.image("top"), scene.image("bottom"), target]
    done = run_as_user(words, scene.daemon.socket, cwd=program)
    assert done.returncode == 0, done.stderr
    try:
        assert ((target / "both").read_text(), (target / "bottom").read_text()) == ("top", "bottom")
        assert volumes() == 2
    finally:
        own.detach(id_at(target))
    assert os.listdir(target) == []
