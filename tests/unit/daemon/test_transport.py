"""One message from a connection, and no byte more."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator

import pytest

from mountd.daemon.transport import DescriptorsLost, has_sent, read_message
from mountd.errors import LimitExceeded, ProtocolError
from mountd.fds import OwnedFd, close_all
from mountd.kernel import sockets
from mountd.wire.framing import MAX_FDS, Message
from tests.process import in_child


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    theirs, ours = socket.socketpair()
    with theirs, ours:
        yield theirs, ours


def send(connection: socket.socket, data: bytes, fds: int = 0) -> None:
    owned = [OwnedFd(os.open("/dev/null", os.O_RDONLY)) for _ in range(fds)]
    sockets.send(connection, data, owned)
    close_all(owned)


def read(connection: socket.socket, seconds: float = 5) -> Message | None:
    return read_message(connection, time.monotonic() + seconds)


def test_what_was_sent_is_known_without_receiving_it(ends: tuple[socket.socket, socket.socket]) -> None:
    theirs, ours = ends
    assert not has_sent(ours)
    send(theirs, b'{"a":1}\0', fds=1)
    theirs.shutdown(socket.SHUT_WR)
    assert has_sent(ours)
    message = read(ours)
    assert message is not None
    close_all(message.fds)
    assert not has_sent(ours)


def test_descriptors_stay_with_their_message(ends: tuple[socket.socket, socket.socket]) -> None:
    theirs, ours = ends
    send(theirs, b'{"a":1}\0{"b":', fds=1)
    send(theirs, b"2", fds=2)
    send(theirs, b'}\0{"c":3}\0', fds=0)
    found = []
    for _ in range(3):
        message = read(ours)
        assert message is not None
        found.append((message.body, len(message.fds)))
        message.close()
    assert found == [({"a": 1}, 1), ({"b": 2}, 2), ({"c": 3}, 0)]


def test_the_end_between_messages_is_none(ends: tuple[socket.socket, socket.socket]) -> None:
    theirs, ours = ends
    theirs.close()
    assert read(ours) is None


def test_the_end_within_a_message_is_an_error(ends: tuple[socket.socket, socket.socket]) -> None:
    theirs, ours = ends
    send(theirs, b'{"a":', fds=1)
    theirs.close()
    with pytest.raises(ProtocolError, match="ended within"):
        read(ours)


def test_one_deadline_for_the_whole_message(ends: tuple[socket.socket, socket.socket]) -> None:
    theirs, ours = ends
    send(theirs, b"{", fds=1)
    with pytest.raises(TimeoutError):
        read(ours, 0.05)


def test_too_many_descriptors(ends: tuple[socket.socket, socket.socket]) -> None:
    theirs, ours = ends
    send(theirs, b"{}\0", fds=MAX_FDS + 30)
    with pytest.raises(LimitExceeded, match="descriptors in a message"):
        read(ours)


def test_lost_descriptors_are_no_small_message(ends: tuple[socket.socket, socket.socket]) -> None:
    theirs, ours = ends
    send(theirs, b"{}\0", fds=3)

    def work() -> None:
        before = len(os.listdir("/proc/self/fd"))
        first_free = os.dup(0)
        os.close(first_free)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + 1, hard))
        with pytest.raises(DescriptorsLost):
            read(ours)
        assert len(os.listdir("/proc/self/fd")) == before

    in_child(work)
