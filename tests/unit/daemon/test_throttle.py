"""How many lines an owner may cause, and that what is left out is counted."""

from __future__ import annotations

import os

from mountd.daemon.throttle import LINES, ROWS, SECONDS, SELDOM_SECONDS, Seldom, Throttle


def test_lines_of_a_window_and_what_was_left_out() -> None:
    throttle = Throttle()
    now = 5.0 * SECONDS
    assert [throttle.admit(1000, now) for _ in range(LINES)] == [0] * LINES
    assert [throttle.admit(1000, now + SECONDS - 0.1) for _ in range(7)] == [None] * 7
    assert throttle.admit(1001, now) == 0
    assert throttle.admit(1000, now + SECONDS) == 7
    assert throttle.admit(1000, now + SECONDS) == 0


def test_first_window_and_any_uid() -> None:
    throttle = Throttle()
    assert throttle.admit(0, 0.0) == 0
    assert throttle.admit((1 << 32) - 1, 0.0) == 0
    assert throttle.admit(ROWS - 1, 0.0) == 0


def test_processes_share_the_counts() -> None:
    throttle = Throttle()
    pid = os.fork()
    if pid == 0:
        for _ in range(LINES):
            throttle.admit(1000, 1.0)
        os._exit(0)
    os.waitpid(pid, 0)
    assert throttle.admit(1000, 1.0) is None


def test_what_nobody_in_particular_is_the_cause_of() -> None:
    seldom = Seldom()
    assert [seldom.admit("one", now / 10) for now in range(20)] == [0] + [None] * 19
    assert seldom.admit("another", 1.0) == 0
    assert seldom.admit("one", SELDOM_SECONDS) == 19
    assert seldom.admit("one", SELDOM_SECONDS + 1) is None
    assert seldom.admit("one", 2 * SELDOM_SECONDS) == 1
    assert seldom.admit("one", 3 * SELDOM_SECONDS) == 0
