"""Mounts for clients that nobody here wrote: systemd's varlinkctl, and the varlink package's own.

Neither can pass a descriptor (varlinkctl can from systemd 258 on), so that they ask for a tmpfs, whose
reply is complete all the same: the one that comes with it is closed by the kernel when nobody has room
for it, and the mount is gone with it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.systemd.machine import Machine

ADDRESS = "/run/mountd/io.mountd.Mount"
MOUNT = "io.mountd.Mount.Mount"
TMPFS = '{"source":{"tmpfs":{"size":65536}},"readOnly":false}'
NUMBER = 60
RULE = """
[[rule]]
name = "tmpfs for the test"
image = { kind = "tmpfs" }
caller = { any = true }
grant = { max-size = "1M", idmap = ["none", "namespace", "caller"] }
verdict = "allow"
"""


@pytest.fixture
def generous(machine: Machine) -> Machine:
    """The machine with a rule that grants a tmpfs; it is put back with the machine."""
    (machine.root / "etc/mountd/policy.d/40-test.toml").write_text(RULE)
    return machine


def check(reply: dict[str, object]) -> None:
    """It is a whole reply of Mount."""
    assert sorted(reply) == ["decision", "mounts"]
    decision, mounts = reply["decision"], reply["mounts"]
    assert isinstance(decision, dict)
    assert isinstance(mounts, list)
    assert (decision["verdict"], decision["rule"]) == ("allow", "tmpfs for the test")
    (made,) = mounts
    assert made["mountFileDescriptor"] == 0
    assert made["fileSystemType"] == "tmpfs"
    assert not made.get("readOnly")


def anonymous_device(machine: Machine) -> int:
    """The lowest number that no file system without a device has: it goes up with each that is left."""
    text = machine.sh("mount -t tmpfs probe /mnt; stat -c %d /mnt; umount /mnt")
    return os.minor(int(text))


def held(machine: Machine) -> dict[str, object]:
    """What the service has open and mounted, whatever the number of its workers is."""
    listener = machine.main_pid()
    processes = machine.processes()
    seen = {pid: list(Path(f"/proc/{pid}/fd").iterdir()) for pid in processes}
    leader = next(pid for pid in processes if status(pid, "NSpid").split()[-1] == str(listener))
    (fork_server,) = (pid for pid in processes if status(pid, "PPid") == str(leader))
    workers = [pid for pid in processes if status(pid, "PPid") == str(fork_server)]
    return {
        "listener": len(seen[leader]) - 2 * len(workers),
        "fork server": len(seen[fork_server]),
        "mounts": len(Path(f"/proc/{fork_server}/mountinfo").read_text().splitlines()),
        "others": len(processes) - 2 - len(workers),
    }


def status(pid: int, name: str) -> str:
    """A line of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))


@pytest.mark.parametrize("as_user", [False, True])
def test_varlinkctl_mounts(generous: Machine, user: str, as_user: bool) -> None:
    call = ["varlinkctl", "call", "--json=short", ADDRESS, MOUNT, TMPFS]
    for _ in range(3):
        done = generous.run(call, user=user if as_user else None)
        assert done.stderr == ""
        check(json.loads(done.stdout))


def test_varlinkctl_of_this_release_passes_no_descriptors(generous: Machine) -> None:
    """Once it does, it can ask for an image here, too."""
    assert "push-fd" not in generous.run(["varlinkctl", "--help"]).stdout


def test_the_client_of_the_varlink_package_mounts(generous: Machine) -> None:
    """One connection, many mounts: all replies are there, and no descriptor of any is anywhere."""
    first = json.loads(generous.python("varlink_mount.py", ADDRESS, "1"))
    check(first["replies"][0])
    before, lowest = held(generous), anonymous_device(generous)
    found = json.loads(generous.python("varlink_mount.py", ADDRESS, str(NUMBER)))
    assert len(found["replies"]) == NUMBER
    for reply in found["replies"]:
        check(reply)
    # In the client: its connection, and nothing more with each reply.
    assert len(found["held"]) == 1
    assert found["after"] == found["before"]
    # In the service, and in the kernel; other file systems of the host come and go meanwhile.
    assert held(generous) == before
    assert anonymous_device(generous) < lowest + NUMBER // 2


def test_mounts_that_nobody_takes_are_gone(generous: Machine) -> None:
    """As above, for as many processes of varlinkctl."""
    call = f"varlinkctl call --quiet {ADDRESS} {MOUNT} '{TMPFS}'"
    generous.sh(call)
    before, lowest = held(generous), anonymous_device(generous)
    generous.sh(f"for number in $(seq {NUMBER}); do {call}; done")
    assert held(generous) == before
    assert anonymous_device(generous) < lowest + NUMBER // 2
