"""The deadlines that the pool holds workers to, with a real process as the worker."""

from __future__ import annotations

import copy
import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from mountd.daemon import channel
from mountd.daemon.board import Board
from mountd.daemon.counters import Counters
from mountd.daemon.limits import DEADLINES, GRACE_SECONDS, MAXIMUM_STUCK, SLOTS
from mountd.daemon.pool import Pool, Worker
from mountd.errors import TimedOut
from mountd.fds import OwnedFd
from mountd.kernel.namespaces import pidfd_open
from mountd.service.images import MAXIMUM_TRANSFER_SECONDS, transfer_seconds
from mountd.service.phase import Phase

MIB = 1 << 20


class Owner:
    """What the pool counts by."""

    uid = 1000
    key = (1000, 0)
    running = 1
    stuck = 0


class Bench:
    """A pool with one worker, a process that does nothing, serving a request."""

    def __init__(self) -> None:
        self.control, self.other = channel.pair()
        self.board = Board(1)
        self.counters = Counters(1)
        self.pool = Pool(self.control, self.board, self.counters)
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            signal.pause()
            os._exit(0)
        self.worker: Worker = self.pool.spawned(0, [OwnedFd(ours.detach()), pidfd_open(self.pid)])
        self.worker.owner = Owner()  # type: ignore[assignment]
        self.worker.connection = "connection"  # type: ignore[assignment]

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.worker.close()
        for end in (self.control, self.other, self.theirs):
            end.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_a_transfer_has_its_own_deadline(bench: Bench) -> None:
    bench.board.enter(0, Phase.TRANSFER, 1)
    began = time.monotonic()
    until = bench.pool.next_deadline()
    assert until is not None
    assert until == pytest.approx(began + 1 + GRACE_SECONDS, abs=0.2)
    assert bench.pool.enforce() == []
    time.sleep(until - time.monotonic() + 0.01)
    ((connection, error),) = bench.pool.enforce()
    assert connection == "connection"  # type: ignore[comparison-overlap]
    assert isinstance(error, TimedOut)
    assert error.parameters == {"seconds": 1}
    assert os.waitid(os.P_PID, bench.pid, os.WEXITED | os.WNOWAIT).si_status == signal.SIGKILL  # type: ignore[union-attr]


@pytest.mark.parametrize(("seconds", "held"), [(3600, 3600), (0, DEADLINES[Phase.TRANSFER])])
def test_the_deadline_of_a_long_transfer_is_far(bench: Bench, seconds: int, held: int) -> None:
    bench.board.enter(0, Phase.TRANSFER, seconds)
    until = bench.pool.next_deadline()
    assert until == pytest.approx(time.monotonic() + held + GRACE_SECONDS, abs=1)
    assert bench.pool.enforce() == []


def test_the_next_phase_has_its_usual_deadline_again(bench: Bench) -> None:
    bench.board.enter(0, Phase.TRANSFER, 3600)
    bench.board.enter(0, Phase.REPLY)
    expected = time.monotonic() + DEADLINES[Phase.REPLY] + GRACE_SECONDS
    assert bench.pool.next_deadline() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("size", "seconds"),
    [(0, 30), (20 * MIB - 1, 30), (20 * MIB, 31), (1 << 30, 81), (1 << 40, 3600), ((1 << 63) - 1, 3600)],
)
def test_the_deadline_goes_by_the_size(size: int, seconds: int) -> None:
    assert transfer_seconds(size) == seconds
    assert seconds <= MAXIMUM_TRANSFER_SECONDS


def killed(bench: Bench, number: int) -> None:
    """Have `number` workers that were killed and hang."""
    for slot in range(1, number + 1):
        worker = bench.pool.workers[slot] = copy.copy(bench.worker)
        worker.slot, worker.killed_at, worker.charged = slot, time.monotonic(), True


def test_a_crowd_is_also_what_could_hang_with_what_hangs(bench: Bench) -> None:
    """One is being served; with it, no more than may could hang."""
    killed(bench, MAXIMUM_STUCK - 2)
    assert not bench.pool.crowded
    killed(bench, MAXIMUM_STUCK - 1)
    assert bench.pool.crowded


def test_exhausted_is_when_all_hang(bench: Bench) -> None:
    killed(bench, SLOTS - 1)
    assert not bench.pool.exhausted
    bench.worker.killed_at = time.monotonic()
    assert bench.pool.exhausted
