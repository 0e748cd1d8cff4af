"""Many containers that have mounted the same image: how often its contents are in memory."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.bench.seed.runner import Runner, as_root, drop_caches, used_memory
from tests.bench.seed.ways import Way, erofs
from tests.container import USER, in_container

NOTHING = 0.1  # of the first's, which is what others do to memory meanwhile
FIRST_ID = 1 << 20  # of the first container's 65536


def growth(readers: list[Runner]) -> tuple[int, list[float]]:
    """Have each read the same files; return the bytes of one, and by how many MiB memory grew with each."""
    drop_caches()
    for reader in readers:
        reader.prime()
    size, grown = 0, []
    for reader in readers:
        before = used_memory()
        size = reader.read()
        grown.append(used_memory() - before)
    return size, grown


def measure(image: Path, target: Path, socket: Path, count: int) -> tuple[bool, str]:
    """Return whether all of them together have what they read in memory once, and what was measured."""
    way = Way("", lambda _: erofs(str(image)), str(image))
    with ExitStack() as stack:

        def start(number: int) -> Runner:
            uids = ((0, FIRST_ID + 65536 * number, 65536),)
            enter = partial(in_container, uids=uids, owner=USER)
            runner = Runner(enter, lambda target: way.by_mountd(target, socket), target)
            stack.callback(runner.stop)
            return runner

        runners = [start(number) for number in range(count)]
        superblocks = {runner.mount()["superblock"] for runner in runners}
        size, grown = growth(runners)
    with ExitStack() as stack:
        byhand = [Runner(as_root, way.by_hand, target) for _ in range(2)]
        for runner in byhand:
            stack.callback(runner.stop)
            runner.mount()
        apart = growth(byhand)[1]
    first, others = grown[0], grown[1:]
    said = (
        f"{count} containers, each a user namespace with ids of its own, that have mounted one erofs image "
        f"by mountd within seconds have {len(superblocks)} superblock(s). Each has read {size >> 20} MiB of "
        f"files, one after the other: memory grew by {first:.0f} MiB with the first, and by "
        f"{statistics.median(others):.1f} MiB (median) with each of the others. Of two mounts by hand, it "
        f"grew by {apart[0]:.0f} MiB with the first and by {apart[1]:.0f} MiB with the second."
    )
    return len(superblocks) == 1 and statistics.median(others) <= NOTHING * first, said
