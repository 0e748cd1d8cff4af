"""Debian 13's mount(8), umount(8) and findmnt(8), and units with Type=mountd in both service managers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.conftest import IMAGES
from tests.systemd.machine import Machine, eventually

USER, OTHER = "mhunits", "mhother"
HELLO = "hello from the image\n"
POLICY = f"""
[[rule]]
name = "mount units"
image = {{ location = "{IMAGES}/*" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
verdict = "allow"
  [rule.grant]
  file-systems = ["erofs", "squashfs", "ext4", "xfs", "btrfs"]
  idmap = ["none", "namespace", "caller"]
  attach = ["$HOME/**"]
"""
# The service manager detaches what an automount has mounted without libmount, which leaves its line.
UTAB = "grep uhelper=mountd /run/mount/utab || true"


@pytest.fixture(scope="module")
def people(booted: Machine) -> int:
    """Two users, of whom the first has a service manager; its uid."""
    for name in (USER, OTHER):
        booted.sh(
            booted.sh(
                f"useradd --create-home --shell /bin/sh {name}; chmod 755 /home/{name}; "
                f"install -d -o {name} /home/{name}/mnt"
            )
        )
    uid = int(booted.sh(f"id -u {USER}"))
    booted.sh(f"loginctl enable-linger {USER}")
    eventually(lambda: booted.state(f"user@{uid}.service") == "active", "no service manager of the user")
    return uid


@pytest.fixture
def home(machine: Machine, people: int, images: dict[str, str]) -> Iterator[Path]:
    """Where the first user mounts things; with a policy that lets it."""
    (machine.root / "etc/mountd/policy.d/10-units.toml").write_text(POLICY)
    place = Path(f"/home/{USER}/mnt")
    yield place
    machine.run(["umount", "--lazy", "--quiet", str(place)], check=False)


def manager(machine: Machine, uid: int, *words: str, check: bool = True) -> str:
    """What systemctl says to the user about the user's own service manager."""
    bus = f"XDG_RUNTIME_DIR=/run/user/{uid}"
    done = machine.run(["env", bus, "systemctl", "--user", *words], user=USER, check=check)
    return done.stdout + done.stderr


def findmnt(machine: Machine, place: Path | str, columns: str = "SOURCE") -> str:
    words = ["findmnt", "--mtab", "--noheadings", "--raw", f"--output={columns}", "--mountpoint", str(place)]
    return machine.run(words, check=False).stdout.strip()


def write(machine: Machine, path: str, text: str, owner: str = "root") -> None:
    machine.run(["install", "-D", "-m", "644", "-o", owner, "/dev/stdin", path], input=text)


def unit_name(place: Path, kind: str = "mount") -> str:
    return str(place).strip("/").replace("/", "-") + f".{kind}"


def mount_unit(image: str, place: Path | str, options: str = "") -> str:
    return f"[Mount]\nWhat={image}\nWhere={place}\nType=mountd\nOptions={options}\n"


@pytest.fixture
def units(machine: Machine) -> Iterator[None]:
    """Units of the system that are gone afterwards."""
    yield
    machine.sh("rm -f /etc/systemd/system/srv-mh.*mount; systemctl daemon-reload")


@pytest.mark.parametrize("program", ["mount", "umount", "findmnt"])
def test_these_are_the_programs_of_debian_13(machine: Machine, program: str) -> None:
    """Those of Debian 12 are shown in tests/e2e."""
    said = machine.run([program, "--version"]).stdout
    assert re.match(rf"{program} from util-linux 2\.41[. ]", said), said


@pytest.mark.parametrize("type", ["erofs", "squashfs"])
def test_a_mount_unit(machine: Machine, home: Path, images: dict[str, str], units: None, type: str) -> None:
    options = "noexec,noatime,nofail,_netdev,x-systemd.requires=mountd.socket,mountd.idmap=none"
    write(machine, "/etc/systemd/system/srv-mh.mount", mount_unit(images[type], "/srv/mh", options))
    machine.sh("systemctl daemon-reload; systemctl start srv-mh.mount")
    assert machine.sh("cat /srv/mh/hello") == HELLO
    source, found, flags = findmnt(machine, "/srv/mh", "SOURCE,FSTYPE,OPTIONS").split()
    assert (source, found) == (images[type], type)
    assert {"ro", "noexec", "noatime"} <= set(flags.split(","))
    assert machine.property("What", "srv-mh.mount") == images[type]
    machine.run(["systemctl", "stop", "srv-mh.mount"])
    assert findmnt(machine, "/srv/mh") == ""


def test_a_mount_unit_that_is_refused_says_why(
    machine: Machine, home: Path, images: dict[str, str], units: None
) -> None:
    machine.run(["install", "-o", USER, images["erofs"], f"/home/{USER}/mine.raw"])
    write(machine, "/etc/systemd/system/srv-mh.mount", mount_unit(f"/home/{USER}/mine.raw", "/srv/mh"))
    machine.sh("systemctl daemon-reload")
    everywhere = "journalctl --boot --output=cat --no-pager SYSLOG_IDENTIFIER=mount.mountd"
    machine.run(["journalctl", "--sync"])
    before = machine.sh(everywhere).count("denied by policy")
    assert machine.run(["systemctl", "start", "srv-mh.mount"], check=False).returncode != 0
    machine.run(["journalctl", "--sync"])
    said = machine.sh("journalctl --unit=srv-mh.mount --boot --output=cat --no-pager")
    (line,) = [each for each in said.splitlines() if each.startswith("mount.mountd: ")][-1:]
    assert "denied by policy" in line
    # Once for each time: standard error is led to the journal already.
    assert machine.sh(everywhere).count("denied by policy") == before
    machine.run(["systemctl", "reset-failed"])


def test_errors_of_a_caller_without_a_terminal_are_in_the_journal(machine: Machine, home: Path) -> None:
    machine.run(["mount", "-t", "mountd", "/etc/passwd", "/mnt"], check=False)
    machine.run(["journalctl", "--sync"])
    said = machine.sh("journalctl --boot --output=cat --no-pager SYSLOG_IDENTIFIER=mount.mountd")
    assert said.splitlines()[-1].startswith("mount.mountd: /mnt: unsupported file system")


def test_an_automount_unit(machine: Machine, home: Path, images: dict[str, str], units: None) -> None:
    write(machine, "/etc/systemd/system/srv-mh.mount", mount_unit(images["erofs"], "/srv/mh"))
    write(machine, "/etc/systemd/system/srv-mh.automount", "[Automount]\nWhere=/srv/mh\n")
    machine.sh("systemctl daemon-reload; systemctl start srv-mh.automount")
    try:
        assert machine.state("srv-mh.mount") == "inactive"
        # Whoever looks there first, an ordinary user as well.
        assert machine.run(["cat", "/srv/mh/hello"], user=OTHER).stdout == HELLO
        assert machine.state("srv-mh.mount") == "active"
    finally:
        machine.sh("systemctl stop srv-mh.mount; systemctl stop srv-mh.automount")


def test_fstab_makes_such_units(machine: Machine, home: Path, images: dict[str, str]) -> None:
    before = machine.sh("cat /etc/fstab 2>/dev/null || true")
    options = "nofail,x-systemd.automount,x-systemd.requires=mountd.socket,nosuid"
    write(machine, "/etc/fstab", f"{images['squashfs']} /srv/mh mountd.squashfs {options} 0 0\n")
    try:
        machine.sh("systemctl daemon-reload; systemctl start srv-mh.automount")
        assert machine.sh("cat /srv/mh/hello") == HELLO
        assert machine.property("Requires", "srv-mh.mount").split().count("mountd.socket") == 1
        machine.sh("systemctl stop srv-mh.mount; systemctl stop srv-mh.automount")
    finally:
        write(machine, "/etc/fstab", before)
        machine.sh("systemctl daemon-reload")


@pytest.mark.parametrize("type", ["erofs", "squashfs", "ext4", "xfs", "btrfs"])
def test_a_mount_unit_of_a_user(
    machine: Machine, home: Path, people: int, images: dict[str, str], type: str
) -> None:
    name = unit_name(home)
    path = f"/home/{USER}/.config/systemd/user/{name}"
    write(machine, path, mount_unit(images[type], home, "noexec"), USER)
    manager(machine, people, "daemon-reload")
    manager(machine, people, "start", name)
    try:
        assert machine.sh(f"cat {home}/hello") == HELLO
        flags = set(findmnt(machine, home, "OPTIONS").split(","))
        assert {"ro", "nosuid", "nodev", "noexec", "uhelper=mountd"} <= flags
        assert manager(machine, people, "is-active", name).strip() == "active"
    finally:
        manager(machine, people, "stop", name)
    assert findmnt(machine, home) == ""
    assert machine.sh(UTAB) == ""


def test_a_mount_unit_of_a_user_that_is_refused(
    machine: Machine, home: Path, people: int, images: dict[str, str]
) -> None:
    place = Path("/srv")
    path = f"/home/{USER}/.config/systemd/user/{unit_name(place)}"
    write(machine, path, mount_unit(images["erofs"], place), USER)
    manager(machine, people, "daemon-reload")
    manager(machine, people, "start", unit_name(place), check=False)
    assert findmnt(machine, place) == ""
    machine.run(["journalctl", "--sync"])
    said = machine.sh(f"journalctl --boot --output=cat --no-pager _UID={people}")
    assert "mount.mountd: /srv: attaching not permitted: " in said


def test_an_automount_unit_of_a_user_is_nothing_that_systemd_has(
    machine: Machine, home: Path, people: int, images: dict[str, str]
) -> None:
    """autofs is for root; what a user can have is the mount unit."""
    directory = f"/home/{USER}/.config/systemd/user"
    write(machine, f"{directory}/{unit_name(home)}", mount_unit(images["erofs"], home), USER)
    write(machine, f"{directory}/{unit_name(home, 'automount')}", f"[Automount]\nWhere={home}\n", USER)
    manager(machine, people, "daemon-reload")
    manager(machine, people, "start", unit_name(home, "automount"), check=False)
    assert manager(machine, people, "is-active", unit_name(home, "automount"), check=False) != "active\n"
    assert findmnt(machine, home) == ""


def test_a_user_without_fstab(machine: Machine, home: Path, images: dict[str, str]) -> None:
    machine.run(["mount", "-t", "mountd.squashfs", images["squashfs"], str(home)], user=USER)
    assert machine.sh(UTAB) == f"SRC={images['squashfs']} TARGET={home} ROOT=/ OPTS=uhelper=mountd\n"
    assert findmnt(machine, home) == images["squashfs"]
    done = machine.run(["umount", str(home)], user=OTHER, check=False)
    assert done.returncode == 1
    assert "umount.mountd: " in done.stderr
    machine.run(["umount", str(home)], user=USER)
    assert findmnt(machine, home) == ""
    assert machine.sh(UTAB) == ""


def test_a_user_with_fstab(machine: Machine, home: Path, images: dict[str, str]) -> None:
    before = machine.sh("cat /etc/fstab 2>/dev/null || true")
    write(machine, "/etc/fstab", f"{images['erofs']} {home} mountd user,noauto,uhelper=mountd 0 0\n")
    try:
        machine.run(["mount", str(home)], user=USER)
        flags = set(findmnt(machine, home, "OPTIONS").split(","))
        assert {"ro", "nosuid", "nodev", "noexec", "uhelper=mountd"} <= flags
        assert machine.run(["umount", str(home)], user=OTHER, check=False).returncode != 0
        machine.run(["umount", str(home)], user=USER)
        # Root as well, whoever mounted it.
        machine.run(["mount", str(home)], user=USER)
        machine.run(["umount", str(home)])
        assert findmnt(machine, home) == ""
        assert machine.sh(UTAB) == ""
    finally:
        write(machine, "/etc/fstab", before)


def test_the_mount_outlives_the_daemon_and_can_still_be_unmounted(
    machine: Machine, home: Path, images: dict[str, str]
) -> None:
    machine.run(["mount", "-t", "mountd", images["erofs"], str(home)], user=USER)
    machine.run(["systemctl", "kill", "--signal=KILL", "mountd.service"])
    machine.run(["systemctl", "reset-failed", "mountd.service"], check=False)
    assert machine.sh(f"cat {home}/hello") == HELLO
    machine.run(["umount", str(home)], user=USER)
    assert findmnt(machine, home) == ""
