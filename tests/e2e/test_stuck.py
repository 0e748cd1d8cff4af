"""Case 14 of the threat model to its end: all workers hang that may, and neighbours do not notice.

The files are those of a FUSE server that does not answer to a close(2), so that every request for one is
refused at once and its worker hangs afterwards, in a sleep that not even SIGKILL ends.

The neighbour's latency is measured as a ratio within one run: to a second daemon, which nobody attacks,
and which is asked in turn with the first, so that whatever else the machine does hits both. On two cores
the 99th percentile of such a series is decided by four of the scheduler's whims, and a bound of 2 on it
would fail now and then for no reason of mountd's. So the bound of 2 is on the median and on the 90th
percentile; on the 99th it is wider. Measured in eight runs: 0.92 to 1.14 for the median, 0.80 to 1.23 for
the 90th, 0.55 to 1.20 for the 99th percentile. With `--log-level=info`, a run says its own.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mountd.daemon.limits import (
    DEADLINES,
    GRACE_SECONDS,
    MAXIMUM_CONNECTIONS_PER_OWNER,
    MAXIMUM_STUCK,
    MAXIMUM_STUCK_PER_OWNER,
    SECONDS_TO_DIE,
    SLOTS,
)
from mountd.service.phase import Phase
from tests.container import as_user, in_container
from tests.daemon import Daemon
from tests.e2e.calls import mount
from tests.e2e.conftest import trusting
from tests.fuse import Fuse, Op
from tests.rogue import (
    ATTACKER,
    GET_INFO,
    NEIGHBOUR,
    Raw,
    ask,
    error,
    eventually,
    mount_call,
    neighbour,
    opened,
    session,
    settled,
)

VICTIM = 4200
STRANGER = 4300  # the first of those who come when all others have had their share
OWNERS = range(ATTACKER, ATTACKER + MAXIMUM_STUCK // MAXIMUM_STUCK_PER_OWNER)
UNTIL_CHARGED = DEADLINES[Phase.CLOSE] + GRACE_SECONDS + SECONDS_TO_DIE
AT_ONCE = 0.1  # seconds: far less than any deadline, and than any wait for somebody who hangs
WAITS = "request_wait_answer"  # fs/fuse/dev.c
IDLE = 1000  # connections that say nothing
ROUNDS = 400
TRIES = 5


def stuck(daemon: Daemon) -> int:
    """How many processes of the daemon wait in the kernel for the answer of a FUSE server."""

    def waits_for(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/wchan").read_text()
        except OSError:
            return ""  # it has ended

    return sum(waits_for(pid) == WAITS for pid in session(daemon))


def quickest(
    daemon: Daemon, data: bytes, fds: list[int], uid: int | None = None
) -> tuple[str | None, float]:
    """Ask several times; return the answer, which is always the same, and the shortest time that it took."""
    said, times = set(), []
    for _ in range(TRIES):
        begin = time.monotonic()
        said.add(error(ask(daemon, data, fds, uid)))
        times.append(time.monotonic() - begin)
    assert len(said) == 1, said
    return said.pop(), min(times)


def hang(daemon: Daemon, uid: int, fds: list[int]) -> str | None:
    """Have one request of this user hang, unless it is refused; return the error that it gets."""
    return error(ask(daemon, mount_call(), fds, uid))


@contextlib.contextmanager
def filled(daemon: Daemon, fds: list[int]) -> Iterator[None]:
    """Have as many requests of each owner hang as may, which are as many in all as may."""
    end = time.monotonic() + 12 * UNTIL_CHARGED
    with contextlib.ExitStack() as stack:
        # All owners at the same time, several requests each: more than there may be, in any order.
        for uid in OWNERS:
            for _ in range(MAXIMUM_STUCK_PER_OWNER + 2):
                stack.enter_context(Raw(daemon, uid)).send(mount_call(), fds)
        while stuck(daemon) < MAXIMUM_STUCK:
            assert time.monotonic() < end, f"{stuck(daemon)} hang"
            assert stuck(daemon) <= MAXIMUM_STUCK
            time.sleep(0.2)
        time.sleep(UNTIL_CHARGED)
        yield


def idle_connections(daemon: Daemon, stack: contextlib.ExitStack) -> None:
    """Have those who hang hold connections, too, on which they say nothing."""
    for number in range(IDLE):
        uid = OWNERS[number * len(OWNERS) // IDLE]
        stack.enter_context(Raw(daemon, uid))
    assert IDLE / len(OWNERS) < MAXIMUM_CONNECTIONS_PER_OWNER


def compare(attacked: Daemon, quiet: Daemon, image: Path) -> tuple[list[float], list[float]]:
    """Return the seconds that mounts take at either, for a user who has nothing to do with all this."""

    def seconds(daemon: Daemon) -> float:
        begin = time.perf_counter()
        mount(daemon.socket, image).mount.close()
        return time.perf_counter() - begin

    def work() -> tuple[list[float], list[float]]:
        for daemon in (attacked, quiet):
            seconds(daemon)
        pairs = [(seconds(attacked), seconds(quiet)) for _ in range(ROUNDS)]
        return [first for first, _ in pairs], [second for _, second in pairs]

    return as_user(work, VICTIM)


def percentile(values: list[float], part: int) -> float:
    return statistics.quantiles(values, n=100)[part - 1]


def test_a14_all_hang_that_may(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path, containers: None
) -> None:
    """33 requests of one user, its 64 subuids, seven other owners, and then those who had no part in it."""
    image = images["erofs"]
    policy = trusting(image.parent)
    daemon, quiet = start(policy, start_new_session=True), start(policy)
    before = settled(daemon)
    with contextlib.ExitStack() as stack:
        fuse = stack.enter_context(Fuse(place / "fuse", image.read_bytes()))
        fuse.silence(Op.FLUSH, session=daemon.process.pid)
        fds = stack.enter_context(opened(fuse.path))
        with neighbour(daemon, image, NEIGHBOUR):
            one_owner_is_refused(daemon, fds)
            with filled(daemon, fds):
                pass
        # Those who have something that hangs are refused, and at once.
        for uid in OWNERS:
            name, seconds = quickest(daemon, mount_call(), fds, uid)
            assert (name, seconds < AT_ONCE) == ("LimitExceeded", True), (uid, seconds)
        assert stuck(daemon) == MAXIMUM_STUCK
        with contextlib.ExitStack() as idlers:
            idle_connections(daemon, idlers)
            nobody_else_notices(daemon, quiet, image)
        strangers_hang_too(daemon, image, fds)
        fuse.abort()
        assert eventually(lambda: stuck(daemon) == 0, 10)
        for uid in (VICTIM, *OWNERS, STRANGER):
            assert eventually(lambda: error(ask(daemon, GET_INFO, uid=uid)) == "")  # noqa: B023
        with neighbour(daemon, image, NEIGHBOUR):
            pass
    assert eventually(lambda: daemon.held() == before, 40), (before, daemon.held())


def one_owner_is_refused(daemon: Daemon, fds: list[int]) -> None:
    """33 requests of one user: four hang, and the others are told; so are those of its ranges of subuids."""
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(daemon, ATTACKER)) for _ in range(MAXIMUM_STUCK + 1)]
        for raw in raws:
            raw.send(mount_call(), fds)
        answers = sorted(str(error(raw.reply())) for raw in raws)
        more = MAXIMUM_STUCK + 1 - MAXIMUM_STUCK_PER_OWNER
        assert answers == ["BadFileDescriptor"] * MAXIMUM_STUCK_PER_OWNER + ["LimitExceeded"] * more
    assert stuck(daemon) == MAXIMUM_STUCK_PER_OWNER

    def as_each() -> dict[int, tuple[str | None, float]]:
        return {uid: quickest(daemon, mount_call(), fds, uid) for uid in range(1, 65)}

    found = in_container(as_each, uids=((0, 400000, 65536),), owner=ATTACKER)
    assert {name for name, _ in found.values()} == {"LimitExceeded"}
    assert max(seconds for _, seconds in found.values()) < AT_ONCE, found
    assert stuck(daemon) == MAXIMUM_STUCK_PER_OWNER


def nobody_else_notices(daemon: Daemon, quiet: Daemon, image: Path) -> None:
    """A neighbour's mounts take as long as those at a daemon that has nothing to do with all this."""
    attacked, alone = compare(daemon, quiet, image)
    ratios = {part: percentile(attacked, part) / percentile(alone, part) for part in (50, 90, 99)}
    figures = [f"{percentile(times, part) * 1e3:.2f}" for part in (50, 99) for times in (attacked, alone)]
    logging.getLogger(__name__).info(
        "median and p99 in ms, with and without: %s; ratios %s", figures, ratios
    )
    assert ratios[50] <= 2, ratios
    assert ratios[90] <= 2, ratios
    assert ratios[99] <= 4, ratios


def strangers_hang_too(daemon: Daemon, image: Path, fds: list[int]) -> None:
    """Beyond the cap there is one request for each who has none that hangs, and in the end an answer."""
    spare = SLOTS - MAXIMUM_STUCK
    with neighbour(daemon, image, NEIGHBOUR), contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(Raw(daemon, STRANGER)).send(mount_call(), fds)
        assert eventually(lambda: stuck(daemon) == MAXIMUM_STUCK + 1)
        time.sleep(UNTIL_CHARGED + 1)
        # The second of them is refused, as is all that comes after.
        assert stuck(daemon) == MAXIMUM_STUCK + 1
        name, seconds = quickest(daemon, GET_INFO, [], STRANGER)
        assert (name, seconds < AT_ONCE) == ("LimitExceeded", True), seconds
    # It takes as many owners as there are slots to occupy them all; then nobody waits for nothing.
    for number in range(1, spare):
        assert hang(daemon, STRANGER + number, fds) == "BadFileDescriptor"
    assert eventually(lambda: stuck(daemon) == SLOTS)
    with Raw(daemon, VICTIM, timeout=UNTIL_CHARGED + 2) as waiting:
        waiting.send(GET_INFO)
        assert error(waiting.reply()) == "LimitExceeded"
    name, seconds = quickest(daemon, GET_INFO, [], VICTIM)
    assert (name, seconds < AT_ONCE) == ("LimitExceeded", True), seconds
    assert stuck(daemon) == SLOTS
