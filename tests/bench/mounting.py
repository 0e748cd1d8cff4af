"""What `mount -t mountd` takes, from exec to attached, next to `mount -o loop` of the same squashfs image.

Both by root and by mount(8), in turns of one run, in a mount namespace of their own where the installed
helper is in the place that mount(8) looks at. Unmounting is not measured.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation, Unmount
from tests.container import forked
from tests.daemon import ROOT
from tests.images import build_image, build_tree
from tests.programs import environment, with_mount_helper

POLICY = """
[[rule]]
name = "squashfs by its place"
image = {{ location = "{}/*.squashfs" }}
caller = {{ host = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["squashfs"], idmap = ["none"] }}
verdict = "allow"
"""
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


def call(words: Sequence[str], socket: Path, cost: Cost) -> None:
    """Run a program and note what it took."""
    cpu, start = used(), time.perf_counter()
    subprocess.run(words, env=environment(socket), check=True, stdin=subprocess.DEVNULL)
    cost.wall.append(time.perf_counter() - start)
    cost.cpu.append(used() - cpu)


def measure(directory: Path, socket: Path) -> tuple[Cost, Cost]:
    """Mount an image below `directory` both ways; the policy of the daemon at `socket` has POLICY's rule."""
    prefix = directory / "usr"
    subprocess.run(["make", "-s", "install", f"PREFIX={prefix}"], cwd=ROOT, check=True)
    # The first start would write these, to where it may not.
    subprocess.run(
        ["/usr/bin/python3", "-I", "-m", "compileall", "-q", prefix / "lib/mountd/python"], check=True
    )
    image = build_image("squashfs", build_tree(directory / "tree-mounting"), directory / "mounting.squashfs")
    target = directory / "target"
    target.mkdir()

    def work() -> tuple[Cost, Cost]:
        namespaces.unshare(Clone.NEWNS)
        mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
        with_mount_helper(prefix)
        loop, mountd = Cost([], []), Cost([], [])
        for number in range(ROUNDS + 3):
            call(["/usr/bin/mount", "-o", "loop", str(image), str(target)], socket, loop)
            mount_api.umount(str(target), Unmount.DETACH)
            call(["/usr/bin/mount", "-t", "mountd", str(image), str(target)], socket, mountd)
            mount_api.umount(str(target), Unmount.DETACH)
            if number == 2:  # so far, it was to warm up
                for cost in (loop, mountd):
                    cost.wall.clear()
                    cost.cpu.clear()
        return loop, mountd

    try:
        return forked(work)
    finally:
        os.rmdir(target)


def report(directory: Path, socket: Path) -> bool:
    """Measure, print, and tell whether both bounds hold."""
    loop, mountd = measure(directory, socket)
    for name, cost in (("mount -o loop", loop), ("mount -t mountd", mountd)):
        wall, cpu = statistics.median(cost.wall) * 1e3, statistics.median(cost.cpu) * 1e3
        print(f"{name:<42}{wall:>8.1f} ms, CPU {cpu:.1f} ms, of {len(cost.wall)} each, squashfs")
    ratio = statistics.median(mountd.wall) / statistics.median(loop.wall)
    print(f"ratio of the medians: {ratio:.1f} (at most {MAXIMUM_RATIO:.0f}; CPU {MAXIMUM_CPU * 1e3:.0f} ms)")
    return ratio <= MAXIMUM_RATIO and statistics.median(mountd.cpu) <= MAXIMUM_CPU
