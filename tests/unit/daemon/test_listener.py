"""What one turn of the listener makes of events that come together."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mountd.daemon import channel
from mountd.daemon.board import Board
from mountd.daemon.channel import Entrance, Word
from mountd.daemon.counters import Counters
from mountd.daemon.limits import SLOTS
from mountd.daemon.listener import Listener
from mountd.kernel.namespaces import pidfd_open
from mountd.wire.framing import encode


class Bench:
    """A listener, with the other ends of all that it watches and a process for a worker."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(path))
        self.listening.listen()
        ours, self.fork_server = channel.pair()
        self._ours = ours
        self.listener = Listener(
            {Entrance.OWN: self.listening},
            ours,
            Board(SLOTS),
            Counters(SLOTS),
            maximum_connections=8,
            idle_exit=None,
            notify=lambda _: None,
        )
        self.pid = os.fork()
        if self.pid == 0:
            signal.pause()
            os._exit(0)
        self.worker, theirs = channel.pair()  # of which the process has no copy
        with pidfd_open(self.pid) as pidfd:
            channel.tell(self.fork_server, Word.SPAWNED, 0, fds=[theirs, pidfd])  # type: ignore[list-item]
        theirs.close()
        self.turn()

    def turn(self) -> None:
        assert self.listener.turn(time.monotonic() + 0.1)

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(self.path))
        return client

    def close(self) -> None:
        self.listener.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        for end in (self.listening, self._ours, self.fork_server, self.worker):
            end.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "socket")
    yield made
    made.close()


@contextmanager
def no_number_below(fd: int) -> Iterator[None]:
    """Have `fd` be the first that is given out once it is closed."""
    with ExitStack() as taken:
        while (number := os.dup(fd)) < fd:
            taken.callback(os.close, number)
        os.close(number)
        yield


def test_an_event_of_what_was_closed_is_not_that_of_who_has_its_number(bench: Bench) -> None:
    """A worker ends, somebody connects, and the end of the worker's channel is one more event of that turn:
    its number is that of the new connection by then.
    """
    (old,) = bench.listener._channels
    channel.tell(bench.fork_server, Word.GONE, 0)
    with bench.connect() as client:
        bench.worker.close()
        with no_number_below(old):
            bench.turn()
        assert list(bench.listener._connections) == [old], "it was dropped, or has another number"
        assert list(bench.listener._idle) == [old]
        client.send(encode({"method": "io.mountd.Mounts.GetInfo"}))
        bench.turn()
        assert not bench.listener._idle
        assert bench.listener._queue.waiting == 1


def test_who_leaves_without_a_word_is_let_go(bench: Bench) -> None:
    bench.connect().close()
    bench.turn()
    bench.turn()
    assert not bench.listener._connections
