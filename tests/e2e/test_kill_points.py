"""Case 18 of the threat model: a caller who leaves at any moment, ten thousand times.

The moments are spread evenly over the time that an ordinary request takes on this machine, from the
connect to a while after the reply, so that every phase is hit in proportion to its length; some callers
leave in the middle of their message. Most of them close the connection, many in one process; every tenth
is a process that is killed with SIGKILL and leaves everything open. What the daemon, the kernel and the
test hold afterwards is compared with what they held before (fixtures `daemon` and
`nothing_left_behind`), and a neighbour mounts all the while. Workers are killed in the same way; that is
a figure of the threat model's section 5.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mountd.daemon.limits import MINIMUM_WORKERS
from mountd.kernel import sockets
from tests.container import forked
from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.rogue import ATTACKER, ask, error, eventually, mount_call, neighbour, opened, settled
from tests.rogue import Raw as Connection

KILLS = int(os.environ.get("MOUNTD_TEST_KILLS", "10000"))
SHARES = {"erofs": 0.7, "ext4": 0.3}  # one is mounted from the file, the other from a loop device
BY_SIGKILL = 10  # one in so many
IN_THE_MESSAGE = 5  # one in so many
SAMPLES = 10
IN_A_ROW = 200  # points, after which it is measured anew how long a request takes
WORKERS = KILLS // 20  # that are killed, of each kind of image
BEYOND = 1.6  # times the length of a request


@dataclass
class Counts:
    """At how many points there was no complete request yet, no reply yet, and a reply."""

    unfinished: int = 0
    waiting: int = 0
    answered: int = 0
    killed: int = 0


def length_of_a_request(daemon: Daemon, fds: list[int]) -> float:
    """Return the seconds that an ordinary request takes here and now: the median."""
    times = []
    for _ in range(SAMPLES):
        begin = time.perf_counter()
        with Connection(daemon) as raw:
            raw.send(mount_call(), fds)
            assert error(raw.reply()) == ""
        times.append(time.perf_counter() - begin)
    return sorted(times)[SAMPLES // 2]


def wait_until(moment: float) -> None:
    """Wait for less than the scheduler can, too."""
    if (left := moment - time.perf_counter()) > 0.001:
        time.sleep(left - 0.0005)
    while time.perf_counter() < moment:
        pass


def begun(daemon: Daemon, data: bytes, fds: list[int]) -> socket.socket:
    """Connect and send a request, or a part of one."""
    connection = sockets.connect(str(daemon.socket))
    if data:
        # It may have been told that it has too many connections, and then nobody listens.
        with contextlib.suppress(ConnectionError):
            socket.send_fds(connection, [data], fds)
    return connection


def leave_by_closing(daemon: Daemon, data: bytes, fds: list[int], seconds: float) -> bool:
    """Leave after so many seconds; return whether there was a reply by then."""
    begin = time.perf_counter()
    with contextlib.closing(begun(daemon, data, fds)) as connection:
        wait_until(begin + seconds)
        try:
            # The descriptor that comes with it stays in the queue.
            return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False


def leave_by_sigkill(daemon: Daemon, data: bytes, fds: list[int], seconds: float) -> None:
    """Be killed so many seconds after the connection was begun, with all that one has."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, b"k")
            connection = begun(daemon, data, fds)
            connection.recv(65536)
            signal.pause()
        finally:
            os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    wait_until(time.perf_counter() + seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def attack(daemon: Daemon, fds: list[int], number: int) -> Counts:
    """Leave `number` times, at moments that are random and the same in each run."""
    dice, counts, longest = random.Random(18), Counts(), 0.0
    for point in range(number):
        if point % IN_A_ROW == 0:
            longest = length_of_a_request(daemon, fds) * BEYOND
        data, seconds = mount_call(), dice.uniform(0, longest)
        if point % IN_THE_MESSAGE == 0:
            data = data[: dice.randrange(len(data))]
        complete = data.endswith(b"\0")
        if point % BY_SIGKILL == 1:
            leave_by_sigkill(daemon, data, fds, seconds)
            counts.killed += 1
        elif leave_by_closing(daemon, data, fds, seconds):
            counts.answered += 1
        elif complete:
            counts.waiting += 1
        else:
            counts.unfinished += 1
    return counts


@pytest.mark.parametrize("type", SHARES)
def test_a18_callers_leave_at_any_moment(daemon: Daemon, images: dict[str, Path], type: str) -> None:
    number = int(KILLS * SHARES[type])
    settled(daemon)
    with neighbour(daemon, images["erofs"]), opened(images[type]) as fds:
        counts = forked(lambda: attack(daemon, fds, number), ATTACKER)
        # As the moments are spread evenly, so are the points.
        assert counts.killed == number // BY_SIGKILL
        assert counts.unfinished >= number * 0.15, counts
        assert counts.waiting >= number * 0.1, counts
        assert counts.answered >= number * 0.1, counts
        # Who stays is served, as if nothing had been.
        with Connection(daemon, ATTACKER) as raw:
            raw.send(mount_call(), fds)
            assert error(raw.reply()) == ""


@pytest.mark.parametrize("type", SHARES)
def test_a_worker_is_killed_at_any_moment(
    start: Callable[..., Daemon], images: dict[str, Path], type: str
) -> None:
    """Its caller gets one answer or the end of the connection, and what it had begun is taken back."""
    daemon, dice = start(trusting(images[type].parent)), random.Random(70)
    before = settled(daemon)
    said: Counter[str | None] = Counter()
    with opened(images[type]) as fds:
        longest = length_of_a_request(daemon, fds) * BEYOND
        for _ in range(WORKERS):
            workers = daemon.workers
            with Connection(daemon) as raw:
                moment = time.perf_counter() + dice.uniform(0, longest)
                raw.send(mount_call(), fds)
                wait_until(moment)
                for pid in workers:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                reply = raw.reply()
                said[error(reply)] += 1
                if error(reply) == "MountFailed":
                    assert reply is not None
                    assert reply["parameters"]["errnoName"] == "EIO"
            if not said.total() % 20:
                # The next ones are there; what is killed before it has begun to serve is no kill point.
                assert eventually(lambda: len(daemon.workers) >= MINIMUM_WORKERS)
        assert set(said) <= {"", "MountFailed", None}, said
        assert said["MountFailed"] >= WORKERS / 10, said
        assert said[""] >= WORKERS / 10, said
        # One of those killed last may be taken for alive still.
        assert eventually(lambda: error(ask(daemon, mount_call(), fds)) == "", 10)
    assert eventually(lambda: daemon.held() == before, 10), (before, daemon.held())
