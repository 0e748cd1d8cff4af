"""A machine with mountd installed on it, its users and its images."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.machine import HERE, Machine
from tests.systemd.registry import PLACE, Registry, rules

ROOT = HERE.parents[1]
TYPES = ("erofs", "squashfs", "ext4", "xfs", "btrfs")
IMAGES = "/var/lib/machines"
USER = "alice"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.systemd)


def installation() -> list[str]:
    """What the README says to install mountd with; what it needs is there."""
    lines = (ROOT / "README.md").read_text().splitlines()
    begin = lines.index("    make install")
    # What is enabled is started by the boot.
    return [line.strip().replace(" --now ", " ") for line in lines[begin : lines.index("", begin)]]


def in_root(root: Path, line: str) -> list[str | Path]:
    """The command that runs a line of a shell in a root that is not booted."""
    enter = 'mount -t proc proc "$1/proc" && SYSTEMD_OFFLINE=1 exec chroot "$1" sh -euc "$2"'
    return ["unshare", "--mount", "sh", "-euc", enter, "enter", root, line]


@pytest.fixture(scope="session")
def booted() -> Iterator[Machine]:
    """A copy of the Debian root with mountd installed and enabled, booted."""
    built = subprocess.run([HERE / "build_root"], stdout=subprocess.PIPE, text=True, check=True)
    # On a disk: not every file system can be mounted from a file in memory.
    place = Path(tempfile.mkdtemp(prefix="mountd-systemd-", dir="/var/tmp"))
    place.chmod(0o755)
    root = place / "root"
    try:
        subprocess.run(["cp", "-a", "--reflink=auto", built.stdout.strip(), root], check=True)
        for line in installation():
            make = line.startswith("make ")
            command = [*line.split(), "-s", f"DESTDIR={root}"] if make else in_root(root, line)
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        machine = Machine(root)
        try:
            yield machine
            bugs = [each["MESSAGE"] for each in machine.journal("--priority=err", "MESSAGE_ID=" + WORKER_ID)]
            # One test kills it.
            assert [each for each in bugs if "the fork server has ended" not in each] == []
        finally:
            machine.stop()
    finally:
        shutil.rmtree(place)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package, built from this tree."""
    output = tmp_path_factory.mktemp("package")
    command = [ROOT / "units/build_deb", output]
    built = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Path(built.stdout.strip())


@pytest.fixture(scope="session")
def bare_root() -> Iterator[Path]:
    """A copy of the Debian root without mountd."""
    built = subprocess.run([HERE / "build_root"], stdout=subprocess.PIPE, text=True, check=True)
    place = Path(tempfile.mkdtemp(prefix="mountd-package-", dir="/var/tmp"))
    place.chmod(0o755)
    try:
        subprocess.run(["cp", "-a", "--reflink=auto", built.stdout.strip(), place / "root"], check=True)
        yield place / "root"
    finally:
        shutil.rmtree(place)


@pytest.fixture(scope="session")
def packaged(bare_root: Path, package: Path) -> Iterator[Machine]:
    """A machine on which nothing was done but to install the package, booted."""
    shutil.copy(package, bare_root / "root/mountd.deb")
    command = in_root(bare_root, "dpkg --install /root/mountd.deb")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    machine = Machine(bare_root)
    try:
        yield machine
    finally:
        machine.stop()


# mountd/daemon/journal.py: what is wrong with the daemon itself.
WORKER_ID = "b8a9c1f2d6e04d3f9a7b5c4e3d2f1a08"


@pytest.fixture
def machine(booted: Machine) -> Iterator[Machine]:
    """The machine, whose service is not running yet; put back afterwards."""
    booted.put_back()
    yield booted
    booted.put_back()


@pytest.fixture(scope="session")
def user(booted: Machine) -> str:
    """An ordinary user of the machine."""
    booted.sh(f"useradd --create-home --shell /bin/sh {USER}")
    return USER


@pytest.fixture(scope="session")
def images(booted: Machine) -> dict[str, str]:
    """One image of each file system, made by the machine's own tools, owned by root."""
    booted.run(["sh", "-eu", "-s", IMAGES], input=(HERE / "inside/build_images").read_text())
    return {type: f"{IMAGES}/{type}.raw" for type in TYPES}


@pytest.fixture(scope="session")
def started(booted: Machine) -> Registry:
    """A registry with TLS on loopback; goes with the machine."""
    booted.run(["sh", "-eu", "-s", PLACE], input=(HERE / "inside/registry").read_text())
    return Registry(booted)


@pytest.fixture
def registry(started: Registry) -> Registry:
    started.policy(rules())
    return started


@pytest.fixture(scope="session")
def signed(started: Registry) -> str:
    """The digest of an image that is signed with GPG."""
    started.policy(rules())
    return started.image("gpg/app:1.0", *started.sign_gpg)
