"""Refusals as people meet them: each says in one line what is wrong, and what to do about it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.programs import Done, as_user, check_line, etc_files, in_private, run

HUGO, INA = 4560, 4561
MOUNTCTL, HELPER, UMOUNT = "bin/mountctl", "sbin/mount.mountd", "sbin/umount.mountd"


@dataclass(frozen=True, slots=True)
class Scene:
    """A daemon, a user, and the user's home directory, below which places are granted."""

    daemon: Daemon
    home: Path
    installed: Path
    image: Path

    def call(self, *words: object) -> Done:
        """Run a program as the user, at home."""
        program = [self.installed / str(words[0]), *words[1:]]
        return as_user(program, self.daemon.socket, user=HUGO, group=HUGO, cwd=self.home)

    def directory(self, name: str, mode: int = 0o755, owner: int = HUGO) -> Path:
        """Make one at home."""
        path = self.home / name
        path.mkdir(exist_ok=True)
        path.chmod(mode)
        os.chown(path, owner, owner)
        return path


@pytest.fixture(scope="module")
def scene(place: Path, images: dict[str, Path], installed: Path) -> Iterator[Scene]:
    home = place / "hugo"
    home.mkdir()
    os.chown(home, HUGO, HUGO)
    etc = place / "hints-etc"
    etc.mkdir()
    enter = etc_files(etc, {"passwd": f"root:x:0:0::/root:/bin/sh\nhugo:x:{HUGO}:{HUGO}::{home}:/bin/sh\n"})
    policy = trusting(place / "trusted", attach='["$HOME/**"]')
    daemon = Daemon(place / "hints-daemon", policy, preexec_fn=enter)
    yield Scene(daemon, home, installed, images["erofs"])
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


Make = Callable[[Scene], list[object]]


def at(name: str, mode: int = 0o755, owner: int = HUGO) -> Make:
    """Mount at a new directory of the name."""
    return lambda scene: [MOUNTCTL, "mount", scene.image, scene.directory(name, mode, owner)]


def below(name: str, mode: int, owner: int) -> Make:
    """Mount at a directory of the user in one of the name."""

    def make(scene: Scene) -> list[object]:
        scene.directory(name)
        target = scene.directory(f"{name}/target")
        scene.directory(name, mode, owner)
        return [MOUNTCTL, "mount", scene.image, target]

    return make


def words(*all: str) -> Make:
    """A command line, where IMAGE, DIR and HOME are filled in."""

    def make(scene: Scene) -> list[object]:
        names = {"IMAGE": scene.image, "DIR": scene.directory("dir"), "HOME": scene.home}
        return [names.get(each, each) for each in all]

    return make


REFUSALS: dict[str, tuple[Make, str]] = {
    "sticky": (at("sticky", 0o1755), "is sticky.*hint: use a directory in it; or “chmod -t /.*sticky”"),
    "group": (at("group", 0o775), "is writable by others.*hint: “chmod go-w /.*group”.$"),
    "another's": (
        at("given", owner=INA),
        f"belongs to uid {INA}, not to.*hint: use a directory of your own",
    ),
    "below shared": (below("open", 0o777, HUGO), "writable by others, who.*hint: “chmod go-w /.*open”.$"),
    "below another's": (
        below("away", 0o755, INA),
        "in its place .hint: use a directory below directories of",
    ),
    "not granted": (words(MOUNTCTL, "mount", "IMAGE", "HOME"), "none of these .hint: use a directory of"),
    "no image": (
        words(MOUNTCTL, "mount", "/x.raw", "DIR"),
        "not found: /x.raw .hint: there is no such file",
    ),
    "no name": (words(MOUNTCTL, "mount", "", "DIR"), "not found: “” .hint: .*oci:HOST"),
    "no size": (words(MOUNTCTL, "mount", "tmpfs", "DIR"), "not found: tmpfs .hint: .*tmpfs:64M"),
    "bad size": (words(MOUNTCTL, "mount", "tmpfs:x", "DIR"), "no size such as 64M .hint: "),
    "no target": (
        words(MOUNTCTL, "mount", "IMAGE", ""),
        "not found: “” .hint: give the path of a directory",
    ),
    "a file": (words(MOUNTCTL, "mount", "IMAGE", "IMAGE"), "Not a directory .hint: give a directory"),
    "unknown": (words(MOUNTCTL, "explain", "/bin/sh"), "no signature of a known file system.*hint: “blkid"),
    "type": (words(MOUNTCTL, "mount", "-t", "xfs", "IMAGE", "DIR"), "holds erofs .hint: ask for no type"),
    "device": (
        words(MOUNTCTL, "explain", "/dev/null"),
        "not a regular file .hint: SOURCE is a regular file",
    ),
    "option": (words(MOUNTCTL, "mount", "-o", "bogus", "IMAGE", "DIR"), "not permitted: .*hint: "),
    "nothing": (words(MOUNTCTL, "umount", "DIR"), "not found: a mount at .*hint: “findmnt”"),
    "nowhere": (words(MOUNTCTL, "umount", "/nowhere"), "not found: /nowhere .hint: “findmnt”"),
    "not root": (words(MOUNTCTL, "status"), "hint: "),
    "revoke": (words(MOUNTCTL, "revoke", "1"), "hint: "),
    "inspect": (words(MOUNTCTL, "image", "inspect", "x"), "hint: "),
    "age": (words(MOUNTCTL, "image", "gc", "--age", "x"), "no time such as 12h or 30d .hint: "),
    "helper": (words(HELPER, "/x.raw", "DIR"), "not found: /x.raw .hint: there is no such file"),
    "helper, no name": (words(HELPER, "", "DIR"), "not found: “” .hint: "),
    "helper, no namespace": (
        words(HELPER, "IMAGE", "DIR", "-N", ""),
        "-N has no value .hint: give the path",
    ),
    "helper, composefs": (words(HELPER, "IMAGE", "DIR", "-t", "composefs"), "hint: give mountd.objects="),
    "umount helper": (words(UMOUNT, "DIR"), "hint: "),
    "umount helper, no namespace": (words(UMOUNT, "DIR", "-N", ""), "-N has no value .hint: give the path"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_the_way_out(scene: Scene, case: str) -> None:
    make, pattern = REFUSALS[case]
    done = scene.call(*make(scene))
    assert done.returncode in (1, 32), done
    check_line(done, pattern)


def test_the_way_out_works(scene: Scene) -> None:
    """What the hints say is done, word by word, until it is mounted; and once more, until it is again."""
    target = scene.directory("mended", 0o1777)

    def hinted() -> str:
        said = scene.call(MOUNTCTL, "mount", scene.image, target).stderr
        return said.partition("“")[2].partition("”")[0] if "writable" in said else said

    assert f"“chmod -t {target}”" in hinted()
    target.chmod(0o777)
    command = hinted()
    assert command == f"chmod go-w {target}"
    subprocess.run(["sh", "-c", command], check=True)
    assert hinted() == ""
    said = hinted()
    assert f"something is mounted at {target} already (hint: “umount {target}” first" in said
    assert scene.call(MOUNTCTL, "umount", target).returncode == 0


def test_all_about_a_mount(scene: Scene) -> None:
    target = scene.directory("told")
    assert scene.call(MOUNTCTL, "mount", scene.image, target).returncode == 0
    shown = scene.call(MOUNTCTL, "list", "--long").stdout
    assert scene.call(MOUNTCTL, "umount", target).returncode == 0
    fields = dict(line.split(": ", 1) for line in shown.splitlines())
    assert list(fields) == [
        *("id", "user", "owner", "source", "type", "access", "rule", "trusted by", "signer", "digest"),
        *("id map", "since", "attached at"),
    ]
    assert (fields["owner"], fields["source"]) == (str(HUGO), str(scene.image))
    place = rf"{target} \(mount namespace [0-9]+, mount {fields['id']}\)"
    assert re.fullmatch(place, fields["attached at"])


def test_a_loop_device(scene: Scene) -> None:
    """What mount(8) hands over for the option “loop”, which mountd does without."""
    add = ["losetup", "--find", "--show", "--read-only", scene.image]
    device = subprocess.run(add, capture_output=True, text=True, check=True).stdout.strip()
    try:
        os.chmod(device, 0o644)
        done = scene.call(HELPER, device, scene.directory("looped"), "-o", "ro")
    finally:
        os.chmod(device, 0o660)
        subprocess.run(["losetup", "--detach", device], check=True)
    assert done.returncode == 1
    check_line(done, "it is a block device, not a regular file .hint: .*leave the option “loop” out")


@pytest.mark.parametrize("where", ["command line", "fstab"])
def test_a_name_with_a_comma(scene: Scene, place: Path, where: str) -> None:
    """Through mount(8), whose library takes options apart as well."""
    target = scene.directory("quoted")
    options = f'ro,mountd.signature="{place}/a,b.sig",nodev'
    fstab = f"{scene.image} {target} mountd {options} 0 0\n"
    by_hand = ["-t", "mountd", "-o", options, scene.image]

    def work() -> Done:
        return run(["mount", *(by_hand if where == "command line" else []), target], scene.daemon.socket)

    done = in_private(scene.installed, work, {"fstab": fstab}, place)
    assert done.returncode == 1
    check_line(done, f"not found: {place}/a,b.sig .hint: ")
