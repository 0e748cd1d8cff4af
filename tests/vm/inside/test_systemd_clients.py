"""The programs of systemd as an ordinary user, with mountd in place of mountfsd and the real nsresourced.

There is no manager of the system: what it makes at boot for its units is made here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.daemon import ROOT, Daemon
from tests.disks import Part, build_disk
from tests.images import build_image
from tests.vm.inside.test_udev import udev

__all__ = ["udev"]

USER, UID = "claire", 4711
RUN = Path("/run/systemd")
MOUNTER, REGISTRAR = RUN / "io.systemd.MountFileSystem", RUN / "io.systemd.NamespaceResource"
NSRESOURCED = "/usr/lib/systemd/systemd-nsresourced"
GREETING = "hello from the image\n"
CGROUP = Path("/sys/fs/cgroup/clients")
RUNTIME = Path(f"/run/user/{UID}")
SECONDS = 60.0
POLICY = """
[[rule]]
name = "images of the system"
image = {{ location = "{place}/*.raw" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["erofs"], idmap = ["none", "namespace"] }}
verdict = "allow"

[[rule]]
name = "own directories"
image = {{ kind = "directory" }}
caller = {{ any = true }}
require = {{ ownership = ["caller"] }}
grant = {{ access = "read-write", idmap = ["none", "namespace"] }}
verdict = "allow"
"""


def eventually(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until something listens there."""
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"no {path}: {log.read_text()}"
        time.sleep(0.05)


@contextlib.contextmanager
def running(log: Path, command: Sequence[str | Path], socket: Path) -> Iterator[None]:
    """A service, as long as it is needed."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        eventually(socket, process, log)
        yield
    finally:
        process.terminate()
        process.wait(SECONDS)


def as_user(*command: str | Path) -> list[str | Path]:
    """What runs a command as the user, in a control group of the user's own."""
    join = f'echo 0 > {CGROUP}/own/cgroup.procs && exec "$@"'
    become = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", "--reset-env", "--"]
    # The images are not the user's, so neither are the files beside them that nspawn would lock.
    environment = ["SYSTEMD_NSPAWN_LOCK=0", "SYSTEMD_LOG_TARGET=console", f"XDG_RUNTIME_DIR={RUNTIME}"]
    return ["sh", "-c", join, "sh", *become, "env", *environment, *command]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as the user."""
    return subprocess.run(as_user(*command), capture_output=True, text=True, check=False, timeout=SECONDS)


@pytest.fixture(scope="module")
def home(scratch: Path) -> Iterator[Path]:
    """The home of the user, who is here for these tests only, as if logged in."""
    path = scratch / USER
    command = ["useradd", f"--uid={UID}", "--create-home", f"--home-dir={path}", USER]
    subprocess.run(command, check=True, capture_output=True)
    for each in (CGROUP, CGROUP / "own", RUNTIME):
        each.mkdir(parents=True, exist_ok=True)
        for name in (each, *(each / name for name in ("cgroup.procs", "cgroup.subtree_control"))):
            if name.exists():
                os.chown(name, UID, UID)
    yield path
    (CGROUP / "cgroup.kill").write_text("1")
    subprocess.run(["userdel", "--remove", USER], check=True, capture_output=True)
    shutil.rmtree(RUNTIME)


@pytest.fixture(scope="module")
def images(scratch: Path) -> dict[str, Path]:
    """A system that can run one program, without and with a partition table."""
    tree, place = scratch / "system", scratch / "clients"
    for name in ("dev", "proc", "sys", "run", "tmp", "var", "root", "etc", "usr/bin", "usr/lib"):
        (tree / name).mkdir(parents=True)
    (tree / "etc/greeting").write_text(GREETING)
    (tree / "usr/lib/os-release").write_text("ID=test\nVERSION_ID=1\n")
    (tree / "etc/machine-id").touch()
    (tree / "etc/resolv.conf").touch()
    for name in ("bin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(exist_ok=True)
        (tree / name).symlink_to(f"usr/{name}")
    listed = subprocess.run(["ldd", "/usr/bin/cat"], capture_output=True, text=True, check=True).stdout
    for needed in ("/usr/bin/cat", *(word for word in listed.split() if word.startswith("/"))):
        to = tree / needed.removeprefix("/")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(needed, to)
    place.mkdir()
    bare = build_image("erofs", tree, place / "bare.raw")
    return {"bare": bare, "disk": build_disk(place / "disk.raw", [Part("root", bare)])}


@pytest.fixture(scope="module")
def serving(scratch: Path, home: Path, images: dict[str, Path], udev: None) -> Iterator[Daemon]:
    """mountd, nsresourced with its security module, and udev, without which nspawn takes no image."""
    (RUN / "system").mkdir(parents=True, exist_ok=True)
    made: list[str | Path] = [
        "systemd-tmpfiles",
        "--create",
        "--prefix=/run/systemd",
        ROOT / "units/tmpfiles.d/mountd.conf",
    ]
    subprocess.run(made, check=True)
    # For RootImage= of any unit.
    (RUN / "mount-rootfs").mkdir(exist_ok=True, mode=0o555)
    log = scratch / "nsresourced.log"
    with running(log, [NSRESOURCED], REGISTRAR):
        policy = POLICY.format(place=images["bare"].parent)
        daemon = Daemon(scratch / "clients-daemon", policy, ["--mountfs-socket", str(MOUNTER)])
        yield daemon
        assert daemon.stop() == 0, daemon.log
        assert "internal error" not in daemon.log, daemon.log
    assert "disabled" not in log.read_text()


@pytest.mark.parametrize("kind", ["bare", "disk"])
def test_dissect_lists(serving: Daemon, images: dict[str, Path], kind: str) -> None:
    done = run("systemd-dissect", "--no-pager", "--list", images[kind])
    assert done.returncode == 0, done.stderr + serving.log
    assert {"etc/greeting", "usr/lib/os-release"} <= set(done.stdout.split())


def test_dissect_says_who_owns_what(serving: Daemon, images: dict[str, Path]) -> None:
    done = run("systemd-dissect", "--no-pager", "--mtree", images["bare"])
    assert done.returncode == 0, done.stderr + serving.log
    digest = hashlib.sha256(GREETING.encode()).hexdigest()
    lines = [line for line in done.stdout.splitlines() if line.startswith("./etc/greeting ")]
    assert [set(line.split()) >= {"uid=0", "gid=0", f"sha256sum={digest}"} for line in lines] == [True]


def test_dissect_copies_a_file(serving: Daemon, images: dict[str, Path]) -> None:
    """It opens a target as root of the namespace, who may not write where the user may."""
    done = run("systemd-dissect", "--copy-from", images["bare"], "/etc/greeting", "-")
    assert done.returncode == 0, done.stderr + serving.log
    assert done.stdout == GREETING


def test_nspawn(serving: Daemon, images: dict[str, Path]) -> None:
    # The machine has neither an id nor a time zone that nspawn could hand on.
    given = ["--link-journal=no", "--timezone=off"]
    command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--pipe", "--read-only", *given]
    done = run(*command, f"--image={images['bare']}", "/usr/bin/cat", "/etc/greeting", "/proc/self/uid_map")
    assert done.returncode == 0, done.stderr + serving.log
    assert done.stdout.startswith(GREETING)
    inside, outside, count = map(int, done.stdout.splitlines()[-1].split())
    assert (inside, count) == (0, 65536)
    assert 0x00080000 <= outside <= 0x6FFFFFFF, "the range for containers"


def test_a_service_of_a_user(serving: Daemon, images: dict[str, Path], home: Path, scratch: Path) -> None:
    manager = as_user("/usr/lib/systemd/systemd", "--user")
    output = home / "output"
    command = ["systemd-run", "--user", "--quiet", "--property=Type=oneshot", "--property=PrivateUsers=yes"]
    command += [f"--property=RootImage={images['bare']}", f"--property=StandardOutput=file:{output}"]
    with running(scratch / "manager.log", manager, RUNTIME / "systemd/private"):
        done = run(*command, "/usr/bin/cat", "/etc/greeting")
    assert done.returncode == 0, done.stderr + serving.log
    assert output.read_text() == GREETING


def test_what_no_rule_allows(serving: Daemon, images: dict[str, Path], home: Path) -> None:
    """The same image, but the user's own."""
    shutil.copy(images["bare"], home / "own.raw")
    os.chown(home / "own.raw", UID, UID)
    done = run("systemd-dissect", "--no-pager", "--list", home / "own.raw")
    assert done.returncode != 0
    assert "io.systemd.MountFileSystem.DeniedByImagePolicy" in done.stderr
    last = serving.log.splitlines()[-1]
    assert f"MountImage for uid {UID} " in last
    assert ": refused with DeniedByImagePolicy: " in last


def test_a_registered_namespace_may_write_there_only(serving: Daemon, home: Path) -> None:
    """The security module of nsresourced lets a namespace write where AddMountToUserNamespace was called."""
    directory = home / "tree"
    directory.mkdir()
    os.chown(directory, UID, UID)
    open_to_all = home / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    script = Path(__file__).with_name("namespace_client.py").read_text()
    command: list[str | Path] = [
        sys.executable,
        "-I",
        "-c",
        script,
        directory,
        open_to_all,
        REGISTRAR,
        MOUNTER,
    ]
    done = run(*command)
    assert done.returncode == 0, done.stderr + serving.log
    found = json.loads(done.stdout)
    assert "error" not in found["allocated"], found
    assert found["in the mount"] == "made", found
    assert found["elsewhere"] == "Operation not permitted", found
    assert (directory / "made").stat().st_uid == UID
