"""Dispatch: strict parameters, whose descriptors are whose, and every exception as a reply."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from varlink import error, scanner
from varlink.client import SimpleClientInterfaceHandler

from mountd.errors import (
    DeniedByPolicy,
    InvalidParameter,
    LimitExceeded,
    MountdError,
    MountFailed,
    RemoteError,
    SyscallError,
)
from mountd.fds import OwnedFd, close_all
from mountd.version import VERSION
from mountd.wire import dispatch
from mountd.wire.dispatch import Dispatcher, check_parameters, interface_directory
from mountd.wire.framing import MAX_FDS, MAX_MESSAGE, Message, MessageReader, decode, encode, parse_reply
from tests.unit.wire.bench import (
    DECISION,
    EXPLAIN,
    EXPLAINED,
    MOUNT,
    MOUNTED,
    SOURCE,
    Bench,
    Recorder,
    descriptor,
    mount_call,
)


def test_a_call_reaches_its_handler_and_the_reply_its_caller(bench: Bench) -> None:
    reply, fds = bench.handle(mount_call(readOnly=True, options=["noatime"]), fds=2)
    assert bench.mount.calls == [
        ({"source": SOURCE, "readOnly": True, "options": ["noatime"]}, 2, "context")
    ]
    assert bench.explain.calls == []
    assert parse_reply(decode(reply[:-1])) == (MOUNTED, False)
    assert fds == bench.mount.made
    assert not fds[0].closed
    close_all(fds)
    assert bench.call({"method": EXPLAIN, "parameters": {"source": SOURCE}}) == EXPLAINED
    assert len(bench.explain.calls) == 1


def test_a_handler_may_keep_descriptors() -> None:
    kept: list[OwnedFd] = []

    def keep(
        parameters: dict[str, object], fds: list[OwnedFd], context: object
    ) -> tuple[dict[str, object], list[OwnedFd]]:
        kept.append(OwnedFd(fds[0].take()))
        kept.append(fds.pop(1))
        return MOUNTED, [descriptor()]

    dispatcher = Dispatcher(interface_directory(), {MOUNT: keep}, lambda bug: None)
    raw = encode(mount_call())[:-1]
    message = Message(decode(raw), raw, [descriptor() for _ in range(3)])
    third = message.fds[2]
    fds = dispatcher.handle(message, None).fds
    message.close()
    assert third.closed
    assert [fd.closed for fd in kept] == [False, False]
    close_all(fds)
    close_all(kept)


# Parameters: the declared type and nothing else (threat case 4).

WRONG: list[tuple[dict[str, object], str]] = [
    ({"source": None}, "source"),
    ({"source": []}, "source"),
    ({"source": "x"}, "source"),
    ({"source": {"imageFileDescriptor": True}}, "source.imageFileDescriptor"),
    ({"source": {"imageFileDescriptor": 1.0}}, "source.imageFileDescriptor"),
    ({"source": {"imageFileDescriptor": "0"}}, "source.imageFileDescriptor"),
    ({"source": {"imageFileDescriptor": [0]}}, "source.imageFileDescriptor"),
    ({"source": {"imageFileDescriptor": {}}}, "source.imageFileDescriptor"),
    ({"source": {"imageFd": 0}}, "source.imageFd"),
    ({"source": {"verity": {}}}, "source.verity.dataFileDescriptor"),
    ({"source": {"verity": {"dataFileDescriptor": 0}}}, "source.verity.rootHash"),
    ({"source": {"verity": {"dataFileDescriptor": 0, "rootHash": None}}}, "source.verity.rootHash"),
    ({"source": {"verity": {"dataFileDescriptor": 0, "rootHash": "", "x": 1}}}, "source.verity.x"),
    ({"source": {"layers": {}}}, "source.layers"),
    ({"source": {"layers": [{}, {"reference": 1}]}}, "source.layers[1].reference"),
    ({"source": {"layers": [{"layers": [{"x": 1}]}]}}, "source.layers[0].layers[0].x"),
    ({"source": {"layers": [None]}}, "source.layers[0]"),
    ({"source": {"composefs": {"objectsFileDescriptors": None}}}, "source.composefs.objectsFileDescriptors"),
    ({"source": {"composefs": {}}}, "source.composefs.objectsFileDescriptors"),
    ({"source": SOURCE, "readOnly": 1}, "readOnly"),
    ({"source": SOURCE, "readOnly": "true"}, "readOnly"),
    ({"source": SOURCE, "options": "ro"}, "options"),
    ({"source": SOURCE, "options": ["a", "b", 3]}, "options[2]"),
    ({"source": SOURCE, "options": ["a", None]}, "options[1]"),
    ({"source": SOURCE, "idMap": {}}, "idMap.kind"),
    ({"source": SOURCE, "idMap": {"kind": "all"}}, "idMap.kind"),
    ({"source": SOURCE, "idMap": {"kind": True}}, "idMap.kind"),
    ({"source": SOURCE, "idMap": {"kind": ["none"]}}, "idMap.kind"),
    ({"source": SOURCE, "idMap": {"kind": "ranges", "uidRanges": [{}]}}, "idMap.uidRanges[0].first"),
    ({"source": SOURCE, "unknown": None}, "unknown"),
    ({"source": SOURCE, "_request": 1}, "_request"),
    ({"source": SOURCE, "x" * 1000: 1}, "x" * 64 + "…"),
    ({}, "source"),
]


@pytest.mark.parametrize(("parameters", "path"), WRONG, ids=lambda value: str(value)[:60])
def test_wrong_parameters_are_refused_by_path_and_reach_no_handler(
    bench: Bench, parameters: dict[str, object], path: str
) -> None:
    refused = bench.refused({"method": MOUNT, "parameters": parameters})
    assert type(refused) is InvalidParameter
    assert refused.parameters["parameter"] == path
    assert bench.mount.calls == []
    assert bench.bugs == []


def test_nulls_and_absent_fields_are_the_same_where_they_may_be(bench: Bench) -> None:
    bench.call(mount_call(readOnly=None, options=None, idMap=None))
    bench.call({"method": MOUNT, "parameters": {"source": {}}})
    bench.call({"method": MOUNT, "parameters": {"source": {"layers": [], "verity": None}}})


def types(text: str) -> tuple[scanner.Interface, object]:
    interface = scanner.Interface("interface a.b\ntype R (m: ?R, s: [string](), e: (x, y))\n" + text)
    return interface, interface.members["T"].type


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("bool", [True, False], [0, 1, None, "true", 0.0, [], {}]),
        ("int", [0, -(1 << 63), (1 << 63) - 1], [True, 1.0, "1", None, 1 << 63, -(1 << 63) - 1]),
        ("float", [0.5, 1, -1], [True, "1", None]),
        ("string", ["", "ä"], [1, None, True, []]),
        ("object", [{}, {"a": [1]}], [None, [], 1, "x"]),
        ("[string]()", [{}, {"a": {}}], [None, [], ["a"], {"a": 1}, {"a": None}]),
        ("[string]int", [{}, {"a": 1}], [None, [], {"a": "x"}, {"a": None}]),
        ("[]?int", [[], [None, 1]], [None, {}, [1.0], "12"]),
        ("?int", [None, 1], [False, "x"]),
        ("R", [{"s": {}, "e": "x"}, {"s": {"k": {}}, "e": "y", "m": {"s": {}, "e": "x"}}], [{"s": {}}, []]),
        ("()", [{}], [{"a": 1}, None, []]),
    ],
)
def test_every_type(text: str, good: list[object], bad: list[object]) -> None:
    interface, varlink_type = types(f"type T (v: {text})")
    for value in good:
        check_parameters(interface, varlink_type, {"v": value})
    for value in bad:
        with pytest.raises(InvalidParameter) as refused:
            check_parameters(interface, varlink_type, {"v": value})
        assert str(refused.value.parameters["parameter"]).split(".")[0].split("[")[0] == "v"


def test_an_undeclared_type_is_a_bug_and_no_refusal() -> None:
    interface, varlink_type = types("type T (v: Missing)")
    with pytest.raises(ValueError, match="Missing"):
        check_parameters(interface, varlink_type, {"v": 1})


def test_the_path_of_the_whole() -> None:
    interface, varlink_type = types("type T (v: int)")
    with pytest.raises(InvalidParameter, match="parameters"):
        check_parameters(interface, varlink_type, [])


# Calls that are no calls of ours.


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("io.mountd.Mount.Nothing", "MethodNotFound"),
        ("io.mountd.Mount.Source", "MethodNotFound"),
        ("io.mountd.Mount.DeniedByPolicy", "MethodNotFound"),
        ("io.mountd.Mount.__init__", "MethodNotFound"),
        ("io.mountd.Mount.__class__", "MethodNotFound"),
        ("org.varlink.service.handle", "MethodNotFound"),
        ("org.varlink.service._add_interface", "MethodNotFound"),
        ("org.example.Nothing", "InterfaceNotFound"),
        ("io.mountd.Mount", "InterfaceNotFound"),
        ("Mount", "InterfaceNotFound"),
        (".", "InterfaceNotFound"),
        ("", "InterfaceNotFound"),
        ("io.mountd.Mount.", "InterfaceNotFound"),
    ],
)
def test_what_does_not_exist(bench: Bench, method: str, name: str) -> None:
    refused = bench.refused({"method": method, "parameters": {"source": SOURCE}})
    assert isinstance(refused, RemoteError)
    assert refused.name == f"org.varlink.service.{name}"
    assert bench.bugs == []


def test_a_declared_method_without_a_handler() -> None:
    dispatcher = Dispatcher(interface_directory(), {MOUNT: Recorder()}, lambda bug: None)
    raw = encode({"method": EXPLAIN, "parameters": {"source": SOURCE}})[:-1]
    reply, _, failure = dispatcher.handle(Message(decode(raw), raw, []), None)
    assert failure == ("MethodNotImplemented", "there is no such thing: Explain")
    with pytest.raises(RemoteError, match=r"org\.varlink\.service\.MethodNotImplemented"):
        parse_reply(decode(reply[:-1]))


@pytest.mark.parametrize("flag", ["more", "upgrade"])
@pytest.mark.parametrize("method", [MOUNT, EXPLAIN, "org.varlink.service.GetInfo"])
def test_more_and_upgrade_are_not_offered(bench: Bench, flag: str, method: str) -> None:
    parameters = {} if method.endswith("GetInfo") else {"source": SOURCE}
    refused = bench.refused({"method": method, "parameters": parameters, flag: True})
    assert type(refused) is InvalidParameter
    assert refused.parameters["parameter"] == flag
    assert bench.mount.calls == bench.explain.calls == []


def test_oneway_is_never_answered_and_runs_only_what_returns_no_descriptor(bench: Bench) -> None:
    for body, failure in (
        (mount_call(), "InvalidParameter"),
        (mount_call(readOnly=1), "InvalidParameter"),
        ({"method": EXPLAIN, "parameters": {"source": SOURCE}}, None),
        ({"method": "no.such.Method"}, "InterfaceNotFound"),
        ({"method": "io.mountd.Mount.Nothing"}, "MethodNotFound"),
        ({"method": 1}, "InvalidParameter"),
        ({"method": MOUNT, "more": True}, "InvalidParameter"),
        ({"method": "org.varlink.service.GetInfo"}, None),
    ):
        assert bench.handle({**body, "oneway": True}) == (b"", [])
        # Nobody is told, but who counts.
        assert failure == (bench.failure and bench.failure.name)
    assert bench.mount.calls == []
    assert len(bench.explain.calls) == 1
    bench.explain.fails = DeniedByPolicy("no")
    oneway = {"method": EXPLAIN, "parameters": {"source": SOURCE}, "oneway": True}
    assert bench.handle(oneway) == (b"", [])
    assert bench.failure == ("DeniedByPolicy", "denied by policy: no")
    bench.explain.fails = None
    bench.explain.makes = 1
    assert bench.handle(oneway) == (b"", [])
    assert bench.explain.made[0].closed


def test_a_malformed_call(bench: Bench) -> None:
    assert bench.refused({"method": MOUNT, "x": 1}).parameters["parameter"] == "x"
    assert bench.refused({"method": 1}).parameters["parameter"] == "method"
    assert bench.refused({}).parameters["parameter"] == "method"


def test_a_reply_that_repeats_the_call_is_no_longer_than_it(bench: Bench) -> None:
    # The package by itself says each of these as \\u00e4, six bytes for two.
    name = "ä" * (MAX_MESSAGE // 3)
    refused = bench.refused(
        {"method": "org.varlink.service.GetInterfaceDescription", "parameters": {"interface": name}}
    )
    assert refused.parameters == {"interface": name}


# Handlers that fail.


def test_a_named_error_is_the_reply(bench: Bench) -> None:
    bench.mount.fails = DeniedByPolicy("no", rule="r", hint="h")
    refused = bench.refused(mount_call())
    assert type(refused) is DeniedByPolicy
    assert str(refused) == str(bench.mount.fails)
    assert bench.bugs == []


def test_a_system_call_that_escapes_is_mount_failed(bench: Bench) -> None:
    bench.mount.fails = SyscallError(errno.EINVAL, "fsmount(3, 0)", ["e xfs: no"])
    refused = bench.refused(mount_call())
    assert type(refused) is MountFailed
    assert refused.parameters == {"call": "fsmount(3, 0)", "errnoName": "EINVAL", "log": ["e xfs: no"]}
    assert bench.bugs == []


@pytest.mark.parametrize(
    "bug",
    [
        KeyError("secret"), OSError(5, "secret"), ConnectionError("secret"), RecursionError("secret"),
        StopIteration("secret"), MountdError("secret"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_bug_is_reported_and_answered_without_its_details(bench: Bench, bug: Exception) -> None:
    bench.mount.fails = bug
    refused = bench.refused(mount_call())
    assert str(refused) == "mount failed: internal error, see the journal: EIO"
    assert len(bench.bugs) == 1
    # A generator turns StopIteration into RuntimeError; a MountdError without a name cannot be said.
    assert bench.bugs[0] is bug or isinstance(bench.bugs[0], RuntimeError | ValueError)
    bench.mount.fails = None
    assert bench.call(mount_call()) == MOUNTED


def test_an_error_too_long_to_say_is_a_bug(bench: Bench) -> None:
    bench.mount.fails = DeniedByPolicy("x" * MAX_MESSAGE)
    assert type(bench.refused(mount_call())) is MountFailed
    assert isinstance(bench.bugs[0], LimitExceeded)


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {**MOUNTED, "extra": 1},
        {"mounts": [{}], "decision": DECISION},
        {"mounts": [], "decision": {"verdict": "maybe", "reason": "x"}},
        {"mounts": [], "decision": {"verdict": "allow", "reason": b"x"}},
        None,
    ],
)
def test_a_reply_that_is_not_as_declared_is_a_bug(bench: Bench, reply: dict[str, object]) -> None:
    bench.mount.reply = reply
    assert type(bench.refused(mount_call())) is MountFailed
    assert isinstance(bench.bugs[0], ValueError)
    assert bench.mount.made[0].closed


def test_what_is_no_text_in_a_reply_is_told_all_the_same(bench: Bench) -> None:
    """Names of files are bytes, and whoever makes them may be hostile."""
    for raw, said in (("a\udcff/b", "a\\xff/b"), ("\ud800", "\\ud800"), ("ä\n", "ä\n")):
        bench.mount.reply = {"mounts": [], "decision": {"verdict": "allow", "reason": raw}}
        bench.mount.makes = 0
        assert bench.call(mount_call())["decision"]["reason"] == said
        bench.mount.fails = DeniedByPolicy(raw)
        assert bench.refused(mount_call()).parameters["reason"] == said
        bench.mount.fails = None
    assert not bench.bugs


def test_a_reply_past_the_limits_is_an_error_without_descriptors(bench: Bench) -> None:
    bench.mount.reply = {"mounts": [], "decision": {"verdict": "allow", "reason": "x" * MAX_MESSAGE}}
    assert type(bench.refused(mount_call())) is LimitExceeded
    assert bench.mount.made[0].closed
    bench.mount.reply = MOUNTED
    bench.mount.makes = MAX_FDS + 1
    assert type(bench.refused(mount_call())) is LimitExceeded
    assert all(fd.closed for fd in bench.mount.made)


def test_what_is_no_exception_of_a_program_passes_and_closes_everything(bench: Bench) -> None:
    def leave(*_: object) -> tuple[dict[str, object], list[OwnedFd]]:
        raise KeyboardInterrupt

    dispatcher = Dispatcher(interface_directory(), {MOUNT: leave}, bench.bugs.append)
    raw = encode(mount_call())[:-1]
    message = Message(decode(raw), raw, [descriptor()])
    owned = message.fds[0]
    with pytest.raises(KeyboardInterrupt):
        dispatcher.handle(message, None)
    message.close()
    assert owned.closed
    assert bench.bugs == []


# The table of handlers, and where the interfaces are.


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("io.mountd.Mount.Nothing", ValueError),
        ("io.mountd.Mount.Source", ValueError),
        ("io.mountd.None.Mount", OSError),
        ("Mount", OSError),
    ],
)
def test_a_handler_for_what_is_not_declared(method: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        Dispatcher(interface_directory(), {method: Recorder()}, lambda bug: None)


def test_interface_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (interface_directory() / "io.mountd.Mount.varlink").is_file()
    (tmp_path / "mountd/wire").mkdir(parents=True)
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "mountd/wire/dispatch.py"))
    assert interface_directory() == tmp_path / "protocol"
    (tmp_path / "mountd/protocol").mkdir()
    assert interface_directory() == tmp_path / "mountd/protocol"


# The varlink package's own client on the other end.


def serve(connection: socket.socket, dispatcher: Dispatcher) -> None:
    """Answer what comes until the other end is closed; a reply's descriptors are not sent."""
    reader = MessageReader()
    with connection:
        while data := connection.recv(7):
            reader.feed(data, [])
            while (message := reader.next_message()) is not None:
                reply, fds, _ = dispatcher.handle(message, None)
                message.close()
                close_all(fds)
                connection.sendall(reply)
    reader.close()


def with_client(bench: Bench, interface: scanner.Interface, use: Callable[..., None]) -> None:
    ours, theirs = socket.socketpair()
    server = threading.Thread(target=serve, args=(ours, bench.dispatcher))
    server.start()
    try:
        with SimpleClientInterfaceHandler(interface, theirs) as client:
            use(client)
    finally:
        server.join()


def test_introspection_with_the_clients_classes(bench: Bench) -> None:
    package = Path(scanner.__file__).with_name("org.varlink.service.varlink").read_text()

    def use(client: SimpleClientInterfaceHandler) -> None:
        info = client.GetInfo()
        assert (info["vendor"], info["product"], info["version"]) == ("mountd", "mountd", VERSION)
        assert info["interfaces"] == ["org.varlink.service", "io.mountd.Mount"]
        for name in info["interfaces"]:
            description = client.GetInterfaceDescription(name)["description"]
            assert scanner.Interface(description).name == name
        assert description == (interface_directory() / "io.mountd.Mount.varlink").read_text("utf-8")
        with pytest.raises(error.InterfaceNotFound):
            client.GetInterfaceDescription("no.such")

    with_client(bench, scanner.Interface(package), use)


def test_calls_and_errors_with_the_clients_classes(bench: Bench) -> None:
    interface = scanner.Interface((interface_directory() / "io.mountd.Mount.varlink").read_text("utf-8"))

    def use(client: SimpleClientInterfaceHandler) -> None:
        reply = client.Explain(source={"reference": "oci:example.com/ä"}, options=["a"])
        assert reply["decision"] == DECISION
        assert bench.explain.calls[0][0]["source"] == {"reference": "oci:example.com/ä"}
        assert client.Mount(source=SOURCE)["mounts"] == MOUNTED["mounts"]
        with pytest.raises(error.InvalidParameter) as refused:
            client.Mount()
        assert refused.value.parameters()["parameter"] == "source"
        bench.mount.fails = DeniedByPolicy("no", rule="r")
        with pytest.raises(error.VarlinkError) as denied:
            client.Mount(source=SOURCE)
        assert denied.value.error() == "io.mountd.Mount.DeniedByPolicy"
        assert denied.value.parameters() == {"rule": "r", "reason": "no"}

    with_client(bench, interface, use)
