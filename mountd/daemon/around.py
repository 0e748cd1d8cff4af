"""The daemon as io.mountd.Admin describes it, and the way of a reload that somebody has asked for.

A worker cannot read the policy for all: it tells the listener (ASK_RELOAD) and hands over the end of a pipe.
What came of it arrives in the pipe once the new policy is in force, or refused; the listener never waits.
That many ask at once costs one reading more than if one did.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mountd.daemon import channel, limits
from mountd.daemon.channel import MAXIMUM_TEXT, Word
from mountd.daemon.counters import BOUNDS, Counters, Figure, Slot
from mountd.errors import ShuttingDown, TimedOut
from mountd.fds import close_all
from mountd.kernel import child
from mountd.service.admin import MAXIMUM_FAULTS, fault
from mountd.wire.framing import MAX_FDS, MAX_MESSAGE

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from mountd.fds import OwnedFd
    from mountd.trust.policy_file import Loaded

RELOAD_SECONDS = 20  # below the deadline of the phase
MAXIMUM_LINE = 1000  # bytes, for the journal
LIMITS = {
    "connections": limits.MAXIMUM_CONNECTIONS,
    "connections of one owner": limits.MAXIMUM_CONNECTIONS_PER_OWNER,
    "seconds until a connection without a request is closed": limits.IDLE_CONNECTION_SECONDS,
    "requests served at the same time": limits.MAXIMUM_WORKERS,
    "requests of one owner served at the same time": limits.MAXIMUM_RUNNING_PER_OWNER,
    "requests that hang": limits.MAXIMUM_STUCK,
    "requests of one owner that hang": limits.MAXIMUM_STUCK_PER_OWNER,
    "bytes in a message": MAX_MESSAGE,
    "descriptors in a message": MAX_FDS,
    **{
        f"seconds of a request in the phase {phase.name}": seconds
        for phase, seconds in limits.DEADLINES.items()
    },
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change: the listener's pid, the sockets, and where the store is."""

    pid: int
    sockets: tuple[str, ...]
    state_dir: Path


class Daemon:
    """What a worker knows of the daemon that it is a part of: `service.context.Around`."""

    def __init__(self, counters: Counters, facts: Facts, own: socket.socket) -> None:
        """`own` is the worker's socket to the listener, borrowed."""
        self._counters = counters
        self._facts = facts
        self._own = own

    def pool(self) -> dict[str, object]:
        """Return a PoolState."""
        slots, get = self._counters.slots(), self._counters.get
        return {
            "workers": sum(slots.values()) - slots[Slot.NONE],
            "idle": slots[Slot.IDLE],
            "busy": slots[Slot.BUSY],
            "stuck": slots[Slot.STUCK],
            "killed": get(Figure.KILLED),
            "forks": get(Figure.FORKS),
            "restarts": max(0, get(Figure.SERVERS) - 1),
            "connections": get(Figure.CONNECTIONS),
            "accepted": get(Figure.ACCEPTED),
            "queue": get(Figure.QUEUE),
        }

    def status(self) -> dict[str, object]:
        """Return pid, started, sockets, store and limits."""
        return {
            "pid": self._facts.pid,
            "started": self._counters.get(Figure.STARTED),
            "sockets": list(self._facts.sockets),
            "store": str(self._facts.state_dir),
            "limits": LIMITS,
        }

    def metrics(self) -> dict[str, object]:
        """Return the counters."""
        get = self._counters.get
        last = {}
        if get(Figure.RELOAD):
            last = {
                "lastReload": get(Figure.RELOAD),
                "lastReloadWorked": bool(get(Figure.RELOAD_WORKED)),
            }
        return {
            "started": get(Figure.STARTED),
            "requests": [
                {"method": method, "result": result, "count": count}
                for method, result, count in self._counters.requests()
            ],
            "bounds": list(BOUNDS),
            "latencies": [
                {"method": method, "at": at, "sum": total}
                for method, at, total in self._counters.latencies()
            ],
            **last,
        }

    def reload(self) -> dict[str, object]:
        """Have the policy read again, and return what came of it. Raises TimedOut, ShuttingDown, OSError."""
        reader, writer = child.pipe()
        with reader:
            with writer:
                os.set_blocking(writer.fileno(), False)  # whoever answers waits for nobody
                channel.tell(self._own, Word.ASK_RELOAD, 0, fds=[writer])
            told, late = child.read_all(reader.fileno(), MAXIMUM_TEXT, RELOAD_SECONDS)
        if late:
            raise TimedOut(RELOAD_SECONDS)
        if not told:
            raise ShuttingDown
        outcome: dict[str, object] = json.loads(told)
        return outcome


def report(loaded: Loaded) -> str:
    """Return a line for the journal, and behind it the reply of Reload as JSON, as one short text."""
    line = str(loaded.problems[0]) if loaded.problems else ""
    line = line.encode("utf-8", "replace")[:MAXIMUM_LINE].decode("utf-8", "ignore").replace("\n", " ")
    faults = [fault(each) for each in loaded.problems[:MAXIMUM_FAULTS]]
    left_out = len(loaded.problems) - len(faults)
    while True:
        more = [{"file": "", "key": "", "reason": f"and {left_out} faults more"}] if left_out else []
        outcome = {
            "reloaded": not loaded.problems,
            "rules": len(loaded.policy.rules),
            "faults": [*faults, *more],
        }
        text = f"{line}\n{json.dumps(outcome, ensure_ascii=False)}"
        if len(text.encode()) <= MAXIMUM_TEXT or not faults:
            return text
        faults.pop()
        left_out += 1


def answer(waiting: list[OwnedFd], outcome: str = "") -> None:
    """Write what came of a reload into pipes that are empty, and close them; "" is for nothing.

    Who asked may have gone.
    """
    for pipe in waiting:
        with contextlib.suppress(OSError):
            os.write(pipe.fileno(), outcome.encode())
    close_all(waiting)
