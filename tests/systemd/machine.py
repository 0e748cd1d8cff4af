"""A Debian root directory booted with systemd as PID 1, and what tests do in it."""

from __future__ import annotations

import json
import os
import select
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
SERVICE = "mountd.service"
SOCKET = "mountd.socket"
SECONDS = 30.0


class Machine:
    """One running system; everything of it is gone after `stop`."""

    def __init__(self, root: Path) -> None:
        """Boot `root` and wait until that is done, with or without failed units."""
        self.root = root
        # There may be several at a time.
        self._group = cgroup2() / f"mountd-tests-{os.getpid()}-{root.parent.name}"
        self._log = root.with_name("boot.log")
        with self._log.open("wb") as log:
            # The machine must not outlive the tests, however they end.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", HERE / "boot", root, self._group],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self.init = eventually(self._find_init, "no init")
            command = ["systemctl", "is-system-running", "--wait"]
            eventually(lambda: self.run(command, check=False).stdout.strip() in ("running", "degraded"))
        except BaseException:
            self.stop()
            raise

    def _find_init(self) -> int | None:
        assert self._process.poll() is None, self._log.read_text()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in children:
            if os.readlink(f"/proc/{pid}/exe").endswith("/systemd"):
                return int(pid)
        return None

    def stop(self) -> None:
        """End every process of the machine and remove its control groups."""
        self._process.kill()
        self._process.wait()
        if self._group.exists():
            (self._group / "cgroup.kill").write_text("1")
            eventually(lambda: "populated 0" in (self._group / "cgroup.events").read_text())
            for directory, _, _ in os.walk(self._group, topdown=False):
                os.rmdir(directory)

    def command(self, command: Sequence[str], user: str | None = None) -> list[str]:
        """What the host has to run for `command` to run in the machine."""
        kinds = ("mount", "pid", "uts", "ipc", "net", "cgroup", "root", "wd")
        enter = ["nsenter", f"--target={self.init}", *(f"--{kind}" for kind in kinds), "--"]
        become = ["setpriv", "--reset-env"]
        if user is not None:
            become += [f"--reuid={user}", f"--regid={user}", "--init-groups"]
        return [*enter, *become, "--", *command]

    def start(self, script: str, *, user: str | None = None) -> subprocess.Popen[bytes]:
        """Start a shell script in the machine, with pipes to it."""
        return subprocess.Popen(
            self.command(["sh", "-euc", script], user),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )

    def run(
        self,
        command: Sequence[str],
        *,
        user: str | None = None,
        check: bool = True,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine; with `check` it has to succeed."""
        done = subprocess.run(
            self.command(command, user),
            input="" if input is None else input,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done

    def sh(self, script: str, *, user: str | None = None) -> str:
        """Run a shell script that has to succeed and return what it writes."""
        return self.run(["sh", "-euc", script], user=user).stdout

    def python(self, script: str, *arguments: str) -> str:
        """Run a script of inside/ with the machine's own Python."""
        text = (HERE / "inside" / script).read_text()
        return self.run(["python3", "-I", "-", *arguments], input=text).stdout

    def property(self, name: str, unit: str = SERVICE) -> str:
        """A property of a unit, as systemctl show says it."""
        return self.run(["systemctl", "show", "--value", f"--property={name}", unit]).stdout.strip()

    def state(self, unit: str = SERVICE) -> str:
        """What systemctl is-active says."""
        return self.run(["systemctl", "is-active", unit], check=False).stdout.strip()

    def main_pid(self) -> int:
        """The service's main process, 0 if there is none; a number of the machine."""
        return int(self.property("MainPID"))

    def processes(self, unit: str = SERVICE) -> list[int]:
        """What is in the control group of a unit; numbers of the host."""
        file = self._group / "system.slice" / unit / "cgroup.procs"
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []

    def journal(self, *matches: str) -> list[dict[str, str]]:
        """The service's messages, oldest first, with their fields."""
        self.run(["journalctl", "--sync"])
        command = ["journalctl", f"--unit={SERVICE}", "--output=json", "--no-pager", *matches]
        return [json.loads(line) for line in self.run(command).stdout.splitlines()]

    def explain(self, source: str, *, user: str | None = None) -> dict[str, object]:
        """The decision about a source, by mountctl."""
        done = self.run(["mountctl", "explain", "--json", source], user=user, check=False)
        assert done.stdout, done.stderr
        decision = json.loads(done.stdout)["decision"]
        assert isinstance(decision, dict)
        return decision

    def configure(self, text: str) -> None:
        """Have the service run with a drop-in until the machine is put back."""
        directory = self.root / "etc/systemd/system/mountd.service.d"
        directory.mkdir(exist_ok=True)
        (directory / "test.conf").write_text(f"[Service]\n{text}\n")
        self.run(["systemctl", "daemon-reload"])
        self.run(["systemctl", "stop", SERVICE])

    def put_back(self) -> None:
        """Take back drop-ins and rules; the socket listens and the service is not running."""
        # A moved file system would be none of the tests' any more, so the names are spelt out.
        for pattern in ("etc/systemd/system/mountd.service.d/*", "etc/mountd/policy.d/*"):
            for path in self.root.glob(pattern):
                path.unlink()
        self.run(["systemctl", "daemon-reload"])
        self.run(["systemctl", "stop", SERVICE])
        self.run(["systemctl", "reset-failed"])
        self.run(["systemctl", "start", SOCKET])


def cgroup2() -> Path:
    """Where the host has the control groups that systemd needs."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup2":
            return Path(before.split()[4])
    raise AssertionError("this machine has no cgroup2 mounted")


def next_line(process: subprocess.Popen[bytes], seconds: float = SECONDS) -> str:
    """The next line that a started script writes."""
    assert process.stdout is not None
    line, deadline = b"", time.monotonic() + seconds
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no line came, only {line!r}"
        byte = process.stdout.read(1)
        assert byte, f"it ended after {line!r}"
        line += byte
    return line.decode().strip()


def eventually(check: Callable[[], object], what: object = "", seconds: float = SECONDS) -> int:
    """Wait until `check` returns something true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found  # type: ignore[return-value]
