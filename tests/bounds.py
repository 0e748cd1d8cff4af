"""What a piece of work costs, without a clock: lines of mountd that are run, and memory held at once.

What a parser has C code do for it (a split, a regular expression) is one line, however long it takes; but
that cannot run more often than the lines do, and what it makes is counted as memory.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import mountd

OURS = f"{Path(mountd.__path__[0])}/"
FOUR = 4
# Beyond four times as much: what is not in proportion to the size may be there once more.
MORE_LINES, MORE_MEMORY = 64, 8 << 10


class Cost(NamedTuple):
    """Lines that were run, and bytes that were held at once at most, beyond what was there before."""

    lines: int
    memory: int


def lines_run(work: Callable[[], object]) -> int:
    """Count the lines of mountd that `work` runs."""
    count = 0

    def of_frame(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return of_frame

    def of_call(frame: FrameType, _event: str, _argument: object) -> Any:
        return of_frame if frame.f_code.co_filename.startswith(OURS) else None

    before = sys.gettrace()
    sys.settrace(of_call)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def memory_held(work: Callable[[], object]) -> int:
    """Return the most that `work` holds at once."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def cost(work: Callable[[], object]) -> Cost:
    """Return what `work` costs, once what it makes only the first time is there."""
    work()
    return Cost(lines_run(work), memory_held(work))


def check_in_proportion(make: Callable[[int], Callable[[], object]], size: int) -> None:
    """Have `make(size)` return work on so much; four times that must not cost more than four times it."""
    small, large = cost(make(size)), cost(make(FOUR * size))
    assert large.lines <= FOUR * small.lines + MORE_LINES, (size, small, large)
    assert large.memory <= FOUR * small.memory + MORE_MEMORY, (size, small, large)
