"""Exchanging two names while something looks at one of them (RENAME_EXCHANGE of rename(2)).

A check that looks at a path more than once, and takes what it finds for the same thing, is won by whoever
exchanges it in between. So each check of mountd's runs here while another process exchanges what it should
vouch for with what it must never vouch for, as fast as the kernel can. That the race is real is shown by a
naive check of the same kind in the same place, which has to lose.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests.container import USER as ATTACKER

__all__ = ["ATTACKER", "Ground", "Seen", "exchanged", "loses", "never_wins"]

SWAPS = 100_000
CHECKS = 200
SECONDS = 90.0  # until a race has to be over, on a busy machine
AT_FDCWD, RENAME_EXCHANGE = -100, 2
COUNT = struct.Struct("=Q")


class Seen(Enum):
    """What a check says: it vouches for what it should, for nothing, or for what the attacker put there."""

    GOOD = "good"
    REFUSED = "refused"
    WON = "won"


Check = Callable[[], Seen]


@dataclass(frozen=True, slots=True)
class Ground:
    """A directory that is root's alone, and one of the attacker's."""

    trusted: Path
    theirs: Path

    def write(self, name: str, good: bytes, evil: bytes, mode: int = 0o644) -> tuple[Path, Path]:
        """Have a file of this name on both sides; return the paths."""
        paths = (self.trusted / name, self.theirs / name)
        for path, contents in zip(paths, (good, evil), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents)
            path.chmod(mode)
        self.give(paths[1])
        return paths

    def give(self, path: Path) -> None:
        """Let the attacker have a file or a directory, and the directories of theirs that it is in."""
        while path != self.theirs:
            os.chown(path, ATTACKER, ATTACKER, follow_symlinks=False)
            path = path.parent


@contextmanager
def exchanged(one: Path, other: Path) -> Iterator[Callable[[], int]]:
    """Have a process exchange the two names; what is yielded tells how often it has."""
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    pid = os.fork()
    if pid == 0:
        try:
            exchange_for_ever(os.fsencode(one), os.fsencode(other), shared)
        finally:
            os._exit(1)
    try:
        yield lambda: int(COUNT.unpack_from(shared)[0])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        shared.close()


def exchange_for_ever(one: bytes, other: bytes, shared: mmap.mmap) -> None:
    """Be the other process; return if an exchange fails, but for where something is mounted."""
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    count = 0
    while True:
        if renameat2(AT_FDCWD, one, AT_FDCWD, other, RENAME_EXCHANGE) == 0:
            count += 1
            COUNT.pack_into(shared, 0, count)
        elif ctypes.get_errno() != errno.EBUSY:
            return


def race(one: Path, other: Path, check: Check, *, until_won: bool = False) -> Counter[Seen]:
    """Check while the names are exchanged SWAPS times, and CHECKS times at least; or until it is won."""
    seen: Counter[Seen] = Counter()
    deadline = time.monotonic() + SECONDS
    with exchanged(one, other) as swaps:
        while until_won or swaps() < SWAPS or seen.total() < CHECKS:
            seen[check()] += 1
            assert time.monotonic() < deadline, f"{swaps()} exchanges, {seen}"
            if until_won and seen[Seen.WON]:
                break
    return seen


def never_wins(one: Path, other: Path, check: Check, *, refuses: bool = True) -> None:
    """Assert that exchanging the names never has the check vouch for the wrong thing.

    It has to vouch for the right one now and then; and, unless it has no reason to, refuse at other times.
    """
    seen = race(one, other, check)
    assert seen[Seen.WON] == 0, seen
    assert seen[Seen.GOOD], seen
    assert seen[Seen.REFUSED] or not refuses, seen


def loses(one: Path, other: Path, check: Check) -> None:
    """Assert that a check which is as bad as can be is found out."""
    seen = race(one, other, check, until_won=True)
    assert seen[Seen.WON], seen
