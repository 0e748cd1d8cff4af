"""Rules that ask, callers that wait for the answer, and how to wait for what comes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tests.container import USER, as_user
from tests.daemon import Daemon
from tests.e2e.calls import outcome
from tests.e2e.consent.polkit import SECONDS

OTHER = USER + 7


def asking(text: str) -> str:
    return text.replace('verdict = "allow"', 'verdict = "ask"')


class Caller(threading.Thread):
    """A user in a process of its own who asks, and what came of it."""

    def __init__(self, work: Callable[[], object], uid: int = USER) -> None:
        super().__init__()
        self._work, self._uid = work, uid
        self.found: tuple[str, str] | None = None
        self.start()

    def run(self) -> None:
        self.found = as_user(lambda: outcome(self._work), self._uid)

    def result(self) -> tuple[str, str]:
        self.join(SECONDS)
        assert self.found is not None
        return self.found


def eventually(check: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def questions(daemon: Daemon) -> list[int]:
    """What the workers wait for."""
    return [child for worker in daemon.workers for child in daemon.children(worker)]
