"""mount(8) and umount(8) as ordinary users call them: fstab, utab, and whose mounts they are."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.daemon import Daemon
from tests.e2e.attaching import records
from tests.e2e.conftest import TMPFS_RULE, trusting
from tests.programs import Done, as_user, check_line, environment, findmnt, in_private, mounted, run

T = TypeVar("T")
ALICE, BOB = 4220, 4221
UTAB = Path("/run/mount/utab")


@pytest.fixture(scope="module")
def grounds(place: Path) -> Path:
    path = place / "helped"
    path.mkdir(mode=0o755)
    for uid in (ALICE, BOB):
        (path / str(uid)).mkdir(mode=0o755)
        os.chown(path / str(uid), uid, uid)
    return path


@pytest.fixture(scope="module")
def own_daemon(place: Path, images: dict[str, Path], grounds: Path) -> Iterator[Daemon]:
    grant = f'["{grounds}/$UID/**"]'
    policy = trusting(place / "trusted", attach=grant)
    daemon = Daemon(
        place / "helped-daemon", policy + TMPFS_RULE.replace("max-size", f"attach = {grant}, max-size")
    )
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log


class Scene:
    """One test: its users, who are known to the system, a directory of Alice's, and the daemon."""

    def __init__(self, daemon: Daemon, installed: Path, place: Path, target: Path) -> None:
        self.daemon, self.installed, self.place, self.target = daemon, installed, place, target
        users = (f"mhalice:x:{ALICE}:{ALICE}::/:/bin/sh\n", f"mhbob:x:{BOB}:{BOB}::/:/bin/sh\n")
        self.passwd = Path("/etc/passwd").read_text() + "".join(users)

    def play(self, work: Callable[[], T], fstab: str = "") -> T:
        """Do `work` as root, where nothing is mounted yet."""
        return in_private(self.installed, work, {"fstab": fstab, "passwd": self.passwd}, self.place)

    def user(self, uid: int, *words: object, **settings: object) -> Done:
        """Run a command as a user."""
        return as_user(words, self.daemon.socket, **({"user": uid, "group": uid} | settings))

    def alice(self, *words: object, **settings: object) -> Done:
        return self.user(ALICE, *words, **settings)

    def bob(self, *words: object, **settings: object) -> Done:
        return self.user(BOB, *words, **settings)

    def root(self, *words: object) -> Done:
        return run(words, self.daemon.socket)

    @property
    def spot(self) -> str:
        """The target as mountinfo and fstab have it."""
        return str(self.target).replace("\\", "\\134").replace(" ", "\\040").replace("\n", "\\012")


@pytest.fixture(params=["plain", "with space", "with\nnew \\line"], ids=["plain", "space", "newline"])
def anywhere(
    request: pytest.FixtureRequest, own_daemon: Daemon, installed: Path, grounds: Path, tmp_path: Path
) -> Iterator[Scene]:
    """A scene for each kind of name that a directory can have."""
    yield from made(own_daemon, installed, grounds, tmp_path, request.param)


@pytest.fixture
def scene(own_daemon: Daemon, installed: Path, grounds: Path, tmp_path: Path) -> Iterator[Scene]:
    yield from made(own_daemon, installed, grounds, tmp_path, "directory")


def made(daemon: Daemon, installed: Path, grounds: Path, tmp_path: Path, name: str) -> Iterator[Scene]:
    target = grounds / str(ALICE) / name
    target.mkdir()
    os.chown(target, ALICE, ALICE)
    yield Scene(daemon, installed, tmp_path, target)
    target.rmdir()


def told(done: Done) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("program", ["mount", "umount", "findmnt"])
def test_these_are_the_programs_of_debian_12(program: str) -> None:
    """Those of Debian 13 are shown in tests/systemd."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert re.match(rf"{program} from util-linux 2\.38[. ]", said), said


@pytest.mark.parametrize("type", ["erofs", "squashfs"])
def test_there_and_back(anywhere: Scene, images: dict[str, Path], type: str) -> None:
    """What nobody has put into fstab: only who mounted it unmounts it, and utab has a line for so long."""
    scene = anywhere

    def work() -> None:
        assert told(scene.alice("mount", "-t", "mountd", images[type], scene.target)) == (0, "", "")
        found = mounted(Path(scene.spot))
        assert found is not None
        assert found[0] == type
        assert {"ro", "nosuid", "nodev"} <= found[1]
        assert UTAB.read_text() == (f"SRC={images[type]} TARGET={scene.spot} ROOT=/ OPTS=uhelper=mountd\n")
        assert findmnt(scene.target) == str(images[type])
        assert "uhelper=mountd" in findmnt(scene.target, "OPTIONS").split(",")
        refused = scene.bob("umount", scene.target)
        assert refused.returncode == 1
        check_line(refused, f"^umount.mountd: .*not found: .* attached for uid {BOB}")
        assert mounted(Path(scene.spot)) is not None
        assert told(scene.alice("umount", scene.target)) == (0, "", "")
        assert mounted(Path(scene.spot)) is None
        assert UTAB.read_text() == ""

    scene.play(work)
    assert records(scene.daemon) == []


@pytest.mark.parametrize("option", ["user", "user,uhelper=mountd", "users", "owner", "group"])
def test_a_line_of_fstab(scene: Scene, images: dict[str, Path], option: str) -> None:
    """`mount DIR`: with `user` and `users` mount(8) stays root; otherwise it leaves it to mountd's policy.

    `owner` and `group` are about who the image belongs to, which is root.
    """
    line = (
        f"{images['erofs']} {scene.target} mountd noauto,{option},noatime,x-systemd.requires=mountd.socket"
    )

    def work() -> None:
        assert told(scene.alice("mount", scene.target)) == (0, "", "")
        found = mounted(scene.target)
        assert found is not None
        assert {"ro", "nosuid", "nodev", "noatime"} <= found[1]
        # What mount(8) adds to such lines arrives.
        assert option in ("owner", "group") or "noexec" in found[1]
        assert findmnt(scene.target) == str(images["erofs"])
        assert len(UTAB.read_text().splitlines()) == 1
        assert "uhelper=mountd" in UTAB.read_text()
        assert scene.bob("umount", scene.target).returncode == 1
        again = scene.alice("mount", scene.target)
        assert (again.returncode, mounted(scene.target) is not None) != (0, False)
        while mounted(scene.target) is not None:
            assert told(scene.alice("umount", scene.target)) == (0, "", "")
        assert UTAB.read_text() == ""

    scene.play(work, f"{line} 0 0\n")


def test_a_line_that_is_not_for_users(scene: Scene, images: dict[str, Path], place: Path) -> None:
    """mount(8) gives up its rights and tries: what is mounted then is what mountd's policy allows."""
    untrusted = place / "not-trusted.raw"
    untrusted.write_bytes(images["erofs"].read_bytes())

    def work() -> None:
        done = scene.alice("mount", scene.target)
        assert done.returncode == 1
        check_line(done, "^mount.mountd: .*denied by policy")
        assert mounted(scene.target) is None

    scene.play(work, f"{untrusted} {scene.target} mountd noauto 0 0\n")


def test_root_unmounts_it(scene: Scene, images: dict[str, Path]) -> None:
    def work() -> None:
        assert scene.alice("mount", "-t", "mountd", images["erofs"], scene.target).returncode == 0
        assert told(scene.root("umount", scene.target)) == (0, "", "")
        assert mounted(scene.target) is None
        assert UTAB.read_text() == ""

    scene.play(work)


def test_root_unmounts_it_with_the_helper(scene: Scene, images: dict[str, Path]) -> None:
    def work() -> None:
        assert scene.alice("mount", "-t", "mountd", images["erofs"], scene.target).returncode == 0
        helper = scene.installed / "sbin/umount.mountd"
        assert told(scene.root(helper, scene.target, "-v")) == (
            0, f"umount.mountd: {scene.target} unmounted\n", "",
        )  # fmt: skip
        assert mounted(scene.target) is None
        # A line that is left over is gone with the next one for this place.
        assert len(UTAB.read_text().splitlines()) == 1
        assert scene.alice("mount", "-t", "mountd", images["squashfs"], scene.target).returncode == 0
        assert len(UTAB.read_text().splitlines()) == 1
        assert scene.alice("umount", scene.target).returncode == 0
        assert UTAB.read_text() == ""

    scene.play(work)


def test_busy_and_lazy(scene: Scene, images: dict[str, Path]) -> None:
    def work() -> None:
        assert scene.alice("mount", "-t", "mountd", images["erofs"], scene.target).returncode == 0
        with open(scene.target / "hello"):
            busy = scene.alice("umount", scene.target)
            assert busy.returncode == 32
            check_line(
                busy, f"^umount.mountd: {scene.target}: the mount is in use .hint: close what .*fuser"
            )
            assert len(UTAB.read_text().splitlines()) == 1
            assert told(scene.alice("umount", "--lazy", scene.target)) == (0, "", "")
            assert mounted(scene.target) is None
        assert UTAB.read_text() == ""

    scene.play(work)


@pytest.mark.parametrize("option", ["--force", "--no-mtab", "--all-targets", "--recursive"])
def test_what_umount_lets_root_alone_ask_for(scene: Scene, images: dict[str, Path], option: str) -> None:
    """It says so itself, and does not come as far as its helper; as umount.mountd(8) says."""

    def work() -> None:
        assert scene.alice("mount", "-t", "mountd", images["erofs"], scene.target).returncode == 0
        refused = scene.alice("umount", option, scene.target)
        assert refused.returncode != 0
        assert refused.stderr.startswith("umount: "), refused.stderr
        assert mounted(scene.target) is not None
        assert told(scene.alice("umount", scene.target)) == (0, "", "")

    scene.play(work)


def test_two_on_one_another(scene: Scene, images: dict[str, Path]) -> None:
    """The second is refused; what is there, and its line, stay as they are."""

    def work() -> None:
        assert told(scene.alice("mount", "-t", "mountd", images["erofs"], scene.target)) == (0, "", "")
        line = UTAB.read_text()
        done = scene.alice("mount", "-t", "mountd", images["squashfs"], scene.target)
        assert done.returncode == 1
        check_line(done, "^mount.mountd: .*attaching not permitted: something is mounted at .* already")
        assert findmnt(scene.target) == str(images["erofs"])
        assert UTAB.read_text() == line
        assert told(scene.alice("umount", scene.target)) == (0, "", "")
        assert mounted(scene.target) is None
        assert UTAB.read_text() == ""

    scene.play(work)


def test_tmpfs(scene: Scene) -> None:
    def work() -> None:
        options = ["-o", "noexec,mountd.idmap=caller"]
        assert told(scene.alice("mount", "-t", "mountd", *options, "tmpfs:1M", scene.target)) == (0, "", "")
        assert scene.alice("touch", scene.target / "mine").returncode == 0
        assert "uhelper=mountd" in findmnt(scene.target, "OPTIONS")
        assert told(scene.alice("umount", scene.target)) == (0, "", "")

    scene.play(work)


HELPER = "^mount.mountd: .*"
REFUSED = {
    "denied": (["/etc/passwd", "TARGET"], 32, f"{HELPER}unsupported file system: "),
    "option": (["-o", "bogus", "IMAGE", "TARGET"], 1, f"{HELPER}“bogus” not permitted"),
    "not hers": (["IMAGE", "BOBS"], 1, f"{HELPER}attaching not permitted: "),
    "system": (["IMAGE", "/etc"], 1, f"{HELPER}attaching not permitted: "),
    "type": (["-t", "mountd.ext4", "IMAGE", "TARGET"], 32, f"{HELPER}ext4 was asked for"),
    # By mount(8), before it comes as far as its helper.
    "another namespace": (["-N", "/proc/self/ns/mnt", "IMAGE", "TARGET"], 2, "^mount: failed to set target"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(scene: Scene, images: dict[str, Path], grounds: Path, case: str) -> None:
    words, code, line = REFUSED[case]
    names = {"IMAGE": images["erofs"], "TARGET": scene.target, "BOBS": grounds / str(BOB)}

    def work() -> tuple[Done, list[str]]:
        type = [] if "-t" in words else ["-t", "mountd"]
        done = scene.alice("mount", *type, *(names.get(word, word) for word in words))
        places = (Path("/etc"), grounds / str(BOB), scene.target)
        return done, [str(each) for each in places if mounted(each) is not None]

    done, found = scene.play(work)
    assert found == []
    assert done.returncode == code
    check_line(done, line)


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (["-o", "suid,dev"], ""),
        (["--make-shared"], "mount: TARGET: WARNING: failed to apply propagation flags.\n"),
    ],
)
def test_what_mount_keeps_to_itself(
    scene: Scene, images: dict[str, Path], words: list[str], warning: str
) -> None:
    """It takes back what it has said itself, of which its helper hears nothing; mountd adds it again."""

    def work() -> None:
        done = scene.alice("mount", "-t", "mountd", *words, images["erofs"], scene.target)
        assert told(done) == (0, "", warning.replace("TARGET", str(scene.target)))
        found = mounted(scene.target)
        assert found is not None
        assert {"ro", "nosuid", "nodev"} <= found[1]
        assert told(scene.alice("umount", scene.target)) == (0, "", "")

    scene.play(work)


def test_fake(scene: Scene, images: dict[str, Path]) -> None:
    def work() -> None:
        assert told(scene.alice("mount", "-f", "-t", "mountd", images["erofs"], scene.target)) == (0, "", "")
        assert mounted(scene.target) is None
        assert not UTAB.exists() or UTAB.read_text() == ""

    scene.play(work)


def test_somebody_who_keeps_the_lock_delays_and_stops_nothing(scene: Scene, images: dict[str, Path]) -> None:
    """Everybody can take libmount's lock; what is lost is the line."""

    def work() -> None:
        Path("/run/mount/utab.lock").touch(0o644)
        with open("/run/mount/utab.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            helper = scene.installed / "sbin/mount.mountd"
            assert told(scene.alice(helper, images["erofs"], scene.target)) == (0, "", "")
            assert mounted(scene.target) is not None
        assert told(scene.alice(scene.installed / "sbin/umount.mountd", scene.target)) == (0, "", "")

    scene.play(work)


def test_no_line_for_a_namespace_that_is_a_users(
    scene: Scene, images: dict[str, Path], grounds: Path
) -> None:
    """Who makes a mount namespace decides what is at /run/mount there, and gets nothing written to it."""
    script = (
        'mount -t tmpfs none /run/mount && mkdir -m 755 "$2/trap" && mount --bind "$2/trap" /run/mount '
        '&& exec mount -t mountd "$1" "$2"'
    )

    def work() -> tuple[Done, bool]:
        done = scene.alice("unshare", "-Urm", "sh", "-c", script, "-", images["erofs"], grounds / str(ALICE))
        trap = grounds / str(ALICE) / "trap"
        left = sorted(os.listdir(trap)) if trap.exists() else []
        if trap.exists():
            trap.rmdir()
        return done, left == [] and not UTAB.exists()

    done, clean = scene.play(work)
    assert done.returncode == 0, done.stderr
    assert clean


@pytest.mark.parametrize("words", [["bin/mountctl", "mount"], ["sbin/mount.mountd"]])
def test_capabilities_over_another_namespace(
    start: Callable[..., Daemon],
    scene: Scene,
    images: dict[str, Path],
    place: Path,
    containers: None,
    words: list[str],
) -> None:
    """Who is root of a user namespace, but of no mount namespace, has mountd attach as everybody else."""
    daemon = start(trusting(place / "trusted", attach=f'["{scene.target}"]'))

    def work() -> tuple[Done, object, Done]:
        program, *verb = words
        line = [scene.installed / program, *verb, "--json", images["erofs"], scene.target]
        own = environment(daemon.socket)
        done = scene.alice("unshare", "--user", "--map-root-user", *line, env=own)
        return done, mounted(scene.target), scene.alice("umount", scene.target, env=own)

    done, found, gone = scene.play(work)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["attachedBy"] == "mountd"
    assert found is not None
    assert told(gone) == (0, "", "")


def test_digest(scene: Scene, images: dict[str, Path]) -> None:
    import hashlib

    right = "sha256:" + hashlib.sha256(images["erofs"].read_bytes()).hexdigest()

    def work() -> None:
        for digest, code in (("sha256:" + 64 * "0", 32), (right, 0)):
            done = scene.alice(
                "mount", "-t", "mountd", "-o", f"mountd.digest={digest}", images["erofs"], scene.target
            )
            assert done.returncode == code, done.stderr
            assert (mounted(scene.target) is not None) is (code == 0)
        assert scene.alice("umount", scene.target).returncode == 0

    scene.play(work)


def test_interrupted_attaching_leaves_nothing(
    start: Callable[..., Daemon], scene: Scene, images: dict[str, Path], place: Path, grounds: Path
) -> None:
    """The daemon hears that nobody waits any more, and what was done by then is undone."""
    daemon = start(trusting(place / "trusted", attach=f'["{grounds}/$UID/**"]'))

    def work() -> None:
        daemon_pid = daemon.process.pid
        os.kill(daemon_pid, signal.SIGSTOP)
        helper = subprocess.Popen(
            [str(scene.installed / "sbin/mount.mountd"), str(images["erofs"]), str(scene.target)],
            env=environment(daemon.socket), stderr=subprocess.PIPE, text=True, user=ALICE, group=ALICE,
        )  # fmt: skip
        while "poll" not in Path(f"/proc/{helper.pid}/wchan").read_text():
            assert helper.poll() is None
        helper.send_signal(signal.SIGINT)
        # While it waits to hear whether it is too late.
        os.kill(daemon_pid, signal.SIGCONT)
        _, said = helper.communicate(timeout=20)
        assert (helper.returncode, said) == (8, "")
        with_client = scene.alice(
            scene.installed / "sbin/mount.mountd", "-f", images["erofs"], scene.target,
            env=environment(daemon.socket),
        )  # fmt: skip
        assert with_client.returncode == 0, with_client.stderr
        assert mounted(scene.target) is None
        assert not UTAB.exists() or UTAB.read_text() == ""

    scene.play(work)
    assert records(daemon) == []


def test_no_daemon(scene: Scene, images: dict[str, Path]) -> None:
    nowhere = environment("/nowhere")

    def work() -> None:
        done = scene.alice("mount", "-t", "mountd", images["erofs"], scene.target, env=nowhere)
        assert done.returncode == 2
        check_line(done, "^mount.mountd: .*cannot reach mountd: /nowhere.* .hint: start mountd.socket")
        assert scene.alice("mount", "-t", "mountd", images["erofs"], scene.target).returncode == 0
        done = scene.alice("umount", scene.target, env=nowhere)
        assert done.returncode == 2
        check_line(done, "^umount.mountd: .*cannot reach mountd: /nowhere")
        assert mounted(scene.target) is not None
        assert re.search("uhelper=mountd", UTAB.read_text())
        assert scene.alice("umount", scene.target).returncode == 0

    scene.play(work)
