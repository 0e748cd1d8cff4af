"""How many lines an owner may cause, and that what is left out is counted."""

from __future__ import annotations

import os

import pytest

from mountd.daemon import throttle as module
from mountd.daemon.throttle import LINES, ROWS, SECONDS, SELDOM_SECONDS, WAYS, Seldom, Throttle


def test_lines_of_a_window_and_what_was_left_out() -> None:
    throttle = Throttle()
    now = 5.0 * SECONDS
    assert [throttle.admit((1000, 0), now) for _ in range(LINES)] == [0] * LINES
    assert [throttle.admit((1000, 0), now + SECONDS - 0.1) for _ in range(7)] == [None] * 7
    assert throttle.admit((1001, 0), now) == 0
    assert throttle.admit((1000, 0), now + SECONDS) == 7
    assert throttle.admit((1000, 0), now + SECONDS) == 0


def test_first_window_and_any_uid() -> None:
    throttle = Throttle()
    assert throttle.admit((0, 0), 0.0) == 0
    assert throttle.admit(((1 << 32) - 1, 0), 0.0) == 0
    assert throttle.admit((ROWS - 1, 0), 0.0) == 0
    assert throttle.admit((0, (1 << 32) - 1), 0.0) == 0


OWNERS = [(1000 + way * ROWS, 0) for way in range(WAYS)]


def test_nobody_leaves_out_lines_of_another() -> None:
    """Whose row is the next to its own, as that is another's."""
    throttle = Throttle()
    for owner in OWNERS:
        assert [throttle.admit(owner, 1.0) for _ in range(LINES + 2)] == [0] * LINES + [None] * 2
    assert throttle.admit((0, 1000), SECONDS + 1.0) == 0
    assert [throttle.admit(owner, SECONDS + 2.0) for owner in OWNERS[1:]] == [2] * (WAYS - 1)


def test_containers_that_root_has_made_leave_out_no_lines_of_root() -> None:
    throttle = Throttle()
    assert [throttle.admit((0, 7), 1.0) for _ in range(LINES + 1)][-1] is None
    assert throttle.admit((0, 0), 1.0) == throttle.admit((0, 7 + ROWS), 1.0) == 0


def test_what_was_left_out_is_told_of_whom_it_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if that one never asks again, and others get the row."""
    told: list[dict[str, str]] = []
    monkeypatch.setattr(module, "log", lambda *_, **fields: told.append(fields))
    throttle = Throttle()
    for owner in OWNERS:
        for _ in range(LINES + 3):
            throttle.admit(owner, 1.0)
    assert throttle.admit((1000 + WAYS * ROWS, 0), SECONDS + 1.0) == 0
    assert [(each["owner_uid"], each["left_out"]) for each in told] == [("1000", "3")]


def test_more_owners_than_rows_share_them() -> None:
    throttle = Throttle()
    for owner in OWNERS:
        for _ in range(LINES):
            throttle.admit(owner, 1.0)
    assert throttle.admit((1000 + WAYS * ROWS, 0), 1.0) is None


def test_processes_share_the_counts() -> None:
    throttle = Throttle()
    pid = os.fork()
    if pid == 0:
        for _ in range(LINES):
            throttle.admit((1000, 0), 1.0)
        os._exit(0)
    os.waitpid(pid, 0)
    assert throttle.admit((1000, 0), 1.0) is None


def test_what_nobody_in_particular_is_the_cause_of() -> None:
    seldom = Seldom()
    assert [seldom.admit("one", now / 10) for now in range(20)] == [0] + [None] * 19
    assert seldom.admit("another", 1.0) == 0
    assert seldom.admit("one", SELDOM_SECONDS) == 19
    assert seldom.admit("one", SELDOM_SECONDS + 1) is None
    assert seldom.admit("one", 2 * SELDOM_SECONDS) == 1
    assert seldom.admit("one", 3 * SELDOM_SECONDS) == 0
