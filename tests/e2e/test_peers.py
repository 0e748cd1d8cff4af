"""Who calls is who connected: cases 22 to 24 of the threat model.

That a process number is used again (case 22) cannot mislead the daemon, which never looks a process up by
its number alone: here the process has ended, and the pidfd says so, whoever has its number.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mountd.kernel import namespaces
from mountd.kernel.flags import Clone
from tests.container import forked, in_container
from tests.daemon import Daemon
from tests.rogue import ATTACKER, GET_INFO, Raw, ask, call, error, eventually, mount_call, neighbour, opened

NOBODY = 65534
EXPLAIN = call("Explain", {"source": {"imageFileDescriptor": 0}})


class Other:
    """A process of another user that connects, hands its connection over, and then does `afterwards`."""

    def __init__(
        self, daemon: Daemon, afterwards: Callable[[], object], *, uid: int = ATTACKER, used: bool = True
    ) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.pid = os.fork()
            if self.pid == 0:
                try:
                    os.setgroups([])
                    os.setresgid(uid, uid, uid)
                    os.setresuid(uid, uid, uid)
                    raw = Raw(daemon)
                    if used:
                        # Answered, hence accepted.
                        raw.send(GET_INFO)
                        assert error(raw.reply()) == ""
                    socket.send_fds(theirs, [b"x"], [raw.fileno()])
                    raw.socket.detach()
                    ours.close()
                    theirs.close()
                    afterwards()
                finally:
                    os._exit(0)
            theirs.close()
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        self.raw = Raw(daemon, fd=fds[0])

    def wait(self) -> None:
        os.waitpid(self.pid, 0)

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            return


def caller(raw: Raw, image: Path) -> object:
    """Who the daemon takes the peer of a connection for, or the error that it says."""
    with opened(image) as fds:
        raw.send(EXPLAIN, fds)
        reply = raw.reply()
    assert reply is not None
    return error(reply) or reply["parameters"]["facts"]["caller"]


def test_a22_who_connected_has_ended(daemon: Daemon, images: dict[str, Path]) -> None:
    with neighbour(daemon, images["erofs"]), Other(daemon, lambda: None) as other:
        other.wait()
        assert caller(other.raw, images["erofs"]) == "PeerGone"
        with opened(images["erofs"]) as fds:
            other.raw.send(mount_call(), fds)
            assert error(other.raw.reply()) == "PeerGone"


def test_a22_who_connected_ends_before_it_is_accepted(daemon: Daemon, images: dict[str, Path]) -> None:
    daemon.signal(signal.SIGSTOP)
    try:
        with Other(daemon, lambda: None, used=False) as other:
            other.wait()
            daemon.signal(signal.SIGCONT)
            assert error(other.raw.reply()) == "PeerGone"
            assert other.raw.ended()
    finally:
        daemon.signal(signal.SIGCONT)


def test_a22_connection_in_other_hands(daemon: Daemon, images: dict[str, Path]) -> None:
    """Root that calls on a user's connection is the user; a user on root's connection is root."""
    with Other(daemon, signal.pause) as other:
        assert str(caller(other.raw, images["erofs"])).startswith(f"uid {ATTACKER}, gid {ATTACKER}, on the")
    with Raw(daemon) as raw:
        answer = forked(lambda: caller(raw, images["erofs"]), ATTACKER)
        assert str(answer).startswith("uid 0, gid 0, on the host")


@pytest.mark.parametrize("uids", [((0, NOBODY, 1),), ((0, NOBODY, 1), (1, 400001, 1000))])
def test_a23_overflow_uid_in_a_user_namespace(
    daemon: Daemon, images: dict[str, Path], containers: None, uids: tuple[tuple[int, int, int], ...]
) -> None:
    """It may be anybody whom the host does not know, so that it has no rights."""
    with opened(images["erofs"]) as fds, neighbour(daemon, images["erofs"]):
        for data in (mount_call(), EXPLAIN):
            said = in_container(lambda data=data: error(ask(daemon, data, fds)), uids=uids)  # type: ignore[misc]
            assert said == "UserNamespaceNotPermitted"


def test_a23_user_without_a_mapping(daemon: Daemon, images: dict[str, Path]) -> None:
    """In its own eyes it is 65534; for the daemon it is who it is on the host."""

    def work() -> object:
        namespaces.unshare(Clone.NEWUSER)
        assert os.getuid() == NOBODY
        with Raw(daemon) as raw:
            return caller(raw, images["erofs"])

    assert str(forked(work, ATTACKER)).startswith(f"uid {ATTACKER}, gid {ATTACKER}, in a user namespace")


def test_a24_peer_leaves_its_user_namespace(daemon: Daemon, images: dict[str, Path]) -> None:
    def work() -> list[object]:
        with Raw(daemon) as raw, opened(images["erofs"]) as fds:
            raw.send(mount_call(), fds)
            before = error(raw.reply())
            namespaces.unshare(Clone.NEWUSER)
            raw.send(mount_call(), fds)
            after = error(raw.reply())
        with Raw(daemon) as raw:
            return [before, after, str(caller(raw, images["erofs"])).partition(", ")[0]]

    with neighbour(daemon, images["erofs"]):
        assert forked(work, ATTACKER) == ["", "PeerGone", f"uid {ATTACKER}"]


def test_a24_peer_executes_a_set_uid_program(daemon: Daemon, images: dict[str, Path], place: Path) -> None:
    program = place / "sleep"
    shutil.copy("/bin/sleep", program)
    program.chmod(0o4755)

    def effective_uid(pid: int) -> str:
        status = Path(f"/proc/{pid}/status").read_text()
        return next(line.split()[2] for line in status.splitlines() if line.startswith("Uid:"))

    with Other(daemon, lambda: os.execv(program, ["sleep", "60"])) as other:
        assert eventually(lambda: effective_uid(other.pid) == "0"), "the program does not run as root"
        time.sleep(0.01)
        assert str(caller(other.raw, images["erofs"])).startswith(f"uid {ATTACKER}, gid {ATTACKER}, on the")
    program.unlink()
