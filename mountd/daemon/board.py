"""What each worker is doing and since when, in memory that it shares with the listener.

A worker writes its own row and nobody else's; the listener only reads. So it costs no message to say that a
phase has begun, and a worker that hangs cannot hold up the one who measures it. A row is one aligned 64-bit
number, which is stored and loaded at once: half of a row would look like a worker that hangs. From the
lowest bit on: the phase, the seconds that it may take if they are not the usual ones, and when it began in
microseconds (time.monotonic(), for 17 years).
"""

from __future__ import annotations

import mmap
import time

from mountd.service.phase import Phase

PHASE_BITS = 3
SECONDS_BITS = 12
MAXIMUM_SECONDS = (1 << SECONDS_BITS) - 1
ROW_SIZE = 8


class Board:
    """Phase, its beginning (time.monotonic()) and its own deadline for each slot."""

    def __init__(self, slots: int) -> None:
        """Map the memory; whoever is forked afterwards shares it."""
        self._memory = mmap.mmap(-1, slots * ROW_SIZE)
        self._rows = memoryview(self._memory).cast("Q")

    def hide_from_children(self) -> None:
        """As a worker: have those that are forked from now on do without, as what parses images does.

        Else whoever has got hold of such a child could have other workers killed. Raises OSError.
        """
        self._memory.madvise(mmap.MADV_DONTFORK)

    def enter(self, slot: int, phase: Phase, seconds: int = 0) -> None:
        """Say that `slot` begins `phase` now, which may take `seconds`, 0 for as long as usual."""
        began = time.monotonic_ns() // 1000
        self._rows[slot] = (
            began << PHASE_BITS + SECONDS_BITS | min(seconds, MAXIMUM_SECONDS) << PHASE_BITS | phase
        )

    def read(self, slot: int) -> tuple[Phase, float, int]:
        """Return the phase of `slot`, when it began, and the seconds that it may take, 0 for the usual."""
        row = self._rows[slot]
        phase = Phase(row & (1 << PHASE_BITS) - 1)
        return phase, (row >> PHASE_BITS + SECONDS_BITS) / 1e6, row >> PHASE_BITS & MAXIMUM_SECONDS
