"""Who has to wait for whom: connections with something to read, queued fairly between owners.

An owner is who pays for a request: the uid that made the outermost user namespace, as whoever has a range of
ids can come as any of them. Owners take turns; one that has enough requests running, or too many that hang,
waits without holding up the others.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mountd.daemon.limits import MAXIMUM_RUNNING_PER_OWNER

if TYPE_CHECKING:
    from mountd.daemon.connection import Connection


class Owner:
    """What one owner has: connections, requests that run, workers that hang, and its own queue."""

    __slots__ = ("connections", "queue", "running", "stuck", "uid")

    def __init__(self, uid: int) -> None:
        """Nothing yet."""
        self.uid = uid
        self.connections = 0
        self.running = 0
        self.stuck = 0
        self.queue: deque[Connection] = deque()

    @property
    def may_run(self) -> bool:
        """Whether it has something to run and may.

        What hangs counts as well, so that not more can hang than may; who has too many of those gets an
        answer, which needs a turn, too.
        """
        return bool(self.queue) and self.running < max(1, MAXIMUM_RUNNING_PER_OWNER - self.stuck)

    @property
    def idle(self) -> bool:
        """Whether it can be forgotten."""
        return not (self.connections or self.running or self.stuck or self.queue)


class FairQueue:
    """All owners, and whose turn it is."""

    def __init__(self) -> None:
        """Nobody has come yet."""
        self._owners: dict[int, Owner] = {}
        self._turns: deque[Owner] = deque()
        self.waiting = 0  # connections in the queue

    def owner(self, uid: int) -> Owner:
        """Return the owner with this uid, new or known."""
        return self._owners.setdefault(uid, Owner(uid))

    def forget_if_idle(self, owner: Owner) -> None:
        """Drop an owner that has nothing any more."""
        if owner.idle:
            self._owners.pop(owner.uid, None)

    def add(self, connection: Connection) -> None:
        """Queue a connection behind the others of its owner."""
        owner = connection.owner
        if not owner.queue:
            self._turns.append(owner)
        owner.queue.append(connection)
        self.waiting += 1

    def next(self) -> Connection | None:
        """Take the connection whose turn it is, None if nobody may run."""
        for _ in range(len(self._turns)):
            owner = self._turns.popleft()
            if not owner.may_run:
                self._turns.append(owner)
                continue
            connection = owner.queue.popleft()
            self.waiting -= 1
            if owner.queue:
                self._turns.append(owner)
            return connection
        return None

    def drain(self) -> list[Connection]:
        """Take all connections out."""
        taken = [connection for owner in self._turns for connection in owner.queue]
        for owner in self._turns:
            owner.queue.clear()
        self._turns.clear()
        self.waiting = 0
        return taken
