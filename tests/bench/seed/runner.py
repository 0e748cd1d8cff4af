"""A process that has the tree mounted and lists it when it is told to.

There are two of each way to mount it, alike but for who mounts: one that is root of the host, in a mount
namespace of its own, and one that is root of a container of an ordinary user's.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation
from tests.container import in_container

Enter = Callable[[Callable[[], None]], None]

LS = "/usr/bin/ls"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
STOP = b"stop"
MOST_READ = 64 << 20  # bytes
MEMORY = ("Cached", "Buffers", "Slab")  # of /proc/meminfo: page cache, that of block devices, and slab


def as_root(work: Callable[[], None]) -> None:
    """Run `work` in a mount namespace of its own."""
    namespaces.unshare(Clone.NEWNS)
    mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
    work()


def as_container(work: Callable[[], None]) -> None:
    """Run `work` as root of a container."""
    in_container(work)


class Runner:
    """Such a process, and what it can be told."""

    def __init__(
        self, enter: Callable[[Callable[[], None]], None], mount: Callable[[Path], None], target: Path
    ):
        """Start it, within `enter`; it is to mount by calling `mount` with `target`.

        Raises RuntimeError if it cannot enter, as do the others for whatever fails.
        """
        self._socket, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._socket.close()
                with suppress(PermissionError):
                    # It and all that it starts, so that nobody else's work is measured.
                    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
                enter(lambda: serve(theirs, mount, target))
            except BaseException:  # noqa: BLE001 - the parent is told
                theirs.sendall(pickle.dumps(traceback.format_exc()))
            finally:
                os._exit(0)
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.stop()
            raise

    def mount(self) -> dict[str, Any]:
        """Have it mount the tree, and return the facts about that."""
        return dict(self._ask("mount"))

    def prime(self) -> None:
        """Have it run what it needs for listing, so that only what is listed is not in memory."""
        self._ask("prime")

    def list(self) -> float:
        """Return how long listing takes, in seconds."""
        return float(self._ask("list"))

    def count(self) -> int:
        """Return how many lines a list of all names has."""
        return int(self._ask("count"))

    def read(self) -> int:
        """Have it read the first MOST_READ bytes of files, and return how many bytes these are."""
        return int(self._ask("read"))

    def stop(self) -> None:
        """End it; what it has mounted is gone."""
        with suppress(OSError):
            self._socket.sendall(STOP)  # others have inherited this end, so that closing it says nothing
        self._socket.close()
        os.waitpid(self._pid, 0)

    def _ask(self, what: str) -> Any:
        self._socket.sendall(what.encode())
        return self._answer()

    def _answer(self) -> Any:
        data = self._socket.recv(1 << 16)
        answer = pickle.loads(data) if data else "it has ended"
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def serve(commands: socket.socket, mount: Callable[[Path], None], target: Path) -> None:
    """Do what is asked until nobody can ask any more."""

    def made() -> dict[str, object]:
        mount(target)
        return facts(target)

    works: dict[bytes, Callable[[], object]] = {
        b"mount": made,
        b"prime": lambda: listing(target.parent / "empty"),
        b"list": lambda: listing(target),
        b"count": lambda: count_lines(target),
        b"read": lambda: read_files(target),
    }
    commands.sendall(pickle.dumps(True))
    while (command := commands.recv(16)) not in (b"", STOP):
        commands.sendall(pickle.dumps(works[command]()))


def facts(target: Path) -> dict[str, object]:
    """Return what has to be the same however the tree was mounted, and what it was mounted from."""
    status = target.stat()
    major, minor = os.major(status.st_dev), os.minor(status.st_dev)
    direct_io = Path(f"/sys/dev/block/{major}:{minor}/loop/dio")
    return {
        "owner": (status.st_uid, status.st_gid),
        "superblock": (major, minor),
        "direct I/O": direct_io.read_text().strip() if direct_io.exists() else None,
    }


def listing(directory: Path) -> float:
    """Run `ls -lR` and return how long it took, in seconds."""
    nowhere = [(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
    start = time.perf_counter()
    pid = os.posix_spawn(LS, [LS, "-lR", str(directory)], ENVIRONMENT, file_actions=nowhere)
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        raise RuntimeError(f"ls -lR {directory} has failed")
    return seconds


def count_lines(directory: Path) -> int:
    """Return how many lines a list of all names has."""
    command = [LS, "-AR", str(directory)]
    return subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True).stdout.count(b"\n")


def read_files(directory: Path) -> int:
    """Read the files below `directory`, until it is enough, and return how many bytes they have."""
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(place, name)
            if not os.path.islink(path):
                with open(path, "rb", buffering=0) as file:
                    total += len(file.read())
            if total >= MOST_READ:
                return total
    return total


def used_memory() -> float:
    """Return what the kernel uses for what MEMORY names, in MiB."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in MEMORY) / 1024


def drop_caches() -> None:
    """Have the kernel forget what it can read again; it has to be written before (sync)."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
