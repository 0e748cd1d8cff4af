"""io.systemd.MountFileSystem: what each of the sockets serves, and what is no message at all."""

from __future__ import annotations

import contextlib

from mountd.daemon.limits import MAXIMUM_CONNECTIONS_PER_OWNER
from tests.container import USER
from tests.daemon import Daemon
from tests.e2e.mountfs.calls import INTERFACE, OWN, PARAMETER, SERVICE, Theirs, info
from tests.rogue import Raw


def test_each_socket_has_its_own_interfaces(serving: Daemon) -> None:
    """Whoever reaches one of them gets nothing of the other, whatever it asks for."""
    with Theirs(serving) as theirs, Raw(serving, USER) as ours:
        said = info(theirs, OWN)["parameters"]["interfaces"]
        assert said == [SERVICE, INTERFACE]
        described = info(theirs, f"{SERVICE}.GetInterfaceDescription", {"interface": INTERFACE})
        for name in ("MountImage", "MountDirectory", "MakeDirectory"):
            assert f"method {name}(" in described["parameters"]["description"]
        assert INTERFACE not in info(ours, OWN)["parameters"]["interfaces"]
        not_found = f"{SERVICE}.InterfaceNotFound"
        assert info(ours, f"{INTERFACE}.MountImage", {"imageFileDescriptor": 0})["error"] == not_found
        for method in ("Mount.Mount", "Mount.Attach", "Mount.List", "Admin.Reload", "Images.List"):
            assert info(theirs, f"io.mountd.{method}")["error"] == not_found
        nothing = info(theirs, f"{INTERFACE}.RemoveDirectory", {})
        assert nothing["error"] == f"{SERVICE}.MethodNotFound"


def test_no_message_at_all(serving: Daemon) -> None:
    """What is no request is answered in words of that interface, and the neighbours go on."""
    with Theirs(serving) as raw:
        raw.send(b"{\0")
        reply = raw.reply()
        assert reply is not None
        assert reply["error"] == PARAMETER
        assert raw.ended()


def test_the_listener_speaks_their_words_too(serving: Daemon) -> None:
    """It answers by itself, having read nothing, whoever has too many connections of either kind."""
    with contextlib.ExitStack() as stack:
        half = MAXIMUM_CONNECTIONS_PER_OWNER // 2
        for kind in (Theirs, Raw):
            raws = [stack.enter_context(kind(serving, USER)) for _ in range(half)]
            # Then those before it were taken in as well.
            assert "error" not in info(raws[-1], OWN)
        reply = stack.enter_context(Theirs(serving)).reply()
        assert reply is not None
        assert (reply["error"], reply["parameters"]["errnoName"]) == ("io.systemd.System", "EUSERS")
        reply = stack.enter_context(Raw(serving, USER)).reply()
        assert reply is not None
        assert reply["error"] == "io.mountd.Mount.LimitExceeded"
