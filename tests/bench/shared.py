"""What a second mount of the same image takes, next to the first: it is a clone of what is there already.

Several images with the same contents, each mounted for the first time and then once more, by an ordinary
user. The first one finds nothing of the image in memory, as it is with images that nobody has used for a
while.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from mountd.client import Client, Request
from mountd.execute.run import Inputs, run
from mountd.execute.seal import Staging
from mountd.fds import OwnedFd
from mountd.kernel.flags import MountAttr
from mountd.plan.operations import Backing, CreateSuperblock, MakeMount, Plan, Seal
from mountd.plan.planner import FORCED, FORCED_READ_ONLY
from mountd.source.remembered import SETTLED
from tests.bench.serving import Serving
from tests.container import USER, as_user, forked
from tests.images import build_image

POLICY = """
[[rule]]
name = "bench"
image = {{ location = "{}/*" }}
caller = {{ any = true }}
require = {{ integrity = ["root-owned"] }}
grant = {{ file-systems = ["erofs", "xfs"] }}
verdict = "allow"
"""
ASKED, ALONE = "asked and answered", "the mount alone"
RATIOS = {"erofs": 0.5, "xfs": 0.02}  # at most, of the medians
# What decides whether the measurement is good. To ask and to be answered takes more than a fiftieth of what
# the kernel takes for a first mount of an xfs, whatever is done about the mount.
HELD = {("erofs", ASKED), ("erofs", ALONE), ("xfs", ALONE)}
COPIES = {"erofs": 30, "xfs": 5}


def report(directory: Path, tree: Path, line: Callable[[str, list[float]], str]) -> bool:
    """Measure below the new `directory`, print, and tell whether the ratios hold."""
    trusted = directory / "trusted"
    for path in (directory, trusted):
        path.mkdir(mode=0o755)
    images: dict[str, list[Path]] = {}
    for type, count in COPIES.items():
        images[type] = [build_image(type, tree, trusted / f"{type}-0.raw")]
        for number in range(1, count):
            images[type].append(trusted / f"{type}-{number}.raw")
            subprocess.run(["cp", "--sparse=always", images[type][0], images[type][-1]], check=True)
    subprocess.run(["sync"], check=True)
    time.sleep(SETTLED / 1e9)
    daemon = Serving(directory / "daemon", POLICY.format(trusted), ("--shared-seconds", "60"))
    good = True
    try:
        print(f"{'first and second mount, microseconds':<42}{'min':>11}{'median':>11}{'p99':>11}")
        for type, paths in images.items():
            asked = as_user(lambda paths=paths: measure(daemon.socket, paths), USER)  # type: ignore[misc]
            made = forked(lambda paths=paths, type=type: steps(directory / f"staging-{type}", paths, type))  # type: ignore[misc]
            ratios = {}
            for name, (first, second) in ((ASKED, asked), (ALONE, made)):
                ratios[name] = statistics.median(second) / statistics.median(first)
                print(line(f"{type}, {name}: the first", first))
                print(line(f"{type}, {name}: the same again", second))
            lines, held = judged(type, ratios)
            print(*lines, sep="\n")
            good = good and held
    finally:
        daemon.stop()
    return good


def judged(type: str, ratios: dict[str, float]) -> tuple[list[str], bool]:
    """Return what is said about the ratios of a file system, and whether those that are held are good."""
    bound = RATIOS[type]
    lines, good = [], True
    for name, ratio in ratios.items():
        text = f"{type}, {name}: the second of the first, medians: {ratio:.3f}"
        if (type, name) in HELD:
            text += f"; held to at most {bound}: {'good' if ratio <= bound else 'FAILED'}"
            good = good and ratio <= bound
        elif ratio > bound:
            text += f"; misses {bound}, and is not held to it; {ALONE}: {ratios[ALONE]:.3f}"
        lines.append(text)
    return lines, good


def steps(directory: Path, paths: list[Path], type: str) -> tuple[list[float], list[float]]:
    """Return the seconds that the last step of the route takes of these: making the mount, and locking it.

    For a process of its own, which leaves its mount namespace.
    """
    directory.mkdir()
    staging = Staging(str(directory), 1, 60.0)
    seal = staging.seal(0)
    first: list[float] = []
    second: list[float] = []
    attributes = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV
    backing = Backing.FILE if type == "erofs" else Backing.LOOP
    made = CreateSuperblock(type, backing, True, FORCED.get(type, ()) + FORCED_READ_ONLY.get(type, ()))
    for number, path in enumerate(paths):
        plan = Plan((made, MakeMount(attributes), Seal()), f"bench-{type}-{number}")
        with OwnedFd(os.open(path, os.O_RDONLY)) as fd:
            os.posix_fadvise(fd.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            inputs = Inputs(image_fd=fd.fileno(), userns_fd=None, seal=seal)
            for times in (first, second):
                begin = time.perf_counter()
                mount = run(plan, inputs)
                times.append(time.perf_counter() - begin)
                mount.close()
    seal.give_up_all()
    return first, second


def measure(socket: Path, paths: list[Path]) -> tuple[list[float], list[float]]:
    """Return the seconds of the first and of the second mount of each image, one after the other."""
    first, second = [], []
    with Client(str(socket)) as client:
        for path in paths:
            with Request(str(path)) as request:
                os.posix_fadvise(request.fds[0].fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                held = []
                for times in (first, second):
                    begin = time.perf_counter()
                    held.append(client.mount(request.source, request.fds, **request.parameters))
                    times.append(time.perf_counter() - begin)
                for reply in held:
                    reply.close()
    return first, second
