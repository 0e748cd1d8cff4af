"""Requests that hang, and callers who leave: cases 13 to 19 of the threat model.

Those that take 30 seconds hang at the same time, on one daemon (`half_a_minute`), and so do those that
take 10 (`ten_seconds`); the tests look at what came of each. A neighbour mounts all the while and notices
nothing. What there is more of has a module of its own: all workers hang (case 14, test_stuck.py), callers
leave ten thousand times (case 18, test_kill_points.py).

Case 15 without systemd: the daemon gets its SIGTERM while workers hang in the kernel, ends, and another
takes its place. What a service manager adds is that it waits for no process that hangs (KillMode=mixed).
Case 16: who takes a lease could hold up the kernel's own open of the image, which is tried without waiting.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from mountd.daemon.limits import DEADLINES, MAXIMUM_STUCK_PER_OWNER, SECONDS_TO_DIE
from mountd.daemon.throttle import LINES
from mountd.kernel import loop_device, mount_api
from mountd.kernel.flags import Unmount
from mountd.kernel.libc import call
from mountd.service.phase import Phase
from tests.container import in_container
from tests.daemon import Daemon
from tests.e2e.conftest import trusting
from tests.fuse import Fuse, Op
from tests.images import build_image
from tests.rogue import (
    ATTACKER,
    GET_INFO,
    Raw,
    ask,
    error,
    eventually,
    mount_call,
    neighbour,
    opened,
    session,
    settled,
    state_of,
)

READ_ONLY = 1  # MS_RDONLY
VERIFY, MOUNT, CLOSE = DEADLINES[Phase.VERIFY], DEADLINES[Phase.MOUNT], DEADLINES[Phase.CLOSE]
SLACK = 2.0
CLOSING = [f"close as well {number}" for number in range(MAXIMUM_STUCK_PER_OWNER)]
# What was said on a connection, and when; None is its end.
History = list[tuple[str | None, float]]


def watch(raws: Mapping[str, Raw], seconds: float, tick: Callable[[], None]) -> dict[str, History]:
    """Note what is answered on each connection until all have ended; `tick` is called once a second."""
    found: dict[str, History] = {name: [] for name in raws}
    waiting = dict(raws)
    end = time.monotonic() + seconds
    while waiting and time.monotonic() < end:
        ready = select.select(list(waiting.values()), [], [], 1)[0]
        for name, raw in list(waiting.items()):
            if raw in ready:
                said = error(raw.reply())
                found[name].append((said, time.monotonic() - raw.since))
                if said is None:
                    del waiting[name]
        tick()
    return found


def names(history: History) -> list[str | None]:
    return [name for name, _ in history]


def hanging(daemon: Daemon) -> set[int]:
    """The daemon's processes that wait for something that the kernel does not let be interrupted."""
    return {pid for pid in session(daemon) if state_of(pid) == "D"}


def unaccounted(daemon: Daemon) -> set[int]:
    """Processes that no worker answers for: one that hangs keeps its parser, and both are charged as one."""
    workers = daemon.workers
    known = {daemon.process.pid, daemon.fork_server, *workers}
    for worker in workers:
        known.update(daemon.children(worker))
    return session(daemon) - known


@contextlib.contextmanager
def overlay_on(fuse: Fuse) -> Iterator[int]:
    """The file of a FUSE server as an overlay shows it, which has a device number of its own."""
    target = fuse.target.with_suffix(".overlay")
    empty = fuse.target.with_suffix(".empty")
    target.mkdir()
    empty.mkdir()
    call("mount", b"overlay", os.fsencode(target), b"overlay", 0, f"lowerdir={fuse.target}:{empty}".encode())
    try:
        with opened(target / "image") as fds:
            try:
                yield fds[0]
            finally:
                fuse.abort()
    finally:
        mount_api.umount(str(target), Unmount.DETACH)


@contextlib.contextmanager
def loop_on(fuse: Fuse) -> Iterator[int]:
    """The file “inner” of the ext4 in the file of a FUSE server, by way of a loop device."""
    target = fuse.target.with_suffix(".loop")
    target.mkdir()
    with opened(fuse.path) as fds:
        loop = loop_device.attach(fds[0], read_only=True)
    call("mount", loop.path.encode(), os.fsencode(target), b"ext4", READ_ONLY, b"noload")
    loop.close()
    try:
        with opened(target / "inner") as fds:
            try:
                yield fds[0]
            finally:
                fuse.abort()
    finally:
        mount_api.umount(str(target), Unmount.DETACH)


@pytest.fixture(scope="module")
def half_a_minute(place: Path, images: dict[str, Path]) -> dict[str, object]:
    """All that takes until the deadline of the phase VERIFY, or the end of an idle connection."""
    tree = place / "tree-with-image"
    tree.mkdir()
    (tree / "inner").write_bytes(images["erofs"].read_bytes())
    nested = build_image("ext4", tree, place / "nested.raw").read_bytes()
    erofs = images["erofs"].read_bytes()
    daemon = Daemon(place / "half-a-minute", trusting(images["erofs"].parent), start_new_session=True)
    with contextlib.ExitStack() as stack:
        stack.callback(daemon.stop)
        servers = [
            stack.enter_context(Fuse(place / name, content))
            for name, content in (("read", erofs), ("read-and-close", erofs), ("below-loop", nested))
        ]
        overlay = stack.enter_context(overlay_on(servers[0]))
        closing = stack.enter_context(overlay_on(servers[1]))
        loop = stack.enter_context(loop_on(servers[2]))
        servers[0].silence(Op.READ, session=daemon.process.pid)
        servers[1].silence(Op.READ, Op.FLUSH, session=daemon.process.pid)
        servers[2].silence(Op.READ)  # it is a thread of the kernel that reads
        uids = {"overlay": 4001, "loop": 4002, "idle": 4004, "drip": 4005} | dict.fromkeys(CLOSING, 4003)
        raws = {name: stack.enter_context(Raw(daemon, uid)) for name, uid in uids.items()}
        raws["overlay"].send(mount_call(), [overlay])
        raws["loop"].send(mount_call(), [loop])
        for name in CLOSING:
            raws[name].send(mount_call(), [closing])

        def drip() -> None:
            with contextlib.suppress(ConnectionError):
                raws["drip"].send(b"{")

        found: dict[str, object] = {}
        with neighbour(daemon, images["erofs"]):
            found["histories"] = watch(raws, VERIFY + 6, drip)
            assert eventually(lambda: error(ask(daemon, GET_INFO, uid=4003)) == "LimitExceeded")
            begin = time.monotonic()
            found["refusal"] = (
                error(ask(daemon, mount_call(), [closing], uid=4003)),
                time.monotonic() - begin,
            )
            found["others"] = [error(ask(daemon, GET_INFO, uid=uid)) for uid in (4001, 4002)]
            found["unaccounted"] = not eventually(lambda: not unaccounted(daemon))
            found["hanging"] = len(hanging(daemon))
            servers[1].abort()
            found["forgiven"] = eventually(lambda: error(ask(daemon, GET_INFO, uid=4003)) == "")
        for server in servers:
            server.abort()
        found["left"] = not eventually(lambda: not hanging(daemon) and not unaccounted(daemon))
    assert "internal error" not in daemon.log, daemon.log
    return found


@pytest.mark.parametrize("name", ["overlay", "loop", *CLOSING])
def test_a17_stacked_on_a_silent_fuse_server(half_a_minute: dict[str, object], name: str) -> None:
    """No look at the descriptor tells; it hangs while it is read, and is answered at the deadline."""
    history = half_a_minute["histories"][name]  # type: ignore[index]
    assert names(history) == ["TimedOut", None]
    assert VERIFY <= history[0][1] < VERIFY + SLACK


def test_a13_a17_stuck_workers_are_charged_until_the_server_dies(half_a_minute: dict[str, object]) -> None:
    """All that hangs is charged to somebody, also the parser of a worker that died; nothing is left."""
    name, seconds = half_a_minute["refusal"]  # type: ignore[misc]
    assert name == "LimitExceeded"
    assert seconds < 0.5
    assert half_a_minute["others"] == ["", ""]
    assert int(half_a_minute["hanging"]) >= MAXIMUM_STUCK_PER_OWNER  # type: ignore[call-overload]
    assert half_a_minute["forgiven"]
    assert not half_a_minute["unaccounted"]
    assert not half_a_minute["left"]


def test_a01_idle_and_dripping_connections_end(half_a_minute: dict[str, object]) -> None:
    histories = half_a_minute["histories"]
    idle, drip = histories["idle"], histories["drip"]  # type: ignore[index]
    assert names(idle) == [None]
    assert 30 <= idle[0][1] < 30 + SLACK
    assert names(drip) == ["TimedOut", None]
    assert DEADLINES[Phase.READ] <= drip[0][1] < DEADLINES[Phase.READ] + 1 + SLACK


@pytest.fixture(scope="module")
def ten_seconds(place: Path, images: dict[str, Path]) -> dict[str, object]:
    """All that takes until the deadlines of READ, MOUNT and REPLY."""
    daemon = Daemon(place / "ten-seconds", trusting(images["erofs"].parent))
    leased = images["erofs"].with_name("leased.raw")
    leased.write_bytes(images["erofs"].read_bytes())
    with contextlib.ExitStack() as stack:
        stack.callback(daemon.stop)
        stack.callback(leased.unlink)
        before = settled(daemon)
        uids = {"stopped 0": 4001, "stopped 1": 4002, "lease": 0, "deaf": 4004}
        raws = {name: stack.enter_context(Raw(daemon, uid)) for name, uid in uids.items()}
        stopped = daemon.workers
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        raws["stopped 0"].send(GET_INFO)
        raws["stopped 1"].send(GET_INFO)
        image, lease = stack.enter_context(opened(images["erofs"], leased))
        # The kernel says so by this signal when somebody waits for the lease.
        stack.callback(signal.signal, signal.SIGIO, signal.signal(signal.SIGIO, signal.SIG_IGN))
        fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        raws["lease"].send(mount_call(), [lease])
        deaf = raws.pop("deaf")
        with neighbour(daemon, images["erofs"]):
            # Mounts that nobody takes, until there is no room for the next one.
            with contextlib.suppress(ConnectionError):
                while select.select([], [deaf], [], 2)[1]:
                    deaf.send(mount_call(), [image])
            found: dict[str, object] = {"histories": watch(raws, 15, lambda: None)}
        fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        received = 0
        while error(deaf.reply()) == "":
            received += 1
        found |= {"received": received, "stopped": [state_of(pid) for pid in stopped], "log": daemon.log}
        for raw in (deaf, *raws.values()):
            raw.close()
        found["clean"] = eventually(lambda: daemon.held() == before)
    return found


@pytest.mark.parametrize("number", [0, 1])
def test_a13_worker_that_does_nothing(ten_seconds: dict[str, object], number: int) -> None:
    """As if it hung before it read the request: answered by the listener, killed, and replaced."""
    history = ten_seconds["histories"][f"stopped {number}"]  # type: ignore[index]
    assert names(history) == ["TimedOut", None]
    assert DEADLINES[Phase.READ] <= history[0][1] < DEADLINES[Phase.READ] + SLACK
    assert ten_seconds["stopped"] == ["X", "X"]
    assert ten_seconds["clean"]


def test_a16_lease_on_the_image(ten_seconds: dict[str, object]) -> None:
    """The look at the path breaks no lease; the open that does ends at once."""
    history = ten_seconds["histories"]["lease"]  # type: ignore[index]
    assert names(history)[:1] == ["MountFailed"]
    assert history[0][1] < MOUNT / 2


def test_a19_caller_that_does_not_read(ten_seconds: dict[str, object]) -> None:
    """The connection ends at the deadline, with all that is in its queue."""
    assert ten_seconds["received"] > 0
    log = str(ten_seconds["log"])
    # So it says, unless the mounts before have used up the lines that one owner has.
    assert "the caller did not take the answer" in log or log.count("for uid 4004 ") == LINES
    assert ten_seconds["clean"]


def test_a14_a15_stuck_in_close_until_the_owner_is_refused_and_the_daemon_restarts(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path, containers: None
) -> None:
    """33 requests of one user whose files cannot be closed, its containers, and SIGTERM with 4 in D."""
    image = images["erofs"]
    daemon = start(trusting(image.parent), start_new_session=True)
    with contextlib.ExitStack() as stack:
        fuse = stack.enter_context(Fuse(place / "fuse", image.read_bytes()))
        fuse.silence(Op.FLUSH, session=daemon.process.pid)
        fds = stack.enter_context(opened(fuse.path))
        with neighbour(daemon, image):
            raws = {f"{number}": stack.enter_context(Raw(daemon, ATTACKER)) for number in range(33)}
            for raw in raws.values():
                raw.send(mount_call(), fds)
            before = set(daemon.workers)
            histories = watch(raws, CLOSE + 1 + SECONDS_TO_DIE + SLACK, lambda: None)
            firsts = sorted(str(history[0][0]) for history in histories.values())
            # Everybody gets an answer: those that hang had theirs before the close.
            assert firsts == ["BadFileDescriptor"] * MAXIMUM_STUCK_PER_OWNER + ["LimitExceeded"] * 29
            assert all(history[0][1] < CLOSE + 1 + SECONDS_TO_DIE + SLACK for history in histories.values())
            stuck = {pid for pid in session(daemon) if state_of(pid) == "D"}
            assert len(stuck) == MAXIMUM_STUCK_PER_OWNER
            assert before & stuck
            for base in (400000, 465536):
                begin = time.monotonic()
                said = in_container(
                    lambda: error(ask(daemon, mount_call(), fds)), uids=((0, base, 65536),), owner=ATTACKER
                )
                assert said == "LimitExceeded"
                assert time.monotonic() - begin < 1
            for raw in raws.values():
                raw.close()
        assert daemon.log.count("(CLOSE); its worker is killed") == MAXIMUM_STUCK_PER_OWNER
        begin = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - begin < 2
        assert {state_of(pid) for pid in stuck} == {"D"}
        begin = time.monotonic()
        daemon.launch()
        with neighbour(daemon, image):
            assert time.monotonic() - begin < 3
            assert error(ask(daemon, GET_INFO, uid=ATTACKER)) == ""
        fuse.abort()
        assert eventually(lambda: {state_of(pid) for pid in stuck} <= {"X", "Z"})


def test_a15_sigterm_while_requests_hang_within_their_deadlines(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path
) -> None:
    """Who has been answered is not waited for, however much time its worker has left."""
    image = images["erofs"]
    daemon = start(trusting(image.parent), start_new_session=True)
    with contextlib.ExitStack() as stack:
        fuse = stack.enter_context(Fuse(place / "fuse", image.read_bytes()))
        fuse.silence(Op.FLUSH, session=daemon.process.pid)
        fds = stack.enter_context(opened(fuse.path))
        for _ in range(4):
            raw = stack.enter_context(Raw(daemon, ATTACKER))
            raw.send(mount_call(), fds)
            assert error(raw.reply()) == "BadFileDescriptor"
        assert eventually(lambda: len(daemon.workers) >= 4)
        begin = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - begin < 2
        fuse.abort()


def test_a13_server_dies_and_the_slot_is_free_again(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path
) -> None:
    """A close that hangs for less than its deadline costs nobody anything; the worker goes on."""
    daemon = start(trusting(images["erofs"].parent), start_new_session=True)
    with Fuse(place / "fuse", images["erofs"].read_bytes()) as fuse, opened(fuse.path) as fds:
        before, workers = settled(daemon), daemon.workers
        fuse.silence(Op.FLUSH, session=daemon.process.pid)
        with neighbour(daemon, images["erofs"]), Raw(daemon, ATTACKER) as raw:
            raw.send(mount_call(), fds)
            assert error(raw.reply()) == "BadFileDescriptor"
            # The reply is there, and the connection goes on, while the worker waits for its close.
            raw.send(GET_INFO)
            assert error(raw.reply()) == ""
            time.sleep(0.2)
        fuse.abort()
        assert eventually(lambda: daemon.held() == before)
        assert set(workers) <= set(daemon.workers)


def test_a13_fuse_file_as_the_user_namespace(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path
) -> None:
    """Not even the question what kind of namespace it is goes to the server."""
    daemon = start(trusting(images["erofs"].parent), start_new_session=True)
    content = images["erofs"].read_bytes()
    with Fuse(place / "fuse", content) as fuse, opened(images["erofs"], fuse.path) as fds:
        fuse.silence(Op.IOCTL, Op.GETATTR, session=daemon.process.pid)
        with neighbour(daemon, images["erofs"]), Raw(daemon, timeout=2) as raw:
            raw.send(mount_call(userNamespaceFileDescriptor=1), fds)
            assert error(raw.reply()) == "BadFileDescriptor"


@pytest.mark.parametrize("bytes_sent", [0, 1, 40, None])
def test_a18_caller_closes_without_waiting(
    daemon: Daemon, images: dict[str, Path], bytes_sent: int | None
) -> None:
    with opened(images["ext4"]) as fds, neighbour(daemon, images["erofs"]):
        for _ in range(20):
            with Raw(daemon) as raw:
                data = mount_call()[:bytes_sent]
                if data:
                    raw.send(data, fds)
