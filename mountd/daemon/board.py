"""What each worker is doing and since when, in memory that it shares with the listener.

A worker writes its own row and nobody else's; the listener only reads. So it costs no message to say that a
phase has begun, and a worker that hangs cannot hold up the one who measures it. A row is one aligned 64-bit
number, which is stored and loaded at once: half of a row would look like a worker that hangs.
"""

from __future__ import annotations

import mmap
import time

from mountd.service.phase import Phase

PHASE_BITS = 3
ROW_SIZE = 8


class Board:
    """Phase and its beginning (time.monotonic()) for each slot."""

    def __init__(self, slots: int) -> None:
        """Map the memory; whoever is forked afterwards shares it."""
        self._rows = memoryview(mmap.mmap(-1, slots * ROW_SIZE)).cast("Q")

    def enter(self, slot: int, phase: Phase) -> None:
        """Say that `slot` begins `phase` now."""
        self._rows[slot] = time.monotonic_ns() << PHASE_BITS | phase

    def read(self, slot: int) -> tuple[Phase, float]:
        """Return the phase of `slot` and when it began."""
        row = self._rows[slot]
        return Phase(row & (1 << PHASE_BITS) - 1), (row >> PHASE_BITS) / 1e9
