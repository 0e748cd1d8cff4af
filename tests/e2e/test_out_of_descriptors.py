"""Processes of the daemon that run out of descriptors: what fails is told, and nothing of it lasts."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mountd.daemon.channel import Word
from mountd.daemon.limits import MAXIMUM_RUNNING_PER_OWNER, MAXIMUM_WORKERS, PAUSE_SECONDS
from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.rogue import ATTACKER, GET_INFO, Raw, ask, error, eventually, mount_call, opened, settled

GONE = re.compile(rb'iov_base="\\%o\\0\\0\\0\\?(\w+)' % Word.GONE)


@contextlib.contextmanager
def few_descriptors(pid: int, more: int) -> Iterator[None]:
    """Let a process open `more` descriptors and no other."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken: set[int] = set()
    while (now := {int(name) for name in os.listdir(f"/proc/{pid}/fd")}) != taken:
        taken = now
        time.sleep(0.1)  # what it has open for a moment does not count
    free = [number for number in range(len(taken) + more + 1) if number not in taken][: more + 1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[more], before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def occupy(daemon: Daemon, stack: contextlib.ExitStack, number: int) -> list[Raw]:
    """Have `number` connections, of several users."""
    users = [ATTACKER + n // MAXIMUM_RUNNING_PER_OWNER for n in range(number)]
    return [stack.enter_context(Raw(daemon, uid)) for uid in users]


def known(raws: list[Raw]) -> list[Raw]:
    """Return connections that the listener has taken in."""
    for raw in raws:
        raw.send(GET_INFO)
        assert error(raw.reply()) == ""
    return raws


def everything_works(daemon: Daemon, image: Path, before: dict[str, object]) -> None:
    """As many requests at the same time as ever get their workers, and nothing is left over."""
    with contextlib.ExitStack() as stack, opened(image) as fds:
        raws = occupy(daemon, stack, MAXIMUM_WORKERS)
        data = mount_call()
        for raw in raws:
            raw.send(data[:1], fds)
        assert eventually(lambda: len(daemon.workers) >= MAXIMUM_WORKERS)
        for raw in raws:
            raw.send(data[1:])
            assert error(raw.reply()) == ""
    assert eventually(lambda: daemon.held() == before), (before, daemon.held())


@pytest.mark.parametrize("more", [1, 2])
def test_who_calls_cannot_be_found_out(
    start: Callable[..., Daemon], images: dict[str, Path], more: int
) -> None:
    """That is the daemon's failure, and not said to be the end of a caller who waits for its answer.

    With the connection and no more, the peer's process cannot be pinned; with that, too, its user namespace
    cannot be looked at.
    """
    daemon = start(trusting(images["erofs"].parent))
    before = settled(daemon)
    with few_descriptors(daemon.process.pid, more), Raw(daemon) as raw:
        reply = raw.reply()
        assert raw.ended()
    assert error(reply) == "MountFailed"
    assert reply is not None
    assert reply["parameters"]["errnoName"] == "EMFILE"
    everything_works(daemon, images["erofs"], before)


def test_the_listener_cannot_reach_a_new_worker(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    """The worker ends, as nobody can ask it for anything; the request waits for the next one."""
    daemon = start(trusting(images["erofs"].parent))
    before = settled(daemon)
    said = "no descriptor left to reach a new worker"
    with contextlib.ExitStack() as stack, opened(images["erofs"]) as fds:
        # All are there before the limit is, and one is more than there are workers.
        raws = known(occupy(daemon, stack, MAXIMUM_WORKERS - 1))
        data = mount_call()
        # One is what it takes to hand a request to a worker, and two come with a new one.
        with few_descriptors(daemon.process.pid, 1):
            # Counted now: one that was asked for while they were taken in is there by now.
            raws = raws[: len(daemon.workers) + 1]
            for raw in raws:
                raw.send(data[:1], fds)
                time.sleep(0.05)
            assert eventually(lambda: said in daemon.log), daemon.log
            for raw in raws[:-1]:
                raw.send(data[1:])
                assert error(raw.reply()) == ""
        raws[-1].send(data[1:])
        assert error(raws[-1].reply()) == ""
    everything_works(daemon, images["erofs"], before)


def test_the_listener_cannot_hand_a_request_over(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    """Who asks is told, and the workers have nothing to do with it."""
    daemon = start(trusting(images["erofs"].parent))
    before = settled(daemon)
    workers = daemon.workers
    with contextlib.ExitStack() as stack, opened(images["erofs"]) as fds:
        (raw,) = known(occupy(daemon, stack, 1))
        with few_descriptors(daemon.process.pid, 0):
            raw.send(mount_call(), fds)
            reply = raw.reply()
            assert error(reply) == "MountFailed"
            assert reply is not None
            assert reply["parameters"]["errnoName"] == "EMFILE"
            assert raw.ended()
    assert daemon.workers == workers
    everything_works(daemon, images["erofs"], before)


@contextlib.contextmanager
def reports_of(pid: int, output: Path) -> Iterator[Counter[bytes]]:
    """Count by slot how often a process reports that a worker is gone."""
    found: Counter[bytes] = Counter()
    command = ["strace", "-e", "trace=sendmsg", "-s", "16", "-o", str(output), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as strace:
        try:
            assert eventually(
                lambda: f"TracerPid:\t{strace.pid}\n" in Path(f"/proc/{pid}/status").read_text()
            )
            yield found
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait(10)
    found.update(GONE.findall(output.read_bytes()))


# What a new worker needs in the fork server: two sockets, a copy of one, and a pidfd.
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (0, "cannot start a worker: "),
        (1, "cannot start a worker: "),
        (2, "cannot start a worker: "),
        (3, "cannot hand over a worker: "),
    ],
)
def test_the_fork_server_cannot_hand_a_worker_over(
    start: Callable[..., Daemon], images: dict[str, Path], more: int, said: str
) -> None:
    """It is told once that the slot is free: told twice, the next worker in it would be forgotten."""
    daemon = start(trusting(images["erofs"].parent))
    before = settled(daemon)
    with (
        contextlib.ExitStack() as stack,
        opened(images["erofs"]) as fds,
        reports_of(daemon.fork_server, daemon.directory / "trace") as reports,
    ):
        raws = known(occupy(daemon, stack, MAXIMUM_WORKERS - 1))
        data = mount_call()
        begin = time.monotonic()
        with few_descriptors(daemon.fork_server, more):
            # Counted now: one that was asked for while they were taken in is there by now.
            raws = raws[: len(daemon.workers) + 1]
            for raw in raws:
                raw.send(data[:1], fds)
            assert eventually(lambda: said in daemon.log), daemon.log
            time.sleep(0.5)
        for raw in raws:
            raw.send(data[1:])
            assert error(raw.reply()) == ""
    # It is tried again now and then, and each time is one report.
    assert daemon.log.count(said) <= 2 * (1 + (time.monotonic() - begin) / PAUSE_SECONDS)
    assert sum(reports.values()) == daemon.log.count(said), (reports, daemon.log[-2000:])
    assert error(ask(daemon, GET_INFO)) == ""
    everything_works(daemon, images["erofs"], before)
