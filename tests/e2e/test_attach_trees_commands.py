"""Disk images of several partitions by mount(8), umount(8) and mountctl, as ordinary users call them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.disks import Part, build_disk
from tests.e2e.attaching import id_at, records
from tests.e2e.conftest import trusting
from tests.e2e.schema import problems
from tests.e2e.test_umount_helper import ALICE, BOB, UTAB, Scene, told
from tests.e2e.trees import PLACES, build_contents, build_tree_disk, ids_at, seen
from tests.programs import check_line, findmnt

WHOLE = {name: name for name in PLACES}
LEFT_OUT = "the image has no directory boot, so that partition is left out"


@pytest.fixture(scope="module")
def contents(place: Path, images: dict[str, Path]) -> dict[str, Path]:
    return build_contents(place / "parts-of-commands")


@pytest.fixture(scope="module")
def disk(place: Path, contents: dict[str, Path]) -> Path:
    return build_tree_disk(place / "trusted/commands.raw", contents)


@pytest.fixture(scope="module")
def firmware(place: Path, contents: dict[str, Path]) -> Path:
    """An image with a partition that its root has no directory for."""
    parts = [
        Part("root", contents["root"]),
        Part("xbootldr", contents["srv"]),
        Part("home", contents["home"]),
    ]
    return build_disk(place / "trusted/commands-firmware.raw", parts)


@pytest.fixture(scope="module")
def grounds(place: Path) -> Path:
    path = place / "tree-commands"
    path.mkdir(mode=0o755)
    for uid in (ALICE, BOB):
        (path / str(uid)).mkdir(mode=0o755)
        os.chown(path / str(uid), uid, uid)
    return path


@pytest.fixture(scope="module")
def own_daemon(place: Path, images: dict[str, Path], grounds: Path) -> Iterator[Daemon]:
    policy = trusting(place / "trusted", attach=f'["{grounds}/$UID/**"]')
    daemon = Daemon(place / "tree-commands-daemon", policy)
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


@pytest.fixture
def scene(own_daemon: Daemon, installed: Path, grounds: Path, tmp_path: Path) -> Iterator[Scene]:
    target = grounds / str(ALICE) / "with space"
    target.mkdir()
    os.chown(target, ALICE, ALICE)
    yield Scene(own_daemon, installed, tmp_path, target)
    target.rmdir()
    assert records(own_daemon) == []


def test_there_and_back(scene: Scene, disk: Path) -> None:
    """umount(8) knows whom to ask about each of them, so that it takes one of them, or all."""
    target = scene.target

    def work() -> None:
        for words in ([target], ["--lazy", target]):
            assert told(scene.alice("mount", "-t", "mountd", disk, target)) == (0, "", "")
            assert seen(target) == WHOLE
            lines = [
                line.split()[1] for line in UTAB.read_text().splitlines() if "OPTS=uhelper=mountd" in line
            ]
            at = f"TARGET={scene.spot}"
            assert lines == [f"{at}/{place}".rstrip("/") for place in PLACES.values()]
            assert {findmnt(target / place) for place in PLACES.values()} == {str(disk)}
            assert scene.bob("umount", target).returncode == 1
            assert scene.bob("umount", target / "home").returncode == 1
            assert told(scene.alice("umount", target / "home")) == (0, "", "")
            assert seen(target) == {name: name for name in PLACES if name != "home"}
            assert told(scene.alice("umount", *words)) == (0, "", "")
            assert os.listdir(target) == []
            assert UTAB.read_text() == ""

    scene.play(work)


def test_what_is_in_use(scene: Scene, disk: Path) -> None:
    target = scene.target

    def work() -> None:
        assert told(scene.alice("mount", "-t", "mountd", disk, target)) == (0, "", "")
        with open(target / "var/tmp/name", encoding="utf-8"):
            busy = scene.alice("umount", target)
            assert busy.returncode == 32
            check_line(busy, "^umount.mountd: .*with space: the mount is in use .hint: close what .*fuser")
            assert seen(target) == WHOLE
            assert len(UTAB.read_text().splitlines()) == len(PLACES)
        assert told(scene.alice("umount", target)) == (0, "", "")
        assert UTAB.read_text() == ""

    scene.play(work)


def test_mountctl(scene: Scene, disk: Path) -> None:
    target, program = scene.target, scene.installed / "bin/mountctl"

    def work() -> None:
        done = scene.alice(program, "mount", disk, target)
        line = f"{disk}: attached at {target} (rule “trusted in the test”)\n"
        assert told(done) == (0, line, "")
        assert seen(target) == WHOLE
        ids = ids_at(target)
        listed = json.loads(scene.alice(program, "list", "--json").stdout)["mounts"]
        assert {each["id"]: [at["mountPoint"] for at in each["attached"]] for each in listed} == {
            ids[name]: [str(target / place)] for name, place in PLACES.items()
        }
        assert scene.bob(program, "umount", target).returncode == 1
        assert told(scene.alice(program, "umount", target)) == (0, f"{target}: detached\n", "")
        assert os.listdir(target) == []
        # The host's root may detach by itself, but for the others below it; mountd knows them.
        assert scene.alice(program, "mount", disk, target).returncode == 0
        with open(target / "usr/name", encoding="utf-8"):
            check_line(
                scene.root(program, "umount", target), "^mountctl: the mount is in use .hint: close what"
            )
        assert json.loads(scene.root(program, "umount", "--json", target).stdout)["detachedBy"] == "mountd"
        assert os.listdir(target) == []
        # Of what mountd has not attached, the kernel's word is what is said.
        assert scene.root(program, "mount", disk, target).returncode == 0
        check_line(scene.root(program, "umount", target), "^mountctl: umount2.*: EBUSY")
        assert scene.root(program, "umount", "--lazy", target).returncode == 0

    scene.play(work)


def test_root_with_the_helper(scene: Scene, disk: Path) -> None:
    """Root may unmount by itself, but for the others below it, which to the kernel are a use of it."""
    target, helper = scene.target, scene.installed / "sbin/umount.mountd"

    def work() -> None:
        assert told(scene.alice("mount", "-t", "mountd", disk, target)) == (0, "", "")
        with open(target / "usr/name", encoding="utf-8"):
            busy = scene.root(helper, target)
            assert busy.returncode == 32
            check_line(busy, f"^umount.mountd: {target}: the mount is in use .hint: close what .*fuser")
        assert told(scene.root(helper, target)) == (0, "", "")
        assert os.listdir(target) == []
        assert UTAB.read_text() == ""
        assert records(scene.daemon) == []
        # Of what mountd has not attached, the kernel's word is what is said.
        assert scene.root("mount", "-t", "mountd", disk, target).returncode == 0
        check_line(
            scene.root(helper, target), f"^umount.mountd: {target}: it is in use .hint: “fuser -vm DIR”"
        )
        assert scene.root("umount", "--recursive", target).returncode == 0

    scene.play(work)


@pytest.mark.parametrize("proc", ["", "mount -t tmpfs none /proc;"], ids=["usual", "none"])
def test_what_fails_in_another_mount_namespace_leaves_nothing(
    scene: Scene, place: Path, contents: dict[str, Path], proc: str
) -> None:
    """Of the mounts of an image, the first is attached there by then; there may be no /proc to name it."""
    target, helper = scene.target, scene.installed / "sbin/mount.mountd"
    homeless = build_disk(
        place / f"trusted/homeless{len(proc)}.raw",
        [Part("root", contents["srv"]), Part("home", contents["home"])],
    )

    def work() -> None:
        words = ["unshare", "--mount", "sh", "-ec", f"{proc} echo; exec sleep 60"]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as there:
            try:
                assert there.stdout is not None
                there.stdout.readline()
                done = scene.root(helper, homeless, target, "-N", f"/proc/{there.pid}/ns/mnt")
                info = Path(f"/proc/{there.pid}/mountinfo").read_text()
            finally:
                there.kill()
        check_line(done, "^mount.mountd: .*the directory home of the image, for its partition home")
        assert "with\\040space" not in info

    scene.play(work)


def test_both_ways_say_the_same(scene: Scene, firmware: Path) -> None:
    """Who attaches by itself, and who has mountd do it: the same mounts, and the same partition left out."""
    target, program = scene.target, scene.installed / "bin/mountctl"

    def work() -> None:
        found = []
        for caller, end in (
            (scene.alice, (program, "umount", target)),
            (scene.root, ("umount", "--recursive", target)),
        ):
            done = caller("mount", "-t", "mountd", firmware, target)
            assert told(done) == (0, "", f"mount.mountd: {LEFT_OUT}\n")
            assert set(seen(target)) == {"root", "home"}
            assert caller(*end).returncode == 0
            done = caller(program, "mount", "--json", firmware, target)
            assert (done.returncode, done.stderr) == (0, f"mountctl: {LEFT_OUT}\n")
            said = json.loads(done.stdout)
            assert problems(said, "mount") == []
            assert said["leftOut"] == ["boot"]
            there = [each for each in said["mounts"] if each["designator"] != "xbootldr"]
            assert [each.pop("id") for each in there] == [id_at(target), id_at(target / "home")]
            assert said["id"] == id_at(target)
            for each in there:
                each.pop("mountFileDescriptor", None)
            found.append(there)
            assert caller(*end).returncode == 0
            assert os.listdir(target) == []
        assert found[0] == found[1]

    scene.play(work)
