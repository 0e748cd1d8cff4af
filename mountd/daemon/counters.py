"""How much has been done, in memory that all processes of the daemon share.

Every row has one writer: a worker the row of its slot, the listener the one behind them. The next worker of
a slot goes on where the one before has stopped, which had ended by then; so nothing is lost with a worker
that is killed, and a total is the sum of the rows. Each number is an aligned word of 64 bits, which is
stored and loaded at once. Nothing waits for anybody: who reads may see a request of this moment in one
number and not yet in another.

What a method was answered with are its *results*: “done”, a verdict, or the name of an error.
"""

from __future__ import annotations

import mmap
import time
from bisect import bisect_left
from enum import IntEnum, auto
from itertools import accumulate
from typing import TYPE_CHECKING

from mountd.errors import MountdError
from mountd.service.mountfs_errors import WIRE_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Upper bounds of the classes of the histogram, in seconds: from a question about the interfaces to the
# deadlines; an import takes longer.
BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CLASSES = len(BOUNDS) + 1

DONE = "done"
OTHER = "other"  # an error that nobody has thought of
MAXIMUM_METHODS = 64  # more than are declared


def error_names() -> Iterator[str]:
    """Yield the last part of the name of every error that there is on the wire, once."""
    names = {each.wire_name for each in MountdError.__subclasses__()} - {""} | WIRE_NAMES
    names |= {"MethodNotFound", "InterfaceNotFound", "MethodNotImplemented"}
    yield from sorted({each.rpartition(".")[2] for each in names})


RESULTS = (DONE, "allow", "deny", "ask", *error_names(), OTHER)
NUMBERS = {name: number for number, name in enumerate(RESULTS)}
ALLOW = NUMBERS["allow"]

# Of a method in a row: a number for each result, the classes of its latency, and the sum in microseconds.
AT_CLASSES = len(RESULTS)
AT_SUM = AT_CLASSES + CLASSES
WIDTH = AT_SUM + 1
# A row: the number of the method that is being served, since when in nanoseconds (time.monotonic_ns()), and
# then the methods. The first is for no method.
AT_SINCE = 1
AT_METHODS = 2
ROW = AT_METHODS + MAXIMUM_METHODS * WIDTH


class Slot(IntEnum):
    """What has become of a worker."""

    NONE = 0
    IDLE = 1
    BUSY = 2
    STUCK = 3
    KILLED = 4  # and not gone yet


class Figure(IntEnum):
    """What the listener says of all."""

    STARTED = 0  # seconds since the epoch
    CONNECTIONS = auto()  # now
    ACCEPTED = auto()
    QUEUE = auto()  # now
    KILLED = auto()
    FORKS = auto()
    SERVERS = auto()  # fork servers that were started
    GENERATION = auto()  # of the policy
    RELOAD = auto()  # when it was last tried to read it anew, 0 for never
    RELOAD_WORKED = auto()


class Counters:
    """All numbers of one daemon. Made before the first fork."""

    def __init__(self, slots: int) -> None:
        """Map the memory; whoever is forked afterwards shares it."""
        self._slots = slots
        size = (slots + 1) * ROW + slots + len(Figure)
        self._memory = mmap.mmap(-1, size * 8)
        self._cells = memoryview(self._memory).cast("Q")
        self._states = self._cells[(slots + 1) * ROW :][:slots]
        self._figures = self._cells[(slots + 1) * ROW + slots :]
        self._figures[Figure.STARTED] = int(time.time())
        self._methods: dict[str, int] = {}
        self.methods: tuple[str, ...] = ("",)

    def hide_from_children(self) -> None:
        """As a worker: have those that are forked from now on do without. Raises OSError."""
        self._memory.madvise(mmap.MADV_DONTFORK)

    def name_methods(self, methods: Sequence[str]) -> None:
        """Say which methods there are, before the first worker is forked; always the same ones."""
        self.methods = ("", *sorted(methods)[: MAXIMUM_METHODS - 1])
        self._methods = {name: number for number, name in enumerate(self.methods)}

    def begin(self, slot: int, method: str) -> None:
        """Say that a worker serves this method from now on; one that is not known is none."""
        self._cells[slot * ROW + AT_SINCE] = time.monotonic_ns()
        self._cells[slot * ROW] = self._methods.get(method, 0)

    def count(self, slot: int, result: str, seconds: float) -> None:
        """Count the request that was begun, and end it."""
        row = slot * ROW
        self._add(slot, self._cells[row], result, seconds)
        self._cells[row] = 0

    def count_for(self, slot: int | None, result: str) -> None:
        """As the listener: count a request that no worker will, such as that of one that was killed.

        `slot` is the worker's, None for a connection that no worker has had.
        """
        method, seconds = 0, 0.0
        if slot is not None:
            # Whoever wrote here is being killed, or has ended.
            row = slot * ROW
            method = min(self._cells[row], MAXIMUM_METHODS - 1)
            seconds = max(0, time.monotonic_ns() - self._cells[row + AT_SINCE]) / 1e9 if method else 0.0
            self._cells[row] = 0
        self._add(self._slots, method, result, seconds)

    def _add(self, row: int, method: int, result: str, seconds: float) -> None:
        """Add one request to the row of whoever writes."""
        cells, at = self._cells, row * ROW + AT_METHODS + method * WIDTH
        cells[at + NUMBERS.get(result, NUMBERS[OTHER])] += 1
        cells[at + AT_CLASSES + bisect_left(BOUNDS, seconds)] += 1
        cells[at + AT_SUM] += int(seconds * 1e6)

    def set_slot(self, slot: int, state: Slot) -> None:
        """As the listener: say what has become of a worker."""
        self._states[slot] = state

    def set(self, figure: Figure, value: int) -> None:
        """As the listener: say how much there is."""
        self._figures[figure] = value

    def add(self, figure: Figure) -> None:
        """As the listener: say that there was one more."""
        self._figures[figure] += 1

    def get(self, figure: Figure) -> int:
        """Return a figure of the listener's."""
        return self._figures[figure]

    def restart(self) -> None:
        """As the listener: forget the workers and connections of a fork server that has ended."""
        for slot in range(self._slots):
            self._states[slot] = Slot.NONE
        self._figures[Figure.CONNECTIONS] = self._figures[Figure.QUEUE] = 0
        self._figures[Figure.SERVERS] += 1

    def slots(self) -> dict[Slot, int]:
        """Return how many workers there are in each state."""
        states = self._states.tolist()
        return {state: states.count(state) for state in Slot}

    def requests(self) -> list[tuple[str, str, int]]:
        """Return how often each method has had each result, those that never were left out."""
        return [
            (method, result, count)
            for method, totals in self._totals()
            for result, count in zip(RESULTS, totals, strict=False)
            if count
        ]

    def latencies(self) -> list[tuple[str, list[int], float]]:
        """Return for each method that was called how many calls took at most as long as each bound.

        The last number is that of all calls; the sum of what they took is in seconds.
        """
        found = []
        for method, totals in self._totals():
            classes = totals[AT_CLASSES:AT_SUM]
            if method and any(classes):
                found.append((method, list(accumulate(classes)), totals[AT_SUM] / 1e6))
        return found

    def _totals(self) -> Iterator[tuple[str, list[int]]]:
        """Yield for each method the sums of its numbers in all rows."""
        for number, method in enumerate(self.methods):
            first = AT_METHODS + number * WIDTH
            rows = (
                self._cells[row * ROW + first : row * ROW + first + WIDTH].tolist()
                for row in range(self._slots + 1)
            )
            yield method, [sum(column) for column in zip(*rows, strict=True)]


class Tally:
    """The row of one worker."""

    __slots__ = ("_counters", "_slot")

    def __init__(self, counters: Counters, slot: int) -> None:
        """`slot` is the worker's."""
        self._counters = counters
        self._slot = slot

    def begin(self, method: str) -> None:
        """As in `Counters`."""
        self._counters.begin(self._slot, method)

    def count(self, result: str, seconds: float) -> None:
        """As in `Counters`."""
        self._counters.count(self._slot, result, seconds)
