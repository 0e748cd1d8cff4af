"""“mountctl mount” and “mountctl umount” for an ordinary user: mountd attaches below the home directory."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from mountd.asking import MountReply, attach_reply
from mountd.cli import attaching, mount_helper, mountctl
from mountd.cli.report import finish
from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation
from tests.container import forked
from tests.daemon import Daemon
from tests.e2e.attaching import id_at, records
from tests.e2e.conftest import trusting
from tests.programs import Done, as_user, check_line, etc_files, in_private, mounted, run

GUS, ZOE = 4240, 4241
UTAB = Path("/run/mount/utab")


@dataclass(frozen=True, slots=True)
class Scene:
    """A daemon that knows of a user and the user's home directory."""

    daemon: Daemon
    home: Path
    program: Path

    def call(self, *arguments: object, uid: int = GUS, **popen: object) -> Done:
        """Run mountctl as a user, at home."""
        words = [self.program, *arguments]
        return as_user(words, self.daemon.socket, **({"user": uid, "group": uid, "cwd": self.home} | popen))


@pytest.fixture(scope="module")
def scene(place: Path, images: dict[str, Path], installed: Path) -> Iterator[Scene]:
    """The home directory is named by a link, as where /home is one to /var/home."""
    homes = place / "var-home"
    home = homes / "gus"
    home.mkdir(parents=True)
    os.chown(home, GUS, GUS)
    (place / "homes").symlink_to(homes)
    etc = place / "attach-etc"
    etc.mkdir()
    passwd = f"root:x:0:0::/root:/bin/sh\ngus:x:{GUS}:{GUS}::{place}/homes/gus:/bin/sh\n"
    enter = etc_files(etc, {"passwd": passwd + f"zoe:x:{ZOE}:{ZOE}::/:/bin/sh\n"})
    policy = trusting(place / "trusted", attach='["$HOME/**", "/run/user/$UID/**"]')
    daemon = Daemon(place / "command-daemon", policy, preexec_fn=enter)
    yield Scene(daemon, home, installed / "bin/mountctl")
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log
    assert records(daemon) == []


def directory(scene: Scene, name: str) -> Path:
    path = scene.home / name
    path.mkdir()
    os.chown(path, GUS, GUS)
    return path


def test_mount_and_umount(scene: Scene, images: dict[str, Path]) -> None:
    target = directory(scene, "mnt")
    done = scene.call("mount", images["squashfs"], "mnt")
    line = f"{images['squashfs']}: attached at mnt (rule “trusted in the test”)\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, line, "")
    assert (target / "hello").read_text() == "hello from the image\n"
    again = scene.call("mount", images["squashfs"], "mnt")
    assert again.returncode == 1
    check_line(again, "^mountctl: attaching not permitted: something is mounted at .*mnt already")
    foreign = scene.call("umount", target, uid=ZOE)
    assert foreign.returncode == 1
    check_line(
        foreign, f"^mountctl: not found: a mount at {target} that is attached for you .hint: “mountctl list”"
    )
    done = scene.call("umount", "mnt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "mnt: detached\n", "")
    assert os.listdir(target) == []


def test_umount_of_what_is_not_there(scene: Scene) -> None:
    done = scene.call("umount", "nowhere")
    assert (done.returncode, done.stderr) == (
        1,
        "mountctl: not found: nowhere (hint: “findmnt” shows what is mounted)\n",
    )


def test_in_json(scene: Scene, images: dict[str, Path]) -> None:
    target = directory(scene, "json")
    done = scene.call("mount", "--json", images["erofs"], target)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert (said["target"], said["attachedBy"], said["id"]) == (str(target), "mountd", id_at(target))
    assert said["decision"]["rule"] == "trusted in the test"
    with open(target / "hello", encoding="utf-8"):
        busy = scene.call("umount", "--json", target)
    assert busy.returncode == 32
    assert json.loads(busy.stdout)["error"].endswith("InUse")
    check_line(busy, "^mountctl: the mount is in use .hint: close what is open in it")
    done = scene.call("umount", "--json", "--lazy", target)
    assert json.loads(done.stdout) == {"target": str(target), "detachedBy": "mountd", "id": said["id"]}
    none = scene.call("umount", target)
    assert none.returncode == 1
    check_line(none, "^mountctl: not found: a mount at .*json .hint: “findmnt”")


def test_root_needs_no_help(scene: Scene, images: dict[str, Path]) -> None:
    target = directory(scene, "root")
    words = [scene.program, "mount", "--json", images["erofs"], target]
    said = json.loads(run(words, scene.daemon.socket).stdout)
    assert said["attachedBy"] == "this process"
    assert said["id"] == id_at(target) == said["mounts"][0]["id"]
    done = run([scene.program, "umount", "--json", target], scene.daemon.socket)
    assert json.loads(done.stdout)["detachedBy"] == "this process"


@pytest.mark.parametrize("program", [mountctl, mount_helper])
def test_interrupted_just_after_it_was_attached(
    scene: Scene,
    images: dict[str, Path],
    installed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: ModuleType,
) -> None:
    target = directory(scene, f"interrupted-{program.__name__}")
    seen = []

    def attach(reply: MountReply, directory_fd: int, path: str) -> list[str]:
        attach_reply(reply, directory_fd, path)
        seen.append(mounted(target))
        raise KeyboardInterrupt

    def work() -> tuple[int, object, object]:
        os.environ["MOUNTD_SOCKET"] = str(scene.daemon.socket)
        words = [*(["mount"] if program is mountctl else []), str(images["erofs"]), str(target)]
        act = mountctl.act if program is mountctl else mount_helper.run
        return finish("test", lambda: act(words)), seen, mounted(target)

    for module in (attaching, mount_helper):
        monkeypatch.setattr(module, "attach_reply", attach)
    status, before, after = in_private(installed, work, {}, tmp_path)
    assert (status, len(before), after) == (8, 1, None)
    assert before != [None]


@pytest.mark.parametrize("lazy", [[], ["--lazy"]])
def test_root_leaves_nothing_of_what_was_attached_for_a_user(
    scene: Scene, images: dict[str, Path], installed: Path, tmp_path: Path, lazy: list[str]
) -> None:
    """Neither the record of mountd, nor the line by which umount(8) would ask it."""
    target = directory(scene, f"roots{len(lazy)}")

    def noted() -> bool:
        return UTAB.exists() and f"TARGET={target} " in UTAB.read_text()

    def work() -> tuple[Done, tuple[bool, bool], Done, Done, tuple[bool, bool]]:
        done = scene.call("mount", images["erofs"], target)
        before = noted(), bool(records(scene.daemon))
        with open(target / "hello", encoding="utf-8"):
            busy = run([scene.program, "umount", target], scene.daemon.socket)
        gone = run([scene.program, "umount", "--json", *lazy, target], scene.daemon.socket)
        return done, before, busy, gone, (noted(), bool(records(scene.daemon)))

    done, before, busy, gone, after = in_private(installed, work, {}, tmp_path)
    assert (done.returncode, done.stderr, before) == (0, "", (True, True))
    assert busy.returncode == 32
    check_line(busy, "^mountctl: the mount is in use .hint: ")
    assert (gone.returncode, gone.stderr, after) == (0, "", (False, False))
    assert json.loads(gone.stdout)["detachedBy"] == "mountd"


def test_root_needs_no_daemon_for_that(
    scene: Scene, images: dict[str, Path], installed: Path, tmp_path: Path
) -> None:
    target = directory(scene, "alone")

    def work() -> tuple[Done, Done]:
        done = run([scene.program, "mount", images["erofs"], target], scene.daemon.socket)
        return done, run([scene.program, "umount", "--json", target], tmp_path / "nobody")

    done, gone = in_private(installed, work, {}, tmp_path)
    assert (done.returncode, gone.returncode, gone.stderr) == (0, 0, "")
    assert json.loads(gone.stdout)["detachedBy"] == "this process"


@pytest.mark.parametrize("uid", [GUS, ZOE])
def test_outside_of_the_home_directory(scene: Scene, place: Path, images: dict[str, Path], uid: int) -> None:
    """“/”, as services have it, is no home; there is nothing below it that is granted."""
    path = place / f"outside-{uid}"
    path.mkdir()
    os.chown(path, uid, uid)
    done = scene.call("mount", images["erofs"], path, uid=uid)
    assert done.returncode == 1
    check_line(
        done, r"rule “trusted in the test” grants .HOME/.., .*outside-\d+ is none of these .hint: use a "
    )


def test_below_run_user(scene: Scene, images: dict[str, Path], place: Path) -> None:
    """On a tmpfs of the user's own, as a session has it; in a mount namespace of this test's."""

    def work() -> tuple[Done, bool, Done]:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
        own = Path(f"/run/user/{GUS}")
        own.mkdir(parents=True)
        options = f"uid={GUS},gid={GUS},mode=700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", own], check=True)
        target = own / "mnt"
        target.mkdir()
        os.chown(target, GUS, GUS)
        done = scene.call("mount", images["erofs"], target)
        return done, (target / "hello").exists(), scene.call("umount", target)

    done, seen, end = forked(work)
    assert (done.returncode, done.stderr, seen, end.returncode, end.stderr) == (0, "", True, 0, "")


def test_usage(scene: Scene) -> None:
    call: Callable[..., Done] = scene.call
    assert call("umount", "--help").returncode == 0
    for words in (["umount"], ["umount", "a", "b"], ["umount", "--force", "a"]):
        done = call(*words)
        assert done.returncode == 1
        check_line(done, "see “mountctl .*--help”")
    check_line(call("umount", "nowhere"), "not found: nowhere")
