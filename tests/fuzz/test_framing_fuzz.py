"""Whatever the bytes, and however they are cut: a message or one of three errors, and no descriptor left."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mountd.errors import InvalidParameter, LimitExceeded, MountdError, ProtocolError
from mountd.fds import OwnedFd, close_all
from mountd.wire.dispatch import Dispatcher, interface_directory
from mountd.wire.framing import MessageReader, decode, encode, parse_call, parse_reply

FUZZ = settings(max_examples=int(os.environ.get("MOUNTD_FUZZ_EXAMPLES", "300")), deadline=None)
METHODS = [f"io.mountd.Mount.{name}" for name in ("Mount", "Explain", "Attach", "Detach")]

# Pieces of JSON and of calls, so that most inputs get past the first byte.
PIECES = st.sampled_from(
    [
        b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\0", b" ", b"\\u0000", b"\\ud800",
        b"\xed\xa0\x80", b"\xff",
        b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 20, b"9" * 5000, b"[" * 40,
        b'{"a":' * 40,
        b'"method":', b'"parameters":', b'"error":', b'"continues":true', b'"oneway":true', b'"more":1',
        b'"io.mountd.Mount.Mount"', b'"org.varlink.service.GetInfo"', b'"io.mountd.Mount.MountFailed"',
        b'{"method":"io.mountd.Mount.Mount","parameters":{"source":{}}}\0', b"{}\0",
        b'{"error":"io.mountd.Mount.TimedOut","parameters":{"seconds":1}}\0',
    ]
)  # fmt: skip
BYTES = st.one_of(
    st.binary(max_size=200), st.lists(st.one_of(PIECES, st.binary(max_size=4)), max_size=40).map(b"".join)
)
FEEDS = st.lists(st.tuples(BYTES, st.integers(0, 3) | st.just(17)), max_size=8)

FIELDS = st.sampled_from(["source", "layers", "imageFileDescriptor", "verity", "options", "idMap", "kind"])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "none", "ro", "erofs"])
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=12,
)
CALLS = st.fixed_dictionaries(
    {"method": st.sampled_from([*METHODS, "org.varlink.service.GetInfo", "a.b.C"]) | JSON},
    optional={"parameters": JSON, "more": JSON, "oneway": JSON, "upgrade": st.booleans(), "x": JSON},
)


def descriptors(count: int, made: list[OwnedFd]) -> list[OwnedFd]:
    fds = [OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) for _ in range(count)]
    made += fds
    return fds


def parse(body: dict[str, object]) -> None:
    """Read a body as both, with no other errors than these."""
    with contextlib.suppress(InvalidParameter):
        parse_call(body)
    with contextlib.suppress(MountdError):
        parse_reply(body)


def again(body: dict[str, object]) -> dict[str, object]:
    try:
        return decode(encode(body)[:-1])
    except ProtocolError as error:
        raise AssertionError("what was decoded cannot be encoded") from error


def feed(reader: MessageReader, data: bytes, fds: list[OwnedFd]) -> MountdError | None:
    """Feed and read what comes of it; the error, if it was one of the two that may be."""
    try:
        reader.feed(data, fds)
        while (message := reader.next_message()) is not None:
            parse(message.body)
            message.close()
    except (ProtocolError, LimitExceeded) as error:
        return error
    return None


@FUZZ
@given(raw=BYTES)
def test_decode(raw: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        body = decode(raw)
        # What was taken can be said again, and means the same.
        assert again(body) == body
        parse(body)


@FUZZ
@given(feeds=FEEDS)
def test_reader(feeds: list[tuple[bytes, int]]) -> None:
    made: list[OwnedFd] = []
    reader = MessageReader()
    failed: MountdError | None = None
    for data, count in feeds:
        fds = descriptors(count, made)
        error = feed(reader, data, fds)
        assert fds == []
        assert failed is None or error is failed
        failed = error
        # An error leaves nothing open, long before anybody calls close().
        assert failed is None or all(fd.closed for fd in made)
    reader.close()
    assert all(fd.closed for fd in made)


def answer(
    parameters: dict[str, object], fds: list[OwnedFd], context: object
) -> tuple[dict[str, object], list[OwnedFd]]:
    assert context not in ("Mount", "Explain") or "source" in parameters
    assert context != "Attach" or "targetFileDescriptor" in parameters
    decision: dict[str, object] = {"verdict": "deny", "reason": "fuzz"}
    if context == "Mount":
        return {"mounts": [], "decision": decision}, []
    if context == "Attach":
        return {"id": 1, "decision": decision}, []
    if context == "Detach":
        return {}, []
    return {"decision": decision, "facts": {}, "steps": []}, []


def raise_bug(error: Exception) -> None:
    raise AssertionError("a request made a bug show") from error


@pytest.fixture(scope="module")
def dispatcher() -> Dispatcher:
    return Dispatcher(interface_directory(), dict.fromkeys(METHODS, answer), raise_bug)


@FUZZ
@given(body=CALLS, count=st.integers(0, 2))
def test_dispatch(dispatcher: Dispatcher, body: dict[str, object], count: int) -> None:
    made: list[OwnedFd] = []
    reader = MessageReader()
    reader.feed(encode(body), descriptors(count, made))
    message = reader.next_message()
    assert message is not None
    context = str(body["method"]).rpartition(".")[2]
    reply, fds, failure = dispatcher.handle(message, context)
    message.close()
    close_all(fds)
    reader.close()
    assert all(fd.closed for fd in made)
    if body.get("oneway") is True:
        assert reply == b""
    else:
        body_of_reply = decode(reply[:-1])
        assert set(body_of_reply) in ({"parameters"}, {"error", "parameters"})
        assert ("error" in body_of_reply) == (failure is not None)
        parse(body_of_reply)
