"""A running mountd, and what it holds: for tests that talk to it over its socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mountd.client import Client
from mountd.errors import Unreachable

ROOT = Path(__file__).parents[1]


class Daemon:
    """One instance: a listener, a fork server and workers."""

    def __init__(self, directory: Path, policy: str, arguments: Sequence[str] = (), **run: object) -> None:
        """Start it with its files in `directory` and the rules `policy`, and wait until it serves."""
        self.directory = directory
        self.policy_dir = directory / "policy.d"
        self.policy_dir.mkdir(parents=True, mode=0o755)
        self.set_policy(policy)
        self.socket = directory / "run/io.mountd.Mount"
        self.log_path = directory / "log"
        self._command = [
            *(sys.executable, "-m", "mountd.daemon.main"),
            *("--runtime-dir", directory / "run", "--state-dir", directory / "state"),
            # Soon, as every test ends with nothing left.
            *("--shared-seconds", "0.2", "--policy-dir", self.policy_dir, *arguments),
        ]
        self._run = run
        self.launch()

    def launch(self) -> None:
        """Start it, again if it has ended, and wait until it serves."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                **{"env": {"PATH": os.environ["PATH"]}, **self._run},  # type: ignore[call-overload]
            )
        self.wait_until_served()

    def set_policy(self, policy: str) -> None:
        """Replace the rules; they hold after a reload."""
        (self.policy_dir / "test.toml").write_text(policy)

    def wait_until_served(self) -> None:
        """Return once it answers a call."""
        deadline = time.monotonic() + 60  # in an emulated machine, the imports alone take a third of it
        while True:
            try:
                with Client(str(self.socket)) as client:
                    client._socket.send(b'{"method":"org.varlink.service.GetInfo"}\0')
                    if client._socket.recv(65536):
                        return
            except Unreachable:
                assert self.process.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
                time.sleep(0.02)

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self.log_path.read_text()

    def children(self, pid: int | None = None) -> list[int]:
        """The living children of one of its processes."""
        pid = self.process.pid if pid is None else pid
        try:
            return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except FileNotFoundError:
            return []

    @property
    def fork_server(self) -> int:
        """The pid of the fork server."""
        return self.children()[0]

    @property
    def workers(self) -> list[int]:
        """The pids of the workers."""
        return self.children(self.fork_server)

    def held(self) -> dict[str, object]:
        """What must be the same after a test as before, whatever the number of workers is."""
        workers = self.workers
        return {
            # Two for each worker: its socket and its pidfd.
            "descriptors of the listener": len(fds_of(self.process.pid)) - 2 * len(workers),
            "processes": len(self.children()) + sum(len(self.children(pid)) for pid in workers),
            "descriptors of the fork server": len(fds_of(self.fork_server)),
            "mounts": len(Path(f"/proc/{self.fork_server}/mountinfo").read_text().splitlines()),
            "descriptors of the workers": max((len(fds_of(pid)) for pid in workers), default=0) <= 7,
        }

    def settled(self) -> dict[str, object]:
        """What it holds once it has noticed that earlier clients are gone."""
        last, held = None, self.held()
        while held != last:
            time.sleep(0.05)
            last, held = held, self.held()
        return held

    def signal(self, number: int) -> None:
        """Send a signal to the listener."""
        self.process.send_signal(number)

    def stop(self) -> int:
        """End it as a service manager does, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


def fds_of(pid: int) -> list[str]:
    """What the open descriptors of a process refer to."""
    found = []
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
            except FileNotFoundError:
                continue
    except FileNotFoundError:
        return []
    return found
