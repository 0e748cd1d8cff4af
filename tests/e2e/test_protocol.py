"""What arrives on the socket is no request: cases 1 to 7, 20 and 21 of the threat model.

The limits are mountd's own where the model has other numbers: 16 descriptors in a message instead of 4,
since a stack of layers needs them. Case 20 has no queue of its own: requests wait in the socket, whose
buffer is the bound, so that the sender has to wait instead of being told Busy. Cheap calls (case 21) go to
a worker like all others, as only a worker may read what a client sends; none is started for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mountd.daemon.limits import MAXIMUM_CONNECTIONS_PER_OWNER, MAXIMUM_WORKERS
from mountd.wire.framing import MAX_FDS, MAX_MESSAGE
from tests.daemon import Daemon
from tests.e2e.admin import counted
from tests.rogue import ATTACKER, GET_INFO, Raw, ask, call, error, eventually, mount_call, neighbour, opened

MIB = 1 << 20
DEEP = 60_000
IMAGE = "source.imageFileDescriptor"
REFUSED_ONEWAY = "refused with InvalidParameter: invalid parameter oneway: "


@contextlib.contextmanager
def many_descriptors(number: int) -> Iterator[None]:
    """Let this process have more descriptors than it usually may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, max(number, hard)))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a01_a_thousand_silent_sockets_of_one_user(daemon: Daemon, images: dict[str, Path]) -> None:
    """All beyond the limit are refused at once; what drips in bytes occupies no more than its share."""
    with (
        many_descriptors(2000),
        neighbour(daemon, images["erofs"]),
        contextlib.ExitStack() as stack,
    ):
        raws = [stack.enter_context(Raw(daemon, ATTACKER)) for _ in range(1000)]
        for raw in raws[::2]:
            with contextlib.suppress(ConnectionError):
                raw.send(b"{")
        poller = select.poll()
        for raw in raws:
            poller.register(raw, select.POLLIN)
        deadline = time.monotonic() + 5
        refused = 1000 - MAXIMUM_CONNECTIONS_PER_OWNER
        while len(answered := poller.poll(100)) < refused and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(answered) == refused
        fds = {fd for fd, _ in answered}
        refusals = [raw for raw in raws if raw.fileno() in fds]
        assert {error(raw.reply()) for raw in refusals} == {"LimitExceeded"}
        assert all(raw.ended() for raw in refusals)
        assert len(daemon.workers) <= MAXIMUM_WORKERS


def test_a02_unterminated_message_of_100_mib(daemon: Daemon, images: dict[str, Path]) -> None:
    peak = highest_memory(daemon)
    with neighbour(daemon, images["erofs"]), Raw(daemon, ATTACKER) as raw:
        sent, begin = 0, time.monotonic()
        with contextlib.suppress(ConnectionError):
            while sent < 100 * MIB:
                sent += raw.socket.send(b"[" * 65536)
        assert time.monotonic() - begin < 2
        # What was read, and what the socket holds.
        assert sent <= MAX_MESSAGE + MIB
        reply = raw.reply()
        assert error(reply) == "LimitExceeded"
        assert reply is not None
        assert reply["parameters"]["maximum"] == MAX_MESSAGE
        assert raw.ended()
    assert highest_memory(daemon) - peak < 8 * MIB


def highest_memory(daemon: Daemon) -> int:
    """The most memory that a worker has ever used, in bytes."""
    sizes = []
    for pid in daemon.workers:
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    sizes.append(int(line.split()[1]) * 1024)
    return max(sizes)


def parameters(text: bytes) -> bytes:
    """A call whose parameters are this text."""
    return b'{"method":"io.mountd.Mount.Mount","parameters":' + text + b"}\0"


NO_MESSAGES = {
    "depth": parameters(b"[" * DEEP + b"]" * DEEP),
    "depth without an end": b"[" * DEEP + b"\0",
    "depth of objects": parameters(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "5,000 digits": parameters(b'{"source":{"imageFileDescriptor":' + b"9" * 5000 + b"}}"),
    "bad UTF-8": parameters(b'{"a":"\xff\xfe"}'),
    "UTF-8 of a surrogate": parameters(b'{"a":"\xed\xa0\x80"}'),
    "NaN": parameters(b'{"a":NaN}'),
    "Infinity": parameters(b'{"a":Infinity}'),
    "huge float": parameters(b'{"a":1e999}'),
    "lone surrogate": parameters(b'{"a":"\\ud800"}'),
    "duplicate key": parameters(b'{"source":{},"source":{}}'),
    "duplicate key at the top": b'{"method":"a.B","method":"io.mountd.Mount.Mount"}\0',
    "NUL in a string": parameters(b'{"a":"\\u0000"}'),
    "NUL inside": b'{"method":\0"a.B"}\0',
    "no object": b"[]\0",
    "empty": b"\0",
    "no JSON": b"GET / HTTP/1.1\r\n\r\n\0",
    "two values": b"{}{}\0",
    "no method": b"{}\0",
    "unknown field": b'{"method":"a.B","uid":0}\0',
    "method of the wrong type": b'{"method":0}\0',
    "long method": b'{"method":"' + b"a" * 300 + b'.B"}\0',
    "parameters of the wrong type": parameters(b"1"),
}


@pytest.mark.parametrize("name", NO_MESSAGES)
def test_a03_what_is_no_message(daemon: Daemon, images: dict[str, Path], name: str) -> None:
    with neighbour(daemon, images["erofs"]):
        assert error(ask(daemon, NO_MESSAGES[name])) == "InvalidParameter"
        with opened(images["erofs"]) as fds:
            assert error(ask(daemon, mount_call(), fds)) == ""


WRONG_INDEXES = [
    (True, IMAGE),
    (-1, IMAGE),
    (1, IMAGE),
    (253, IMAGE),
    (1 << 31, IMAGE),
    (1 << 32, IMAGE),
    (-(1 << 63), IMAGE),
    (1 << 63, "message"),
    (1.0, IMAGE),
    (0.5, IMAGE),
    ("0", IMAGE),
    ([0], IMAGE),
    ({}, IMAGE),
    (None, "source"),
]


@pytest.mark.parametrize(("index", "named"), WRONG_INDEXES)
def test_a04_index_of_the_wrong_type(
    daemon: Daemon, images: dict[str, Path], index: object, named: str
) -> None:
    with opened(images["erofs"]) as fds:
        reply = ask(daemon, mount_call(index), fds)
    assert error(reply) == "InvalidParameter"
    assert reply["parameters"]["parameter"] == named


WRONG_DESCRIPTORS: list[tuple[dict[str, Any], int, str]] = [
    ({"source": {"imageFileDescriptor": 0}}, 0, IMAGE),
    ({"source": {"imageFileDescriptor": 3}}, 2, IMAGE),
    ({"source": {"imageFileDescriptor": 0}}, 2, "fileDescriptors"),
    ({"source": {"tmpfs": {"size": 4096}}}, 1, "fileDescriptors"),
    (
        {"source": {"imageFileDescriptor": 0}, "userNamespaceFileDescriptor": 0},
        1,
        "userNamespaceFileDescriptor",
    ),
    (
        {"source": {"imageFileDescriptor": 0}, "userNamespaceFileDescriptor": 7},
        2,
        "userNamespaceFileDescriptor",
    ),
    ({"source": {"imageFileDescriptor": 0}}, MAX_FDS, "fileDescriptors"),
]


@pytest.mark.parametrize(("wishes", "count", "named"), WRONG_DESCRIPTORS)
def test_a05_out_of_range_twice_or_unused(
    daemon: Daemon, images: dict[str, Path], wishes: dict[str, Any], count: int, named: str
) -> None:
    with opened(*[images["erofs"]] * count) as fds, Raw(daemon, ATTACKER) as raw:
        raw.send(call("Mount", wishes), fds)
        reply = raw.reply()
        assert error(reply) == "InvalidParameter"
        assert reply is not None
        assert reply["parameters"]["parameter"] == named
        # It was a message, so that the connection goes on.
        raw.send(mount_call(), fds[:1] or [0])
        assert error(raw.reply()) in ("", "BadFileDescriptor", "DeniedByPolicy")


@pytest.mark.parametrize("count", [MAX_FDS + 1, 253])
def test_a06_too_many_descriptors(daemon: Daemon, images: dict[str, Path], count: int) -> None:
    with (
        many_descriptors(1024),
        opened(*[images["erofs"]] * count) as fds,
        neighbour(daemon, images["erofs"]),
    ):
        reply = ask(daemon, mount_call(), fds, ATTACKER)
    assert error(reply) == "LimitExceeded"
    assert reply["parameters"]["maximum"] == MAX_FDS


def test_a06_ten_times_253_without_a_terminator(daemon: Daemon, images: dict[str, Path]) -> None:
    with (
        many_descriptors(1024),
        opened(*[images["erofs"]] * 253) as fds,
        neighbour(daemon, images["erofs"]),
        Raw(daemon) as raw,
    ):
        with contextlib.suppress(ConnectionError):
            for _ in range(10):
                raw.send(b" ", fds)
        assert error(raw.reply()) == "LimitExceeded"
        assert raw.ended()


def test_a07_descriptors_with_a_middle_byte(daemon: Daemon, images: dict[str, Path]) -> None:
    whole = mount_call()
    with opened(images["erofs"]) as fds, Raw(daemon) as raw:
        for cut in (1, len(whole) // 2, len(whole) - 1):
            raw.send(whole[:cut])
            raw.send(whole[cut:], fds)
            assert error(raw.reply()) == ""
        raw.send(whole[:5], fds)
        raw.send(whole[5:9])
        raw.send(whole[9:])
        assert error(raw.reply()) == ""


@pytest.mark.parametrize(
    ("first", "expected"),
    [(GET_INFO, ["", ""]), (mount_call(), ["InvalidParameter", ""])],
    ids=["GetInfo", "Mount"],
)
def test_a07_descriptors_of_the_second_in_a_batch(
    daemon: Daemon, images: dict[str, Path], first: bytes, expected: list[str]
) -> None:
    with opened(images["erofs"]) as fds, Raw(daemon) as raw:
        raw.send(first)
        raw.send(mount_call(), fds)
        assert [error(raw.reply()), error(raw.reply())] == expected


def test_a07_one_sendmsg_with_two_messages(daemon: Daemon, images: dict[str, Path]) -> None:
    """The descriptors are the first one's, which their first byte belongs to; the second has none."""
    with opened(images["erofs"]) as fds, Raw(daemon) as raw:
        raw.send(mount_call() + mount_call(), fds)
        assert [error(raw.reply()), error(raw.reply())] == ["", "InvalidParameter"]
        raw.send(GET_INFO + mount_call(), fds)
        assert [error(raw.reply()), error(raw.reply())] == ["", "InvalidParameter"]


def test_a20_ten_thousand_requests_on_one_connection(daemon: Daemon, images: dict[str, Path]) -> None:
    """All are answered, in their order, one after the other, while others have their turns."""
    total = 10_000
    waiting = b"".join(json.dumps({"method": f"n{number}.M"}).encode() + b"\0" for number in range(total))
    begin = time.monotonic()
    with neighbour(daemon, images["erofs"]), Raw(daemon, ATTACKER) as raw:
        received = bytearray()
        rest = memoryview(waiting)
        while received.count(0) < total:
            readable, writable, _ = select.select([raw], [raw] if rest else [], [], 20)
            assert readable or writable, daemon.log
            if writable:
                rest = rest[raw.socket.send(rest[:65536], socket.MSG_DONTWAIT) :]
            if readable:
                data = raw.socket.recv(1 << 20)
                assert data, daemon.log
                received += data
        assert len(daemon.workers) <= MAXIMUM_WORKERS
    replies = [json.loads(each) for each in bytes(received).split(b"\0")[:-1]]
    assert [each["parameters"]["interface"] for each in replies] == [f"n{number}" for number in range(total)]
    assert time.monotonic() - begin < 30


def test_a20_what_is_not_read_bounds_what_is_taken(daemon: Daemon, images: dict[str, Path]) -> None:
    with neighbour(daemon, images["erofs"]), Raw(daemon, ATTACKER) as raw:
        sent, deadline = 0, time.monotonic() + 3
        while time.monotonic() < deadline:
            if not select.select([], [raw], [], 0.5)[1]:
                break
            sent += raw.socket.send(GET_INFO * 100, socket.MSG_DONTWAIT)
        assert 0 < sent < 4 * MIB


NO_CALLS = [
    (mount_call(0, more=1), "InvalidParameter"),
    (call("Mount", {}, more=True), "InvalidParameter"),
    (call("Explain", {}, more=True), "InvalidParameter"),
    (call("Mount", {}, upgrade=True), "InvalidParameter"),
    (call("org.varlink.service.GetInfo", {}, more=True), "InvalidParameter"),
    (call("Mount", {}, oneway=1), "InvalidParameter"),
    (call("Nothing"), "MethodNotFound"),
    (call("_find"), "MethodNotFound"),
    (call("__class__"), "MethodNotFound"),
    (call("DeniedByPolicy"), "MethodNotFound"),
    (call("com.example.Mount"), "InterfaceNotFound"),
    (call("..."), "InterfaceNotFound"),
    (call("io.mountd.Nobody.Reload"), "InterfaceNotFound"),
    (call("org.varlink.service.GetInterfaceDescription"), "InvalidParameter"),
]


@pytest.mark.parametrize(("data", "expected"), NO_CALLS)
def test_a21_flags_and_methods_that_are_not_offered(daemon: Daemon, data: bytes, expected: str) -> None:
    with Raw(daemon, ATTACKER) as raw:
        raw.send(data)
        assert error(raw.reply()) == expected
        raw.send(GET_INFO)
        assert error(raw.reply()) == ""


def test_a21_oneway_has_no_reply_and_mounts_nothing(daemon: Daemon, images: dict[str, Path]) -> None:
    allowed, refused = (f"Mount for uid 0 (pid {os.getpid()}): {each}" for each in ("allow", REFUSED_ONEWAY))
    before = daemon.log.count(allowed)
    with opened(images["erofs"]) as fds, Raw(daemon) as raw:
        raw.send(call("Mount", {"source": {"imageFileDescriptor": 0}}, oneway=True), fds)
        raw.send(call("Nothing", oneway=True))
        raw.send(GET_INFO)
        reply = raw.reply()
        assert reply is not None
        assert reply["parameters"]["product"] == "mountd"
        assert not raw.fds
    assert daemon.log.count(allowed) == before
    assert eventually(lambda: refused in daemon.log)


def test_what_came_of_a_oneway_call_is_told_to_those_who_keep_count(start: Callable[..., Daemon]) -> None:
    """Nobody else gets to know of it."""
    daemon = start("")
    image = {"digest": f"sha256:{'0' * 64}"}
    calls = (
        ("io.mountd.Images.Remove", image, 0, "NotFound"),
        ("io.mountd.Mount.Detach", {"id": 1}, 0, "NotFound"),
        ("io.mountd.Admin.Revoke", {"id": 1}, ATTACKER, "DeniedByPolicy"),
        ("io.mountd.Admin.Reload", {}, ATTACKER, "DeniedByPolicy"),
        ("io.mountd.Admin.Status", {}, ATTACKER, "DeniedByPolicy"),
        ("io.mountd.Admin.Status", {}, 0, ""),
    )
    for method, parameters, uid, name in calls:
        with Raw(daemon, uid) as raw:
            raw.send(call(method, parameters, oneway=True))
            raw.send(GET_INFO)
            assert error(raw.reply()) == ""
        line = f"{method.rpartition('.')[2]} for uid {uid} (pid {os.getpid()}): "
        if name:
            assert eventually(lambda line=line, name=name: f"{line}refused with {name}: " in daemon.log)
        assert f"{line}done" not in daemon.log
        assert counted(daemon, method, name or "done") == 1


def test_a21_flood_of_get_info(daemon: Daemon, images: dict[str, Path]) -> None:
    with neighbour(daemon, images["erofs"]), contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(daemon, ATTACKER)) for _ in range(20)]
        for _ in range(50):
            for raw in raws:
                raw.send(GET_INFO)
            assert {error(raw.reply()) for raw in raws} == {""}
        assert len(daemon.workers) <= MAXIMUM_WORKERS
