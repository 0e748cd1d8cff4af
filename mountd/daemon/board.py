"""What each worker is doing and since when, in memory that it shares with the listener.

A worker writes its own row and nobody else's; the listener only reads. So it costs no message to say that a
phase has begun, and a worker that hangs cannot hold up the one who measures it.
"""

from __future__ import annotations

import mmap
import struct
import time

from mountd.service.phase import Phase

ROW = struct.Struct("=dI4x")


class Board:
    """Phase and its beginning (time.monotonic()) for each slot."""

    def __init__(self, slots: int) -> None:
        """Map the memory; whoever is forked afterwards shares it."""
        self._memory = mmap.mmap(-1, slots * ROW.size)

    def enter(self, slot: int, phase: Phase) -> None:
        """Say that `slot` begins `phase` now."""
        ROW.pack_into(self._memory, slot * ROW.size, time.monotonic(), phase)

    def read(self, slot: int) -> tuple[Phase, float]:
        """Return the phase of `slot` and when it began."""
        since, phase = ROW.unpack_from(self._memory, slot * ROW.size)
        return Phase(phase), since
