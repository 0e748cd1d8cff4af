"""The fork server: has everything imported, stages mounts, and forks workers that start in a millisecond.

It never touches a client. It lives in a mount namespace of its own, which the workers share, and makes the
sealer. When a worker has ended, the children that it has left are killed, and its staging spot is cleared
before the slot is used again: one that hangs in the kernel keeps the slot, and stays charged to the owner of
the request. It ends when the listener closes its socket.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mountd.daemon import channel, journal
from mountd.daemon.around import Daemon, Facts, report
from mountd.daemon.channel import Entrance, Word
from mountd.daemon.counters import Figure, Tally
from mountd.daemon.journal import POLICY_ID, WORKER_ID, Priority, log
from mountd.daemon.limits import MAXIMUM_MOUNTS, SHARED_SECONDS, SLOTS
from mountd.daemon.throttle import Throttle
from mountd.daemon.worker import Worker, report_bug
from mountd.errors import DeniedByPolicy, MountdError, NotSupported, SyscallError
from mountd.execute.seal import NoSeal, Staging
from mountd.fds import OwnedFd
from mountd.kernel import device_mapper, namespaces
from mountd.kernel.child import close_all_but, end_with_parent
from mountd.kernel.fuse import mount_fusectl
from mountd.kernel.libc import call, prepare_all
from mountd.ledger.book import Book
from mountd.service import signatures
from mountd.service.admin import METHODS as ADMIN_METHODS
from mountd.service.attach import METHODS as ATTACH_METHODS
from mountd.service.attachments import Attachments
from mountd.service.context import PolicyInForce, PolicyOrigin
from mountd.service.detach import METHODS as DETACH_METHODS
from mountd.service.images import METHODS as IMAGE_METHODS
from mountd.service.listing import METHODS as LIST_METHODS
from mountd.service.mount import METHODS
from mountd.service.mountfs import METHODS as MOUNTFS_METHODS
from mountd.service.mountfs_errors import in_their_words
from mountd.service.pulls import FOR_OTHERS
from mountd.service.pulls import METHODS as PULL_METHODS
from mountd.service.revoke import METHODS as REVOKE_METHODS
from mountd.store.store import Store
from mountd.trust.policy import Policy
from mountd.trust.policy_file import Loader
from mountd.wire import rebuilding  # noqa: F401 - or each worker would, that asks another service
from mountd.wire.dispatch import Dispatcher, interface_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from mountd.daemon.board import Board
    from mountd.daemon.counters import Counters
    from mountd.service.phase import Phase
    from mountd.trust.policy_file import Loaded

PR_SET_CHILD_SUBREAPER = 36
SECONDS_TO_DROP = 0.5  # what is kept, when all ends
QUESTIONS_FILE = "questions"  # a file in the runtime directory (service/consent)
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the listener decides when it ends


@dataclass(frozen=True, slots=True)
class Places:
    """Where everything is; `pull_socket` and `attached` need not be there. `listener` is its pid.

    `shared_seconds` is for how long a mount is kept for those who ask for the same again. `watches_fd`
    and `marks_fd` are the descriptors of the ledger, which lets an owner have `maximum_mounts`.
    """

    policy_dirs: list[Path]
    staging: Path
    state_dir: Path
    pull_socket: Path
    attached: Path
    listener: int
    sockets: tuple[str, ...]
    ledger: Path
    watches_fd: int
    marks_fd: int | None
    shared_seconds: float = SHARED_SECONDS
    maximum_mounts: int = MAXIMUM_MOUNTS

    @property
    def fds(self) -> set[int]:
        """Those that are for all processes."""
        return {self.watches_fd} | ({self.marks_fd} if self.marks_fd is not None else set())


NO_SEAL = NoSeal()
# Which the varlink package answers.
QUESTIONS = ("org.varlink.service.GetInfo", "org.varlink.service.GetInterfaceDescription")


class ForkServer:
    """One instance for the life of the process."""

    def __init__(
        self,
        control: socket.socket,
        board: Board,
        counters: Counters,
        places: Places,
        *,
        only_pull: bool = False,
    ) -> None:
        """`control` leads to the listener; `only_pull` is whether nothing but pulls is served.

        Raises SyscallError, NotSupported, OSError.
        """
        self._control = control
        self._board = board
        self._counters = counters
        self._facts = Facts(places.listener, places.sockets, places.state_dir)
        self._policy_dirs = places.policy_dirs
        self._places = places
        self._pull_socket = None if only_pull else places.pull_socket
        self._attachments = None if only_pull else Attachments(places.attached)
        self._questions = None if only_pull else places.staging.with_name(QUESTIONS_FILE)
        others = {
            **METHODS,
            **LIST_METHODS,
            **ATTACH_METHODS,
            **DETACH_METHODS,
            **IMAGE_METHODS,
            **PULL_METHODS,
        }
        methods = {**(FOR_OTHERS if only_pull else others), **ADMIN_METHODS, **REVOKE_METHODS}
        theirs = {} if only_pull else MOUNTFS_METHODS
        counters.name_methods([*methods, *theirs, *QUESTIONS])
        self._dispatchers = {Entrance.OWN: Dispatcher(interface_directory(), methods, report_bug)}
        self._dispatchers[Entrance.MOUNT_FILE_SYSTEM] = Dispatcher(
            interface_directory(), theirs, report_bug, in_their_words
        )
        namespaces.pidfd_open(os.getpid()).close()  # where that is not possible, nothing is
        self._policy = self._first_policy()
        self._store = open_store(places.state_dir)
        self._throttle = Throttle()
        # Each worker and each cleaner leads a process group, which its own children are in, too.
        self._groups: dict[int, int] = {}  # -> slot
        self._cleaners: set[int] = set()
        self._killed: set[int] = set()  # workers that had no time to clear their spot
        self._hidden: frozenset[int] = frozenset()
        # What pulls makes no mounts, and need not be able to.
        self._staging = None if only_pull else Staging(str(places.staging), SLOTS, places.shared_seconds)
        if not only_pull:
            self._hidden = self._staging_namespaces()
            signatures.prepare()
            remove_unused_devices()
            mount_fusectl()

    def run(self) -> None:
        """Obey until the listener closes the socket."""
        woken, wake = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        woken.setblocking(False)
        wake.setblocking(False)
        call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        prepare_all()
        gc.collect()
        gc.freeze()
        channel.tell(self._control, Word.READY)
        try:
            self._serve(woken)
        finally:
            signal.set_wakeup_fd(-1)  # children may end later than the socket
            if self._staging is not None:
                self._keep_nothing(self._staging)

    def _serve(self, woken: socket.socket) -> None:
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(woken, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if woken.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    woken.recv(4096)
                self._reap()
            if self._control.fileno() in ready:
                heard = channel.hear(self._control)
                if heard is None:
                    return
                self._obey(heard[0], heard[1])

    def _obey(self, word: Word, number: int) -> None:
        if word is Word.SPAWN:
            try:
                self._spawn(number)
            except OSError as error:
                log(Priority.ERROR, f"cannot start a worker: {error}", message_id=WORKER_ID)
                channel.tell(self._control, Word.GONE, number)
        elif word is Word.RELOAD:
            self._reload()

    def _reload(self) -> None:
        """Read the policy; one with faults leaves the old one in force."""
        loaded = Loader().load(self._policy_dirs)
        if not loaded.problems:
            self._policy = PolicyInForce(loaded.policy, None, self._origin(loaded))
            word = Word.RELOADED
        else:
            if self._policy.origin is not None:
                origin = replace(self._policy.origin, faults=loaded.problems)
                self._policy = PolicyInForce(self._policy.policy, self._policy.refusal, origin)
            word = Word.NOT_RELOADED
        channel.tell(self._control, word, len(loaded.policy.rules), report(loaded))

    def _first_policy(self) -> PolicyInForce:
        """Load the policy; a broken one denies everything, and says so to whoever asks."""
        loaded = Loader().load(self._policy_dirs)
        origin = self._origin(loaded)
        if not loaded.problems:
            return PolicyInForce(loaded.policy, None, origin)
        log(
            Priority.ERROR,
            f"the policy is broken, everything is denied: {loaded.problems[0]}",
            message_id=POLICY_ID,
        )
        refusal = DeniedByPolicy(
            "the system's policy is broken", hint="an administrator finds the reason in the journal"
        )
        return PolicyInForce(Policy(()), refusal, origin)

    def _origin(self, loaded: Loaded) -> PolicyOrigin:
        """Take note of a policy that is in force from now on."""
        self._counters.add(Figure.GENERATION)
        generation, now = self._counters.get(Figure.GENERATION), int(time.time())
        return PolicyOrigin(loaded, tuple(self._policy_dirs), generation, now, loaded.problems)

    def _spawn(self, slot: int) -> None:
        """Fork a worker for `slot` and tell the listener how to reach it. Raises OSError."""
        ours, theirs = channel.pair()
        with ours, theirs, OwnedFd(fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, 3)) as end:
            pid = os.fork()
            if pid == 0:
                self._be_a_worker(slot, theirs)
            self._lead(pid, slot)
            try:
                with namespaces.pidfd_open(pid) as pidfd:
                    channel.tell(self._control, Word.SPAWNED, slot, fds=[end, pidfd])
            except OSError as error:
                # That it is gone is told once, when it has ended.
                log(Priority.ERROR, f"cannot hand over a worker: {error}", message_id=WORKER_ID)
                os.kill(pid, signal.SIGKILL)

    def _be_a_worker(self, slot: int, own: socket.socket) -> NoReturn:
        code = 1
        try:
            end_with_parent()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            seal = NO_SEAL if self._staging is None else self._staging.seal(slot)
            close_all_but({0, 1, 2, own.fileno(), *self._places.fds, *journal.descriptors, *seal.fds})
            self._board.hide_from_children()
            self._counters.hide_from_children()

            def enter(phase: Phase, seconds: int = 0) -> None:
                self._board.enter(slot, phase, seconds)

            Worker(
                own,
                enter,
                self._dispatchers,
                self._policy,
                seal,
                self._store,
                self._throttle,
                self._pull_socket,
                self._attachments,
                Tally(self._counters, slot),
                Daemon(self._counters, self._facts, own),
                self._book(),
                self._questions,
            ).run()
            code = 0
        except BaseException as error:  # noqa: BLE001 - a child of a fork has nobody to raise to
            if isinstance(error, Exception):
                report_bug(error)
        finally:
            os._exit(code)

    def _staging_namespaces(self) -> frozenset[int]:
        """Return the ids of the mount namespaces that only mountd uses; none where they have no ids."""
        if self._staging is None:
            return frozenset()
        try:
            return self._staging.namespaces()
        except NotSupported as error:
            log(Priority.WARNING, f"mounts cannot be listed: {error}", message_id=WORKER_ID)
            return frozenset()

    def _book(self) -> Book | None:
        """Return the ledger, for a worker."""
        if self._staging is None:
            return None
        places = self._places
        return Book(
            str(places.ledger),
            places.watches_fd,
            places.marks_fd,
            places.maximum_mounts,
            self._hidden,
            tuple if self._attachments is None else self._attachments.all,
        )

    def _lead(self, pid: int, slot: int) -> None:
        """Make a child the leader of its process group, which `slot` belongs to."""
        os.setpgid(pid, pid)
        self._groups[pid] = slot

    def _reap(self) -> None:
        """Take note of the children that have ended."""
        with contextlib.suppress(ChildProcessError):
            # Looked at first, so that its number is still its own when its group is killed.
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                pid = ended.si_pid
                group = os.getpgid(pid)
                if pid in self._groups:
                    os.killpg(group, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                if status and pid in self._groups and pid not in self._cleaners:
                    self._killed.add(pid)
                if group in self._groups and not any_child_in(group):
                    self._group_has_ended(group)

    def _group_has_ended(self, group: int) -> None:
        """Clear the spot of a worker that was killed; free the slot otherwise."""
        slot = self._groups.pop(group)
        self._cleaners.discard(group)
        killed = group in self._killed
        self._killed.discard(group)
        if killed and self._staging is not None:
            self._clean(slot, self._staging, group)
        else:
            channel.tell(self._control, Word.GONE, slot)

    @staticmethod
    def _keep_nothing(staging: Staging) -> None:
        """Let a child take away what is kept, and wait for it, but not if dropping a file system hangs.

        The kernel does that as well, some time after the last process has ended.
        """
        pid = os.fork()
        if pid == 0:
            try:
                staging.keep_nothing()
            finally:
                os._exit(0)
        deadline = time.monotonic() + SECONDS_TO_DROP
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.005)

    def _clean(self, slot: int, staging: Staging, worker: int) -> None:
        """Let a child detach what a killed worker has left: dropping a file system can take its time."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                end_with_parent()
                staging.clean(slot)
                remove_unused_devices(worker)
                code = 0
            finally:
                os._exit(code)
        self._lead(pid, slot)
        self._cleaners.add(pid)


def serve(
    control: socket.socket, board: Board, counters: Counters, places: Places, *, only_pull: bool
) -> NoReturn:
    """Be the fork server: for the child of a fork of the listener. Never returns."""
    code = 1
    try:
        end_with_parent()
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        close_all_but({0, 1, 2, control.fileno(), *places.fds, *journal.descriptors})
        attempt(lambda: ForkServer(control, board, counters, places, only_pull=only_pull), control).run()
        code = 0
    except ConnectionError:
        code = 0  # the listener has ended
    except SystemExit as reason:
        log(Priority.ERROR, f"the fork server ends: {reason.code}", message_id=WORKER_ID)
    except BaseException as error:  # noqa: BLE001 - a child of a fork has nobody to raise to
        if isinstance(error, Exception):
            report_bug(error)
    finally:
        os._exit(code)


def remove_unused_devices(worker: int | None = None) -> None:
    """Take away the devices of a mountd, or of a worker, that was killed before their mounts were made."""
    try:
        device_mapper.remove_unused(worker)
    except SyscallError as error:
        log(Priority.WARNING, f"cannot look for unused devices: {error}", message_id=WORKER_ID)


def attempt(start: Callable[[], ForkServer], control: socket.socket) -> ForkServer:
    """Return what `start` makes, or tell the listener in one line why it cannot be made."""
    try:
        return start()
    except (MountdError, SyscallError, OSError) as error:
        channel.tell(control, Word.FAILED, 0, str(error))
        raise SystemExit(str(error)) from None


def open_store(state_dir: Path) -> Store | None:
    """Return the store, swept; without one, the journal says why, and everything else goes on."""
    store = Store(state_dir)
    try:
        store.prepare()
    except (MountdError, SyscallError) as error:
        log(Priority.WARNING, f"there is no store for images: {state_dir}: {error}", message_id=WORKER_ID)
        return None
    return store


def any_child_in(group: int) -> bool:
    """Whether this process has a child in the process group `group`, dead or alive."""
    try:
        os.waitid(os.P_PGID, group, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
