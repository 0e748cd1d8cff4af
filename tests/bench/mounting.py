"""What `mount -t mountd` takes, from exec to attached, next to `mount -o loop` of the same squashfs image.

All by mount(8), in turns of one run, in a mount namespace of their own where the installed helper is in the
place that mount(8) looks at: by root, as `mount -o loop` has to be, and by an ordinary user, for whom mountd
attaches it. `mount -o loop` makes a superblock each time, and so does mountd where it keeps none; what it
takes for a clone of one that it has kept is measured as well. Unmounting is not.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation, Unmount
from mountd.kernel.libc import call as system_call
from mountd.source.remembered import SETTLED
from tests.bench.serving import Serving
from tests.container import USER, forked
from tests.daemon import ROOT
from tests.images import build_image, build_tree
from tests.programs import environment, with_mount_helper

POLICY = """
[[rule]]
name = "squashfs by its place"
image = {{ location = "{}/*.squashfs" }}
caller = {{ host = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["squashfs"], idmap = ["none"], attach = ["{}/$UID/**"] }}
verdict = "allow"
"""
LOOP = "mount -o loop"
# What no program of the interpreter's can take less than.
NOTHING, DO_NOTHING = "python3 -IS -c pass", ("/usr/bin/python3", "-IS", "-c", "pass")
FIRST, AGAIN, USERS = (
    "mount -t mountd",
    "the same, of a superblock that is kept",
    "mount -t mountd, by a user",
)
# What decides whether the measurement is good; of the others it is only said.
HELD = (FIRST,)
MAXIMUM_RATIO = 3.0
MAXIMUM_CPU = 0.045  # seconds
ROUNDS = 30


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall clock and CPU time of each call, in seconds; the CPU is that of mount(8) and its helper."""

    wall: list[float]
    cpu: list[float]


def used() -> float:
    """Return the CPU time of the children that have ended, in seconds."""
    total = resource.getrusage(resource.RUSAGE_CHILDREN)
    return total.ru_utime + total.ru_stime


def call(words: Sequence[str], socket: Path, cost: Cost, uid: int = 0) -> None:
    """Run a program and note what it took."""
    cpu, start = used(), time.perf_counter()
    subprocess.run(
        words,
        env=environment(socket),
        check=True,
        stdin=subprocess.DEVNULL,
        user=uid,
        group=uid,
        extra_groups=[],
    )
    cost.wall.append(time.perf_counter() - start)
    cost.cpu.append(used() - cpu)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to mount: by which command, which image, at which place, by whom, and which daemon it asks.

    Each has an image of its own: `mount -o loop` uses what there is for it already.
    """

    command: tuple[str, ...]
    image: Path
    target: Path
    socket: Path
    uid: int = 0


def measure(ways: dict[str, Way], prefix: Path, rounds: int) -> dict[str, Cost]:
    """Mount in all ways, in turns, with what is installed at `prefix`."""

    def work() -> dict[str, Cost]:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with_mount_helper(prefix)
        os.makedirs("/run/mount", exist_ok=True)
        system_call("mount", b"none", b"/run/mount", b"tmpfs", 0, b"mode=0755")
        costs = {name: Cost([], []) for name in (*ways, NOTHING)}
        for number in range(rounds + 3):
            for name, way in ways.items():
                words = [*way.command, str(way.image), str(way.target)]
                call(words, way.socket, costs[name], way.uid)
                mount_api.umount(str(way.target), Unmount.DETACH)
            call(DO_NOTHING, way.socket, costs[NOTHING])
            if number == 2:  # so far, it was to warm up
                for cost in costs.values():
                    cost.wall.clear()
                    cost.cpu.clear()
        return costs

    return forked(work)


def report(directory: Path, rounds: int = ROUNDS) -> bool:
    """Measure below the new `directory`, print, and tell whether what is held to the bounds keeps them."""
    directory.mkdir(mode=0o755)
    prefix, own = directory / "usr", directory / str(USER)
    subprocess.run(["make", "-s", "install", f"PREFIX={prefix}"], cwd=ROOT, check=True)
    # The first start would write these, to where it may not.
    subprocess.run(
        ["/usr/bin/python3", "-I", "-m", "compileall", "-q", prefix / "lib/mountd/python"], check=True
    )
    images = [build_image("squashfs", build_tree(directory / "tree"), directory / "0.squashfs")]
    for number in range(1, 4):
        images.append(directory / f"{number}.squashfs")
        shutil.copyfile(images[0], images[-1])
    target = directory / "target"
    for path, uid in ((target, 0), (own, USER), (own / "target", USER)):
        path.mkdir(mode=0o755)
        os.chown(path, uid, uid)
    subprocess.run(["sync"], check=True)
    time.sleep(SETTLED / 1e9)
    policy = POLICY.format(directory, directory)
    with (
        serving(directory / "daemon", policy, "--shared-seconds", "0") as daemon,
        serving(directory / "keeping", policy, "--shared-seconds", "60") as keeping,
    ):
        by_mountd = ("/usr/bin/mount", "-t", "mountd")
        ways = {
            LOOP: Way(("/usr/bin/mount", "-o", "loop"), images[0], target, daemon),
            FIRST: Way(by_mountd, images[1], target, daemon),
            AGAIN: Way(by_mountd, images[2], target, keeping),
            USERS: Way(by_mountd, images[3], own / "target", daemon, USER),
        }
        costs = measure(ways, prefix, rounds)
    good = True
    for name, cost in costs.items():
        wall, cpu = statistics.median(cost.wall), statistics.median(cost.cpu)
        print(f"{name:<42}{wall * 1e3:>8.1f} ms, CPU {cpu * 1e3:.1f} ms, of {len(cost.wall)} each, squashfs")
        if name not in (LOOP, NOTHING):
            ratio = wall / statistics.median(costs[LOOP].wall)
            held = ratio <= MAXIMUM_RATIO and cpu <= MAXIMUM_CPU
            good = good and (held or name not in HELD)
            print(
                f"ratio of the medians: {ratio:.1f} (at most {MAXIMUM_RATIO:.0f}; "
                f"CPU {MAXIMUM_CPU * 1e3:.0f} ms): {'held' if held else 'not held'}"
            )
    return good


@contextmanager
def serving(directory: Path, policy: str, *arguments: str) -> Iterator[Path]:
    """Yield the socket of a daemon."""
    daemon = Serving(directory, policy, arguments)
    try:
        yield daemon.socket
    finally:
        daemon.stop()
