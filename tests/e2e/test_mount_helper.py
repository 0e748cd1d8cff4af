"""mount.mountd, called by mount(8) as root of a container and by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.client import Client
from tests.container import USER, in_container
from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.programs import Done, as_user, check_line, environment, helped, mounted, run, with_mount_helper


@pytest.fixture(autouse=True)
def _needs(containers: None) -> None:
    """All of these make containers."""


@pytest.fixture
def target(tmp_path_factory: pytest.TempPathFactory, place: Path) -> Path:
    path = place / "helper target"  # names may have spaces
    path.mkdir(exist_ok=True)
    return path


@pytest.mark.parametrize(
    ("arguments", "locked"),
    [
        ([], {"ro", "nosuid", "nodev"}),
        (["-r"], {"ro"}),
        (["-w"], {"ro"}),  # mount(8) says rw all the time, so it does not mean anything
        (["-n", "-s"], {"ro"}),
        (["-o", "noexec,noatime=recursive"], {"noexec", "noatime"}),
        (["-o", "sync,dirsync,lazytime,iversion,mand,noexec"], {"noexec"}),
        (["-o", "nofail,_netdev,user=anna,uhelper=mountd,owner,defaults,x-systemd.automount"], {"nosuid"}),
        (["-o", "mountd.idmap=namespace,mountd.userns=/proc/self/ns/user"], {"ro"}),
        (["-s", "-o", "bogus,noexec,bogus2=3,mountd.bogus=4"], {"noexec"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mount_for_root_of_a_container(
    daemon: Daemon,
    installed: Path,
    images: dict[str, Path],
    target: Path,
    arguments: list[str],
    locked: set[str],
) -> None:
    def look() -> object:
        return mounted_with_space(target), os.path.exists(target / "owned") and (
            target / "owned"
        ).stat().st_uid

    done, found = helped(
        installed, daemon.socket, ["-t", "mountd", *arguments, images["erofs"], target], look=look
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert isinstance(found, tuple), done
    (type, options), owner = found  # type: ignore[misc, has-type]
    assert type == "erofs"
    assert locked <= options, options
    assert owner == 1000


def mounted_with_space(target: Path) -> tuple[str, set[str]] | None:
    return mounted(Path(str(target).replace(" ", "\\040")))


def test_subtype_verbose_and_tmpfs(
    daemon: Daemon, installed: Path, images: dict[str, Path], target: Path
) -> None:
    def mount(*arguments: object) -> object:
        done, found = helped(
            installed, daemon.socket, ["-t", *arguments, target], look=lambda: mounted_with_space(target)
        )
        return done.returncode, done.stdout, done.stderr, found and found[0]  # type: ignore[index]

    said = "mount.mountd: {} mounted {} on " + str(target) + " (rule “{}”)\n"
    trusted = said.format("squashfs", "read-only", "trusted in the test")
    assert mount("mountd.squashfs", "-v", images["squashfs"]) == (0, trusted, "", "squashfs")
    small = said.format("tmpfs", "read-write", "small tmpfs")
    assert mount("mountd", "-v", "tmpfs:1M") == (0, small, "", "tmpfs")
    code, _, error, found = mount("mountd.ext4", images["erofs"])  # type: ignore[misc]
    assert (code, found) == (32, None)
    assert "ext4 was asked for, but the image holds erofs" in error


def test_fake_mounts_nothing(daemon: Daemon, installed: Path, images: dict[str, Path], target: Path) -> None:
    for image, code in ((images["erofs"], 0), ("tmpfs:1G", 1)):
        done, found = helped(
            installed,
            daemon.socket,
            ["-f", "-t", "mountd", image, target],
            look=lambda: mounted_with_space(target),
        )
        assert (done.returncode, done.stdout, found) == (code, "", None), done.stderr
        if code:
            check_line(done, "denied by policy")


REFUSALS = {
    # What mount(8) is called with -> exit status, and what the one line has to say.
    "unknown option": (["-o", "bogus", "IMAGE", "TARGET"], 1, r"TARGET: mount option “bogus” .*hint: "),
    "unknown own option": (["-o", "mountd.bogus", "IMAGE", "TARGET"], 1, "no such option .*mountd.userns="),
    "own option without a value": (["-o", "mountd.userns=", "IMAGE", "TARGET"], 1, "path of a user namesp"),
    "no such idmap": (["-o", "mountd.idmap=x", "IMAGE", "TARGET"], 1, "none, namespace, caller"),
    "remount": (["-o", "remount", "IMAGE", "TARGET"], 1, "does not do that .hint: mount it again"),
    "writable erofs": (["-o", "mountd.access=read-write", "IMAGE", "TARGET"], 1, "“rw” .*read-only mount"),
    "lifting": (["-o", "suid", "IMAGE", "TARGET"], 0, ""),  # mount(8) keeps the defaults for itself
    "no such image": (["/nowhere.raw", "TARGET"], 1, "TARGET: not found: /nowhere.raw"),
    "a directory": (["/etc", "TARGET"], 1, "denied by policy.*: no rule lets this caller mount a directory"),
    "a device": (["/dev/null", "TARGET"], 1, "bad file descriptor in source.imageFileDescriptor: "),
    "no image": (["/etc/passwd", "TARGET"], 32, "unsupported file system: "),
    "no size": (["tmpfs:x", "TARGET"], 1, "“tmpfs:x” has no size such as 64M"),
    "too large": (["tmpfs:9M", "TARGET"], 2, "limit exceeded: at most 8388608 bytes in a tmpfs .hint: "),
    "no directory": (["IMAGE", "/nowhere"], 1, "mountd: not found: /nowhere .hint: make "),
    "target is a file": (
        ["IMAGE", "/etc/passwd"],
        1,
        "mountd: /etc/passwd: Not a directory .hint: give a directory",
    ),
    "host's namespace": (["-o", "mountd.userns=/etc/passwd", "IMAGE", "TARGET"], 1, "not a user namespace"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_is_one_clear_line(
    daemon: Daemon, installed: Path, images: dict[str, Path], target: Path, case: str
) -> None:
    words, code, line = REFUSALS[case]
    names = {"IMAGE": str(images["erofs"]), "TARGET": str(target)}
    arguments = ["-t", "mountd", *(names.get(word, word) for word in words)]
    done, found = helped(installed, daemon.socket, arguments, look=lambda: mounted_with_space(target))
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    if code:
        check_line(
            done,
            "^mount."
            + ("" if line.startswith("mountd: ") else "mountd: .*")
            + line.replace("TARGET", str(target)),
        )
        assert found is None


BY_HAND = {
    "no arguments": ([], 1, "SPEC and DIR are needed.*usage: "),
    "unknown letter": (["-x", "IMAGE", "TARGET"], 1, "option -x not recognized"),
    "too many": (["IMAGE", "TARGET", "more"], 1, "nothing else"),
    "bind": (["IMAGE", "TARGET", "-o", "bind"], 1, "“bind” .*without -t mountd"),
    "undecodable option": ([b"IMAGE", b"TARGET", b"-o", b"a\xff"], 1, "“a.” not permitted: it is no text"),
    "undecodable image": ([b"/nowhere/\xff\n", b"TARGET"], 1, r"not found: /nowhere/\?\? .hint: there is"),
    "writable": (["IMAGE", "TARGET", "-w"], 1, "“rw” not permitted: .*Permission denied .hint: ask for a"),
    "read-write by option": (["IMAGE", "TARGET", "-r", "-o", "rw"], 1, "attaching not permitted: "),
    "ordinary user": (["IMAGE", "TARGET"], 1, "TARGET: attaching not permitted: .*hint: "),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_called_by_hand_by_a_user(
    daemon: Daemon, installed: Path, images: dict[str, Path], target: Path, case: str
) -> None:
    words, code, line = BY_HAND[case]
    names = {b"IMAGE": bytes(images["erofs"]), b"TARGET": bytes(target)}
    raw = [os.fsencode(word) for word in words]
    arguments = [os.fsdecode(names.get(word, word)) for word in raw]
    done = as_user([installed / "sbin/mount.mountd", *arguments], daemon.socket)
    assert (done.returncode, done.stdout) == (code, "")
    check_line(done, "^mount.mountd: .*" + line.replace("TARGET", str(target)))


@pytest.mark.parametrize("case", BY_HAND)
def test_called_by_hand_a_failure_in_json(
    daemon: Daemon, installed: Path, images: dict[str, Path], target: Path, case: str
) -> None:
    """The same line and the same exit status, and in addition what mountctl would print."""
    words, code, line = BY_HAND[case]
    names = {b"IMAGE": bytes(images["erofs"]), b"TARGET": bytes(target)}
    raw = [os.fsencode(word) for word in words]
    arguments = [os.fsdecode(names.get(word, word)) for word in raw]
    done = as_user([installed / "sbin/mount.mountd", *arguments, "--json"], daemon.socket)
    assert done.returncode == code
    check_line(done, "^mount.mountd: .*" + line.replace("TARGET", str(target)))
    said = json.loads(done.stdout)
    assert sorted(said) == ["error", "hint", "message", "parameters"]
    assert said["error"].rpartition(".")[2].isalpha()
    assert said["error"] == "UsageError" or "usage" not in line
    assert "".join(c if c.isprintable() else "?" for c in said["message"]) in done.stderr
    assert (said["hint"] or "") in done.stderr


@pytest.mark.parametrize("where", [0, 1, 2])
def test_report_in_json(
    daemon: Daemon, installed: Path, images: dict[str, Path], target: Path, where: int
) -> None:
    """The report of “mountctl mount --json”, wherever the word stands, with -v as well."""

    def work() -> list[Done]:
        words: list[object] = [images["erofs"], target]
        words.insert(where, "--json")
        helper = run([installed / "sbin/mount.mountd", *words, "-v"], daemon.socket)
        subprocess.run(["umount", target], check=True)
        ctl = run([installed / "bin/mountctl", "mount", "--json", images["erofs"], target], daemon.socket)
        return [helper, ctl]

    helper, ctl = in_container(work)
    assert (helper.returncode, helper.stderr) == (0, "")
    said, expected = json.loads(helper.stdout), json.loads(ctl.stdout)
    assert said["mounts"][0].pop("id") == said.pop("id")
    assert expected["mounts"][0].pop("id") == expected.pop("id")
    assert said == expected
    assert said["target"] == str(target)
    assert said["mounts"][0]["fileSystemType"] == "erofs"
    assert said["decision"]["rule"] == "trusted in the test"


def test_a_question_in_json(daemon: Daemon, installed: Path, images: dict[str, Path], target: Path) -> None:
    """With -f nothing is mounted, and the report says so; a refusal is an error."""
    program = installed / "sbin/mount.mountd"
    done = as_user([program, "-f", "--json", images["erofs"], target], daemon.socket)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert (said["mounts"], said["decision"]["verdict"]) == ([], "allow")
    done = as_user([program, "-f", "--json", "tmpfs:1G", target], daemon.socket)
    assert done.returncode == 1
    check_line(done, "denied by policy")
    said = json.loads(done.stdout)
    assert said["error"] == "DeniedByPolicy"
    assert said["message"] in done.stderr


def test_after_two_dashes_json_is_a_name(daemon: Daemon, installed: Path, target: Path) -> None:
    done = as_user([installed / "sbin/mount.mountd", target, "--", "--json"], daemon.socket)
    assert (done.returncode, done.stdout) == (1, "")
    check_line(done, "not found: --json")


@pytest.mark.parametrize(("flag", "said"), [("-h", "usage: "), ("--version", "mount.mountd 0")])
def test_help_and_version_need_no_daemon(installed: Path, flag: str, said: str) -> None:
    done = as_user([installed / "sbin/mount.mountd", flag], "/nowhere")
    assert done.returncode == 0
    assert done.stdout.startswith(said)


def test_no_daemon(installed: Path, images: dict[str, Path], target: Path, place: Path) -> None:
    done, _ = helped(installed, place / "none", ["-t", "mountd", images["erofs"], target])
    assert done.returncode == 2
    check_line(done, "cannot reach mountd: .*none: No such file or directory .hint: start mountd.socket")


def test_daemon_killed_in_the_middle(
    start: Callable[..., Daemon], installed: Path, images: dict[str, Path], place: Path, target: Path
) -> None:
    daemon = start(trusting(place / "trusted"))
    daemon.signal(signal.SIGSTOP)  # it is there, and does not get to answer

    def work() -> tuple[int, str, str]:
        with_mount_helper(installed)
        helper = subprocess.Popen(
            ["mount", "-t", "mountd", str(images["erofs"]), str(target)],
            env=environment(daemon.socket),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        waiting_in(helper.pid, "mount.mountd")
        os.write(asked, b"!")
        out, err = helper.communicate(timeout=30)
        return helper.returncode, out, err

    answer, asked = os.pipe()
    if (killer := os.fork()) == 0:
        os.read(answer, 1)
        os.kill(daemon.process.pid, signal.SIGKILL)
        os._exit(0)
    code, out, err = in_container(work)
    os.waitpid(killer, 0)
    os.close(answer)
    os.close(asked)
    daemon.process.wait()
    assert (code, out) == (2, "")
    assert err.splitlines() == [err.rstrip("\n")]
    assert "cannot reach mountd: it closed the connection without an answer" in err


def waiting_in(pid: int, name: str) -> None:
    """Return once a descendant called `name` of process `pid` waits for an answer."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in children:
            proc = Path("/proc") / child
            if name in (proc / "cmdline").read_text() and "poll" in (proc / "wchan").read_text():
                return
        time.sleep(0.01)
    raise AssertionError("it did not come so far")


def test_socket_in_the_place_for_containers(
    daemon: Daemon, installed: Path, images: dict[str, Path], place: Path, target: Path
) -> None:
    """Without an environment, the host's directory at /run/host/mountd is found."""

    def work() -> object:
        with_mount_helper(installed)
        script = (
            'mount -t tmpfs none /run && mkdir -p /run/host/mountd && mount --rbind "$1" /run/host/mountd '
            '&& mount -t mountd "$2" "$3" && cat "$3/hello"'
        )
        words = ["sh", "-ec", script, "-", daemon.socket.parent, images["erofs"], target]
        done = run(words, "", env={"PATH": "/usr/bin:/usr/sbin"})
        return done.stdout, done.stderr

    assert in_container(work) == ("hello from the image\n", "")


def test_unshare_with_one_id(daemon: Daemon, installed: Path, images: dict[str, Path], target: Path) -> None:
    """A user without subordinate ids, in what unshare(1) makes: one id is mapped."""
    script = (
        'mount -t overlay none -o "lowerdir=$1:/usr/sbin" /usr/sbin && mount -t mountd "$2" "$3" '
        '&& stat -c "%u %F" "$3/hello" "$3/owned" && ! mount -o remount,rw "$3" 2>/dev/null && umount "$3"'
    )
    words = ["unshare", "-Urm", "sh", "-ec", script, "-", installed / "sbin", images["erofs"], target]
    done = as_user(words, daemon.socket)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "0 regular file\n65534 regular file\n"


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_descriptors(
    daemon: Daemon, installed: Path, images: dict[str, Path], target: Path, closed: tuple[int, ...]
) -> None:
    def close() -> None:
        for fd in closed:
            os.close(fd)

    for image, code in ((images["erofs"], 0), ("/nowhere", 1)):
        done, _ = helped(
            installed, daemon.socket, [image, target, "-v"],
            program=str(installed / "sbin/mount.mountd"), preexec_fn=close,
        )  # fmt: skip
        assert done.returncode == code
        assert bool(done.stdout) == (code == 0 and 1 not in closed)
        assert bool(done.stderr) == (code == 1 and 2 not in closed)


@pytest.mark.parametrize("wishes", [["-o", "mountd.idmap=none"], ["-o", "mountd.userns=none"]])
def test_ids_as_on_disk(
    daemon: Daemon, installed: Path, images: dict[str, Path], target: Path, wishes: list[str]
) -> None:
    done, owner = helped(
        installed,
        daemon.socket,
        ["-t", "mountd", *wishes, images["erofs"], target],
        look=lambda: (target / "hello").stat().st_uid,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert owner == 65534  # the host's root is nobody in the container


def test_interrupted(start: Callable[..., Daemon], installed: Path, images: dict[str, Path]) -> None:
    daemon = start("")
    daemon.signal(signal.SIGSTOP)
    helper = subprocess.Popen(
        [str(installed / "sbin/mount.mountd"), str(images["erofs"]), "/"],
        env=environment(daemon.socket), stderr=subprocess.PIPE, text=True, user=USER,
    )  # fmt: skip
    deadline = time.monotonic() + 10
    while "poll" not in Path(f"/proc/{helper.pid}/wchan").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    helper.send_signal(signal.SIGINT)
    _, said = helper.communicate(timeout=10)
    daemon.signal(signal.SIGCONT)
    assert (helper.returncode, said) == (8, "")
    # The daemon has not lost its way over it.
    with Client(str(daemon.socket)) as client:
        decision = client.explain_image(images["erofs"])["decision"]
    assert isinstance(decision, dict)
    assert decision["verdict"] == "deny"
