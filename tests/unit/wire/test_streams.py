"""Methods that reply more than once: to whom, until when, and what becomes of their errors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable

import pytest

from mountd.errors import InUse, InvalidParameter, OptionNotPermitted, PeerGone
from mountd.fds import OwnedFd
from mountd.wire.dispatch import Dispatcher, Stream, interface_directory
from mountd.wire.framing import Message, decode, encode
from tests.unit.wire.bench import Bench, mount_call


class Streamer:
    """A streaming handler: what it yields, and what becomes of it."""

    def __init__(
        self, *given: object, steps: Iterable[object] | None = None, fails: Exception | None = None
    ) -> None:
        self.steps = given if steps is None else steps
        self.fails = fails
        self.ended = False
        self.last: dict[str, object] = {"image": IMAGE}

    def handler(self) -> Callable[..., Stream]:
        def stream(
            parameters: dict[str, object], fds: list[OwnedFd], context: object
        ) -> Generator[dict[str, object], None, tuple[dict[str, object], list[OwnedFd]]]:
            try:
                yield from self.steps  # type: ignore[misc]
                if self.fails is not None:
                    raise self.fails
                return self.last, []
            finally:
                self.ended = True

        return stream


IMAGE: dict[str, object] = {"digest": "d", "size": 1, "ownerUids": [], "created": 1, "signers": []}
VERIFY = "io.mountd.Images.Verify"
STEPS: list[dict[str, object]] = [{"progress": {"done": each, "total": 9}} for each in (3, 6)]


def streamed(
    streamer: Streamer,
    send: Callable[[bytes], None] | None,
    bugs: list[Exception] | None = None,
    **call: object,
) -> dict[str, object]:
    reported: list[Exception] = [] if bugs is None else bugs
    dispatcher = Dispatcher(interface_directory(), {VERIFY: streamer.handler()}, reported.append)
    raw = encode({"method": VERIFY, "parameters": {"digest": "d"}, **call})[:-1]
    reply, fds, _ = dispatcher.handle(Message(decode(raw), raw, []), "context", send)
    assert fds == []
    assert bugs is not None or not reported
    return decode(reply[:-1]) if reply else {}


def test_a_stream_says_what_it_yields_to_whoever_wants_more() -> None:
    sent: list[bytes] = []
    streamer = Streamer(*STEPS)
    last = streamed(streamer, sent.append, more=True)
    assert [decode(each[:-1]) for each in sent] == [
        {"parameters": step, "continues": True} for step in STEPS
    ]
    assert all(each.endswith(b"\0") for each in sent)
    assert last == {"parameters": {"image": IMAGE}}
    assert streamer.ended


@pytest.mark.parametrize("call", [{}, {"more": False}, {"oneway": True}, {"oneway": True, "more": True}])
def test_a_stream_has_only_its_last_reply_for_others(call: dict[str, object]) -> None:
    sent: list[bytes] = []
    streamer = Streamer(*STEPS)
    last = streamed(streamer, sent.append, **call)
    assert sent == []
    assert last == ({} if call.get("oneway") else {"parameters": {"image": IMAGE}})
    assert streamer.ended


def calling(*found: object, fails: Exception | None = None) -> Callable[..., object]:
    """What a stream yields to be called with a way to tell: it tells each step, and then ends."""

    def run(tell: Callable[[dict[str, object]], None]) -> object:
        for step in STEPS:
            tell(step)
        if fails is not None:
            raise fails
        return found

    return run


@pytest.mark.parametrize("more", [True, False])
def test_a_stream_can_have_a_function_tell(more: bool) -> None:
    sent: list[bytes] = []
    results: list[object] = []

    def steps() -> Generator[object, object, None]:
        results.append((yield calling("found")))
        yield STEPS[0]

    assert streamed(Streamer(steps=steps()), sent.append, more=more) == {"parameters": {"image": IMAGE}}
    assert results == [("found",)]
    told = [decode(each[:-1])["parameters"] for each in sent]
    assert told == ([*STEPS, STEPS[0]] if more else [])


def test_what_the_function_raises_is_the_streams_to_handle() -> None:
    handled: list[Exception] = []

    def steps() -> Generator[object, object, None]:
        try:
            yield calling(fails=InUse("it"))
        except InUse as error:
            handled.append(error)
            raise

    last = streamed(Streamer(steps=steps()), None)
    assert last["error"] == "io.mountd.Images.InUse"
    assert len(handled) == 1


def test_the_function_ends_when_nobody_takes_what_it_tells() -> None:
    def send(data: bytes) -> None:
        raise PeerGone("it has closed the connection")

    streamer = Streamer(calling())
    assert streamed(streamer, send, more=True)["error"] == "io.mountd.Images.PeerGone"
    assert streamer.ended


def test_a_stream_needs_no_way_to_send() -> None:
    assert streamed(Streamer(*STEPS), None, more=True) == {"parameters": {"image": IMAGE}}


def test_a_stream_that_fails_says_so_after_what_it_said() -> None:
    sent: list[bytes] = []
    last = streamed(Streamer(*STEPS, fails=InUse("it")), sent.append, more=True)
    assert len(sent) == 2
    # By the name of the interface that was called, which is not that of the others.
    assert last == {"error": "io.mountd.Images.InUse", "parameters": {"what": "it"}}


def test_an_error_that_the_interface_does_not_declare_keeps_its_usual_name() -> None:
    last = streamed(Streamer(fails=OptionNotPermitted("x")), None)
    assert last["error"] == "io.mountd.Mount.OptionNotPermitted"


def test_a_stream_ends_when_nobody_takes_what_it_says() -> None:
    def send(data: bytes) -> None:
        raise PeerGone("it has closed the connection")

    streamer = Streamer(*STEPS)
    last = streamed(streamer, send, more=True)
    assert last["error"] == "io.mountd.Images.PeerGone"
    assert streamer.ended


@pytest.mark.parametrize("step", [{"progress": {"done": "3", "total": 9}}, {"other": 1}, []])
def test_what_a_stream_yields_is_as_declared(step: object) -> None:
    bugs: list[Exception] = []
    sent: list[bytes] = []
    streamer = Streamer(step)
    assert streamed(streamer, sent.append, bugs, more=True)["error"] == "io.mountd.Images.MountFailed"
    assert sent == []
    assert len(bugs) == 1
    assert streamer.ended


def test_who_offers_no_stream_refuses_more(bench: Bench) -> None:
    error = bench.refused({**mount_call(), "more": True})
    assert isinstance(error, InvalidParameter)
    assert error.parameters["parameter"] == "more"
    assert bench.mount.calls == []
