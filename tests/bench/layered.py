"""What mounting an image of ten stored layers takes, next to the bare system calls in the same run.

By the root of a container, who gets its ids mapped in each layer, as most callers are. Twice: with
`--shared-seconds 0`, so that each mount makes all of its superblocks, as the system calls do; and as a
daemon is by itself, where a layer that was mounted a moment ago is there. This one is held to the bounds.
"""

from __future__ import annotations

import os
import pickle
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mountd.client import Client, Request
from mountd.kernel import namespaces
from mountd.store.store import Store
from tests.bench.bare import mount_and_map, overlay
from tests.bench.serving import Serving
from tests.container import RANGE, in_container, mapper
from tests.layered import Image, pulled, rule

LAYERS = 10
BARE, MADE, SHARED = "bare: 10 times erofs, one overlay", "Mount: all made anew", "Mount: layers shared"
MAXIMUM = 0.015  # seconds, in the median
RATIO = 3.0
BLOCK, WARM_UP = 10, 10


def prepare(directory: Path, *arguments: str) -> tuple[Serving, Image]:
    """Start a daemon in the new `directory` and put the image into its store."""
    directory.mkdir(mode=0o755)
    daemon = Serving(directory, rule("apps/*"), arguments)
    try:
        store = Store(directory / "state")
        return daemon, pulled(store, [{"number": str(n), f"file-{n}": str(n)} for n in range(LAYERS)])
    except BaseException:
        daemon.stop()
        raise


def asking(socket_path: Path, image: Image, go: socket.socket, count: int) -> list[float]:
    """Return the seconds of each mount; a block of them for each time that `go` says so."""
    times: list[float] = []
    with Client(str(socket_path)) as connection, Request(image.reference) as request:

        def mount() -> float:
            begin = time.perf_counter()
            reply = connection.mount(request.source, request.fds, **request.parameters)
            reply.mount.close()
            return time.perf_counter() - begin

        for _ in range(WARM_UP):
            mount()
        while go.recv(1) == b"g":
            times += [mount() for _ in range(count)]
            go.send(b"d")
    return times


def bare(files: Sequence[bytes], count: int) -> list[float]:
    """Return the seconds of each stack that is made with system calls alone."""
    times = []
    with namespaces.make_user_namespace(RANGE, RANGE) as userns:
        for _ in range(count):
            begin = time.perf_counter()
            layers = [mount_and_map(each, userns.fileno()) for each in files]
            mount = overlay(layers)
            for each in (*layers, mount):
                os.close(each)
            times.append(time.perf_counter() - begin)
    return times


def measure(directory: Path, blocks: int, *arguments: str) -> tuple[list[float], list[float]]:
    """Return the seconds of bare mounts and of those through a new daemon, in turns of one run."""
    daemon, image = prepare(directory, *arguments)
    try:
        state = directory / "state/images/sha256"
        files = [os.fsencode(state / each.removeprefix("sha256:")) for each in reversed(image.layers)]
        go, gone = socket.socketpair()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                go.close()
                with open(writer, "wb") as file, mapper():
                    pickle.dump(in_container(lambda: asking(daemon.socket, image, gone, BLOCK)), file)
            finally:
                os._exit(0)
        gone.close()
        os.close(writer)
        alone: list[float] = []
        for _ in range(blocks):
            alone += bare(files, BLOCK)
            go.send(b"g")
            go.recv(1)
        go.close()
        with open(reader, "rb") as file:
            through = pickle.load(file)
        os.waitpid(pid, 0)
        return alone, through
    finally:
        daemon.stop()


def report(directory: Path, blocks: int, line: Callable[[str, list[float]], str]) -> bool:
    """Measure below the new `directory`, print, and tell whether the bounds hold."""
    directory.mkdir(mode=0o755)
    alone, made = measure(directory / "made", blocks, "--shared-seconds", "0")
    beside, shared = measure(directory / "shared", blocks)
    alone += beside
    print(f"{f'an image of {LAYERS} layers, microseconds':<42}{'min':>11}{'median':>11}{'p99':>11}")
    for name, times in ((BARE, alone), (MADE, made), (SHARED, shared)):
        print(line(name, times))
    alone_for, made_in, shared_in = (statistics.median(times) for times in (alone, made, shared))
    print(f"median, shared: {shared_in * 1e3:.1f} ms (at most {MAXIMUM * 1e3:.0f})")
    print(f"ratio of the medians, all made anew: {made_in / alone_for:.1f}")
    print(f"ratio of the medians, shared: {shared_in / alone_for:.1f} (at most {RATIO:.0f})")
    return shared_in <= MAXIMUM and shared_in / alone_for <= RATIO
