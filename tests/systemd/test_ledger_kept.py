"""What is listed stays listed while it is there, whatever becomes of the service."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.systemd.machine import SERVICE, Machine, eventually
from tests.systemd.test_lifetime import held_mount


def listed(machine: Machine, user: str) -> dict[str, list[str]]:
    """The sources of a user's live mounts, and where each is attached."""
    done = machine.run(["mountctl", "list", "--json"], user=user)
    return {
        Path(each["source"]).name: [place["mountPoint"] for place in each["attached"]]
        for each in json.loads(done.stdout)["mounts"]
    }


def restart(machine: Machine) -> None:
    machine.run(["systemctl", "restart", SERVICE])


def crash(machine: Machine) -> None:
    before = machine.main_pid()
    machine.run(["systemctl", "kill", "--kill-whom=main", "--signal=KILL", SERVICE])
    eventually(lambda: machine.main_pid() not in (0, before), "it was not started again", 20)


def stop(machine: Machine) -> None:
    """The next call starts it again."""
    machine.run(["systemctl", "stop", SERVICE])


@pytest.mark.parametrize("happens", [restart, crash, stop])
def test_listed_before_and_after(
    machine: Machine, images: dict[str, str], user: str, happens: Callable[[Machine], None]
) -> None:
    with held_mount(machine, images["ext4"], user) as read:
        with held_mount(machine, images["erofs"], user):
            assert listed(machine, user) == {"ext4.raw": ["/mnt"], "erofs.raw": ["/mnt"]}
            assert machine.property("NFileDescriptorStore") == "2"
            happens(machine)
            assert listed(machine, user) == {"ext4.raw": ["/mnt"], "erofs.raw": ["/mnt"]}
        eventually(lambda: listed(machine, user) == {"ext4.raw": ["/mnt"]}, "it is still listed", 20)
        read()
    eventually(lambda: listed(machine, user) == {}, "it is still listed", 20)


def test_taken_back_from_a_container(machine: Machine, images: dict[str, str], user: str) -> None:
    with held_mount(machine, images["ext4"], user):
        (mount,) = json.loads(machine.run(["mountctl", "list", "--all", "--json"]).stdout)["mounts"]
        done = machine.run(["mountctl", "revoke", str(mount["id"])], check=False)
        assert "detached from /mnt" in done.stdout, done
        assert listed(machine, user) in ({}, {"ext4.raw": []})
