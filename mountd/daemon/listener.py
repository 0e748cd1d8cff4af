"""The listener: accepts, knows who is there, and lets workers serve; it never reads what a client sends.

It waits for what can happen (epoll) and for the next deadline, and does one thing at a time. A connection is
either idle (watched for something to read), queued, or with a worker; the descriptor stays here all the
time, so that a caller whose worker hangs gets an answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from mountd.caller.identify import peer_namespace
from mountd.daemon import channel
from mountd.daemon.around import answer as answer_reloads
from mountd.daemon.channel import Word
from mountd.daemon.connection import Connection, answer
from mountd.daemon.counters import Figure
from mountd.daemon.journal import POLICY_ID, REQUEST_ID, Priority, log
from mountd.daemon.limits import (
    DRAIN_SECONDS,
    IDLE_CONNECTION_SECONDS,
    MAXIMUM_CONNECTIONS_PER_OWNER,
    MAXIMUM_STUCK,
    MAXIMUM_STUCK_PER_OWNER,
    PAUSE_SECONDS,
    SLOTS,
)
from mountd.daemon.owners import FairQueue
from mountd.daemon.pool import Pool, Worker
from mountd.daemon.throttle import Seldom
from mountd.errors import LimitExceeded, MountdError, MountFailed, ShuttingDown
from mountd.fds import close_all

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mountd.caller.identify import OwnerKey
    from mountd.daemon.board import Board
    from mountd.daemon.channel import Entrance
    from mountd.daemon.counters import Counters
    from mountd.fds import OwnedFd

READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT
HOUSE_KEEPING_SECONDS = 60.0
ACCEPT_AT_ONCE = 64  # before anybody else gets a turn
STUCK_HINT = "the file systems of earlier requests do not answer"
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class ForkServerGone(Exception):
    """The fork server has ended; `text` says why if it could tell."""

    def __init__(self, text: str) -> None:
        """`text` may be empty."""
        super().__init__(text)
        self.text = text


class Listener:
    """The event loop and all that it watches."""

    def __init__(
        self,
        listening: Mapping[Entrance, socket.socket],
        control: socket.socket,
        board: Board,
        counters: Counters,
        *,
        maximum_connections: int,
        idle_exit: float | None,
        notify: Callable[[str], None],
    ) -> None:
        """`listening` and `control` (to the fork server) are borrowed; `notify` is sd_notify(3)."""
        self._listening = {each.fileno(): (each, entrance) for entrance, each in listening.items()}
        self._control = control
        self._maximum_connections = maximum_connections
        self._idle_exit = idle_exit
        self._notify = notify
        self._counters = counters
        self._pool = Pool(control, board, counters)
        self._seldom = Seldom()
        self._queue = FairQueue()
        # By descriptor; those that wait for a request in the order in which they began to.
        self._connections: dict[int, Connection] = {}
        self._idle: OrderedDict[int, Connection] = OrderedDict()
        self._last_activity = time.monotonic()
        self._draining_until: float | None = None
        self._listening_paused = False
        self._listen_again = 0.0  # when it is paused
        self._reloading = False
        self._reload_again = False
        # Who asked for the reading that is going on, and for the one after it: pipes for what comes of it.
        self._asked: list[OwnedFd] = []
        self._asked_again: list[OwnedFd] = []
        self._next_house_keeping = 0.0
        self._epoll = select.epoll()
        for each in listening.values():
            each.setblocking(False)
            self._epoll.register(each, select.EPOLLIN)
        self._epoll.register(control, select.EPOLLIN)
        self._channels: dict[int, Worker] = {}
        self._woken: socket.socket | None = None

    def wake_on(self, reader: socket.socket) -> None:
        """Have `turn` return early when there is something to read, which it takes; borrowed."""
        reader.setblocking(False)
        self._woken = reader
        self._epoll.register(reader, select.EPOLLIN)

    def close(self) -> None:
        """End all connections and give up all workers."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        for worker in self._pool.workers.values():
            worker.close()
        answer_reloads(self._asked)
        answer_reloads(self._asked_again)
        self._epoll.close()

    def reload(self) -> None:
        """Have the policy read again; workers follow once it was.

        What has changed while it is being read may have been read before, so it is read once more.
        """
        if self._reloading:
            self._reload_again = True
        elif self._draining_until is None:
            self._reloading = True
            self._notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            with contextlib.suppress(ConnectionError):  # its end is noticed by the next turn
                channel.tell(self._control, Word.RELOAD)

    def drain(self) -> None:
        """Take no new request, let the running ones end, and then return from `turn` with False."""
        if self._draining_until is not None:
            return
        self._draining_until = time.monotonic() + DRAIN_SECONDS
        answer_reloads(self._asked_again)  # by their ends: nothing is read any more
        self._notify("STOPPING=1")
        if not self._listening_paused:
            self._stop_listening()
        self._pool.call_questions_off()
        for connection in self._queue.drain():
            self._refuse(connection, ShuttingDown())
        for connection in list(self._idle.values()):
            self._drop(connection)

    def turn(self, until: float) -> bool:
        """Wait for something to happen, at most until `until`, and see to it; False at the end of a drain.

        Raises ForkServerGone.
        """
        events = self._epoll.poll(max(0.0, self._next_time(until) - time.monotonic()))
        # Looked up before anything is closed: a number may be that of a new connection a moment later.
        for fd, waiting in [(fd, self._idle.get(fd)) for fd, _ in events]:
            if fd in self._listening:
                self._accept(*self._listening[fd])
            elif fd == self._control.fileno():
                self._hear()
            elif fd in self._channels:
                self._hear_worker(self._channels[fd])
            elif waiting is not None and self._idle.get(fd) is waiting:
                self._has_spoken(waiting)
            elif self._woken is not None and fd == self._woken.fileno():
                self._woken.recv(4096)
        for connection, error in self._pool.enforce(draining=self._draining_until is not None):
            self._drop(connection, error)
        self._expire()
        if self._listening_paused and time.monotonic() >= self._listen_again:
            self._resume_listening()
        if self._queue.waiting:
            self._dispatch()
        self._keep_house()
        self._counters.set(Figure.QUEUE, self._queue.waiting)
        if self._draining_until is not None:
            return self._pool.serving > 0 and time.monotonic() < self._draining_until
        return True

    @property
    def idle_long_enough(self) -> bool:
        """Whether nobody has been there for as long as it takes to end."""
        if self._idle_exit is None or self._connections or self._pool.stuck:
            return False
        return time.monotonic() - self._last_activity >= self._idle_exit

    def _next_time(self, until: float) -> float:
        times = [until, self._next_house_keeping, self._pool.next_deadline()]
        if self._idle:
            times.append(next(iter(self._idle.values())).since + IDLE_CONNECTION_SECONDS)
        if self._idle_exit is not None and not self._connections:
            times.append(self._last_activity + self._idle_exit)
        if self._listening_paused or self._draining_until is not None:
            times.append(time.monotonic() + 0.1)
        return min(each for each in times if each is not None)

    def _accept(self, listening: socket.socket, entrance: Entrance) -> None:
        """Take connections in, a few at a time."""
        if self._listening_paused:
            return  # by the other socket, a moment ago
        for _ in range(ACCEPT_AT_ONCE):
            try:
                accepted, _ = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    self._pause_listening(error)
                    return
                continue  # this one has gone already
            self._welcome(accepted, entrance)

    def _pause_listening(self, error: OSError) -> None:
        """Let them wait in the queue of the socket for a moment, or until somebody has left."""
        self._seldom.log(Priority.WARNING, f"cannot take another connection in: {error.strerror}")
        self._stop_listening()
        self._listen_again = time.monotonic() + PAUSE_SECONDS

    def _stop_listening(self) -> None:
        for fd in self._listening:
            self._epoll.unregister(fd)
        self._listening_paused = True

    def _resume_listening(self) -> None:
        if self._listening_paused and self._draining_until is None:
            for fd in self._listening:
                self._epoll.register(fd, select.EPOLLIN)
            self._listening_paused = False

    def _welcome(self, accepted: socket.socket, entrance: Entrance) -> None:
        key = None
        try:
            namespace, key = peer_namespace(accepted)
            owner = self._queue.owner(key)
            if owner.connections >= MAXIMUM_CONNECTIONS_PER_OWNER:
                raise LimitExceeded("connections of one owner", MAXIMUM_CONNECTIONS_PER_OWNER)
            if len(self._connections) >= self._maximum_connections:
                self._queue.forget_if_idle(owner)
                raise LimitExceeded("connections", self._maximum_connections, hint="try again later")
            self._epoll.register(accepted.fileno(), READABLE)
        except (MountdError, OSError) as error:
            if isinstance(error, OSError):
                error = MountFailed("taking the connection in", errno.errorcode.get(error.errno or 0, "EIO"))
            answer(accepted, error, entrance)
            accepted.close()
            self._counters.count_for(None, error.wire_name)
            self._note_refusal(key, error)
            return
        connection = Connection(accepted, namespace, owner, entrance)
        owner.connections += 1
        self._connections[connection.fileno()] = connection
        self._counters.add(Figure.ACCEPTED)
        self._counters.set(Figure.CONNECTIONS, len(self._connections))
        self._wait_for_request(connection)

    def _note_refusal(self, owner: OwnerKey | None, error: MountdError) -> None:
        """Write the journal's line about a connection that is refused, whatever would have been asked."""
        if owner is not None and self._pool.throttle.may_write(owner):
            text = f"refused a connection of uid {owner[0]}: {error}"
            named = {"owner_uid": str(owner[0]), "error": error.wire_name, "error_text": str(error)}
            log(Priority.NOTICE, text, message_id=REQUEST_ID, **named)

    def _wait_for_request(self, connection: Connection) -> None:
        connection.since = self._last_activity = time.monotonic()
        self._idle[connection.fileno()] = connection

    def _has_spoken(self, connection: Connection) -> None:
        """Have a request served, or end the connection of who has none any more: that takes no worker."""
        if connection.speaks:
            del self._idle[connection.fileno()]
            self._queue.add(connection)
        else:
            self._drop(connection)

    def _drop(self, connection: Connection, error: MountdError | None = None) -> None:
        """End a connection, after an answer if there is one to give."""
        if error is not None:
            connection.answer(error)
        fd = connection.fileno()
        # Explicitly: a worker that hangs may hold the same socket, which would keep it registered.
        self._epoll.unregister(fd)
        del self._connections[fd]
        self._counters.set(Figure.CONNECTIONS, len(self._connections))
        self._idle.pop(fd, None)
        connection.close()
        connection.owner.connections -= 1
        self._queue.forget_if_idle(connection.owner)
        self._last_activity = time.monotonic()
        self._resume_listening()

    def _refuse(self, connection: Connection, error: MountdError) -> None:
        """End a connection whose request no worker gets."""
        self._counters.count_for(None, error.wire_name)
        self._drop(connection, error)

    def _expire(self) -> None:
        """End connections that have had no request for too long."""
        limit = time.monotonic() - IDLE_CONNECTION_SECONDS
        while self._idle:
            connection = next(iter(self._idle.values()))
            if connection.since > limit:
                return
            self._drop(connection)

    def _dispatch(self) -> None:
        """Give queued connections to workers, in turns; refuse owners whose requests hang."""
        if self._pool.exhausted:
            for waiting in self._queue.drain():
                self._refuse(waiting, LimitExceeded("requests that hang", SLOTS, hint=STUCK_HINT))
        # Who has nothing that hangs does not pay for those who have.
        most_stuck = 1 if self._pool.stuck >= MAXIMUM_STUCK else MAXIMUM_STUCK_PER_OWNER
        while (worker := self._pool.free()) is not None:
            connection = self._queue.next(only_idle_owners=self._pool.crowded, most_stuck=most_stuck)
            if connection is None:
                break
            refusal = self._too_many_stuck(connection)
            if refusal is not None:
                self._refuse(connection, refusal)
                self._note_refusal(connection.owner.key, refusal)
                continue
            try:
                self._pool.assign(worker, connection)
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    name = errno.errorcode[error.errno]
                    self._refuse(connection, MountFailed("handing the request to a worker", name))
                    continue
                worker.retiring = True  # it has ended; the fork server will say so
                self._queue.add(connection)

    def _keep_house(self) -> None:
        """Have as many workers as are needed: looked at when something has changed, and now and then."""
        now = time.monotonic()
        if self._pool.changed or self._queue.waiting or now >= self._next_house_keeping:
            self._next_house_keeping = now + (1.0 if self._pool.has_spare else HOUSE_KEEPING_SECONDS)
            self._pool.changed = False
            if self._draining_until is None:
                self._pool.fill(self._queue.waiting, self._queue.idle_owners)
            self._pool.close_retired()

    def _too_many_stuck(self, connection: Connection) -> LimitExceeded | None:
        if connection.owner.stuck >= MAXIMUM_STUCK_PER_OWNER:
            return LimitExceeded("requests of one owner that hang", MAXIMUM_STUCK_PER_OWNER, hint=STUCK_HINT)
        if connection.owner.stuck and self._pool.stuck >= MAXIMUM_STUCK:
            return LimitExceeded("requests that hang", MAXIMUM_STUCK, hint=STUCK_HINT)
        return None

    def _hear_worker(self, worker: Worker) -> None:
        """See to all that a worker says: that its reply is sent, and that it is free."""
        while True:
            try:
                heard = channel.hear(worker.channel)
            except BlockingIOError:
                return
            except OSError as error:
                self._seldom.log(Priority.ERROR, f"cannot hear a worker: {error.strerror}")
                return
            if heard is None:
                # Its end; what becomes of it the fork server says.
                self._forget_channel(worker)
                return
            word, yes, _, fds = heard
            if word is Word.ASK_RELOAD:
                self._reload_for(fds)
            close_all(fds)
            if word is Word.ASK_RELOAD:
                continue
            if word is Word.FREE:
                self._pool.freed(worker, bool(yes))
            else:
                self._take_back(worker, keep=bool(yes))

    def _take_back(self, worker: Worker, *, keep: bool) -> None:
        """Wait for the next request of the connection that a worker has answered, or end it."""
        connection, worker.connection = worker.connection, None
        if connection is None:
            return  # it was given up a moment ago
        if keep and self._draining_until is None:
            self._epoll.modify(connection.fileno(), READABLE)
            self._wait_for_request(connection)
        else:
            self._drop(connection)

    def _forget_channel(self, worker: Worker) -> None:
        if self._channels.pop(worker.channel.fileno(), None) is not None:
            self._epoll.unregister(worker.channel)

    def _hear(self) -> None:
        """See to what the fork server reports. Raises ForkServerGone."""
        heard = channel.hear(self._control)
        if heard is None:
            raise ForkServerGone("")
        word, number, text, fds = heard
        if word is Word.FAILED:
            raise ForkServerGone(text)
        if word is Word.READY:
            self._notify(f"READY=1\nSTATUS=serving\nMAINPID={os.getpid()}")
        elif word is Word.SPAWNED:
            self._worker_is_there(number, fds)
        elif word is Word.GONE:
            self._worker_is_gone(number)
        elif word in (Word.RELOADED, Word.NOT_RELOADED):
            self._reloaded(word, number, text)
        close_all(fds)

    def _worker_is_there(self, slot: int, fds: list[OwnedFd]) -> None:
        if len(fds) != 2:
            # There was no descriptor left for them. By the end of its socket the worker ends, too.
            self._seldom.log(Priority.ERROR, "no descriptor left to reach a new worker")
            return
        worker = self._pool.spawned(slot, fds)
        self._channels[worker.channel.fileno()] = worker
        self._epoll.register(worker.channel, select.EPOLLIN)

    def _worker_is_gone(self, slot: int) -> None:
        worker = self._pool.workers.get(slot)
        if worker is None:
            self._pool.not_spawned(slot)
            return
        self._hear_worker(worker)  # its last words, which may not have been heard yet
        self._forget_channel(worker)
        ended = self._pool.gone(worker)
        if ended is not None:
            self._drop(*ended)
        if worker.owner is not None:
            self._queue.forget_if_idle(worker.owner)

    def _reload_for(self, fds: list[OwnedFd]) -> None:
        """Have the policy read for who waits at the other end of a pipe; a reading that is going on may
        have begun too early, so that it is the next one that counts. Moves the pipe out of `fds`.
        """
        if self._draining_until is not None or len(self._asked) + len(self._asked_again) >= SLOTS:
            return
        (self._asked_again if self._reloading else self._asked).extend(fds)
        fds.clear()
        self.reload()

    def _reloaded(self, word: Word, rules: int, text: str) -> None:
        """Take note of what came of a reading. Workers are told to go first: who has heard of the new policy
        is served by it.
        """
        self._reloading = False
        self._counters.set(Figure.RELOAD_WORKED, word is Word.RELOADED)
        self._counters.set(Figure.RELOAD, int(time.time()))
        # Also if it was refused, as workers say what is wrong with it.
        self._pool.retire_all()
        text, _, outcome = text.partition("\n")
        answer_reloads(self._asked, outcome)
        self._asked, self._asked_again = self._asked_again, self._asked
        if word is Word.RELOADED:
            log(Priority.INFO, f"the policy was reloaded: {rules} rules", message_id=POLICY_ID)
            self._notify("READY=1\nSTATUS=serving")
        else:
            log(
                Priority.ERROR,
                f"the policy was not reloaded, the old one holds: {text}",
                message_id=POLICY_ID,
            )
            self._notify("READY=1\nSTATUS=serving with the policy from before the last reload, which failed")
        if self._reload_again:
            self._reload_again = False
            self.reload()
