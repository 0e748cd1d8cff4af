"""The listener never holds a client's descriptor, and never takes a byte that a client has sent.

A descriptor of a client can make whoever holds it unkillable, by its close alone, and the listener is
the one process that must not be. That it receives nothing is seen by strace(1): it names the socket
behind each descriptor, so that a receive from a connection of the daemon's socket would show its path,
as those of the workers do in the same trace.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.daemon import Daemon, fds_of
from tests.e2e.conftest import trusting
from tests.fuse import Fuse, Op
from tests.rogue import ATTACKER, GET_INFO, Raw, ask, error, eventually, mount_call, opened, settled

# Whatever takes bytes or descriptors; a read(2) of a socket is a receive as well.
RECEIVES = "recvmsg,recvfrom,recvmmsg,read,readv,preadv,preadv2,splice,tee,pidfd_getfd,io_uring_setup"
LINE = re.compile(r"^(?P<pid>\d+) +(?:<\.\.\. )?(?P<call>\w+)(?:\(| resumed>)(?P<rest>.*)$")
MARK = "marked-by-the-test"
REQUESTS = 40


@contextlib.contextmanager
def traced(pids: list[int], output: Path) -> Iterator[list[tuple[int, str, str]]]:
    """Trace the receives of these processes; fills the list with (pid, call, the rest of the line)."""
    found: list[tuple[int, str, str]] = []
    command = ["strace", "-yy", "-s", "8", "-e", f"trace=accept4,accept,{RECEIVES}", "-o", str(output)]
    command += [word for pid in pids for word in ("-p", str(pid))]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as strace:
        try:
            assert eventually(lambda: all(tracer_of(pid) == strace.pid for pid in pids), 10)
            yield found
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait(10)
    for line in output.read_text().splitlines():
        if matched := LINE.match(line):
            found.append((int(matched["pid"]), matched["call"], matched["rest"]))


def tracer_of(pid: int) -> int:
    """The pid of the process that traces this one, 0 for none."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("TracerPid:"))


def marked() -> int:
    """A file in memory whose name shows in /proc."""
    fd = os.memfd_create(MARK, os.MFD_CLOEXEC)
    os.write(fd, b"x" * 8192)
    return fd


def holds_marked(pid: int) -> bool:
    return any(MARK in target for target in fds_of(pid))


def test_the_listener_receives_nothing_from_a_client(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    """Whole requests, halves of one, garbage, and callers who leave at once."""
    daemon = start(trusting(images["erofs"].parent))
    settled(daemon)
    listener, workers = daemon.process.pid, daemon.workers
    path = str(daemon.socket)
    memory = marked()
    with opened(images["erofs"]) as fds, traced([listener, *workers], daemon.directory / "trace") as found:
        for _ in range(REQUESTS):
            assert error(ask(daemon, mount_call(), fds, ATTACKER)) == ""
            assert error(ask(daemon, mount_call(), [memory])) == "UnsupportedFileSystem"
            ask(daemon, b"garbage\0", [memory, memory])
            with Raw(daemon) as raw:
                raw.send(mount_call()[:7], [memory])
    os.close(memory)
    of_listener = [(call, rest) for pid, call, rest in found if pid == listener]
    accepted = [rest for call, rest in of_listener if call.startswith("accept")]
    assert sum(path in rest for rest in accepted) >= 4 * REQUESTS
    received = [(call, rest) for call, rest in of_listener if not call.startswith("accept")]
    # It does hear its own processes, whose sockets have no path; what comes with that are its own, too.
    assert len([rest for call, rest in received if call == "recvmsg" and "<UNIX" in rest]) > REQUESTS
    assert [each for each in received if path in each[1] or MARK in each[1]] == []
    assert [call for call, _ in received if call in ("pidfd_getfd", "io_uring_setup")] == []
    # The same in a worker, which does receive, shows both.
    of_workers = [rest for pid, call, rest in found if pid in workers and call == "recvmsg"]
    assert any(path in rest for rest in of_workers)
    assert any(MARK in rest for rest in of_workers)


def test_descriptors_on_their_way_are_not_in_the_listener(
    start: Callable[..., Daemon], images: dict[str, Path]
) -> None:
    """While no worker takes them, while one has them, and after it was killed with them."""
    daemon = start(trusting(images["erofs"].parent))
    settled(daemon)
    listener, fork_server = daemon.process.pid, daemon.fork_server
    before = len(fds_of(listener))
    memory = marked()
    with contextlib.ExitStack() as stack:
        workers = daemon.workers
        for pid in (*workers, fork_server):
            os.kill(pid, signal.SIGSTOP)
        raws = [stack.enter_context(Raw(daemon)) for _ in range(8)]
        for raw in raws:
            raw.send(mount_call(), [memory])
        # One descriptor for each connection is all that it has more.
        assert eventually(lambda: len(fds_of(listener)) == before + len(raws))
        assert not holds_marked(listener)
        for pid in (*workers, fork_server):
            os.kill(pid, signal.SIGCONT)
        for raw in raws:
            assert error(raw.reply()) == "UnsupportedFileSystem"
            assert not holds_marked(listener)
            assert not holds_marked(fork_server)
    os.close(memory)


def test_a_worker_that_cannot_close_is_alone_with_its_descriptor(
    start: Callable[..., Daemon], images: dict[str, Path], place: Path
) -> None:
    """The listener kills it and answers, and has nothing of it that could hang when it ends."""
    daemon = start(trusting(images["erofs"].parent), start_new_session=True)
    settled(daemon)
    with Fuse(place / "fuse", images["erofs"].read_bytes()) as fuse, opened(fuse.path) as fds:
        fuse.silence(Op.FLUSH, session=daemon.process.pid)
        with Raw(daemon, ATTACKER) as raw:
            raw.send(mount_call(), fds)
            assert error(raw.reply()) == "BadFileDescriptor"
            time.sleep(0.1)
            for pid in (daemon.process.pid, daemon.fork_server):
                assert not any(str(place / "fuse") in target for target in fds_of(pid))
            assert any("request_wait_answer" in waits_in(pid) for pid in daemon.workers)
            assert error(ask(daemon, GET_INFO)) == ""
        fuse.abort()


def waits_in(pid: int) -> str:
    """The function of the kernel that a process sleeps in."""
    try:
        return Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return ""
