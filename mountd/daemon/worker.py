"""A worker: receives a connection, serves one request on it, gives it back.

It is the only kind of process that receives a client's bytes and descriptors, so it is the one that may hang
and be killed. It says what it is doing on the board; the listener measures.
"""

from __future__ import annotations

import os
import select
import socket
import time
import traceback
from typing import TYPE_CHECKING

from mountd.daemon import channel
from mountd.daemon.channel import Entrance, Word
from mountd.daemon.counters import DONE
from mountd.daemon.journal import MAXIMUM_LINE, REQUEST_ID, WORKER_ID, Priority, log, one_line
from mountd.daemon.limits import (
    DEADLINES,
    LINGER_MILLISECONDS,
    REAPING_SECONDS,
    REQUESTS_IN_A_ROW,
    REQUESTS_PER_WORKER,
    SECONDS_OF_WORKER,
)
from mountd.daemon.transport import DescriptorsLost, has_sent, read_message
from mountd.errors import MountdError, PeerGone, TimedOut, bug
from mountd.fds import close_all
from mountd.kernel import sockets
from mountd.kernel.child import hanging
from mountd.ledger.live import in_use
from mountd.service.context import PolicyInForce, RequestContext
from mountd.service.conversation import Conversation
from mountd.service.mountfs_errors import in_their_words
from mountd.service.phase import Phase
from mountd.trust.policy import Verdict
from mountd.wire.framing import encode, error_body, shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mountd.caller.identify import OwnerKey
    from mountd.daemon.counters import Tally
    from mountd.daemon.throttle import Throttle
    from mountd.execute.seal import NoSeal, Seal
    from mountd.fds import OwnedFd
    from mountd.ledger.book import Book
    from mountd.service.attachments import Attachments
    from mountd.service.context import Around, Enter
    from mountd.store.store import Store
    from mountd.wire.answer import Failure
    from mountd.wire.dispatch import Dispatcher
    from mountd.wire.framing import Message

SECRET = "password"  # a parameter of Mount, Attach and MountImage


class Worker:
    """Serves requests until it is told to end, or has served enough."""

    def __init__(
        self,
        own: socket.socket,
        enter: Enter,
        dispatchers: Mapping[Entrance, Dispatcher],
        policy: PolicyInForce,
        seal: Seal | NoSeal,
        store: Store | None,
        throttle: Throttle,
        pull_socket: Path | None = None,
        attachments: Attachments | None = None,
        tally: Tally | None = None,
        around: Around | None = None,
        ledger: Book | None = None,
        questions: Path | None = None,
    ) -> None:
        """`own` is the socket to the listener; `enter` writes this worker's row of the board.

        `tally` is this worker's row of the counters.
        """
        self._own = own
        self._enter = enter
        self._dispatchers = dispatchers
        self._policy = policy
        self._seal = seal
        self._store = store
        self._pull_socket = pull_socket
        self._attachments = attachments
        self._questions = questions
        self._throttle = throttle
        self._tally = tally
        self._around = around
        self._ledger = ledger
        self._healthy = True
        self._may_linger = False  # after the last request
        self._served = 0
        self._entrance = Entrance.OWN  # of the connection that is served
        self._owner: OwnerKey = (0, 0)  # who pays for it
        self._left_over: list[OwnedFd] = []

    def run(self) -> None:
        """Serve. Returns when the listener has closed the socket, or after the last request.

        A connection is given back before anything is cleaned up: that can take as long as a hostile server
        likes, and only this worker waits for it.
        """
        end = time.monotonic() + SECONDS_OF_WORKER
        going_on = True
        try:
            while going_on:
                while not channel.wait(self._own, self._seconds_of_waiting()):
                    self._look_after_kept()
                request = channel.next_request(self._own)
                if request is None:
                    return
                fd, self._entrance, self._owner = request.fd.take(), request.entrance, request.owner
                with (
                    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd) as connection,
                    Conversation(connection, request.namespace) as held,
                ):
                    keep = self._serve_in_a_row(held)
                self._enter(Phase.CLOSE)
                channel.tell(self._own, Word.ANSWERED, keep)
                self._clean_up()
                self._enter(Phase.IDLE)
                young = self._served < REQUESTS_PER_WORKER and time.monotonic() < end
                going_on = self._healthy and young
                channel.tell(self._own, Word.FREE, going_on)
        except ConnectionError:
            return  # the daemon has ended

    def _look_after_kept(self) -> None:
        """Let go of what is kept for whoever asks for the same again, and is not in use any more."""
        due = self._seal.due()
        if due:
            devices = set().union(*due.values())
            used = set() if self._ledger is None else in_use(self._ledger, devices)
            self._seal.settle(due, [name for name in due if due[name] & used])

    def _seconds_of_waiting(self) -> float | None:
        """Return how long there is nothing to do but to wait for a request, None for until there is one.

        Children that hung and have ended are reaped: no other request may come for which that is done.
        """
        left = self._seal.seconds_left()
        if not hanging():
            return left
        return REAPING_SECONDS if left is None else min(left, REAPING_SECONDS)

    def _serve_in_a_row(self, held: Conversation) -> bool:
        """Serve a request and those that follow at once; return whether the connection can have another.

        Who asks for several mounts one after the other finds the worker still there: handing the connection
        back and forth takes as long as a mount.
        """
        poller = select.poll()
        poller.register(held.peer.connection, select.POLLIN)
        # It closes when this worker is to end, such as for a new policy.
        poller.register(self._own, select.POLLIN)
        for _ in range(REQUESTS_IN_A_ROW):
            if not self._serve(held):
                return False
            if not self._may_linger:
                return True
            self._enter(Phase.IDLE)
            ready = [fd for fd, _ in poller.poll(LINGER_MILLISECONDS)]
            if ready != [held.peer.connection.fileno()]:
                return True
        return True

    def _serve(self, held: Conversation) -> bool:
        """Serve one request; return whether the connection can have another."""
        connection = held.peer.connection
        if not has_sent(connection):
            return False  # it has left: to be in READ is to owe somebody an answer
        self._served += 1
        self._enter(Phase.READ)
        try:
            message = read_message(connection, time.monotonic() + DEADLINES[Phase.READ])
        except TimeoutError:
            self._refuse(connection, TimedOut(DEADLINES[Phase.READ]))
            return False
        except MountdError as error:
            self._healthy = not isinstance(error, DescriptorsLost)
            self._refuse(connection, error)
            return False
        except OSError:
            return False
        if message is None:
            return False
        return self._answer(held, message)

    def _answer(self, held: Conversation, message: Message) -> bool:
        """Dispatch and reply; return whether the peer has taken the reply."""
        connection = held.peer.connection
        context = RequestContext(
            held.peer,
            self._policy,
            self._seal,
            self._enter,
            store=self._store,
            pull_socket=self._pull_socket,
            walker=held.walker,
            naming=self._seal.naming,
            attachments=self._attachments,
            around=self._around,
            ledger=self._ledger,
            questions=self._questions,
            called_off=self._own.fileno(),
        )
        parameters = message.body.get("parameters")
        if isinstance(parameters, dict) and SECRET in parameters:
            # What has held a password ends with this request, and its memory with it: it serves nobody else.
            self._healthy = False
        begin = time.monotonic()
        if self._tally is not None:
            self._tally.begin(str(message.body.get("method")))
        try:
            reply, fds, failure = self._dispatchers[self._entrance].handle(
                message, context, lambda data: send_ahead(connection, data)
            )
            if self._tally is not None:
                # Before the answer: who asks for the counters after it finds it there.
                result = failure.name if failure is not None else context.verdict or DONE
                self._tally.count(result, time.monotonic() - begin)
            try:
                taken = self._send(connection, reply, fds)
            finally:
                # At once: whoever has attached the mount may want to detach it in a moment.
                close_all(fds)
        finally:
            self._left_over += message.fds
            message.fds = []
        self._note(message, context, failure, time.monotonic() - begin, taken)
        # What was refused may hang when it is closed; what can be written to has to be on disk once the
        # caller has detached it, and the spot holds it until it is cleared.
        self._may_linger = self._healthy and failure is None and not context.writable
        return taken

    def _clean_up(self) -> None:
        """Let go of everything that the last requests have left."""
        self._seal.clear()
        self._look_after_kept()
        if self._ledger is not None:
            self._ledger.collect()
        if self._attachments is not None:
            self._attachments.tidy()
        close_all(self._left_over)

    def _send(self, connection: socket.socket, reply: bytes, fds: list[OwnedFd]) -> bool:
        self._enter(Phase.REPLY)
        try:
            sockets.send(connection, reply, fds, time.monotonic() + DEADLINES[Phase.REPLY])
        except OSError:
            return False
        return True

    def _refuse(self, connection: socket.socket, error: MountdError) -> None:
        """Answer what is no request; who sent it may not listen."""
        if self._tally is not None:
            self._tally.begin("")
            self._tally.count(error.wire_name.rpartition(".")[2], 0.0)
        said = in_their_words(error) if self._entrance is Entrance.MOUNT_FILE_SYSTEM else error
        self._send(connection, encode(error_body(said), is_reply=True), [])
        uid = sockets.peer_credentials(connection).uid
        if not self._throttle.may_write(self._owner):
            return
        log(
            Priority.NOTICE,
            f"refused what is no request: {error}",
            message_id=REQUEST_ID,
            error=error.wire_name,
            error_text=one_line(str(error), MAXIMUM_LINE),
            caller_uid=str(uid),
        )

    def _note(
        self,
        message: Message,
        context: RequestContext,
        failure: Failure | None,
        seconds: float,
        taken: bool,
    ) -> None:
        """Write the journal's line about a request that the policy had a say in, or that was refused.

        Why it was refused is not why the policy has decided as it did: that may have allowed it.
        """
        notes = context.fields()
        if "caller_uid" not in notes:
            if failure is None:
                return  # nothing but a question about the interfaces
            peer = sockets.peer_credentials(context.peer.connection)
            notes |= {"caller_uid": str(peer.uid), "caller_gid": str(peer.gid), "caller_pid": str(peer.pid)}
        if not self._throttle.may_write(self._owner):
            return
        method = shown(str(message.body.get("method")).rpartition(".")[2])
        outcome = notes.get("verdict", "done") if failure is None else f"refused with {failure.name}"
        if not taken:
            outcome += ", and the caller did not take the answer"
        if "rule" in notes and (failure is None or notes.get("verdict") != Verdict.ALLOW.value):
            outcome += f" by rule “{notes['rule']}”"
        if failure is not None:
            notes["error_text"] = one_line(failure.text, MAXIMUM_LINE)
            outcome += f": {notes['error_text']}"
        log(
            Priority.INFO if failure is None else Priority.NOTICE,
            f"{method} for uid {notes['caller_uid']} (pid {notes['caller_pid']}): {outcome}",
            message_id=REQUEST_ID,
            method=method,
            error="" if failure is None else failure.name,
            duration_usec=str(int(seconds * 1e6)),
            **notes,
        )


def send_ahead(connection: socket.socket, reply: bytes) -> None:
    """Send a reply that others follow, or leave it out while the peer does not read: nobody waits for it.

    The kernel says that there is room only if three quarters of the buffer are free, so that it takes all of
    such a short message. Raises PeerGone.
    """
    poller = select.poll()
    poller.register(connection, select.POLLOUT)
    events = dict(poller.poll(0)).get(connection.fileno(), 0)
    if events & (select.POLLHUP | select.POLLERR):
        raise PeerGone("it has closed the connection")
    if events & select.POLLOUT:
        try:
            sockets.send(connection, reply, [], time.monotonic() + DEADLINES[Phase.REPLY])
        except OSError:
            raise PeerGone("it takes no replies") from None


def report_bug(error: Exception) -> None:
    """Put the traceback of a bug into the journal."""
    text = "".join(traceback.format_exception(error))
    log(
        Priority.ERROR,
        f"internal error: {bug(error)}",
        message_id=WORKER_ID,
        traceback=text,
        pid=str(os.getpid()),
    )
