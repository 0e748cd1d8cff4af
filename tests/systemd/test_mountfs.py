"""The optional socket for clients of systemd-mountfsd, in a booted system and with varlinkctl.

That of this release passes no descriptors (it can from systemd 258 on). So it is asked what needs none, and
a client of the system's Python does the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.machine import SERVICE, SOCKET, Machine

UNIT = "mountd-mountfsd.socket"
ADDRESS = "/run/systemd/io.systemd.MountFileSystem"
OWN = "/run/mountd/io.mountd.Mount"
INTERFACE = "io.systemd.MountFileSystem"
DESCRIPTION = (Path(__file__).parents[2] / f"protocol/{INTERFACE}.varlink").read_text()
RULES = """
[[rule]]
name = "directories of users"
image = { kind = "directory" }
caller = { any = true }
require = { ownership = ["caller", "foreign"] }
grant = { access = "read-write", idmap = ["none", "namespace"] }
verdict = "allow"
"""


@pytest.fixture
def serving(machine: Machine) -> Iterator[Machine]:
    """The machine with the optional socket, and a rule about directories."""
    (machine.root / "etc/mountd/policy.d/40-test.toml").write_text(RULES)
    machine.run(["systemctl", "start", UNIT])
    yield machine
    machine.run(["systemctl", "stop", UNIT, SERVICE])


def test_it_is_off_unless_it_is_wanted(machine: Machine) -> None:
    assert machine.run(["systemctl", "is-enabled", UNIT], check=False).stdout.strip() == "disabled"
    assert machine.state(UNIT) == "inactive"
    assert not (machine.root / ADDRESS.removeprefix("/")).exists()
    machine.explain("tmpfs:4096")
    assert machine.state() == "active"


def test_it_and_the_one_of_systemd_exclude_each_other(machine: Machine) -> None:
    assert "systemd-mountfsd.socket" in machine.property("Conflicts", UNIT)
    machine.run(["systemd-analyze", "verify", f"/usr/lib/systemd/system/{UNIT}"])


def members(text: str) -> list[str]:
    """What an interface declares, without comments and layout."""
    plain = re.sub(r"#.*", "", text)
    return sorted(re.findall(r"^(?:type|method|error) \w+", plain, re.MULTILINE))


def test_one_service_and_two_doors(serving: Machine) -> None:
    """The first caller of either starts it, and gets what belongs to that socket only."""
    assert serving.state() == "inactive"
    info = json.loads(serving.run(["varlinkctl", "info", "--json=short", ADDRESS]).stdout)
    assert (info["product"], sorted(info["interfaces"])) == ("mountd", [INTERFACE, "org.varlink.service"])
    first = serving.main_pid()
    info = json.loads(serving.run(["varlinkctl", "info", "--json=short", OWN]).stdout)
    assert INTERFACE not in info["interfaces"]
    assert serving.main_pid() == first
    assert serving.property("NFileDescriptorStore") == "2"
    # systemd reads the description and prints it in a form of its own.
    described = serving.run(["varlinkctl", "introspect", ADDRESS, INTERFACE]).stdout
    assert members(described) == members(DESCRIPTION)
    methods = serving.run(["varlinkctl", "list-methods", ADDRESS, INTERFACE]).stdout.split()
    assert methods == [f"{INTERFACE}.{name}" for name in ("MakeDirectory", "MountDirectory", "MountImage")]
    serving.explain("tmpfs:4096")


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("MountImage", {"imageFileDescriptor": 0}, "org.varlink.service.InvalidParameter"),
        ("MountImage", {"imageFileDescriptor": 0, "imagePolicy": "root=x"}, "InvalidParameter"),
        ("MountDirectory", {"directoryFileDescriptor": 0, "mode": "root"}, "InvalidParameter"),
        ("MakeDirectory", {"parentFileDescriptor": 0, "name": "a/b"}, "InvalidParameter"),
        ("CopyDirectory", {}, "org.varlink.service.MethodNotFound"),
    ],
)
def test_varlinkctl_calls(
    serving: Machine, user: str, method: str, parameters: dict[str, object], error: str
) -> None:
    command = [
        "varlinkctl",
        "call",
        "--json=short",
        ADDRESS,
        f"{INTERFACE}.{method}",
        json.dumps(parameters),
    ]
    done = serving.run(command, user=user, check=False)
    assert done.returncode != 0
    assert error in done.stderr


def test_a_user_mounts_and_makes(serving: Machine, images: dict[str, str], user: str) -> None:
    """With all that the service is confined by."""
    text = (Path(__file__).parent / "inside/mountfs_client.py").read_text()
    done = serving.run(
        ["python3", "-I", "-", ADDRESS, images["erofs"], f"/home/{user}"], user=user, input=text
    )
    found = json.loads(done.stdout)
    image = found["image"]["parameters"]
    assert (image["imageName"], image["singleFileSystem"]) == ("erofs", True)
    assert image["partitions"][0]["fileSystemType"] == "erofs"
    assert found["listed"]
    assert found["directory"] == {"parameters": {"mountFileDescriptor": 0}}
    assert found["made"] == {"parameters": {"directoryFileDescriptor": 0}}
    assert found["owner"] == [2147352576, 2147352576, 0o700]
    assert found["flags"]["error"] == f"{INTERFACE}.BadFileDescriptorFlags"


def test_started_later_it_needs_a_new_instance(machine: Machine) -> None:
    """systemd hands sockets over when a service starts, and says so of one that runs already."""
    machine.explain("tmpfs:4096")
    refused = machine.run(["systemctl", "start", UNIT], check=False)
    assert refused.returncode != 0
    machine.run(["systemctl", "stop", SERVICE])
    machine.run(["systemctl", "reset-failed"])
    machine.run(["systemctl", "start", SOCKET, UNIT])
    machine.run(["varlinkctl", "info", ADDRESS])
    machine.run(["systemctl", "stop", UNIT, SERVICE])
