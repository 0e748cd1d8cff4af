"""How many lines about one owner's requests the journal gets, in memory that all workers share.

An owner who asks as fast as it can would fill the journal, and push out of it what it says of others. So
each has LINES lines in a window of SECONDS; what is left out is counted, and told with the first line of a
later window. Owners whose uids are the same modulo ROWS share a row. Two workers that count at the same
moment may count one line instead of two, which lets a few lines more through and costs nobody a lock.
"""

from __future__ import annotations

import mmap

LINES = 100
SECONDS = 10
ROWS = 1024
FIELDS = 3  # the number of the window, lines written in it, lines left out since the last that told


class Throttle:
    """The counts of all owners, for this process and those that it forks."""

    def __init__(self) -> None:
        """Map the memory."""
        self._rows = memoryview(mmap.mmap(-1, ROWS * FIELDS * 8)).cast("Q")

    def admit(self, owner_uid: int, now: float) -> int | None:
        """Return how many lines were left out before this one, None if this one is to be left out as well.

        `now` is time.monotonic().
        """
        at = owner_uid % ROWS * FIELDS
        window = int(now / SECONDS) + 1
        if self._rows[at] != window:
            self._rows[at], self._rows[at + 1] = window, 0
        if self._rows[at + 1] >= LINES:
            self._rows[at + 2] += 1
            return None
        self._rows[at + 1] += 1
        left_out, self._rows[at + 2] = self._rows[at + 2], 0
        return left_out
