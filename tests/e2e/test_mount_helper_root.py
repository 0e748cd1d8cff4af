"""mount(8), umount(8) and findmnt(8) as the host's root: fstab, names, namespaces, the journal."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.client import Client
from mountd.kernel import mount_api
from mountd.kernel.libc import call
from tests.container import USER
from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.programs import Done, as_user, check_line, environment, findmnt, helped, in_private, mounted, run


@pytest.fixture
def target(place: Path) -> Path:
    path = place / "root target"
    path.mkdir(exist_ok=True)
    return path


@pytest.mark.parametrize("type", ["erofs", "squashfs", "ext4", "xfs"])
def test_findmnt_names_the_image(
    daemon: Daemon, installed: Path, images: dict[str, Path], target: Path, type: str
) -> None:
    def work() -> object:
        done = run(["mount", "-t", "mountd", images[type], target], daemon.socket)
        found = findmnt(target), findmnt(target, "FSTYPE"), (target / "hello").exists()
        # By its source, as well as by where it is.
        gone = run(["umount", images[type]], daemon.socket)
        return done.stderr + gone.stderr, *found, findmnt(target)

    assert in_private(installed, work) == ("", str(images[type]), type, True, "")


def test_findmnt_names_the_device_of_a_btrfs(
    daemon: Daemon, installed: Path, images: dict[str, Path], target: Path
) -> None:
    """Its driver opens its devices by their names again, when it likes."""

    def work() -> str:
        run(["mount", "-t", "mountd", images["btrfs"], target], daemon.socket)
        found = findmnt(target)
        run(["umount", target], daemon.socket)
        return found

    assert re.fullmatch("/dev/loop[0-9]+", in_private(installed, work))


def test_a_container_is_not_told_paths_of_the_host(
    daemon: Daemon, images: dict[str, Path], containers: None, installed: Path, target: Path
) -> None:
    done, found = helped(
        installed, daemon.socket, ["-t", "mountd", images["erofs"], target], look=lambda: findmnt(target)
    )
    assert done.returncode == 0
    assert re.fullmatch("/proc/self/fd/[0-9]+", str(found))


def test_another_file_at_the_path_is_not_named(
    daemon: Daemon, installed: Path, images: dict[str, Path], place: Path, target: Path
) -> None:
    """Who mounts something over the path of an image for themselves names nothing with it."""
    mine = place / "mine.raw"
    mine.write_bytes(images["erofs"].read_bytes())

    def work() -> tuple[str, str]:
        with mount_api.clone_mount(str(mine)) as file:
            mount_api.move_mount(file.fileno(), str(images["erofs"]))
        done = run(["mount", "-t", "mountd", images["erofs"], target], daemon.socket)
        return done.stderr, findmnt(target)

    error, source = in_private(installed, work)
    assert "denied by policy" in error
    assert source == ""


def test_fstab(daemon: Daemon, installed: Path, images: dict[str, Path], place: Path, target: Path) -> None:
    """`mount DIR`, `mount --all` for what is mounted already, and `umount DIR`, with many options."""
    fstab = place / "fstab-root"
    spot = str(target).replace(" ", "\\040")
    options = "noauto,nofail,_netdev,x-systemd.automount,comment=x,noexec,noatime,mountd.idmap=none"
    fstab.write_text(
        f"{images['erofs']} {spot} mountd {options} 0 0\n"
        f"{images['squashfs']} {place}/second mountd.squashfs nosuid,nodev,X-mount.mkdir 0 0\n"
    )

    def work() -> object:
        once = run(["mount", target], daemon.socket)
        found = mounted(Path(spot)), findmnt(target)
        every = [run(["mount", "--all", "--verbose"], daemon.socket) for _ in range(2)]
        second = findmnt(place / "second"), len(findmnt(place / "second", "TARGET").splitlines())
        gone = run(["umount", target], daemon.socket)
        return once.stderr, found, [each.returncode for each in every], every[1].stdout, second, gone.stderr

    stderr, found, codes, again, second, gone = in_private(
        installed, work, {"fstab": fstab.read_text()}, place
    )  # type: ignore[misc]
    (place / "second").rmdir()
    assert (stderr, gone, codes) == ("", "", [0, 0])
    (type, flags), source = found
    assert (type, source) == ("erofs", str(images["erofs"]))
    assert {"ro", "noexec", "noatime"} <= flags
    assert second == (str(images["squashfs"]), 1)
    assert f"{place}/second" in again
    assert "already mounted" in again


@pytest.mark.parametrize(
    "proc",
    [
        "",
        "mount -t tmpfs none /proc;",  # as where processes have a namespace of their own
        "mount -t tmpfs none /proc; mkdir /proc/self; mkfifo /proc/self/status;",
    ],
    ids=["usual", "none", "trap"],
)
def test_in_another_mount_namespace(
    daemon: Daemon, installed: Path, images: dict[str, Path], target: Path, proc: str
) -> None:
    """With -N: mount(8) finds the helper and the image here, and the directory there, and nothing else."""

    def work() -> object:
        there = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", f"{proc} echo; exec sleep 60"], stdout=subprocess.PIPE
        )
        assert there.stdout is not None
        there.stdout.readline()
        try:
            done = run(
                ["mount", "-N", str(there.pid), "-t", "mountd", images["erofs"], target], daemon.socket
            )
            info = Path(f"/proc/{there.pid}/mountinfo").read_text()
            direct = installed / "sbin/umount.mountd"
            gone = run([direct, target, "-N", f"/proc/{there.pid}/ns/mnt"], daemon.socket)
            after = Path(f"/proc/{there.pid}/mountinfo").read_text()
            spot = str(target).replace(" ", "\\040")
            return done.stderr + gone.stderr, spot in info, mounted(Path(spot)), spot in after
        finally:
            there.kill()
            there.communicate()

    assert in_private(installed, work) == ("", True, None, False)


@pytest.mark.parametrize("program", ["mount.mountd", "umount.mountd"])
@pytest.mark.parametrize(
    ("namespace", "line"),
    [
        ("/proc/self/ns/net", "/proc/self/ns/net is not a mount namespace"),
        ("/etc/passwd", "/etc/passwd is not a mount namespace"),
        ("/nowhere", "/nowhere: No such file"),
    ],
)
def test_in_what_is_no_mount_namespace(
    daemon: Daemon, installed: Path, images: dict[str, Path], program: str, namespace: str, line: str
) -> None:
    image = [images["erofs"]] if program == "mount.mountd" else []
    done = run([installed / "sbin" / program, *image, "/mnt", "-N", namespace], daemon.socket)
    assert done.returncode == 1
    check_line(done, f"^{program}: .*{line}")


def test_a_user_cannot_enter_a_namespace_of_root(
    daemon: Daemon, installed: Path, images: dict[str, Path]
) -> None:
    program = installed / "sbin/mount.mountd"
    done = as_user([program, images["erofs"], "/mnt", "-N", "/proc/self/ns/mnt"], daemon.socket)
    assert done.returncode == 1
    check_line(done, "/proc/self/ns/mnt may not be entered .hint: -N is for root")


def test_digest(daemon: Daemon, installed: Path, images: dict[str, Path], target: Path) -> None:
    right = "sha256:" + hashlib.sha256(images["erofs"].read_bytes()).hexdigest()
    wrong = "sha256:" + 64 * "0"

    def work() -> list[tuple[int, str, str]]:
        seen = []
        for digest in (wrong, right):
            for fake in (["-f"], []):
                options = ["-o", f"mountd.digest={digest}"]
                words = ["mount", *fake, "-t", "mountd", *options, images["erofs"], target]
                done = run(words, daemon.socket)
                seen.append((done.returncode, done.stderr, findmnt(target)))
        return seen

    *refused, asked, done = in_private(installed, work)
    assert (asked, done) == ((0, "", ""), (0, "", str(images["erofs"])))
    assert [(code, found) for code, _, found in refused] == [(32, "")] * 2
    for _, said, _ in refused:
        assert f"this is another image: its digest is {right}, not {wrong}" in said


@pytest.mark.parametrize("fake", [[], ["-f"]])
def test_digest_of_what_can_be_written_to(
    start: Callable[..., Daemon],
    installed: Path,
    images: dict[str, Path],
    place: Path,
    target: Path,
    fake: list[str],
) -> None:
    """Who may write to it is refused the digest, be it the right one."""
    daemon = start(trusting(place / "trusted", access='"read-write"'))
    right = "sha256:" + hashlib.sha256(images["ext4"].read_bytes()).hexdigest()
    options = f"mountd.access=read-write,mountd.digest={right}"
    program = installed / "sbin/mount.mountd"
    done = run([program, *fake, images["ext4"], target, "-o", options], daemon.socket)
    assert done.returncode == 1
    check_line(done, f"option “mountd.digest={right}” not permitted: a writable image has none that stays")
    assert findmnt(target) == ""


ROOT_ONLY = """
[[rule]]
name = "for root alone"
image = {{ location = "{}/*" }}
caller = {{ users = ["root"] }}
require = {{ integrity = ["root-owned"] }}
verdict = "allow"
  [rule.grant]
  file-systems = ["erofs"]
"""


def test_what_a_set_user_id_program_lends_is_given_up(
    start: Callable[..., Daemon], installed: Path, images: dict[str, Path], place: Path
) -> None:
    """With root's rights on behalf of a user, as a program with the set-user-ID bit has them."""
    daemon = start(ROOT_ONLY.format(place / "trusted"))
    program = installed / "sbin/mount.mountd"

    def lend() -> None:
        os.setgroups([])
        os.setresgid(USER, 0, 0)
        os.setresuid(USER, 0, 0)

    words = [program, "-f", images["erofs"], "/mnt"]
    assert run(words, daemon.socket).returncode == 0
    done = run(words, daemon.socket, preexec_fn=lend, cwd="/")
    assert done.returncode == 1
    check_line(done, "denied by policy")
    assert f"for uid {USER} " in daemon.log
    done = run([installed / "sbin/umount.mountd", "/proc"], daemon.socket, preexec_fn=lend, cwd="/")
    assert done.returncode != 0
    assert Path("/proc/self").exists()


def heard(installed: Path, place: Path, words: list[object], **settings: object) -> tuple[Done, list[bytes]]:
    """Run a command where the journal's socket is the test's, and return what it was sent."""

    def work() -> tuple[Done, list[bytes]]:
        os.makedirs("/run/systemd", exist_ok=True)
        call("mount", b"none", b"/run/systemd", b"tmpfs", 0, b"mode=0755")
        os.mkdir("/run/systemd/journal")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            journal.bind("/run/systemd/journal/socket")
            os.chmod("/run/systemd/journal/socket", 0o666)
            journal.setblocking(False)
            done = run(words, place / "none", **settings)
            received = []
            while True:
                try:
                    received.append(journal.recv(65536))
                except BlockingIOError:
                    return done, received

    return in_private(installed, work)


@pytest.mark.parametrize(
    ("program", "arguments"), [("mount.mountd", ["/etc/passwd", "/"]), ("umount.mountd", ["/root/x\ny"])]
)
def test_errors_go_to_the_journal(installed: Path, place: Path, program: str, arguments: list[str]) -> None:
    done, received = heard(installed, place, [installed / "sbin" / program, *arguments])
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    fields = [f"MESSAGE={line}", "PRIORITY=3", f"SYSLOG_IDENTIFIER={program}"]
    assert received == ["".join(f"{field}\n" for field in fields).encode()]


def test_the_journal_is_told_once(installed: Path, place: Path) -> None:
    """As in a unit, whose standard error is a stream to the journal."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        status = os.fstat(theirs.fileno())
        stream = environment(place / "none") | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        program = [installed / "sbin/mount.mountd", "/etc/passwd", "/"]
        settings = {"capture_output": False, "stdout": theirs, "stderr": theirs, "env": stream}
        _, received = heard(installed, place, program, **settings)
        assert received == []
        assert b"cannot reach mountd" in ours.recv(4096)
        # Set, but standard error has been led elsewhere since.
        _, received = heard(installed, place, program, env=stream)
        assert len(received) == 1


def test_a_journal_that_does_not_listen_holds_nobody_up(
    daemon: Daemon, installed: Path, place: Path
) -> None:
    def work() -> Done:
        os.makedirs("/run/systemd", exist_ok=True)
        call("mount", b"none", b"/run/systemd", b"tmpfs", 0, b"mode=0755")
        os.mkdir("/run/systemd/journal")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            journal.bind("/run/systemd/journal/socket")
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as full:
                full.setblocking(False)
                full.connect("/run/systemd/journal/socket")
                with contextlib.suppress(BlockingIOError):
                    while True:
                        full.send(b"x")
            return run([installed / "sbin/mount.mountd", "/etc/passwd", "/"], place / "none")

    done = in_private(installed, work)
    assert done.returncode == 2
    check_line(done, "cannot reach mountd")


def test_interrupted_while_the_daemon_hangs_leaves_nothing(
    start: Callable[..., Daemon], installed: Path, images: dict[str, Path], place: Path, target: Path
) -> None:
    daemon = start(trusting(place / "trusted"))
    daemon.signal(signal.SIGSTOP)

    def work() -> object:
        helper = subprocess.Popen(
            [str(installed / "sbin/mount.mountd"), str(images["erofs"]), str(target)],
            env=environment(daemon.socket), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while "poll" not in Path(f"/proc/{helper.pid}/wchan").read_text():
            assert helper.poll() is None
        helper.send_signal(signal.SIGINT)
        _, said = helper.communicate(timeout=10)
        os.kill(daemon.process.pid, signal.SIGCONT)
        with Client(str(daemon.socket)) as client:
            client.explain_image(images["erofs"])
        return helper.returncode, said, findmnt(target)

    assert in_private(installed, work) == (8, "", "")


UMOUNT = {
    # Arguments -> exit status, and what the one line has to say.
    "no arguments": ([], 1, "DIR is needed.*usage: "),
    "two": (["/a", "/b"], 1, "nothing else"),
    "unknown letter": (["-x", "/"], 1, "option -x not recognized"),
    "nowhere": (["/nowhere"], 1, "not found: /nowhere"),
    "not mounted": (["PLACE"], 1, "not found: a mount at PLACE .hint: .findmnt"),
    "not theirs": (["/proc"], 1, "/proc that mountd has attached for uid 4000 .hint: who mounted it"),
}


@pytest.mark.parametrize("case", UMOUNT)
def test_umount_helper_refuses_in_one_line(daemon: Daemon, installed: Path, place: Path, case: str) -> None:
    words, code, line = UMOUNT[case]
    arguments = [str(place) if word == "PLACE" else word for word in words]
    done = as_user([installed / "sbin/umount.mountd", *arguments], daemon.socket)
    assert (done.returncode, done.stdout) == (code, "")
    check_line(done, "^umount.mountd: .*" + line.replace("PLACE", str(place)))


@pytest.mark.parametrize(("flag", "said"), [("-h", "usage: "), ("--version", "umount.mountd 0")])
def test_umount_helper_introduces_itself(installed: Path, flag: str, said: str) -> None:
    done = as_user([installed / "sbin/umount.mountd", flag], "/nowhere")
    assert done.returncode == 0
    assert done.stdout.startswith(said)


def test_umount_helper_as_root(
    daemon: Daemon, installed: Path, images: dict[str, Path], target: Path
) -> None:
    """As umount(8) calls it for `helper=mountd`: busy, lazily, and when nothing is left."""
    helper = installed / "sbin/umount.mountd"

    def work() -> list[Done]:
        options = ["-o", "helper=mountd,nosuid"]
        run(["mount", "-t", "mountd", *options, images["erofs"], target], daemon.socket)
        assert "helper=mountd" in findmnt(target, "USER-OPTIONS") + Path("/run/mount/utab").read_text()
        with open(target / "hello"):
            busy = run(["umount", target], daemon.socket)
            lazy = run(["umount", "--lazy", target], daemon.socket)
        assert Path("/run/mount/utab").read_text() == ""
        run(["mount", "-t", "mountd", images["erofs"], target], daemon.socket)
        force = run([helper, target, "-f", "-v", "-n", "-r", "-t", "mountd.erofs"], daemon.socket)
        return [busy, lazy, force, run([helper, target], daemon.socket)]

    busy, lazy, force, gone = in_private(installed, work)
    assert busy.returncode == 32
    check_line(busy, "^umount.mountd: .*: it is in use .hint: .*fuser")
    assert (lazy.returncode, lazy.stderr) == (0, "")
    assert (force.returncode, force.stdout) == (0, f"umount.mountd: {target} unmounted\n")
    assert gone.returncode == 1
    check_line(gone, "not found: a mount at ")


def test_a_stored_image_is_called_as_it_was_asked_for(
    start: Callable[..., Daemon], installed: Path, images: dict[str, Path], target: Path
) -> None:
    digest = "sha256:" + hashlib.sha256(images["squashfs"].read_bytes()).hexdigest()
    daemon = start(
        f"""
[[rule]]
name = "stored"
image = {{ digest = ["{digest}"] }}
caller = {{ any = true }}
require = {{ integrity = ["stored"] }}
grant = {{ file-systems = ["squashfs"] }}
verdict = "allow"
"""
    )
    done = run([installed / "bin/mountctl", "image", "import", images["squashfs"]], daemon.socket)
    assert done.returncode == 0, done.stderr

    def work() -> tuple[str, str, str]:
        mounted = run(["mount", "-t", "mountd", f"stored:{digest}", target], daemon.socket)
        source = findmnt(target)
        return mounted.stderr, source, run(["umount", target], daemon.socket).stderr

    assert in_private(installed, work) == ("", f"stored:{digest}", "")
