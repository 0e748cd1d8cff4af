"""Clients that do not behave, and one that does and must not notice: for tests of the daemon's socket."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mountd.client import Client, Request
from mountd.daemon.limits import MINIMUM_WORKERS
from mountd.fds import OwnedFd, close_all
from mountd.kernel import sockets
from mountd.kernel.child import close_all_but
from tests.daemon import Daemon

ATTACKER, NEIGHBOUR = 4000, 4100
WORST = 3.0  # seconds that the neighbour may wait for a mount while the machine is busy with attacks
GET_INFO = b'{"method":"org.varlink.service.GetInfo"}\0'


def call(method: str, parameters: object = None, **fields: object) -> bytes:
    """A call as bytes; `fields` stand beside method and parameters."""
    name = method if "." in method else f"io.mountd.Mount.{method}"
    return json.dumps({"method": name, "parameters": parameters or {}, **fields}).encode() + b"\0"


def mount_call(index: object = 0, **parameters: object) -> bytes:
    """A call of Mount for the image with this index."""
    return call("Mount", {"source": {"imageFileDescriptor": index}, **parameters})


class Raw:
    """A connection that sends whatever it is told to; usable in a with statement."""

    def __init__(self, daemon: Daemon, uid: int | None = None, timeout: float = 20, fd: int = -1) -> None:
        """Connect as the effective user `uid`, or take over the connection `fd`."""
        self.fds: list[OwnedFd] = []
        self._buffer = b""
        if uid is not None:
            os.seteuid(uid)
        try:
            self.socket = socket.socket(fileno=fd) if fd >= 0 else sockets.connect(str(daemon.socket))
        finally:
            if uid is not None:
                os.seteuid(0)
        self.socket.settimeout(timeout)
        self.since = time.monotonic()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send all of it, the descriptors with its first byte."""
        sent = socket.send_fds(self.socket, [data], list(fds))
        while sent < len(data):
            sent += self.socket.send(data[sent:])

    def reply(self) -> dict[str, Any] | None:
        """Return the next reply, None at the end; descriptors of all replies are in `fds`."""
        while b"\0" not in self._buffer:
            try:
                data, fds, _ = sockets.receive(self.socket, 65536, 16)
            except ConnectionError:
                return None
            self.fds += fds
            if not data:
                return None
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)  # type: ignore[no-any-return]

    def ended(self) -> bool:
        """Whether the daemon has closed it, with nothing left to read."""
        return self.reply() is None

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        close_all(self.fds)
        self.socket.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def error(reply: dict[str, Any] | None) -> str | None:
    """The name of the error of a reply without its interface: "" for success, None for no reply."""
    return None if reply is None else reply.get("error", "").rpartition(".")[2]


def ask(daemon: Daemon, data: bytes, fds: Sequence[int] = (), uid: int | None = None) -> dict[str, Any]:
    """Send something on a connection of its own and return the reply."""
    with Raw(daemon, uid) as raw:
        with contextlib.suppress(ConnectionError):
            raw.send(data, fds)
        reply = raw.reply()
    assert reply is not None, daemon.log
    return reply


@contextlib.contextmanager
def opened(*paths: Path | str, flags: int = os.O_RDONLY) -> Iterator[list[int]]:
    """Descriptors of these files."""
    fds = [os.open(path, flags | os.O_CLOEXEC) for path in paths]
    try:
        yield fds
    finally:
        for fd in fds:
            with contextlib.suppress(OSError):  # the server of the file is gone
                os.close(fd)


@contextlib.contextmanager
def neighbour(daemon: Daemon, image: Path, uid: int = NEIGHBOUR) -> Iterator[None]:
    """Another user, who mounts all the while and once more at the end: none of it may fail or take long."""
    stop, stopper = os.pipe2(os.O_CLOEXEC)
    result, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            close_all_but({1, 2, stop, writer})
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.write(writer, pickle.dumps(mount_until(stop, daemon, image)))
        finally:
            os._exit(0)
    os.close(stop)
    os.close(writer)
    try:
        yield
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(stopper)
        with open(result, "rb") as file:
            said = file.read()
        os.waitpid(pid, 0)
    failures, count, worst = pickle.loads(said)
    assert not failures, f"{failures[0]}\n{daemon.log[-2000:]}"
    assert count >= 1
    assert worst < WORST, f"a neighbour waited {worst:.1f} s"


def mount_until(stop: int, daemon: Daemon, image: Path) -> tuple[list[str], int, float]:
    """Be the neighbour: return what failed, the number of mounts, and the longest time that one took."""
    failures: list[str] = []
    count, worst, last = 0, 0.0, False
    while not last:
        last = bool(select.select([stop], [], [], 0.01)[0])
        begin = time.monotonic()
        try:
            with Client(str(daemon.socket)) as client, Request(str(image)) as request:
                client.mount(request.source, request.fds, **request.parameters).mount.close()
        except Exception:  # noqa: BLE001 - the test reports it
            failures.append(traceback.format_exc()[-2000:])
        count, worst = count + 1, max(worst, time.monotonic() - begin)
    return failures[:3], count, worst


def session(daemon: Daemon) -> set[int]:
    """The processes of a daemon that was started with start_new_session, as far as they live."""
    found = set()
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(name)) == daemon.process.pid and state_of(int(name)) not in "ZX":
                found.add(int(name))
    return found


def state_of(pid: int) -> str:
    """The state of a process as ps(1) shows it: R, S, D, T, Z; X if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def eventually(holds: Any, seconds: float = 3.0) -> bool:
    """Wait until `holds()` is true; return whether it is."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def settled(daemon: Daemon) -> dict[str, object]:
    """What a daemon that was just started holds, once it has its workers."""
    assert eventually(lambda: len(daemon.workers) >= MINIMUM_WORKERS)
    return daemon.settled()
