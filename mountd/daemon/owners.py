"""Who has to wait for whom: connections with something to read, queued fairly between owners.

An owner is who pays for a request: the uid that made the outermost user namespace, as whoever has a range of
ids can come as any of them; of root's namespaces each is an owner. Owners take turns; one that has enough
requests running, or too many that hang, waits without holding up the others. Nor can several of them
together: while the pool is crowded, only owners that have nothing running get a turn, for which it grows.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mountd.daemon.limits import MAXIMUM_RUNNING_PER_OWNER, MAXIMUM_STUCK_PER_OWNER

if TYPE_CHECKING:
    from mountd.caller.identify import OwnerKey
    from mountd.daemon.connection import Connection


class Owner:
    """What one owner has: connections, requests that run, workers that hang, and its own queue."""

    __slots__ = ("connections", "key", "queue", "running", "stuck")

    def __init__(self, key: OwnerKey) -> None:
        """Nothing yet."""
        self.key = key
        self.connections = 0
        self.running = 0
        self.stuck = 0
        self.queue: deque[Connection] = deque()

    @property
    def uid(self) -> int:
        """Whose requests they are."""
        return self.key[0]

    @property
    def has_first(self) -> bool:
        """Whether it has something to run, and nothing that runs or hangs."""
        return bool(self.queue) and not self.running and not self.stuck

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
        self._owners: dict[OwnerKey, Owner] = {}
        self._turns: deque[Owner] = deque()
        self.waiting = 0  # connections in the queue

    def owner(self, key: OwnerKey) -> Owner:
        """Return the owner with this key, new or known."""
        return self._owners.setdefault(key, Owner(key))

    @property
    def idle_owners(self) -> int:
        """How many wait that have nothing running."""
        return sum(owner.has_first for owner in self._turns)

    def forget_if_idle(self, owner: Owner) -> None:
        """Drop an owner that has nothing any more."""
        if owner.idle:
            self._owners.pop(owner.key, None)

    def add(self, connection: Connection) -> None:
        """Queue a connection behind the others of its owner."""
        owner = connection.owner
        if not owner.queue:
            self._turns.append(owner)
        owner.queue.append(connection)
        self.waiting += 1

    def next(
        self, *, only_idle_owners: bool = False, most_stuck: int = MAXIMUM_STUCK_PER_OWNER
    ) -> Connection | None:
        """Take the connection whose turn it is, None if nobody may run.

        With `only_idle_owners` it is the turn of those only that have nothing running, and of those that get
        a refusal: who has `most_stuck` requests that hang, or more.
        """
        for _ in range(len(self._turns)):
            owner = self._turns.popleft()
            refused = owner.stuck >= most_stuck
            if not owner.may_run or (only_idle_owners and not owner.has_first and not refused):
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
