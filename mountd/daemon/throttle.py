"""How many lines about one owner's requests the journal gets, in memory that all workers share.

An owner who asks as fast as it can would fill the journal, and push out of it what it says of others. So
each has LINES lines in a window of SECONDS; what is left out is counted, and told with the first line of a
later window, or as soon as another owner gets the row. A row is one of WAYS for its owner, and of nobody
else in that window; only where as many others have all of these, their rows are shared. Two workers that
count at the same moment may count one line instead of two, or give one row to two owners, which lets a few
lines more or less through and costs nobody a lock.
"""

from __future__ import annotations

import mmap
import time
from typing import TYPE_CHECKING

from mountd.daemon.journal import WORKER_ID, Priority, log

if TYPE_CHECKING:
    from mountd.caller.identify import OwnerKey

LINES = 100
SECONDS = 10
ROWS = 1024
WAYS = 8
SELDOM_SECONDS = 60
# Whose it is, the number of the window, lines written in it, lines left out since the last that told. What
# nobody has had yet looks like a row of root's.
FIELDS = 4


class Throttle:
    """The counts of all owners, for this process and those that it forks."""

    def __init__(self) -> None:
        """Map the memory."""
        self._rows = memoryview(mmap.mmap(-1, ROWS * FIELDS * 8)).cast("Q")

    def admit(self, owner: OwnerKey, now: float) -> int | None:
        """Return how many lines were left out before this one, None if this one is to be left out as well.

        `now` is time.monotonic().
        """
        uid, namespace = owner
        window = int(now / SECONDS) + 1
        at = self._row(uid + namespace, uid << 32 | namespace, window)
        if self._rows[at + 1] != window:
            self._rows[at + 1], self._rows[at + 2] = window, 0
        if self._rows[at + 2] >= LINES:
            self._rows[at + 3] += 1
            return None
        self._rows[at + 2] += 1
        left_out, self._rows[at + 3] = self._rows[at + 3], 0
        return left_out

    def _row(self, first: int, key: int, window: int) -> int:
        """Return where the row of an owner begins; it gets one that nobody else needs in this window."""
        rows = self._rows
        ways = [(first + way) % ROWS * FIELDS for way in range(WAYS)]
        for at in ways:
            if rows[at] == key:
                return at
        for at in ways:
            if rows[at + 1] != window:
                before, left_out = rows[at], rows[at + 3]
                rows[at], rows[at + 1], rows[at + 2], rows[at + 3] = key, 0, 0, 0
                if left_out:
                    tell(before >> 32, left_out)
                return at
        return ways[0]

    def may_write(self, owner: OwnerKey) -> bool:
        """Tell whether the journal gets a line more about this owner; tell it what it did not get before."""
        left_out = self.admit(owner, time.monotonic())
        if left_out:
            tell(owner[0], left_out)
        return left_out is not None


def tell(owner_uid: int, left_out: int) -> None:
    """Tell the journal what it did not get."""
    log(
        Priority.NOTICE,
        f"{left_out} lines about requests of uid {owner_uid} were left out",
        message_id=WORKER_ID,
        owner_uid=str(owner_uid),
        left_out=str(left_out),
    )


class Seldom:
    """Lines that nobody in particular is the cause of: each text once in SELDOM_SECONDS, with a count."""

    def __init__(self) -> None:
        """Nothing was told yet."""
        self._told: dict[str, tuple[float, int]] = {}

    def admit(self, text: str, now: float) -> int | None:
        """Return how often `text` was left out before, None if it is to be left out; as in `Throttle`.

        There are few texts: they are mountd's own, with an error of the kernel's in them.
        """
        last, left_out = self._told.get(text, (None, 0))
        if last is not None and now - last < SELDOM_SECONDS:
            self._told[text] = (last, left_out + 1)
            return None
        self._told[text] = (now, 0)
        return left_out

    def log(self, priority: Priority, text: str) -> None:
        """Write the line, unless it was written a moment ago."""
        left_out = self.admit(text, time.monotonic())
        if left_out is not None:
            more = f" (and {left_out} times since that was last told)" if left_out else ""
            log(priority, text + more, message_id=WORKER_ID)
