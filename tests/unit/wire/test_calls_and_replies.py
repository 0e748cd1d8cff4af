"""What a call and a reply say: their fields, and each error there and back."""

from __future__ import annotations

import pytest

from mountd import errors
from mountd.errors import InvalidParameter, MountdError, ProtocolError, RemoteError
from mountd.wire import rebuilding
from mountd.wire.framing import decode, encode, error_body, parse_call, parse_reply

# Calls.


def test_parse_call() -> None:
    call = parse_call({"method": "a.b.C"})
    assert (call.method, call.parameters, call.more, call.oneway, call.upgrade) == (
        "a.b.C", {}, False, False, False,
    )  # fmt: skip
    call = parse_call(
        {"method": "a.b.C", "parameters": {"x": 1}, "more": True, "oneway": True, "upgrade": True}
    )
    assert (call.parameters, call.more, call.oneway, call.upgrade) == ({"x": 1}, True, True, True)
    assert parse_call({"method": "a.b.C", "parameters": None}).parameters == {}


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({}, "method"),
        ({"method": None}, "method"),
        ({"method": 1}, "method"),
        ({"method": ["a"]}, "method"),
        ({"method": "a" * 256}, "method"),
        ({"method": "a.B", "parameters": []}, "parameters"),
        ({"method": "a.B", "parameters": "x"}, "parameters"),
        ({"method": "a.B", "parameters": False}, "parameters"),
        ({"method": "a.B", "more": 1}, "more"),
        ({"method": "a.B", "more": None}, "more"),
        ({"method": "a.B", "oneway": "true"}, "oneway"),
        ({"method": "a.B", "upgrade": 0}, "upgrade"),
        ({"method": "a.B", "error": "x"}, "error"),
        ({"method": "a.B", "Parameters": {}}, "Parameters"),
        ({"method": "a.B", "x" * 100: {}}, "x" * 64 + "…"),
        ({"method": "a.B", "x\ny": {}}, "'x\\ny'"),
        ({"method": "a.B", "": {}}, "''"),
    ],
)
def test_parse_call_names_the_bad_field(body: dict[str, object], parameter: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        parse_call(body)
    assert refused.value.parameters["parameter"] == parameter
    assert "\n" not in str(refused.value)


# Replies.


def test_parse_reply() -> None:
    assert parse_reply({}) == ({}, False)
    assert parse_reply({"parameters": None}) == ({}, False)
    assert parse_reply({"parameters": {"a": 1}, "continues": True}) == ({"a": 1}, True)


@pytest.mark.parametrize(
    "body",
    [
        {"parameters": []},
        {"continues": 1},
        {"continues": None},
        {"error": None},
        {"error": 1},
        {"error": "x", "parameters": []},
        {"reply": {}},
    ],
)
def test_what_is_no_reply_is_a_protocol_error(body: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        parse_reply(body)


EXAMPLES = [
    errors.DeniedByPolicy("reason", rule="rule", hint="hint"),
    errors.DeniedByPolicy("reason"),
    errors.NotImmutable("reason", rule="rule", hint="hint"),
    errors.SignatureInvalid("reason", hint="hint"),
    errors.SignatureInvalid("reason"),
    errors.KeyUnknown("reason", hint="hint"),
    errors.KeyUnknown("reason"),
    errors.KeyRequired("reason", hint="hint"),
    errors.WrongKey("reason", hint="hint"),
    errors.UnsupportedFileSystem("reason", file_system_type="vfat", hint="hint"),
    errors.UnsupportedFileSystem("reason"),
    errors.InvalidImage("reason", offset=1080),
    errors.InvalidImage("reason", offset=0),
    errors.InvalidImage("reason"),
    errors.BadFileDescriptor("source.imageFileDescriptor", "reason"),
    errors.UserNamespaceNotPermitted("reason", hint="hint"),
    errors.OptionNotPermitted("suid", "reason", hint="hint"),
    errors.OptionNotPermitted("suid"),
    errors.AttachNotPermitted("reason", hint="hint"),
    errors.InteractiveAuthenticationRequired(hint="hint"),
    errors.LimitExceeded("descriptors in a message", 16, hint="hint"),
    errors.MountFailed("fsmount(3, 0)", "EINVAL", ["e xfs: no", "e xfs: never"]),
    errors.MountFailed("fsmount(3, 0)", "EINVAL"),
    errors.TimedOut(10),
    errors.InUse("it", hint="hint"),
    errors.NotFound("it", hint="hint"),
    errors.NotSupported("statmount"),
    errors.RegistryFailed("registry.example.com:5000", "reason", hint="hint"),
    errors.StorageFull("reason", hint="hint"),
    errors.PeerGone("reason"),
    errors.ShuttingDown(),
    errors.InvalidParameter("source.imageFileDescriptor", "not an int"),
    errors.InvalidParameter("source"),
    errors.ProtocolError("not UTF-8 at byte 3"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_errors_come_back_as_they_were_raised(error: MountdError) -> None:
    body = decode(encode(error_body(error))[:-1])
    with pytest.raises(MountdError) as raised:
        parse_reply(body)
    assert type(raised.value) is type(error)
    assert str(raised.value) == str(error)
    assert raised.value.hint == error.hint
    assert raised.value.parameters == error.parameters
    assert "." in str(body["error"])


def test_every_error_class_comes_back() -> None:
    named = {cls for cls in MountdError.__subclasses__() if cls.wire_name}
    assert {cls for cls, _ in rebuilding.ERRORS} | {ProtocolError} == named
    assert {type(error) for error in EXAMPLES} == named


def test_unknown_error_is_a_remote_error_and_goes_on_as_it_came() -> None:
    body = {"error": "io.example.Broken", "parameters": {"a": 1}}
    with pytest.raises(RemoteError) as raised:
        parse_reply(body)
    assert raised.value.name == "io.example.Broken"
    assert raised.value.parameters == {"a": 1}
    assert error_body(raised.value) == body


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("DeniedByPolicy", {}),
        ("DeniedByPolicy", {"reason": 1}),
        ("DeniedByPolicy", {"reason": "x", "hint": []}),
        ("InvalidImage", {"reason": "x", "offset": True}),
        ("InvalidImage", {"reason": "x", "offset": 1.0}),
        ("LimitExceeded", {"limit": "x", "maximum": "16"}),
        ("MountFailed", {"call": "x", "errnoName": "EIO", "log": "x"}),
        ("MountFailed", {"call": "x", "errnoName": "EIO", "log": [1]}),
        ("MountFailed", {"call": "x", "errnoName": "EIO"}),
        ("MountFailed", {"call": "x", "errnoName": {}, "log": []}),
        ("TimedOut", {"seconds": None}),
    ],
)
def test_wrong_parameters_make_a_remote_error(name: str, parameters: dict[str, object]) -> None:
    full = f"io.mountd.Mount.{name}"
    with pytest.raises(RemoteError) as raised:
        parse_reply({"error": full, "parameters": parameters})
    assert (raised.value.name, raised.value.parameters) == (full, parameters)


def test_a_newer_server_may_say_more() -> None:
    with pytest.raises(errors.PeerGone, match="reason"):
        parse_reply({"error": "io.mountd.Mount.PeerGone", "parameters": {"reason": "reason", "new": 1}})


def test_what_has_no_name_is_not_sent() -> None:
    with pytest.raises(ValueError, match="no name"):
        error_body(MountdError("x"))
