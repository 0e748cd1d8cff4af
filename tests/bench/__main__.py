"""`make bench`: what mountd costs, next to the bare system calls in the same run."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mountd.client import Client, Request
from mountd.kernel import namespaces
from mountd.source.remembered import SETTLED
from tests.bench import layered, mounting, shared, stored
from tests.bench.bare import mount_and_map
from tests.bench.serving import Serving
from tests.container import RANGE, in_container, mapper
from tests.daemon import ROOT
from tests.images import build_image, build_tree

POLICY = """
[[rule]]
name = "bench"
image = {{ location = "{}/*" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["erofs"], idmap = ["namespace"] }}
verdict = "allow"
"""
QUICK = "--quick" in sys.argv
BLOCK, BLOCKS, WARM_UP = (10, 2, 5) if QUICK else (50, 12, 30)
SECONDS = 0.3 if QUICK else 4.0
RATIO = 8.0


def timed(work: Callable[[], object], count: int) -> list[float]:
    """Run `work` and return the seconds that each time took."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def line(name: str, times: list[float]) -> str:
    """Minimum, median and 99th percentile in microseconds."""
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    values = (ordered[0], statistics.median(ordered), p99)
    return f"{name:<42}" + "".join(f"{value * 1e6:>11.0f}" for value in values)


def in_blocks(daemon: Serving, image: Path) -> tuple[list[float], list[float]]:
    """Alternate between bare mounts and mounts through the socket, and return the seconds of both."""
    go, gone = socket.socketpair()

    def client() -> list[float]:
        times: list[float] = []
        with Client(str(daemon.socket)) as connection, Request(str(image)) as request:

            def mount() -> None:
                connection.mount(request.source, request.fds, **request.parameters).mount.close()

            timed(mount, WARM_UP)
            while gone.recv(1) == b"g":
                times += timed(mount, BLOCK)
                gone.send(b"d")
        return times

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            go.close()
            with open(writer, "wb") as file, mapper():
                pickle.dump(in_container(client), file)
        finally:
            os._exit(0)
    gone.close()
    os.close(writer)
    bare: list[float] = []
    with namespaces.make_user_namespace(RANGE, RANGE) as userns:
        name = os.fsencode(image)

        def mount() -> None:
            os.close(mount_and_map(name, userns.fileno()))

        timed(mount, WARM_UP)
        for _ in range(BLOCKS):
            bare += timed(mount, BLOCK)
            go.send(b"g")
            go.recv(1)
        go.send(b"e")
    with open(reader, "rb") as file:
        through = pickle.load(file)
    os.waitpid(pid, 0)
    go.close()
    return bare, through


def questions(daemon: Serving) -> list[float]:
    """Return what it takes to ask something for which nothing is to be done."""
    with Client(str(daemon.socket)) as client:

        def ask() -> None:
            client._socket.sendall(b'{"method":"org.varlink.service.GetInfo"}\0')
            client._socket.recv(65536)

        timed(ask, WARM_UP)
        return timed(ask, BLOCK * BLOCKS)


def mounts_per_second(daemon: Serving, image: Path, clients: int) -> float:
    """Have so many containers, each of another owner, mount as fast as they can."""

    def client() -> int:
        count, end = 0, time.monotonic() + SECONDS
        with Client(str(daemon.socket)) as connection, Request(str(image)) as request:
            while time.monotonic() < end:
                connection.mount(request.source, request.fds, **request.parameters).mount.close()
                count += 1
        return count

    readers = []
    for number in range(clients):
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                base = 1_000_000 + 65536 * number
                with mapper():
                    total = in_container(client, owner=5000 + number, uids=((0, base, 65536),))
                os.write(writer, str(total).encode())
            finally:
                os._exit(0)
        os.close(writer)
        readers.append(reader)
    total = 0
    for reader in readers:
        with open(reader) as file:
            total += int(file.read() or 0)
        os.wait()
    return total / SECONDS


def activation(directory: Path, image: Path) -> tuple[float, float]:
    """Return seconds from connecting to the answers to GetInfo and to Mount, when nothing runs yet."""
    path = directory / "activated"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    path.chmod(0o666)
    listening.listen(16)
    start = time.perf_counter()
    with Client(str(path)) as client, Request(str(image), userns="none") as request:
        pid = os.fork()
        if pid == 0:
            os.dup2(listening.fileno(), 3)
            os.set_inheritable(3, True)
            os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
            os.chdir(ROOT)
            os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
            os.execv(
                sys.executable,
                [sys.executable, "-m", "mountd.daemon.main", "--runtime-dir", str(directory / "run2"),
                 "--state-dir", str(directory / "state2"), "--policy-dir", str(directory / "policy.d")],
            )  # fmt: skip
        client._socket.sendall(b'{"method":"org.varlink.service.GetInfo"}\0')
        client._socket.recv(65536)
        first = time.perf_counter() - start
        client.explain(request.source, request.fds, **request.parameters)
        second = time.perf_counter() - start
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    listening.close()
    return first, second


def memory(pid: int) -> tuple[int, int]:
    """Return resident and proportional set size in KiB."""
    fields = {}
    for text in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = text.split(":")
        fields[name] = int(value.split()[0])
    return fields["Rss"], fields["Pss"]


def report(daemon: Serving, directory: Path, image: Path) -> bool:
    """Measure, print, and tell whether the ratio holds."""
    bare, through = in_blocks(daemon, image)
    print(f"{'microseconds':<42}{'min':>11}{'median':>11}{'p99':>11}")
    print(line("bare: fsopen … mount_setattr", bare))
    print(line("Mount: mapped and locked, by the socket", through))
    print(line("GetInfo: asked and answered, no mount", questions(daemon)))
    ratio = statistics.median(through) / statistics.median(bare)
    print(f"ratio of the medians: {ratio:.1f} (at most {RATIO:.0f})")
    for clients in (1, 8):
        print(f"mounts per second, {clients} client(s): {mounts_per_second(daemon, image, clients):.0f}")
    first, second = activation(directory, image)
    print(f"socket activation: first reply after {first * 1e3:.0f} ms, first decision {second * 1e3:.0f} ms")
    print(f"{'memory, KiB':<42}{'RSS':>11}{'PSS':>11}")
    for name, pid in (
        ("listener", daemon.process.pid),
        ("fork server", daemon.fork_server),
        ("a worker", daemon.workers[0]),
    ):
        resident, proportional = memory(pid)
        print(f"{name:<42}{resident:>11}{proportional:>11}")
    return ratio <= RATIO


def main() -> int:
    """Set up, measure, and leave nothing."""
    directory = Path(tempfile.mkdtemp(prefix="mountd-bench-", dir="/var/lib"))
    directory.chmod(0o755)
    daemon = None
    try:
        trusted = directory / "trusted"
        trusted.mkdir(mode=0o755)
        image = build_image("erofs", build_tree(directory / "tree"), trusted / "image.raw")
        subprocess.run(["sync"], check=True)
        # What has changed just now is not remembered; a warm image has been there for a while.
        time.sleep(SETTLED / 1e9)
        daemon = Serving(directory, POLICY.format(trusted))
        good = report(daemon, directory, image)
        good = mounting.report(directory / "mounting", 3 if QUICK else mounting.ROUNDS) and good
        good = stored.report(directory / "stored", image, BLOCK * BLOCKS, line) and good
        good = layered.report(directory / "layered", 2 if QUICK else 8, line) and good
        good = shared.report(directory / "shared", directory / "tree", line) and good
        return 0 if good else 1
    finally:
        if daemon is not None:
            daemon.stop()
        shutil.rmtree(directory)


if __name__ == "__main__":
    sys.exit(main())
