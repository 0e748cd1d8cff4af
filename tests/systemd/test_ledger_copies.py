"""Mounts of which only a copy is left stay known over everything that becomes of the service."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.systemd.machine import SERVICE, Machine, eventually, next_line
from tests.systemd.test_ledger_kept import crash, listed, stop

HOLD = """
exec unshare --user --map-root-user --mount sh -euc '
    mount -t tmpfs tmpfs /mnt
    mkdir /mnt/first /mnt/copy
    mountctl mount "$1" /mnt/first >/dev/null
    mount --bind /mnt/first /mnt/copy
    umount /mnt/first
    echo copied
    read -r _ || true
' sh {image}
"""


@contextmanager
def held_copy(machine: Machine, image: str, user: str) -> Iterator[None]:
    """A container that has a copy of a mount, and the mount no more."""
    with machine.start(HOLD.format(image=image), user=user) as process:
        assert process.stdin is not None
        assert next_line(process) == "copied"
        yield
        process.stdin.close()
        assert process.wait(30) == 0


def idle(machine: Machine) -> None:
    """What ends by itself after a while is started by the next call."""
    eventually(lambda: machine.state() == "inactive", "it did not end when idle", 20)


@pytest.mark.parametrize("happens", [crash, stop, idle])
def test_a_copy_stays_listed(
    machine: Machine, images: dict[str, str], user: str, happens: Callable[[Machine], None]
) -> None:
    if happens is idle:
        machine.configure("ExecStart=\nExecStart=/usr/sbin/mountd --idle-exit 2")
    with held_copy(machine, images["erofs"], user):
        assert listed(machine, user) == {"erofs.raw": ["/mnt/copy"]}
        happens(machine)
        assert machine.property("NFileDescriptorStore") == "2"
        assert listed(machine, user) == {"erofs.raw": ["/mnt/copy"]}
        (mount,) = json.loads(machine.run(["mountctl", "list", "--all", "--json"]).stdout)["mounts"]
        done = machine.run(["mountctl", "revoke", str(mount["id"])], check=False)
        assert "detached from /mnt/copy" in done.stdout, done
    eventually(lambda: listed(machine, user) == {}, "it is still listed", 20)


def test_stopped_it_keeps_what_it_needs_and_nothing_else(machine: Machine) -> None:
    machine.explain("tmpfs:4096")
    machine.run(["systemctl", "stop", SERVICE])
    assert machine.property("NFileDescriptorStore") == "2"
    assert machine.processes() == []
    # As whoever wants to be rid of that as well.
    machine.run(["systemctl", "clean", "--what=fdstore", SERVICE])
    assert machine.property("NFileDescriptorStore") == "0"
