"""mountd(8): arguments, processes and signals around the listener."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mountd.daemon import channel
from mountd.daemon.activation import MARKS_NAME, WATCHES_NAME, StartFailure, listening_sockets
from mountd.daemon.board import Board
from mountd.daemon.channel import Entrance
from mountd.daemon.counters import Counters
from mountd.daemon.journal import WORKER_ID, Priority, log, open_journal
from mountd.daemon.limits import (
    MAXIMUM_CONNECTIONS,
    MAXIMUM_MOUNTS,
    MAXIMUM_SHARED_SECONDS,
    MOST_MOUNTS,
    SHARED_SECONDS,
    SLOTS,
    SPARE_DESCRIPTORS,
)
from mountd.daemon.listener import ForkServerGone, Listener
from mountd.daemon.needed import missing
from mountd.errors import SyscallError
from mountd.kernel import capabilities, mark, watch
from mountd.kernel.libc import call
from mountd.kernel.namespaces import PR_SET_DUMPABLE
from mountd.ledger.book import Book
from mountd.trust.directories import POLICY_DIRS
from mountd.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mountd.fds import OwnedFd

SOCKET_NAME = "io.mountd.Mount"
PULL_SOCKET_NAME = "pull"  # of the instance that pulls for this one
MAXIMUM_RESTARTS = 3  # of the fork server, within RESTART_SECONDS
RESTART_SECONDS = 10.0


def add_sockets(parser: argparse.ArgumentParser) -> None:
    """Add what says where to listen."""
    parser.add_argument(
        "--socket", metavar="PATH", help="where to listen; default: RUNTIME-DIR/io.mountd.Mount"
    )
    parser.add_argument(
        "--mountfs-socket",
        metavar="PATH",
        help="where to listen for callers of io.systemd.MountFileSystem, without systemd; default: nowhere",
    )


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="mountd", description="Mounts trusted images for callers who may not mount."
    )
    parser.add_argument("--version", action="version", version=f"mountd {VERSION}")
    add_sockets(parser)
    parser.add_argument(
        "--policy-dir",
        metavar="DIR",
        type=Path,
        action="append",
        help=f"where to read the policy from, may be repeated; default: {' '.join(map(str, POLICY_DIRS))}",
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        type=Path,
        default=Path("/var/lib/mountd"),
        help="where the store for images is; default: /var/lib/mountd",
    )
    parser.add_argument("--runtime-dir", metavar="DIR", type=Path, default=Path("/run/mountd"))
    parser.add_argument(
        "--idle-exit", metavar="SECONDS", type=float, help="end when nobody was there for so long"
    )
    parser.add_argument(
        "--shared-seconds",
        metavar="SECONDS",
        type=float,
        default=SHARED_SECONDS,
        help="for how long after its use a mount is kept for whoever asks for the same, 0 for not at all; "
        f"default: {SHARED_SECONDS}",
    )
    parser.add_argument(
        "--max-mounts",
        metavar="NUMBER",
        type=int,
        default=MAXIMUM_MOUNTS,
        help=f"how many mounts one user may have at a time; default: {MAXIMUM_MOUNTS}",
    )
    parser.add_argument(
        "--only-pull",
        action="store_true",
        help="serve nothing but pulls from registries, for another instance that may not use the network",
    )
    options = parser.parse_args(argv)
    if options.idle_exit is not None and options.idle_exit <= 0:
        parser.error("--idle-exit: it has to be more than 0 seconds")
    if not 0 <= options.shared_seconds <= MAXIMUM_SHARED_SECONDS:
        parser.error(f"--shared-seconds: it has to be 0 to {MAXIMUM_SHARED_SECONDS} seconds")
    if not 0 < options.max_mounts <= MOST_MOUNTS:
        parser.error(f"--max-mounts: it has to be 1 to {MOST_MOUNTS}")
    # The working directory is not the same for ever.
    options.runtime_dir, options.state_dir = options.runtime_dir.absolute(), options.state_dir.absolute()
    options.policy_dir = [each.absolute() for each in options.policy_dir or POLICY_DIRS]
    for name in ("socket", "mountfs_socket"):
        path = getattr(options, name)
        setattr(options, name, os.path.abspath(path) if path else None)
    return options


class Daemon:
    """The listener, the fork server, and what signals do."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Get the socket and set the limits. Raises StartFailure."""
        # Before anybody can see from a socket that it is there, and tell it something.
        self._signals: set[int] = set()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: self._signals.add(number))
        self._policy_dirs = options.policy_dir
        self._idle_exit = options.idle_exit
        self._state_dir = options.state_dir
        self._shared_seconds = options.shared_seconds
        self._only_pull = options.only_pull
        self._pull_socket = options.runtime_dir / PULL_SOCKET_NAME
        self._staging = prepare_runtime_dir(options.runtime_dir)
        self._attached = options.runtime_dir / "attached"
        self._maximum_mounts = options.max_mounts
        paths = {Entrance.OWN: options.socket or str(options.runtime_dir / SOCKET_NAME)}
        if options.mountfs_socket is not None:
            paths[Entrance.MOUNT_FILE_SYSTEM] = options.mountfs_socket
        self._sockets = listening_sockets(paths)
        self.addresses = self._sockets.addresses
        self._ledger, self._watches, self._marks = open_ledger(options.runtime_dir, self._sockets.kept)
        self._maximum_connections = raise_descriptor_limit()
        self._counters = Counters(SLOTS)  # for longer than a fork server lives
        self._watchdog = watchdog_seconds()

    def run(self) -> int:
        """Serve until told to end; return the exit status."""
        restarts: list[float] = []
        try:
            while True:
                try:
                    self._serve()
                    return 0
                except ForkServerGone as reason:
                    now = time.monotonic()
                    restarts = [each for each in restarts if each > now - RESTART_SECONDS] + [now]
                    if reason.text or len(restarts) > MAXIMUM_RESTARTS:
                        log(Priority.ERROR, f"cannot serve: {reason.text or 'the fork server keeps ending'}")
                        return 1
                    log(Priority.ERROR, "the fork server has ended; starting another", message_id=WORKER_ID)
        finally:
            self._sockets.close()

    def _serve(self) -> None:
        """Start a fork server and run the listener over it. Raises ForkServerGone."""
        ours, theirs = channel.pair()
        board = Board(SLOTS)
        self._counters.restart()
        pid = os.fork()
        if pid == 0:
            from mountd.daemon.fork_server import Places, serve

            places = Places(
                self._policy_dirs,
                self._staging,
                self._state_dir,
                self._pull_socket,
                self._attached,
                listener=os.getppid(),
                sockets=self.addresses,
                ledger=self._ledger,
                watches_fd=self._watches.fileno(),
                marks_fd=None if self._marks is None else self._marks.fileno(),
                shared_seconds=self._shared_seconds,
                maximum_mounts=self._maximum_mounts,
            )
            serve(theirs, board, self._counters, places, only_pull=self._only_pull)
        theirs.close()
        listener = Listener(
            self._sockets.listening,
            ours,
            board,
            self._counters,
            maximum_connections=self._maximum_connections,
            idle_exit=self._idle_exit,
            notify=notify,
        )
        try:
            self._loop(listener)
        finally:
            listener.close()
            ours.close()
            end_child(pid)

    def _loop(self, listener: Listener) -> None:
        # A signal that arrives between the look at the set and the wait must still wake the wait up.
        reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        writer.setblocking(False)
        listener.wake_on(reader)
        previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            while listener.turn(time.monotonic() + self._watchdog):
                if self._watchdog < 60:
                    notify("WATCHDOG=1")
                if signal.SIGHUP in self._signals:
                    self._signals.discard(signal.SIGHUP)
                    listener.reload()
                # One more of them may have come since, which is for the next turn.
                if self._signals - {signal.SIGHUP} or listener.idle_long_enough:
                    listener.drain()
        finally:
            signal.set_wakeup_fd(previous)
            reader.close()
            writer.close()


def prepare_runtime_dir(path: Path) -> Path:
    """Make the runtime directory, and return the mount point for staging in it. Raises StartFailure."""
    staging = path / "staging"
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        staging.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StartFailure(f"cannot use the runtime directory {path}: {error.strerror}") from None
    return staging


def open_ledger(runtime_dir: Path, kept: dict[str, OwnedFd]) -> tuple[Path, OwnedFd, OwnedFd | None]:
    """Return the directory of the ledger and its descriptors: those that were `kept`, or new ones.

    These are the watches and the marks, None where the kernel has no marks. New ones are given to the
    service manager to keep. The directory is made by whoever needs it first. Raises StartFailure.
    """
    directory = runtime_dir / "ledger"
    try:
        watches, marks = kept.get(WATCHES_NAME) or watch.create(), kept.get(MARKS_NAME) or mark.create()
        book = Book(str(directory), watches.fileno(), None, MOST_MOUNTS, frozenset())
        found = {WATCHES_NAME: watches} | ({} if marks is None else {MARKS_NAME: marks})
        book.recover(watches=WATCHES_NAME not in kept, marks=MARKS_NAME not in kept)
    except (OSError, SyscallError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StartFailure(f"cannot use the ledger {directory}: {reason}") from None
    for name in found.keys() - kept.keys():
        notify(f"FDSTORE=1\nFDNAME={name}", [found[name].fileno()])
    return directory, watches, marks


def raise_descriptor_limit() -> int:
    """Allow as many descriptors as the system lets us; return how many connections that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, MAXIMUM_CONNECTIONS + SPARE_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(1, wanted - SPARE_DESCRIPTORS)


def watchdog_seconds() -> float:
    """Return how often to tell systemd that we live: twice in the time it allows (WatchdogSec=)."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 60.0
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return min(60.0, int(microseconds) / 2e6) if microseconds.isdecimal() else 60.0


def notify(state: str, fds: Sequence[int] = ()) -> None:
    """Tell the service manager, if there is one (sd_notify(3)), and send it `fds`, which are borrowed."""
    if "NOTIFY_SOCKET" in os.environ:
        from systemd import daemon  # type: ignore[import-untyped]

        try:
            # None, which is the default, is no list for it.
            daemon.notify(state, *((False, 0, list(fds)) if fds else ()))
        except OSError as error:
            log(Priority.WARNING, f"cannot tell the service manager: {error.strerror}")


def end_child(pid: int) -> None:
    """Wait for the fork server, which ends when its socket does; not for one that hangs."""
    for _ in range(100):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def main() -> None:
    """Entry point of the console script."""
    options = arguments(sys.argv[1:])
    if os.geteuid() != 0:
        sys.exit("mountd: it makes mounts for others, and has to be started as root")
    if lacking := missing():
        sys.exit(f"mountd: {lacking}")
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    if not options.only_pull:  # which makes no overlays, and gives what it pulls to who looks at it
        capabilities.put_aside()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        os.umask(0o022)
        daemon = Daemon(options)
        os.umask(0o077)
    except StartFailure as reason:
        sys.exit(f"mountd: {reason}")
    open_journal(f"version {VERSION} listens at {', '.join(daemon.addresses)}")
    sys.exit(daemon.run())


if __name__ == "__main__":
    main()
