"""The way of a new user, with nothing but the installed package: to a mount, and on from a refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from subprocess import CompletedProcess

import pytest

from tests.systemd.machine import Machine

USER = "jonas"
UID = 1000
HOME = f"/home/{USER}"
BASE = f"{HOME}/base"
IMAGE = "/var/lib/machines/journey.raw"
OWN = f"{HOME}/own.raw"
HELLO = "hello from the image\n"


@pytest.fixture(scope="module")
def new_user(packaged: Machine) -> str:
    """Somebody who has a directory to mount at; root has put an image where images belong."""
    packaged.sh(f"useradd --create-home --uid {UID} --shell /bin/sh {USER}")
    packaged.sh(f"mkdir {BASE}", user=USER)
    packaged.sh(
        f"mkdir -p /root/journey /var/lib/machines && printf '{HELLO}' > /root/journey/hello && "
        f"chmod 755 /root/journey && mkfs.erofs --quiet {IMAGE} /root/journey && chmod 644 {IMAGE}"
    )
    return USER


@pytest.fixture
def as_user(packaged: Machine, new_user: str) -> Iterator[Machine]:
    """The machine; nothing is mounted afterwards."""
    yield packaged
    packaged.run(["umount", "--lazy", "--quiet", BASE], check=False)


def user(machine: Machine, *command: str, check: bool = True) -> CompletedProcess[str]:
    """Run a program as the user, at home."""
    return machine.run(["env", f"HOME={HOME}", *command], user=USER, check=check)


def mounts(machine: Machine) -> list[dict[str, object]]:
    listed = json.loads(user(machine, "mountctl", "list", "--json").stdout)["mounts"]
    assert isinstance(listed, list)
    return listed


def test_mount_look_and_unmount(as_user: Machine) -> None:
    user(as_user, "mount", "-t", "mountd", IMAGE, BASE)
    assert user(as_user, "cat", f"{BASE}/hello").stdout == HELLO
    [listed] = mounts(as_user)
    assert (listed["uid"], listed["readOnly"], listed["rule"]) == (UID, True, "system images")
    assert [each["mountPoint"] for each in listed["attached"]] == [BASE]  # type: ignore[attr-defined]
    shown = user(as_user, "mountctl", "list").stdout
    assert BASE in shown
    assert "erofs" in shown
    user(as_user, "umount", BASE)
    assert user(as_user, "cat", f"{BASE}/hello", check=False).returncode != 0
    assert mounts(as_user) == []


def test_a_line_in_fstab(as_user: Machine) -> None:
    fstab = as_user.root / "etc/fstab"
    before = fstab.read_text() if fstab.exists() else ""
    fstab.write_text(f"{before}{IMAGE} {BASE} mountd user,noauto,ro 0 0\n")
    try:
        user(as_user, "mount", BASE)
        assert user(as_user, "cat", f"{BASE}/hello").stdout == HELLO
        user(as_user, "umount", BASE)
        assert mounts(as_user) == []
    finally:
        fstab.write_text(before)


def test_refused_and_what_the_hint_leads_to(as_user: Machine) -> None:
    user(as_user, "cp", IMAGE, OWN)
    refused = user(as_user, "mount", "-t", "mountd", OWN, BASE, check=False)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    explained = user(as_user, "mountctl", "explain", "--json", OWN, check=False)
    assert explained.returncode == 1
    decision = json.loads(explained.stdout)["decision"]
    assert decision["verdict"] == "deny"
    # For people as for programs, by both ways.
    hint = decision["hint"]
    assert f"hint: {hint}" in user(as_user, "mountctl", "explain", OWN, check=False).stdout
    assert hint in refused.stderr
    # What it says is what root does, to the letter.
    directory = re.search(r"/var/lib/[a-z]+", hint)
    assert directory is not None, hint
    as_user.run(["install", "--owner=root", "--mode=0644", OWN, f"{directory[0]}/own.raw"])
    user(as_user, "mount", "-t", "mountd", f"{directory[0]}/own.raw", BASE)
    assert user(as_user, "cat", f"{BASE}/hello").stdout == HELLO
    user(as_user, "umount", BASE)
    assert as_user.sh("systemctl list-units --failed --plain --no-legend") == ""
