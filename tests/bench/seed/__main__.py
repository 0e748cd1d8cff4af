"""`make bench-seed`: a tree like a root file system, mounted by mountd for a container and by hand.

`ls -lR` with nothing in memory and with everything, and the memory that it takes. Both of a pair are
measured in turns, within a second or two, and what counts is the median of their ratios, so that other load
does little harm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import ExitStack
from pathlib import Path

from mountd.kernel import mount_api, namespaces
from mountd.kernel.flags import Clone, Propagation
from mountd.source.remembered import SETTLED
from tests.bench.seed import containers, figures
from tests.bench.seed.figures import Row
from tests.bench.seed.images import make_images
from tests.bench.seed.runner import Runner, as_container, as_root, drop_caches, used_memory
from tests.bench.seed.tree import Copied, copy_tree
from tests.bench.seed.ways import POLICY, Way, ways
from tests.container import mapper
from tests.daemon import ROOT, Daemon

HERE = Path(__file__).parent
PLOT, PLOT_OF_README = ROOT / "dist/seed.png", HERE / "seed.png"
README = ROOT / "README.md"
WARM = 8  # pairs in each round
LEAST = 3  # rounds
ENTRIES = 24_000


class Pair:
    """The two processes that have the tree mounted in one way, and what was measured of them."""

    def __init__(self, way: Way, target: Path, socket: Path, stack: ExitStack, *, control: bool) -> None:
        """Start them; `stack` ends them. Raises RuntimeError if one cannot mount, or they differ.

        With `control` the second one mounts by hand as well.
        """
        self.row = Row(way.name)
        self.lines: set[int] = set()
        self.runners: dict[str, Runner] = {}
        by_hand = as_root, way.by_hand
        by_mountd = as_container, lambda target: way.by_mountd(target, socket)
        for who, (enter, mount) in (("direct", by_hand), ("mountd", by_hand if control else by_mountd)):
            runner = self.runners[who] = Runner(enter, mount, target)
            stack.callback(runner.stop)
            facts = runner.mount()
            if facts["direct I/O"] != way.direct_io:
                raise RuntimeError(f"{way.name}: direct I/O is {facts['direct I/O']}")
            if facts["owner"] != (0, 0):
                raise RuntimeError(f"{way.name}: the tree belongs to {facts['owner']}")
            self.lines.add(runner.count())

    def measure(self, number: int) -> None:
        """Measure one round; who is first changes with `number`."""
        order = list(self.runners)[:: 1 if number % 2 else -1]
        # Whoever comes second may find something in the cache of a disk, and each of both does once.
        cold: dict[str, list[float]] = {who: [] for who in order}
        for who in (*order, *reversed(order)):
            drop_caches()
            self.runners[who].prime()
            before = used_memory()
            cold[who].append(self.runners[who].list())
            getattr(self.row.memory, who).append(used_memory() - before)
        for who in order:
            getattr(self.row.cold, who).append(statistics.mean(cold[who]))
        self.runners[order[1]].list()  # what it had in memory was dropped for the other
        for again in range(WARM):
            for who in order[:: 1 if again % 2 else -1]:
                getattr(self.row.warm, who).append(self.runners[who].list())


def measure(all_ways: list[Way], target: Path, socket: Path, seconds: float, *, control: bool) -> list[Row]:
    """Measure rounds of all ways for so many seconds, at least LEAST of them."""
    with ExitStack() as stack:
        pairs = [
            Pair(way, target, socket, stack, control=control) for way in all_ways if way.missing is None
        ]
        lines = set().union(*(pair.lines for pair in pairs))
        if len(lines) != 1:
            raise RuntimeError(f"the trees differ: they have {lines} lines")
        end, number = time.monotonic() + seconds, 0
        while number < LEAST or time.monotonic() < end:
            for pair in pairs:
                pair.measure(number)
            number += 1
    measured = {pair.row.name: pair.row for pair in pairs}
    return [measured.get(way.name, Row(way.name, missing=way.missing)) for way in all_ways]


def draw(rows: list[Row], path: Path) -> None:
    """Have the plot made by the Python that has matplotlib."""
    path.parent.mkdir(exist_ok=True)
    subprocess.run(
        ["/usr/bin/python3", "-I", HERE / "plot.py", path],
        input=json.dumps(figures.chart(rows)),
        text=True,
        check=True,
    )


def conditions(copied: Copied, rows: list[Row]) -> str:
    """Say what was measured, and where."""
    rounds = max(len(row.cold.direct) for row in rows)
    return (
        f"{copied.entries} of the {copied.original} entries of this machine's /usr, {rounds} rounds, "
        f"{rounds * WARM} warm pairs; {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, "
        f"Linux {platform.release().split('-')[0]}"
    )


def run(directory: Path, options: argparse.Namespace) -> bool:
    """Set up in `directory`, measure, print, and tell whether everything holds."""
    begin = time.monotonic()
    trusted, target = directory / "trusted", directory / "at"
    for path in (trusted, target, directory / "empty"):
        path.mkdir(mode=0o755)
    copied = copy_tree(Path("/usr"), trusted / "tree", options.entries)
    images = make_images(trusted / "tree", trusted)
    time.sleep(SETTLED / 1e9)  # what has changed just now is not remembered
    print(f"made the images in {time.monotonic() - begin:.0f} s", flush=True)
    daemon = Daemon(directory / "daemon", POLICY.format(trusted), ("--shared-seconds", "5"))
    try:
        with mapper():
            chosen = [way for way in ways(images) if options.only in (None, way.name)]
            if all(way.missing for way in chosen):
                why = ", ".join(str(way.missing) for way in chosen) or "there is no such way"
                sys.exit(f"bench-seed: {options.only}: {why}")
            rows = measure(chosen, target, daemon.socket, options.seconds, control=options.control)
            where = conditions(copied, rows)
            print(figures.text_table(rows), where, sep="\n", flush=True)
            once, sharing = containers.measure(images.erofs, target, daemon.socket, options.containers)
    finally:
        daemon.stop()
    print(textwrap.fill(sharing, 110))
    if options.control:
        print("“mountd” is a second mount by hand")
    plot = PLOT_OF_README if options.readme else PLOT
    draw(rows, plot)
    if options.readme:
        said = f"{figures.markdown_table(rows)}\n\n{where}. {figures.verdict(rows)}\n\n{sharing}"
        README.write_text(figures.replaced(README.read_text(), said))
    print(figures.verdict(rows))
    if not once:
        print("what containers have read is in memory more than once")
    print(f"took {time.monotonic() - begin:.0f} s; the plot is in {plot}")
    return once and not any(row.exceeding() for row in rows)


def main() -> int:
    """Measure in a mount namespace of its own, and leave nothing."""
    parser = argparse.ArgumentParser(prog="bench-seed")
    parser.add_argument("--entries", type=int, default=ENTRIES, help="how many of /usr, at most")
    parser.add_argument("--seconds", type=float, default=360, help="how long to measure the table")
    parser.add_argument("--containers", type=int, default=100)
    parser.add_argument("--only", help="one of the ways, as the table calls them")
    parser.add_argument(
        "--control", action="store_true", help="have the second of each pair mount by hand, too"
    )
    parser.add_argument("--readme", action="store_true", help="put table and plot into README.md")
    options = parser.parse_args()
    if options.readme and (options.only or options.control):
        parser.error("--readme is for the whole table")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    namespaces.unshare(Clone.NEWNS)
    mount_api.set_propagation("/", Propagation.PRIVATE, recursive=True)
    directory = Path(tempfile.mkdtemp(prefix="mountd-bench-", dir="/var/lib"))
    directory.chmod(0o755)
    try:
        return 0 if run(directory, options) else 1
    finally:
        subprocess.run(["umount", "--lazy", directory / "trusted/buffered"], check=False)
        shutil.rmtree(directory)


if __name__ == "__main__":
    sys.exit(main())
