"""The programs of the newest systemd as an ordinary user, with mountd in place of mountfsd.

systemd has booted the machine, and runs nsresourced and the user's manager. What is found out here is listed
in mountd-protocol(7); where a program does not work with mountd, the test says how it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import loop_devices
from tests.daemon import Daemon
from tests.vm.inside.test_systemd_clients import GREETING, POLICY, images

__all__ = ["images"]

USER, UID = "nora", 4712
INTERFACE = "io.systemd.MountFileSystem"
ADDRESS = Path("/run/systemd") / INTERFACE
REGISTRAR = "systemd-nsresourced.service"
WORKER = "systemd-nsresourcework"
# How many workers of nsresourced are taken at a time: one by each client that is connected, one by mountd.
AT_ONCE = 2
# Within five minutes a worker makes room for another, which is as slow at first.
WORKS_SECONDS = 250.0
# A worker has the kernel verify its security module first: five programs, which take four to eight seconds
# each where the processor is emulated.
READY_SECONDS = 600.0
SECONDS = 150.0
NAMESPACE_FAILED = 226  # what the manager of a user says of a service whose root it could not make
ALLOCATE = """
import json, os, socket, sys
go, ready = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    os.unshare(os.CLONE_NEWUSER)
    os.close(go[1])
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    os._exit(0)
os.read(ready[0], 1)
userns = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("/run/systemd/io.systemd.NamespaceResource")
    method = "io.systemd.NamespaceResource.AllocateUserRange"
    parameters = {"name": sys.argv[1], "size": 65536, "userNamespaceFileDescriptor": 0}
    call = json.dumps({"method": method, "parameters": parameters}).encode() + b"\\0"
    socket.send_fds(connection, [call], [userns])
    print(connection.recv(65536))
"""


def as_user(*command: str | Path) -> list[str | Path]:
    """What runs a command as the user."""
    become = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "--reset-env", "--"]
    # The images are not the user's, so neither are the files beside them that nspawn would lock.
    environment = ["SYSTEMD_NSPAWN_LOCK=0", "SYSTEMD_LOG_TARGET=console", f"XDG_RUNTIME_DIR=/run/user/{UID}"]
    return [*become, "env", *environment, *command]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as the user."""
    return subprocess.run(as_user(*command), capture_output=True, text=True, check=False, timeout=SECONDS)


def systemctl(*arguments: str) -> None:
    """Have the manager of the system do something."""
    subprocess.run(["systemctl", *arguments], check=True, timeout=READY_SECONDS)


def succeed(*commands: list[str | Path]) -> None:
    """Run commands at the same time until all have ended well; the machine's host hears of it meanwhile."""
    deadline = time.monotonic() + READY_SECONDS
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    while any(process.poll() is None for process in processes):
        assert time.monotonic() < deadline, commands
        with open("/dev/ttyS0", "w") as console:
            console.write(".")
        time.sleep(2)
    assert {process.returncode for process in processes} == {0}, commands


def workers() -> set[int]:
    """The pids of the workers of nsresourced."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if Path("/proc", name, "cmdline").read_bytes().startswith(WORKER.encode()):
                found.add(int(name))
    return found


def processor_time(pid: int) -> int:
    """How long a process has run, in clock ticks; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


class Registrar:
    """nsresourced, of which only workers that are ready take calls.

    Each of its workers has the kernel verify a security module before its first answer. That takes longer
    here than the clients wait for it.
    """

    def __init__(self) -> None:
        """Nothing is started yet."""
        self.since = -WORKS_SECONDS

    def make_ready(self) -> None:
        """Start it anew, and have some workers answer a call; the others are stopped."""
        systemctl("start", "systemd-nsresourced.socket")
        succeed(["systemctl", "restart", REGISTRAR])
        self.since = time.monotonic()
        # They are busy at the same time, so each call is taken by another worker.
        succeed(*(as_user(sys.executable, "-I", "-c", ALLOCATE, f"ready{n}") for n in range(AT_ONCE)))
        by_time = sorted(workers(), key=processor_time, reverse=True)
        assert len(by_time) >= AT_ONCE
        for pid in by_time[AT_ONCE:]:
            os.kill(pid, signal.SIGSTOP)

    def is_ready(self) -> bool:
        """Tell whether its workers will be there for a while."""
        return time.monotonic() - self.since < WORKS_SECONDS


@pytest.fixture(scope="module")
def home(scratch: Path) -> Iterator[Path]:
    """The home of the user, whose manager runs."""
    path = scratch / USER
    command = ["useradd", f"--uid={UID}", "--create-home", f"--home-dir={path}", USER]
    subprocess.run(command, check=True, capture_output=True)
    systemctl("start", f"user@{UID}.service")
    yield path
    systemctl("stop", f"user@{UID}.service")


@pytest.fixture(scope="module")
def own(home: Path, images: dict[str, Path]) -> Path:
    """The tree of the images, as the user's own directory."""
    path = home / "tree"
    shutil.copytree(images["bare"].parents[1] / "system", path, symlinks=True)
    for each in (path, *path.rglob("*")):
        os.chown(each, UID, UID, follow_symlinks=False)
    return path


@pytest.fixture(scope="module")
def started(scratch: Path, home: Path, images: dict[str, Path]) -> Iterator[Daemon]:
    """mountd, and no mountfsd."""
    systemctl("stop", "systemd-mountfsd.socket", "systemd-mountfsd.service")
    policy = POLICY.format(place=images["bare"].parent)
    before = loop_devices()
    daemon = Daemon(scratch / "clients-daemon", policy, ["--mountfs-socket", str(ADDRESS)])
    yield daemon
    assert daemon.stop() == 0, daemon.log
    assert "internal error" not in daemon.log, daemon.log
    assert loop_devices() == before


@pytest.fixture(scope="module")
def registrar(home: Path) -> Registrar:
    return Registrar()


@pytest.fixture
def serving(started: Daemon, registrar: Registrar) -> Daemon:
    """mountd, and an nsresourced that answers in time."""
    if not registrar.is_ready():
        registrar.make_ready()
    return started


def why(done: subprocess.CompletedProcess[str], daemon: Daemon) -> str:
    """All that is known of how a program went."""
    journal = ["journalctl", "--no-pager", "--lines=12", "--priority=warning"]
    said = subprocess.run(journal, capture_output=True, text=True, check=False, timeout=SECONDS).stdout
    return f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr}\n{said}\n{daemon.log[-2000:]}"


def declared(address: Path) -> dict[str, frozenset[str]]:
    """The types, methods and errors of the interface at an address, with the words of their fields."""
    command: list[str | Path] = ["varlinkctl", "introspect", address, INTERFACE]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
    plain = " ".join(re.sub(r"#.*", "", text).split())
    found = {}
    for member in re.split(r" (?=(?:type|method|error) )", plain):
        name, _, fields = member.partition("(")
        found[name.strip()] = frozenset(re.split(r"[\s,()]+", fields))
    return found


def service(user_property: list[str], *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a service of the user's manager."""
    given = [f"--property={each}" for each in user_property]
    return run("systemd-run", "--user", "--quiet", "--wait", "--pipe", *given, *command)


def container(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a container of the user's, in a control group that is delegated to it."""
    # The images are not the user's, so neither are the files beside them that nspawn would lock.
    unit = ["--user", "--quiet", "--wait", "--pipe", "--property=Delegate=yes"]
    unit += ["--setenv=SYSTEMD_NSPAWN_LOCK=0", "--setenv=SYSTEMD_LOG_TARGET=console"]
    # The machine has no time zone that nspawn could hand on.
    given = ["--quiet", "--register=no", "--keep-unit", "--pipe", "--link-journal=no", "--timezone=off"]
    command = ["/usr/bin/cat", "/etc/greeting", "/proc/self/uid_map"]
    return run("systemd-run", *unit, "systemd-nspawn", *given, *arguments, *command)


def check_container(done: subprocess.CompletedProcess[str], daemon: Daemon) -> None:
    """Fail unless the container was run, as a namespace of the range for containers."""
    assert done.returncode == 0, why(done, daemon)
    assert done.stdout.startswith(GREETING), why(done, daemon)
    inside, outside, count = map(int, done.stdout.splitlines()[1].split())
    assert (inside, count) == (0, 65536)
    assert 0x00080000 <= outside <= 0x6FFFFFFF


def test_systemd_is_the_newest_and_the_first_process() -> None:
    assert os.readlink("/proc/1/exe") == "/usr/lib/systemd/systemd"
    said = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True).stdout
    assert int(said.split()[1]) >= 262


def test_the_interface_is_that_of_mountfsd(started: Daemon, scratch: Path) -> None:
    """Errors here have a reason and a hint beside what they have there."""
    ours = declared(ADDRESS)
    theirs = scratch / "theirs"
    command = ["systemd-socket-activate", f"--listen={theirs}", "/usr/lib/systemd/systemd-mountfsd"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + SECONDS
            while not theirs.exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            real = declared(theirs)
        finally:
            process.terminate()
    assert set(ours) == set(real)
    for name, words in real.items():
        assert words <= ours[name] if name.startswith("error") else words == ours[name], name


@pytest.mark.parametrize("kind", ["bare", "disk"])
def test_dissect_lists(serving: Daemon, images: dict[str, Path], kind: str) -> None:
    done = run("systemd-dissect", "--no-pager", "--list", images[kind])
    assert done.returncode == 0, why(done, serving)
    assert {"etc/greeting", "usr/lib/os-release"} <= set(done.stdout.split())


def test_dissect_says_who_owns_what(serving: Daemon, images: dict[str, Path]) -> None:
    done = run("systemd-dissect", "--no-pager", "--mtree", images["bare"])
    assert done.returncode == 0, why(done, serving)
    digest = hashlib.sha256(GREETING.encode()).hexdigest()
    lines = [line for line in done.stdout.splitlines() if line.startswith("./etc/greeting ")]
    assert [set(line.split()) >= {"uid=0", "gid=0", f"sha256sum={digest}"} for line in lines] == [True]


def test_dissect_copies_a_file(serving: Daemon, images: dict[str, Path]) -> None:
    done = run("systemd-dissect", "--copy-from", images["bare"], "/etc/greeting", "-")
    assert (done.returncode, done.stdout) == (0, GREETING), why(done, serving)


def test_dissect_makes_an_archive(serving: Daemon, images: dict[str, Path], home: Path) -> None:
    """It makes the file as root of the user namespace, who may not write where the user may."""
    done = run("systemd-dissect", "--make-archive", images["bare"], home / "archive.tar")
    assert done.returncode == 1, why(done, serving)
    assert "Failed to create target file" in done.stderr, why(done, serving)


def test_dissect_runs_a_command_for_who_may_mount_only(serving: Daemon, images: dict[str, Path]) -> None:
    """It gets the mount, and attaches it in its own mount namespace, which is the system's."""
    done = run("systemd-dissect", "--with", images["bare"], "/usr/bin/cat", "etc/greeting")
    assert done.returncode == 1, why(done, serving)
    assert "Failed to mount image: Operation not permitted" in done.stderr, why(done, serving)


def test_container_of_an_image(serving: Daemon, images: dict[str, Path]) -> None:
    check_container(container("--read-only", f"--image={images['bare']}"), serving)


def test_container_of_an_own_directory(serving: Daemon, own: Path) -> None:
    check_container(container(f"--directory={own}"), serving)


@pytest.mark.parametrize("users", ["no", "yes"])
def test_service_of_an_image(serving: Daemon, images: dict[str, Path], users: str) -> None:
    done = service([f"PrivateUsers={users}", f"RootImage={images['bare']}"], "/usr/bin/cat", "/etc/greeting")
    assert (done.returncode, done.stdout) == (0, GREETING), why(done, serving)


@pytest.mark.parametrize("users", ["yes", "managed"])
def test_service_with_an_image(serving: Daemon, images: dict[str, Path], users: str) -> None:
    given = [f"PrivateUsers={users}", f"MountImages={images['bare']}:/mnt"]
    done = service(given, "/usr/bin/cat", "/mnt/etc/greeting")
    assert (done.returncode, done.stdout) == (0, GREETING), why(done, serving)


@pytest.mark.parametrize("root", ["image", "directory"])
def test_service_of_a_managed_namespace(
    serving: Daemon, images: dict[str, Path], own: Path, root: str
) -> None:
    """It connects, enters the namespace and then asks: mountd serves nobody who has changed into another."""
    given = f"RootImage={images['bare']}" if root == "image" else f"RootDirectory={own}"
    done = service(["PrivateUsers=managed", given], "/usr/bin/cat", "/etc/greeting")
    assert done.returncode == NAMESPACE_FAILED, why(done, serving)
    method = "MountImage" if root == "image" else "MountDirectory"
    last = serving.log.splitlines()[-1]
    assert f"{method} for uid {UID} " in last, why(done, serving)
    assert ": refused with System: " in last, why(done, serving)


def test_varlinkctl_sends_and_gets_descriptors(serving: Daemon, images: dict[str, Path]) -> None:
    call: list[str | Path] = [ADDRESS, f"{INTERFACE}.MountImage", '{"imageFileDescriptor":0}']
    command: list[str | Path] = ["varlinkctl", f"--push-fd={images['bare']}", "--exec", "call", *call]
    done = run(*command, "--", "cat", "/proc/self/fd/3/etc/greeting")
    assert (done.returncode, done.stdout) == (0, GREETING), why(done, serving)


def test_what_no_rule_allows(serving: Daemon, images: dict[str, Path], home: Path) -> None:
    """The same image, but the user's own."""
    shutil.copy(images["bare"], home / "own.raw")
    os.chown(home / "own.raw", UID, UID)
    done = run("systemd-dissect", "--no-pager", "--list", home / "own.raw")
    assert done.returncode != 0
    assert "DeniedByImagePolicy" in done.stderr, why(done, serving)
