"""The workers as the listener has them: which are free, what each is serving, and until when.

A worker that is past the deadline of its phase is killed and its caller answered. One that does not die
hangs in the kernel: its slot stays taken and is charged to the owner whose request it was, until it is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mountd.daemon import channel
from mountd.daemon.channel import Word
from mountd.daemon.counters import Figure, Slot
from mountd.daemon.journal import WORKER_ID, Priority, log
from mountd.daemon.limits import (
    DEADLINES,
    GRACE_SECONDS,
    HANGS_SECONDS,
    IDLE_WORKER_SECONDS,
    MAXIMUM_STUCK,
    MAXIMUM_WORKERS,
    MINIMUM_WORKERS,
    PAUSE_SECONDS,
    SECONDS_TO_DIE,
    SLOTS,
)
from mountd.daemon.throttle import Throttle
from mountd.errors import MountFailed, TimedOut
from mountd.fds import OwnedFd
from mountd.kernel import sockets
from mountd.service.phase import Phase

if TYPE_CHECKING:
    from mountd.daemon.board import Board
    from mountd.daemon.connection import Connection
    from mountd.daemon.counters import Counters
    from mountd.daemon.owners import Owner
    from mountd.errors import MountdError

    # A connection that has had its last request, and what to tell it.
    Ended = tuple[Connection, MountdError | None]


# There is an answer in these, or a part of one: in IDLE a worker waits a moment for the next request.
ANSWERED = (Phase.REPLY, Phase.CLOSE, Phase.IDLE)


class Worker:
    """One worker process: what it is serving, and what has become of it."""

    __slots__ = (
        "channel",
        "charged",
        "connection",
        "free_since",
        "killed_at",
        "owner",
        "pidfd",
        "retiring",
        "slot",
    )

    def __init__(self, slot: int, channel_fd: OwnedFd, pidfd: OwnedFd) -> None:
        """Take the descriptors over."""
        self.slot = slot
        self.channel = socket.socket(fileno=channel_fd.take())
        self.channel.setblocking(False)
        self.pidfd = pidfd
        self.connection: Connection | None = None
        self.owner: Owner | None = None
        self.free_since = time.monotonic()
        self.killed_at: float | None = None
        self.charged = False
        self.retiring = False

    def close(self) -> None:
        """Close the descriptors; a worker that waits for a request ends by that."""
        self.channel.close()
        self.pidfd.close()


class Pool:
    """All workers, by slot, and the orders to the fork server."""

    def __init__(self, control: socket.socket, board: Board, counters: Counters) -> None:
        """`control` leads to the fork server."""
        self._control = control
        self._board = board
        self._counters = counters
        self.workers: dict[int, Worker] = {}
        self._starting: set[int] = set()
        self.throttle = Throttle()  # of the lines about each owner
        self._not_before = 0.0  # time.monotonic() when another may be started, after one could not be
        self.changed = True  # a worker has come, gone or is to go: `fill` and `close_retired` have to look

    @property
    def serving(self) -> int:
        """How many requests are being served."""
        return sum(w.owner is not None and w.killed_at is None for w in self.workers.values())

    @property
    def asking(self) -> int:
        """How many of them wait for what a person says. Others need not wait for that (service/consent)."""
        return sum(self._asks(w) for w in self.workers.values())

    def _asks(self, worker: Worker) -> bool:
        serves = worker.owner is not None and worker.killed_at is None
        return serves and self._board.read(worker.slot)[0] is Phase.CONSENT

    @property
    def stuck(self) -> int:
        """How many were killed and do not die."""
        return sum(worker.charged for worker in self.workers.values())

    @property
    def has_spare(self) -> bool:
        """Whether there are more workers than are kept ready."""
        return len(self.workers) > MINIMUM_WORKERS

    def free(self) -> Worker | None:
        """Return a worker that can take a request: the one that was used last, so that others can go."""
        ready = [
            w for w in self.workers.values() if w.owner is None and not w.retiring and w.killed_at is None
        ]
        return max(ready, key=lambda worker: worker.free_since, default=None)

    @property
    def crowded(self) -> bool:
        """Whether as many requests are being served as usual, so that more are an exception.

        So they are when what is being served could bring what hangs to more than may, by hanging as well.
        """
        serving = self.serving
        if serving + self._killed >= MAXIMUM_STUCK:
            return True
        return serving >= MAXIMUM_WORKERS and serving - self.asking >= MAXIMUM_WORKERS

    @property
    def exhausted(self) -> bool:
        """Whether every slot has a worker that was killed and is not gone: nobody can be served."""
        return self._killed >= SLOTS

    @property
    def _killed(self) -> int:
        return sum(worker.killed_at is not None for worker in self.workers.values())

    def fill(self, waiting: int, idle_owners: int) -> None:
        """Start as many workers as are needed for `waiting` requests.

        Beyond the usual number there is one for each of `idle_owners`, who have nothing running: others
        cannot make them wait by being slow.
        """
        if time.monotonic() < self._not_before:
            self.changed = True  # still to be looked at, by then
            return
        alive = [w for w in self.workers.values() if w.killed_at is None and not w.retiring]
        busy = sum(worker.owner is not None for worker in alive)
        most = MAXIMUM_WORKERS + self.asking if busy >= MAXIMUM_WORKERS else MAXIMUM_WORKERS
        usual = min(most, max(MINIMUM_WORKERS, busy + waiting))
        wanted = max(usual, min(busy + idle_owners, SLOTS))
        for _ in range(wanted - len(alive) - len(self._starting)):
            slot = next((s for s in range(SLOTS) if s not in self.workers and s not in self._starting), None)
            if slot is None:
                return
            try:
                channel.tell(self._control, Word.SPAWN, slot)
            except ConnectionError:
                return  # the fork server has ended, which the listener is about to hear
            self._starting.add(slot)

    def not_spawned(self, slot: int) -> None:
        """Take note that no worker could be started in `slot`; what is lacking is not there at once."""
        self._starting.discard(slot)
        self._not_before = time.monotonic() + PAUSE_SECONDS
        self.changed = True

    def spawned(self, slot: int, fds: list[OwnedFd]) -> Worker:
        """Take a new worker in. Its descriptors are moved out of `fds`."""
        self._starting.discard(slot)
        self.changed = True
        worker = Worker(slot, fds.pop(0), fds.pop(0))
        self.workers[slot] = worker
        self._counters.add(Figure.FORKS)
        self._counters.set_slot(slot, Slot.IDLE)
        return worker

    def gone(self, worker: Worker) -> Ended | None:
        """Forget a worker whose process is no more; return the connection that it leaves unanswered."""
        del self.workers[worker.slot]
        self._counters.set_slot(worker.slot, Slot.NONE)
        self.changed = True
        if worker.charged and worker.owner is not None:
            worker.owner.stuck -= 1
        elif worker.owner is not None:
            worker.owner.running -= 1
        worker.close()
        if worker.connection is None:
            return None
        # Another answer would be taken for that to the next request.
        answered = self._board.read(worker.slot)[0] in ANSWERED
        if answered:
            return worker.connection, None
        failure = MountFailed("serving the request: its process ended", "EIO")
        self._counters.count_for(worker.slot, failure.wire_name)
        return worker.connection, failure

    def assign(self, worker: Worker, connection: Connection) -> None:
        """Hand a connection to a free worker. Raises OSError if the worker has ended."""
        # From here on, not from when the worker wakes up: it may never.
        self._board.enter(worker.slot, Phase.READ)
        self._counters.set_slot(worker.slot, Slot.BUSY)
        try:
            with OwnedFd(_duplicate(connection.fileno())) as theirs:
                owner = connection.owner.key
                request = channel.REQUEST.pack(*connection.namespace, *owner, connection.entrance)
                sockets.send(worker.channel, request, [theirs])
        except OSError:
            self._counters.set_slot(worker.slot, Slot.IDLE)
            raise
        worker.connection, worker.owner = connection, connection.owner
        connection.owner.running += 1

    def freed(self, worker: Worker, goes_on: bool) -> None:
        """Take note that a worker has nothing to do any more."""
        if worker.owner is not None and worker.killed_at is None:
            worker.owner.running -= 1
            worker.owner = None
            self._counters.set_slot(worker.slot, Slot.IDLE)
        worker.free_since = time.monotonic()
        worker.retiring = worker.retiring or not goes_on
        self.changed = self.changed or worker.retiring

    def retire_all(self) -> None:
        """Have every worker end: at once if it waits, after its request otherwise."""
        for worker in self.workers.values():
            worker.retiring = True
            _let_go(worker)
        self.changed = True

    def call_questions_off(self) -> None:
        """Have those that wait for what a person says wait no longer: the daemon is to end."""
        for worker in self.workers.values():
            if self._asks(worker):
                _let_go(worker)

    def close_retired(self) -> None:
        """Let workers go that are retiring and free, and those that nobody has needed for a while."""
        now = time.monotonic()
        free = [w for w in self.workers.values() if w.owner is None and w.killed_at is None]
        spare = len([w for w in free if not w.retiring]) - MINIMUM_WORKERS
        for worker in sorted(free, key=lambda w: w.free_since):
            if not worker.retiring and spare > 0 and now - worker.free_since > IDLE_WORKER_SECONDS:
                worker.retiring = True
                spare -= 1
            if worker.retiring:
                _let_go(worker)

    def next_deadline(self) -> float | None:
        """Return the time.monotonic() at which `enforce` or `fill` has to look again."""
        times = [self._not_before] if self._not_before > time.monotonic() else []
        for worker in self.workers.values():
            if worker.killed_at is not None:
                if not worker.charged:
                    times.append(worker.killed_at + SECONDS_TO_DIE)
            elif worker.owner is not None:
                _, since, seconds = self._phase(worker)
                times.append(since + seconds + GRACE_SECONDS)
        return min(times, default=None)

    def enforce(self, *, draining: bool = False) -> list[Ended]:
        """Kill what is past its deadline, charge what does not die; return the connections to drop.

        When `draining`, who has been answered is not waited for, nor is what sleeps in the kernel for long
        and cannot be woken.
        """
        now = time.monotonic()
        dropped: list[Ended] = []
        for worker in self.workers.values():
            if worker.killed_at is not None:
                if not worker.charged and now >= worker.killed_at + SECONDS_TO_DIE:
                    self._charge(worker)
            elif worker.owner is not None:
                phase, since, seconds = self._phase(worker)
                hangs = draining and now >= since + HANGS_SECONDS and _waits_for_nobody(worker, phase)
                if hangs or now >= since + seconds + GRACE_SECONDS:
                    dropped += self._give_up(worker, phase, int(now - since) if hangs else seconds)
        return dropped

    def _phase(self, worker: Worker) -> tuple[Phase, float, int]:
        """Return what a worker is doing, since when, and for how many seconds it may."""
        phase, since, seconds = self._board.read(worker.slot)
        return phase, since, seconds or DEADLINES.get(phase, DEADLINES[Phase.CLOSE])

    def _give_up(self, worker: Worker, phase: Phase, seconds: int) -> list[Ended]:
        connection, worker.connection = worker.connection, None
        worker.killed_at = time.monotonic()
        self._counters.add(Figure.KILLED)
        self._counters.set_slot(worker.slot, Slot.KILLED)
        self.changed = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(worker.pidfd.fileno(), signal.SIGKILL)
        if worker.owner is not None and self.throttle.may_write(worker.owner.key):
            uid = worker.owner.uid
            log(
                Priority.WARNING,
                f"a request of uid {uid} takes longer than {seconds} s ({phase.name}); its worker is killed",
                message_id=WORKER_ID,
                owner_uid=str(uid),
                phase=phase.name,
            )
        if connection is None:
            return []
        if phase in ANSWERED:
            return [(connection, None)]
        self._counters.count_for(worker.slot, TimedOut.wire_name)
        return [(connection, TimedOut(seconds))]

    def _charge(self, worker: Worker) -> None:
        worker.charged = True
        self._counters.set_slot(worker.slot, Slot.STUCK)
        if worker.owner is not None:
            worker.owner.running -= 1
            worker.owner.stuck += 1


def _let_go(worker: Worker) -> None:
    """Let a worker find no further request; what it has begun it ends."""
    with contextlib.suppress(OSError):
        worker.channel.shutdown(socket.SHUT_WR)


def _waits_for_nobody(worker: Worker, phase: Phase) -> bool:
    """Tell whether no caller can gain anything from waiting for a worker."""
    return phase is Phase.CLOSE or _sleeps(worker.pidfd.fileno())


def _sleeps(pidfd: int) -> bool:
    """Tell whether a process waits in the kernel for what no signal interrupts (state D in proc(5))."""
    try:
        fdinfo = Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="utf-8")
        pid = next(line.split()[1] for line in fdinfo.splitlines() if line.startswith("Pid:"))
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, StopIteration):
        return False
    return stat.rpartition(")")[2].split()[0] == "D"


def _duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
