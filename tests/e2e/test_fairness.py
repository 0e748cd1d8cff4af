"""Nobody can make others wait: not by being slow, not in company, and not by being root somewhere."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from mountd.daemon.limits import DEADLINES, MAXIMUM_CONNECTIONS_PER_OWNER, MAXIMUM_WORKERS
from mountd.daemon.listener import PAUSE_SECONDS
from mountd.daemon.throttle import LINES, SECONDS
from mountd.service.phase import Phase
from tests.container import in_container
from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.rogue import ATTACKER, GET_INFO, Raw, ask, error, eventually, mount_call, opened, settled

VICTIM = 4200
LEFT_OUT = re.compile(r"mountd: (\d+) lines about requests of uid (\d+) were left out")
SOON = DEADLINES[Phase.READ] / 4  # far less than what the attackers hold their workers for


def seconds_of_an_answer(daemon: Daemon, uid: int) -> float:
    begin = time.monotonic()
    assert error(ask(daemon, GET_INFO, uid=uid)) == ""
    return time.monotonic() - begin


def test_users_who_begin_requests_and_do_not_end_them(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    """Together they have more workers than there usually are; others still get theirs at once."""
    daemon = start(trusting(images["erofs"].parent))
    settled(daemon)
    with contextlib.ExitStack() as stack:
        for uid in (ATTACKER, ATTACKER + 1, ATTACKER + 2):
            for _ in range(12):
                stack.enter_context(Raw(daemon, uid)).send(b"{")
        assert eventually(lambda: len(daemon.workers) >= MAXIMUM_WORKERS)
        for _ in range(3):
            assert seconds_of_an_answer(daemon, VICTIM) < SOON
        # The extra worker is for the first request of an owner, not for more of the attackers.
        assert len(daemon.workers) <= MAXIMUM_WORKERS + 3


def test_containers_of_root_do_not_share_what_root_may_have(
    start: Callable[..., Daemon], images: dict[str, Path], containers: None
) -> None:
    daemon = start(trusting(images["erofs"].parent))

    def hog() -> str | None:
        with contextlib.ExitStack() as stack:
            for _ in range(MAXIMUM_CONNECTIONS_PER_OWNER):
                stack.enter_context(Raw(daemon))
            os.write(full_writer, b"x")
            select.select([done], [], [], 20)
            with Raw(daemon) as one_more:
                return error(one_more.reply())

    full, full_writer = os.pipe()
    done, done_writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(done_writer)
            said = in_container(hog, uids=((0, 600000, 65536),), owner=0)
            os._exit(0 if said == "LimitExceeded" else 1)
        finally:
            os._exit(2)
    os.close(full_writer)
    assert os.read(full, 1) == b"x"
    assert error(ask(daemon, GET_INFO)) == ""
    other = in_container(lambda: error(ask(daemon, GET_INFO)), uids=((0, 700000, 65536),), owner=0)
    assert other == ""
    os.close(done_writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for fd in (full, done):
        os.close(fd)


def test_no_descriptor_for_a_connection_is_not_for_ever(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    """Even if nobody is connected who could leave."""
    daemon = start(trusting(images["erofs"].parent))
    settled(daemon)
    pid = daemon.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    lowest = next(number for number in range(len(taken) + 1) if number not in taken)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest, before[1]))
    with Raw(daemon) as waiting:
        waiting.send(GET_INFO)
        assert eventually(lambda: "cannot take another connection in" in daemon.log)
        time.sleep(10 * PAUSE_SECONDS)
        assert daemon.log.count("cannot take another connection in") == 1
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert error(waiting.reply()) == ""
    assert seconds_of_an_answer(daemon, VICTIM) < SOON


def test_who_leaves_takes_no_worker(start: Callable[..., Daemon], images: dict[str, Path]) -> None:
    """Not even to be found out; what was sent before is served."""
    daemon = start(trusting(images["erofs"].parent))
    settled(daemon)
    descriptors = Path(f"/proc/{daemon.process.pid}/fd")

    def held() -> int:
        return len(os.listdir(descriptors))

    workers, before = daemon.workers, held()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        left = [stack.enter_context(Raw(daemon)) for _ in range(8)]
        assert eventually(lambda: held() == before + len(left))
        for raw in left[::2]:
            raw.socket.shutdown(socket.SHUT_WR)
        assert all(raw.ended() for raw in left[::2])
    assert eventually(lambda: held() == before)
    with Raw(daemon) as raw:
        raw.send(GET_INFO)
        raw.socket.shutdown(socket.SHUT_WR)
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        assert error(raw.reply()) == ""
        assert raw.ended()


def test_lines_about_refused_connections_are_limited(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    """Each owner has lines of its own, and what is left out is counted."""
    daemon = start(trusting(images["erofs"].parent))
    settled(daemon)

    def refused(uid: int) -> None:
        with Raw(daemon, uid) as raw:
            assert error(raw.reply()) == "LimitExceeded"

    def left_out() -> int:
        return sum(int(number) for number, _ in LEFT_OUT.findall(daemon.log))

    def told(uid: int) -> int:
        return daemon.log.count(f"refused a connection of uid {uid}: ")

    with contextlib.ExitStack() as stack:
        for uid in (ATTACKER, VICTIM):
            for _ in range(MAXIMUM_CONNECTIONS_PER_OWNER):
                stack.enter_context(Raw(daemon, uid))
        count = 0
        while count - told(ATTACKER) < LINES:
            refused(ATTACKER)
            count += 1
        refused(VICTIM)
        assert eventually(lambda: told(VICTIM) == 1)
        time.sleep(SECONDS)
        refused(ATTACKER)
        count += 1
        assert eventually(lambda: left_out() + told(ATTACKER) == count)
        assert left_out() >= LINES // 2
        assert {uid for _, uid in LEFT_OUT.findall(daemon.log)} == {str(ATTACKER)}


def test_a_reply_that_was_sent_is_the_only_one(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    """A worker that is killed after it has answered ends the connection, and says nothing in addition."""
    daemon = start(trusting(images["erofs"].parent))
    for number in range(20):
        settled(daemon)
        workers = daemon.workers
        with Raw(daemon) as raw, opened(images["erofs"]) as fds:
            raw.send(mount_call(), fds)
            assert error(raw.reply()) == ""
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if number % 2:
                # The answer to this very call, also that the next worker was dead before it took it.
                with contextlib.suppress(ConnectionError):
                    raw.send(GET_INFO)
                    raw.reply()
            with contextlib.suppress(OSError):
                raw.socket.shutdown(socket.SHUT_WR)
            assert raw.ended()
        eventually(lambda: not set(workers) & set(daemon.workers))  # noqa: B023
