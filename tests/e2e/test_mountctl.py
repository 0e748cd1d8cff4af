"""mountctl as installed: mount, run and explain, for users and in containers."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.container import RANGE, USER, in_container
from tests.daemon import Daemon
from tests.e2e.conftest import TMPFS_RULE, trusting
from tests.e2e.directories import rule
from tests.images import build_image
from tests.programs import Done, as_user, build_root, check_line, environment, etc_files, mounted, run
from tests.signing import Signatory

OWN_RANGE = 700000
ETC = {
    "passwd": f"root:x:0:0::/:/bin/sh\ntester:x:{USER}:{USER}::/:/bin/sh\n",
    "group": f"root:x:0:\ntester:x:{USER}:\n",
    "subuid": f"broken\nother:600000:65536\ntester:{OWN_RANGE}:65536\n",
    "subgid": f"{USER}:10:1\n{USER}:{OWN_RANGE}:65536\n",
}


@pytest.fixture(scope="module")
def root(place: Path, images: dict[str, Path]) -> Path:
    """An image with commands in it, in the trusted directory."""
    return build_image("erofs", build_root(place / "root"), place / "trusted/root.raw")


@pytest.fixture(scope="module")
def bare_root(place: Path, images: dict[str, Path]) -> Path:
    """The same without directories for /proc and others."""
    tree = build_root(place / "bare", directories=())
    return build_image("squashfs", tree, place / "trusted/bare.raw")


@pytest.fixture
def mountctl(daemon: Daemon, installed: Path) -> Callable[..., Done]:
    """Run the program as an ordinary user, who has no subordinate ids."""

    def call(*arguments: object, **popen: object) -> Done:
        return as_user([installed / "bin/mountctl", *arguments], daemon.socket, **popen)

    return call


def test_mount_in_a_container(
    daemon: Daemon, installed: Path, images: dict[str, Path], place: Path, containers: None
) -> None:
    target = place / "mountctl target"
    target.mkdir()

    def work() -> list[object]:
        """All paths are relative."""
        program = [installed / "bin/mountctl", "mount"]
        quiet = run([*program, "trusted/erofs.raw", target.name], daemon.socket, cwd=place)
        text = (target / "hello").read_text()
        told = run([*program, "--json", "-o", "noexec", "tmpfs:64K", target], daemon.socket)
        (target / "new").write_text("written")
        found = mounted(Path(str(target).replace(" ", "\\040")))
        none = run([*program, "--userns", "none", images["erofs"], target], daemon.socket)
        return [quiet, text, told, found, none, (target / "hello").stat().st_uid]

    quiet, text, told, found, none, owner = in_container(work)
    line = "trusted/erofs.raw: attached at mountctl target (rule “trusted in the test”)\n"
    assert (quiet.returncode, quiet.stdout, quiet.stderr, text) == (0, line, "", "hello from the image\n")  # type: ignore[attr-defined]
    assert (told.returncode, told.stderr) == (0, "")  # type: ignore[attr-defined]
    said = json.loads(told.stdout)  # type: ignore[attr-defined]
    assert said["target"] == str(target)
    assert said["mounts"][0]["fileSystemType"] == "tmpfs"
    assert said["decision"]["rule"] == "small tmpfs"
    assert found is not None
    assert found[0] == "tmpfs"  # type: ignore[index]
    assert {"rw", "noexec"} <= found[1]  # type: ignore[index]
    assert (none.returncode, owner) == (0, 65534)  # type: ignore[attr-defined]


REFUSALS = {
    # Arguments -> exit status, error's name, and what the line says.
    "usage": (["mount", "IMAGE"], 1, "UsageError", "required: TARGET .hint: see “mountctl mount --help”"),
    "no verb": (["--json"], 1, "UsageError", "hint: see “mountctl --help”"),
    "no command": (["run", "IMAGE", "--"], 1, "UsageError", "there is no COMMAND .hint: write it after"),
    "not allowed": (
        ["mount", "IMAGE", "/mnt"],
        1,
        "AttachNotPermitted",
        "/mnt belongs to uid 0, not to the caller .hint: use a directory of your own",
    ),
    "missing": (
        ["mount", "/nowhere", "/mnt"],
        1,
        "NotFound",
        "not found: /nowhere .hint: there is no such file",
    ),
    "missing target": (["mount", "IMAGE", "/nowhere"], 1, "NotFound", "not found: /nowhere .hint: make"),
    "pipe": (["explain", "FIFO"], 1, "BadFileDescriptor", "source.imageFileDescriptor: "),
    "writable pipe": (["explain", "-w", "FIFO"], 1, "BadFileDescriptor", "source.imageFileDescriptor: "),
    "no size": (["run", "tmpfs:", "true"], 1, "InvalidParameter", "“tmpfs:” has no size such as 64M"),
    "idmap": (["explain", "--idmap", "x", "IMAGE"], 1, "UsageError", "“x” is none of its values"),
    "unreadable": (
        ["explain", "SECRET"],
        1,
        "PermissionError",
        "secret: Permission denied .hint: mountd opens nothing",
    ),
    "writable": (
        ["run", "-w", "IMAGE", "true"],
        1,
        "OptionNotPermitted",
        "Permission denied .hint: ask for",
    ),
    "option": (["run", "-o", "a", "IMAGE", "true"], 1, "OptionNotPermitted", "“a” not permitted.*hint: "),
    "no namespace": (["explain", "--userns", "/x", "IMAGE"], 1, "NotFound", "not found: /x"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_in_words_and_json(
    mountctl: Callable[..., Done], images: dict[str, Path], place: Path, case: str
) -> None:
    words, code, name, line = REFUSALS[case]
    if not (place / "pipe").exists():
        os.mkfifo(place / "pipe")
        (place / "pipe").chmod(0o666)
        (place / "secret").touch(mode=0o600)
    names = {"IMAGE": images["erofs"], "FIFO": place / "pipe", "SECRET": place / "secret"}
    arguments = [names.get(word, word) for word in words]
    spoken = mountctl(*(word for word in arguments if word != "--json"))
    assert (spoken.returncode, spoken.stdout) == (code, "")
    check_line(spoken, "^mountctl: .*" + line)
    told = mountctl(arguments[0], *(["--json"] if len(arguments) > 1 else []), *arguments[1:])
    assert (told.returncode, told.stderr) == (code, spoken.stderr)
    said = json.loads(told.stdout)
    assert said["error"].rpartition(".")[2] == name
    assert said["message"] in told.stderr
    assert (said["hint"] or "") in told.stderr


def test_explain(mountctl: Callable[..., Done], images: dict[str, Path]) -> None:
    done = mountctl("explain", images["erofs"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("allow: by rule “trusted in the test”: only root can change the image")
    assert "\nfacts:\n  caller: uid 4000, gid 4000, on the host\n" in done.stdout
    assert "\nrules, in order:\n  “trusted in the test” (" in done.stdout
    denied = mountctl("explain", "--json", "tmpfs:1T")
    assert (denied.returncode, denied.stderr) == (1, "")
    reply = json.loads(denied.stdout)
    assert reply["decision"]["verdict"] == "deny"
    assert [step["rule"] for step in reply["steps"]][-1] == "small tmpfs"


def test_help_shows_examples(mountctl: Callable[..., Done]) -> None:
    done = mountctl("--help")
    assert done.returncode == 0
    assert "mountctl run /var/lib/machines/base.raw -- ls -l /\n" in done.stdout
    for verb in ("mount", "run", "explain"):
        assert mountctl(verb, "-h").returncode == 0
    assert mountctl("--version").stdout.startswith("mountctl 0")


@pytest.mark.parametrize(
    ("script", "code", "out"),
    [
        ("cat /marker; id -u; id -g", 0, "in the image\n0\n0\n"),
        ("exit 42", 42, ""),
        ("kill -KILL $$", 137, ""),
        ("kill -TERM $$", 143, ""),
        ("cat", 0, "typed\n"),
        ("echo $0 $1", 0, "zero --one\n"),
        ("touch /x 2>/dev/null || stat -f -c %T / /proc", 0, "erofs\nproc\n"),
        ("echo $FOO", 0, "bar\n"),
        ("yes | cat -n | { read a b; echo $b; }", 0, "y\n"),
        # Descriptors: the three of everybody, and the directory that ls reads.
        ("ls /proc/self/fd", 0, "0\n1\n2\n3\n"),
        ("ls -d /sys/kernel /dev/null", 0, "/dev/null\n/sys/kernel\n"),
    ],
)
def test_run(
    mountctl: Callable[..., Done], daemon: Daemon, root: Path, script: str, code: int, out: str
) -> None:
    env = {**environment(daemon.socket), "FOO": "bar"}
    done = mountctl("run", root, "--", "sh", "-c", script, "zero", "--one", input="typed\n", env=env)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, "")


def test_run_with_what_is_written_in_memory(mountctl: Callable[..., Done], root: Path) -> None:
    """The daemon's rule has 8M at most."""
    script = "echo changed > /marker && mkdir -p /etc && echo new > /etc/new && cat /marker /etc/new"
    for _ in range(2):
        done = mountctl("run", "--top", "tmpfs:1M", root, "--", "sh", "-c", f"cat /marker; {script}")
        assert (done.returncode, done.stdout, done.stderr) == (0, "in the image\nchanged\nnew\n", "")
    done = mountctl("run", "--top", "tmpfs:1M", root, "sh", "-c", "yes > /large")
    assert done.returncode
    assert "No space left" in done.stderr


def test_run_with_what_is_written_in_a_directory(
    start: Callable[..., Daemon], installed: Path, root: Path, place: Path
) -> None:
    """Of the user's own, as whose root the command writes, and where the next command finds it."""
    daemon = start(trusting(place / "trusted") + rule("own", '"caller"', ', access = "read-write"'))
    changes = place / "changes"
    changes.mkdir()
    os.chown(changes, USER, USER)

    def mountctl(script: str) -> tuple[int, str, str]:
        words = [installed / "bin/mountctl", "run", "--top", changes, root, "--", "sh", "-c", script]
        done = as_user(words, daemon.socket)
        return done.returncode, done.stdout, done.stderr

    assert mountctl("mkdir -p /etc && echo kept > /etc/kept && rm /marker") == (0, "", "")
    assert mountctl("cat /etc/kept; test -e /marker || echo gone") == (0, "kept\ngone\n", "")
    kept = (changes / "upper/etc/kept").stat()
    assert (kept.st_uid, kept.st_gid) == (USER, USER)
    shutil.rmtree(changes)


def test_run_ends_writers_whose_reader_has_gone(mountctl: Callable[..., Done], root: Path) -> None:
    """SIGPIPE, which Python ignores, is what commands expect it to be."""
    done = mountctl("run", root, "sh", "-c", "{ yes; echo $? >&2; } | true")
    assert done.stderr == "141\n"


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [
        ("nothing", 127, "not found in the image: nothing .hint: it has to be in the image"),
        ("/marker", 126, "cannot run /marker in the image: Permission denied"),
        (b"\xff", 127, r"not found in the image: \?"),
    ],
)
def test_command_that_cannot_be_run(
    mountctl: Callable[..., Done], root: Path, command: str | bytes, code: int, line: str
) -> None:
    done = mountctl("run", "--json", root, "--", os.fsdecode(command))
    assert done.returncode == code
    check_line(done, "^mountctl: " + line)
    assert json.loads(done.stdout)["error"] == "CannotRun"


def test_run_without_directories_for_proc(mountctl: Callable[..., Done], bare_root: Path) -> None:
    done = mountctl("run", "-t", "squashfs", bare_root, "sh", "-c", "cat /marker; ls /")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("in the image\nbin\n")
    assert "proc" not in done.stdout


@pytest.fixture
def with_subordinate_ids(
    place: Path, start: Callable[..., Daemon], root: Path
) -> tuple[Daemon, Callable[[], None]]:
    """A daemon, and what makes a process see the same /etc: there, the user has subordinate ids."""
    directory = place / "etc"
    directory.mkdir(exist_ok=True)
    enter = etc_files(directory, ETC)
    return start(trusting(place / "trusted") + TMPFS_RULE, preexec_fn=enter), enter


def test_run_with_subordinate_ids(
    with_subordinate_ids: tuple[Daemon, Callable[[], None]], installed: Path, root: Path
) -> None:
    daemon, enter = with_subordinate_ids

    def become() -> None:
        enter()
        os.setgroups([USER, USER + 1])  # the second one is not mapped
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)

    script = "stat -c %u:%g /marker /owned; id -G; cat /proc/self/uid_map /proc/self/gid_map"
    words = [installed / "bin/mountctl", "run", root, "--", "sh", "-c", script]
    done = run(words, daemon.socket, preexec_fn=become)
    assert (done.returncode, done.stderr) == (0, "")
    numbers = done.stdout.split()
    assert numbers[:3] == ["0:0", "1000:1000", "0"]
    assert numbers[3:] == ["0", str(USER), "1", "1", str(OWN_RANGE), "65536"] * 2


def test_run_as_root_of_a_container_has_all_its_ids(
    daemon: Daemon, installed: Path, root: Path, containers: None
) -> None:
    def work() -> Done:
        words = [
            installed / "bin/mountctl",
            "run",
            root,
            "sh",
            "-c",
            "stat -c %u /owned; cat /proc/self/uid_map",
        ]
        return run(words, daemon.socket)

    done = in_container(work)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["1000", "0", "0", str(RANGE[0][2])]


def started(
    daemon: Daemon, installed: Path, root: Path, script: str, **popen: object
) -> subprocess.Popen[str]:
    """A running command in the image that has said "ready"."""
    words = [str(installed / "bin/mountctl"), "run", str(root), "--", "sh", "-c", script]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "user": USER, "text": True} | popen
    return subprocess.Popen(words, env=environment(daemon.socket), **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_signals_reach_the_command(
    daemon: Daemon, installed: Path, root: Path, number: signal.Signals, code: int
) -> None:
    process = started(daemon, installed, root, "echo ready; exec sleep 60")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    # The end of the output: nobody holds it any more, so the command has ended as well.
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (code, "", "")


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("echo ready; exec sleep 60", 130, "ready\r\n^C"),
        ("trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.1; done", 3, "caught\r\n"),
    ],
)
def test_control_c_is_for_the_command(
    daemon: Daemon, installed: Path, root: Path, script: str, code: int, said: str
) -> None:
    ours, theirs = pty.openpty()
    # The process that leads the session gets the terminal as its own.
    words = ["setsid", "--ctty", "--wait", str(installed / "bin/mountctl"), "run", str(root), "--"]
    process = subprocess.Popen(
        [*words, "sh", "-c", script],
        env=environment(daemon.socket), stdin=theirs, stdout=theirs, stderr=theirs, user=USER,
    )  # fmt: skip
    os.close(theirs)
    seen = ""
    while "ready" not in seen:
        seen += os.read(ours, 1000).decode()
    os.write(ours, b"\x03")
    process.wait(10)
    deadline = time.monotonic() + 5
    while said not in seen and time.monotonic() < deadline:
        seen += os.read(ours, 1000).decode()
    os.close(ours)
    assert process.returncode == code
    assert said in seen
    assert "Traceback" not in seen


@pytest.mark.parametrize("verb", ["explain", "run"])
def test_no_daemon(installed: Path, root: Path, verb: str) -> None:
    done = as_user(
        [installed / "bin/mountctl", verb, "--json", root, "true"][: 4 + (verb == "run")], "/nowhere"
    )
    assert done.returncode == 2
    check_line(done, "cannot reach mountd: /nowhere: No such file or directory .hint: start mountd.socket")
    assert json.loads(done.stdout)["error"] == "Unreachable"


def test_output_that_nobody_reads(daemon: Daemon, installed: Path, images: dict[str, Path]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = [installed / "bin/mountctl", "explain", images["erofs"]]
    with open(writer, "wb") as gone, open("/dev/full", "wb") as full:
        for stdout, code, err in (
            (gone, 0, ""),
            (full, 2, "mountctl: standard output: No space left on device\n"),
        ):
            done = as_user(words, daemon.socket, capture_output=False, stdout=stdout, stderr=subprocess.PIPE)
            assert (done.returncode, done.stderr) == (code, err)


def test_poor_locale(daemon: Daemon, installed: Path, images: dict[str, Path]) -> None:
    """Where the terminal has no “quotes”, the text is still there."""
    env = environment(daemon.socket) | {"LC_ALL": "en_US.ISO-8859-1"}
    done = as_user([installed / "bin/mountctl", "explain", images["erofs"]], daemon.socket, env=env)
    assert done.returncode == 0
    assert "trusted in the test" in done.stdout


class TestVouching:
    """Signatures, image policies and dm-verity from the command line."""

    @pytest.fixture
    def signed(self, place: Path, images: dict[str, Path]) -> Iterator[tuple[Path, Path, str]]:
        """An image that nothing but its signature speaks for, the signature, and a policy."""
        directory = place / "vouching"
        directory.mkdir(mode=0o755)
        image, signature = directory / "image.raw", directory / "image.sig"
        image.write_bytes(images["erofs"].read_bytes())
        ed = Signatory(directory, "ed25519 cli", "ed25519")
        (directory / "key.pub").write_bytes(ed.public)
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
        signature.write_bytes(ed.ed25519(digest.encode(), directory))
        policy = f"""
[key.cli]
ed25519 = "{directory}/key.pub"
[[rule]]
name = "signed"
image = {{ any = true }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"], signature = "cli" }}
grant = {{ file-systems = ["erofs"], idmap = ["none"] }}
verdict = "allow"
"""
        yield image, signature, policy
        shutil.rmtree(directory)

    def test_options(
        self, start: Callable[..., Daemon], installed: Path, signed: tuple[Path, Path, str]
    ) -> None:
        image, signature, policy = signed
        socket = start(policy).socket
        program = installed / "bin/mountctl"

        def explain(*options: object) -> Done:
            return as_user([program, "explain", *options, image], socket)

        assert explain().returncode == 1
        done = explain("--signature", signature)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("allow: by rule “signed”")
        assert explain("--signature", signature, "--image-policy", "root=unprotected").returncode == 0
        narrowed = explain("--signature", signature, "--image-policy", "root=signed")
        assert narrowed.returncode == 1
        assert "imagePolicy refuses it" in narrowed.stdout
        for options, said in (
            (("--signature", f"{signature}.none"), "not found: "),
            (("--signature", "/"), "directory"),
            (("--signature", "/dev/null"), "has not 1 to 262144 bytes"),
            (("--image-policy", "root=nonsense"), "is no flag"),
            (("--verity", image), "--verity and --root-hash go together"),
            (("--root-hash", "00" * 32), "--verity and --root-hash go together"),
            (("--root-hash-signature", signature), "needs --verity"),
            (("--verity", image, "--root-hash", "00"), "not 64 or 128 digits"),
            (("--verity", image, "--root-hash", "00" * 32), "invalid image"),
            (("--verity", f"{image}.none", "--root-hash", "00" * 32), "not found: "),
        ):
            done = explain(*options)
            assert done.returncode == (32 if said == "invalid image" else 1)
            check_line(done, said)
        wrong = explain("--signature", image.parent / "key.pub")
        assert "signature" in wrong.stdout
        assert wrong.returncode == 1
        done = as_user([program, "explain", "--signature", signature, "tmpfs:1M"], socket)
        check_line(done, "go with the file of an image only")

    def test_mount_helper(
        self, start: Callable[..., Daemon], installed: Path, signed: tuple[Path, Path, str], place: Path
    ) -> None:
        """With -f, it only asks."""
        image, signature, policy = signed
        socket = start(policy).socket

        def ask(options: str) -> Done:
            helper = installed / "sbin/mount.mountd"
            return as_user([helper, "-f", "-o", f"mountd.userns=none,{options}", image, place], socket)

        assert ask(f"mountd.signature={signature}").returncode == 0
        assert ask(f"mountd.signature={signature},mountd.policy=root=unprotected").returncode == 0
        check_line(ask("ro"), "no signature came along")
        check_line(ask(f"mountd.signature={signature},mountd.policy=root=signed"), "imagePolicy refuses it")
        check_line(ask(f"mountd.signature={signature}.none"), "not found: ")
        check_line(ask("mountd.signature="), "give the path of a detached signature")
        check_line(ask("mountd.policy="), "give a policy as in systemd.image-policy")
