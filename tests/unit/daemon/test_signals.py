"""What the daemon makes of signals that come at the worst moment."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from mountd.daemon.main import Daemon


class Turns:
    """In place of the listener: a signal comes while it begins to reload."""

    idle_long_enough = False

    def __init__(self, number: int) -> None:
        self.number, self.turns = number, 0
        self.reloads: list[int] = []
        self.drained: list[int] = []

    def wake_on(self, reader: socket.socket) -> None:
        pass

    def turn(self, until: float) -> bool:
        self.turns += 1
        return self.turns < 4

    def reload(self) -> None:
        self.reloads.append(self.turns)
        if len(self.reloads) == 1:
            os.kill(os.getpid(), self.number)

    def drain(self) -> None:
        self.drained.append(self.turns)


@pytest.mark.parametrize(
    ("number", "reloads", "drained"),
    [(signal.SIGHUP, [1, 2], []), (signal.SIGTERM, [1], [1, 2, 3]), (signal.SIGINT, [1], [1, 2, 3])],
)
def test_a_signal_while_a_reload_begins(number: int, reloads: list[int], drained: list[int]) -> None:
    """A second SIGHUP is another reload, and no reason to end."""
    daemon = Daemon.__new__(Daemon)
    daemon._signals, daemon._watchdog = {signal.SIGHUP}, 60.0
    before = {
        each: signal.signal(each, lambda each, _: daemon._signals.add(each))
        for each in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
    }
    turns = Turns(number)
    try:
        daemon._loop(turns)  # type: ignore[arg-type]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert (turns.reloads, turns.drained) == (reloads, drained)
