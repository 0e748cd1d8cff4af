"""The service starts with the first connection to its socket, and speaks varlink with everybody."""

from __future__ import annotations

import json
import re

from tests.systemd.conftest import ROOT
from tests.systemd.machine import Machine

ADDRESS = "/run/mountd/io.mountd.Mount"
REGISTERED = "/run/varlink/registry/io.mountd.Mount"
INTERFACE = "io.mountd.Mount"
DESCRIPTION = (ROOT / f"protocol/{INTERFACE}.varlink").read_text()
TMPFS = '{"source":{"tmpfs":{"size":4096}}}'


def members(description: str) -> list[str]:
    return re.findall(r"^((?:method|error|type) \w+)", description, re.MULTILINE)


def test_the_first_connection_starts_the_service(machine: Machine) -> None:
    assert machine.state() == "inactive"
    assert machine.explain("tmpfs:4096")["verdict"] == "deny"
    assert machine.state() == "active"
    assert machine.property("StatusText") == "serving"


def test_varlinkctl_introspects(machine: Machine) -> None:
    info = json.loads(machine.run(["varlinkctl", "info", "--json=short", ADDRESS]).stdout)
    assert (info["vendor"], info["product"]) == ("mountd", "mountd")
    assert sorted(info["interfaces"]) == [
        "io.mountd.Admin",
        "io.mountd.Images",
        INTERFACE,
        "org.varlink.service",
    ]
    methods = machine.run(["varlinkctl", "list-methods", ADDRESS, INTERFACE]).stdout.split()
    assert methods == [f"{INTERFACE}.{name}" for name in ("Attach", "Detach", "Explain", "List", "Mount")]
    # systemd parses the description and prints it in a form of its own.
    described = machine.run(["varlinkctl", "introspect", ADDRESS, INTERFACE]).stdout
    assert sorted(members(described)) == sorted(members(DESCRIPTION))


def test_varlinkctl_calls(machine: Machine) -> None:
    for address in (ADDRESS, REGISTERED):
        called = machine.run(["varlinkctl", "call", "--json=short", address, f"{INTERFACE}.Explain", TMPFS])
        reply = json.loads(called.stdout)
        assert sorted(reply) == ["decision", "facts", "steps"]
        assert reply["decision"]["verdict"] == "deny"
        assert [step["rule"] for step in reply["steps"]] == ["system images"]


def test_varlinkctl_sees_errors_by_name(machine: Machine) -> None:
    call = ["varlinkctl", "call", "--json=short", ADDRESS]
    refused = machine.run([*call, f"{INTERFACE}.Mount", TMPFS], check=False)
    assert refused.returncode != 0
    assert "io.mountd.Mount.DeniedByPolicy" in refused.stderr
    refused = machine.run([*call, f"{INTERFACE}.Mount", '{"source":{}}'], check=False)
    assert "org.varlink.service.InvalidParameter" in refused.stderr
    refused = machine.run([*call, f"{INTERFACE}.Nothing", "{}"], check=False)
    assert "org.varlink.service.MethodNotFound" in refused.stderr


def test_the_client_of_the_varlink_package(machine: Machine) -> None:
    found = json.loads(machine.python("varlink_client.py", ADDRESS))
    assert found["info"]["interfaces"] == [
        "org.varlink.service", INTERFACE, "io.mountd.Images", "io.mountd.Admin",
    ]  # fmt: skip
    assert found["descriptions"][INTERFACE] == DESCRIPTION
    assert members(found["descriptions"]["org.varlink.service"])[:2] == [
        "method GetInfo",
        "method GetInterfaceDescription",
    ]
    assert found["explained"]["decision"]["verdict"] == "deny"
    error, parameters = found["Mount"]
    assert error == "io.mountd.Mount.DeniedByPolicy"
    assert "administrator" in parameters["hint"]
    error, parameters = found["Explain"]
    assert error == "org.varlink.service.InvalidParameter"
    assert parameters["parameter"] == "source.imageFileDescriptor"
